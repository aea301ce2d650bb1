"""Shares of classes or regions as NIfTI, one file each, filled part by part on disk: they need no memory, however many there are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from volssl.archive import write_scaled_nifti
from volssl.resample import Part as Box
from volssl.volume import Grid, Volume

STEPS = 32767  # int16: the share 1


class ShareFiles:
    """Takes shares as `Model.label_map` hands them out; a context whose end frees the disk it took, 2 bytes per voxel and file.

    Args: folder: where the files go. grid: of the image. channels: file name -> channel of the shares.
    NIfTI has no half-precision floats: shares are int16 with the slope 1 / 32767, which every reader turns back into [0, 1].
    """

    def __init__(self, folder: Path, grid: Grid, channels: Mapping[str, int]) -> None:
        self.folder, self.grid, self.channels = folder, grid, dict(channels)

    def __enter__(self) -> ShareFiles:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.folder)
        x, y, z = self.grid.shape_vox
        self._arrays: dict[str, np.ndarray] = {}
        for number, name in enumerate(self.channels):
            path = Path(self._scratch.name) / str(number)
            with open(path, "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, 2 * x * y * z)  # a full disk is told here, not by a signal
            self._arrays[name] = np.memmap(path, np.int16, "r+", shape=(x, y, z), order="F")
        return self

    def keep(self, box: Box, shares_KXYZ: Tensor) -> None:
        """Write the shares of a part of the grid turned to RAS+."""
        for name, channel in self.channels.items():
            turned_XYZ = Volume(self._arrays[name][None], self.grid).reoriented("RAS").array_CXYZ[0]  # a view
            turned_XYZ[box] = (shares_KXYZ[channel].clamp(0, 1) * STEPS).round().cpu().numpy()

    def write(self) -> None:
        """Leave the files under their names."""
        for name, array_XYZ in self._arrays.items():
            write_scaled_nifti(self.folder / f"{name}.nii.gz", array_XYZ, self.grid, slope=1 / STEPS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._arrays.clear()
        self._scratch.cleanup()
