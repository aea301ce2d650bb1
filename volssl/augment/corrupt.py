"""Corruptions that move voxels: the patch swap of PCRLv2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        """Copy with swapped patches; a later swap moves what earlier ones wrote, and a second write to an overlap wins."""
        _, channels, *sides = x_BCXYZ.shape
        patch = [min(p, n) for p, n in zip(self.patch_vox, sides, strict=True)]
        room = torch.tensor([n - p + 1 for n, p in zip(sides, patch, strict=True)])
        corner_Bs23 = (params.cpu() * room).long().minimum(room - 1)
        rounds_Bs = np.stack([rounds(corner_s23, np.array(patch)) for corner_s23 in corner_Bs23.numpy()])
        # The array lies flat, so the swaps of one round are two reads and two writes for all samples and channels at once.
        strides = torch.tensor([sides[1] * sides[2], sides[2], 1])
        voxels = sides[0] * strides[0]
        start_Bs2 = (corner_Bs23 * strides).sum(-1) + torch.arange(len(x_BCXYZ))[:, None, None] * channels * voxels
        inside_P3 = torch.cartesian_prod(*(torch.arange(p) for p in patch)).view(-1, 3)
        inside = (torch.arange(channels)[:, None] * voxels + (inside_P3 * strides).sum(1)).flatten()
        in_order = torch.from_numpy(rounds_Bs.ravel().argsort(kind="stable"))
        start_2N = start_Bs2.flatten(0, 1)[in_order].T.to(x_BCXYZ.device, non_blocking=True)
        places_2NP = start_2N[..., None] + inside.to(x_BCXYZ.device, non_blocking=True)
        flat = x_BCXYZ.flatten().clone()
        for one, other in places_2NP.split(np.bincount(rounds_Bs.ravel()).tolist(), 1):
            first, second = flat[one], flat[other]
            flat[other] = first
            flat[one] = second
        return flat.view_as(x_BCXYZ)


def rounds(corner_s23: np.ndarray, patch_3: np.ndarray) -> np.ndarray:
    """In which round each swap of one sample can be done, (swaps,): after every earlier swap with which it shares a voxel.

    Swaps of one round share none, so they can be done at once with the same result; of 100 in a 64x64x32 view there are 5 to 10 rounds.
    Args: corner_s23: first voxels of the two patches of each swap. patch_3: sides of a patch.
    """
    swaps = len(corner_s23)
    near = np.ones((2 * swaps, 2 * swaps), dtype=bool)
    for axis in range(3):
        at = corner_s23[:, :, axis].T.ravel().astype(np.int32)  # all first patches, then all second ones
        near &= abs(at[:, None] - at) < patch_3[axis]
    near_2s2s = near.reshape(2, swaps, 2, swaps)
    shared = near_2s2s[0, :, 0] | near_2s2s[0, :, 1] | near_2s2s[1, :, 0] | near_2s2s[1, :, 1]
    earlier = np.tril(shared, -1).astype(np.int32)
    found, before = np.zeros(swaps, dtype=np.int32), None
    while before is None or (found != before).any():
        before, found = found, (earlier * (found + 1)).max(1, initial=0)
    return found
