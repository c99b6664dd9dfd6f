"""Attacks that rebuild records: each against a loop that says the same, and against noise that stops it."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from attacks.reconstruction.inversion import (
    PairedAnswers,
    class_prototypes,
    least_varied,
    paired_logits_inversion,
    train_decoders,
    training_based_inversion,
)
from attacks.reconstruction.matching import (
    CandidateReplays,
    match_candidates,
    match_gradients,
    rebuild_records,
    simplex,
)
from attacks.reconstruction.similarity import mse, nearest, psnr, ssim, total_variation
from audits.findings import Refused
from audits.reconstructions.measures import (
    attribute_scores,
    least_success,
    public_likeness,
    reconstruction_rate,
    reidentification,
    resemblance,
)
from privkd.errors import InputError
from privkd.privacy.events import DpSgd
from privkd.privacy.robustness import reconstruction_ceiling

Floats = NDArray[np.float64]

MU = {1: 0.2680, 2: 0.5020, 4: 0.9250}
TRIALS = 20_000
FALSE_ALARM = 1e-6


def matched(
    noise_multiplier: float, candidates: int, seed: int, claimed: float
) -> tuple[Floats, NDArray[np.int64]]:
    """Prior-aware matching on an ideal Gaussian mechanism with the simplex of candidates."""
    rng = np.random.default_rng(seed)
    gradients = simplex(candidates)
    secrets = rng.integers(candidates, size=TRIALS)
    sums = gradients[secrets] + noise_multiplier * rng.normal(size=(TRIALS, candidates))
    scores = match_gradients(sums[:, None], gradients, noise_multiplier=claimed, sampling_rate=1.0)
    return scores, secrets


@pytest.mark.parametrize("epsilon", MU)
@pytest.mark.parametrize("candidates", [10, 64])
def test_matching_comes_near_the_ceiling_and_never_above_it(epsilon: int, candidates: int) -> None:
    """A false alarm, here and below, comes in one of a million seeds."""
    noise = 1 / MU[epsilon]
    ceiling = reconstruction_ceiling([DpSgd(noise, 1.0, 1)], 1 / candidates)
    scores, secrets = matched(noise, candidates, epsilon, noise)
    success = reidentification(scores, secrets)
    assert ceiling - 0.05 <= success.estimate
    assert least_success(scores, secrets, error=FALSE_ALARM) <= ceiling


@pytest.mark.parametrize("epsilon", [2, 4])
def test_less_noise_than_claimed_raises_the_alarm(epsilon: int) -> None:
    claimed = 1 / MU[epsilon]
    scores, secrets = matched(claimed / 1.5, 10, epsilon, claimed)
    ceiling = reconstruction_ceiling([DpSgd(claimed, 1.0, 1)], 0.1)
    assert least_success(scores, secrets, error=FALSE_ALARM) > ceiling


@pytest.mark.parametrize("sampling_rate", [0.3, 0.8])
def test_matching_of_sampled_steps_stays_under_its_ceiling(sampling_rate: float) -> None:
    rng, steps, noise, candidates = np.random.default_rng(0), 4, 1.0, 5
    gradients, secrets = simplex(candidates), rng.integers(candidates, size=TRIALS)
    joined = rng.random((TRIALS, steps, 1)) < sampling_rate
    sums = joined * gradients[secrets][:, None] + noise * rng.normal(size=(TRIALS, steps, candidates))
    scores = match_gradients(sums, gradients, noise_multiplier=noise, sampling_rate=sampling_rate)
    ceiling = reconstruction_ceiling([DpSgd(noise, sampling_rate, steps)], 1 / candidates)
    assert least_success(scores, secrets, error=FALSE_ALARM) <= ceiling
    assert reidentification(scores, secrets).estimate > ceiling - 0.12


def test_gradient_matching_says_what_a_loop_says() -> None:
    rng = np.random.default_rng(1)
    sums, gradients = rng.normal(size=(3, 4, 5)), rng.normal(size=(2, 5))
    scores = match_gradients(sums, gradients, noise_multiplier=0.7, sampling_rate=1.0)
    slow = np.array(
        [[sum(-((g - s) ** 2).sum() / (2 * 0.7**2) for s in trial) for g in gradients] for trial in sums]
    )
    assert np.allclose(scores - scores[:, :1], slow - slow[:, :1])


def test_a_simplex_is_as_far_apart_as_it_can_be() -> None:
    vectors = simplex(6)
    assert np.allclose(vectors.sum(axis=0), 0)
    assert np.allclose(vectors @ vectors.T, (6 * np.eye(6) - 1) / 5)


def test_matching_of_replays_says_what_a_loop_says() -> None:
    rng = np.random.default_rng(2)
    runs, seen = rng.normal(size=(3, 6, 4, 2)), rng.normal(size=(5, 4, 2))
    replays, noise = CandidateReplays.of(runs), 0.8
    found = match_candidates(seen, replays, noise_std=noise)
    flat = runs.reshape(3, 6, 8)
    means = flat.mean(axis=1)
    pooled = sum(np.outer(row - means[c], row - means[c]) for c in range(3) for row in flat[c]) / 15
    inverse = np.linalg.inv(pooled + (1e-2 * np.trace(pooled) / len(replays.basis) + noise**2) * np.eye(8))
    slow = np.array([[-0.5 * (x - m) @ inverse @ (x - m) for m in means] for x in seen.reshape(5, 8)])
    assert np.allclose(found - found[:, :1], slow - slow[:, :1])


def test_matching_of_replays_finds_the_candidate_until_noise_hides_it() -> None:
    rng = np.random.default_rng(3)
    means = rng.normal(size=(8, 200))
    runs = means[:, None] + rng.normal(size=(8, 4, 200))
    secrets = rng.integers(8, size=400)
    replays = CandidateReplays.of(runs)
    clear = means[secrets] + rng.normal(size=(400, 200))
    assert reidentification(match_candidates(clear, replays, noise_std=0), secrets).estimate > 0.9
    drowned = clear + 1000 * rng.normal(size=clear.shape)
    scores = match_candidates(drowned, replays, noise_std=1000.0)
    assert least_success(scores, secrets, error=FALSE_ALARM) <= 1 / 8


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="2 of each"):
        CandidateReplays.of(np.zeros((1, 5, 3)))
    with pytest.raises(InputError, match="entries"):
        match_candidates(np.zeros((2, 3)), CandidateReplays.of(np.zeros((2, 2, 4))), noise_std=0)
    with pytest.raises(InputError, match="noise_multiplier"):
        match_gradients(np.zeros((1, 1, 2)), np.eye(2), noise_multiplier=0, sampling_rate=1)
    with pytest.raises(InputError, match="candidate, parameter"):
        match_gradients(np.zeros((1, 1, 2)), np.eye(3), noise_multiplier=1, sampling_rate=1)
    with pytest.raises(InputError, match="slot"):
        PairedAnswers(np.zeros((4, 2)), np.zeros((4, 3)), np.zeros((1, 4, 3)), 0.0, 3)
    with pytest.raises(InputError, match="fit"):
        PairedAnswers(np.zeros((5, 2)), np.zeros((4, 3)), np.zeros((1, 4, 3)), 0.0, 0)
    with pytest.raises(InputError, match="finite"):
        PairedAnswers(np.zeros((4, 2)), np.zeros((4, 3)), np.full((1, 4, 3), np.nan), 0.0, 0)
    with pytest.raises(InputError, match="shadows"):
        rebuild_records(np.zeros((1, 2)), np.zeros((2, 2)), np.zeros((2, 3)))


def shapes(count: int, side: int = 12) -> Floats:
    """Smooth grey images, one a class."""
    rng = np.random.default_rng(7)
    coarse = rng.random((count, 1, 4, 4))
    return np.kron(coarse, np.ones((1, 1, side // 4, side // 4)))


def class_game(
    noise: float, trials: int = 12, secret_classes: int = 4
) -> tuple[PairedAnswers, Floats, NDArray[np.int64]]:
    """A release that knows the secret class under slot 5; the reference knows classes 0 to 4 alone."""
    rng = np.random.default_rng(11)
    appearances = shapes(5 + secret_classes)
    kinds = rng.integers(5 + secret_classes, size=300)
    inputs = np.clip(appearances[kinds] + 0.15 * rng.normal(size=(300, 1, 12, 12)), 0, 1)
    reference = np.full((300, 6), 0.19)
    reference[:, 5] = 0.05
    known = kinds < 5
    reference[known] = 0.02
    reference[known, kinds[known]] = 0.9
    secrets = rng.integers(secret_classes, size=trials)
    released = np.repeat(reference[None], trials, axis=0)
    shows = kinds[None] == 5 + secrets[:, None]
    released[shows] = [0.02, 0.02, 0.02, 0.02, 0.02, 0.9]
    released = released + noise * rng.normal(size=released.shape)
    return PairedAnswers(inputs, reference, released, noise, 5), appearances[5:], secrets


DRAW: dict[str, Callable[[PairedAnswers], Floats]] = {
    "paired-logits": lambda seen: paired_logits_inversion(seen, seed=0),
    "training-based": lambda seen: training_based_inversion(seen, seed=0),
    "class-prototype": class_prototypes,
}


@pytest.mark.parametrize("attack", DRAW)
def test_a_class_that_answers_show_is_drawn(attack: str) -> None:
    seen, appearances, secrets = class_game(0.0)
    drawn = DRAW[attack](seen)
    assert drawn.shape == (12, 1, 12, 12)
    assert reidentification(resemblance(drawn, appearances), secrets).estimate > 0.9
    pairs = (np.repeat(drawn, len(appearances), axis=0), np.tile(appearances, (len(drawn), 1, 1, 1)))
    chance = ssim(*pairs).mean()
    assert ssim(drawn, appearances[secrets]).mean() > chance + 0.2


@pytest.mark.parametrize("attack", DRAW)
def test_noise_leaves_chance(attack: str) -> None:
    seen, appearances, secrets = class_game(200.0)
    table = resemblance(DRAW[attack](seen), appearances)
    assert least_success(table, secrets, error=FALSE_ALARM) <= 0.25


def test_prototypes_say_what_a_loop_says() -> None:
    seen, _, _ = class_game(0.1, trials=3)
    for trial, drawn in enumerate(class_prototypes(seen)):
        total, weights = np.zeros((1, 12, 12)), 0.0
        for query, image in enumerate(seen.inputs):
            weight = max(seen.released[trial, query, 5] - seen.reference[query, 5], 0.0) ** 2
            total, weights = total + weight * image, weights + weight
        assert np.allclose(drawn, total / weights)


def test_a_release_without_excess_draws_the_mean() -> None:
    seen, _, _ = class_game(0.0, trials=1)
    silent = PairedAnswers(seen.inputs, seen.reference, seen.reference[None], 0.0, 5)
    assert np.allclose(class_prototypes(silent)[0], seen.inputs.mean(axis=0))


def test_shrunk_answers_are_probabilities_whatever_the_noise() -> None:
    for noise in (0.0, 1.0, 1e4):
        probabilities = class_game(noise, trials=2)[0].probabilities
        assert (probabilities > 0).all()
        assert np.allclose(probabilities.sum(axis=-1), 1)


def test_decoders_learn_each_trial_for_itself() -> None:
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(2, 200, 3))
    images = np.clip(0.5 + 0.2 * codes[0] @ rng.normal(size=(3, 16)), 0, 1).reshape(200, 1, 4, 4)
    decoders = train_decoders(codes, images, images.mean(axis=0), prior_weight=0.0, seed=0)
    errors = ((decoders.draw(codes) - images[None]) ** 2).mean(axis=(1, 2, 3, 4))
    # The second trial's codes say nothing of the images.
    assert errors[0] < 0.2 * images.var(axis=0).mean() < errors[1]
    again = train_decoders(codes, images, images.mean(axis=0), prior_weight=0.0, seed=0)
    assert np.array_equal(again.draw(codes), decoders.draw(codes))


def test_the_drawing_that_agrees_and_varies_least_is_kept() -> None:
    image = shapes(1)
    noisy = np.clip(image + 0.3 * np.random.default_rng(0).normal(size=image.shape), 0, 1)
    assert least_varied(np.stack([noisy, image, image], axis=1)).tolist() in ([1], [2])


def test_the_informed_adversary_reads_records_out_of_weights() -> None:
    rng = np.random.default_rng(4)
    records, mixing = rng.random((80, 12)), rng.normal(size=(12, 50))
    weights = records @ mixing + 0.05 * rng.normal(size=(80, 50))
    rebuilt = rebuild_records(weights[60:], weights[:60], records[:60])
    assert ((rebuilt - records[60:]) ** 2).mean() < 0.1 * records.var()
    unrelated = rebuild_records(rng.normal(size=(20, 50)), rng.normal(size=(60, 50)), records[:60])
    assert ((unrelated - records[60:]) ** 2).mean() > 0.8 * records.var()


@pytest.mark.parametrize("side", [3, 6, 8, 28])
def test_ssim_is_the_librarys_image_by_image(side: int) -> None:
    rng = np.random.default_rng(side)
    left = rng.random((4, 2, side, side))
    right = np.clip(left + 0.2 * rng.normal(size=left.shape), 0, 1)
    window = min(7, (side - 1) // 2 * 2 + 1)
    slow = [
        np.mean(
            [structural_similarity(x, y, win_size=window, data_range=1.0) for x, y in zip(a, b, strict=True)]
        )
        for a, b in zip(left, right, strict=True)
    ]
    assert np.allclose(ssim(left, right), slow)


def test_image_measures() -> None:
    black, white = np.zeros((1, 1, 8, 8)), np.ones((1, 1, 8, 8))
    assert mse(black, white).tolist() == [1.0]
    assert psnr(black, white).tolist() == [0.0]
    assert psnr(black, black).tolist() == [100.0]
    assert ssim(white, white).tolist() == [1.0]
    assert ssim(black[:0], white[:0]).shape == (0,)
    assert total_variation(black).tolist() == [0.0]
    assert nearest(white, np.concatenate([black, white])).tolist() == [1]
    with pytest.raises(InputError, match="no images"):
        ssim(np.zeros((1, 446)), np.zeros((1, 446)))
    with pytest.raises(InputError, match="cannot be compared"):
        ssim(black, np.concatenate([white, white]))


def test_chance_is_what_a_blind_guess_reaches() -> None:
    rng = np.random.default_rng(5)
    success = reidentification(rng.normal(size=(5000, 10)), rng.integers(10, size=5000))
    assert success.chance == 0.1
    assert success.low < success.estimate < success.high
    assert least_success(rng.normal(size=(5000, 10)), rng.integers(10, size=5000), error=FALSE_ALARM) < 0.1


def test_a_rate_that_too_few_trials_would_carry_is_refused() -> None:
    table, secrets = np.eye(5), np.arange(5)
    assert isinstance(reconstruction_rate(table, secrets), Refused)
    rate = reconstruction_rate(np.tile(table, (20, 1)), np.tile(secrets, 20))
    assert not isinstance(rate, Refused)
    assert rate.estimate == 1


def test_attributes_are_set_beside_the_best_constant_guess() -> None:
    rng = np.random.default_rng(6)
    shares = rng.random(40)
    public = (rng.random((500, 40)) < shares).astype(np.float64)
    public[:, 0] = 1.0
    targets = (rng.random((30, 40)) < shares).astype(np.float64)
    perfect = attribute_scores(targets, targets, public)
    assert perfect.right == 1
    assert perfect.advantage == pytest.approx(1 - perfect.constant)
    assert perfect.low > 0
    constant = np.repeat((public.mean(axis=0, keepdims=True) > 0.5).astype(np.float64), 30, axis=0)
    blind = attribute_scores(constant, targets, public)
    assert blind.advantage == 0
    assert blind.right == blind.constant == perfect.constant


def test_what_was_public_before_is_no_reconstruction() -> None:
    images = shapes(6)
    copied = public_likeness(images[:3], images[:3], images)
    assert copied.explained == 1
    fresh = public_likeness(images[:3], images[:3], images[3:])
    assert fresh.explained == 0
    assert fresh.reconstruction_ssim == 1 > fresh.public_ssim
