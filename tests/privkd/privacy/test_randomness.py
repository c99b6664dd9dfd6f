"""Where samples and protective noise come from: their laws, and that no seed reaches a deployment's."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from privkd.config import DpSgdConfig
from privkd.data.scenario import LabelledSet
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import (
    Randomness,
    SeededRandomness,
    SystemRandomness,
    derive_seed,
    seeded_generator,
)
from privkd.training.dpsgd import Mechanism, train_private
from privkd.training.vectorised import train_cohort


class TestSeeds:
    def test_purposes_do_not_share_a_stream(self) -> None:
        labels: list[tuple[Any, ...]] = [(), ("a",), ("a", "b"), ("ab",), ("a", 1), ("a", 2), ("b", 1)]
        seeds = {derive_seed(0, *label) for label in labels} | {derive_seed(1, *label) for label in labels}
        assert len(seeds) == 2 * len(labels)
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_a_generator_repeats(self) -> None:
        one, two = seeded_generator(3, "x"), seeded_generator(3, "x")
        assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=two))

    def test_samples_do_not_hang_on_noise(self) -> None:
        """So that a longer model leaves the Poisson samples as they were."""
        one, two = SeededRandomness(3, "x"), SeededRandomness(3, "x")
        one.noise(10)
        two.noise(1000)
        assert torch.equal(one.sample(50, 0.5), two.sample(50, 0.5))

    @pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
    @pytest.mark.parametrize("kind", ["seeded", "system"])
    def test_poisson_samples(self, kind: str, rate: float) -> None:
        """Each record by itself with the rate: the count of 200 x 500 draws within 5.5 sigma (false alarm
        4e-8), and the records' own counts no more spread than binomial (chi-square at 1e-6)."""
        source = (
            SeededRandomness(1, "s") if kind == "seeded" else SystemRandomness(NoiseRoot.from_seed(1), "s")
        )
        draws = torch.stack([source.sample(500, rate) for _ in range(200)]).double()
        assert abs(float(draws.sum()) - 100_000 * rate) <= 5.5 * math.sqrt(100_000 * rate * (1 - rate)) + 1e-9
        if rate < 1:
            spread = float(((draws.sum(0) - 200 * rate) ** 2).sum()) / (200 * rate * (1 - rate))
            assert stats.chi2(500).ppf(5e-7) < spread < stats.chi2(500).ppf(1 - 5e-7)
        else:
            assert bool((draws == 1).all()), "a rate of 1 takes everyone"


@pytest.mark.parametrize(
    "make", [lambda: SeededRandomness(3, "d"), lambda: SystemRandomness(NoiseRoot.from_seed(1), "d")]
)
def test_samples_of_many_steps_are_those_of_each(make: Callable[[], Randomness]) -> None:
    together, apart = make(), make()
    for steps in (1, 4, 7):
        expected = torch.stack([apart.sample(257, 0.3) for _ in range(steps)])
        assert torch.equal(together.samples(steps, 257, 0.3), expected)


class TestSystemRandomness:
    def test_no_seed_reaches_it(self) -> None:
        """Whatever every generator of the process was seeded with, two devices of two runs differ."""
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            source = SystemRandomness(NoiseRoot.from_system(), "device-0000", 0)
            drawn.append((source.noise(100), source.sample(1000, 0.5)))
        assert not torch.equal(drawn[0][0], drawn[1][0])
        assert not torch.equal(drawn[0][1], drawn[1][1])

    def test_and_it_reaches_no_generator(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        SystemRandomness(NoiseRoot.from_system(), "d").noise(100)
        assert torch.equal(torch.rand(4), expected)

    def test_replays_from_the_same_root(self) -> None:
        root = NoiseRoot.from_system()
        one, two = SystemRandomness(root, "device-0001", 4), SystemRandomness(root, "device-0001", 4)
        assert torch.equal(one.noise(77), two.noise(77))
        assert torch.equal(one.sample(77, 0.3), two.sample(77, 0.3))

    def test_devices_and_rounds_differ(self) -> None:
        root = NoiseRoot.from_system()
        noises = [SystemRandomness(root, *labels).noise(50) for labels in
                  (("device-0001", 4), ("device-0001", 5), ("device-0002", 4))]  # fmt: skip
        assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])

    def test_normal(self) -> None:
        """KS and moments of 200,000 draws under a fixed root: decided once, so no false alarms; under other
        roots 1 in 1e6. The same test refuses a sigma of 1.02."""
        source = SystemRandomness(NoiseRoot.from_seed(5), "normal")
        drawn = torch.cat([source.noise(50_001), source.noise(149_999)]).double().numpy()
        assert stats.kstest(drawn, "norm").pvalue > 1e-6
        assert stats.kstest(drawn * 1.02, "norm").pvalue < 1e-6
        assert abs(drawn.mean()) < 5 / math.sqrt(len(drawn))
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(len(drawn))

    def test_noise_of_any_size(self) -> None:
        source = SystemRandomness(NoiseRoot.from_seed(5), "sizes")
        for size in (0, 1, 2, 7):
            assert source.noise(size).shape == (size,)
            assert source.noise(size).dtype == torch.float64
            assert source.sample(size, 0.5).shape == (size,)
            assert source.sample(size, 0.5).dtype == torch.bool


class TestPrecision:
    """Noise meets the clipped sum in float64, and the sum alone is rounded (Mironov 2012)."""

    SCALE = 1.1 * 0.7

    def stepped(self, source: SystemRandomness, engine: str) -> Tensor:
        """Weights of a student after one step of rate 1 from zero on no records: the noised sum, negated."""
        model = nn.Linear(200, 50, bias=False)
        nn.init.zeros_(model.weight)
        recipe = DpSgdConfig(steps=1, sampling_rate=0.5, clip_norm=0.7, learning_rate=1.0)
        mechanism = Mechanism(recipe, 1.1, expected_batch_size=1.0, alpha=0.0, temperature=1.0)
        shard = LabelledSet(torch.zeros(0, 200), torch.zeros(0, dtype=torch.int64))
        if engine == "opacus":
            return train_private(model, shard, None, mechanism, source).weight.detach().flatten()
        return train_cohort([model], [shard], None, mechanism, [source])[0].weight.detach().flatten()

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    def test_the_noised_sum_is_rounded_once(self, engine: str) -> None:
        root = NoiseRoot.from_seed(3)
        draws = SystemRandomness(root, "d").noise(200 * 50)
        weights = self.stepped(SystemRandomness(root, "d"), engine)
        assert torch.equal(weights, -(self.SCALE * draws).float())
        early = -(self.SCALE * draws.float())
        assert float((weights != early).double().mean()) > 0.1, "noise rounded before would show"

    def test_draws_hold_more_than_float32_does(self) -> None:
        draws = SystemRandomness(NoiseRoot.from_system(), "d").noise(10_000)
        assert float((draws != draws.float().double()).double().mean()) > 0.999
