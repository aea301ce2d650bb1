"""Boxes inside a parent: pairs of globals that overlap, and sub-crops inside the box of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from volssl.augment.spatial import Box
from volssl.draws import Draws, generator
from volssl.files import BadInput

Size = tuple[int, int, int]
BLOCK = 4  # voxels along each side of the blocks in which body is counted
ATTEMPTS = 200  # rounds of 64 candidates; a pair at the reference's settings needs about 25 candidates


@dataclass(frozen=True)
class Tissue:
    """Which global crops are thrown away and drawn again.

    Attributes:
        rule: "none"; "air": at most `limit` of a crop may be air; "body": at most `limit` of it may be body, the rule of PCRLv2 and Models
            Genesis, which keeps lung and drops soft tissue. level: body is above it, on the [0, 1] scale (0.425 is -150 HU there).
        relative_to: "crop", or "output": the reference counts body voxels of the resampled crop and compares them with a share of the
            voxels of the drawn crop, so that larger crops may hold more ("see more").
        attempts: draws per sample; the best is then taken, where the reference went on for ever.
    """

    rule: Literal["none", "air", "body"] = "none"
    limit: float = 0.15
    level: float = 0.425
    relative_to: Literal["crop", "output"] = "crop"
    attempts: int = 50


@dataclass(frozen=True)
class PairCrops:
    """Two global boxes whose intersection over union exceeds a minimum, and sub-crops.

    Attributes:
        global_sizes_vox: sizes a global box may have, drawn uniformly and independently; pairs of sizes that cannot reach the overlap are
            left out. min_overlap: strict lower bound of the intersection over union.
        room: the region in which both corners are drawn, along each axis in multiples of the largest size, as if a whole scan were there;
            pairs that do not fit into the parent are drawn again. None is the parent itself: where that is hardly larger than the boxes,
            they lie closer to each other than in a scan.
        locals: number of sub-crops. local_sizes_vox: theirs; cut to the region where larger.
        local_region: "inside": strictly inside the smallest box around both globals, as the paper says; "corner": only their first corner
            lies there, within 3 voxels, as in the reference code; "anywhere" in the parent: plain multi-crop.
        tissue: see there.
    Source: PCRLv2, sections 1.3 to 1.5 of its description.
    """

    global_sizes_vox: tuple[Size, ...] = ((96, 96, 64), (96, 96, 96), (112, 112, 64), (64, 64, 32))
    min_overlap: float = 0.3
    room: tuple[float, float, float] | None = None
    locals: int = 6
    local_sizes_vox: tuple[Size, ...] = ((32, 32, 16), (16, 16, 16), (32, 32, 32), (8, 8, 8))
    local_region: Literal["inside", "corner", "anywhere"] = "inside"
    tissue: Tissue = Tissue()

    def check(self, parent_vox: Size) -> None:
        """Raises: BadInput: all that cannot work: a size that does not fit into the parent box, an overlap that no pair of sizes can reach,
        or that hardly any pair drawn in this parent reaches."""
        faults = []
        too_big = [size for size in self.global_sizes_vox if any(s > p for s, p in zip(size, parent_vox, strict=True))]
        if too_big:
            faults.append(
                f"global_sizes_vox: every size must fit into the box of {parent_vox} voxels; found {too_big}; enlarge patches.box_vox"
            )
        if not self.pairs():
            best = max(_best_overlap(a, b) for a in self.global_sizes_vox for b in self.global_sizes_vox)
            faults.append(f"min_overlap: some pair of sizes must be able to exceed {self.min_overlap}; found at most {best:.3f}; lower it")
        if faults:
            raise BadInput("; ".join(faults))
        self._pair(generator(0, "check"), np.array(parent_vox))

    def pairs(self) -> list[tuple[Size, Size]]:
        """Ordered pairs of sizes that can overlap enough."""
        sizes = self.global_sizes_vox
        return [(a, b) for a in sizes for b in sizes if _best_overlap(a, b) > self.min_overlap]

    def sample(self, draws: Draws, x_BCXYZ: Tensor, out_vox: Size) -> tuple[Box, Box, list[Box]]:
        """Draw the two global boxes and the sub-crops of every sample from the parents x (B, C, X, Y, Z); out_vox: see `Tissue`."""
        parent_3 = np.array(x_BCXYZ.shape[2:])
        body_BXYZ = self._body(x_BCXYZ)
        pair_B223, locals_BL23 = [], []
        for b in range(draws.batch_size):
            source = generator(draws.seed, draws.stream, draws.step, draws.first_sample + b)
            pair_223 = self._pair_of_tissue(source, parent_3, body_BXYZ[b], int(np.prod(out_vox)))
            pair_B223.append(pair_223)
            locals_BL23.append(self._locals(source, pair_223, parent_3))
        pair = torch.from_numpy(np.array(pair_B223, dtype=np.float32))
        local = torch.from_numpy(np.array(locals_BL23, dtype=np.float32))
        boxes = [Box(local[:, i, 0], local[:, i, 1]) for i in range(self.locals)]
        return Box(pair[:, 0, 0], pair[:, 0, 1]), Box(pair[:, 1, 0], pair[:, 1, 1]), boxes

    def _body(self, x_BCXYZ: Tensor) -> list[np.ndarray | None]:
        # Share of body in blocks of 4 voxels: fine enough for a share of a crop, and small enough to bring to the host.
        if self.tissue.rule == "none":
            return [None] * len(x_BCXYZ)
        if x_BCXYZ.device.type != "cpu":
            return list(body_share(x_BCXYZ[:, 0] >= self.tissue.level).cpu().numpy())
        # One after another the volumes stay in the cache.
        return [body_share(_above(x_1XYZ, self.tissue.level))[0].numpy() for x_1XYZ in x_BCXYZ[:, :1]]

    def _pair_of_tissue(
        self, source: np.random.Generator, parent_3: np.ndarray, body_XYZ: np.ndarray | None, out_voxels: int
    ) -> np.ndarray:
        if body_XYZ is None:
            return self._pair(source, parent_3)
        least, best = np.inf, np.empty(0)
        for _ in range(self.tissue.attempts):
            pair_223 = self._pair(source, parent_3)
            excess = max(self._excess(body_XYZ, start, size, out_voxels) for start, size in pair_223)
            if excess < least:
                least, best = excess, pair_223
            if excess <= 0:
                break
        return best

    def _excess(self, body_XYZ: np.ndarray, start_3: np.ndarray, size_3: np.ndarray, out_voxels: int) -> float:
        inside = tuple(slice(s // BLOCK, -(-(s + n) // BLOCK)) for s, n in zip(start_3, size_3, strict=True))
        share = float(body_XYZ[inside].mean())
        limit = self.tissue.limit * (np.prod(size_3) / out_voxels if self.tissue.relative_to == "output" else 1.0)
        return (1 - share if self.tissue.rule == "air" else share) - limit

    def _pair(self, source: np.random.Generator, parent_3: np.ndarray) -> np.ndarray:
        # Candidates are drawn 64 at a time; the first that overlaps enough is taken, sizes included in the rejection as in the reference.
        sizes_S3 = np.array(self.global_sizes_vox)
        region_3 = parent_3 if self.room is None else np.rint(np.maximum(self.room, 1) * sizes_S3.max(0)).astype(int)
        for _ in range(ATTEMPTS):
            size_N23 = sizes_S3[source.integers(len(sizes_S3), size=(64, 2))]
            start_N23 = np.floor(source.random((64, 2, 3)) * (region_3 - size_N23 + 1)).astype(int)
            low_N3 = start_N23.min(1)
            free_N3 = parent_3 - ((start_N23 + size_N23).max(1) - low_N3)
            overlaps = overlap(start_N23[:, 0], size_N23[:, 0], start_N23[:, 1], size_N23[:, 1]) > self.min_overlap
            good = overlaps & (free_N3 >= 0).all(1)
            if good.any():
                first = int(good.argmax())
                corner_3 = source.integers(free_N3[first] + 1)  # the pair as a whole may lie anywhere in the parent
                return np.stack([start_N23[first] - low_N3[first] + corner_3, size_N23[first]], axis=1)
        raise BadInput(
            f"min_overlap {self.min_overlap}: no pair of global boxes overlapped enough in {64 * ATTEMPTS} draws from a box of "
            f"{tuple(parent_3.tolist())} voxels; lower min_overlap or make patches.box_vox smaller"
        )

    def _locals(self, source: np.random.Generator, pair_223: np.ndarray, parent_3: np.ndarray) -> np.ndarray:
        low_3, high_3 = pair_223[:, 0].min(0), (pair_223[:, 0] + pair_223[:, 1]).max(0)
        if self.local_region == "anywhere":
            low_3, high_3 = np.zeros_like(low_3), parent_3
        size_L3 = np.minimum(np.array(self.local_sizes_vox)[source.integers(len(self.local_sizes_vox), size=self.locals)], high_3 - low_3)
        if self.local_region == "corner":
            # What sticks out of the parent is filled as air, where the reference cut it off and stretched the rest.
            first_3, last_3 = np.maximum(low_3 - 3, 0), np.minimum(high_3 + 3, parent_3)
            return np.stack([source.integers(first_3, last_3, size=size_L3.shape), size_L3], axis=1)
        return np.stack([low_3 + source.integers(high_3 - low_3 - size_L3 + 1), size_L3], axis=1)


def overlap(start_N3: np.ndarray, size_N3: np.ndarray, other_start_N3: np.ndarray, other_size_N3: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes, (N,)."""
    low = np.maximum(start_N3, other_start_N3)
    high = np.minimum(start_N3 + size_N3, other_start_N3 + other_size_N3)
    shared = np.clip(high - low, 0, None).prod(-1)
    return shared / (size_N3.prod(-1) + other_size_N3.prod(-1) - shared)


