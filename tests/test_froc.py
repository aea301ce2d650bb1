"""FROC by hand and against the challenge's rule written with scikit-learn; areas under ROC curves against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from volssl.froc import RATES, Candidates, Findings, Marks, Order, Ranked, Scan, area_under_roc, judge_marks, sensitivities


def scan(case: str, candidates: list[tuple[float, float]], findings: list[tuple[float, float, bool]]) -> Scan:
    """Points on a line: candidates (x, probability), findings (x, radius, whether it counts)."""
    marks, there = np.array(candidates).reshape(-1, 2), np.array(findings, dtype=float).reshape(-1, 3)

    def line(x: np.ndarray) -> np.ndarray:
        return np.stack([x, np.zeros_like(x), np.zeros_like(x)], axis=1)

    return Scan(case, Candidates(line(marks[:, 0]), marks[:, 1]), Findings(line(there[:, 0]), there[:, 1], there[:, 2] > 0))


HAND = [
    # Two nodules: one hit twice (0.9 counts), one missed; a mark on an irrelevant finding; two on nothing.
    scan("a", [(0.0, 0.9), (1.0, 0.8), (50.0, 0.95), (80.0, 0.7), (90.0, 0.2)], [(0, 5, True), (30, 3, True), (50, 4, False)]),
    # One nodule, hit by the weakest mark.
    scan("b", [(10.0, 0.3), (40.0, 0.6)], [(12, 4, True)]),
    # None: its false positive and the scan itself count.
    scan("c", [(0.0, 0.5)], []),
    # Nothing at all: the scan counts.
    scan("d", [], []),
]


def curve(marks: list[Marks], rates=RATES) -> np.ndarray:
    ranked = Ranked.of([of.hits for of in marks], [of.false for of in marks])
    return sensitivities(ranked, np.array([of.missed for of in marks]), np.ones(len(marks)), rates)


def test_marks_by_hand():
    a, b, c, d = (judge_marks(one) for one in HAND)
    assert a.hits.tolist() == [0.9] and a.missed == 1 and a.ignored == 1 and a.doubles == 1
    assert sorted(a.false) == [0.2, 0.7]
    assert b.hits.tolist() == [0.3] and b.false.tolist() == [0.6]
    assert (len(c.hits), c.missed, c.false.tolist()) == (0, 0, [0.5])
    assert (len(d.hits), d.missed, len(d.false)) == (0, 0, 0)


def test_froc_by_hand():
    # In falling order: hit 0.9, false 0.7, false 0.6, false 0.5, hit 0.3, false 0.2; 3 nodules, 4 scans.
    # Sensitivity 1/3 at 0 to 3/4 false positives per scan, then 2/3, up to 1 per scan and beyond.
    marks = [judge_marks(one) for one in HAND]
    assert curve(marks).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert curve(marks).mean() == pytest.approx((3 * 1 / 3 + 4 * 2 / 3) / 7)  # the CPM
    assert curve(marks, [0.75]).tolist() == pytest.approx([2 / 3])


def test_a_mark_at_exactly_the_radius_misses():
    findings = [(0, 5, True)]
    assert judge_marks(scan("a", [(5.0, 0.9)], findings)).missed == 1
    assert judge_marks(scan("a", [(4.999, 0.9)], findings)).missed == 0


def test_a_mark_may_hit_two_findings_and_a_finding_that_counts_comes_before_an_irrelevant_one():
    both = judge_marks(scan("a", [(0.0, 0.9)], [(-2, 5, True), (2, 5, True)]))
    assert both.hits.tolist() == [0.9, 0.9] and len(both.false) == 0
    mixed = judge_marks(scan("a", [(0.0, 0.9)], [(-2, 5, True), (2, 5, False)]))
    assert mixed.hits.tolist() == [0.9] and mixed.ignored == 0


def test_only_the_most_probable_marks_count():
    marks = judge_marks(scan("a", [(0.0, 0.1), *((50.0 + i, 0.5 + i / 1000) for i in range(100))], [(0, 5, True)]), most=100)
    assert marks.missed == 1 and len(marks.false) == 100
    assert len(marks.positive) == 1 and len(marks.negative) == 100  # for the area under the ROC curve all count


def test_linear_between_two_thresholds_and_flat_beyond_the_last():
    # One threshold that adds a hit and a false positive at once: the curve rises linearly to (1, 1).
    marks = [judge_marks(scan("a", [(0.0, 0.5), (50.0, 0.5)], [(0, 5, True)]))]
    assert curve(marks).tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1, 1, 1, 1])


def random_scans(seed: int, count: int = 12, ties: bool = False) -> list[Scan]:
    rng = np.random.default_rng(seed)
    scans = []
    for number in range(count):
        findings = [(100.0 * i, 5.0, bool(rng.random() < 0.7)) for i in range(rng.integers(0, 4))]
        marks = [(float(rng.normal(100 * rng.integers(0, 4), 4)), float(rng.random())) for _ in range(rng.integers(0, 12))]
        scans.append(scan(str(number), [(x, round(p, 1) if ties else p) for x, p in marks], findings))
    return scans


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_parity_with_the_challenges_rule(seed, ties):
    scans = random_scans(seed, ties=ties)
    truth, probability, excluded = [], [], []
    for one in scans:
        left = set(range(len(one.candidates.probability)))
        order = [*np.flatnonzero(one.findings.counts), *np.flatnonzero(~one.findings.counts)]
        for place in order:
            at, radius = one.findings.at_N3[place], one.findings.radius_mm[place]
            on = [k for k, mark in enumerate(one.candidates.at_N3) if ((mark - at) ** 2).sum() < radius**2]
            left -= set(on)
            if one.findings.counts[place]:
                truth.append(1.0)
                probability.append(max((one.candidates.probability[k] for k in on), default=-1000.0))
                excluded.append(not on)
        for k in left:
            truth.append(0.0)
            probability.append(one.candidates.probability[k])
            excluded.append(False)
    kept = [(t, p) for t, p, out in zip(truth, probability, excluded, strict=True) if not out]
    false_rate, true_rate, _ = roc_curve(*zip(*kept, strict=True))
    detected = sum(t for t, _ in kept)
    per_scan = false_rate * (len(kept) - detected) / len(scans)
    expected = np.interp(RATES, per_scan, true_rate * detected / sum(truth))
    assert curve([judge_marks(one) for one in scans]) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_the_area_under_the_roc_curve_is_scikit_learns(seed, ties):
    rng = np.random.default_rng(seed)
    scores = [np.round(rng.normal(shift, 1, rng.integers(1, 9)), 0 if ties else 9) for shift in (0.5, 0.0, 1.0, 0.0)]
    order = Order.of([scores[0], scores[2]], [scores[1], scores[3]])
    truth = np.repeat([1, 0, 1, 0], [len(of) for of in scores])
    assert area_under_roc(order, np.ones(2)) == pytest.approx(roc_auc_score(truth, np.concatenate(scores)))
    # Counting a scan three times is the same as having it three times.
    weights = np.repeat([3.0, 3.0, 1.0, 1.0], [len(of) for of in scores])
    assert area_under_roc(order, np.array([3.0, 1.0])) == pytest.approx(roc_auc_score(truth, np.concatenate(scores), sample_weight=weights))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_scan_counted_twice_is_two_scans_and_a_found_nodule_lost_never_helps(seed):
    marks = [judge_marks(one) for one in random_scans(seed)]
    ranked, missed = Ranked.of([of.hits for of in marks], [of.false for of in marks]), np.array([of.missed for of in marks])
    weights = np.ones(len(marks))
    weights[0] = 2
    np.testing.assert_allclose(sensitivities(ranked, missed, weights), curve([marks[0], *marks]), atol=1e-12)
    for number, of in enumerate(marks):
        if len(of.hits):
            worse = Marks(of.hits[1:], of.missed + 1, of.false, of.ignored, of.doubles, of.positive, of.negative)
            assert (curve([*marks[:number], worse, *marks[number + 1 :]]) <= curve(marks) + 1e-12).all()


def test_without_findings_or_marks_figures_are_undefined():
    assert np.isnan(curve([judge_marks(scan("a", [(0.0, 0.5)], []))])).all()
    assert np.isnan(area_under_roc(Order.of([], []), np.ones(0)))
    assert curve([judge_marks(scan("a", [], [(0, 5, True)]))]).tolist() == [0] * 7
