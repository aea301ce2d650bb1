"""Detection by points: which marks hit a finding, and sensitivity against false positives per scan (FROC), as LUNA16 scores them.

Source: the challenge's evaluation code (noduleCADEvaluationLUNA16.py) and Setio et al., 2017. Positions are in world mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from volssl.intervals import ratio

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)  # false positives per scan
MOST = 100  # marks per scan that count, the most probable ones


def _no_points() -> np.ndarray:
    return np.zeros((0, 3))


@dataclass(frozen=True)
class Findings:
    """What there is in a scan: positions (N, 3), radii (N,), both in mm, and which of them count (the others are irrelevant)."""

    at_N3: np.ndarray = field(default_factory=_no_points)
    radius_mm: np.ndarray = field(default_factory=lambda: np.zeros(0))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


@dataclass(frozen=True)
class Candidates:
    """What was marked in a scan: positions (N, 3) in mm and probabilities (N,); classes (N,): 1 nodule, 0 not, where a file tells them.

    told: whether the probabilities were told; those of label maps are not, and an area under the ROC curve would mean nothing.
    """

    at_N3: np.ndarray = field(default_factory=_no_points)
    probability: np.ndarray = field(default_factory=lambda: np.zeros(0))
    classes: np.ndarray | None = None
    told: bool = True


@dataclass(frozen=True)
class Scan:
    """A scan, its findings and the marks in it."""

    case: str
    candidates: Candidates
    findings: Findings


@dataclass(frozen=True)
class Marks:
    """A scan, judged.

    Attributes: hits: per finding that was hit, the probability of its best mark. missed: findings without a mark. false: probabilities of
        the marks on nothing. ignored: marks on irrelevant findings. doubles: marks on a finding beside its best one. positive, negative:
        probabilities of all candidates that are nodules and that are not, for the area under the ROC curve.
    """

    hits: np.ndarray
    missed: int
    false: np.ndarray
    ignored: int
    doubles: int
    positive: np.ndarray
    negative: np.ndarray


def judge_marks(scan: Scan, *, most: int = MOST) -> Marks:
    """A mark hits a finding that it lies nearer to than the finding's radius; it may hit several.

    The best mark of a finding is its hit and others on it count neither way; nor does a mark on irrelevant findings alone. Only the `most`
    most probable marks count. For the ROC curve all candidates count, by the file's classes or else by whether they hit a finding that
    counts; those on irrelevant findings alone are then left out.
    """
    found, findings = scan.candidates, scan.findings
    distance_mm = np.linalg.norm(found.at_N3[:, None] - findings.at_N3[None], axis=2)
    inside_NF = distance_mm < findings.radius_mm
    hit, on_irrelevant = inside_NF[:, findings.counts].any(1), inside_NF[:, ~findings.counts].any(1)
    irrelevant = on_irrelevant & ~hit
    marked = np.zeros(len(hit), dtype=bool)
    marked[np.argsort(-found.probability, kind="stable")[:most]] = True
    best = [found.probability[marked & inside].max(initial=-np.inf) for inside in inside_NF[:, findings.counts].T]
    hits = np.array([value for value in best if value > -np.inf])
    nodule, asked = (hit, ~irrelevant) if found.classes is None else (found.classes > 0, np.ones(len(hit), dtype=bool))
    return Marks(
        hits=hits,
        missed=int(findings.counts.sum()) - len(hits),
        false=found.probability[marked & ~hit & ~irrelevant],
        ignored=int((marked & irrelevant).sum()),
        doubles=int(inside_NF[marked][:, findings.counts].sum()) - len(hits),
        positive=found.probability[nodule & asked & found.told],
        negative=found.probability[~nodule & asked & found.told],
    )


@dataclass(frozen=True)
class Ranked:
    """Hits and false marks of all scans in falling order of probability, equal ones as one group. Made once, counted with any weights."""

    scan: np.ndarray  # whose each is
    hit: np.ndarray
    ends: np.ndarray  # last place of each group

    @classmethod
    def of(cls, hits: Sequence[np.ndarray], false: Sequence[np.ndarray]) -> Ranked:
        """Args: hits, false: probabilities per scan."""
        scan = np.concatenate([np.repeat(np.arange(len(of)), [len(values) for values in of]) for of in (hits, false)])
        hit = np.repeat([True, False], [sum(len(values) for values in of) for of in (hits, false)])
        probability = np.concatenate([*hits, *false, np.zeros(0)])
        order = np.argsort(-probability, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True)) if len(order) else np.zeros(0, dtype=int)
        return cls(scan[order].astype(int), hit[order], ends)

    def counted(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hits and false marks at or above each threshold, the first being above all. Args: weights: how often each scan counts."""
        each = weights[self.scan]
        hits, false = (np.cumsum(np.where(kind, each, 0))[self.ends] for kind in (self.hit, ~self.hit))
        return np.append(0.0, hits), np.append(0.0, false)


@dataclass(frozen=True)
class Order:
    """above_SS[i, j]: how often a positive of scan i is above a negative of scan j, ties by half. Made once, counted with any weights."""

    above_SS: np.ndarray
    positives: np.ndarray  # per scan
    negatives: np.ndarray

    @classmethod
    def of(cls, positive: Sequence[np.ndarray], negative: Sequence[np.ndarray]) -> Order:
        """Args: positive, negative: probabilities per scan."""
        scans = len(positive)
        values = np.concatenate([*positive, np.zeros(0)])
        whose = np.repeat(np.arange(scans), [len(of) for of in positive])
        above_SS = np.zeros((scans, scans))
        for scan, of in enumerate(negative):
            below = np.sort(of)
            wins = (np.searchsorted(below, values, "left") + np.searchsorted(below, values, "right")) / 2
            above_SS[:, scan] = np.bincount(whose, wins, minlength=scans)
        return cls(above_SS, np.array([len(of) for of in positive], dtype=float), np.array([len(of) for of in negative], dtype=float))


def area_under_roc(order: Order, weights: np.ndarray) -> float:
    """Probability that a positive is above a negative, ties by half; NaN without both. Args: weights: how often each scan counts."""
    return ratio(float(weights @ order.above_SS @ weights), float((weights @ order.positives) * (weights @ order.negatives)))


def sensitivities(ranked: Ranked, missed: np.ndarray, weights: np.ndarray, rates: Sequence[float] = RATES) -> np.ndarray:
    """Share of the findings that are hit at each rate of false positives per scan, linear between thresholds; NaN without findings.

    Args: ranked: hits and false marks. missed: findings without a mark, per scan. weights: how often each scan counts; all scans are in the
        denominator, also those without findings.
    """
    hits, false = ranked.counted(weights)
    findings = float(hits[-1] + weights @ missed)
    if not findings:
        return np.full(len(rates), np.nan)
    return np.interp(rates, false / weights.sum(), hits / findings)
