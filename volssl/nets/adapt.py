"""What layers of backbones from other packages are exchanged for, so that these train here as the own ones do."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from volssl.nets.blocks import InstanceNorm3d, Norm, make_norm
from volssl.nets.composed import too_short


class Conv3d(nn.Conv3d):
    """The convolution whose input is padded by hand where it is `too_short`; forward, names and values are the same.

    The padding must be of zeros and given in numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, X, Y, Z) -> (B, out, X', Y', Z')."""
        extent = [step * (size - 1) + 1 for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        if not too_short(input, extent):
            return super().forward(input)
        x, y, z = (int(side) for side in self.padding)
        padded = F.pad(input, (z, z, y, y, x, x))
        return F.conv3d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def adapt(module: nn.Module, *, norm: Norm | None = None) -> nn.Module:
    """Exchange the convolutions inside `module` for `Conv3d`, and its instance normalisations for `norm`, or for `InstanceNorm3d` without.

    Weights keep their names and stay shared where one layer stands in two places.
    """
    _exchange(module, norm, {})
    return module


def _exchange(module: nn.Module, norm: Norm | None, done: dict[nn.Module, nn.Module]) -> None:
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        if child not in done:
            done[child] = _exchanged(child, norm)
        setattr(module, name, done[child])
        _exchange(done[child], norm, done)


def _exchanged(layer: nn.Module, norm: Norm | None) -> nn.Module:
    old: Any = layer
    if type(layer) is nn.InstanceNorm3d:
        return make_norm(norm, old.num_features) if norm else _instance_norm(old)
    if type(layer) is not nn.Conv3d:
        return layer
    sizes = (old.kernel_size, old.stride, old.padding, old.dilation, old.groups)
    made = Conv3d(old.in_channels, old.out_channels, *sizes, bias=old.bias is not None, device="meta")
    made.weight, made.bias = old.weight, old.bias
    return made


def _instance_norm(old: Any) -> nn.Module:
    made = InstanceNorm3d(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    for name, value in [*old._parameters.items(), *old._buffers.items()]:
        setattr(made, name, value)
    return made
