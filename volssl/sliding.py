"""Sliding window over a volume, one slab after another: memory of a slab, whatever the volume's length and the number of classes.

Windows and their Gaussian weights are those of MONAI's `sliding_window_inference`; what differs is that shares never exist for the whole
volume: planes that no window to come can touch are handed out, and their memory is used again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA = 0.125  # of the Gaussian, in sides of the window: MONAI's default
LEAST_WEIGHT = 1e-3  # a window's corners count that much at least, as in MONAI
AT_ONCE = 1 << 18  # voxels whose largest share is looked for at once on a CPU: they fit its cache
COARSE = 8  # every so many voxels are looked at before all of them are

Box = tuple[slice, ...]
Corner = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """`patch_vox`: sides of a window. overlap: share that two neighbours have in common. batch: windows at once. device: of the network."""

    patch_vox: tuple[int, int, int]
    overlap: float = 0.5
    batch: int = 2
    device: torch.device = torch.device("cpu")


def starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis; the last one ends with the volume. A window larger than the volume lies about its middle.

    Source: as in MONAI, so that shares can be compared.
    """
    if window >= size:
        return [-((window - size) // 2)]
    step = max(1, int(window * (1 - overlap)))
    return [min(first, size - window) for first in range(0, size - window + step, step)]


def importance(patch_vox: Sequence[int]) -> Tensor:
    """Weight of a window's voxels, float32 (X, Y, Z): a Gaussian about its middle, `LEAST_WEIGHT` at least."""
    x, y, z = (torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (SIGMA * n)) ** 2) for n in patch_vox)
    weight_XYZ = x[:, None, None] * y[:, None] * z
    return weight_XYZ.clamp_(min=max(float(weight_XYZ.min()), LEAST_WEIGHT))


def slab_axis(shape_vox: Sequence[int]) -> int:
    """The axis along which slabs are cut: the longest, so that a slab is small."""
    return max(range(3), key=lambda axis: (shape_vox[axis], -axis))


def slabs(
    x_CXYZ: Tensor,
    predict: Callable[[Tensor], Tensor],
    windows: Windows,
    *,
    empty_C: Sequence[float],
    air: float | None = None,
    averaged: bool = True,
) -> Iterator[tuple[int, int, Tensor]]:
    """Shares of the planes of `slab_axis`, in order.

    Args: x_CXYZ: the volume, on any device; zeros stand beyond it. predict: (B, C, *patch_vox) on the windows' device -> shares
        (B, classes, *patch_vox). empty_C: the shares of a window that is left out, one per class. air: windows that hold this one value
        alone are left out; None leaves out none. averaged: shares are weighted means; else weighted sums, which cost less to make and
        whose largest is the same.
    Yields: first plane, plane after the last, their shares, float32 (classes, X, Y, Z) on the device, valid until the next.
    """
    axis, shape = slab_axis(x_CXYZ.shape[1:]), tuple(x_CXYZ.shape[1:])
    firsts = [starts(n, side, windows.overlap) for n, side in zip(shape, windows.patch_vox, strict=True)]
    sums = _Ring(len(empty_C), shape, windows, axis)
    weights = _Ring(1, shape, windows, axis) if averaged else None
    source = _Source(x_CXYZ, windows)
    rows = firsts[axis]
    for row, after in zip(rows, [*rows[1:], shape[axis]], strict=True):
        corners = list(itertools.product(*([row] if at == axis else first for at, first in enumerate(firsts))))
        left_out = [corner for corner in corners if air is not None and source.holds_only(corner, air)]
        kept = [corner for corner in corners if corner not in set(left_out)]
        for begin in range(0, len(kept), windows.batch):
            few = kept[begin : begin + windows.batch]
            for corner, shares_CXYZ in zip(few, predict(source.batch(few)), strict=True):
                sums.add(corner, shares_CXYZ)
        for corner in left_out:
            sums.add(corner, empty_C)
        if weights is not None:
            weights.add_row(corners)
        yield from _finished(sums, weights, max(row, 0), after)


