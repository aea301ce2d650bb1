"""Protocol `brats2023`: Dice and HD95 lesion by lesion, as the BraTS 2023 challenges scored them (adult glioma's settings).

Source: the challenges' evaluation code (rachitsaluja/BraTS-2023-Metrics). Per region WT, TC, ET, with lesions found by
`lesions.match_by_dilation`:

    lesion_dice = sum of the lesions' Dice / (lesions + false positives)
    lesion_hd95 = (sum of the lesions' HD95 + 374 mm per false positive) / (lesions + false positives)

Only lesions above 50 mm^3 count; a missed one has Dice 0 and HD95 374 mm. A predicted component that reaches no lesion at all, however
small, is a false positive; one that reaches only a lesion of at most 50 mm^3 counts nothing. With neither lesions nor false positives
the scores are 1 and 0 mm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from volssl.files import BadInput
from volssl.lesions import match_by_dilation
from volssl.protocols.brats_voxel import brats_regions, whole_region
from volssl.protocols.protocol import AbstractProtocol, Judged, Pair, Score
from volssl.surface import surfaces

RECIPE_NAME = "Brats2023"
WORST_MM = 374.0


@dataclass(frozen=True)
class Brats2023(AbstractProtocol):
    """Lesion-wise scores; beside them Dice and HD95 of the whole region (374 mm where only one map has it).

    Args: dilation: rounds with 18 neighbours, which join fragments and let a prediction nearby reach a lesion. least_mm3: lesions must be
        larger to count. worst_mm: HD95 of a missed lesion or a false positive. The challenges' first two are 3 and 50 for glioma (GLI, SSA,
        PED), 1 and 50 for meningioma (MEN), 1 and 2 for metastases (MET).
    """

    dilation: int = 3
    least_mm3: float = 50.0
    worst_mm: float = WORST_MM
    worst: ClassVar[Mapping[str, float]] = {"lesion_dice": 0.0, "lesion_hd95": WORST_MM, "dice": 0.0, "hd95": WORST_MM}
    both_sides: ClassVar[bool] = True  # predictions and references of two conventions are one complaint

    def __post_init__(self) -> None:
        if self.dilation < 0 or self.least_mm3 < 0 or self.worst_mm <= 0:
            raise BadInput(
                f"dilation and least_mm3 >= 0 and worst_mm > 0 must hold; found {self.dilation}, {self.least_mm3}, {self.worst_mm}"
            )

    def targets(self, labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The given regions, or WT, TC and ET of the challenge's labels."""
        return brats_regions(labels, regions)

    def judge(self, pair: Pair) -> Judged:
        """Lesion-wise and whole scores of every region, and how many lesions were found (tp), missed (fn) and made up (fp)."""
        return Judged(tuple(row for name in pair.targets for row in self._region(pair, name)))

    def _region(self, pair: Pair, name: str) -> list[Score]:
        predicted, reference = pair.masks(name)
        x, y, z = pair.spacing_mm
        matching = match_by_dilation(predicted, reference, dilation=self.dilation, voxel_mm3=x * y * z)
        counted = [lesion for lesion in matching.lesions if lesion.volume_mm3 > self.least_mm3]
        distances = [
            surfaces(*matching.masks(lesion), pair.spacing_mm).percentile(95) if lesion.found else self.worst_mm for lesion in counted
        ]
        false, all_judged = len(matching.false), len(counted) + len(matching.false)
        missed = sum(1 for lesion in counted if not lesion.found)
        values = {
            "lesion_dice": sum(lesion.dice for lesion in counted) / all_judged if all_judged else 1.0,
            "lesion_hd95": (sum(distances) + false * self.worst_mm) / all_judged if all_judged else 0.0,
        }
        note = _note(all_judged, missed, false, len(matching.lesions) - len(counted))
        counts = {"lesions_tp": len(counted) - missed, "lesions_fn": missed, "lesions_fp": false}
        return [
            *(Score(pair.case, name, metric, value, note) for metric, value in values.items()),
            *whole_region(pair, name, worst_mm=self.worst_mm),
            *(Score(pair.case, name, metric, float(count)) for metric, count in counts.items()),
        ]


def _note(judged: int, missed: int, false: int, small: int) -> str:
    told = [
        "no lesion that counts and no false positive: 1 and 0 mm by rule" if not judged else "",
        f"missed lesions: {missed}" if missed else "",
        f"false positives: {false}" if false else "",
        f"lesions too small to count: {small}" if small else "",
    ]
    return "; ".join(text for text in told if text)
