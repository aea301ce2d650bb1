"""Protocol `luna16`: nodules as LUNA16 scores them: FROC and its mean (CPM), of candidates or of label maps; for label maps also Dice.

Source: Setio et al., Validation, comparison, and combination of algorithms for automatic detection of pulmonary nodules (LUNA16), 2017, and
the challenge's evaluation code. Which mark hits what: `froc.judge_marks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from volssl.candidates import candidates_of, findings_of
from volssl.files import BadInput
from volssl.froc import MOST, RATES, Marks, Order, Ranked, Scan, area_under_roc, judge_marks, sensitivities
from volssl.intervals import pooled_intervals
from volssl.protocols.protocol import AbstractProtocol, Judged, Pair, Score, overlap
from volssl.targets import targets_of
from volssl.volume import Volume

RECIPE_NAME = "Luna16"
NODULE = "nodule"  # the region of tables of candidates, and of figures over all scans


@dataclass(frozen=True)
class Luna16(AbstractProtocol):
    """Args: most: marks per scan that count, the most probable ones, as in the challenge's evaluation."""

    most: int = MOST
    worst: ClassVar[Mapping[str, float]] = {"dice": 0.0}

    def __post_init__(self) -> None:
        if self.most < 1:
            raise BadInput(f"most must be at least 1; found {self.most}")

    def targets(self, labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The labels or regions; the one value of label maps that nobody named is the nodule."""
        found = targets_of(labels, regions)
        return {NODULE: next(iter(found.values()))} if len(found) == 1 and min(found).isdigit() else found

    def judge(self, pair: Pair) -> Judged:
        """Dice of every target, and the marks of the first: components of the prediction on those of the reference."""
        first, *_ = pair.targets
        grid = pair.reference.grid
        predicted, reference = (Volume(mask[None], grid) for mask in pair.masks(first))
        found = self.judge_scan(Scan(pair.case, candidates_of(predicted), findings_of(reference)))
        rows = [Score(pair.case, name, "dice", *overlap(*pair.masks(name))) for name in pair.targets]
        return Judged((*rows, *(Score(row.case, first, row.metric, row.value, row.note) for row in found.rows)), found.evidence)

    def judge_scan(self, scan: Scan) -> Judged:
        """How many findings there are and were hit, marks on nothing, and marks that count neither way."""
        marks = judge_marks(scan, most=self.most)
        counts = {
            "findings": len(marks.hits) + marks.missed,
            "hits": len(marks.hits),
            "false_marks": len(marks.false),
            "ignored_marks": marks.ignored + marks.doubles,
        }
        return Judged(tuple(Score(scan.case, NODULE, metric, float(count)) for metric, count in counts.items()), marks)

    def pooled(self, judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
        """Sensitivity at each rate, their mean (cpm) and the area under the ROC curve (auc), with intervals over scans."""
        scans: list[Marks] = [one.evidence for one in judged if one.evidence is not None]
        if not scans:
            return {}
        ranked = Ranked.of([scan.hits for scan in scans], [scan.false for scan in scans])
        graded = Order.of([scan.positive for scan in scans], [scan.negative for scan in scans])
        missed = np.array([scan.missed for scan in scans], dtype=np.float64)

        def figures(weights: np.ndarray) -> dict[str, float]:
            found = sensitivities(ranked, missed, weights)
            told = {f"sensitivity_{rate:g}": float(value) for rate, value in zip(RATES, found, strict=True)}
            return told | {"cpm": float(found.mean()), "auc": area_under_roc(graded, weights)}

        return {NODULE: pooled_intervals(figures, len(scans))}
