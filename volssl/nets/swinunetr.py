"""MONAI's Swin UNETR, with one to four stages and with or without skip connections.

The layers are MONAI's: `encoder` is its `swinViT` (tensor names without that prefix), `decoder` holds its convolution blocks under their
names there. With skips, four stages and instance normalisation the decoded map of full size equals what MONAI's network gives to its last
1x1x1 convolution. What differs:

- the finest map of the encoder has stride 2; the full-size skip is a convolution block of the image itself, which lies in the decoder;
- without skips the decoder starts from the coarsest map alone: the blocks encoder1, encoder2, ... that prepare the skips are absent, and an
  up-step's residual block takes the up-sampled map alone, so that its shortcut is the identity instead of a 1x1x1 convolution;
- the window attention's own layer normalisation stays whatever `norm` says, which is of the convolution blocks. As in MONAI their instance
  normalisation has no learnt scale;
- dropout, stochastic depth, checkpointing and the second version's extra convolutions are not offered.

MONAI is imported when a net is built.

Source: Hatamizadeh et al., "Swin UNETR", BrainLes 2021 (arXiv 2201.01266).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from volssl.files import BadInput
from volssl.nets.adapt import adapt
from volssl.nets.blocks import Norm
from volssl.nets.sides import check_sides, triple

RECIPE_NAME = "SwinUNETR"
STAGES = ("layers1", "layers2", "layers3", "layers4")  # MONAI's transformer has places for four
BLOCK: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance"}  # what all convolution blocks have in common


class SwinEncoder(nn.Module):
    """Patch embedding of 2x2x2 voxels, and stages of window attention, each of which halves the grid.

    Attributes: channels: of the maps, finest first. strides: voxels of the input per voxel of the map, by axis; the finest has 2.
    """

    def __init__(self, in_channels: int, *, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> None:
        super().__init__()
        from monai.networks.nets.swin_unetr import MERGING_MODE, SwinTransformer

        built: Any = SwinTransformer(
            in_chans=in_channels,
            embed_dim=width,
            window_size=triple(window),
            patch_size=triple(2),
            depths=depths,
            num_heads=heads,
            downsample=MERGING_MODE["merging"],
        )
        self.patch_embed = built.patch_embed
        self.used = STAGES[: len(depths)]
        for name in self.used:
            self.add_module(name, getattr(built, name))
        self.channels = tuple(width * 2**i for i in range(len(depths) + 1))
        self.strides = tuple(triple(2 ** (i + 1)) for i in range(len(depths) + 1))
        adapt(self)

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> the feature maps, finest first, each normalised over its channels.

        Raises: BadInput: sides that are no multiples of the last stride.
        """
        check_sides(x_BCXYZ, self.strides[-1], norm="layer")
        x = self.patch_embed(x_BCXYZ)
        features = [_normalised(x)]
        for name in self.used:
            x = self.get_submodule(name + ".0")(x.contiguous())
            features.append(_normalised(x))
        return features


def _normalised(x_BCXYZ: Tensor) -> Tensor:
    return F.layer_norm(x_BCXYZ.movedim(1, -1), x_BCXYZ.shape[1:2]).movedim(-1, 1)


