"""What is proved of models before private records are touched: faults are found, and cures work.

Sensitivity is measured through both engines without noise: by how far the weights move when one record goes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.config import DpSgdConfig, ModelConfig
from privkd.data.scenario import LabelledSet
from privkd.errors import ModelError
from privkd.models.zoo import build
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.randomness import Randomness, SeededRandomness, SystemRandomness, Uniforms
from privkd.training.dpsgd import Mechanism, check_trainable, fastest_mode, full_precision, train_private
from privkd.training.fit import logits_of
from privkd.training.proof import Probe, check_apart
from privkd.training.recordwise import Recordwise, record_digests
from privkd.training.vectorised import formulation, train_cohort

SHAPE, CLASSES, RECORDS = (1, 8, 8), 4, 24
ENGINES = ("opacus", "cohort")


class Quiet:
    """All records, no noise, and layers' draws from a source."""

    def __init__(self, source: Randomness) -> None:
        self._source = source

    def sample(self, records: int, sampling_rate: float) -> Tensor:
        return torch.ones(records, dtype=torch.bool)

    def samples(self, steps: int, records: int, sampling_rate: float) -> Tensor:
        return torch.ones((steps, records), dtype=torch.bool)

    def noise(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    def layers(self, step: int, records: Sequence[bytes]) -> list[Uniforms]:
        return self._source.layers(step, records)


def mechanism(part: str = "all", probe: Probe | None = None, alpha: float = 0.1) -> Mechanism:
    recipe = DpSgdConfig(
        steps=1,
        sampling_rate=1.0,
        learning_rate=1.0,
        averaging=1.0,
        clip_norm=1.0,
        part=part,  # type: ignore[arg-type]
    )
    return Mechanism(recipe, 1.0, 1.0, alpha=alpha, temperature=1.0, probe=probe)


def images(seed: int = 0) -> LabelledSet:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand((RECORDS, *SHAPE), generator=generator)
    inputs[0] = 50.0
    return LabelledSet(inputs, torch.arange(RECORDS) % CLASSES)


def tokens(seed: int = 0) -> LabelledSet:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, 50, (RECORDS, 12), generator=generator).float()
    return LabelledSet(inputs, torch.arange(RECORDS) % CLASSES)


def moved(
    engine: str,
    model: nn.Module,
    shard: LabelledSet,
    targets: Tensor | None,
    how: Mechanism,
    source: Randomness,
) -> Tensor:
    quiet = Quiet(source)
    if engine == "opacus":
        trained = train_private(model, shard, targets, how, quiet)
    else:
        (trained,) = train_cohort([model], [shard], None if targets is None else [targets], how, [quiet])
    pairs = zip(model.parameters(), trained.parameters(), strict=True)
    return torch.cat([(a - b).detach().double().flatten() for a, b in pairs])


def sensitivity(
    engine: str,
    model: nn.Module,
    shard: LabelledSet,
    teach: Callable[[Tensor], Tensor] | None = None,
    gone: int = 0,
    **how: Any,
) -> float:
    """How far one record less moves the clipped sum, in clip norms."""
    kept = [i for i in range(len(shard)) if i != gone]
    less = LabelledSet(shard.inputs[kept], shard.labels[kept])
    both = [
        moved(engine, model, some, teach and teach(some.inputs), mechanism(**how), SeededRandomness(0))
        for some in (shard, less)
    ]
    return float((both[0] - both[1]).norm())


class Rows(nn.Module):
    """Applies its layers to every row of an image at once, and holds a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.full((1,), 0.1))
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0] * 8, 8) - self.shift
        out: Tensor = self.head(torch.tanh(self.body(rows))).reshape(x.shape[0], 8, -1).mean(1)
        return out


class Tied(nn.Module):
    """One weight, used by a layer and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = nn.Linear(64, 16), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.enc(x.flatten(1)))
        out: Tensor = self.head(torch.tanh(F.linear(z, self.enc.weight.t())))
        return out


