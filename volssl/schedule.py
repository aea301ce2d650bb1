"""Schedules: functions of progress, the share of the training done, in [0, 1]."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "poly", "sawtooth"]


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end: (1 + cos(pi progress)) / 2.

    Raises: ValueError: if progress lies outside [0, 1].
    Source: PCRLv2's learning rate and its weight of the mid-scale restoration, there tied to a constant of 240 epochs.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1]; found {progress}")
    return (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(progress: float, *, warmup: float, floor: float = 0.0) -> float:
    """Linear from near 0 to 1 over the share `warmup`, then cosine down to `floor`; a factor of the peak learning rate."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * cosine((progress - warmup) / (1 - warmup) if warmup < 1 else 1.0)


def polynomial(progress: float, *, power: float = 0.9) -> float:
    """1 at the start, 0 at the end: (1 - progress) ** power, as nnU-Net's learning rate falls."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1]; found {progress}")
    return (1 - progress) ** power


def sawtooth(progress: float, *, warmup: float) -> float:
    """Two linear rises from near 0 to 1, each over the share `warmup`, then `polynomial`; during the first one the encoder stands still.

    Source: the "sawtooth" schedule of Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", CVPR 2025.
    """
    if progress < warmup:
        return progress / warmup
    if progress < 2 * warmup:
        return (progress - warmup) / warmup
    return polynomial((progress - 2 * warmup) / (1 - 2 * warmup))


def rate(schedule: Schedule, progress: float, *, warmup: float) -> float:
    """The factor of the peak learning rate at `progress`; cosine and poly rise once, linearly."""
    if schedule == "cosine":
        return warmup_cosine(progress, warmup=warmup)
    if schedule == "sawtooth":
        return sawtooth(progress, warmup=warmup)
    return progress / warmup if progress < warmup else polynomial((progress - warmup) / (1 - warmup) if warmup < 1 else 1.0)
