"""nnU-Net's residual encoder U-Net (ResEnc) of any width and depth, with or without skip connections.

The layers are those of the package dynamic-network-architectures, which nnU-Net builds its networks from, so every tensor has the name and
shape that stock nnU-Net expects: `encoder.*` is all of its encoder and, with skips, `decoder.stages.*` and `decoder.transpconvs.*` are all
of its decoder but the segmentation layers. nnU-Net's arrays run Z Y X and these X Y Z: whoever exports turns the last three axes of every
kernel. The package is imported when a net is built (`pip install "volssl[resenc]"`; an nnU-Net install has it).

nnU-Net's presets M, L and XL have the same blocks per stage, the defaults here; they differ in the patch and batch that fit into 8, 24 and
40 GB, and the patch decides the number of stages and the strides.

Source: Isensee et al., "nnU-Net Revisited", MICCAI 2024 (arXiv 2404.09556).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from volssl.files import BadInput
from volssl.nets.adapt import adapt
from volssl.nets.blocks import Norm, make_norm
from volssl.nets.sides import Triple, check_sides, triple

RECIPE_NAME = "ResEncUNet"
BLOCKS = (1, 3, 4, 6)  # nnU-Net's residual blocks per stage; 6 from the fourth on
Step = int | Triple


class ResEncEncoder(nn.Module):
    """Stem and stages of residual blocks; a stage's first convolution does its stride.

    Attributes: channels: of each stage, finest first. strides: voxels of the input per voxel of the stage, by axis.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        features: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Triple],
        kernels: Sequence[Triple],
        norm: Norm,
    ) -> None:
        super().__init__()
        built = _package().ResidualEncoder(
            in_channels,
            len(features),
            list(features),
            nn.Conv3d,
            [list(kernel) for kernel in kernels],
            [list(stride) for stride in strides],
            list(blocks),
            return_skips=True,
            **_layers(norm),
        )
        self.stem, self.stages = built.stem, built.stages
        self.channels = tuple(features)
        self.strides = tuple(_products(strides))
        self.norm: Norm = norm
        adapt(self)

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> the feature maps of all stages, finest first.

        Raises: BadInput: sides that are no multiples of the last stride, or leave instance normalisation a single voxel.
        """
        check_sides(x_BCXYZ, self.strides[-1], norm=self.norm)
        x_BCXYZ = self.stem(x_BCXYZ)
        features: list[Tensor] = []
        for stage in self.stages:
            x_BCXYZ = stage(x_BCXYZ)
            features.append(x_BCXYZ)
        return features


class ResEncDecoder(nn.Module):
    """Per stage a transposed convolution and one convolution block, which also takes the encoder's map where there are skips.

    Attributes: channels: of the decoded maps, coarsest first. skips: whether encoder maps are concatenated.
    """

    def __init__(self, *, features: Sequence[int], strides: Sequence[Triple], kernels: Sequence[Triple], skips: bool, norm: Norm) -> None:
        super().__init__()
        stacked = _package().StackedConvBlocks
        self.skips = skips
        self.channels = tuple(features[-2::-1])
        ups, stages = [], []
        for coarse, fine, stride, kernel in zip(features[:0:-1], self.channels, strides[:0:-1], kernels[-2::-1], strict=True):
            ups.append(nn.ConvTranspose3d(coarse, fine, stride, stride))
            incoming = 2 * fine if skips else fine
            stages.append(stacked(1, nn.Conv3d, incoming, fine, list(kernel), 1, **_layers(norm)))
        self.stages = nn.ModuleList(stages)
        self.transpconvs = nn.ModuleList(ups)
        adapt(self)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps, finest first -> decoded maps, coarsest first; the last has the input's size."""
        x = features[-1]
        decoded = []
        for up, stage, skip in zip(self.transpconvs, self.stages, features[-2::-1], strict=True):
            x = up(x)
            x = stage(torch.cat([x, skip], 1) if self.skips else x)
            decoded.append(x)
        return decoded


