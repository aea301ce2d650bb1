"""Crop, resize, flip and affine as one resampling of a parent box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from volssl.augment.intensity import gaussian_blur
from volssl.draws import Draws

Mode = Literal["bilinear", "nearest"]


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
    size: tuple[int, int, int],
    *,
    matrix_B33: Tensor | None = None,
    spacing_mm: tuple[float, float, float] = (1, 1, 1),
    mode: Mode = "bilinear",
) -> Tensor:
    """Resample the boxes of a batch to one size, turned by physical matrices about the boxes' centres; one `grid_sample`.

    Where a box is larger than `size` the parent is smoothed first (Gaussian, sigma (zoom - 1) / 2 voxels, the rule of scikit-image's
    resize), unless mode is nearest. Voxels from outside the parent are 0, which is air on the [0, 1] scale of a CT window.

    Args: x_BCXYZ: parent boxes. matrix_B33: from `Affine.sample`, or None. spacing_mm: of the parent. Boxes and matrices lie on the
        CPU, where all they decide is worked out, so that a CUDA device need not be waited for.
    Returns: (B, C, *size), the parent's type.
    """
    box = Box(box.start_B3.float(), box.size_B3.float())
    zoom_B3 = box.size_B3 / torch.tensor(size)
    # source voxel = centre + M (output voxel - output centre), M = spacing^-1 matrix spacing zoom
    spacing = torch.tensor(spacing_mm, dtype=torch.float32)
    turn_B33 = torch.eye(3).expand(len(x_BCXYZ), 3, 3) if matrix_B33 is None else matrix_B33
    step_B33 = turn_B33 / spacing[:, None] * spacing * zoom_B3[:, None]
    centre_B3 = box.start_B3 + (box.size_B3 - 1) / 2
    sigma_B3 = (zoom_B3 - 1).clamp(min=0) / 2 if mode == "bilinear" else torch.zeros_like(zoom_B3)
    window, corner_B3 = _window(x_BCXYZ, step_B33, centre_B3, size, 4 * sigma_B3)
    if bool((sigma_B3 > 0).any()):
        window = gaussian_blur(window, sigma_B3)
    return _sample(window, step_B33, centre_B3 - corner_B3, size, mode)


def _window(x_BCXYZ: Tensor, step_B33: Tensor, centre_B3: Tensor, size: tuple[int, int, int], margin_B3: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest windows of one size that hold all that the boxes read, and their corners (B, 3): what follows touches no more."""
    sides = torch.tensor(x_BCXYZ.shape[2:])
    half_B3 = step_B33.abs() @ ((torch.tensor(size) - 1) / 2) + margin_B3 + 1.5
    extent = torch.minimum((2 * half_B3).amax(0).ceil().long() + 1, sides)
    corner_B3 = torch.minimum((centre_B3 - half_B3).floor().long().clamp(min=0), sides - extent)
    if bool((extent == sides).all()):
        return x_BCXYZ, torch.zeros_like(corner_B3)
    i, j, k = ((corner_B3[:, axis, None] + torch.arange(int(extent[axis]))).to(x_BCXYZ.device, non_blocking=True) for axis in range(3))
    sample = torch.arange(len(x_BCXYZ), device=x_BCXYZ.device)[:, None, None, None]
    channels = [x_BCXYZ[:, c][sample, i[:, :, None, None], j[:, None, :, None], k[:, None, None]] for c in range(x_BCXYZ.shape[1])]
    return torch.stack(channels, 1), corner_B3


def _sample(x_BCXYZ: Tensor, step_B33: Tensor, centre_B3: Tensor, size: tuple[int, int, int], mode: Mode) -> Tensor:
    # grid_sample counts from -1 to 1 over the array (align_corners off) and names the last axis first.
    sides = torch.tensor(x_BCXYZ.shape[2:], dtype=torch.float32)
    scale_B33 = (step_B33 * (2 / sides)[:, None]).to(x_BCXYZ.device, non_blocking=True)
    shift_B3 = ((2 * centre_B3 + 1) / sides - 1).to(x_BCXYZ.device, non_blocking=True)
    i, j, k = (torch.arange(n, dtype=torch.float32, device=x_BCXYZ.device) - (n - 1) / 2 for n in size)
    # A sum of three broadcast lines is far cheaper than a product of a (N, 4) grid with each matrix.
    grid = torch.empty(len(x_BCXYZ), *size, 3, device=x_BCXYZ.device)
    for axis in range(3):
        row_B3 = scale_B33[:, axis]
        along_x = row_B3[:, 0, None] * i + shift_B3[:, axis, None]
        along_yz = (row_B3[:, 1, None] * j)[:, :, None] + (row_B3[:, 2, None] * k)[:, None]
        torch.add(along_x[:, :, None, None], along_yz[:, None], out=grid[..., 2 - axis])
    return F.grid_sample(x_BCXYZ, grid.to(x_BCXYZ.dtype), mode=mode, padding_mode="zeros", align_corners=False)
