"""A target branch made of running means: what a Siamese comparison predicts, in place of a stop-gradient of its own branch.

Source: Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning", NeurIPS 2020 (arXiv 2006.07733).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from volssl.averages import follow, frozen_copy
from volssl.nets.heads import precise
from volssl.schedule import cosine


def momentum_at(progress: float, *, start: float) -> float:
    """1 - (1 - start) (1 + cos(pi progress)) / 2: `start` at the beginning, 1 at the end, where the copy stands still.

    Source: Grill et al., section 3.3, where start is 0.996.
    """
    return 1 - (1 - start) * cosine(progress)


class MomentumTarget(nn.Module):
    """Copies of encoder, decoder and projectors that follow the trained ones and take no gradient.

    In training their batch normalisation takes the statistics of the batch, as in the trained branch and as in BYOL; their running
    statistics are their own, and nobody reads them.

    Args: net: the backbone. projectors: by name, from pooled vectors (B, C) to projections (B, C). start: see `momentum_at`.
    """

    def __init__(self, net: nn.Module, projectors: Mapping[str, nn.Module], *, start: float) -> None:
        super().__init__()
        self.start = start
        self.net: Any = frozen_copy(net)
        self.projectors = nn.ModuleDict({name: frozen_copy(projector) for name, projector in projectors.items()})

    @torch.no_grad()
    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """(B, C, X, Y, Z) -> decoded maps, coarsest first."""
        return self.net(x_BCXYZ)

    @torch.no_grad()
    def project(self, map_BCXYZ: Tensor, name: str) -> Tensor:
        """A decoded map -> its projection (B, C), float32, as `ComparisonHead` makes it."""
        return self.projectors[name](precise(map_BCXYZ).mean((2, 3, 4)))

    def follow(self, net: nn.Module, projectors: Mapping[str, nn.Module], progress: float) -> None:
        """Move towards the trained weights, once after each step of the optimiser; `progress` in [0, 1]."""
        decay = momentum_at(progress, start=self.start)
        follow(self.net, net, decay=decay)
        for name, projector in projectors.items():
            follow(self.projectors[name], projector, decay=decay)
