"""Prepared volumes on disk, chunked and compressed (blosc2, int16): read a box without reading the file.

    STORE/store.json           what all volumes share: version, spacing, orientation, window
    STORE/manifest.csv         one row per volume
    STORE/volumes/<scan_id>.b2nd   array (C, X, Y, Z), int16, RAS+

Training reads stores on machines that have no archive library; this file imports none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from volssl.files import BadInput, atomic, read_csv, read_json

VERSION = 1
CHUNK_VOX, BLOCK_VOX = 64, 32

Size = tuple[int, int, int]


@dataclass(frozen=True)
class StoredScan:
    """One row of the manifest: ids are pseudonyms; body_start, body_stop: box of the body in the stored array, in voxels."""

    scan_id: str
    patient_id: str
    split: str
    shape_vox: Size
    body_start: Size
    body_stop: Size
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """An opened store.

    Attributes: path; spacing_mm and orientation of every volume; modality; clip: range of the stored values; window: stored values that
        map to 0 and 1; rows.
    """

    path: Path
    spacing_mm: tuple[float, float, float]
    orientation: str
    modality: str
    clip: tuple[float, float]
    window: tuple[float, float]
    rows: tuple[StoredScan, ...]

    @staticmethod
    def open(path: Path | str) -> Store:
        """Open a store. Raises: BadInput: if it is none, is of another version, or lacks a volume that its manifest names."""
        path = Path(path)
        if not (path / "store.json").is_file():
            raise BadInput(f"store {path}: must be a folder made by `volssl prepare` (with store.json); found none")
        facts = read_json(path / "store.json")
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            found = facts.get("version") if isinstance(facts, dict) else facts
            raise BadInput(f"store {path}: version must be {VERSION}; found {found!r}; prepare it again with this volssl")
        try:
            rows = tuple(_row(row) for row in read_csv(path / "manifest.csv"))
            store = Store(
                path,
                _three(facts["spacing_mm"]),
                facts["orientation"],
                facts["modality"],
                _pair(facts["clip"]),
                _pair(facts["window"]),
                rows,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"store {path}: store.json or manifest.csv is damaged ({type(error).__name__}: {error}); prepare it again"
            ) from None
        missing = [row.scan_id for row in rows if not volume_path(path, row.scan_id).is_file()]
        if missing:
            raise BadInput(
                f"store {path}: every volume of the manifest must be there; {len(missing)} of {len(rows)} are missing, "
                f"first {', '.join(missing[:5])}; run prepare again with --resume"
            )
        return store

    @cached_property
    def _handles(self) -> dict[str, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes; each opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}

    def read_box(self, scan_id: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Read a box, (C, *size) int16; what lies outside the volume is the low end of the clip range (air).

        Raises: BadInput: if the volume cannot be read.
        """
        array = self._open(scan_id)
        shape = array.shape[1:]
        low = [min(max(s, 0), n) for s, n in zip(start, shape, strict=True)]
        high = [max(min(s + w, n), a) for s, w, n, a in zip(start, size, shape, low, strict=True)]
        try:
            inside = array[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
        except (RuntimeError, OSError) as error:
            raise BadInput(f"store: volume {scan_id} must be readable; {error}; delete it and run prepare --resume") from None
        if inside.shape[1:] == tuple(size):
            return inside
        box = np.full((array.shape[0], *size), round(self.clip[0]), dtype=np.int16)
        place = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        box[(slice(None), *place)] = inside
        return box

    def read(self, scan_id: str) -> np.ndarray:
        """Read a whole volume, (C, X, Y, Z) int16."""
        return self._open(scan_id)[...]

    def _open(self, scan_id: str) -> Any:
        if scan_id not in self._handles:
            if len(self._handles) >= 256:  # far below the usual limit of open files
                self._handles.pop(next(iter(self._handles)))
            try:
                self._handles[scan_id] = blosc2.open(str(volume_path(self.path, scan_id)), mode="r", dparams={"nthreads": 1})
            except (RuntimeError, OSError, ValueError) as error:
                raise BadInput(f"store: volume {scan_id} must be readable; {error}; delete it and run prepare --resume") from None
        return self._handles[scan_id]


def volume_path(store: Path, scan_id: str) -> Path:
    """File of one volume."""
    return store / "volumes" / f"{scan_id}.b2nd"


def write_volume(store: Path, scan_id: str, array_CXYZ: np.ndarray) -> None:
    """Write one volume, atomically; the same array gives the same bytes."""
    assert array_CXYZ.dtype == np.int16 and array_CXYZ.ndim == 4, "a stored volume is int16 (C, X, Y, Z)"
    chunks = (1, *(min(CHUNK_VOX, n) for n in array_CXYZ.shape[1:]))
    blocks = (1, *(min(BLOCK_VOX, n) for n in array_CXYZ.shape[1:]))
    with atomic(volume_path(store, scan_id)) as temporary:
        blosc2.asarray(
            np.ascontiguousarray(array_CXYZ),
            chunks=chunks,
            blocks=blocks,
            cparams={"codec": blosc2.Codec.LZ4, "clevel": 5, "nthreads": 1},
            urlpath=str(temporary),
            mode="w",
        )


def _row(row: dict[str, str]) -> StoredScan:
    named = ("scan_id", "patient_id", "split", "shape_vox", "body_start", "body_stop")
    shape, start, stop = (_whole(row[name]) for name in named[3:])
    return StoredScan(row["scan_id"], row["patient_id"], row["split"], shape, start, stop, {k: v for k, v in row.items() if k not in named})


def _whole(text: str) -> Size:
    x, y, z = (int(part) for part in text.split("x"))
    return x, y, z


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = (float(value) for value in values)
    return low, high
