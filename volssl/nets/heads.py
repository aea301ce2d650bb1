"""Heads on a backbone's maps: comparison (projector, predictor), restoration, segmentation."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volssl.nets.adapt import Conv3d
from volssl.nets.blocks import Norm, make_norm
from volssl.processes import BatchNorm1d

RestorationHead = Literal["sigmoid", "conv"]


def precise(x: Tensor) -> Tensor:
    """In float32 at least: what losses are taken of. A test may ask for more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ComparisonHead(nn.Module):
    """PCRLv2's Siamese head of one scale: global average pool -> BatchNorm1d = z; Linear-BN-ReLU-Linear of it = p.

    Args: channels: of the decoded map, C. norm: in place of both BatchNorm1d, see `_vector_norm`.
    """

    def __init__(self, channels: int, *, norm: Norm = "batch") -> None:
        super().__init__()
        self.projector = _vector_norm(norm, channels)
        self.predictor = nn.Sequential(
            nn.Linear(channels, 2 * channels),
            _vector_norm(norm, 2 * channels),
            nn.ReLU(inplace=True),
            nn.Linear(2 * channels, channels),
        )

    def forward(self, map_BCXYZ: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, X, Y, Z) -> z (B, C) and p (B, C), float32."""
        pooled_BC = precise(map_BCXYZ).mean((2, 3, 4))
        z_BC = self.projector(pooled_BC)
        return z_BC, precise(self.predictor(z_BC))


def _vector_norm(norm: Norm, channels: int) -> nn.Module:
    """Of vectors (B, C): batch over the samples; group over up to 8 groups of at least 8 of a sample's channels, since a group of one has
    nothing to be normalised over; instance over all of its channels, as one group."""
    if norm == "batch":
        return BatchNorm1d(channels)
    groups = next((g for g in (8, 4, 2) if channels % g == 0 and channels >= 8 * g), 1) if norm == "group" else 1
    return nn.GroupNorm(groups, channels)


class MidRestorationHead(nn.Module):
    """Restoration from one scale of the pyramid, up-sampled (trilinear) to full size.

    Args: channels: of the decoded map. kind: "sigmoid" is the reference 3D code's Conv3x3x3 -> norm(1) -> sigmoid; "conv" the paper's
        Conv3x3x3 -> norm -> ReLU -> Conv1x1x1. norm: normalisation inside.
    """

    def __init__(self, channels: int, *, kind: RestorationHead, norm: Norm) -> None:
        super().__init__()
        if kind == "sigmoid":
            self.layers = nn.Sequential(Conv3d(channels, 1, 3, padding=1), make_norm(norm, 1), nn.Sigmoid())
        else:
            self.layers = nn.Sequential(
                Conv3d(channels, channels, 3, padding=1),
                make_norm(norm, channels),
                nn.ReLU(inplace=True),
                nn.Conv3d(channels, 1, 1),
            )

    def forward(self, map_BCXYZ: Tensor, size: tuple[int, int, int]) -> Tensor:
        """(B, C, x, y, z) -> (B, 1, *size), float32."""
        return F.interpolate(precise(self.layers(map_BCXYZ)), size=size, mode="trilinear", align_corners=False)


class SegmentationNet(nn.Module):
    """A backbone with a 1x1x1 convolution to class logits, for deep supervision one on every decoded map.

    Args: net: backbone with `encoder`, `decoder`, `stride`. out_channels: classes or regions. deep_supervision: in training mode
        return the logits of all scales, finest first.
    """

    def __init__(self, net: nn.Module, out_channels: int, *, deep_supervision: bool = False) -> None:
        super().__init__()
        self.net: Any = net
        self.deep_supervision = deep_supervision
        channels = self.net.decoder.channels[::-1] if deep_supervision else self.net.decoder.channels[-1:]
        self.heads = nn.ModuleList(nn.Conv3d(c, out_channels, 1) for c in channels)

    def forward(self, x_BCXYZ: Tensor) -> Tensor | list[Tensor]:
        """(B, C, X, Y, Z) -> logits (B, K, X, Y, Z), or in training with deep supervision their list, finest first."""
        finest_first = self.net(x_BCXYZ)[::-1]
        if self.training and self.deep_supervision:
            return [head(x) for head, x in zip(self.heads, finest_first, strict=True)]
        return self.heads[0](finest_first[0])
