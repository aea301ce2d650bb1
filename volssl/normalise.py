"""Intensities of an image as a network sees them. Imports numpy alone: an exported MONAI bundle carries this file."""

from __future__ import annotations

from typing import Literal

import numpy as np

PERCENTILES = (0.5, 99.5)  # robust lowest and highest value, as nnU-Net clips
Normalisation = Literal["window", "percentile", "zscore"]


def normalise(channel_XYZ: np.ndarray, how: Normalisation, *, window: tuple[float, float], nonzero: bool) -> None:
    """Normalise a channel (float32) in place, since an image is the largest thing there is.

    Args: how: window maps `window` to [0, 1] and clips; percentile the 0.5 and 99.5 % quantiles; zscore clips to the same quantiles, then
        subtracts the mean and divides by the standard deviation. nonzero: leaves the voxels at exactly 0 out of the statistics and at 0.
    """
    if how == "window":
        low, high = window
        channel_XYZ -= low
        channel_XYZ /= high - low
        np.clip(channel_XYZ, 0, 1, out=channel_XYZ)
        return
    counted = channel_XYZ[channel_XYZ != 0] if nonzero else channel_XYZ.ravel()
    if counted.size == 0:
        return
    low, high = (float(value) for value in np.percentile(counted, PERCENTILES))
    counted = counted.clip(low, high)
    outside = channel_XYZ == 0 if nonzero else None
    np.clip(channel_XYZ, low, high, out=channel_XYZ)
    if how == "percentile":
        channel_XYZ -= low
        channel_XYZ /= max(high - low, 1e-6)
    else:
        channel_XYZ -= float(counted.mean(dtype=np.float64))
        channel_XYZ /= max(float(counted.std(dtype=np.float64)), 1e-6)
    if outside is not None:
        channel_XYZ[outside] = 0
