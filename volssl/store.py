"""Prepared volumes on disk: one compressed chunked array per scan, of which a box is read without reading the file.

STORE/store.json     what holds for all: version, spacing, orientation, window, clip, dtype, recipe
STORE/manifest.csv   one row per scan; written last, so a store without it is not finished
STORE/volumes/<scan_id>.b2nd

A training machine needs only numpy and blosc2 for this file; a store is the same, byte for byte, whoever wrote it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from volssl.files import BadInput, atomic, read_csv, read_json, write_csv, write_json

VERSION = 3
READABLE = (2, 3)  # volumes of version 2 hold the values themselves, in other blocks; files say how they are to be read
CHUNKS = (1, 64, 64, 64)  # of (C, X, Y, Z)
BLOCKS = (1, 32, 32, 16)
# Both lose nothing, and are read alike. CT at 1 mm took 0.6 to 1.1 bytes per voxel "fast", 0.5 to 1.0 "small", which is read half as fast.
FAST: dict[str, Any] = {"codec": blosc2.Codec.LZ4HC, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE]}
SMALL: dict[str, Any] = {"codec": blosc2.Codec.ZSTD, "clevel": 3, "filters": [blosc2.Filter.BITSHUFFLE]}
# With each: every so many voxels along X the value itself is kept, differences between them. It divides the chunks.
PACKINGS = {"fast": (FAST, 16), "small": (SMALL, 32)}
LOW_BITS = np.int16(2**15 - 1)
OPEN_FILES = 256  # handles kept per process

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class About:
    """What holds for every volume of a store; store.json. `window` are the stored values that map to 0 and 1, `packing` see PACKINGS."""

    spacing_mm: tuple[float, float, float]
    modality: str
    window: tuple[float, float]
    clip: tuple[float, float]
    recipe: dict[str, Any]
    packing: str = "fast"
    orientation: str = "RAS"
    dtype: str = "int16"
    version: int = VERSION


@dataclass(frozen=True)
class Entry:
    """One stored scan; a row of manifest.csv. Affines are 16 numbers, row by row, voxel index to world mm (RAS+).

    `affine` belongs to the stored array, `original_affine` to the array of `original_shape` as the archive reads it: any voxel of
    one is found in the other through the world. `body_start` to `body_stop` is the body in voxels of the stored array.
    """

    scan_id: str
    patient_id: str
    modality: str
    split: str
    channels: int
    shape_vox: Triple
    body_start: Triple
    body_stop: Triple
    affine: tuple[float, ...]
    original_shape: Triple
    original_affine: tuple[float, ...]
    scaling: tuple[float, float]  # stored = original * scaling[0] + scaling[1], then clipped and rounded
    content_hash: str
    padding: float | None = None  # the value of the scan that was recognised as "nothing measured here"

    def row(self) -> dict[str, str]:
        """As text for manifest.csv; numbers of one cell are separated by blanks and come back exactly."""
        values = {key: "" if value is None else value for key, value in asdict(self).items()}
        return {key: " ".join(map(repr, value)) if isinstance(value, tuple) else str(value) for key, value in values.items()}

    @classmethod
    def of(cls, row: dict[str, str]) -> Entry:
        """From such a row. Raises: KeyError, ValueError: not such a row."""
        integers = ("shape_vox", "body_start", "body_stop", "original_shape")
        floats = ("affine", "original_affine", "scaling")
        values: dict[str, Any] = {one.name: row[one.name] for one in fields(cls)}
        values |= {key: tuple(map(int, values[key].split())) for key in integers}
        values |= {key: tuple(map(float, values[key].split())) for key in floats}
        values["channels"] = int(values["channels"])
        values["padding"] = float(values["padding"]) if values["padding"] else None
        return cls(**values)


@dataclass(frozen=True)
class _Open:
    # An open volume. Chunk n lies in the file from `ends[n]` to `ends[n + 1]`; None if the file does not tell. `steps`: see PACKINGS, or 0.
    path: Path
    array: Any
    ends: np.ndarray | None
    steps: int

    def hint(self, box: Sequence[tuple[int, int]]) -> None:
        # The disk may fetch all that a box needs at once, while it is decompressed chunk by chunk.
        if self.ends is None:
            return
        counts = [-(-n // m) for n, m in zip(self.array.shape, self.array.chunks, strict=True)]
        x, y, z = (range(a // m, (b - 1) // m + 1) for (a, b), m in zip(box, self.array.chunks[1:], strict=True))
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for place in itertools.product(range(counts[0]), x, y):
                row = ((place[0] * counts[1] + place[1]) * counts[2] + place[2]) * counts[3]
                begin, end = int(self.ends[row + z[0]]), int(self.ends[row + z[-1] + 1])
                if end > begin and not (_is_cached(handle, begin) and _is_cached(handle, end - 1)):
                    os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def _is_cached(handle: int, place: int) -> bool:
    # Whether this byte of a file is in memory: far cheaper than a hint for what is there. Some file systems do not tell.
    try:
        return os.preadv(handle, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def _chunk_ends(path: Path, array: Any) -> np.ndarray | None:
    """Where in a frame file its chunks begin, and the last one ends.

    Source: C-Blosc2, contiguous frame format: a header, the chunks, then their offsets as a chunk of int64; below 0 is a chunk that
    takes no room, being all zero. A file that is damaged here is found out when it is read.
    """
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(15)[11:15], "big")
        file.seek(header + array.schunk.cbytes)
        lead = file.read(16)
        try:
            packed: Any = blosc2.decompress2(lead + file.read(int.from_bytes(lead[12:16], "little") - 16))
            offsets = np.frombuffer(packed, np.int64)
        except (RuntimeError, ValueError):
            return None
    if len(offsets) != array.schunk.nchunks:
        return None
    ends = np.append(np.where(offsets < 0, array.schunk.cbytes, offsets), array.schunk.cbytes)
    return header + np.minimum.accumulate(ends[::-1])[::-1]


@dataclass
class Store:
    """An open store. Pickles as its path and rows; files are opened when they are first read."""

    path: Path
    about: About
    rows: list[Entry]
    _open: OrderedDict[str, _Open] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a finished store. Raises: BadInput: no store, of another version, or not finished."""
        path = Path(path)
        about = read_about(path)
        if not (path / "manifest.csv").is_file():
            raise BadInput(f"store {path}: must be finished; found no manifest.csv; run `volssl prepare` on it with --resume")
        try:
            rows = [Entry.of(row) for row in read_csv(path / "manifest.csv")]
        except (KeyError, ValueError, AttributeError) as error:
            raise BadInput(f"{path / 'manifest.csv'}: must be a manifest as prepare writes it; {error!r}") from None
        return cls(path, about, rows)

    @classmethod
    def create(cls, path: Path, about: About) -> Store:
        """Begin a store, or go on with one that says the same of itself. Raises: BadInput: it says something else."""
        path = Path(path)
        if (path / "store.json").exists():
            if (version := read_about(path).version) != VERSION:
                raise BadInput(
                    f"store {path}: must be of version {VERSION} to be resumed; found {version}, which is only read; use a new --out"
                )
            if read_json(path / "store.json") != json.loads(json.dumps(asdict(about))):
                raise BadInput(f"store {path}: must have been begun with the same recipe to be resumed; found another; use a new --out")
        else:
            write_json(path / "store.json", asdict(about))
        return cls(path, about, [])

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing of every volume."""
        return self.about.spacing_mm

    @property
    def window(self) -> tuple[float, float]:
        """Stored values that map to 0 and to 1."""
        return self.about.window

    def volume_path(self, scan_id: str) -> Path:
        """Where a volume lies. Raises: BadInput: not a pseudonym (a manifest is no way out of the folder)."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", scan_id):
            raise BadInput(f"store {self.path}: scan_id must be letters, digits, _ or -; found {scan_id!r}")
        return self.path / "volumes" / f"{scan_id}.b2nd"

    def write(self, array_CXYZ: np.ndarray, entry: Entry) -> None:
        """Write one volume with its entry inside, atomically; the same voxels give the same bytes. Raises: OSError."""
        assert array_CXYZ.dtype == np.int16, array_CXYZ.dtype
        assert array_CXYZ.shape == (entry.channels, *entry.shape_vox), (array_CXYZ.shape, entry)
        # By way of memory: the C library turns a full disk into an unclear error, the plain write does not.
        frame = _packed(array_CXYZ, json.dumps(entry.row(), sort_keys=True), self.about.packing)
        with atomic(self.volume_path(entry.scan_id)) as temporary:
            temporary.write_bytes(frame)

    def entry(self, scan_id: str) -> Entry | None:
        """The entry inside a stored volume, or None if it is not stored. Raises: BadInput: damaged."""
        path = self.volume_path(scan_id)
        if not path.is_file():
            return None
        try:
            return Entry.of(json.loads(self._opened(scan_id).array.schunk.vlmeta["entry"]))
        except (KeyError, ValueError):
            raise BadInput(f"{path}: must hold its entry; found none; delete the file and prepare it again") from None

    def finish(self, rows: Iterable[Entry]) -> None:
        """Write manifest.csv from entries in the order of their scan_id, one by one: from now on the store opens."""
        write_csv(self.path / "manifest.csv", (row.row() for row in rows), [one.name for one in fields(Entry)])

    def read_box(self, scan_id: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Voxels from `start` on, `size` of them along X, Y, Z: int16 (C, X, Y, Z).

        Only the chunks that it touches are read. It may reach outside: there is air, the lower end of the window.
        """
        array = self._opened(scan_id).array
        shape = array.shape[1:]
        inner = [(max(0, int(a)), min(n, int(a) + int(w))) for a, w, n in zip(start, size, shape, strict=True)]
        if all(a == int(s) and b - a == int(w) for (a, b), s, w in zip(inner, start, size, strict=True)):
            return self._part(scan_id, inner)
        box = np.full((array.shape[0], *(int(w) for w in size)), round(self.window[0]), dtype=np.int16)
        if all(a < b for a, b in inner):
            where = tuple(slice(a - int(s), b - int(s)) for (a, b), s in zip(inner, start, strict=True))
            box[(slice(None), *where)] = self._part(scan_id, inner)
        return box

    def _part(self, scan_id: str, box: Sequence[tuple[int, int]]) -> np.ndarray:
        opened, (first, _) = self._opened(scan_id), box[0]
        begin = first - first % opened.steps if opened.steps else first
        box = [(begin, box[0][1]), *box[1:]]
        opened.hint(box)
        part_CXYZ = np.empty((opened.array.shape[0], *(b - a for a, b in box)), np.int16)
        try:
            # What indexing ends in; its own checks take a tenth of the time.
            opened.array.get_slice_numpy(part_CXYZ, ([0, *(a for a, _ in box)], [len(part_CXYZ), *(b for _, b in box)]))
        except RuntimeError:
            raise BadInput(f"{self.volume_path(scan_id)}: must be whole; found damage; delete it and prepare again") from None
        if opened.steps:
            _sum(part_CXYZ, opened.steps)
        return part_CXYZ[:, first - begin :]

    def _opened(self, scan_id: str) -> _Open:
        if scan_id in self._open:
            self._open.move_to_end(scan_id)
            return self._open[scan_id]
        path = self.volume_path(scan_id)
        try:
            # Mapped, since the library else opens the file once for each block, and asks the server each time where it lies on one.
            mapped: Any = "r"
            array: Any = blosc2.open(str(path), mode="r", mmap_mode=mapped, dparams={"nthreads": 1})
            steps = int(array.schunk.vlmeta["steps"]) if "steps" in array.schunk.vlmeta else 0
        except (RuntimeError, OSError, ValueError) as error:
            raise BadInput(f"{path}: must be a stored volume; {type(error).__name__} while opening it; prepare it again") from None
        if array.ndim != 4 or array.dtype != np.int16:
            raise BadInput(f"{path}: must be int16 (C, X, Y, Z); found {array.dtype} with {array.ndim} axes; prepare it again")
        self._open[scan_id] = _Open(path, array, _chunk_ends(path, array), steps)
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[scan_id]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}


def _packed(array_CXYZ: np.ndarray, entry: str, packing: str) -> bytes:
    how, steps = PACKINGS[packing]
    cparams = blosc2.CParams(**how, nthreads=1)  # one thread, so that the bytes do not depend on the machine
    with _one_thread():
        packed: Any = blosc2.empty(array_CXYZ.shape, np.dtype(np.int16), chunks=CHUNKS, blocks=BLOCKS, cparams=cparams)
        for begin in range(0, array_CXYZ.shape[1], CHUNKS[1]):
            packed[:, begin : begin + CHUNKS[1]] = _differences(array_CXYZ[:, begin : begin + CHUNKS[1]], steps)
        packed.schunk.vlmeta["entry"] = entry
        packed.schunk.vlmeta["steps"] = steps
        return packed.to_cframe()


def _differences(array_CXYZ: np.ndarray, steps: int) -> np.ndarray:
    """What is packed: the value at every `steps`-th voxel along X, between them the difference from the one before, modulo 2^16.

    Of numbers below 0 all bits but the sign are flipped, so that small ones of either sign have the same high bits, and bit-shuffled
    planes of them are empty. Source: own; noise of a CT is correlated beyond a voxel, so differences need fewer bits.
    """
    made = np.array(array_CXYZ, order="C")
    made[:, 1:] -= array_CXYZ[:, :-1]
    made[:, ::steps] = array_CXYZ[:, ::steps]
    made ^= (made >> 15) & LOW_BITS
    return made


def _sum(made_CXYZ: np.ndarray, steps: int) -> None:
    """The voxels back, in place, from differences that begin at a multiple of `steps`."""
    sign = np.empty_like(made_CXYZ[:, :steps])  # small, so that it stays in the cache and its memory with the process
    for begin in range(0, made_CXYZ.shape[1], steps):
        some = made_CXYZ[:, begin : begin + steps]
        here = np.right_shift(some, 15, out=sign[:, : some.shape[1]])
        here &= LOW_BITS
        some ^= here
    for at in range(1, min(steps, made_CXYZ.shape[1])):
        here = made_CXYZ[:, at::steps]
        here += made_CXYZ[:, at - 1 :: steps][:, : here.shape[1]]


@contextmanager
def _one_thread() -> Iterator[None]:
    # The C library writes into the file how many threads wrote it, and takes this variable, or its absence, for more than our parameter.
    before = os.environ.get("BLOSC_NTHREADS")
    os.environ["BLOSC_NTHREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["BLOSC_NTHREADS"]
        else:
            os.environ["BLOSC_NTHREADS"] = before


def read_about(path: Path) -> About:
    """Read store.json. Raises: BadInput: not there, or of another version."""
    if not (Path(path) / "store.json").is_file():
        raise BadInput(f"store {path}: must be a folder that `volssl prepare` wrote; found no store.json")
    values = read_json(Path(path) / "store.json")
    version = values.get("version") if isinstance(values, dict) else None
    if version not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise BadInput(f"store {path}: must be of version {known}; found {version!r}; prepare it again with this volssl")
    try:
        made: dict[str, Any] = values | {key: tuple(values[key]) for key in ("spacing_mm", "window", "clip")}
        return About(**made)
    except (KeyError, TypeError) as error:
        raise BadInput(f"{Path(path) / 'store.json'}: must be as prepare writes it; {error}") from None
