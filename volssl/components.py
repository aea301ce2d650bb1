"""Connected parts of a label map: which lesion a voxel belongs to, and the cleaning of a finished map by their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from scipy import ndimage

from volssl.files import BadInput
from volssl.targets import region_values

NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)  # 26: voxels that share a face, an edge or a corner are one part


@dataclass(frozen=True)
class Parts:
    """The connected parts of a mask, inside its bounding box.

    Attributes: box: slices into the whole array. number_XYZ: 0 outside, 1, 2, ... the parts, in the box. sizes_vox: of part 1, 2, ...
    """

    box: tuple[slice, slice, slice]
    number_XYZ: np.ndarray
    sizes_vox: np.ndarray


def parts_of(mask_XYZ: np.ndarray) -> Parts | None:
    """The parts of a boolean mask (26 neighbours), or None if it is empty; only its bounding box is looked through."""
    if (box := bounding_box(mask_XYZ)) is None:
        return None
    labelled: Any = ndimage.label(mask_XYZ[box], structure=NEIGHBOURS)
    number_XYZ, count = labelled
    return Parts(box, number_XYZ, np.bincount(number_XYZ.ravel(), minlength=count + 1)[1:])


def bounding_box(mask_XYZ: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds all of a boolean mask, or None if it is empty."""
    sides = []
    for axis in range(3):
        found = np.flatnonzero(mask_XYZ.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(found):
            return None
        sides.append(slice(int(found[0]), int(found[-1]) + 1))
    return sides[0], sides[1], sides[2]


@dataclass(frozen=True)
class Replacement:
    """A target whose whole volume in a case is below `below_mm3` becomes the label `by`, a name."""

    below_mm3: float
    by: str


@dataclass(frozen=True)
class Cleaning:
    """What is done to a finished label map, by the names of regions or labels, in this order; nothing by default.

    Attributes:
        largest: targets of which only the largest part is kept. Of a region this takes all labels in it along: with the liver given as the
            region of liver and tumour, tumour outside of the largest part goes too.
        smallest_mm3: target -> parts of it below this volume go.
        replaced: target -> what it becomes where all of it together is below a volume, as the enhancing tumour of BraTS becomes necrosis.
    A part that goes becomes the label of the next larger region around it (a lesion becomes liver), else background. Background is no
    target: it is never kept, filled or counted.
    """

    largest: tuple[str, ...] = ()
    smallest_mm3: dict[str, float] = field(default_factory=dict)
    replaced: dict[str, Replacement] = field(default_factory=dict)

    def check(self, targets: Mapping[str, Sequence[int]], labels: Mapping[str, int]) -> None:
        """Raises: BadInput: a name that is no target or label, a volume that is not above 0."""
        named = [*self.largest, *self.smallest_mm3, *self.replaced]
        faults = [f"{name}: must be one of {', '.join(targets)}" for name in named if name not in targets]
        unknown = {name: rule.by for name, rule in self.replaced.items() if rule.by not in labels}
        faults += [f"replaced.{name}.by: must be one of {', '.join(labels)}; found {by}" for name, by in unknown.items()]
        volumes = [*self.smallest_mm3.values(), *(r.below_mm3 for r in self.replaced.values())]
        faults += [f"a volume must be above 0 mm3; found {volume:g}" for volume in volumes if not volume > 0]
        if faults:
            raise BadInput("cleaning: " + "; ".join(faults))

    def apply(
        self, label_XYZ: np.ndarray, *, targets: Mapping[str, Sequence[int]], labels: Mapping[str, int], spacing_mm: Sequence[float]
    ) -> np.ndarray:
        """A cleaned copy of a label map. Args: targets: name -> label values, from the largest to the smallest. labels: name -> value."""
        cleaned, voxel_mm3 = label_XYZ.copy(), prod(spacing_mm)
        for name in self.largest:
            if (parts := parts_of(np.isin(cleaned, targets[name]))) is not None:
                goes = np.arange(len(parts.sizes_vox)) != parts.sizes_vox.argmax()
                _drop(cleaned, parts, goes, _around(name, targets))
        for name, mm3 in self.smallest_mm3.items():
            if (parts := parts_of(np.isin(cleaned, targets[name]))) is not None:
                _drop(cleaned, parts, parts.sizes_vox * voxel_mm3 < mm3, _around(name, targets))
        for name, rule in self.replaced.items():
            inside = np.isin(cleaned, targets[name])
            if inside.sum() * voxel_mm3 < rule.below_mm3:
                cleaned[inside] = labels[rule.by]
        return cleaned


def _drop(label_XYZ: np.ndarray, parts: Parts, goes: np.ndarray, becomes: int) -> None:
    label_XYZ[parts.box][np.concatenate([[False], goes])[parts.number_XYZ]] = becomes


def _around(name: str, targets: Mapping[str, Sequence[int]]) -> int:
    """The value that the smallest region around a target writes where the target is not, or 0 where none is around it."""
    held = set(targets[name])
    around = {other: len(values) for other, values in targets.items() if held < set(values)}
    return dict(zip(targets, region_values(targets), strict=True))[min(around, key=around.__getitem__)] if around else 0
