"""How an image is brought to what a segmentation network sees: orientation, voxel size, intensities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from volssl.augment.intensity import zscore
from volssl.files import BadInput
from volssl.normalise import Normalisation, normalise
from volssl.resample import resample
from volssl.volume import Grid, Volume


@dataclass(frozen=True)
class Preparation:
    """How an image is brought to what the network sees. Always RAS+.

    Attributes:
        spacing_mm: of the network's voxels; null keeps each image's own.
        normalisation: window maps `window` (HU) to [0, 1] and clips, for CT; percentile maps the 0.5 and 99.5 % quantiles of the image to
            [0, 1] and clips, for MR; zscore clips to the same quantiles, then subtracts the mean and divides by the standard deviation.
            Each per channel; `nonzero` leaves the voxels at exactly 0 out of the statistics and at 0 (skull-stripped MR).
        patches: zscore normalises each patch once more, as PCRLv2's encoder was trained.
    """

    spacing_mm: tuple[float, float, float] | None = None
    normalisation: Normalisation = "window"
    window: tuple[float, float] = (-1000.0, 1000.0)
    nonzero: bool = False
    patches: Literal["none", "zscore"] = "none"

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise BadInput(f"spacing_mm must be > 0; found {self.spacing_mm}")
        if self.window[0] >= self.window[1]:
            raise BadInput(f"window must be [low, high] with low < high; found {self.window}")

    def grid(self, original: Grid) -> Grid:
        """The network's grid for an image's grid."""
        turned = original.reoriented("RAS")
        return turned if self.spacing_mm is None else turned.resampled(self.spacing_mm)

    def image(self, volume: Volume) -> Volume:
        """The image as the network sees it, float32."""
        turned = volume.reoriented("RAS")
        moved = self._onto(turned, order="linear", fill=float(turned.array_CXYZ.min()))
        array_CXYZ = np.empty(moved.array_CXYZ.shape, np.float32)
        for target_XYZ, channel_XYZ in zip(array_CXYZ, moved.array_CXYZ, strict=True):
            target_XYZ[...] = channel_XYZ
            normalise(target_XYZ, self.normalisation, window=self.window, nonzero=self.nonzero)
        return Volume(array_CXYZ, moved.grid)

    def label(self, volume: Volume) -> Volume:
        """The label map on the network's grid (nearest), uint8."""
        moved = self._onto(volume.reoriented("RAS"), order="nearest", fill=0.0)
        return Volume(np.ascontiguousarray(moved.array_CXYZ, dtype=np.uint8), moved.grid)

    def _onto(self, turned: Volume, *, order: Literal["linear", "nearest"], fill: float) -> Volume:
        grid = self.grid(turned.grid)
        return turned if grid.almost_equal(turned.grid) else resample(turned, grid, order=order, fill=fill)

    def patch(self, x_BCXYZ: Tensor) -> Tensor:
        """What happens to a patch right before the network."""
        return zscore(x_BCXYZ) if self.patches == "zscore" else x_BCXYZ