def _finished(sums: _Ring, weights: _Ring | None, begin: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
    of_weights = weights.runs(begin, stop) if weights is not None else None
    for first, last, planes_CXYZ in sums.runs(begin, stop):
        if of_weights is not None:
            _, _, total = next(of_weights)
            planes_CXYZ.div_(total)
            total.zero_()
        yield first, last, planes_CXYZ
        planes_CXYZ.zero_()


def _clipped(corner: Corner, patch_vox: Sequence[int], shape: Sequence[int]) -> tuple[Box, Box]:
    # The part of a window that lies in the volume: in the volume's voxels, and in the window's.
    box = tuple(slice(max(0, first), min(n, first + side)) for first, side, n in zip(corner, patch_vox, shape, strict=True))
    return box, tuple(slice(part.start - first, part.stop - first) for part, first in zip(box, corner, strict=True))


class _Source:
    """Windows of a volume, in batches on the device."""

    def __init__(self, x_CXYZ: Tensor, windows: Windows) -> None:
        self.x_CXYZ, self.windows = x_CXYZ, windows
        self._batch = torch.zeros(0)

    def holds_only(self, corner: Corner, value: float) -> bool:
        """Whether all voxels of a window are `value`, those beyond the volume, which are 0, left aside."""
        box, _ = _clipped(corner, self.windows.patch_vox, self.x_CXYZ.shape[1:])
        voxels = self.x_CXYZ[(slice(None), *box)]
        # Most windows are told apart by a few of their voxels.
        return bool((voxels[:, ::COARSE, ::COARSE, ::COARSE] == value).all()) and bool((voxels == value).all())

    def batch(self, corners: Sequence[Corner]) -> Tensor:
        """The windows (B, C, *patch_vox), valid until the next."""
        shape = (len(corners), len(self.x_CXYZ), *self.windows.patch_vox)
        if self._batch.shape != shape:
            self._batch = torch.zeros(shape, dtype=self.x_CXYZ.dtype, device=self.windows.device)
        for target_CXYZ, corner in zip(self._batch, corners, strict=True):
            # What lies beyond the volume does so in every window, and stays zero.
            box, within = _clipped(corner, self.windows.patch_vox, self.x_CXYZ.shape[1:])
            target_CXYZ[(slice(None), *within)] = self.x_CXYZ[(slice(None), *box)]
        return self._batch


class _Ring:
    """Weighted sums of the planes that the windows of one row cover; plane p lies at p modulo the row's depth."""

    def __init__(self, channels: int, shape: Sequence[int], windows: Windows, axis: int) -> None:
        self.shape, self.patch_vox, self.axis = tuple(shape), windows.patch_vox, axis
        self.depth = min(windows.patch_vox[axis], shape[axis])
        sides = [self.depth if at == axis else n for at, n in enumerate(shape)]
        self.sums_CXYZ = torch.zeros((channels, *sides), device=windows.device)
        self.weight_XYZ = importance(windows.patch_vox).to(windows.device)
        self._row: Tensor | None = None

    def runs(self, begin: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Planes `begin` to `stop` as one or two runs of neighbours in memory: first, after the last, sums (a view)."""
        while begin < stop:
            at = begin % self.depth
            count = min(stop - begin, self.depth - at)
            yield begin, begin + count, self.sums_CXYZ.narrow(1 + self.axis, at, count)
            begin += count

    def add(self, corner: Corner, shares: Tensor | Sequence[float]) -> None:
        """Add a window's shares (C, *patch_vox), or the same ones for all of its voxels, times the weights."""
        box, within = _clipped(corner, self.patch_vox, self.shape)
        shift = within[self.axis].start - box[self.axis].start
        for first, last, planes_CXYZ in self.runs(box[self.axis].start, box[self.axis].stop):
            there = tuple(slice(None) if at == self.axis else part for at, part in enumerate(box))
            here = tuple(slice(first + shift, last + shift) if at == self.axis else part for at, part in enumerate(within))
            target_CXYZ, weight_XYZ = planes_CXYZ[(slice(None), *there)], self.weight_XYZ[here]
            if isinstance(shares, Tensor):
                target_CXYZ.addcmul_(shares[(slice(None), *here)], weight_XYZ)
                continue
            for target_XYZ, share in zip(target_CXYZ, shares, strict=True):
                if share:
                    target_XYZ.add_(weight_XYZ, alpha=share)

    def add_row(self, corners: Sequence[Corner]) -> None:
        """Add the weights of the windows of one row; they are the same in each row, and summed but once."""
        begin = max(0, corners[0][self.axis])
        if self._row is None:
            for corner in corners:
                self.add(corner, [1.0])
            # In the order of the planes: the first row begins at plane 0, so that nothing is turned.
            self._row = self.sums_CXYZ.clone()
            return
        for first, last, planes_CXYZ in self.runs(begin, begin + self.depth):
            planes_CXYZ.add_(self._row.narrow(1 + self.axis, first - begin, last - first))


def largest(shares_CXYZ: Tensor) -> Tensor:
    """Index of the largest of each voxel's shares, the first of equal ones, uint8 (X, Y, Z): a running maximum over the classes."""
    classes, *shape = shares_CXYZ.shape
    axis = max(range(3), key=lambda at: shares_CXYZ.stride(1 + at))
    per_plane = shape[0] * shape[1] * shape[2] // shape[axis]
    step = max(1, AT_ONCE // per_plane) if shares_CXYZ.device.type == "cpu" else shape[axis]
    index_XYZ = torch.zeros(shape, dtype=torch.uint8, device=shares_CXYZ.device)
    for first in range(0, shape[axis], step):
        count = min(step, shape[axis] - first)
        some_CXYZ, index = shares_CXYZ.narrow(1 + axis, first, count), index_XYZ.narrow(axis, first, count)
        best = some_CXYZ[0].clone()
        for number in range(1, classes):
            index.masked_fill_(some_CXYZ[number] > best, number)
            torch.maximum(best, some_CXYZ[number], out=best)
    return index_XYZ
