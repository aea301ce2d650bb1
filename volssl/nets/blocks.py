"""Building blocks with two or more users: convolution block, normalisation by name, up-step."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volssl.nets.composed import composed_up_conv, composing_pays, is_composed, no_autocast, too_short
from volssl.processes import BatchNorm3d

Norm = Literal["batch", "instance", "group"]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Normalisation layer by name; group normalisation takes 8 groups, or fewer where 8 does not divide the channels."""
    if norm == "batch":
        return BatchNorm3d(channels)
    if norm == "instance":
        return InstanceNorm3d(channels, affine=True)
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class InstanceNorm3d(nn.InstanceNorm3d):
    """Instance normalisation that leaves bf16 maps in the order of channels_last_3d where nothing is learned from them.

    torch's own brings them into another order, and the next convolution brings them back: on a CPU that takes longer than the convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.track_running_stats or not _channels_last_on_cpu(input):
            return super().forward(input)
        # Group normalisation takes the variance from the mean of squares in single precision. About a mean near zero that is exact enough:
        # a few of the voxels tell the mean nearly, and any shift leaves the result what it is.
        few = input[:, :, ::4, ::4, ::4].float()
        with no_autocast(input.device):
            shifted = input - few.mean((2, 3, 4), keepdim=True).to(input.dtype)
            return F.group_norm(shifted, input.shape[1], self.weight, self.bias, self.eps)


def _channels_last_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and x.shape[2:].numel() > 1  # of a single voxel there is no variance, and torch's own says so
    )


def padded_conv(x_BCXYZ: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv3d` with a padding of 1 on every side, by hand where `too_short` says so."""
    if too_short(x_BCXYZ, weight.shape[2:]):
        return F.conv3d(F.pad(x_BCXYZ, (1,) * 6), weight, bias)
    return F.conv3d(x_BCXYZ, weight, bias, padding=1)


def halved(x_BCXYZ: Tensor) -> Tensor:
    """Largest of each 2x2x2 block. For the backward pass it keeps its input alone, which other layers keep too, and finds the places again:
    torch's own keeps eight bytes a place, and under autocast on a CPU a float32 copy of the input."""
    if torch.is_grad_enabled() and x_BCXYZ.requires_grad and not torch.compiler.is_compiling():
        y = _Halved.apply(x_BCXYZ)
        assert isinstance(y, Tensor)
        return y
    with no_autocast(x_BCXYZ.device):
        return F.max_pool3d(x_BCXYZ, 2)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCXYZ: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCXYZ)
        with no_autocast(x_BCXYZ.device):
            return F.max_pool3d(x_BCXYZ, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (x_BCXYZ,) = ctx.saved_tensors
        with no_autocast(x_BCXYZ.device), torch.enable_grad():
            again = x_BCXYZ.detach().requires_grad_()
            return torch.autograd.grad(F.max_pool3d(again, 2), again, gradients[0])[0]


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
    Where it is cheaper that map is applied directly (`nets/composed.py`): 8 taps a voxel instead of 27, and no up-sampled tensor.
    Parameters and state_dict are those of the two layers.

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
        bias = conv.bias if skip_BCXYZ is None else None
        weight = conv.weight[:, :inside]
        composed = composing_pays(coarse_BCXYZ, conv.out_channels) or is_composed(self.up, weight)
        if composed and not torch.compiler.is_exporting():
            y = composed_up_conv(coarse_BCXYZ, self.up, weight, bias)
        else:
            y = padded_conv(self.up(coarse_BCXYZ), weight, bias)
        if skip_BCXYZ is not None:
            y = y + padded_conv(skip_BCXYZ, conv.weight[:, inside:], conv.bias)
        return F.relu(self.block.norm(y), inplace=True)
