"""Crop, resize, flip and affine as one resampling of a parent box."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from volssl.augment.intensity import gaussian_blur
from volssl.draws import Draws

Mode = Literal["bilinear", "nearest"]
Size = tuple[int, int, int]
Sampler = Callable[[Tensor, Tensor, Tensor, Size], Tensor]
SMALL = 2**18  # voxels of a window: on a CPU larger ones are worked on one at a time


@dataclass(frozen=True)
class Box:
    """Axis-aligned boxes of a batch inside a parent array, in voxels: `start_B3` (may be fractional) and `size_B3`."""

    start_B3: Tensor
    size_B3: Tensor


@dataclass(frozen=True)
class Affine:
    """Random flip, scaling and rotation about the centre of a box.

    Attributes:
        flip_share: probability of a flip, per axis X, Y, Z. scale: each axis is scaled by U(1 - scale, 1 + scale), independently.
        degrees: rotation about each axis by U(-degrees, degrees).
    Rotation happens in millimetres, so an anisotropic or non-cubic patch is turned and not sheared.
    """

    flip_share: tuple[float, float, float] = (0.5, 0.0, 0.0)
    scale: float = 0.1
    degrees: float = 10.0

    def sample(self, draws: Draws) -> Tensor:
        """Draw matrices (B, 3, 3) in physical axes that map an offset from the centre in the output to the offset in the source."""
        share = torch.tensor(self.flip_share)
        flips_B3 = torch.where(draws.fork("flip").uniform(0, 1, 3) < share, -1.0, 1.0)
        scale_B3 = draws.fork("scale").uniform(1 - self.scale, 1 + self.scale, 3)
        angles_B3 = torch.deg2rad(draws.fork("rotation").uniform(-self.degrees, self.degrees, 3))
        # The object grows by `scale`, so the source offset shrinks by it.
        return rotation(angles_B3) @ torch.diag_embed(flips_B3 / scale_B3)


def rotation(angles_B3: Tensor) -> Tensor:
    """Rotation matrices Rx Ry Rz (B, 3, 3) from angles about the axes in radians."""
    cos, sin = angles_B3.cos().unbind(1), angles_B3.sin().unbind(1)
    one, zero = torch.ones_like(cos[0]), torch.zeros_like(cos[0])

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, 1).view(-1, 3, 3)

    about_x = matrix(one, zero, zero, zero, cos[0], -sin[0], zero, sin[0], cos[0])
    about_y = matrix(cos[1], zero, sin[1], zero, one, zero, -sin[1], zero, cos[1])
    about_z = matrix(cos[2], -sin[2], zero, sin[2], cos[2], zero, zero, zero, one)
    return about_x @ about_y @ about_z


def take(
    x_BCXYZ: Tensor,
    box: Box,
    size: Size,
    *,
    matrix_B33: Tensor | None = None,
    spacing_mm: tuple[float, float, float] = (1, 1, 1),
    mode: Mode = "bilinear",
    sampler: Sampler | None = None,
) -> Tensor:
    """Resample the boxes of a batch to one size, turned by physical matrices about the boxes' centres; one interpolation.

    Where a box is larger than `size` the parent is smoothed first (Gaussian, sigma (zoom - 1) / 2 voxels, the rule of scikit-image's
    resize), unless mode is nearest. Voxels from outside the parent are 0, which is air on the [0, 1] scale of a CT window.

    Args: x_BCXYZ: parent boxes. box: one or several boxes per parent, all parents' first box first: row r is cut from parent r % B.
        matrix_B33: a row each, from `Affine.sample`, or None. spacing_mm: of the parent. sampler: what interpolates, `by_grid_sample`
        if not given. Boxes and matrices lie on the CPU, where all they decide is worked out, so that a CUDA device need not be waited for.
    Returns: (rows, C, *size), the parent's type; half types are interpolated in float32.
    """
    rows, parents = len(box.start_B3), len(x_BCXYZ)
    interpolate = partial(by_grid_sample, mode=mode) if sampler is None or mode != "bilinear" else sampler
    zoom_B3 = box.size_B3.float() / torch.tensor(size)
    # source voxel = centre + M (output voxel - output centre), M = spacing^-1 matrix spacing zoom
    spacing = torch.tensor(spacing_mm, dtype=torch.float32)
    turn_B33 = torch.eye(3).expand(rows, 3, 3) if matrix_B33 is None else matrix_B33
    step_B33 = turn_B33 / spacing[:, None] * spacing * zoom_B3[:, None]
    centre_B3 = box.start_B3.float() + (box.size_B3.float() - 1) / 2
    sigma_B3 = (zoom_B3 - 1).clamp(min=0) / 2 if mode == "bilinear" else torch.zeros_like(zoom_B3)
    half_B3 = step_B33.abs() @ ((torch.tensor(size) - 1) / 2) + (4 * sigma_B3 + 0.5).floor() + 1.5
    parts = []
    for some in _portions(half_B3, x_BCXYZ):
        window, corner_B3 = _window(x_BCXYZ, torch.arange(rows)[some] % parents, centre_B3[some], half_B3[some])
        window = window if window.dtype == torch.float64 else window.float()
        if bool((sigma_B3[some] > 0).any()):
            window = gaussian_blur(window, sigma_B3[some])
        parts.append(interpolate(window, step_B33[some], centre_B3[some] - corner_B3, size))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x_BCXYZ.dtype)


def _portions(half_B3: Tensor, x_BCXYZ: Tensor) -> list[slice]:
    # A GPU takes all rows at once. On a CPU large windows go one by one: they stay in the cache, none larger than it must be.
    rows = len(half_B3)
    if x_BCXYZ.device.type != "cpu":
        return [slice(0, rows)]
    voxels = float(torch.minimum(2 * half_B3.amax(0), torch.tensor(x_BCXYZ.shape[2:])).prod())
    several = max(1, int(SMALL * 8 / voxels)) if voxels <= SMALL else 1
    return [slice(first, min(first + several, rows)) for first in range(0, rows, several)]


def _window(x_BCXYZ: Tensor, parent_R: Tensor, centre_R3: Tensor, half_R3: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest windows of one size that hold all that the rows read, and their corners (R, 3): what follows touches no more."""
    sides = torch.tensor(x_BCXYZ.shape[2:])
    extent = torch.minimum((2 * half_R3).amax(0).ceil().long() + 1, sides)
    corner_R3 = torch.minimum((centre_R3 - half_R3).floor().long().clamp(min=0), (sides - extent).clamp(min=0))
    if bool((extent == sides).all()):
        neighbours = torch.equal(parent_R, torch.arange(int(parent_R[0]), int(parent_R[0]) + len(parent_R)))
        every = x_BCXYZ[int(parent_R[0]) :][: len(parent_R)] if neighbours else x_BCXYZ[parent_R.to(x_BCXYZ.device)]
        return every, torch.zeros_like(corner_R3)
    if x_BCXYZ.device.type == "cpu":
        places = zip(parent_R.tolist(), corner_R3.tolist(), strict=True)
        (a, b, c), views = extent.tolist(), [x_BCXYZ[r : r + 1, :, i:, j:, k:] for r, (i, j, k) in places]
        views = [view[:, :, :a, :b, :c] for view in views]
        return (views[0] if len(views) == 1 else torch.cat(views)), corner_R3
    i, j, k = ((corner_R3[:, axis, None] + torch.arange(int(extent[axis]))).to(x_BCXYZ.device, non_blocking=True) for axis in range(3))
    row = parent_R.to(x_BCXYZ.device, non_blocking=True)[:, None, None, None]
    channels = [x_BCXYZ[:, c][row, i[:, :, None, None], j[:, None, :, None], k[:, None, None]] for c in range(x_BCXYZ.shape[1])]
    return torch.stack(channels, 1), corner_R3