def _above(x: Tensor, level: float) -> Tensor:
    # The same comparison, which numpy does eight times as fast as torch on a CPU; it knows no bfloat16.
    return torch.from_numpy(x.numpy() >= level) if x.dtype == torch.float32 else x >= level


def body_share(body_BXYZ: Tensor) -> Tensor:
    """Share of True in blocks of 4x4x4 voxels (fewer at the far ends): (B, X, Y, Z) -> float32 (B, X / 4, Y / 4, Z / 4), rounded up."""
    # Bytes hold a block's 64 voxels; sums of slices are several times as fast as a pooling of floats.
    count = body_BXYZ.view(torch.uint8)
    if any(side % BLOCK for side in body_BXYZ.shape[1:]):
        count = F.pad(count, [v for side in body_BXYZ.shape[:0:-1] for v in (0, -side % BLOCK)])
    voxels = torch.ones((), device=body_BXYZ.device)
    for axis, side in enumerate(body_BXYZ.shape[1:], 1):
        index = [slice(None)] * 4
        parts = []
        for first in range(BLOCK):
            index[axis] = slice(first, None, BLOCK)
            parts.append(count[tuple(index)])
        count = parts[0] + parts[1] + parts[2] + parts[3]
        covered = (side - BLOCK * torch.arange(count.shape[axis], device=body_BXYZ.device)).clamp(max=BLOCK)
        voxels = voxels * covered.view([-1 if a == axis else 1 for a in range(4)])
    return count / voxels


def _best_overlap(one: Size, other: Size) -> float:
    # Largest when one lies inside the other on every axis, or reaches over it.
    shared = float(np.minimum(one, other).prod())
    return shared / (float(np.prod(one)) + float(np.prod(other)) - shared)
