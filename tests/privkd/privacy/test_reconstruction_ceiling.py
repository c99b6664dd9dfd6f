"""The most that a ledger's events let anyone rebuild: known answers, exact oracles, and edges."""

import math

import pytest
from scipy.stats import norm

from privkd.errors import InputError
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, ZCdp
from privkd.privacy.robustness import reconstruction_ceiling

MU = {1: 0.2680, 2: 0.5020, 4: 0.9250, 8: 1.6660}
"""Of one Gaussian release at delta 1e-5."""
KNOWN = {
    (10, 1): 0.155,
    (10, 2): 0.218,
    (10, 4): 0.361,
    (10, 8): 0.650,
    (256, 1): 0.008,
    (256, 2): 0.015,
    (256, 4): 0.041,
    (256, 8): 0.160,
}


@pytest.mark.parametrize(("candidates", "epsilon"), KNOWN)
def test_known_answers(candidates: int, epsilon: int) -> None:
    ceiling = reconstruction_ceiling([DpSgd(1 / MU[epsilon], 1.0, 1)], 1 / candidates)
    assert ceiling == pytest.approx(KNOWN[candidates, epsilon], abs=6e-4)


def test_steps_compose_as_gaussians_do() -> None:
    steps = reconstruction_ceiling([DpSgd(6.0, 1.0, 5)] * 5, 0.1)
    assert steps == pytest.approx(norm.cdf(norm.ppf(0.1) + 5 / 6))
    assert steps == reconstruction_ceiling([DpSgd(6.0, 1.0, 25), PostProcessing("its answers")], 0.1)


def exact_one_step(noise: float, rate: float, kappa: float) -> float:
    """Neyman and Pearson on one subsampled step, with the record added or removed."""
    with_record = (1 - rate) * kappa + rate * norm.sf(norm.isf(kappa) - 1 / noise)

    def mixture(x: float) -> float:
        return float((1 - rate) * norm.cdf(x) + rate * norm.cdf(x - 1 / noise))

    low, high = -20.0, 20.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mixture(middle) < kappa else (low, middle)
    return max(float(with_record), float(norm.cdf(low)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kappa", [0.5, 0.1, 0.004])
def test_one_sampled_step_is_bounded_closely_from_above(rate: float, kappa: float) -> None:
    ceiling, exact = reconstruction_ceiling([DpSgd(1.0, rate, 1)], kappa), exact_one_step(1.0, rate, kappa)
    assert exact <= ceiling <= 1.01 * exact
    assert ceiling <= reconstruction_ceiling([DpSgd(1.0, 1.0, 1)], kappa)


def test_more_steps_and_less_noise_allow_more() -> None:
    grown = [reconstruction_ceiling([DpSgd(1.0, 0.1, steps)], 0.1) for steps in (1, 10, 40)]
    quieter = [reconstruction_ceiling([DpSgd(noise, 0.1, 10)], 0.1) for noise in (4.0, 2.0, 1.0)]
    assert grown == sorted(grown)
    assert quieter == sorted(quieter)
    assert max(*grown, *quieter) < 1


@pytest.mark.parametrize("rho", [1e-4, 0.01, 0.3])
@pytest.mark.parametrize("kappa", [0.5, 0.2, 0.001])
def test_zcdp_allows_no_less_than_the_gaussian_that_attains_it(rho: float, kappa: float) -> None:
    ceiling = reconstruction_ceiling([ZCdp(rho / 2)] * 2, kappa)
    assert norm.cdf(norm.ppf(kappa) + math.sqrt(2 * rho)) <= ceiling < 1


def test_the_ends() -> None:
    assert reconstruction_ceiling([], 0.1) == pytest.approx(0.1)
    assert reconstruction_ceiling([PostProcessing("nothing")], 0.1) == pytest.approx(0.1)
    assert reconstruction_ceiling([NoPrivacy("plain")], 0.1) == 1
    assert reconstruction_ceiling([DpSgd(0.0, 1.0, 1)], 0.1) == 1
    assert reconstruction_ceiling([ZCdp(1e6)], 0.1) == 1
    assert reconstruction_ceiling([DpSgd(1e5, 0.5, 1)], 0.1) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("kappa", [0.0, 1.0, -0.1, math.nan])
def test_a_prior_that_is_none_is_refused(kappa: float) -> None:
    with pytest.raises(InputError, match="kappa"):
        reconstruction_ceiling([DpSgd(1.0, 1.0, 1)], kappa)
