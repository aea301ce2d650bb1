"""The same scan twice, in whatever format and orientation: found by the means of blocks of four slices, close to rounding.

Slices lie at one to four fifths of an axis of the RAS+ array, so that of a DICOM series only these four are decoded.
Means are taken less their mean and over their standard deviation: a copy with other units is a copy. Source: own; a perceptual hash whose
tolerance is that of rounding instead of looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from volssl.volume import Grid, Volume

BLOCKS = 4  # along both axes of a slice
AT_ONCE = 256  # prints that are compared are read so many at a time
PLANES = (0.2, 0.4)  # and as far from the other end, so that they are the same ones from either side


@dataclass(frozen=True)
class Print:
    """The fingerprint of one scan along one axis of its RAS+ array. `means`: float32, 4 slices x 4 x 4 blocks."""

    shape_vox: tuple[int, int, int]
    axis: int
    means: np.ndarray


def planes(count: int) -> tuple[int, ...]:
    """Which of `count` slices are looked at."""
    near = [int(share * (count - 1)) for share in PLANES]
    return (*near, *(count - 1 - at for at in reversed(near)))


def prints_of(volume: Volume) -> list[Print]:
    """Fingerprints of a volume of one channel along all three axes; constant ones have none."""
    turned = volume.reoriented("RAS")
    array_XYZ, found = turned.array_CXYZ[0], []
    for axis in range(3):
        count = array_XYZ.shape[axis]
        slices = [np.take(array_XYZ, at, axis=axis) for at in planes(count)]
        found += _print(turned.grid.shape_vox, axis, slices)
    return found


def print_of_stack(grid: Grid, slices: Sequence[np.ndarray]) -> list[Print]:
    """The fingerprint of a series along its third axis: `slices` are its arrays (x, y) at `planes` of its own order."""
    (_, sign_x), (_, sign_y), (_, sign_z) = ((axis, sign) for axis, sign in sorted(grid.turn("RAS")))
    turn = [axis for axis, _ in grid.turn("RAS")]
    upright = [image_XY[::sign_x, ::sign_y] for image_XY in slices][::sign_z]
    if turn.index(0) > turn.index(1):
        upright = [image.T for image in upright]
    return _print(grid.reoriented("RAS").shape_vox, turn.index(2), upright)


def _print(shape_vox: tuple[int, int, int], axis: int, slices: Sequence[np.ndarray]) -> list[Print]:
    means = np.concatenate([_blocks(image) for image in slices])
    spread = float(means.std())
    if not np.isfinite(spread) or spread <= 1e-6 * float(np.abs(means).max()):
        return []
    return [Print(shape_vox, axis, ((means - means.mean()) / spread).astype(np.float32))]


def _blocks(image: np.ndarray) -> np.ndarray:
    # Mean of each block; slices thinner than the blocks repeat.
    rows, columns = (np.linspace(0, size, BLOCKS + 1).astype(int) for size in image.shape)
    sums = np.zeros((BLOCKS, BLOCKS))
    for row in range(BLOCKS):
        band = image[rows[row] : max(rows[row] + 1, rows[row + 1])]
        for column in range(BLOCKS):
            sums[row, column] = band[:, columns[column] : max(columns[column] + 1, columns[column + 1])].mean(dtype=np.float64)
    return sums.ravel()


def twins(names: Sequence[str], prints: Sequence[Sequence[Print]], *, tolerance: float) -> Iterator[tuple[str, str]]:
    """Pairs of names whose scans are the same: equal RAS+ shape, and along some axis no mean further apart than `tolerance`.

    Of n copies at least n - 1 pairs come, which join them all. Memory: the prints, once more.
    """
    groups: dict[tuple[object, ...], list[tuple[int, np.ndarray]]] = {}
    for number, several in enumerate(prints):
        for one in several:
            groups.setdefault((one.shape_vox, one.axis), []).append((number, one.means))
    for members in groups.values():
        means_NK = np.array([means for _, means in members])
        for one, two in close_pairs(len(members), means_NK.__getitem__, tolerance=tolerance):
            low, high = sorted((members[one][0], members[two][0]))
            if low != high:
                yield names[low], names[high]


def close_pairs(count: int, means_of: Callable[[np.ndarray], np.ndarray], *, tolerance: float) -> Iterator[tuple[int, int]]:
    """Places of all pairs among `count` prints of one shape and axis whose means are nowhere further apart than `tolerance`.

    Args: means_of: places (n,) -> their means (n, K), which may lie on disk. Memory: 24 bytes a print, and those that are close to one.
    """
    key = _keys(count, means_of)
    order = np.argsort(key, kind="stable")
    key = key[order]
    window_NK, begin, stop = means_of(order[:1]), 0, 1
    for place, end in enumerate(np.searchsorted(key, key + tolerance, side="right")):
        if end <= place + 1:
            continue
        if end > stop:
            until = min(count, end + AT_ONCE)
            window_NK = np.concatenate([window_NK[max(0, place - begin) :], means_of(order[max(stop, place) : until])])
            begin, stop = place, until
        near = np.abs(window_NK[place + 1 - begin : end - begin] - window_NK[place - begin]).max(axis=1) <= tolerance
        for other in np.flatnonzero(near):
            yield int(order[place]), int(order[place + 1 + other])


def _keys(count: int, means_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    # The component that spreads most: sorted along it, candidates are neighbours.
    parts = [np.arange(begin, min(begin + AT_ONCE, count)) for begin in range(0, count, AT_ONCE)]
    sums, squares = np.zeros(1), np.zeros(1)
    for part in parts:
        means_NK = means_of(part).astype(np.float64)
        sums, squares = sums + means_NK.sum(axis=0), squares + (means_NK**2).sum(axis=0)
    widest = int(np.argmax(squares / count - (sums / count) ** 2))
    return np.concatenate([means_of(part)[:, widest].copy() for part in parts])  # a view would keep the whole block
