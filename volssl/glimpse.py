"""A look at a series that is refused: its slices where they lie, what is missing left dark. For pictures alone, never for voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from volssl.archive import Source
from volssl.dicom import LPS_TO_RAS, Slice, Unreadable, header
from volssl.pixels import quiet, read_slice
from volssl.stacks import SAME_MM, in_order
from volssl.volume import Grid, Volume

LARGEST_VOX = 400_000_000
STRETCH = 8  # a stack with wider gaps is drawn with its slices side by side


def glimpse(source: Source) -> Volume | None:
    """The slices of a DICOM series on an even grid along their normal, each at the nearest place; None if they cannot be placed.

    Of several slices at one place the first stays; of several sizes or orientations the commonest. What cannot be decoded stays dark.
    """
    if source.kind != "dicom" or source.part:
        return None
    placed = [one for one in map(_header, source.files) if one is not None and _is_placed(one)]
    order = in_order(_commonest(placed)) if placed else []
    if not order:
        return None
    normal = np.cross(order[0].axes[:3], order[0].axes[3:])
    along_N = np.array([one.position for one in order]) @ normal
    gaps = np.diff(along_N)
    step = float(np.median(gaps[gaps > SAME_MM])) if (gaps > SAME_MM).any() else 1.0
    places = np.rint((along_N - along_N[0]) / step).astype(int)
    if places[-1] >= STRETCH * len(order):
        places = np.arange(len(order))
    rows, columns = order[0].shape
    if rows * columns * (int(places[-1]) + 1) > LARGEST_VOX:
        return None
    array_ZYX = _filled(order, places)
    return None if array_ZYX is None else Volume(array_ZYX.transpose(2, 1, 0)[None], _grid(order[0], normal * step, len(array_ZYX)))


def _header(path: Path) -> Slice | None:
    try:
        return header(path)
    except Unreadable:
        return None


def _is_placed(one: Slice) -> bool:
    sized = len(one.position) == 3 and len(one.axes) == 6 and len(one.spacing) == 2 and min(one.spacing) > 0
    return sized and min(one.shape) > 0 and float(np.linalg.norm(np.cross(one.axes[:3], one.axes[3:]))) > 0.9


def _commonest(slices: list[Slice]) -> list[Slice]:
    groups: dict[object, list[Slice]] = {}
    for one in slices:
        groups.setdefault((one.shape, tuple(np.round(one.axes, 2))), []).append(one)
    return max(groups.values(), key=len)


def _filled(order: list[Slice], places: np.ndarray) -> np.ndarray | None:
    planes: dict[int, np.ndarray] = {}
    with quiet():
        for place, one in zip(places.tolist(), order, strict=True):
            if place not in planes:
                try:
                    planes[place] = np.nan_to_num(read_slice(one).astype(np.float32))
                except (Unreadable, MemoryError):
                    continue
    if not planes:
        return None
    array_ZYX = np.full((int(places[-1]) + 1, *order[0].shape), min(float(plane.min()) for plane in planes.values()), dtype=np.float32)
    for place, plane in planes.items():
        array_ZYX[place] = plane
    return array_ZYX


def _grid(first: Slice, step: np.ndarray, count: int) -> Grid:
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.axes[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.axes[3:]) * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, first.position
    return Grid((first.shape[1], first.shape[0], count), LPS_TO_RAS @ affine)
