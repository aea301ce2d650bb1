"""What a network segments: labels, of which a voxel has one, or regions that overlap; label map -> targets and back.

A region is a union of label values. Regions go from the largest to the smallest, so that a label map can be written from them one after
the other: WT (1, 2, 4), TC (1, 4), ET (4) first write 2, then 1 where TC is, then 4 where ET is.
"""

# R regions; a class index is the place of a label value among all of them in order, background (0) first

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from volssl.files import BadInput

Regions = Mapping[str, Sequence[int]]
THRESHOLD = 0.5  # a voxel lies in a region from this share on


def targets_of(labels: Mapping[str, int], regions: Regions) -> dict[str, tuple[int, ...]]:
    """name -> the label values it is made of: the regions, or where there are none each label as a region of one value."""
    return {name: tuple(values) for name, values in regions.items()} or {name: (value,) for name, value in labels.items()}


def region_values(regions: Regions) -> tuple[int, ...]:
    """The label value that each region writes: the one value in it that no later region holds.

    Raises: BadInput: a region with none or several of them.
    """
    chosen, faults, later = [], [], set[int]()
    for name, values in reversed(list(regions.items())):
        own = sorted(set(values) - later)
        if len(own) != 1:
            faults.append(f"{name} {tuple(values)}: exactly one value must lie in no later region; found {own or 'none'}")
        chosen += own[:1]
        later |= set(values)
    if faults:
        raise BadInput("regions: " + "; ".join(reversed(faults)) + "; name them from the largest to the smallest")
    return tuple(reversed(chosen))


def check_regions(labels: Mapping[str, int], regions: Regions) -> None:
    """Raises: BadInput: a value that is no label's, a label in no region, or regions from which no label map can be written."""
    if not regions:
        return
    held = {value for values in regions.values() for value in values}
    faults = []
    if unknown := sorted(held - set(labels.values())):
        faults.append(f"their values must be those of labels, {dict(labels)}; found {unknown}")
    if left := [name for name, value in labels.items() if value not in held]:
        faults.append(f"every label must lie in a region; {', '.join(left)} lies in none")
    if faults:
        raise BadInput("regions: " + "; ".join(faults))
    region_values(regions)


def region_masks(y_B1XYZ: Tensor, *, values: Sequence[int], regions: Regions) -> Tensor:
    """Class indices (B, 1, X, Y, Z) -> 1 inside and 0 outside of each region, float32 (B, R, X, Y, Z).

    Args: values: label value of each class index, background first.
    """
    holds_RK = torch.tensor([[value in held for value in values] for held in regions.values()], dtype=torch.float32)
    return holds_RK.to(y_B1XYZ.device)[:, y_B1XYZ[:, 0].long()].movedim(0, 1)


def written(inside_RXYZ: np.ndarray, regions: Regions) -> np.ndarray:
    """Masks of the regions -> label map, uint8 (X, Y, Z): region after region writes its value, so the smaller stand on the larger."""
    label_XYZ = np.zeros(inside_RXYZ.shape[1:], dtype=np.uint8)
    for value, inside_XYZ in zip(region_values(regions), inside_RXYZ, strict=True):
        label_XYZ[inside_XYZ] = value
    return label_XYZ
