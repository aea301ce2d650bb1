"""Preparing scans: time against SimpleITK's read and resample alone, memory of a long scan, several workers, many rows.

    python tools/bench_prepare.py [--rounds 7] [--slices 240] [--only time memory workers rows] [--work FOLDER] [--out FILE]

time     One CT of 512x512x240 (a synthetic torso, uncompressed DICOM, and the same as NIfTI). Reference: SimpleITK's series reader, given
         the sorted files, and its linear resampling of the whole scan to 1 mm; nothing is stored. Ours: read, find the body, resample to
         1 mm without aliasing, crop, store on disk. Both keep to one thread; CPU seconds are counted, the sides take turns.
memory   Peak resident memory of a fresh process that prepares 512x512x1000, as DICOM.
workers  Seconds of the wall to prepare eight scans with 1 and with 2 workers, their start included.
rows     Peak memory of prepare over an index of 1,000 and of 100,000 rows, all but one of which point nowhere.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from paired import Row, paired, report, share
from scans import torso, write_dicom

from volssl import archive, index, prepare
from volssl.body import Body
from volssl.pools import Means
from volssl.rows import SourcesFile, load, write_rows
from volssl.store import About, Store

SETTINGS = prepare.Settings(body=Body(threshold=-500.0))


def _store(folder: Path) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    made = SETTINGS.intensity
    return Store.create(folder, About(SETTINGS.spacing_mm, "CT", made.window, made.clip, recipe={}))


def _index(files: Path, folder: Path) -> Path:
    return index.build([files], out=folder, gates=index.Gates(modality="CT")).out


def reference(files: list[Path]) -> Callable[[], object]:
    """SimpleITK alone: read, and resample everything to 1 mm."""

    def run() -> object:
        if len(files) > 1:
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames([str(file) for file in files])
            image = reader.Execute()
        else:
            image = sitk.ReadImage(str(files[0]))
        size = [round(n * mm) for n, mm in zip(image.GetSize(), image.GetSpacing(), strict=True)]
        start, turn = image.GetOrigin(), image.GetDirection()
        return sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, start, (1.0, 1.0, 1.0), turn, -1024)

    return run


def ours(indexed: Path, folder: Path) -> Callable[[], object]:
    """What a worker does with the one scan of an index."""
    store, loaded = _store(folder), load(indexed)
    (row,) = loaded.rows

    def run() -> object:
        code = prepare.prepare_one(store, SETTINGS, row, loaded.sources[row.scan_id])
        assert not code, code
        return code

    return run


def measure_time(work: Path, slices: int, rounds: int) -> list[Row]:
    """The time of one scan, as DICOM and as NIfTI."""
    files = write_dicom(work / "dicom", (512, 512, slices))
    volume = archive.read_files(files)
    archive.write_nifti(work / "nifti/scan.nii", volume.array_CXYZ[0], volume.grid, np.int16)
    rows = []
    for name, given in (("DICOM", files), ("NIfTI", [work / "nifti/scan.nii"])):
        indexed = _index(given[0].parent, work / f"index_{name}")
        seconds = paired(reference(given), {"ours": ours(indexed, work / f"store_{name}")}, rounds=rounds)["ours"]
        rows.append(share(f"time: prepare / SimpleITK read + resample, {name}", seconds, "s", 0.9))
    return rows


def _peak(indexed: Path, folder: Path) -> float:
    # In a process of its own: the peak of all that it ever held, in GB.
    ours(indexed, folder)()
    return _peak_kib() * 1024 / 1e9


def _peak_kib() -> int:
    # Not getrusage: its peak begins with what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def measure_memory(work: Path) -> list[Row]:
    """The peak of a long scan."""
    write_dicom(work / "long", (512, 512, 1000))
    indexed = _index(work / "long", work / "index_long")
    peak = _fresh(_peak, indexed, work / "store_long")
    return [Row("memory: 512x512x1000, GB against 2 GB", "GB", 2.0, peak, peak / 2.0, peak / 2.0, peak / 2.0, 1.0, at_most=True)]


def _fresh(function: Callable[..., float], *args: object) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure_workers(work: Path, slices: int) -> list[Row]:
    """Eight scans with one and with two workers."""
    hu, grid = torso((512, 512, slices // 4 * 4))
    for number in range(8):
        archive.write_nifti(work / f"eight/{number}.nii", hu + np.int16(number), grid, np.int16)
    indexed = _index(work / "eight", work / "index_eight")
    seconds = {}
    for workers in (1, 2):
        begun = time.perf_counter()
        prepare.run(indexed, out=work / f"by{workers}", means=Means(workers=workers))
        seconds[workers] = time.perf_counter() - begun
        shutil.rmtree(work / f"by{workers}")
    ratio = seconds[1] / seconds[2]
    return [Row(f"workers: 1 -> 2, eight scans, {os.cpu_count()} cores", "s", seconds[1], seconds[2], ratio, ratio, ratio)]


def _peak_of_rows(indexed: Path, folder: Path) -> float:
    before = _peak_kib()
    prepare.run(indexed, out=folder, means=Means(ignore_space=True))
    return (_peak_kib() - before) / 1024


def measure_rows(work: Path) -> list[Row]:
    """MiB that a run needs beyond its start, over few and many rows."""
    archive.write_nifti(work / "one/scan.nii", *torso((64, 64, 40)), np.int16)
    loaded = load(_index(work / "one", work / "index_one"))
    (row,) = loaded.rows
    source = loaded.sources[row.scan_id]
    gone = replace(source, files=tuple(work / f"gone/{number:04d}.dcm" for number in range(300)))
    peaks = []
    for count in (1000, 100_000):
        names = [f"S{number:016x}" for number in range(count - 1)]
        folder = work / f"index_{count}"
        shutil.copytree(work / "index_one", folder)
        write_rows(folder / "index.csv", sorted([row, *(replace(row, scan_id=name) for name in names)], key=lambda row: row.scan_id))
        with SourcesFile(folder / "private") as sources:
            for scan_id, one in [(row.scan_id, source), *((name, gone) for name in names)]:
                sources.add(scan_id, one)
        peaks.append(_fresh(_peak_of_rows, folder, work / f"store_{count}"))
    ratio = peaks[1] / peaks[0]
    return [Row("rows: 1,000 -> 100,000, memory beyond the start", "MiB", peaks[0], peaks[1], ratio, ratio, ratio)]


def main() -> None:
    """Measure, print the rows and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slices", type=int, default=240)
    parser.add_argument("--only", nargs="+", choices=("time", "memory", "workers", "rows"), default=("time", "memory", "workers", "rows"))
    parser.add_argument("--work", type=Path, help="where to put the files: a folder on the disk to be measured")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["BLOSC_NTHREADS"] = "1"
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "time": lambda work: measure_time(work, given.slices, given.rounds),
        "memory": measure_memory,
        "workers": lambda work: measure_workers(work, given.slices // 2),
        "rows": measure_rows,
    }
    rows = []
    for name in given.only:
        with tempfile.TemporaryDirectory(dir=given.work) as work:
            rows += parts[name](Path(work))
    report("preparing scans; one thread a process", rows, given.out)


if __name__ == "__main__":
    main()