def by_grid_sample(x_BCXYZ: Tensor, step_B33: Tensor, centre_B3: Tensor, size: Size, *, mode: Mode = "bilinear") -> Tensor:
    """Read x at centre + step (output voxel - output centre), in voxels, with one `grid_sample`; 0 outside.

    Args: x_BCXYZ: (B, C, X, Y, Z). step_B33, centre_B3: on the CPU. Returns: (B, C, *size).
    """
    # grid_sample counts from -1 to 1 over the array (align_corners off) and names the last axis first.
    sides = torch.tensor(x_BCXYZ.shape[2:], dtype=torch.float32)
    scale_B33, shift_B3 = step_B33 * (2 / sides)[:, None], (2 * centre_B3 + 1) / sides - 1
    grid = torch.empty(len(x_BCXYZ), *size, 3, device=x_BCXYZ.device)
    for axis, line in enumerate(_positions(scale_B33, shift_B3, size, x_BCXYZ.device)):
        grid[..., 2 - axis] = line
    return F.grid_sample(x_BCXYZ, grid.to(x_BCXYZ.dtype), mode=mode, padding_mode="zeros", align_corners=False)


def by_gathers(x_BCXYZ: Tensor, step_B33: Tensor, centre_B3: Tensor, size: Size, *, reads: Callable[..., Tensor] | None = None) -> Tensor:
    """What `by_grid_sample` gives, up to rounding, as eight plain reads: a compiler makes one loop of it, several times as fast.

    Args: reads: `_eight_reads` compiled, or None for the plain function.
    """
    step_B33, centre_B3 = step_B33.to(x_BCXYZ.device, non_blocking=True), centre_B3.to(x_BCXYZ.device, non_blocking=True)
    # Flat, no view of another tensor, and with its sides as numbers in a tensor: every kind of these would be compiled apart.
    sides = torch.tensor(x_BCXYZ.shape[2:], dtype=torch.int32).to(x_BCXYZ.device, non_blocking=True)
    dense = x_BCXYZ.contiguous() if x_BCXYZ.storage_offset() == 0 else x_BCXYZ.clone(memory_format=torch.contiguous_format)
    flat = dense.new_empty(0).set_(dense.untyped_storage(), 0, (dense.numel(),), (1,))
    return (reads or _eight_reads)(flat, sides, x_BCXYZ.shape[1], step_B33, centre_B3, *size)


