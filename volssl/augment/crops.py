"""Boxes inside a parent: pairs of globals that overlap, and sub-crops inside the box of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from volssl.augment.spatial import Box
from volssl.draws import Draws, generator
from volssl.files import BadInput

Size = tuple[int, int, int]
ATTEMPTS = 200  # rounds of 64 candidates; a pair at the reference's settings needs about 25 candidates


@dataclass(frozen=True)
class PairCrops:
    """Two global boxes whose intersection over union exceeds a minimum, and sub-crops strictly inside the smallest box around both.

    Attributes:
        global_sizes_vox: sizes a global box may have, drawn uniformly and independently; pairs of sizes that cannot reach the overlap are
            left out. min_overlap: strict lower bound of the intersection over union. locals: number of sub-crops. local_sizes_vox:
            theirs; cut to the surrounding box where larger.
    Source: PCRLv2, section 1.3 and 1.5 of its description, with the sub-crops held inside as the paper says.
    """

    global_sizes_vox: tuple[Size, ...] = ((96, 96, 64), (96, 96, 96), (112, 112, 64), (64, 64, 32))
    min_overlap: float = 0.3
    locals: int = 6
    local_sizes_vox: tuple[Size, ...] = ((32, 32, 16), (16, 16, 16), (32, 32, 32), (8, 8, 8))

    def check(self, parent_vox: Size) -> None:
        """Raises: BadInput: if a size does not fit into the parent box, or no pair of sizes can reach the overlap."""
        too_big = [size for size in self.global_sizes_vox if any(s > p for s, p in zip(size, parent_vox, strict=True))]
        if too_big:
            raise BadInput(
                f"global_sizes_vox: every size must fit into the box of {parent_vox} voxels; found {too_big}; enlarge patches.box_vox"
            )
        if not self.pairs():
            best = max(_best_overlap(a, b) for a in self.global_sizes_vox for b in self.global_sizes_vox)
            raise BadInput(f"min_overlap: some pair of sizes must be able to exceed {self.min_overlap}; found at most {best:.3f}; lower it")

    def pairs(self) -> list[tuple[Size, Size]]:
        """Ordered pairs of sizes that can overlap enough."""
        sizes = self.global_sizes_vox
        return [(a, b) for a in sizes for b in sizes if _best_overlap(a, b) > self.min_overlap]

    def sample(self, draws: Draws, parent_vox: Size) -> tuple[Box, Box, list[Box]]:
        """Draw the two global boxes and the sub-crops of every sample."""
        pair_B223, locals_BL23 = [], []
        for b in range(draws.batch_size):
            source = generator(draws.seed, draws.stream, draws.step, draws.first_sample + b)
            pair_223 = self._pair(source, np.array(parent_vox))
            pair_B223.append(pair_223)
            locals_BL23.append([self._local(source, pair_223) for _ in range(self.locals)])
        pair = torch.from_numpy(np.array(pair_B223, dtype=np.float32))
        local = torch.from_numpy(np.array(locals_BL23, dtype=np.float32))
        boxes = [Box(local[:, i, 0], local[:, i, 1]) for i in range(self.locals)]
        return Box(pair[:, 0, 0], pair[:, 0, 1]), Box(pair[:, 1, 0], pair[:, 1, 1]), boxes

    def _pair(self, source: np.random.Generator, parent_3: np.ndarray) -> np.ndarray:
        # Candidates are drawn 64 at a time; the first that overlaps enough is taken, sizes included in the rejection as in the reference.
        sizes_S3 = np.array(self.global_sizes_vox)
        for _ in range(ATTEMPTS):
            size_N23 = sizes_S3[source.integers(len(sizes_S3), size=(64, 2))]
            start_N23 = np.floor(source.random((64, 2, 3)) * (parent_3 - size_N23 + 1)).astype(int)
            good = overlap(start_N23[:, 0], size_N23[:, 0], start_N23[:, 1], size_N23[:, 1]) > self.min_overlap
            if good.any():
                first = int(good.argmax())
                return np.stack([start_N23[first], size_N23[first]], axis=1)
        raise BadInput(
            f"min_overlap {self.min_overlap}: no pair of global boxes overlapped enough in {64 * ATTEMPTS} draws from a box of "
            f"{tuple(parent_3.tolist())} voxels; lower min_overlap or make patches.box_vox smaller"
        )

    def _local(self, source: np.random.Generator, pair_223: np.ndarray) -> np.ndarray:
        low_3 = pair_223[:, 0].min(0)
        room_3 = (pair_223[:, 0] + pair_223[:, 1]).max(0) - low_3
        size_3 = np.minimum(self.local_sizes_vox[source.integers(len(self.local_sizes_vox))], room_3)
        return np.stack([low_3 + source.integers(room_3 - size_3 + 1), size_3])


def overlap(start_N3: np.ndarray, size_N3: np.ndarray, other_start_N3: np.ndarray, other_size_N3: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes, (N,)."""
    low = np.maximum(start_N3, other_start_N3)
    high = np.minimum(start_N3 + size_N3, other_start_N3 + other_size_N3)
    shared = np.clip(high - low, 0, None).prod(-1)
    return shared / (size_N3.prod(-1) + other_size_N3.prod(-1) - shared)


def _best_overlap(one: Size, other: Size) -> float:
    # Largest when one lies inside the other on every axis, or reaches over it.
    shared = float(np.minimum(one, other).prod())
    return shared / (float(np.prod(one)) + float(np.prod(other)) - shared)
