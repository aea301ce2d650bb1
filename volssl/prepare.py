"""Verb prepare: every accepted scan of an index becomes a store entry: RAS+, cropped to the body, resampled, int16.

Killed at any moment and run again with --resume, it leaves the very bytes of an undisturbed run: each volume is written whole or not
at all and carries its own entry, and manifest.csv comes last.
"""

from __future__ import annotations

import errno
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from volssl import archive
from volssl.files import BadInput, Outcome, claim_out, track, write_csv
from volssl.index import Row
from volssl.index import load as load_index
from volssl.preview import write_preview
from volssl.recipe import load as load_recipe
from volssl.recipe import parse
from volssl.store import About, Entry, Store
from volssl.volume import Grid, Volume

FWHM_PER_SIGMA = 2.3548200450309493  # 2 sqrt(2 ln 2)
COARSE_MM = 3.0  # the body is looked for on about this spacing
FAILURES = ["scan_id", "reason"]


@dataclass(frozen=True)
class Body:
    """How the body is told from air: values above `threshold`; without one, above `share` of the robust range (0.5 to 99.5 %)."""

    threshold: float | None = None
    share: float = 0.1
    margin_mm: float = 5.0


@dataclass(frozen=True)
class Intensity:
    """What is stored. Without `percentiles` values stay as they are (HU); with them, those two of the body become the window's ends."""

    clip: tuple[float, float] = (-1024.0, 3071.0)
    window: tuple[float, float] = (-1000.0, 1000.0)
    percentiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Settings:
    """A recipe of prepare."""

    modality: str = "CT"
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    body: Body = field(default_factory=Body)
    intensity: Intensity = field(default_factory=Intensity)

    def __post_init__(self) -> None:
        low, high = self.intensity.clip
        if min(self.spacing_mm) <= 0:
            raise BadInput(f"spacing_mm: must be > 0; found {self.spacing_mm}")
        if not (-(2**15) <= low < high < 2**15):
            raise BadInput(f"intensity.clip: must rise and fit int16; found {self.intensity.clip}")
        if self.intensity.window[0] >= self.intensity.window[1]:
            raise BadInput(f"intensity.window: must rise; found {self.intensity.window}")


