"""Where the body lies in a scan, and how its values become stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from volssl.store import Triple
from volssl.volume import Grid, Volume

COARSE_MM = 3.0  # the body is looked for on about this spacing
MANY_VOXELS = 2**24  # percentiles of more voxels than this are taken from every second, third ... along each axis
PADDED_SHARE = 0.01  # a constant that fills less than this is no padding; outside of a cylinder lie 21 % of its box


@dataclass(frozen=True)
class Body:
    """How the body is told from air: values above `threshold`; without one, above `share` of the robust range (0.5 to 99.5 %)."""

    threshold: float | None = None
    share: float = 0.1
    margin_mm: float = 5.0


@dataclass(frozen=True)
class Intensity:
    """What is stored. Without `percentiles` values stay as they are (HU); with them, those two of the body become the window's ends."""

    clip: tuple[float, float] = (-1024.0, 3071.0)
    window: tuple[float, float] = (-1000.0, 1000.0)
    percentiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Found:
    """Where the body lies (start, stop; voxels), and the threshold above which it was seen."""

    threshold: float
    start: Triple
    stop: Triple


def find_body(volume: Volume, body: Body, *, padding: float | None = None) -> Found | None:
    """The body in the first channel, or None if nothing is above the threshold. `padding` is never body."""
    array_XYZ = volume.array_CXYZ[0]
    stride = _coarse(volume.grid)
    threshold = body.threshold
    if threshold is None:
        low, high = np.percentile(array_XYZ[_every(stride)], (0.5, 99.5))
        threshold = float(low + body.share * (high - low))
    box = body_box(array_XYZ, threshold=threshold, stride=stride, padding=padding)
    return None if box is None else Found(threshold, *box)


def _coarse(grid: Grid) -> Triple:
    x, y, z = (max(1, int(COARSE_MM / mm + 1e-3)) for mm in grid.spacing_mm)
    return x, y, z


def _every(stride: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(None, None, n) for n in stride)


def body_box(
    array_XYZ: np.ndarray, *, threshold: float, stride: Sequence[int] = (1, 1, 1), padding: float | None = None
) -> tuple[Triple, Triple] | None:
    """Box (start, stop; voxels) of the largest connected part above `threshold`, or None if nothing is.

    Args: stride: every how many voxels to look, along each axis; the box is then wider by up to that. padding: see `padding_of`.
    """
    values = array_XYZ[_every(stride)]
    coarse = values > threshold
    if padding is not None and padding > threshold:
        coarse &= ~_solid(values == padding)
    # Opening parts the body from the table's thin shell; a stack too flat for it, or a thin body, is taken as it is.
    opened = ndimage.binary_opening(coarse) if min(coarse.shape) >= 5 else coarse
    labelled: Any = ndimage.label(opened if opened.any() else coarse)
    parts, count = labelled
    if count == 0:
        return None
    largest = int(np.argmax(np.bincount(parts.ravel())[1:])) + 1
    box = ndimage.find_objects(parts, max_label=largest)[largest - 1]
    start = [max(0, (part.start - 1) * n + 1) for part, n in zip(box, stride, strict=True)]
    stop = [min(size, part.stop * n) for part, n, size in zip(box, stride, array_XYZ.shape, strict=True)]
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def padding_of(volume: Volume) -> float | None:
    """The constant that stands where nothing was measured, such as -2000 or -3024 outside of the scanner's field of view, or None.

    It is the one value of all eight corners of the first channel, and of at least 1 % of its voxels.
    """
    array_XYZ = volume.array_CXYZ[0]
    corners = array_XYZ[:: max(1, array_XYZ.shape[0] - 1), :: max(1, array_XYZ.shape[1] - 1), :: max(1, array_XYZ.shape[2] - 1)]
    value = corners.flat[0]
    if (corners != value).any() or np.mean(array_XYZ[_every(_coarse(volume.grid))] == value) < PADDED_SHARE:
        return None
    return float(value)


def without_padding(plane: np.ndarray, padding: float, air: float) -> np.ndarray:
    """One plane of a scan with its padding turned to `air`, in place; a lone voxel that happens to have the value stays."""
    plane[_solid(plane == padding)] = air
    return plane


def _solid(mask: np.ndarray) -> np.ndarray:
    # Noise does not repeat one value over a block of three by three.
    solid = ndimage.binary_opening(mask, np.ones((3,) * mask.ndim)) if min(mask.shape) >= 3 else mask
    return ndimage.binary_propagation(solid, mask=mask)


def with_margin(grid: Grid, found: Found, margin_mm: float) -> tuple[Triple, Triple]:
    """The box of the body, wider by `margin_mm` where the grid allows."""
    margin = np.ceil(margin_mm / np.array(grid.spacing_mm) - 1e-3).astype(int)
    return triple(np.maximum(0, np.array(found.start) - margin)), triple(np.minimum(grid.shape_vox, np.array(found.stop) + margin))


def scaling_of(volume: Volume, threshold: float, intensity: Intensity) -> tuple[float, float] | None:
    """Factor and offset from a value of the scan to a stored one, or None if the body above `threshold` has but one value."""
    if intensity.percentiles is None:
        return 1.0, 0.0
    stride = 1
    while volume.array_CXYZ[0].size / stride**3 > MANY_VOXELS:
        stride += 1
    values = volume.array_CXYZ[(slice(None), *_every((stride,) * 3))]
    low, high = (float(v) for v in np.percentile(values[values > threshold], intensity.percentiles))
    if not high > low:
        return None
    factor = (intensity.window[1] - intensity.window[0]) / (high - low)
    return factor, intensity.window[0] - low * factor


def triple(values: np.ndarray) -> Triple:
    """Three whole numbers."""
    x, y, z = (int(v) for v in values)
    return x, y, z
