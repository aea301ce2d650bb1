"""A U-Net on folded voxels: each 2x2x2 block becomes 8 channels, the U-Net works on the half-size grid, and its output is unfolded.

Folding loses nothing, and there are no convolutions at full resolution, which take most of a U-Net's time and are its narrowest, and so
on a CPU its least efficient ones.

Source: space-to-depth and sub-pixel convolution, Shi et al., CVPR 2016 (arXiv 1609.05158), here in 3D on both ends of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volssl.files import BadInput
from volssl.nets.adapt import Conv3d
from volssl.nets.blocks import Norm
from volssl.nets.sides import check_sides, triple
from volssl.nets.unet import UNetDecoder, UNetEncoder

RECIPE_NAME = "FoldedUNet"


def fold(x_BCXYZ: Tensor) -> Tensor:
    """(B, C, 2X, 2Y, 2Z) -> (B, 8C, X, Y, Z); channel c of sub-voxel (x, y, z) goes to 8c + 4x + 2y + z."""
    b, c, x, y, z = x_BCXYZ.shape
    blocks = x_BCXYZ.reshape(b, c, x // 2, 2, y // 2, 2, z // 2, 2)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, 8 * c, x // 2, y // 2, z // 2)


def unfold(x_BCXYZ: Tensor) -> Tensor:
    """The inverse of `fold`: (B, 8C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z)."""
    b, c, x, y, z = x_BCXYZ.shape
    blocks = x_BCXYZ.reshape(b, c // 8, 2, 2, 2, x, y, z)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 8, 2 * x, 2 * y, 2 * z)


class FoldedEncoder(nn.Module):
    """Fold, then the U-Net's encoder. `channels`, `strides`: of its maps, finest first; the finest has stride 2."""

    def __init__(self, in_channels: int, *, width: int, depth: int, norm: Norm) -> None:
        super().__init__()
        self.inner = UNetEncoder(8 * in_channels, width=width, depth=depth, norm=norm)
        self.channels = self.inner.channels
        self.strides = tuple(triple([2 * side for side in stride]) for stride in self.inner.strides)

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> the feature maps, finest first.

        Raises: BadInput: sides that are no multiples of the last stride, or leave instance normalisation a single voxel.
        """
        check_sides(x_BCXYZ, self.strides[-1], norm=self.inner.norm)
        folded = fold(x_BCXYZ).contiguous(memory_format=torch.channels_last_3d)
        return self.inner(folded)


class FoldedDecoder(nn.Module):
    """The U-Net's decoder and a 3x3x3 convolution to 8 channels per unfolded one. `channels`: of the maps, coarsest first."""

    def __init__(self, channels: tuple[int, ...], *, unfolded: int, skips: bool, norm: Norm) -> None:
        super().__init__()
        self.skips = skips
        self.inner = UNetDecoder(channels, skips=skips, norm=norm)
        self.channels = (*self.inner.channels, unfolded)
        self.last = Conv3d(channels[0], 8 * unfolded, 3, padding=1)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps, finest first -> decoded maps, coarsest first; the last has the input's size."""
        decoded = self.inner(features)
        return [*decoded, unfold(self.last(decoded[-1]))]


class FoldedUNet(nn.Module):
    """Encoder and decoder on the half-size grid; `forward` gives the decoded maps, coarsest first, the last of full size.

    Args: in_channels; width: channels of the first convolution; depth: number of levels on the half-size grid, 2 or more; norm: batch,
        instance or group; skips: concatenate the encoder's maps in the decoder; unfolded: channels of the full-size map.
    Attributes: encoder, decoder; arguments: what rebuilds it; stride: by axis, the sides of the input must be multiples of it.
    """

    def __init__(
        self, in_channels: int = 1, *, width: int = 16, depth: int = 3, norm: Norm = "instance", skips: bool = False, unfolded: int = 8
    ) -> None:
        super().__init__()
        if width < 1 or depth < 2 or in_channels < 1 or unfolded < 1:
            raise BadInput(
                "net folded: width, in_channels and unfolded >= 1 and depth >= 2 must hold; "
                f"found {width}, {in_channels}, {unfolded} and {depth}"
            )
        self.arguments = {"in_channels": in_channels, "width": width, "depth": depth, "norm": norm, "unfolded": unfolded}
        self.encoder = FoldedEncoder(in_channels, width=width, depth=depth, norm=norm)
        self.decoder = FoldedDecoder(self.encoder.channels, unfolded=unfolded, skips=skips, norm=norm)
        self.stride = self.encoder.strides[-1]

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> decoded maps, coarsest first."""
        return self.decoder(self.encoder(x_BCXYZ))
