"""The store against what others keep: bytes on disk, and the time to read a random patch, warm and cold.

    python tools/bench_store.py [--shape 512 512 240] [--scan FILE_OR_FOLDER] [--patches 16] [--rounds 7] [--work FOLDER] [--out FILE]

One CT is resampled to 1 mm and cropped to the body, once. Every side keeps that same array:
- store: `volssl.store`, int16; files stay open, as in training. small: the same with `packing: small`.
- nnU-Net: float32, z-scored, not rounded, blosc2 with ZSTD level 8, blocks and chunks as its rule gives for a patch of this size;
  opened for every patch with mmap and one thread, as its loader does. Written from its description, not its code. Its size is told
  twice: clipped to the 0.5 and 99.5 percentiles, as nnU-Net does with every CT, here of the whole body (its labels are a part of it, with
  a range no wider), which makes all air one value; and with the range of the store. The goal is held against both, patches of the latter.
- zarr v3: int16 in chunks of 64^3, default compressor. Left out, and said so, where zarr is not installed (extra `bench`).
- gzip NIfTI: int16, read by nibabel's array proxy.  torch.save: the float32 array.
Cold: the files are put out of the page cache before each patch. All ratios are medians over rounds in which the sides take turns.
Seconds of the wall are counted, so run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import torch
from paired import Row, paired, report, row, share, timed
from scans import drop, torso

from volssl.archive import read_image
from volssl.body import Body, Intensity, find_body, with_margin
from volssl.resample import resample
from volssl.store import About, Entry, Store
from volssl.volume import Volume

Patch = Sequence[int]
Read = Callable[[Patch], Any]
SMALL, CLIPPED = "store, small", "nnU-Net, clipped"
L1_BYTES, L3_BYTES, SAFETY = 32768, 1441792, 0.8  # the caches that nnU-Net's rule fills


@dataclass(frozen=True)
class Side:
    """One way to keep the array: its file or folder, and how to read a patch (start, voxels)."""

    path: Path
    read: Read


def prepared(scan: Volume) -> np.ndarray:
    """HU (XYZ, float32, not rounded) on 1 mm, cropped to the body, clipped."""
    volume = scan.reoriented("RAS")
    found = find_body(volume, Body(threshold=-500.0))
    if found is None:
        raise SystemExit("bench_store: the scan must show a body; found none")
    part = volume.cropped(*with_margin(volume.grid, found, 5.0))
    low, high = Intensity().clip
    clipped = Volume(np.clip(part.array_CXYZ, low, high).astype(np.float32), part.grid)
    return resample(clipped, part.grid.resampled((1, 1, 1)), fill=low).array_CXYZ[0]


def nnunet_sizes(shape: Sequence[int], side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and blocks (C, X, Y, Z) of a float32 channel: blocks halve from the patch until L1 holds them, chunks grow to fill L3."""
    block = [2 ** (side - 1).bit_length()] * 3
    while 4 * np.prod(block) > L1_BYTES * SAFETY:
        block[int(np.argmax(block))] //= 2
    chunk = list(block)
    while 4 * np.prod(chunk) < L3_BYTES * SAFETY and np.mean(chunk) / side <= 1.5:
        chunk[int(np.argmin(chunk))] += block[0]
    return (1, *map(min, zip(chunk, shape, strict=True))), (1, *map(min, zip(block, shape, strict=True)))


def sides(work: Path, exact_XYZ: np.ndarray, side: int) -> dict[str, Side]:
    """Write the array in every way."""
    whole_XYZ = np.rint(exact_XYZ).astype(np.int16)
    body = exact_XYZ[exact_XYZ > -500]
    clipped_XYZ = np.clip(exact_XYZ, *np.percentile(body, (0.5, 99.5)))
    made = {"store": _store(work, whole_XYZ, side=side, packing="fast"), SMALL: _store(work, whole_XYZ, side=side, packing="small")}
    made |= {name: _nnunet(work / f"{name}.b2nd", array, side) for name, array in (("nnU-Net", exact_XYZ), (CLIPPED, clipped_XYZ))}
    if importlib.util.find_spec("zarr"):
        made["zarr v3"] = _zarr(work, whole_XYZ, side)
    made["gzip NIfTI"] = _nifti(work, whole_XYZ, side)
    return made


def _box(start: Patch, side: int) -> tuple[slice, ...]:
    return tuple(slice(a, a + side) for a in start)


def _store(work: Path, whole_XYZ: np.ndarray, *, side: int, packing: str) -> Side:
    about = About((1.0, 1.0, 1.0), "CT", (-1000.0, 1000.0), (-1024.0, 3071.0), recipe={}, packing=packing)
    store = Store.create(work / packing, about)
    x, y, z = whole_XYZ.shape
    eye = tuple(np.eye(4).ravel().tolist())
    entry = Entry("S1", "P1", "CT", "train", 1, (x, y, z), (0, 0, 0), (x, y, z), eye, (x, y, z), eye, (1.0, 0.0), "c")
    store.write(whole_XYZ[None], entry)
    return Side(store.volume_path("S1"), lambda start: store.read_box("S1", start, (side,) * 3))