class ResEncUNet(nn.Module):
    """Encoder and decoder; `forward` gives the decoded maps, coarsest first.

    Args: in_channels; features: channels of each stage, finest first, 2 or more; blocks: residual blocks per stage, None for nnU-Net's
        1, 3, 4, 6, 6, ...; strides: of each stage, a number or one per axis, the first 1, None for 1, 2, 2, ...; kernels: odd sides of the
        convolutions of each stage, None for 3; norm: batch, instance (nnU-Net's) or group; skips: as in `UNet`.
    Attributes: encoder, decoder; arguments: what rebuilds it; stride: by axis, the sides of the input must be multiples of it.
    Raises: BadInput: impossible arguments, all of them at once; the package is missing.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        features: tuple[int, ...] = (32, 64, 128, 256, 320, 320),
        blocks: tuple[int, ...] | None = None,
        strides: tuple[Step, ...] | None = None,
        kernels: tuple[Step, ...] | None = None,
        norm: Norm = "instance",
        skips: bool = False,
    ) -> None:
        super().__init__()
        stages = len(features)
        blocks = tuple(BLOCKS[min(i, 3)] for i in range(stages)) if blocks is None else blocks
        steps = tuple(triple(step) for step in ([1] + [2] * (stages - 1) if strides is None else strides))
        sizes = tuple(triple(side) for side in ([3] * stages if kernels is None else kernels))
        if faults := _faults(in_channels, features, blocks, steps, sizes):
            raise BadInput("net resenc: " + "; ".join(faults))
        shape: dict[str, Any] = {"features": features, "strides": steps, "kernels": sizes, "norm": norm}
        self.arguments = {"in_channels": in_channels, "blocks": blocks, **shape}
        self.encoder = ResEncEncoder(in_channels, blocks=blocks, **shape)
        self.decoder = ResEncDecoder(skips=skips, **shape)
        self.stride = self.encoder.strides[-1]
        package = _package()
        self.apply(package.InitWeights_He(1e-2))
        self.apply(package.init_last_bn_before_add_to_0)

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> decoded maps, coarsest first."""
        return self.decoder(self.encoder(x_BCXYZ))


def stock(in_channels: int, classes: int, kwargs: Mapping[str, Any]) -> Any:
    """nnU-Net's own network of such layers, initialised as nnU-Net does; its axes run Z Y X. Raises: BadInput: the package is missing.

    Args: kwargs: n_stages, features_per_stage, kernel_sizes, strides, n_blocks_per_stage and n_conv_per_stage_decoder, as in its plans.
    """
    network_class = _package().ResidualEncoderUNet
    layers: dict[str, Any] = {
        "conv_op": nn.Conv3d,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    net = network_class(input_channels=in_channels, num_classes=classes, deep_supervision=True, **{**kwargs, **layers})
    net.apply(net.initialize)
    return net


def _faults(
    in_channels: int, features: Sequence[int], blocks: Sequence[int], strides: Sequence[Triple], kernels: Sequence[Triple]
) -> list[str]:
    stages = len(features)
    faults = []
    if in_channels < 1:
        faults.append(f"in_channels must be at least 1; found {in_channels}")
    if stages < 2 or min(features, default=0) < 1:
        faults.append(f"features must be 2 or more numbers from 1; found {tuple(features)}")
    for name, given in (("blocks", blocks), ("strides", strides), ("kernels", kernels)):
        if len(given) != stages:
            faults.append(f"{name} must have one entry for each of the {stages} stages; found {len(given)}")
    if min(blocks, default=0) < 1:
        faults.append(f"blocks must be at least 1 in every stage; found {tuple(blocks)}")
    if min((step for stride in strides for step in stride), default=0) < 1 or strides[0] != (1, 1, 1):
        faults.append(f"strides must be at least 1, and 1 in the first stage; found {tuple(strides)}")
    if any(side < 1 or side % 2 == 0 for kernel in kernels for side in kernel):
        faults.append(f"kernels must have odd sides from 1; found {tuple(kernels)}")
    return faults


def _products(strides: Sequence[Triple]) -> list[Triple]:
    totals: list[Triple] = []
    total = (1, 1, 1)
    for x, y, z in strides:
        total = (total[0] * x, total[1] * y, total[2] * z)
        totals.append(total)
    return totals


def _layers(norm: Norm) -> dict[str, Any]:
    """nnU-Net's layers: convolutions with bias, affine normalisation with eps 1e-5, leaky ReLU of slope 0.01."""
    return {"conv_bias": True, "norm_op": partial(make_norm, norm), "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}


def _package() -> Any:
    """The names of dynamic-network-architectures that are used here. Raises: BadInput: it is not installed."""
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
        from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
        from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
    except ModuleNotFoundError as error:
        if error.name != "dynamic_network_architectures":
            raise
        raise BadInput('net resenc: needs the package dynamic-network-architectures; found none; pip install "volssl[resenc]"') from None
    return SimpleNamespace(
        ResidualEncoder=ResidualEncoder,
        ResidualEncoderUNet=ResidualEncoderUNet,
        StackedConvBlocks=StackedConvBlocks,
        InitWeights_He=InitWeights_He,
        init_last_bn_before_add_to_0=init_last_bn_before_add_to_0,
    )
