"""Protocol `dice`: Dice per case and target, on the reference's own voxels. Absent from both maps scores 1, from one 0, both noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from volssl.protocols.protocol import AbstractProtocol, Judged, Pair, Score, overlap

RECIPE_NAME = "Dice"


@dataclass(frozen=True)
class Dice(AbstractProtocol):
    """Dice, and nothing else."""

    worst: ClassVar[Mapping[str, float]] = {"dice": 0.0}

    def judge(self, pair: Pair) -> Judged:
        """One row per target."""
        return Judged(tuple(Score(pair.case, name, "dice", *overlap(*pair.masks(name))) for name in pair.targets))
