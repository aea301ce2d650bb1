"""Two runs case by case: mean differences over the cases of both with intervals, Wilcoxon's signed-rank test, Holm's correction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from volssl.evaluate import MEAN
from volssl.intervals import mean_interval
from volssl.protocols.protocol import Metric, Score, metric_of

FEWEST = 6  # with fewer pairs no two-sided signed-rank test falls below 0.05: the smallest p of 5 is 2 / 2**5
DECIMALS = 6  # those of cases.csv: what differs by less is a tie

Key = tuple[str, str]


@dataclass(frozen=True)
class Difference:
    """A region and metric over the cases for which both runs have it.

    Attributes: run, reference: means. interval: of the differences, run minus reference, as in summary.json. values: one per case.
        p: of the signed-rank test, None for too few pairs. holm: the same, corrected for the regions tested by this metric. better, worse:
        cases in which the run is. undefined: cases of both for which one run has no value.
    """

    label: str
    metric: str
    what: Metric
    run: float
    reference: float
    interval: dict[str, Any]
    values: tuple[float, ...]
    better: int
    worse: int
    undefined: int
    p: float | None
    holm: float | None = None


def compare(run: Sequence[Score], reference: Sequence[Score]) -> list[Difference]:
    """Every region and metric that has a better and a worse, in the order of the rows; the mean over regions last of each metric.

    The mean over regions is tested by itself; Holm's correction is over the regions that stand beside each other.
    """
    one, other = _by_key(run), _by_key(reference)
    found = [_difference(key, one[key], other[key]) for key in one if key in other and metric_of(key[1]).better != "none"]
    told = [difference for difference in found if difference is not None]
    metrics = list(dict.fromkeys(difference.metric for difference in told))
    return [row for metric in metrics for row in _corrected([row for row in told if row.metric == metric])]


def unmatched(run: Sequence[Score], reference: Sequence[Score]) -> list[str]:
    """Cases of `run` that `reference` does not have, in the order of the rows."""
    known = {score.case for score in reference}
    return list(dict.fromkeys(score.case for score in run if score.case not in known))


def signed_rank(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; ties with zero by Pratt. 1 where nothing differs, None for fewer than FEWEST pairs."""
    if len(differences) < FEWEST:
        return None
    rounded = [round(value, DECIMALS) for value in differences]
    if not any(rounded):
        return 1.0
    from scipy.stats import wilcoxon

    tested: Any = wilcoxon(rounded, zero_method="pratt")
    return float(tested.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m times (m - k + 1), never below a smaller one's, at most 1."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected


def _by_key(scores: Sequence[Score]) -> dict[Key, dict[str, float | None]]:
    table: dict[Key, dict[str, float | None]] = {}
    for score in scores:
        table.setdefault((score.label, score.metric), {})[score.case] = score.value
    labels = {label for label, _ in table}
    for metric in dict.fromkeys(metric for _, metric in table):
        columns = [table[key] for key in list(table) if key[1] == metric and key[0] != MEAN]
        if len(labels) > 1 and len(columns) == len(labels):
            table[(MEAN, metric)] = {case: _mean([column.get(case) for column in columns]) for case in columns[0]}
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _difference(key: Key, run: dict[str, float | None], reference: dict[str, float | None]) -> Difference | None:
    pairs = [(run[case], reference[case]) for case in run if case in reference]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return None
    what = metric_of(key[1])
    values = tuple(round(a - b, DECIMALS) for a, b in both)
    gains = [value if what.better == "higher" else -value for value in values]
    return Difference(
        label=key[0],
        metric=key[1],
        what=what,
        run=statistics.fmean(a for a, _ in both),
        reference=statistics.fmean(b for _, b in both),
        interval=mean_interval(values),
        values=values,
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        undefined=len(pairs) - len(both),
        p=signed_rank(values),
    )


def _corrected(rows: Sequence[Difference]) -> list[Difference]:
    tested = [row for row in rows if row.label != MEAN and row.p is not None]
    corrected = dict(zip((row.label for row in tested), holm([row.p for row in tested if row.p is not None]), strict=True))
    ordered = [row for row in rows if row.label != MEAN] + [row for row in rows if row.label == MEAN]
    return [replace(row, holm=corrected.get(row.label, row.p)) for row in ordered]


# ------------------------------------------------------------------------------------------------ what a page draws


@dataclass(frozen=True)
class Strip:
    """A row of a picture of differences, in parts of its width: dots (x, y), the mean, its interval."""

    label: str
    dots: tuple[tuple[float, float], ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Strips:
    """A picture of one metric's differences. limit: what the edges stand for. left, right: which way is better, in words."""

    metric: str
    unit: str
    limit: float
    left: str
    right: str
    rows: tuple[Strip, ...]


def strips(differences: Sequence[Difference]) -> list[Strips]:
    """One picture per metric: every case a dot, zero in the middle, one scale for all regions."""
    pictures = []
    for metric in dict.fromkeys(row.metric for row in differences):
        rows = [row for row in differences if row.metric == metric]
        limit = max(max(abs(value) for row in rows for value in row.values), 10.0**-DECIMALS)
        what = rows[0].what
        sides = ("worse", "better") if what.better == "higher" else ("better", "worse")
        pictures.append(Strips(metric, what.unit, limit, *sides, tuple(_strip(row, limit) for row in rows)))
    return pictures


def _strip(row: Difference, limit: float) -> Strip:
    def across(value: float) -> float:
        return 0.5 + 0.48 * value / limit

    # Neighbours in rank lie at different heights, so that equal differences stay apart.
    order = sorted(range(len(row.values)), key=lambda place: row.values[place])
    heights = {place: (0.5, 0.25, 0.75, 0.38, 0.62)[rank % 5] for rank, place in enumerate(order)}
    dots = tuple((across(value), heights[place]) for place, value in enumerate(row.values))
    return Strip(row.label, dots, across(row.interval["mean"]), across(row.interval["ci95"][0]), across(row.interval["ci95"][1]))
