"""Distances between the surfaces of two masks, each surface element weighted by its area.

Definition of google-deepmind/surface-distance (Nikolov et al., 2018): a surface element lies at every corner of the voxel grid whose 2x2x2
neighbours are neither all inside nor all outside; its area is that of the marching-cubes triangles of the neighbours' code (0 ... 255);
its distance goes to the nearest element of the other surface. Outside of the array lies background, so a mask may touch the border.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.spatial import KDTree

CORNERS = tuple(itertools.product((0, 1), repeat=3))
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Surfaces:
    """Distances (mm) and areas (mm^2) of all elements of both surfaces. Both masks must hold a voxel, else use a protocol's rule."""

    to_reference_mm: np.ndarray
    predicted_mm2: np.ndarray
    to_predicted_mm: np.ndarray
    reference_mm2: np.ndarray

    def percentile(self, percent: float) -> float:
        """The larger of the two directions' distances that `percent` of the surface's area lies within."""
        return max(
            _percentile(self.to_reference_mm, self.predicted_mm2, percent), _percentile(self.to_predicted_mm, self.reference_mm2, percent)
        )

    def average(self) -> float:
        """Average symmetric surface distance: both surfaces' elements together, weighted by area."""
        return float(np.average(self._both()[0], weights=self._both()[1]))

    def root_mean_square(self) -> float:
        """Root of the mean squared distance of both surfaces' elements together, weighted by area."""
        return float(np.sqrt(np.average(self._both()[0] ** 2, weights=self._both()[1])))

    def maximum(self) -> float:
        """The largest distance: the Hausdorff distance."""
        return float(self._both()[0].max())

    def _both(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self.to_reference_mm, self.to_predicted_mm]), np.concatenate([self.predicted_mm2, self.reference_mm2])


def surfaces(predicted_XYZ: np.ndarray, reference_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> Surfaces:
    """The distances between two boolean masks of one shape.

    Raises: ValueError: a mask without a voxel, which has no surface.
    """
    if not predicted_XYZ.any() or not reference_XYZ.any():
        raise ValueError("surfaces: both masks must hold a voxel; an empty one has no surface, so the protocol's rule must come first")
    predicted_N3, predicted_mm2 = _elements(predicted_XYZ, spacing_mm)
    reference_N3, reference_mm2 = _elements(reference_XYZ, spacing_mm)
    # A search tree asks for the elements alone; a distance map would be computed for every voxel of the volume.
    to_reference_mm, _ = KDTree(reference_N3).query(predicted_N3)
    to_predicted_mm, _ = KDTree(predicted_N3).query(reference_N3)
    return Surfaces(np.asarray(to_reference_mm), predicted_mm2, np.asarray(to_predicted_mm), reference_mm2)


def bounding_box(*masks_XYZ: np.ndarray, margin: int = 0) -> tuple[slice, slice, slice]:
    """The smallest box that holds every voxel of the masks, and `margin` voxels more where the array has them; the whole array for none."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        found = np.flatnonzero(np.logical_or.reduce([mask.any(axis=others) for mask in masks_XYZ]))
        size = masks_XYZ[0].shape[axis]
        box.append(slice(max(0, int(found[0]) - margin), min(size, int(found[-1]) + 1 + margin)) if len(found) else slice(0, size))
    return box[0], box[1], box[2]


def _elements(mask_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Positions in mm (N, 3) and areas (N,) of the surface elements."""
    box = bounding_box(mask_XYZ)
    padded = np.pad(mask_XYZ[box].astype(bool), 1).view(np.uint8)
    sizes = [size - 1 for size in padded.shape]
    code_XYZ = np.zeros(sizes, dtype=np.uint8)
    for bit, corner in enumerate(CORNERS):
        code_XYZ |= padded[tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))] << np.uint8(bit)
    at_N3 = np.argwhere((code_XYZ != 0) & (code_XYZ != 255))
    areas = _areas_mm2(spacing_mm)[code_XYZ[tuple(at_N3.T)]]
    return (at_N3 + np.array([part.start for part in box])) * np.asarray(spacing_mm, dtype=np.float64), areas


