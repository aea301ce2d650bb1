"""Single lesions: connected components of two masks, and which of them meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from volssl.surface import bounding_box

Connectivity = Literal[6, 18, 26]


def structure(connectivity: Connectivity) -> np.ndarray:
    """The neighbours of a voxel: across faces (6), also edges (18), also corners (26)."""
    return ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])


def components(mask_XYZ: np.ndarray, connectivity: Connectivity) -> tuple[np.ndarray, int]:
    """Numbers 1 ... count of the connected parts, 0 outside, int32, and the count."""
    numbers = np.zeros(mask_XYZ.shape, dtype=np.int32)
    box = bounding_box(mask_XYZ)
    count = int(ndimage.label(mask_XYZ[box], structure(connectivity), output=numbers[box]))  # type: ignore[arg-type]
    return numbers, count


def meetings(one_XYZ: np.ndarray, other_XYZ: np.ndarray) -> dict[tuple[int, int], int]:
    """Voxels that part a of one map and part b of the other have in common, (a, b) -> count; 0 is no part."""
    both = (one_XYZ > 0) & (other_XYZ > 0)
    pairs, counts = np.unique(np.stack([one_XYZ[both], other_XYZ[both]], axis=1), axis=0, return_counts=True)
    return {(int(a), int(b)): int(count) for (a, b), count in zip(pairs, counts, strict=True)}


@dataclass(frozen=True)
class Lesion:
    """A reference lesion and what was predicted of it.

    Attributes: volume_mm3: of the reference. dice: 0 where nothing was predicted. found: numbers of the predicted components that reach it.
    """

    number: int
    volume_mm3: float
    dice: float
    found: tuple[int, ...]


@dataclass(frozen=True)
class Matching:
    """All lesions of a region, on a box around them.

    Attributes: false: numbers of predicted components that reach no lesion. reference_XYZ, predicted_XYZ: numbers of lesions and of
        predicted components. reference_boxes, predicted_boxes: where each of these lies.
    """

    lesions: tuple[Lesion, ...]
    false: tuple[int, ...]
    reference_XYZ: np.ndarray
    predicted_XYZ: np.ndarray
    reference_boxes: list[tuple[slice, ...]]
    predicted_boxes: list[tuple[slice, ...]]

    def masks(self, lesion: Lesion) -> tuple[np.ndarray, np.ndarray]:
        """The predicted components that reach the lesion, and the lesion, cut to a box around both."""
        boxes = [self.reference_boxes[lesion.number - 1], *(self.predicted_boxes[part - 1] for part in lesion.found)]
        box = tuple(slice(min(part.start for part in parts), max(part.stop for part in parts)) for parts in zip(*boxes, strict=True))
        return np.isin(self.predicted_XYZ[box], lesion.found), self.reference_XYZ[box] == lesion.number


def match_by_dilation(predicted_XYZ: np.ndarray, reference_XYZ: np.ndarray, *, dilation: int, voxel_mm3: float) -> Matching:
    """Lesions as the BraTS 2023 evaluation sees them.

    The reference is dilated `dilation` times with 18 neighbours; what lies in one 26-connected part of the dilated reference is one lesion,
    so that fragments close together are one. Every 26-connected component of the prediction that reaches the dilated lesion belongs to it,
    if need be to several lesions; one that reaches none is false.
    """
    box = bounding_box(predicted_XYZ, reference_XYZ, margin=dilation + 1)
    predicted_XYZ, reference_XYZ = predicted_XYZ[box], reference_XYZ[box]
    dilated = ndimage.binary_dilation(reference_XYZ, structure(18), iterations=dilation) if dilation else reference_XYZ
    # A part of the dilated mask is the dilation of what it holds: nothing from another part reaches into it.
    zones, count = components(dilated, 26)
    parts, parts_count = components(predicted_XYZ, 26)
    numbers = np.where(reference_XYZ, zones, 0)
    reached, common = meetings(zones, parts), meetings(numbers, parts)
    reference_vox = np.bincount(numbers.ravel(), minlength=count + 1)
    parts_vox = np.bincount(parts.ravel(), minlength=parts_count + 1)
    lesions = []
    for number in range(1, count + 1):
        found = tuple(part for zone, part in reached if zone == number)
        inside = sum(common.get((number, part), 0) for part in found)
        total = int(reference_vox[number] + parts_vox[list(found)].sum())
        lesions.append(Lesion(number, float(reference_vox[number] * voxel_mm3), 2 * inside / total, found))
    false = tuple(sorted(set(range(1, parts_count + 1)) - {part for _, part in reached}))
    boxes: list[list[tuple[slice, ...]]] = [list(ndimage.find_objects(part)) for part in (numbers, parts)]  # type: ignore[arg-type]
    return Matching(tuple(lesions), false, numbers, parts, *boxes)


@dataclass(frozen=True)
class Detected:
    """Lesions found at an overlap. groups: numbers of (predicted components, reference lesions) that are judged as one, where found."""

    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    found: int
    predicted: int
    reference: int


def detect_by_overlap(predicted_XYZ: np.ndarray, reference_XYZ: np.ndarray, *, least: float) -> Detected:
    """Lesions as LiTS 2017 counts them. Args: both: numbers of components. least: intersection over union that must be exceeded.

    Reference lesions that one predicted component covers more of than any other component does are judged as one; every predicted component
    belongs to the (joined) lesion it has most voxels in common with, and all that belong to a lesion are judged as one.
    """
    common = meetings(predicted_XYZ, reference_XYZ)
    predicted_vox, reference_vox = np.bincount(predicted_XYZ.ravel()), np.bincount(reference_XYZ.ravel())
    joined: dict[int, list[int]] = {}  # by the predicted component that covers most of each
    for lesion in sorted({lesion for _, lesion in common}):
        joined.setdefault(max((count, -part) for (part, of), count in common.items() if of == lesion)[1] * -1, []).append(lesion)
    lesion_of = {lesion: owner for owner, lesions in joined.items() for lesion in lesions}
    shared: dict[tuple[int, int], int] = {}
    for (part, lesion), count in common.items():
        key = (part, lesion_of[lesion])
        shared[key] = shared.get(key, 0) + count
    parts_of: dict[int, list[int]] = {}
    for part in sorted({part for part, _ in shared}):
        parts_of.setdefault(max((count, -owner) for (of, owner), count in shared.items() if of == part)[1] * -1, []).append(part)
    groups = []
    for owner, parts in sorted(parts_of.items()):
        inside = sum(shared.get((part, owner), 0) for part in parts)
        total = int(predicted_vox[parts].sum() + reference_vox[joined[owner]].sum())
        if inside / (total - inside) > least:
            groups.append((tuple(parts), tuple(joined[owner])))
    found = sum(len(lesions) for _, lesions in groups)
    return Detected(tuple(groups), found, int((predicted_vox[1:] > 0).sum()), int((reference_vox[1:] > 0).sum()))
