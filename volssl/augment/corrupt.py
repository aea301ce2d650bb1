"""Corruptions that move voxels: the patch swap of PCRLv2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from volssl.augment.transform import AbstractTransform
from volssl.draws import Draws


@dataclass(frozen=True)
class PatchSwap(AbstractTransform):
    """Exchange pairs of patches, one pair after another; patches may overlap.

    Attributes: patch_vox: sides of a patch; cut to the volume where it is smaller. swaps: number of pairs.
    Source: torchio's RandomSwap as PCRLv2 uses it: (8, 4, 4), 100 swaps, which moves about 17 % of a 64x64x32 view.
    """

    patch_vox: tuple[int, int, int] = (8, 4, 4)
    swaps: int = 100

    def sample(self, draws: Draws) -> Tensor:
        """Places of the two corners as shares of the room, (B, swaps, 2, 3) in [0, 1)."""
        return draws.uniform(0, 1, self.swaps, 2, 3)

    def apply(self, x_BCXYZ: Tensor, params: Tensor) -> Tensor:
        """Copy with swapped patches; a second write to an overlap wins, as in the source."""
        _, channels, *sides = x_BCXYZ.shape
        patch = [min(p, n) for p, n in zip(self.patch_vox, sides, strict=True)]
        room = torch.tensor([n - p + 1 for n, p in zip(sides, patch, strict=True)], device=x_BCXYZ.device)
        corner = (params.to(x_BCXYZ.device) * room).long().minimum(room - 1)
        strides = torch.tensor([sides[1] * sides[2], sides[2], 1], device=x_BCXYZ.device)
        inside = torch.cartesian_prod(*(torch.arange(p, device=x_BCXYZ.device) for p in patch)).view(-1, 3) @ strides
        places_Bs2P = (corner @ strides)[..., None] + inside
        flat = x_BCXYZ.flatten(2).clone()
        for swap in range(self.swaps):
            one, other = (places_Bs2P[:, swap, side, None].expand(-1, channels, -1) for side in (0, 1))
            first, second = flat.gather(2, one), flat.gather(2, other)
            flat.scatter_(2, other, first).scatter_(2, one, second)
        return flat.view_as(x_BCXYZ)