class SwinDecoder(nn.Module):
    """A residual block on the coarsest map, then up-steps with residual blocks; with skips also the blocks that prepare them.

    Attributes: channels: of the decoded maps, coarsest first. skips: whether the encoder's maps and the image are concatenated.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], *, skips: bool, norm: Norm) -> None:
        super().__init__()
        from monai.networks.blocks.dynunet_block import UnetResBlock
        from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock

        self.skips = skips
        self.channels = (*channels[-2::-1], channels[0])
        self.steps = len(self.channels)
        if skips:
            # The map next to the coarsest is taken as it is.
            sources = (in_channels, *channels[:-2])
            for number, (given, out) in enumerate(zip(sources, self.channels[:0:-1], strict=True), start=1):
                self.add_module(f"encoder{number}", UnetrBasicBlock(in_channels=given, out_channels=out, stride=1, res_block=True, **BLOCK))
        self.encoder10 = UnetrBasicBlock(in_channels=channels[-1], out_channels=channels[-1], stride=1, res_block=True, **BLOCK)
        incoming = channels[-1]
        for number, out in zip(range(self.steps, 0, -1), self.channels, strict=True):
            step = UnetrUpBlock(in_channels=incoming, out_channels=out, upsample_kernel_size=2, res_block=True, **BLOCK)
            if not skips:
                step.conv_block = UnetResBlock(in_channels=out, out_channels=out, stride=1, **BLOCK)
            self.add_module(f"decoder{number}", step)
            incoming = out
        adapt(self, norm=None if norm == "instance" else norm)

    def forward(self, features: list[Tensor], image_BCXYZ: Tensor | None = None) -> list[Tensor]:
        """Feature maps, finest first, and with skips the image -> decoded maps, coarsest first; the last has the image's size."""
        x = self.encoder10(features[-1])
        sources = [*features[-2::-1], image_BCXYZ]
        decoded = []
        for number, source in zip(range(self.steps, 0, -1), sources, strict=True):
            step: Any = self.get_submodule(f"decoder{number}")
            if self.skips:
                assert source is not None, "a decoder with skips needs the image"
                x = step(x, source if number == self.steps else self.get_submodule(f"encoder{number}")(source))
            else:
                x = step.conv_block(step.transp_conv(x))
            decoded.append(x)
        return decoded


class SwinUNETR(nn.Module):
    """Encoder and decoder; `forward` gives the decoded maps, coarsest first.

    Args: in_channels; width: channels of the patch embedding, doubled by each stage; depths: attention blocks of each stage, one to four
        stages; heads: of each stage, None for 3, 6, 12, 24; window: side of the attention window in voxels of the map; norm: of the
        convolution blocks: batch, instance (MONAI's) or group; skips: as in `UNet`.
    Attributes: encoder, decoder; arguments: what rebuilds it; stride: by axis, the sides of the input must be multiples of it.
    Raises: BadInput: impossible arguments, all of them at once.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        width: int = 24,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        heads: tuple[int, ...] | None = None,
        window: int = 7,
        norm: Norm = "instance",
        skips: bool = False,
    ) -> None:
        super().__init__()
        heads = tuple(3 * 2**i for i in range(len(depths))) if heads is None else heads
        if faults := _faults(in_channels, width, depths, heads, window):
            raise BadInput("net swinunetr: " + "; ".join(faults))
        self.arguments = {"in_channels": in_channels, "width": width, "depths": depths, "heads": heads, "window": window, "norm": norm}
        self.encoder = SwinEncoder(in_channels, width=width, depths=depths, heads=heads, window=window)
        self.decoder = SwinDecoder(in_channels, self.encoder.channels, skips=skips, norm=norm)
        self.stride = self.encoder.strides[-1]

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> decoded maps, coarsest first."""
        check_sides(x_BCXYZ, self.stride, norm=self.arguments["norm"])
        return self.decoder(self.encoder(x_BCXYZ), x_BCXYZ)


def _faults(in_channels: int, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> list[str]:
    faults = [
        f"{name} must be at least 1; found {given}"
        for name, given in (("in_channels", in_channels), ("width", width), ("window", window))
        if given < 1
    ]
    if not 1 <= len(depths) <= len(STAGES) or min(depths) < 1:
        faults.append(f"depths must be one to {len(STAGES)} numbers from 1; found {tuple(depths)}")
    if len(heads) != len(depths):
        faults.append(f"heads must have one entry for each of the {len(depths)} stages; found {len(heads)}")
    unfit = [f"{width * 2**i} by {number}" for i, number in enumerate(heads) if number < 1 or width * 2**i % number]
    if unfit:
        faults.append(f"heads must divide the channels of their stage; they do not divide {', '.join(unfit)}")
    return faults