def run(
    index: Path,
    *,
    out: Path,
    recipe: str | Path = "prepare_ct",
    workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Prepare all accepted scans of `index` into a store.

    Args: index: from `volssl index`. recipe: a file or a shipped name, with `overrides` "key=value".
        workers: spawned processes; 0 works in this one. resume: keep what is there and do what is missing.
    Returns: `failed` counts the scans in failures.csv.
    Raises: BadInput: no such index, a faulty recipe, `out` in use or begun with another recipe, nothing to prepare, disk full.
    """
    settings = _settings(recipe, overrides)
    rows, sources = _accepted(index)
    about = About(
        spacing_mm=settings.spacing_mm,
        modality=settings.modality,
        window=settings.intensity.window,
        clip=settings.intensity.clip,
        recipe=asdict(settings),
    )
    out = claim_out(out, resume=resume, overwrite=overwrite)
    try:
        store = Store.create(out, about)
        _sweep(out)
        entries, failures = _prepare_all(store, settings, rows, sources, workers)
        write_csv(out / "failures.csv", [{"scan_id": key, "reason": failures[key]} for key in sorted(failures)], FAILURES)
        if not entries:
            reasons = ", ".join(sorted(set(failures.values())))
            raise BadInput(f"prepare {index}: no scan could be prepared; found {reasons}; see {out / 'failures.csv'}")
        store.finish(entries)
        write_preview(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadInput(f"--out {out}: the disk is full; make room and run again with --resume") from None
    return Outcome(out, len(failures), f"{len(entries)} of {len(rows)} accepted scans prepared")


def _settings(recipe: str | Path, overrides: Sequence[str]) -> Settings:
    values = load_recipe(recipe, overrides, verb="prepare")
    return parse({"prepare": values}, {"prepare": Settings}, str(recipe))["prepare"]


def _accepted(index: Path) -> tuple[list[Row], Mapping[str, archive.Source]]:
    loaded = load_index(index)
    rows = [row for row in loaded.rows if row.verdict in ("accept", "repair")]
    if not rows:
        raise BadInput(f"index {index}: must hold accepted scans; found none of {len(loaded.rows)}")
    return rows, loaded.sources


def _sweep(out: Path) -> None:
    # What a killed run was about to write. Its unfinished manifest must not outlive a resumed run that fails.
    for left in [*out.glob(".tmp-*"), *(out / "volumes").glob(".tmp-*")]:
        left.unlink()
    (out / "manifest.csv").unlink(missing_ok=True)


def _prepare_all(
    store: Store, settings: Settings, rows: Sequence[Row], sources: Mapping[str, archive.Source], workers: int
) -> tuple[list[Entry], dict[str, str]]:
    entries: list[Entry] = []
    failures: dict[str, str] = {}
    jobs: list[tuple[Row, archive.Source]] = []
    for row in rows:
        done = _stored(store, row)
        if done:
            entries.append(done)
        elif row.modality != settings.modality:
            failures[row.scan_id] = "other_modality"
        else:
            jobs.append((row, sources[row.scan_id]))
    answers = _answers(store, settings, jobs, workers)
    for scan_id, answer in track(answers, total=len(jobs), label="prepare"):
        if isinstance(answer, Entry):
            entries.append(answer)
        else:
            failures[scan_id] = answer
    return entries, failures


def _stored(store: Store, row: Row) -> Entry | None:
    # What an earlier run left of this very scan; a file that cannot be opened is written again.
    try:
        entry = store.entry(row.scan_id)
    except BadInput:
        return None
    if entry is None or entry.content_hash != row.content_hash:
        return None
    kept = replace(entry, split=row.split, patient_id=row.patient_id)
    return kept if kept == entry else None


def _answers(
    store: Store, settings: Settings, jobs: Sequence[tuple[Row, archive.Source]], workers: int
) -> Iterator[tuple[str, Entry | str]]:
    if workers == 0:
        for row, source in jobs:
            yield row.scan_id, prepare_one(store, settings, row, source)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from _through(pool, store, settings, jobs, ahead=2 * workers)
        except BrokenProcessPool:
            raise BadInput(
                "prepare: a worker process was killed, mostly for want of memory; run again with --resume and fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _through(
    pool: Executor, store: Store, settings: Settings, jobs: Sequence[tuple[Row, archive.Source]], *, ahead: int
) -> Iterator[tuple[str, Entry | str]]:
    # Hands on a few jobs at a time, so that memory does not grow with their number.
    waiting: dict[Future[Entry | str], str] = {}
    for row, source in jobs:
        waiting[pool.submit(prepare_one, store, settings, row, source)] = row.scan_id
        if len(waiting) >= ahead:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(done), done.result()
    while waiting:
        for done in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(done), done.result()


def prepare_one(store: Store, settings: Settings, row: Row, source: archive.Source) -> Entry | str:
    """Prepare and store one scan. Returns: its entry, or the code of why it cannot be prepared. Raises: OSError: disk full."""
    try:
        volume = archive.read_source(source)
    except archive.Unreadable as error:
        return error.code
    except MemoryError:
        return "out_of_memory"
    original = volume.grid
    volume = volume.reoriented("RAS")
    found = _find_body(volume, settings.body)
    if found is None:
        return "no_body"
    threshold, start, stop = found
    scaling = _scaling(volume.cropped(start, stop), threshold, settings.intensity)
    if scaling is None:
        return "no_contrast"
    part = volume.cropped(*_with_margin(volume.grid, start, stop, settings.body.margin_mm))
    ends = volume.grid.world(np.array([start, stop]) - 0.5)
    grid = part.grid.resampled(settings.spacing_mm)
    # Clipped before resampling, so that padding such as -3024 does not bleed into the air beside it.
    low, high = ((end - scaling[1]) / scaling[0] for end in settings.intensity.clip)
    clipped = Volume(np.clip(part.array_CXYZ.astype(np.float32), low, high), part.grid)
    resampled = resample(clipped, grid, fill=low).array_CXYZ
    array = np.rint(resampled * scaling[0] + scaling[1]).astype(np.int16)
    body = np.clip(np.rint(grid.voxels(ends) + 0.5), 0, grid.shape_vox).astype(int)
    entry = Entry(
        scan_id=row.scan_id,
        patient_id=row.patient_id,
        modality=row.modality,
        split=row.split,
        channels=array.shape[0],
        shape_vox=grid.shape_vox,
        body_start=_triple(body[0]),
        body_stop=_triple(body[1]),
        affine=tuple(grid.affine.ravel().tolist()),
        original_shape=original.shape_vox,
        original_affine=tuple(original.affine.ravel().tolist()),
        scaling=scaling,
        content_hash=row.content_hash,
    )
    store.write(array, entry)
    return entry


def _triple(values: np.ndarray) -> tuple[int, int, int]:
    x, y, z = (int(v) for v in values)
    return x, y, z


def _find_body(volume: Volume, body: Body) -> tuple[float, tuple[int, int, int], tuple[int, int, int]] | None:
    array_XYZ = volume.array_CXYZ[0]
    stride = tuple(max(1, int(COARSE_MM / mm + 1e-3)) for mm in volume.grid.spacing_mm)
    threshold = body.threshold
    if threshold is None:
        low, high = np.percentile(array_XYZ[tuple(slice(None, None, n) for n in stride)], (0.5, 99.5))
        threshold = float(low + body.share * (high - low))
    box = body_box(array_XYZ, threshold=threshold, stride=stride)
    return None if box is None else (threshold, *box)


def body_box(
    array_XYZ: np.ndarray, *, threshold: float, stride: Sequence[int] = (1, 1, 1)
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Box (start, stop; voxels) of the largest connected part above `threshold`, or None if nothing is.

    Args: stride: every how many voxels to look, along each axis; the box is then wider by up to that.
    """
    coarse = array_XYZ[tuple(slice(None, None, n) for n in stride)] > threshold
    # Opening parts the body from the table's thin shell; a stack too flat for it, or a thin body, is taken as it is.
    opened = ndimage.binary_opening(coarse) if min(coarse.shape) >= 5 else coarse
    labelled: Any = ndimage.label(opened if opened.any() else coarse)
    parts, count = labelled
    if count == 0:
        return None
    largest = int(np.argmax(np.bincount(parts.ravel())[1:])) + 1
    box = ndimage.find_objects(parts, max_label=largest)[largest - 1]
    start = [max(0, (part.start - 1) * n + 1) for part, n in zip(box, stride, strict=True)]
    stop = [min(size, part.stop * n) for part, n, size in zip(box, stride, array_XYZ.shape, strict=True)]
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def _with_margin(
    grid: Grid, start: Sequence[int], stop: Sequence[int], margin_mm: float
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    margin = np.ceil(margin_mm / np.array(grid.spacing_mm) - 1e-3).astype(int)
    return _triple(np.maximum(0, np.array(start) - margin)), _triple(np.minimum(grid.shape_vox, np.array(stop) + margin))


def _scaling(volume: Volume, threshold: float, intensity: Intensity) -> tuple[float, float] | None:
    # Factor and offset from a value of the scan to a stored one.
    if intensity.percentiles is None:
        return 1.0, 0.0
    values = volume.array_CXYZ[volume.array_CXYZ > threshold]
    low, high = (float(v) for v in np.percentile(values, intensity.percentiles))
    if not high > low:
        return None
    factor = (intensity.window[1] - intensity.window[0]) / (high - low)
    return factor, intensity.window[0] - low * factor


def resample(volume: Volume, grid: Grid, *, order: Literal["linear", "nearest"] = "linear", fill: float = 0.0) -> Volume:
    """`volume` on any other `grid`.

    Linear values are float32; before the grid gets coarser along an axis, the volume is smoothed along it with a Gaussian of
    sigma = sqrt(r^2 - 1) / 2.355 voxels, r being the ratio of the spacings, so that fine texture cannot alias.
    Outside of the volume (beyond half a voxel from its outermost centres) stands `fill`. Nearest keeps the type of the array.
    Source: Cardoso et al., Scale factor point spread function matching: beyond aliasing in image resampling, MICCAI 2015.
    """
    # In voxel indices of the volume, so that SimpleITK never sees world coordinates, nor has to represent a direction.
    matrix = np.linalg.inv(volume.grid.affine) @ grid.affine
    transform = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    ratios = np.linalg.norm(matrix[:3, :3], axis=1)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in grid.shape_vox])
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkLinear if order == "linear" else sitk.sitkNearestNeighbor)
    resampler.SetDefaultPixelValue(float(fill))
    channels = []
    for array_XYZ in volume.array_CXYZ:
        if order == "linear":
            array_XYZ = _smoothed(array_XYZ.astype(np.float32), ratios)
        image = sitk.GetImageFromArray(np.ascontiguousarray(array_XYZ.transpose(2, 1, 0)))
        channels.append(sitk.GetArrayFromImage(resampler.Execute(image)).transpose(2, 1, 0))
    return Volume(np.stack(channels), grid)


def _smoothed(array_XYZ: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    for axis, ratio in enumerate(ratios):
        if ratio > 1 + 1e-6:
            sigma = float(np.sqrt(ratio**2 - 1)) / FWHM_PER_SIGMA
            array_XYZ = ndimage.gaussian_filter1d(array_XYZ, sigma, axis=axis, mode="nearest", truncate=3.0)
    return array_XYZ
