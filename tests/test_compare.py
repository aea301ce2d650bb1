"""Differences, intervals and labels saved: numbers worked out by hand, and an independent writing of the bootstrap."""

import math

import numpy as np
import pytest

from volssl.compare import RESAMPLINGS, chosen_lr, difference, equal_labels, interval, mean_of, resampled, saved, verdict

ONE_FOLD = np.zeros(4, dtype=int)


def test_a_constant_gain_has_no_spread_though_the_arms_have():
    scratch_SC = np.random.default_rng(0).random((3, 4))
    gain = difference(scratch_SC + 0.05, scratch_SC, ONE_FOLD)
    assert gain["mean"] == pytest.approx(0.05) and gain["ci95"] == pytest.approx([0.05, 0.05])
    low, high = mean_of(scratch_SC, ONE_FOLD)["ci95"]
    assert high - low > 0.1


def test_the_bootstrap_agrees_with_a_plain_writing():
    scores_SC = np.random.default_rng(1).normal(size=(3, 8))
    folds_C = np.array([0] * 5 + [1] * 3)
    rng, plain = np.random.default_rng(2), []
    for _ in range(6000):
        seeds = rng.integers(3, size=3)
        cases = np.concatenate([rng.integers(5, size=5), 5 + rng.integers(3, size=3)])
        plain.append(np.mean([scores_SC[s, c] for s in seeds for c in cases]))
    ours = resampled(scores_SC, folds_C)
    assert len(ours) == RESAMPLINGS
    assert ours.mean() == pytest.approx(scores_SC.mean(), abs=0.02)
    assert ours.std() == pytest.approx(np.std(plain), rel=0.06)
    assert interval(ours) == pytest.approx(np.quantile(plain, (0.025, 0.975)), abs=0.06)


def test_seeds_and_cases_both_widen_the_interval():
    by_seed = np.repeat([[0.0], [1.0], [2.0]], 4, axis=1)
    by_case = np.repeat([[0.0, 1.0, 2.0, 3.0]], 3, axis=0)
    assert resampled(by_seed, ONE_FOLD).std() == pytest.approx(math.sqrt(2 / 3 / 3), rel=0.05)  # of the mean of three of 0, 1, 2
    assert resampled(by_case, ONE_FOLD).std() == pytest.approx(math.sqrt(1.25 / 4), rel=0.05)
    # One case per fold: nothing is left to draw.
    assert resampled(by_case, np.arange(4)).std() == pytest.approx(0, abs=1e-12)


def test_a_failed_seed_counts_on_neither_side():
    scratch_SC = np.full((3, 4), 0.5)
    arm_SC = np.full((3, 4), 0.6)
    arm_SC[1] = np.nan
    scratch_SC[1] = 9.0
    gain = difference(arm_SC, scratch_SC, ONE_FOLD)
    assert (gain["mean"], gain["seeds"], gain["cases"]) == (pytest.approx(0.1), 2, 4)
    assert difference(np.full((3, 4), np.nan), scratch_SC, ONE_FOLD) == {}


@pytest.mark.parametrize(
    "ends, answer",
    [((0.001, 0.2), "yes"), ((-0.1, 0.009), "no"), ((-0.1, -0.01), "no"), ((-0.1, 0.011), "undecided"), ((0.0, 0.2), "undecided")],
)
def test_verdicts(ends, answer):
    assert verdict({"ci95": list(ends)}, 0.01) == answer
    assert verdict({}, 0.01) == "failed"


def test_labels_for_an_equal_score_by_hand():
    counts, curve = (2, 8, 32), (0.2, 0.6, 0.8)
    assert equal_labels(0.6, counts, curve) == 8
    assert equal_labels(0.4, counts, curve) == pytest.approx(4)  # half-way between 2 and 8 in the logarithm
    assert equal_labels(0.7, counts, curve) == pytest.approx(16)
    assert equal_labels(0.1, counts, curve) == 2
    assert equal_labels(0.81, counts, curve) == math.inf
    # A dip takes nothing back: from 32 to 128 the best so far rises from 0.6, and at the end of a dip 0.6 was reached.
    assert equal_labels(0.7, (2, 8, 32, 128), (0.2, 0.6, 0.5, 0.8)) == pytest.approx(64)
    assert equal_labels(0.6, counts, (0.2, 0.6, 0.5)) == 8


def test_labels_saved_say_what_was_not_reached():
    scratch = {n: np.full((2, 4), value) for n, value in ((2, 0.2), (8, 0.6))}
    told = saved(np.full((2, 4), 0.4), scratch, ONE_FOLD)
    assert told["reached"] == pytest.approx(4) and told["ci95"] == pytest.approx([4, 4])
    assert saved(np.full((2, 4), 0.7), scratch, ONE_FOLD)["reached"] is None
    mixed = saved(np.array([[0.5] * 4, [0.65] * 4]), scratch, ONE_FOLD)
    assert mixed["ci95"][0] == pytest.approx(2 * 4**0.75) and mixed["ci95"][1] is None


def test_the_learning_rate_is_the_best_in_validation():
    assert chosen_lr({0.1: [0.5, 0.7], 0.01: [0.6, 0.7], 0.5: []}) == 0.01
    assert chosen_lr({0.1: [0.5], 0.01: [0.5]}) == 0.01
    assert chosen_lr({0.1: []}) is None
