"""Scans for the benches: a torso of any size on disk, as noisy as a CT, without a patient."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from volssl.anatomy import draw_patient
from volssl.dicom_write import write_dicom_series
from volssl.torso import paint
from volssl.volume import Grid

COARSE = 4  # painted at every fourth voxel: the anatomy is smooth, the noise is not
NOISE_HU = 20.0
REACH_MM = 300.0


def torso(shape_vox: tuple[int, int, int], *, seed: int = 0) -> tuple[np.ndarray, Grid]:
    """HU (int16, XYZ) of a torso, and its grid in DICOM's order: 360 mm wide, 300 mm long. Sides are multiples of 4."""
    spacing_mm = np.array([360 / shape_vox[0], 360 / shape_vox[1], REACH_MM / shape_vox[2]])
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    affine[:3, 3] = np.array([0, -24, 7]) - affine[:3, :3] @ ((np.array(shape_vox) - 1) / 2)
    grid = Grid(shape_vox, affine)
    hu, _ = paint(draw_patient(seed, seed), grid.resampled((spacing_mm * COARSE).tolist()))
    rng = np.random.default_rng(seed)
    made = np.empty(shape_vox, np.int16)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_vox[:2]), indexing="ij")
    for z in range(shape_vox[2]):  # a slice at a time, so that a thousand of them need little memory
        below, share = divmod(max(0.0, (z - 1.5) / COARSE), 1)
        above = min(int(below) + 1, hu.shape[2] - 1)
        plane: Any = ndimage.zoom(
            (1 - share) * hu[:, :, int(below)] + share * hu[:, :, above], COARSE, order=1, grid_mode=True, mode="nearest"
        )
        noise = ndimage.gaussian_filter(rng.standard_normal(shape_vox[:2], dtype=np.float32), 0.65)
        plane += noise * np.float32(NOISE_HU / noise.std())
        plane[x**2 + y**2 > 1.02] = -1024
        made[:, :, z] = np.clip(np.rint(plane), -1024, 3071)
    return made, grid


def write_dicom(folder: Path, shape_vox: tuple[int, int, int], *, seed: int = 0) -> list[Path]:
    """Such a torso as an uncompressed DICOM series. Returns: its files in the order of the slices."""
    tags = {"PatientID": f"BENCH-{seed}", "StudyInstanceUID": f"2.25.1{seed}", "SeriesInstanceUID": f"2.25.2{seed}"}
    write_dicom_series(folder, *torso(shape_vox, seed=seed), tags=tags)
    return sorted(folder.iterdir())


def drop(path: Path) -> None:
    """Put a file, or all files of a folder, out of the page cache, so that they are next read from the disk."""
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
