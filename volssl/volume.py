"""Grid and Volume: where the voxels of a scan lie in the patient, and the lossless moves between such grids.

World coordinates are millimetres, RAS+ (x grows to the patient's right, y to anterior, z to superior), as in NIfTI.
A voxel index names the centre of a voxel, so the box of a grid reaches from -0.5 to n - 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

CODES = (("L", "R"), ("P", "A"), ("I", "S"))  # of the world axes: towards lower, towards higher coordinates


@dataclass(frozen=True, eq=False)
class Grid:
    """`shape_vox` voxels (X, Y, Z) and the 4x4 `affine` from voxel index to world millimetres (RAS+)."""

    shape_vox: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape_vox)
        affine = np.array(self.affine, dtype=np.float64)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"Grid: shape_vox must be three counts >= 1; found {self.shape_vox}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise ValueError(f"Grid: affine must be a finite, invertible 4x4 matrix; found {affine.tolist()}")
        affine.setflags(write=False)
        object.__setattr__(self, "shape_vox", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of one voxel step along each array axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def orientation(self) -> str:
        """Codes of the world axes nearest to the array axes, in the direction of growing index: "RAS", "LPI", ..."""
        return "".join(CODES[world][1 if sign > 0 else 0] for world, sign in self._nearest())

    def _nearest(self) -> list[tuple[int, int]]:
        # Each array axis with a world axis of its own, so that the sum of |cosines| is largest; and its sign.
        cosines = self.affine[:3, :3] / np.array(self.spacing_mm)
        best = max(permutations(range(3)), key=lambda worlds: abs(cosines[worlds, range(3)]).sum())
        return [(world, 1 if cosines[world, axis] > 0 else -1) for axis, world in enumerate(best)]

    def world(self, voxels_N3: np.ndarray) -> np.ndarray:
        """World positions in mm, shape (N, 3), of voxel indices (which may be fractions)."""
        return np.asarray(voxels_N3, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def voxels(self, mm_N3: np.ndarray) -> np.ndarray:
        """Fractional voxel indices, shape (N, 3), of world positions in mm."""
        return (np.asarray(mm_N3, dtype=np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Grid:
        """The part from voxel `start` up to, not including, `stop`; may reach outside of this grid."""
        affine = self.affine.copy()
        affine[:3, 3] = self.world(np.array([start]))[0]
        x, y, z = (int(b) - int(a) for a, b in zip(start, stop, strict=True))
        return Grid((x, y, z), affine)

    def resampled(self, spacing_mm: Sequence[float]) -> Grid:
        """The same axes and centre with another spacing; each side keeps its length to within half a new voxel."""
        old, new = np.array(self.spacing_mm), np.array(spacing_mm, dtype=np.float64)
        if new.shape != (3,) or not (new > 0).all():
            raise ValueError(f"Grid.resampled: spacing_mm must be three numbers > 0; found {spacing_mm}")
        # An exact half rounds up, also when the spacing came from a file with float32 or decimal strings.
        shape = np.maximum(1, np.floor(np.array(self.shape_vox) * old / new + 0.501)).astype(int)
        affine = self.affine.copy()
        affine[:3, :3] *= new / old
        centre = self.world(np.array([(np.array(self.shape_vox) - 1) / 2]))[0]
        affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    def turn(self, code: str) -> list[tuple[int, int]]:
        """For each axis of the grid reoriented to `code`: which axis of this grid it is, and 1 or -1 (reversed)."""
        letters = {letter: (world, 2 * up - 1) for world, pair in enumerate(CODES) for up, letter in enumerate(pair)}
        wanted = [letters.get(letter, (-1, 0)) for letter in code.upper()]
        if sorted(world for world, _ in wanted) != [0, 1, 2]:
            raise ValueError(f"Grid: an orientation must name each of L/R, P/A, I/S once; found {code!r}")
        nearest = self._nearest()
        axes = [next(axis for axis in range(3) if nearest[axis][0] == world) for world, _ in wanted]
        return [(axis, sign * nearest[axis][1]) for axis, (_, sign) in zip(axes, wanted, strict=True)]

    def reoriented(self, code: str = "RAS") -> Grid:
        """The same voxels with axes permuted and reversed to lie nearest to `code`; an oblique grid stays oblique."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        turn = self.turn(code)
        for new, (old, sign) in enumerate(turn):
            matrix[old, new] = sign
            matrix[old, 3] = 0 if sign > 0 else self.shape_vox[old] - 1
        x, y, z = (self.shape_vox[old] for old, _ in turn)
        return Grid((x, y, z), self.affine @ matrix)

    def almost_equal(self, other: Grid, tolerance_mm: float = 1e-2) -> bool:
        """Whether both have the same shape and no corner lies further apart than `tolerance_mm`."""
        if self.shape_vox != other.shape_vox:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape_vox])).reshape(3, -1).T
        return bool(np.linalg.norm(self.world(corners) - other.world(corners), axis=1).max() <= tolerance_mm)


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxel values `array_CXYZ` (channels first) on a `grid`."""

    array_CXYZ: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if self.array_CXYZ.ndim != 4 or self.array_CXYZ.shape[1:] != self.grid.shape_vox:
            found = self.array_CXYZ.shape
            raise ValueError(f"Volume: array_CXYZ must have the grid's shape {self.grid.shape_vox}; found {found}")

    def reoriented(self, code: str = "RAS") -> Volume:
        """Permuted and reversed axes only: no voxel value changes. The array is a view."""
        turn = self.grid.turn(code)
        array = self.array_CXYZ.transpose(0, *(old + 1 for old, _ in turn))
        array = array[(slice(None), *(slice(None, None, sign) for _, sign in turn))]
        return Volume(array, self.grid.reoriented(code))

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Volume:
        """The part from voxel `start` up to, not including, `stop`: a view. Raises: ValueError: if it reaches outside."""
        if any(a < 0 or b > n or a >= b for a, b, n in zip(start, stop, self.grid.shape_vox, strict=True)):
            box = f"{tuple(start)} to {tuple(stop)}"
            raise ValueError(f"Volume.cropped: must lie within {self.grid.shape_vox}; found {box}")
        box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        return Volume(self.array_CXYZ[(slice(None), *box)], self.grid.cropped(start, stop))


def describe(volume: Volume) -> str:
    """Shape, spacing and origin of a volume, for errors."""
    grid = volume.grid
    sides = "x".join(map(str, grid.shape_vox))
    return f"{sides} at {tuple(round(s, 3) for s in grid.spacing_mm)} mm {grid.orientation} from {np.round(grid.affine[:3, 3], 2).tolist()}"
