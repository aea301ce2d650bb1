"""Verb prepare: every accepted scan of an index becomes a store entry: RAS+, cropped to the body, resampled, int16.

Killed at any moment and run again with --resume, it leaves the very bytes of an undisturbed run: each volume is written whole or not
at all and carries its own entry, and manifest.csv comes last.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from volssl import archive
from volssl.body import Body, Found, Intensity, find_body, padding_of, scaling_of, triple, with_margin, without_padding
from volssl.card import as_card_says
from volssl.files import BadInput, Outcome, claim_out, place_of, track, write_csv
from volssl.pools import Lost, Means, spread
from volssl.recipe import load as load_recipe
from volssl.recipe import parse
from volssl.resample import slabs
from volssl.rows import Row, opened
from volssl.store import About, Entry, Store
from volssl.volume import Grid, Volume

FAILURES = ["scan_id", "reason"]
# Bytes on disk per voxel of the whole scan at the stored spacing: the share of the body times 2 bytes times the compression.
BYTES_PER_VOXEL = 0.8
ENOUGH_STORED = 10  # from so many volumes on, their own bytes per voxel are taken instead
FULL = (errno.ENOSPC, errno.EDQUOT)
Table = Callable[[], Iterator[Row]]  # rows that are gone through again and again
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """A recipe of prepare."""

    modality: str = "CT"
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    body: Body = field(default_factory=Body)
    intensity: Intensity = field(default_factory=Intensity)
    packing: Literal["fast", "small"] = "fast"

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
    means: Means = Means(),
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Prepare all usable scans of `index` into a store.

    Args: index: from `volssl index`. recipe: a file or a shipped name, with `overrides` "key=value"; see also
        `card.as_card_says`. means: processes or a cluster, and their bounds. resume: keep what is there and do what is missing.
    Returns: `failed` counts the scans in failures.csv.
    Raises: BadInput: no such index, a faulty recipe, `out` in use or begun with another recipe, nothing to prepare, too little disk,
        no such cluster.
    """
    settings = _settings(recipe, overrides)
    rows, sources = _usable(index)
    count = sum(1 for _ in rows())
    out = claim_out(out, resume=resume, overwrite=overwrite).absolute()
    try:
        store = Store.create(out, about_of(settings))
        _sweep(out)
        code_of = _prepare_all(store, settings, rows, sources=sources, means=means)
        failed = sum(1 for row in rows() if code_of(row))
        write_csv(out / "failures.csv", ({"scan_id": row.scan_id, "reason": code} for row in rows() if (code := code_of(row))), FAILURES)
        if failed == count:
            reasons = ", ".join(sorted(set(map(code_of, rows()))))
            raise BadInput(f"prepare {index}: no scan could be prepared; found {reasons}; see {out / 'failures.csv'}")
        store.finish(_entries(store, (row.scan_id for row in rows() if not code_of(row))))
        from volssl.preview import write_preview  # draws with matplotlib, which a worker need not load

        write_preview(out)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BadInput(f"--out {out}: the disk is full; make room and run again with --resume") from None
    return Outcome(out, failed, f"{count - failed} of {count} usable scans prepared")


def about_of(settings: Settings) -> About:
    """What the store of a recipe says of itself."""
    return About(
        spacing_mm=settings.spacing_mm,
        modality=settings.modality,
        window=settings.intensity.window,
        clip=settings.intensity.clip,
        recipe=asdict(settings),
        packing=settings.packing,
    )


def _settings(recipe: str | Path, overrides: Sequence[str]) -> Settings:
    values = as_card_says(load_recipe(recipe, overrides, verb="prepare"), recipe, overrides)
    return parse({"prepare": values}, {"prepare": Settings}, str(recipe))["prepare"]


def _usable(index: Path) -> tuple[Table, Mapping[str, archive.Source]]:
    # The usable rows, in the order of their scan_id: read from disk each time, unless somebody has put the table in another order.
    rows, sources = opened(index)
    total, last, ordered, found = 0, "", True, False
    for row in rows:
        total, ordered, last, found = total + 1, ordered and last <= row.scan_id, row.scan_id, found or row.usable
    if not found:
        raise BadInput(f"index {index}: must hold accepted scans; found none of {total}")
    if ordered:
        return lambda: (row for row in rows if row.usable), sources
    kept = sorted((row for row in rows if row.usable), key=lambda row: row.scan_id)
    return lambda: iter(kept), sources


def _sweep(out: Path) -> None:
    # What a killed run was about to write. Its unfinished manifest must not outlive a resumed run that fails.
    for left in [*out.glob(".tmp-*"), *(out / "volumes").glob(".tmp-*")]:
        left.unlink()
    (out / "manifest.csv").unlink(missing_ok=True)


def _prepare_all(
    store: Store, settings: Settings, rows: Table, *, sources: Mapping[str, archive.Source], means: Means
) -> Callable[[Row], str]:
    # Returns: what tells of each row the code of why it is not stored, or "". Memory: one byte a row, and the names of those that failed.
    wanted = lambda: (row for row in rows() if row.modality == settings.modality)  # noqa: E731
    done = bytearray(_is_stored(store, row) for row in wanted())
    if not means.ignore_space:
        _check_space(store, zip(wanted(), done, strict=True))
    jobs = ((row.scan_id, (store, settings, row, sources[row.scan_id])) for row, stored in zip(wanted(), done, strict=True) if not stored)
    failures: dict[str, str] = {}
    for scan_id, answer in track(spread(prepare_one, jobs, means), total=done.count(0), label="prepare"):
        if code := answer.code if isinstance(answer, Lost) else answer:
            failures[scan_id] = code
    return lambda row: "other_modality" if row.modality != settings.modality else failures.get(row.scan_id, "")


