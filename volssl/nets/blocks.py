"""Building blocks with two or more users: convolution block, normalisation by name, and the up-step composed with its convolution."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volssl.processes import BatchNorm3d

Norm = Literal["batch", "instance", "group"]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Normalisation layer by name; group normalisation takes 8 groups, or fewer where 8 does not divide the channels."""
    if norm == "batch":
        return BatchNorm3d(channels)
    if norm == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def padded_conv(x_BCXYZ: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv3d` with a padding of 1 on every side.

    On a CPU the bf16 gradient of the weights reads memory that nobody wrote (seen with torch 2.13) where the first side is one shorter
    than the kernel, as in the deepest maps of small crops; padded by hand it does not.
    """
    if x_BCXYZ.device.type == "cpu" and x_BCXYZ.shape[2] == weight.shape[2] - 1:
        return F.conv3d(F.pad(x_BCXYZ, (0, 0, 0, 0, 1, 1)), weight, bias, padding=(0, 1, 1))
    return F.conv3d(x_BCXYZ, weight, bias, padding=1)


class ConvBlock(nn.Module):
    """Conv3d 3x3x3 (stride 1, padding 1, bias) -> normalisation -> ReLU, C(a, b) of pcrlv2.

    Args: in_channels, out_channels; norm: name of the normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm = make_norm(norm, out_channels)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """(B, in, X, Y, Z) -> (B, out, X, Y, Z)."""
        return F.relu(self.norm(padded_conv(x_BCXYZ, self.conv.weight, self.conv.bias)), inplace=True)


class UpBlock(nn.Module):
    """Transposed convolution (2x2x2, stride 2, bias) -> [concatenate skip] -> ConvBlock.

    Without a nonlinearity between them, the up-step and the part of the 3x3x3 convolution that reads its output are one linear map.
    Where it is cheaper that map is applied directly: per output parity a 2x2x2 convolution on the coarse grid, 8 taps instead of 27
    and no up-sampled tensor. Parameters and state_dict are those of the two layers.

    Args: in_channels: of the coarse input. skip_channels: of the finer skip, 0 for none. out_channels. norm.
    """

    def __init__(self, in_channels: int, out_channels: int, *, skip_channels: int, norm: Norm) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, in_channels, 2, stride=2)
        self.block = ConvBlock(in_channels + skip_channels, out_channels, norm=norm)

    def forward(self, coarse_BCXYZ: Tensor, skip_BCXYZ: Tensor | None = None) -> Tensor:
        """(B, in, X, Y, Z), skip (B, skip, 2X, 2Y, 2Z) -> (B, out, 2X, 2Y, 2Z)."""
        conv = self.block.conv
        inside = self.up.in_channels
        if composing_pays(coarse_BCXYZ, conv.out_channels):
            y = composed_up_conv(coarse_BCXYZ, self.up, conv.weight[:, :inside])
        else:
            y = padded_conv(self.up(coarse_BCXYZ), conv.weight[:, :inside])
        if skip_BCXYZ is not None:
            y = y + padded_conv(skip_BCXYZ, conv.weight[:, inside:], conv.bias)
        elif conv.bias is not None:
            y = y + conv.bias.to(y.dtype).view(1, -1, 1, 1, 1)
        return F.relu(self.block.norm(y), inplace=True)


def composing_pays(coarse_BCXYZ: Tensor, out_channels: int) -> bool:
    """Whether composing the kernel (once a call) costs less than it saves (for every voxel), in multiply-accumulates."""
    a, b = coarse_BCXYZ.shape[1], out_channels
    voxels = coarse_BCXYZ.shape[0] * coarse_BCXYZ[0, 0].numel()
    return voxels * (8 * a + 152 * b) > 216 * a * b


# Along one axis, fine voxel 2i + p (parity p) sees fine voxels 2i + p + t - 1 for the taps t = 0, 1, 2 of the 3-tap kernel. Each is
# sub-voxel s of coarse voxel i + p + d - 1: (p, t) -> (d, s).
_AXIS = {(0, 0): (0, 1), (0, 1): (1, 0), (0, 2): (1, 1), (1, 0): (0, 0), (1, 1): (0, 1), (1, 2): (1, 0)}


@cache
def _slots() -> Tensor:
    """For every (tap t, sub-voxel s), 27 x 8, the place in (parity p, coarse tap d), 8 x 8 -> 64, that their product adds to."""
    place = {(t, s): (p, d) for (p, t), (d, s) in _AXIS.items()}
    with torch.inference_mode(False):  # kept for later calls, which may train
        slots = torch.zeros(27, 8, dtype=torch.long)
    for t in range(27):
        for s in range(8):
            taps, subs = (t // 9, t // 3 % 3, t % 3), (s // 4, s // 2 % 2, s % 2)
            p, d = 0, 0
            for axis in range(3):
                p_axis, d_axis = place[taps[axis], subs[axis]]
                p, d = 2 * p + p_axis, 2 * d + d_axis
            slots[t, s] = 8 * p + d
    return slots


def composed_up_conv(coarse_BCXYZ: Tensor, up: nn.ConvTranspose3d, weight_OMxyz: Tensor) -> Tensor:
    """`conv3d(up(x), weight, padding=1)` as one convolution on the coarse grid; (B, A, X, Y, Z) -> (B, O, 2X, 2Y, 2Z).

    The bias of the up-step reaches the output through the zero padding, less at the border; a channel of ones carries it exactly.
    """
    batch, _, *size = coarse_BCXYZ.shape
    up_AMs = up.weight.flatten(2)
    ones_B1XYZ = coarse_BCXYZ.new_ones(batch, 1, *size)
    bias_1Ms = up.bias.view(1, -1, 1).expand(1, -1, 8) if up.bias is not None else up_AMs.new_zeros(1, up_AMs.shape[1], 8)
    up_AMs = torch.cat([up_AMs, bias_1Ms])
    products_OAts = torch.einsum("omt,ams->oats", weight_OMxyz.flatten(2), up_AMs)
    out, inside = products_OAts.shape[:2]
    kernel_OApd = products_OAts.new_zeros(out, inside, 64).index_add(
        2, _slots().to(coarse_BCXYZ.device).flatten(), products_OAts.flatten(2)
    )
    kernel = kernel_OApd.view(out, inside, 8, 2, 2, 2).movedim(2, 0).flatten(0, 1)
    y = padded_conv(torch.cat([coarse_BCXYZ, ones_B1XYZ], 1), kernel).unflatten(1, (8, out))
    fine = torch.empty((batch, out, *(2 * n for n in size)), dtype=y.dtype, device=y.device, memory_format=_layout(coarse_BCXYZ))
    return _interleave(y, fine)


def _layout(x_BCXYZ: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    return last if x_BCXYZ.shape[1] > 1 and x_BCXYZ.is_contiguous(memory_format=last) else torch.contiguous_format


def _interleave(y_BpOXYZ: Tensor, fine: Tensor) -> Tensor:
    # Parity p = 4 px + 2 py + pz of output voxel 2i + p stands at place i + p of its own convolution.
    size = [n // 2 for n in fine.shape[2:]]
    for p in range(8):
        x, y, z = p // 4, p // 2 % 2, p % 2
        fine[:, :, x::2, y::2, z::2] = y_BpOXYZ[:, p, :, x : x + size[0], y : y + size[1], z : z + size[2]]
    return fine
