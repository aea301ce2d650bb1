"""A volume on another grid, with no aliasing where the grid gets coarser; in slabs where the axes stay, so that memory stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from scipy import ndimage, sparse

from volssl.volume import Grid, Volume

FWHM_PER_SIGMA = 2.3548200450309493  # 2 sqrt(2 ln 2)
TRUNCATE = 3.0  # sigmas of the Gaussian that are kept on either side
SLAB = 32  # planes of the result made at a time
EDGE = 1e-6  # voxels: positions come with rounding


def resample(volume: Volume, grid: Grid, *, order: Literal["linear", "nearest"] = "linear", fill: float = 0.0) -> Volume:
    """`volume` on any other `grid`.

    Linear values are float32; before the grid gets coarser along an axis, the volume is smoothed along it with a Gaussian of
    sigma = sqrt(r^2 - 1) / 2.355 voxels, r being the ratio of the spacings, so that fine texture cannot alias.
    Outside of the volume (beyond half a voxel from its outermost centres) stands `fill`. Nearest keeps the type of the array.
    Source: Cardoso et al., Scale factor point spread function matching: beyond aliasing in image resampling, MICCAI 2015.
    """
    # In voxel indices of the volume, so that SimpleITK never sees world coordinates, nor has to represent a direction.
    matrix = np.linalg.inv(volume.grid.affine) @ grid.affine
    if order == "linear" and _is_straight(matrix):
        array_CXYZ = np.empty((len(volume.array_CXYZ), *grid.shape_vox), np.float32)
        for part, slab_CXYZ in slabs(volume, grid, fill=fill):
            array_CXYZ[:, *part] = slab_CXYZ
        return Volume(array_CXYZ, grid)
    transform = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    ratios = np.linalg.norm(matrix[:3, :3], axis=1)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in grid.shape_vox])
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkLinear if order == "linear" else sitk.sitkNearestNeighbor)
    resampler.SetDefaultPixelValue(float(fill))
    channels = []
    for array_XYZ in volume.array_CXYZ:
        if order == "linear":
            array_XYZ = _smoothed(array_XYZ.astype(np.float32), ratios)
        image = sitk.GetImageFromArray(np.ascontiguousarray(array_XYZ.transpose(2, 1, 0)))
        channels.append(sitk.GetArrayFromImage(resampler.Execute(image)).transpose(2, 1, 0))
    return Volume(np.stack(channels), grid)


def _is_straight(matrix: np.ndarray) -> bool:
    # Whether both grids have the same axes: then each axis is resampled by itself.
    turned = matrix[:3, :3] - np.diag(matrix[:3, :3].diagonal())
    return bool(np.abs(turned).max() < 1e-9 * np.abs(matrix[:3, :3]).max())


def _sigma(ratio: float) -> float:
    return float(np.sqrt(ratio**2 - 1)) / FWHM_PER_SIGMA if ratio > 1 + 1e-6 else 0.0


def _smoothed(array_XYZ: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    for axis, ratio in enumerate(ratios):
        if sigma := _sigma(ratio):
            array_XYZ = ndimage.gaussian_filter1d(array_XYZ, sigma, axis=axis, mode="nearest", truncate=TRUNCATE)
    return array_XYZ


Part = tuple[slice, slice, slice]


def slabs(
    volume: Volume, grid: Grid, *, fill: float = 0.0, mend: Callable[[np.ndarray], np.ndarray] | None = None, depth: int = SLAB
) -> Iterator[tuple[Part, np.ndarray]]:
    """What `resample` gives, for a `grid` with the axes of the volume, `depth` planes at a time: (which voxels, their values).

    Every value is the same to the bit whatever `depth`, as each is a sum of the same terms in the same order.

    Args: mend: called with each plane of the volume, float32 (a copy), before it is resampled. depth: in planes of the slowest axis.
    Returns: float32 (C, X, Y, Z), valid until the next one.
    """
    axes = _axes(volume.grid, grid)
    # In the order of the memory, slowest first: a plane is then read in one go.
    order = sorted(range(3), key=lambda axis: -abs(volume.array_CXYZ.strides[axis + 1]))
    back = [(order[0], order[2], order[1]).index(axis) for axis in range(3)]
    channels = [_planes(array_XYZ.transpose(order), [axes[axis] for axis in order], mend) for array_XYZ in volume.array_CXYZ]
    for begin in range(0, grid.shape_vox[order[0]], depth):
        part = [slice(None)] * 3
        part[order[0]] = slice(begin, min(begin + depth, grid.shape_vox[order[0]]))
        made = [planes(part[order[0]]) for planes in channels]
        slab = np.stack(made) if len(made) > 1 else made[0][None]
        slab_CXYZ = slab.transpose(0, *(axis + 1 for axis in back))
        _fill_outside(slab_CXYZ, [one.inside[part[axis]] for axis, one in enumerate(axes)], fill)
        yield (part[0], part[1], part[2]), slab_CXYZ


def streamed(
    runs: Iterable[tuple[int, int, np.ndarray]], old: Grid, new: Grid, *, axis: int, fill: float = 0.0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """What `resample` gives for a volume that is never there as a whole, but comes as runs of planes, in order along `axis`.

    Args: runs: first plane, plane after the last, values (C, X, Y, Z) of a volume on the grid `old`. new: with the same axes.
    Yields: first plane of `new`, plane after the last, their values, float32 (C, X, Y, Z); a few at a time.
    """
    axes = _axes(old, new)
    slow, (middle, fast) = axes[axis], (one for at, one in enumerate(axes) if at != axis)
    columns = np.arange(new.shape_vox[axis] + 1) if slow.weights is None else slow.weights.indices
    bounds = columns[:-1] if slow.weights is None else slow.weights.indptr[:-1]
    lowest = np.minimum.reduceat(columns, bounds) if slow.weights is not None else bounds
    highest = np.maximum.reduceat(columns, bounds) if slow.weights is not None else bounds
    kept: dict[int, np.ndarray] = {}
    done = 0
    for first, stop, values_CXYZ in runs:
        planes = np.moveaxis(values_CXYZ, 1 + axis, 0)
        for number in range(first, stop):
            kept[number] = np.stack([_in_plane(plane, middle, fast).T for plane in planes[number - first].astype(np.float32)])
            ready = int(np.searchsorted(highest, number, side="right"))
            if ready == done:
                continue
            low = int(lowest[done])
            for index in [index for index in kept if index < low]:
                del kept[index]
            made = np.stack([kept[index] for index in range(low, number + 1)])
            if slow.weights is not None:
                weights = slow.weights[done:ready, low : number + 1]
                made = (weights @ made.reshape(len(made), -1)).reshape(-1, *made.shape[1:])
            made = np.ascontiguousarray(np.moveaxis(made, 0, 1 + axis))
            _fill_outside(made, [one.inside[done:ready] if at == axis else one.inside for at, one in enumerate(axes)], fill)
            yield done, ready, made
            done = ready


@dataclass(frozen=True)
class _Axis:
    # Row m of `weights` makes position m of the new axis from the old ones; None if they are the same positions.
    weights: Any
    inside: np.ndarray

    @classmethod
    def of(cls, old: int, new: int, ratio: float, offset: float) -> _Axis:
        position = offset + ratio * np.arange(new)
        inside = (position >= -0.5 - EDGE) & (position <= old - 0.5 + EDGE)
        if old == new and np.abs(position - np.arange(new)).max() < EDGE:
            return cls(None, inside)
        low = np.floor(position).astype(int)
        share = position - low
        linear = _banded(np.stack([low, low + 1], 1), np.stack([1 - share, share], 1), old)
        return cls((linear @ _gaussian(old, _sigma(abs(ratio)))).astype(np.float32), inside)

    def along_first(self, array: np.ndarray) -> np.ndarray:
        return array if self.weights is None else self.weights @ array


def _axes(old: Grid, new: Grid) -> list[_Axis]:
    matrix = np.linalg.inv(old.affine) @ new.affine
    assert _is_straight(matrix), matrix
    counts = zip(old.shape_vox, new.shape_vox, strict=True)
    return [_Axis.of(n, m, matrix[axis, axis], matrix[axis, 3]) for axis, (n, m) in enumerate(counts)]


def _in_plane(values: np.ndarray, middle: _Axis, fast: _Axis) -> np.ndarray:
    # (middle, fast) -> (fast, middle)
    return fast.along_first(np.ascontiguousarray(middle.along_first(values).T))


def _fill_outside(array_CXYZ: np.ndarray, inside: Sequence[np.ndarray], fill: float) -> None:
    for axis, of_axis in enumerate(inside):
        if not of_axis.all():
            array_CXYZ[(slice(None),) * (axis + 1) + (~of_axis,)] = fill


def _banded(columns: np.ndarray, values: np.ndarray, size: int) -> Any:
    # Beyond the ends stand the values at the ends. Terms of one column are summed, so that their order is fixed.
    rows = np.repeat(np.arange(len(columns)), columns.shape[1])
    made = sparse.csr_array((values.ravel(), (rows, np.clip(columns, 0, size - 1).ravel())), shape=(len(columns), size))
    made.sum_duplicates()
    return made


def _gaussian(size: int, sigma: float) -> Any:
    reach = int(TRUNCATE * sigma + 0.5)
    steps = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2) if sigma else np.ones(1)
    return _banded(np.arange(size)[:, None] + steps, np.tile(kernel / kernel.sum(), (size, 1)), size)


def _planes(array: np.ndarray, axes: Sequence[_Axis], mend: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[slice], np.ndarray]:
    # `array` (slow, middle, fast) -> a function that makes planes of the result (slow, fast, middle), asked for in order.
    slow, middle, fast = axes
    kept: dict[int, np.ndarray] = {}

    def plane(index: int) -> np.ndarray:
        values = array[index].astype(np.float32)  # always a copy
        if mend is not None:
            values = mend(values)
        return _in_plane(values, middle, fast)

    def planes(which: slice) -> np.ndarray:
        rows = None if slow.weights is None else slow.weights[which]
        low, high = (which.start, which.stop) if rows is None else (rows.indices.min(), rows.indices.max() + 1)
        for index in [index for index in kept if not low <= index < high]:
            del kept[index]
        for index in range(low, high):
            if index not in kept:
                kept[index] = plane(index)
        stack = np.stack([kept[index] for index in range(low, high)])
        if rows is None:
            return stack
        return (rows[:, low:high] @ stack.reshape(len(stack), -1)).reshape(-1, *stack.shape[1:])

    return planes
