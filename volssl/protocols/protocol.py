"""The contract of an evaluation protocol, and what its figures are called.

A protocol says which regions are scored by which metrics, and gives every case a value by a stated rule, also where a structure is missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from volssl.files import BadInput
from volssl.froc import Scan
from volssl.targets import targets_of
from volssl.volume import Volume

Targets = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Metric:
    """What a figure is. unit: "" for a share or a count. better: which way is better; "none" for a count or a signed difference."""

    unit: str
    better: Literal["higher", "lower", "none"]


HIGHER, LOWER, MM, COUNT = Metric("", "higher"), Metric("", "lower"), Metric("mm", "lower"), Metric("", "none")
METRICS = {
    "dice": HIGHER,
    "hd95": MM,
    "lesion_dice": HIGHER,
    "lesion_hd95": MM,
    "voe": LOWER,
    "rvd": Metric("", "none"),
    "assd": MM,
    "rmsd": MM,
    "mssd": MM,
    "burden_error": Metric("", "none"),
    "burden_rmse": LOWER,
    "burden_max": LOWER,
    "dice_global": HIGHER,
    "cpm": HIGHER,
    "auc": HIGHER,
}


def metric_of(name: str) -> Metric:
    """What the figure `name` is; those of whole families go by their beginning, and all others are counts."""
    if name.startswith(("sensitivity_", "precision_", "recall_")):
        return HIGHER
    if name.startswith("lesion_") and name.removeprefix("lesion_") in METRICS:
        return METRICS[name.removeprefix("lesion_")]
    return METRICS.get(name, COUNT)


@dataclass(frozen=True)
class Score:
    """One row of cases.csv. value: None where the metric is undefined for the case, and the note then says why."""

    case: str
    label: str
    metric: str
    value: float | None
    note: str = ""


@dataclass(frozen=True)
class Judged:
    """What a protocol makes of a case: its rows, and what it needs of the case for figures over all cases (None for nothing)."""

    rows: tuple[Score, ...]
    evidence: Any = None


@dataclass(frozen=True)
class Pair:
    """A case: two label maps of one channel on one grid, and what is scored, name -> label values."""

    case: str
    predicted: Volume
    reference: Volume
    targets: Targets

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of both label maps."""
        return self.reference.grid.spacing_mm

    def masks(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Where the target `name` is, boolean, shape XYZ: in the prediction, in the reference."""
        values = self.targets[name]
        return np.isin(self.predicted.array_CXYZ[0], values), np.isin(self.reference.array_CXYZ[0], values)

    def unpredicted(self) -> Pair:
        """The same case with an empty prediction."""
        return Pair(self.case, Volume(np.zeros_like(self.reference.array_CXYZ), self.reference.grid), self.reference, self.targets)


class AbstractProtocol(ABC):
    """Scores cases one by one, and where the protocol has such figures all of them at once. Settings are the fields of the class.

    `worst`: the value of a case that could not be scored at all, per metric; a metric that is not named has none, since it is a count.
    `both_sides`: where nothing names the labels, values found in the predictions count beside those of the references.
    """

    worst: ClassVar[Mapping[str, float]]
    both_sides: ClassVar[bool] = False

    def targets(self, labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """What is scored, name -> label values. Raises: BadInput: labels that the protocol is not made for."""
        return targets_of(labels, regions)

    @abstractmethod
    def judge(self, pair: Pair) -> Judged:
        """Score the label maps of a case."""

    def judge_scan(self, scan: Scan) -> Judged:
        """Score the marks of a scan. Raises: BadInput: a protocol of label maps."""
        raise BadInput("protocol: candidates are scored by luna16; found a protocol that scores label maps; set --protocol luna16")

    def pooled(self, judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
        """Figures over all cases: region -> metric -> numbers as in summary.json. Those that are undefined are left out."""
        return {}


def overlap(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, str]:
    """Dice = 2 |P and R| / (|P| + |R|) of two boolean masks of one shape, in [0, 1], and a note on how an empty one was scored."""
    predicted_vox, reference_vox = int(predicted.sum()), int(reference.sum())
    if predicted_vox + reference_vox == 0:
        return 1.0, "absent from reference and prediction: 1 by rule"
    if predicted_vox == 0:
        return 0.0, "missed: absent from the prediction"
    if reference_vox == 0:
        return 0.0, "absent from the reference, but predicted"
    return 2 * int((predicted & reference).sum()) / (predicted_vox + reference_vox), ""