def _percentile(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    order = np.argsort(distances_mm, kind="stable")
    share = np.cumsum(areas_mm2[order]) / areas_mm2.sum()
    place = min(int(np.searchsorted(share, percent / 100)), len(order) - 1)
    return float(distances_mm[order[place]])


# ------------------------------------------------------------------------------------------------ the areas of the 256 codes


def _areas_mm2(spacing_mm: Sequence[float]) -> np.ndarray:
    """Area per code: bit b of a code says whether CORNERS[b] is inside."""
    codes, vectors_N3 = _triangle_vectors()
    x, y, z = (float(step) for step in spacing_mm)
    return np.bincount(codes, np.linalg.norm(vectors_N3 * (y * z, x * z, x * y), axis=1), minlength=256)


@cache
def _triangle_vectors() -> tuple[np.ndarray, np.ndarray]:
    """The triangles of all codes: whose they are, and their vector area in a cubic voxel of 1 mm."""
    found = [(code, _vector_area(triangle)) for code in range(256) for loop in _loops(code) for triangle in _triangles(loop)]
    return np.array([code for code, _ in found]), np.array([vector for _, vector in found])


def _loops(code: int) -> Iterator[list[Point]]:
    """The closed polygons, through middles of edges, that part inside from outside.

    On a face with two inside corners across, the corners of the rarer kind in the cube are cut off one by one.
    """
    rare = code.bit_count() <= 4
    steps: list[tuple[Point, Point]] = []
    for face in _faces():
        inside = [bool(code >> CORNERS.index(corner) & 1) for corner in face]
        crossed = [place for place in range(4) if inside[place] != inside[place - 1]]
        middle = [_middle(face[place - 1], face[place]) for place in range(4)]
        if len(crossed) == 2:
            steps.append((middle[crossed[0]], middle[crossed[1]]))
        elif crossed:
            steps += [(middle[place], middle[(place + 1) % 4]) for place in range(4) if inside[place] == rare]
    while steps:
        first, last = steps.pop()
        loop = [first]
        while last != first:
            loop.append(last)
            step = next(step for step in steps if last in step)
            steps.remove(step)
            last = step[1] if step[0] == last else step[0]
        yield loop


def _faces() -> Iterator[list[tuple[int, int, int]]]:
    for axis, side in itertools.product(range(3), (0, 1)):
        yield [(*turn[:axis], side, *turn[axis:]) for turn in ((0, 0), (0, 1), (1, 1), (1, 0))]  # type: ignore[misc]


def _middle(a: Sequence[float], b: Sequence[float]) -> Point:
    x, y, z = ((left + right) / 2 for left, right in zip(a, b, strict=True))
    return x, y, z


def _triangles(loop: list[Point]) -> list[tuple[Point, Point, Point]]:
    # A loop of five or more points need not be flat, and its area depends on how it is cut: the reference's table holds, for all 256 codes,
    # the cut with the largest area in a cubic voxel (a test compares them all).
    cuts = [[(loop[a], loop[b], loop[c]) for a, b, c in cut] for cut in _cuts(0, len(loop) - 1)]
    return max(cuts, key=lambda cut: sum(float(np.linalg.norm(_vector_area(triangle))) for triangle in cut))


def _cuts(first: int, last: int) -> list[list[tuple[int, int, int]]]:
    """All ways to cut the polygon of the points first ... last into triangles."""
    if last - first < 2:
        return [[]]
    return [
        [*left, *right, (first, middle, last)]
        for middle in range(first + 1, last)
        for left in _cuts(first, middle)
        for right in _cuts(middle, last)
    ]


def _vector_area(triangle: tuple[Point, Point, Point]) -> np.ndarray:
    a, b, c = (np.array(point) for point in triangle)
    return np.cross(b - a, c - a) / 2