def compiled_sampler() -> Sampler:
    """`by_gathers`, compiled when it is first used; raises what torch.compile raises. Sent to another process it is compiled there."""
    return _Compiled()


class _Compiled:
    def __init__(self) -> None:
        self._reads = torch.compile(_eight_reads, dynamic=True)

    def __call__(self, x_BCXYZ: Tensor, step_B33: Tensor, centre_B3: Tensor, size: Size) -> Tensor:
        return by_gathers(x_BCXYZ, step_B33, centre_B3, size, reads=self._reads)

    def __reduce__(self) -> tuple[type[_Compiled], tuple[()]]:
        return _Compiled, ()


def _eight_reads(flat: Tensor, sides_3: Tensor, channels: int, step_B33: Tensor, centre_B3: Tensor, *size: int) -> Tensor:
    batch, sides = len(step_B33), sides_3.unbind()
    places = list(_positions(step_B33, centre_B3, (size[0], size[1], size[2]), flat.device))
    lows = [place.floor() for place in places]
    first = torch.arange(batch * channels, device=flat.device).view(batch, channels, 1, 1, 1) * sides_3.long().prod()
    total, zero = torch.zeros((), dtype=flat.dtype, device=flat.device), torch.zeros((), dtype=torch.int32, device=flat.device)
    for corner in range(8):
        index, weight = zero, torch.ones((), device=flat.device)
        for place, low, side, up in zip(places, lows, sides, (corner // 4, corner // 2 % 2, corner % 2), strict=True):
            share = place - low if up else 1 - (place - low)
            weight = weight * torch.where((low + up >= 0) & (low + up <= side - 1), share, 0.0)
            index = index * side + (low + up).to(torch.int32).clamp(min=0).minimum(side - 1)
        total = total + weight[:, None] * flat[first + index[:, None]]
    return total


def _positions(step_B33: Tensor, centre_B3: Tensor, size: Size, device: torch.device) -> Iterator[Tensor]:
    # Along X, Y, Z the coordinates (B, *size) of all output voxels. A sum of three broadcast lines is far cheaper than a product of a
    # (N, 4) grid with each matrix.
    step_B33, centre_B3 = step_B33.to(device, non_blocking=True), centre_B3.to(device, non_blocking=True)
    i, j, k = (torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in size)
    for axis in range(3):
        row_B3 = step_B33[:, axis]
        along_x = centre_B3[:, axis, None] + row_B3[:, 0, None] * i
        along_yz = (row_B3[:, 1, None] * j)[:, :, None] + (row_B3[:, 2, None] * k)[:, None]
        yield along_x[:, :, None, None] + along_yz[:, None]
