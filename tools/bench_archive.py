"""Measure the header scan against pydicom, in turns, and the memory of an index of many series.

    python tools/bench_archive.py [--files 10000] [--series 10000 100000] [--workers 0 1 2]

Prints one line per figure. Both sides read the same files in blocks, in turns, the first of each pair changing; a first pass over all files
warms the cache and holds that both give the same values. Memory is the peak of a process of its own that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from volssl import headers, index
from volssl.dicom import general_value
from volssl.dicom_write import write_dicom_series
from volssl.fingerprint import Print, twins
from volssl.gates import Gates
from volssl.volume import Grid

TAGS = """SOPInstanceUID PatientID StudyInstanceUID SeriesInstanceUID Modality ImageType Rows Columns BitsAllocated BitsStored
    PixelRepresentation RescaleSlope RescaleIntercept PixelSpacing ImagePositionPatient ImageOrientationPatient InstanceNumber""".split()
BLOCK = 500


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="The header scan against pydicom, and the memory of an index.")
    parser.add_argument("--files", type=int, default=10_000, help="DICOM files of the header scan; 0 leaves it out")
    parser.add_argument("--series", type=int, nargs="*", default=[10_000, 100_000], help="series of the indices whose memory is measured")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="workers of the index whose time is measured")
    parser.add_argument("--index", nargs=2, metavar=("ARCHIVE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.index:
        _index_alone(Path(given.index[0]), Path(given.index[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.files:
            files = _scanner_like(Path(folder) / "archive", given.files)
            _bench_headers(files)
            _bench_workers(Path(folder), given.workers)
        _bench_memory(Path(folder), given.series)


def _scanner_like(folder: Path, count: int) -> list[Path]:
    # Series of 100 slices with about as many elements as a scanner writes, some of them private, some in sequences.
    grid = Grid((32, 32, 100), np.diag([-0.7, -0.7, 1.5, 1.0]))
    array = np.random.default_rng(0).integers(-1000, 1000, grid.shape_vox)
    for series in range(-(-count // 100)):
        tags = {"PatientID": f"patient {series // 3}", "StudyInstanceUID": f"2.25.1{series // 3}", "SeriesInstanceUID": f"2.25.2{series}"}
        write_dicom_series(folder / f"{series}", array, grid, tags=tags)
    files = sorted(folder.rglob("*.dcm"))[:count]
    for path in files:
        data = pydicom.dcmread(path)
        for number in range(40):
            data.add_new(0x00191000 + number, "LO" if number % 4 else "OB", "a private value" if number % 4 else bytes(64))
        for keyword in "StudyDate SeriesDate StudyTime SeriesTime KVP XRayTubeCurrent ExposureTime GantryDetectorTilt TableHeight".split():
            setattr(data, keyword, {"e": "20200102"}.get(keyword[-1], "1") if "Date" in keyword else "101010")
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2", "2.25.3"
        data.ReferencedImageSequence = [item, item]
        data["ReferencedImageSequence"].is_undefined_length = True
        data.save_as(path)
    return files


def _by_pydicom(path: Path) -> dict[str, tuple[object, ...]]:
    data = pydicom.dcmread(path, specific_tags=list(TAGS), stop_before_pixels=True)
    return {keyword: general_value(data.get(keyword)) for keyword in TAGS}


def _by_walk(path: Path) -> dict[str, tuple[object, ...]]:
    values = headers.scan(path).values
    return {keyword: values.get(keyword, ()) for keyword in TAGS}


def _seconds(read: Callable[[Path], object], files: Sequence[Path]) -> float:
    begun = time.perf_counter()
    for path in files:
        read(path)
    return time.perf_counter() - begun


def _bench_headers(files: Sequence[Path]) -> None:
    warnings.simplefilter("ignore")
    differ = sum(_by_pydicom(path) != _by_walk(path) for path in files)
    ratios, ours, theirs = [], 0.0, 0.0
    for number, begin in enumerate(range(0, len(files), BLOCK)):
        block, took = files[begin : begin + BLOCK], {}
        for read in (_by_walk, _by_pydicom) if number % 2 else (_by_pydicom, _by_walk):
            took[read] = _seconds(read, block)
        ours, theirs = ours + took[_by_walk], theirs + took[_by_pydicom]
        ratios.append(took[_by_pydicom] / took[_by_walk])
    print(f"headers: {len(files)} files, {len(TAGS)} tags, {differ} files with other values than pydicom's")
    print(f"headers: pydicom specific_tags {1e6 * theirs / len(files):.0f} us a file, lean walk {1e6 * ours / len(files):.0f} us a file")
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    print(f"headers: ratio {statistics.median(ratios):.1f} (median of {len(ratios)} pairs of blocks of {BLOCK}; {spread})")


def _bench_workers(folder: Path, workers: Sequence[int]) -> None:
    for count in workers:
        begun, busy = time.perf_counter(), time.process_time()
        index.build([folder / "archive"], out=folder / f"by{count}", workers=count, gates=Gates(thumbnails=False))
        took, busy = time.perf_counter() - begun, time.process_time() - busy
        print(f"index: {count} workers {took:.1f} s; CPU of the process that gathers {busy:.2f} s")


def _bench_memory(folder: Path, counts: Sequence[int]) -> None:
    grid = Grid((4, 4, 1), np.diag([-1.0, -1.0, 2.0, 1.0]))
    tags = {"PatientID": "J1000000", "StudyInstanceUID": "2.25.3000000", "SeriesInstanceUID": "2.25.1000000"}
    write_dicom_series(folder / "one", np.zeros((4, 4, 1)), grid, tags=tags)
    (template,) = [path.read_bytes() for path in (folder / "one").iterdir()]
    for count in counts:
        archive = folder / f"tiny{count}"
        for number in range(count):
            if number % 1000 == 0:
                (archive / f"{number // 1000}").mkdir(parents=True)
            tail = f"{number:06}".encode()
            made = (
                template.replace(b"2.25.1000000", b"2.25.1" + tail)
                .replace(b"J1000000", b"J1" + tail)
                .replace(b"2.25.3000000", b"2.25.3" + tail)
            )
            (archive / f"{number // 1000}" / f"{number}").write_bytes(made)
        command = [sys.executable, __file__, "--index", str(archive), str(folder / f"index{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"memory: index of {count} series: {done.stdout.strip()}")
        _bench_twins(count)


def _index_alone(archive: Path, out: Path) -> None:
    before = _peak_mib()
    begun = time.perf_counter()
    index.build([archive], out=out, gates=Gates(thumbnails=False))
    took, size = time.perf_counter() - begun, (out / "index.csv").stat().st_size / 2**20
    print(f"{_peak_mib():.0f} MiB at its peak, {before:.0f} before; {took:.0f} s; index.csv {size:.0f} MiB")


def _peak_mib() -> float:
    # Not by getrusage, whose peak is handed on from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _bench_twins(count: int) -> None:
    rng = np.random.default_rng(0)
    prints = [(Print((512, 512, 100), 2, rng.standard_normal(64).astype(np.float32)),) for _ in range(count)]
    begun = time.perf_counter()
    found = len(list(twins([str(number) for number in range(count)], [*prints], tolerance=1e-3)))
    print(f"copies: {count} scans of one shape compared in {time.perf_counter() - begun:.1f} s, {found} found")


if __name__ == "__main__":
    main()