def _is_stored(store: Store, row: Row) -> bool:
    # Whether an earlier run left this very scan; a file that cannot be opened is written again.
    try:
        entry = store.entry(row.scan_id)
    except BadInput:
        return False
    if entry is None or entry.content_hash != row.content_hash:
        return False
    return replace(entry, split=row.split, patient_id=row.patient_id) == entry


def _entries(store: Store, scan_ids: Iterable[str]) -> Iterator[Entry]:
    # Read back from the volumes one by one: the manifest says what is there, and takes no memory.
    for scan_id in scan_ids:
        entry = store.entry(scan_id)
        if entry is None:
            raise BadInput(f"store {store.path}: must keep its volumes while it is written; one is gone; run again with --resume")
        yield entry


def _check_space(store: Store, rows: Iterable[tuple[Row, int]]) -> None:
    # `rows`: each with whether it is stored.
    counts, voxels, size = [0, 0], [0.0, 0.0], 0
    for row, stored in rows:
        counts[stored] += 1
        voxels[stored] += _voxels(store, row)
        size += store.volume_path(row.scan_id).stat().st_size if stored else 0
    rate, source = BYTES_PER_VOXEL, "expected"
    if counts[True] >= ENOUGH_STORED:
        rate, source = size / voxels[True], f"as in the {counts[True]} volumes there"
    need, free = voxels[False] * rate, shutil.disk_usage(store.path).free
    if need > free:
        raise BadInput(
            f"--out {store.path}: must have room; {counts[False]} scans need about {need / 1e9:.3g} GB ({voxels[False]:.3g} voxels at "
            f"{rate:.2g} bytes, {source}), and {free / 1e9:.3g} GB are free; make room, take a coarser spacing_mm, or give --ignore-space"
        )


def _voxels(store: Store, row: Row) -> float:
    # Of the whole scan at the stored spacing.
    return float(np.prod(row.shape_vox) * np.prod(row.spacing_mm) / np.prod(store.spacing_mm))


def prepare_one(store: Store, settings: Settings, row: Row, source: archive.Source) -> str:
    """Prepare and store one scan. Returns: "", or the code of why it cannot be prepared. Raises: OSError: such as disk full."""
    try:
        made = _made(settings, row, archive.read_source(source))
        if isinstance(made, str):
            return made
        store.write(*made)
    except archive.Unreadable as error:
        return error.code
    except MemoryError:
        return "out_of_memory"
    except OSError:
        raise
    except Exception as error:
        # One odd scan in 100,000 must not end the run. The message may quote the scan's header, so only the place is told.
        logger.error("scan %s: %s", row.scan_id, place_of(error))
        return "unexpected_error"
    return ""


def _made(settings: Settings, row: Row, volume: Volume) -> tuple[np.ndarray, Entry] | str:
    # The stored array with its entry, or a code.
    original = volume.grid
    volume = volume.reoriented("RAS")
    hounsfield = settings.intensity.percentiles is None
    padding = padding_of(volume) if hounsfield else None
    found = find_body(volume, settings.body, padding=padding)
    if found is None:
        return "no_body"
    scaling = scaling_of(volume.cropped(found.start, found.stop), found.threshold, settings.intensity)
    if scaling is None:
        return "no_contrast"
    part = volume.cropped(*with_margin(volume.grid, found, settings.body.margin_mm))
    grid = part.grid.resampled(settings.spacing_mm)
    low, high = ((end - scaling[1]) / scaling[0] for end in settings.intensity.clip)
    mend = partial(_mended, low=low, high=high, padding=padding if padding is not None and padding > found.threshold else None)
    array_CXYZ = np.empty((len(part.array_CXYZ), *grid.shape_vox), np.int16)
    for where, slab_CXYZ in slabs(part, grid, fill=low, mend=mend):
        if scaling != (1.0, 0.0):
            slab_CXYZ = slab_CXYZ * np.float32(scaling[0]) + np.float32(scaling[1])
        array_CXYZ[:, *where] = np.rint(slab_CXYZ, out=slab_CXYZ).astype(np.int16)  # cast before it is turned: half the bytes
    entry = Entry(
        scan_id=row.scan_id,
        patient_id=row.patient_id,
        modality=row.modality,
        split=row.split,
        channels=len(array_CXYZ),
        shape_vox=grid.shape_vox,
        **_body_in(grid, volume.grid, found),
        affine=tuple(grid.affine.ravel().tolist()),
        original_shape=original.shape_vox,
        original_affine=tuple(original.affine.ravel().tolist()),
        scaling=scaling,
        content_hash=row.content_hash,
        padding=padding,
    )
    return array_CXYZ, entry


def _mended(plane: np.ndarray, *, low: float, high: float, padding: float | None) -> np.ndarray:
    # Before resampling, so that padding such as -3024 does not bleed into the air beside it.
    if padding is not None:
        plane = without_padding(plane, padding, low)
    return np.clip(plane, low, high, out=plane)


def _body_in(grid: Grid, scan: Grid, found: Found) -> dict[str, Any]:
    ends = scan.world(np.array([found.start, found.stop]) - 0.5)
    body = np.clip(np.rint(grid.voxels(ends) + 0.5), 0, grid.shape_vox).astype(int)
    return {"body_start": triple(body[0]), "body_stop": triple(body[1])}