class Unused(nn.Module):
    """A layer that nothing goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.head = nn.Linear(3, 3), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


class Positions(nn.Module):
    """Positions are looked up once and broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.head = nn.Embedding(50, 8), nn.Embedding(12, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device)[None]
        out: Tensor = self.head(torch.tanh(self.word(x.long()) + self.position(where)).mean(1))
        return out


class Centred(nn.Module):
    """Centres its features over the batch; on tokens, or on numbers."""

    def __init__(self, words: bool) -> None:
        super().__init__()
        self.body: nn.Module = nn.Embedding(50, 8) if words else nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x.long()).mean(1) if isinstance(self.body, nn.Embedding) else self.body(x)
        out: Tensor = self.head(z - z.mean(0, keepdim=True))
        return out


class Gate(nn.Module):
    """Mixes records behind a gate that is shut at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.lin.weight)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.lin(x.mean(0, keepdim=True).expand_as(x))
        return mixed


class Calibrating(nn.Module):
    """Learns the mean of its inputs in training, into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.copy_(x.mean(0))
            return x
        centred: Tensor = x - self.mean
        return centred


class Remembering(nn.Module):
    """Answers by the records that it saw before."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last = nn.Linear(64, CLASSES), torch.zeros(64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) + 0.1 * self.last.to(x)
        self.last = x[-1].detach()
        out: Tensor = self.head(x)
        return out


def dense(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), *layers, nn.Linear(16, CLASSES))


def frozen_norm() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    return nn.Sequential(body, nn.Linear(144, CLASSES))


def parametrized() -> nn.Module:
    return dense(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))


GOOD: dict[str, tuple[Callable[[], nn.Module], Callable[[], LabelledSet]]] = {
    "rows": (Rows, images),
    "tied": (Tied, images),
    "unused": (Unused, images),
    "frozen batch norm": (frozen_norm, images),
    "weight norm": (parametrized, images),
    "dropout": (lambda: dense(nn.Dropout(0.5)), images),
    "calibrating": (lambda: nn.Sequential(nn.Flatten(), Calibrating(), nn.Linear(64, CLASSES)), images),
    "positions": (Positions, tokens),
}


def probe_of(shard: LabelledSet) -> Probe:
    return Probe.of(shard.inputs, CLASSES)


class TestWhatTreatsRecordsByThemselves:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("name", GOOD)
    def test_is_clipped_record_by_record(self, name: str, engine: str) -> None:
        """Also where hooks see consistent but wrong batches, which made 287 of an epsilon of 2.995."""
        make, records = GOOD[name]
        torch.manual_seed(0)
        model, shard = make(), records()
        probe = probe_of(shard)
        check_trainable(
            model,
            input_shape=tuple(shard.inputs.shape[1:]),
            classes=CLASSES,
            recipe=DpSgdConfig(),
            probe=probe,
        )
        for gone in (0, 5):
            assert sensitivity(engine, model, shard, gone=gone, probe=probe) <= 1 + 1e-4

    @pytest.mark.parametrize("name", GOOD)
    def test_and_both_engines_agree(self, name: str) -> None:
        make, records = GOOD[name]
        torch.manual_seed(0)
        model, shard = make(), records()
        how = mechanism(probe=probe_of(shard))
        one, other = (moved(engine, model, shard, None, how, SeededRandomness(3)) for engine in ENGINES)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    def test_what_hooks_get_wrong_takes_another_way(self) -> None:
        shard = images()
        how = mechanism(probe=probe_of(shard))
        assert fastest_mode(Rows(), shard.inputs, how) == "autograd"
        assert formulation(Rows(), SHAPE) == "vmap"
        assert fastest_mode(dense(), shard.inputs, how) == "ew"

    def test_hooks_would_have_given_eight_clip_norms(self) -> None:
        """The power of the sensitivity test: the broken twin is the mode without its proof."""
        torch.manual_seed(0)
        model, shard = Rows(), images()
        less = LabelledSet(shard.inputs[1:], shard.labels[1:])
        both = [
            train_private(model, some, None, mechanism(), Quiet(SeededRandomness(0)), mode="hooks")
            for some in (shard, less)
        ]
        first, second = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in both)
        assert float((first - second).norm()) > 2

    @pytest.mark.parametrize("engine", ENGINES)
    def test_nothing_of_the_records_stays_in_the_student(self, engine: str) -> None:
        model = nn.Sequential(nn.Flatten(), Calibrating(), nn.Linear(64, CLASSES))
        shard, how = images(), mechanism(probe=probe_of(images()))
        trained = (
            train_private(model, shard, None, how, Quiet(SeededRandomness(0)))
            if engine == "opacus"
            else train_cohort([model], [shard], None, how, [Quiet(SeededRandomness(0))])[0]
        )
        assert torch.equal(trained[1].mean, torch.zeros(64))  # type: ignore[index, union-attr, arg-type]


MIXING: dict[str, tuple[Callable[[], nn.Module], Callable[[], LabelledSet], str]] = {
    "batch norm": (lambda: dense(nn.BatchNorm1d(16)), images, r"'3' \(BatchNorm1d\): use GroupNorm"),
    "centred tokens": (lambda: Centred(True), tokens, "its own forward"),
    "centred numbers": (lambda: Centred(False), tokens, "its own forward"),
    "shut gate": (lambda: dense(Gate(16)), images, r"'3' \(Gate\)"),
    "memory": (Remembering, images, "saw before"),
}


class TestWhatMixesRecords:
    @pytest.mark.parametrize("name", MIXING)
    def test_is_refused_by_name(self, name: str) -> None:
        make, records, words = MIXING[name]
        shard = records()
        with pytest.raises(ModelError, match=words) as refused:
            check_trainable(
                make(),
                input_shape=tuple(shard.inputs.shape[1:]),
                classes=CLASSES,
                recipe=DpSgdConfig(part="all"),
                probe=probe_of(shard),
            )
        assert len(str(refused.value).splitlines()) == 1

    def test_equal_public_records_hide_nothing(self) -> None:
        shard = LabelledSet(torch.full((RECORDS, *SHAPE), 0.7), torch.zeros(RECORDS, dtype=torch.int64))
        with pytest.raises(ModelError, match="other records"):
            check_apart(dense(Gate(16)).train(), probe_of(shard), "student")

    def test_a_teacher_likewise(self) -> None:
        bad = dense(nn.BatchNorm1d(16, track_running_stats=False)).eval()
        with pytest.raises(ModelError, match=r"teacher cannot teach private records.*BatchNorm1d"):
            check_apart(bad, probe_of(images()), "teacher")
        check_apart(dense(nn.BatchNorm1d(16)).eval(), probe_of(images()), "teacher")

    def test_such_a_teacher_would_move_the_sum_by_more_than_the_clip_norm(self) -> None:
        torch.manual_seed(0)
        bad = dense(nn.BatchNorm1d(16, track_running_stats=False)).eval()
        student = build(ModelConfig(name="mlp"), input_shape=SHAPE, classes=CLASSES, seed=0)
        assert sensitivity("cohort", student, images(), lambda x: logits_of(bad, x), alpha=1.0) > 1.05


class TestLayersDraws:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.RReLU()], ids=str)
    def test_shift_with_no_neighbour(self, layer: nn.Module, engine: str) -> None:
        model = dense(layer)
        if isinstance(layer, nn.RReLU):
            with pytest.raises(ModelError, match="rrelu_with_noise"):
                sensitivity(engine, model, images(), probe=probe_of(images()))
            return
        for gone in (0, 7, RECORDS - 1):
            assert sensitivity(engine, model, images(), gone=gone, probe=probe_of(images())) <= 1 + 1e-4

    @settings(max_examples=20, deadline=None)
    @given(gone=st.integers(0, RECORDS - 1), seed=st.integers(0, 100))
    def test_of_a_record_are_its_own(self, gone: int, seed: int) -> None:
        shard = images(seed)
        kept = [i for i in range(RECORDS) if i != gone]
        dropout = nn.Dropout(0.5).train()

        def drawn(numbers: Sequence[int]) -> Tensor:
            some = LabelledSet(shard.inputs[list(numbers)], shard.labels[list(numbers)])
            digests = record_digests(some.inputs, some.labels)
            with Recordwise(len(digests), lambda: SeededRandomness(seed).layers(3, digests)):
                out: Tensor = dropout(torch.ones((len(digests), 50)))
            return out

        assert torch.equal(drawn(range(RECORDS))[kept], drawn(kept))

    def test_differ_by_source_step_and_record(self) -> None:
        root, digest = NoiseRoot.from_seed(0), b"record"
        sources: dict[str, Randomness] = {
            "seed 0": SeededRandomness(0),
            "seed 1": SeededRandomness(1),
            "another round": SeededRandomness(0, "device", 1),
            "system": SystemRandomness(root, "device", 0),
            "its next round": SystemRandomness(root, "device", 1),
        }
        streams = [
            source.layers(step, [record])[0](8)
            for source in sources.values()
            for step in (0, 1)
            for record in (digest, b"other")
        ]
        assert len({tuple(stream.tolist()) for stream in streams}) == len(streams)
        again = SystemRandomness(root, "device", 0).layers(0, [digest])[0](8)
        assert torch.equal(again, SystemRandomness(root, "device", 0).layers(0, [digest])[0](8))

    @pytest.mark.parametrize(
        "source", [SeededRandomness(0), SystemRandomness(NoiseRoot.from_seed(0))], ids=type
    )
    def test_follow_their_laws(self, source: Randomness) -> None:
        """Means of 40,000 draws within 5 standard deviations: one of eight fails once in 200,000 tries."""
        with Recordwise(40, lambda: source.layers(0, [bytes([i]) for i in range(40)])):
            uniform, normal = torch.rand(40, 1000), torch.randn(40, 1000)
            dropped = F.dropout(torch.ones(40, 1000), 0.3, training=True)
            coins = torch.empty(40, 1000).bernoulli_(0.2)
        count = 40_000
        for values, mean, std in (
            (uniform, 0.5, 12**-0.5),
            (normal, 0.0, 1.0),
            (dropped, 1.0, (0.3 / 0.7) ** 0.5),
            (coins, 0.2, 0.4),
        ):
            assert abs(float(values.double().mean()) - mean) < 5 * std / math.sqrt(count)

    def test_that_records_would_share_are_not_drawn_for_several(self) -> None:
        with (
            Recordwise(3, lambda: SeededRandomness(0).layers(0, [b"a", b"b", b"c"])),
            pytest.raises(ModelError, match="for 3 records at once"),
        ):
            torch.rand(5)


class TestSums:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_of_many_aligned_records_keep_their_sensitivity(self, engine: str) -> None:
        """In float32 one record more moved the sum of 10,000 by up to 1.0009 clip norms."""
        torch.manual_seed(0)
        model = nn.Linear(784, 10, bias=False)
        nn.init.zeros_(model.weight)
        inputs = 50 * (torch.rand(784) + 0.01 * torch.rand(10_000, 784))
        shard = LabelledSet(inputs, torch.zeros(len(inputs), dtype=torch.int64))
        # What is left is the float32 of the weights themselves, which move by 10,000 clip norms.
        assert sensitivity(engine, model, shard) <= 1 + 1e-4

    def test_are_made_in_full_precision(self) -> None:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        seen = []

        class Asking(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(64, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
                out: Tensor = self.head(x.flatten(1))
                return out

        try:
            with full_precision():
                pass
            assert torch.backends.cudnn.allow_tf32
            train_private(Asking(), images(), None, mechanism(), Quiet(SeededRandomness(0)), mode="hooks")
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        assert set(seen) == {(False, False)}


def test_a_probe_keeps_the_type_of_its_records() -> None:
    whole = probe_of(tokens()).inputs
    assert torch.equal(whole, whole.round())
    assert (whole >= 1).all()
    assert (whole < 50).all()
    assert len(whole.unique(dim=0)) == len(whole)
    assert probe_of(images()).inputs.max() > images().inputs.max(), "an extreme record"
    assert probe_of(images()) == probe_of(copy.deepcopy(images()))
    assert probe_of(images()) != probe_of(images(1))
    assert replace(mechanism(), probe=probe_of(images())) != mechanism()
