"""Two runs case by case: by hand, against all sign changes, and what must hold for any scores."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from volssl.evaluate import MEAN, Score, summarise
from volssl.paired import FEWEST, compare, holm, signed_rank, strips, unmatched


def scores(values: dict[str, list[float | None]], metric: str = "dice", labels=("liver", "lesion")) -> list[Score]:
    return [Score(case, label, metric, value) for case, of in values.items() for label, value in zip(labels, of, strict=True)]


def all_sign_changes(differences: list[float]) -> float:
    """The exact two-sided p: how often the rank sum of random signs lies as far from its middle. Without ties or zeros."""
    ranks = rankdata(np.abs(differences))
    found = ranks[np.array(differences) > 0].sum()
    sums = [sum(r for r, up in zip(ranks, signs, strict=True) if up) for signs in itertools.product((0, 1), repeat=len(ranks))]
    middle = ranks.sum() / 2
    return float(np.mean([abs(s - middle) >= abs(found - middle) - 1e-9 for s in sums]))


@pytest.mark.parametrize("seed", range(5))
def test_the_signed_rank_test_is_that_of_all_sign_changes(seed):
    differences = [round(value, 5) for value in np.random.default_rng(seed).normal(0.3, 1, 9)]
    assert signed_rank(differences) == pytest.approx(all_sign_changes(differences))


def test_too_few_pairs_and_no_difference():
    assert signed_rank([0.1] * (FEWEST - 1)) is None
    assert signed_rank([0.0] * 8) == 1.0
    assert signed_rank([1e-9] * 8) == 1.0  # less than cases.csv tells
    assert signed_rank([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(2 / 2**6)


def test_ties_with_zero_take_the_lowest_ranks_and_no_side():
    # Pratt: zeros are ranked and then left out, so that the others keep ranks 3 ... 9; written as sign changes of these alone.
    differences = [0.0, 0.0, 0.3, -0.4, 0.1, 0.2, 0.5, 0.6, 0.7]
    ranks = rankdata(np.abs(differences))[2:]
    sums = np.array([np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=len(ranks))])
    found = ranks[np.array(differences[2:]) > 0].sum()
    exact = np.mean(np.abs(sums - ranks.sum() / 2) >= abs(found - ranks.sum() / 2) - 1e-9)
    # Rank 6 is against: subsets of ranks 3 ... 9 with a sum of at most 6 are {}, {3}, {4}, {5}, {6}; the other tail doubles them.
    assert signed_rank(differences) == pytest.approx(float(exact)) == pytest.approx(10 / 2**7)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.04, 0.9: times 4, 3, 2, 1 are 0.04, 0.06, 0.08, 0.9.
    assert holm([0.04, 0.01, 0.9, 0.02]) == pytest.approx([0.08, 0.04, 0.9, 0.06])
    assert holm([0.03, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])  # never below a smaller one's
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_each_p_and_bonferronis(p_values):
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        assert p <= corrected <= min(1, p * len(p_values)) + 1e-12


ONE = {"c1": [0.9, 0.6], "c2": [0.8, 0.4], "c3": [0.7, 0.2], "only": [0.1, 0.1]}
OTHER = {"c3": [0.6, 0.0], "c1": [0.9, 0.5], "c2": [0.7, 0.5], "else": [0.5, 0.5]}


def test_differences_by_hand_over_matched_cases():
    found = {(row.label, row.metric): row for row in compare(scores(ONE), scores(OTHER))}
    assert list(found) == [("liver", "dice"), ("lesion", "dice"), (MEAN, "dice")]
    liver = found[("liver", "dice")]
    assert liver.values == (0.0, 0.1, 0.1) and (liver.better, liver.worse) == (2, 0)
    assert (liver.run, liver.reference) == (pytest.approx(0.8), pytest.approx(2.2 / 3))
    assert liver.interval["mean"] == pytest.approx(0.2 / 3) and liver.interval["n"] == 3
    assert liver.p is None  # three pairs are too few
    assert found[("lesion", "dice")].values == pytest.approx((0.1, -0.1, 0.2))
    assert found[(MEAN, "dice")].values == pytest.approx((0.05, 0.0, 0.15))
    assert unmatched(scores(ONE), scores(OTHER)) == ["only"] and unmatched(scores(OTHER), scores(ONE)) == ["else"]


def test_a_lower_distance_is_better_and_counts_are_not_compared():
    one, other = ([*scores({"a": [3.0], "b": [1.0]}, "hd95", ("x",)), Score("a", "x", "lesions_fp", 1.0)] for _ in range(2))
    worse = [Score(row.case, row.label, row.metric, row.value + (row.case == "a")) for row in other]
    (row,) = compare(one, worse)
    assert (row.metric, row.better, row.worse, row.what.unit) == ("hd95", 1, 0, "mm")
    (picture,) = strips([row])
    assert (picture.left, picture.right, picture.limit) == ("better", "worse", 1.0)
    assert sorted(x for x, _ in picture.rows[0].dots) == pytest.approx([0.02, 0.5])


def test_what_one_run_leaves_undefined_is_counted_and_left_out():
    other = scores({"c1": [0.5, None], "c2": [0.5, 0.5], "c3": [0.5, 0.5]})
    found = {row.label: row for row in compare(scores(ONE), other)}
    assert found["lesion"].undefined == 1 and found["lesion"].interval["n"] == 2
    assert found[MEAN].undefined == 1 and found["liver"].undefined == 0


def test_several_regions_are_corrected_and_their_mean_is_not():
    rng = np.random.default_rng(0)
    base = {str(case): list(rng.random(2)) for case in range(12)}
    better = {case: [a + 0.01 * (1 + int(case)), b - 0.02 * int(case)] for case, (a, b) in base.items()}
    found = {row.label: row for row in compare(scores(better), scores(base))}
    assert found["liver"].holm == pytest.approx(2 * found["liver"].p)  # the smallest of two
    assert found["lesion"].holm == pytest.approx(max(found["lesion"].p, found["liver"].holm))
    assert found[MEAN].holm == found[MEAN].p


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_a_comparison_the_other_way_round_is_its_mirror_image(seed):
    rng = np.random.default_rng(seed)
    one, other = ({str(case): list(rng.random(2).round(4)) for case in range(8)} for _ in range(2))
    for there, back in zip(compare(scores(one), scores(other)), compare(scores(other), scores(one)), strict=True):
        assert there.interval["mean"] == pytest.approx(-back.interval["mean"])
        assert (there.better, there.worse) == (back.worse, back.better)
        assert there.p == pytest.approx(back.p)
    assert compare(scores(one), scores(one))[0].p == 1.0
    assert summarise(scores(one))["metrics"]["liver"]["dice"]["mean"] == pytest.approx(compare(scores(one), scores(other))[0].run)