def _nnunet(path: Path, exact_XYZ: np.ndarray, side: int) -> Side:
    body = exact_XYZ[exact_XYZ > -500]
    scored: Any = ((exact_XYZ - body.mean()) / body.std()).astype(np.float32)[None]
    chunks, blocks = nnunet_sizes(exact_XYZ.shape, side)
    packing: Any = {"codec": blosc2.Codec.ZSTD, "clevel": 8}
    blosc2.asarray(scored, urlpath=str(path), chunks=chunks, blocks=blocks, cparams=packing)

    def read(start: Patch) -> Any:
        mapped: Any = "r"
        array: Any = blosc2.open(str(path), mode="r", mmap_mode=mapped, dparams={"nthreads": 1})
        return array[(slice(None), *_box(start, side))]

    return Side(path, read)


def _zarr(work: Path, whole_XYZ: np.ndarray, side: int) -> Side:
    module: Any = importlib.import_module("zarr")
    array = module.create_array(store=str(work / "zarr"), shape=whole_XYZ.shape, chunks=(64, 64, 64), dtype="int16")
    array[:] = whole_XYZ
    kept = module.open_array(str(work / "zarr"), mode="r")
    return Side(work / "zarr", lambda start: kept[_box(start, side)])


def _nifti(work: Path, whole_XYZ: np.ndarray, side: int) -> Side:
    path = work / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(whole_XYZ, np.eye(4)), path)

    def read(start: Patch) -> Any:
        image: Any = nibabel.load(path)
        return np.asarray(image.dataobj[_box(start, side)])

    return Side(path, read)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def sizes(made: dict[str, Side], voxels: int) -> list[Row]:
    """Bytes per voxel of the store and of the others."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(voxels), buffer)  # not compressed: the values do not matter
    others = {
        "nnU-Net": (_bytes(made["nnU-Net"].path), 0.4),
        CLIPPED: (_bytes(made[CLIPPED].path), 0.4),
        "float32 torch.save": (buffer.getbuffer().nbytes, 0.2),
        "gzip NIfTI": (_bytes(made["gzip NIfTI"].path), None),
    }
    return [
        share(f"size: {ours} / {name}", ([size / voxels], [_bytes(made[ours].path) / voxels]), "bytes/voxel", goal)
        for ours in ("store", SMALL)
        for name, (size, goal) in others.items()
    ]


def warm(made: dict[str, Side], starts: Sequence[Patch], rounds: int) -> list[Row]:
    """A patch out of the page cache: how many times as long the others take."""
    goals = {"nnU-Net": 1.0, "zarr v3": 5.0, "gzip NIfTI": 100.0}
    rows = []
    for name, goal in goals.items():
        if name not in made:
            continue
        some = starts[: 1 if name == "gzip NIfTI" else len(starts)]  # the slow one takes a second each

        def all_of(read: Read, some: Sequence[Patch] = some) -> Callable[[], object]:
            return lambda: [read(start) for start in some]

        ours = {of: all_of(made[of].read) for of in ("store", SMALL)}
        seconds = paired(all_of(made[name].read), ours, rounds=rounds, clock=time.perf_counter)
        rows += [row(f"warm: {name} / {of}", seconds[of], per=len(some), goal=goal) for of in ours]
    return rows


def cold(made: dict[str, Side], starts: Sequence[Patch]) -> list[Row]:
    """A patch from the disk: the store's share of the time of nnU-Net's mmap read."""
    seconds: dict[str, list[float]] = {name: [] for name in ("nnU-Net", "store", SMALL)}
    for start in starts:
        for name, into in seconds.items():
            drop(made[name].path)
            into.append(1e3 * timed(lambda name=name, start=start: made[name].read(start), time.perf_counter))
    return [share(f"cold: {name} / nnU-Net", (seconds["nnU-Net"], seconds[name]), "ms", 0.5) for name in ("store", SMALL)]


def main() -> None:
    """Measure, print the rows and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 240), help="voxels of the synthetic torso")
    parser.add_argument("--scan", type=Path, help="a CT instead of the synthetic one: a file, or a folder of one DICOM series")
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--patches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="where to put the files: a folder on the disk to be measured")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["BLOSC_NTHREADS"] = "1"
    scan = read_image(given.scan) if given.scan else _as_volume(*torso(tuple(given.shape)))
    exact_XYZ = prepared(scan)
    rng = np.random.default_rng(0)
    starts = [[int(rng.integers(0, max(1, n - given.patch + 1))) for n in exact_XYZ.shape] for _ in range(given.patches)]
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        made = sides(Path(work), exact_XYZ, given.patch)
        rows = sizes(made, exact_XYZ.size) + warm(made, starts, given.rounds) + cold(made, starts)
    title = f"store of {'x'.join(map(str, exact_XYZ.shape))} voxels; patches of {given.patch}^3; one thread"
    report(title if "zarr v3" in made else f"{title}; zarr left out: not installed (extra bench)", rows, given.out)


def _as_volume(array_XYZ: np.ndarray, grid: Any) -> Volume:
    return Volume(array_XYZ[None], grid)


if __name__ == "__main__":
    main()
