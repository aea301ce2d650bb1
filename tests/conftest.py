"""What several test files share: the folder of real scans, and one small scan written in every format."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from volssl.volume import Grid

DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans: VOLSSL_TEST_DATA, or ../shared/data beside the checkout. Skips without it; in CI it must be there."""
    folder = Path(os.environ.get("VOLSSL_TEST_DATA", DEFAULT_DATA))
    if not folder.is_dir():
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"real scans must be there in CI; found no folder {folder}; set VOLSSL_TEST_DATA")
        pytest.skip("no real scans here; set VOLSSL_TEST_DATA to their folder")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("64k")` gives a disk of that size; asked again, the same disk with another size. Skips where mounting is not allowed."""
    folder = tmp_path / "disk"

    def of(size: str) -> Path:
        how = f"remount,size={size}" if folder.exists() else f"size={size}"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a tmpfs here")
        return folder

    yield of
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def no_room_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`no_room_after(3)`: three more files are written, and then each fails as on a full disk."""

    def fill(files: int) -> None:
        left = [files]
        sync = os.fsync

        def full(handle: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        # Every file goes through volssl.files.atomic, which syncs it and then, by another handle, its folder.
        monkeypatch.setattr("volssl.files.os.fsync", full)
        monkeypatch.setattr("volssl.files._sync_folder", lambda folder: None)

    return fill


def oblique_grid(shape_vox=(24, 20, 12), spacing_mm=(1.5, 1.75, 3.0)) -> Grid:
    """A grid in LPS order, turned about two axes."""
    a, b = np.deg2rad(12), np.deg2rad(-9)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-1, -1, 1]) * np.array(spacing_mm)
    affine[:3, 3] = (20, 31, -44)
    return Grid(shape_vox, affine)


def body_phantom(shape_vox=(24, 20, 12), seed=0) -> np.ndarray:
    """HU, int16: noisy air around a noisy ellipsoid of soft tissue with one bright block nearer to the low corner."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape_vox], indexing="ij"))
    inside = (at**2).sum(0) < 0.8
    array = np.where(inside, 40, -1000) + rng.integers(-9, 10, shape_vox)
    array[6:9, 6:9, 3:6] += 600
    return array.astype(np.int16)


@pytest.fixture
def phantom() -> tuple[np.ndarray, Grid]:
    """A small body on an oblique grid in LPS order: HU (24, 20, 12), int16."""
    return body_phantom(), oblique_grid()
