"""The 3D U-Net of PCRLv2 at any width and depth, with or without skip connections.

Source: Zhou et al., TPAMI 2023 (arXiv 2301.00772); at width 32, depth 4, batch normalisation and without skips it has the paper code's
layers and parameters.
"""

from __future__ import annotations

from torch import Tensor, nn

from volssl.files import BadInput
from volssl.nets.blocks import ConvBlock, Norm, UpBlock, halved
from volssl.nets.sides import check_sides, triple

RECIPE_NAME = "UNet"


class UNetEncoder(nn.Module):
    """Levels of two convolution blocks with max pooling between them.

    Args: in_channels; width: channels of the first convolution, level i ends in 2 * width * 2**i; depth: number of levels; norm.
    Attributes: channels: of each level, finest first. strides: voxels of the input per voxel of the level, by axis.
    """

    def __init__(self, in_channels: int = 1, *, width: int = 32, depth: int = 4, norm: Norm = "batch") -> None:
        super().__init__()
        self.channels = tuple(2 * width * 2**i for i in range(depth))
        self.strides = tuple(triple(2**i) for i in range(depth))
        self.norm: Norm = norm
        levels = []
        incoming = in_channels
        for out in self.channels:
            levels.append(nn.Sequential(ConvBlock(incoming, out // 2, norm=norm), ConvBlock(out // 2, out, norm=norm)))
            incoming = out
        self.levels = nn.ModuleList(levels)

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> the feature maps of all levels, finest first.

        Raises: BadInput: sides that are no multiples of the last stride, or leave instance normalisation a single voxel.
        """
        check_sides(x_BCXYZ, self.strides[-1], norm=self.norm)
        features: list[Tensor] = []
        for level in self.levels:
            x_BCXYZ = level(halved(features[-1]) if features else x_BCXYZ)
            features.append(x_BCXYZ)
        return features


class UNetDecoder(nn.Module):
    """Up-steps back to full resolution.

    Args: channels: the encoder's, finest first. skips: whether encoder maps are concatenated. norm.
    Attributes: channels: of the decoded maps, coarsest first.
    """

    def __init__(self, channels: tuple[int, ...], *, skips: bool, norm: Norm) -> None:
        super().__init__()
        self.skips = skips
        self.channels = channels[-2::-1]
        steps, seconds = [], []
        for coarse, fine in zip(channels[:0:-1], self.channels, strict=True):
            steps.append(UpBlock(coarse, fine, skip_channels=fine if skips else 0, norm=norm))
            seconds.append(ConvBlock(fine, fine, norm=norm))
        self.steps = nn.ModuleList(steps)
        self.seconds = nn.ModuleList(seconds)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps, finest first -> decoded maps, coarsest first; the last has the input's size."""
        x = features[-1]
        decoded = []
        for step, second, skip in zip(self.steps, self.seconds, features[-2::-1], strict=True):
            x = second(step(x, skip if self.skips else None))
            decoded.append(x)
        return decoded


class UNet(nn.Module):
    """Encoder and decoder; `forward` gives the decoded maps, coarsest first.

    Args: in_channels; width: channels of the first convolution; depth: number of levels, 2 or more; norm: batch, instance or group;
        skips: concatenate the encoder's maps in the decoder (for segmentation), or not (PCRLv2's pretraining).
    Attributes: encoder, decoder; arguments: what rebuilds it; stride: by axis, the sides of the input must be multiples of it.
    """

    def __init__(self, in_channels: int = 1, *, width: int = 32, depth: int = 4, norm: Norm = "batch", skips: bool = False) -> None:
        super().__init__()
        if width < 1 or depth < 2 or in_channels < 1:
            raise BadInput(f"net unet: width >= 1, depth >= 2 and in_channels >= 1 must hold; found {width}, {depth}, {in_channels}")
        self.arguments = {"in_channels": in_channels, "width": width, "depth": depth, "norm": norm}
        self.encoder = UNetEncoder(in_channels, width=width, depth=depth, norm=norm)
        self.decoder = UNetDecoder(self.encoder.channels, skips=skips, norm=norm)
        self.stride = self.encoder.strides[-1]

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> decoded maps, coarsest first."""
        return self.decoder(self.encoder(x_BCXYZ))
