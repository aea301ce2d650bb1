"""Thumbnails: three planes of a volume side by side, small enough for a page of many, in true proportions.

Display is that of pictures.py. Drawn as plain rasters: a page of twenty takes no time, and a picture holds nothing but its pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volssl.pictures import PLANE_AXIS, PLANES, plane_of, plane_spacing

WIDE, TALL = 640, 300  # picture elements at most
GAP = 6
BACK = (16, 18, 20)
BOX = (255, 176, 0)

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A box in voxels, `start` to before `stop`, drawn as an outline."""

    start: Triple
    stop: Triple


def planes_png(planes: Sequence[np.ndarray], spacing_mm: Sequence[float], *, window: tuple[float, float], box: Box | None = None) -> bytes:
    """Draw an axial, a coronal and a sagittal slice of one RAS+ volume, one scale in mm for all.

    Args: planes: as `plane_of` gives them, in the order of PLANES. window: values drawn black and white.
    """
    sizes_mm = [np.array(one.shape) * plane_spacing(spacing_mm, plane) for plane, one in zip(PLANES, planes, strict=True)]
    widths, heights = [size[1] for size in sizes_mm], [size[0] for size in sizes_mm]
    per_mm = min((WIDE - 2 * GAP) / sum(widths), TALL / max(heights))
    drawn = [_panel(one, size * per_mm, window) for one, size in zip(planes, sizes_mm, strict=True)]
    if box is not None:
        for plane, one, panel in zip(PLANES, planes, drawn, strict=True):
            _outline(panel, box, plane, np.array(panel.shape[:2]) / one.shape)
    tall = max(len(panel) for panel in drawn)
    canvas = np.full((tall, sum(panel.shape[1] for panel in drawn) + 2 * GAP, 3), BACK, dtype=np.uint8)
    left = 0
    for panel in drawn:
        top = (tall - len(panel)) // 2
        canvas[top : top + len(panel), left : left + panel.shape[1]] = panel
        left += panel.shape[1] + GAP
    return png(canvas)


def middle_planes(array_XYZ: np.ndarray, middle: Sequence[int] | None = None) -> list[np.ndarray]:
    """The slices through `middle` (voxels), by default the centre, in the order of PLANES."""
    at = [n // 2 for n in array_XYZ.shape] if middle is None else middle
    return [plane_of(array_XYZ, plane, int(at[PLANE_AXIS[plane]])) for plane in PLANES]


def _panel(picture: np.ndarray, size: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    grey = np.clip((picture.astype(np.float32) - low) / (high - low), 0, 1) * 255
    rows, columns = (max(1, round(float(n))) for n in size)
    grey = _weights(grey.shape[0], rows) @ grey @ _weights(grey.shape[1], columns).T
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


def _weights(before: int, after: int) -> np.ndarray:
    # Linear interpolation; where many samples become one, a triangle as wide as they are, so that nothing is skipped.
    ratio = before / after
    centres = (np.arange(after) + 0.5) * ratio - 0.5
    weights = np.maximum(0, 1 - np.abs(np.clip(centres, 0, before - 1)[:, None] - np.arange(before)) / max(1.0, ratio))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _outline(panel: np.ndarray, box: Box, plane: str, per_voxel: np.ndarray) -> None:
    columns, rows = (axis for axis in range(3) if axis != PLANE_AXIS[plane])
    height, width = panel.shape[:2]
    edges = []
    for axis, length, scale in ((rows, height, per_voxel[0]), (columns, width, per_voxel[1])):
        # Pictures run against the array's axes.
        low, high = length - box.stop[axis] * scale, length - box.start[axis] * scale
        edges.append((min(length - 1, max(0, round(low))), min(length - 1, max(0, round(high) - 1))))
    (top, bottom), (left, right) = edges
    panel[top : bottom + 1, [left, right]] = BOX
    panel[[top, bottom], left : right + 1] = BOX


def png(picture: np.ndarray) -> bytes:
    """A PNG of uint8 (rows, columns, 3): pixels alone, no text, no date."""
    rows, columns, _ = picture.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), picture.reshape(rows, -1)], axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
