"""Protocol `brats_voxel`: Dice and HD95 of whole regions, as the BraTS challenges up to 2022 scored them.

Empty cases by the rule of those challenges' evaluation: a region absent from both maps scores Dice 1 and HD95 0, from one of them Dice 0
and HD95 373.13 mm, the diagonal of their 240x240x155 voxels of 1 mm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from volssl.files import BadInput
from volssl.protocols.protocol import AbstractProtocol, Judged, Pair, Score, overlap
from volssl.surface import surfaces
from volssl.targets import targets_of

RECIPE_NAME = "BratsVoxel"
DIAGONAL_MM = math.hypot(240, 240, 155)


@dataclass(frozen=True)
class BratsVoxel(AbstractProtocol):
    """Args: worst_mm: HD95 of a region that only one of the maps has."""

    worst_mm: float = DIAGONAL_MM
    worst: ClassVar[Mapping[str, float]] = {"dice": 0.0, "hd95": DIAGONAL_MM}
    both_sides: ClassVar[bool] = True  # predictions and references of two conventions are one complaint

    def targets(self, labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The given regions, or WT, TC and ET of the challenge's labels."""
        return brats_regions(labels, regions)

    def judge(self, pair: Pair) -> Judged:
        """Dice and HD95 of every region."""
        return Judged(tuple(row for name in pair.targets for row in whole_region(pair, name, worst_mm=self.worst_mm)))


def brats_regions(labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """WT (all), TC (necrosis 1 and enhancing) and ET; enhancing tumour is 4 up to 2021/22 and 3 from 2023 on. Given regions come first.

    Raises: BadInput: other label values than these.
    """
    if regions:
        return targets_of(labels, regions)
    values = set(labels.values())
    if not values <= {1, 2, 3} and not values <= {1, 2, 4}:
        raise BadInput(
            "labels: regions WT, TC and ET are made of the values 1, 2, 4 (BraTS up to 2022) or 1, 2, 3 (from 2023 on), "
            f"in predictions as in references; found {sorted(values)}; write them by one convention, or name `regions` in the recipe"
        )
    enhancing = 4 if 4 in values else 3
    return {"WT": (1, 2, enhancing), "TC": (1, enhancing), "ET": (enhancing,)}


def whole_region(pair: Pair, name: str, *, worst_mm: float) -> list[Score]:
    """Dice and HD95 of a region as one structure, `worst_mm` where only one of the maps has it."""
    predicted, reference = pair.masks(name)
    value, note = overlap(predicted, reference)
    distance_mm, distance_note = hd95(predicted, reference, spacing_mm=pair.spacing_mm, worst_mm=worst_mm)
    return [Score(pair.case, name, "dice", value, note), Score(pair.case, name, "hd95", distance_mm, distance_note)]


def hd95(predicted: np.ndarray, reference: np.ndarray, *, spacing_mm: Sequence[float], worst_mm: float) -> tuple[float, str]:
    """95 % Hausdorff distance in mm, 0 for two empty masks and `worst_mm` for one, and a note on these."""
    full = bool(predicted.any()), bool(reference.any())
    if full == (False, False):
        return 0.0, "absent from reference and prediction: 0 by rule"
    if not all(full):
        return worst_mm, f"{'absent from the reference, but predicted' if full[0] else 'missed'}: {worst_mm:.2f} mm by rule"
    return surfaces(predicted, reference, spacing_mm).percentile(95), ""
