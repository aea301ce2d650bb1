"""Verb index: one row per series with facts, verdict and split, free of identifiers; names and paths stay in INDEX/private/."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from volssl import archive
from volssl.dicom import VOLUME_MODALITIES, Limits, check
from volssl.files import BadInput, Outcome, claim_out, track, write_csv, write_json
from volssl.pseudonyms import claim_key, pseudonym
from volssl.quality import Look, write_quality
from volssl.rows import Index as Index
from volssl.rows import Row, write_rows, write_sources
from volssl.rows import load as load
from volssl.splits import split
from volssl.volume import Volume

VERSION = 1
# The text of this tag is free in practice: only known words leave the private folder.
BODY_PARTS = set(
    "ABDOMEN ABDOMENPELVIS ANKLE ARM BRAIN BREAST CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE ELBOW EXTREMITY FOOT HAND HEAD HEADNECK "
    "HEART HIP KIDNEY KNEE LEG LIVER LSPINE LUNG NECK NECKCHEST PANCREAS PELVIS PROSTATE SHOULDER SKULL SPINE TSPINE "
    "WHOLEBODY WRIST".split()
)
# These say that a file could not be read, not that its content is unfit.
FAILURES = {"truncated", "undecodable", "no_permission", "missing", "empty_file", "out_of_memory"}


@dataclass(frozen=True)
class Gates:
    """Settings of the index. `modality` is that of all files other than DICOM; without it their values tell. `key` is a key file.

    `thumbnails` and `vendors`: what quality.html shows.
    """

    modality: str | None = None
    min_slices: int = 8
    validation_share: float = 0.1
    key: Path | None = None
    thumbnails: bool = True
    vendors: bool = False

    def __post_init__(self) -> None:
        if self.modality is not None and self.modality not in VOLUME_MODALITIES:
            raise BadInput(f"modality: must be one of {', '.join(VOLUME_MODALITIES)}; found {self.modality!r}")
        if not 0 <= self.validation_share < 1:
            raise BadInput(f"validation_share: must lie in [0, 1); found {self.validation_share}")


@dataclass(frozen=True)
class Facts:
    """What the examination of one scan gave. `digest` is of its content, not yet keyed; `failure` is a code if it cannot be read."""

    modality: str = ""
    body_part: str = ""
    shape_vox: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    num_slices: int = 0
    reasons: tuple[str, ...] = ()
    digest: str = ""
    failure: str = ""


def build(
    archives: Sequence[Path],
    *,
    out: Path,
    workers: int = 0,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    gates: Gates = Gates(),
) -> Outcome:
    """Index all scans in `archives` (folders or files).

    Args: workers: spawned processes; 0 works in this one. resume: go through the archive again with the key, and so the pseudonyms, of
        the index in `out`. seed: of the split.
    Returns: `failed` counts the files that should be images and cannot be read; failures.csv names them by pseudonym.
    Raises: BadInput: no scan found, `out` in use, a path that does not exist.
    """
    out = claim_out(out, resume=resume, overwrite=overwrite)
    with _mapper(workers) as over:
        findings = archive.find(archives, over=over)
        examined = over(partial(_examine, gates), findings.scans)
        facts = list(track(examined, total=len(findings.scans), label="index"))
    failed = dict(findings.unreadable)
    failed |= {found.files[0]: one.failure for found, one in zip(findings.scans, facts, strict=True) if one.failure}
    kept = [(found, one) for found, one in zip(findings.scans, facts, strict=True) if not one.failure]
    if not kept:
        counts = ", ".join(f"{n} {code}" for code, n in sorted(Counter([*failed.values(), *findings.ignored.values()]).items()))
        raise BadInput(f"archive {', '.join(map(str, archives))}: must hold scans; found {counts or 'no file'}")
    key = claim_key(out, gates.key)
    rows = split([_row(key, found, one) for found, one in kept], seed=seed, share=gates.validation_share)
    sources = {row.scan_id: archive.Source(found.kind, found.files) for row, (found, _) in zip(rows, kept, strict=True)}
    _write(out, key, sources, failed=failed, ignored=findings.ignored)
    write_json(out / "summary.json", _summary(rows, failed, findings.ignored))
    write_rows(out / "index.csv", rows)
    write_quality(out, look=Look(gates.thumbnails, gates.vendors))
    return Outcome(out, len(failed), f"{sum(row.verdict == 'accept' for row in rows)} of {len(rows)} series accepted")


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    if workers == 0:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=8)


def _examine(gates: Gates, found: archive.Found) -> Facts:
    try:
        return _examine_series(gates, found) if found.kind == "dicom" else _examine_file(gates, archive.read(found))
    except archive.Unreadable as error:
        return Facts(failure=error.code) if error.code in FAILURES else Facts(reasons=(error.code,), digest=_digest(str(found.files)))
    except MemoryError:
        return Facts(failure="out_of_memory")


def _examine_series(gates: Gates, found: archive.Found) -> Facts:
    slices, grid, reasons = check(found.slices, Limits(min_slices=gates.min_slices))
    first = slices[0]
    return Facts(
        modality=first.modality if first.modality in VOLUME_MODALITIES else "OTHER",
        body_part=first.body_part if first.body_part in BODY_PARTS else "",
        shape_vox=grid.shape_vox if grid else (),
        spacing_mm=_rounded(grid.spacing_mm) if grid else (),
        orientation=grid.orientation if grid else "",
        num_slices=len(slices),
        reasons=tuple(reasons),
        digest=_digest(*sorted(one.instance or str(one.path) for one in slices)),
    )


def _examine_file(gates: Gates, volume: Volume) -> Facts:
    array, grid = volume.array_CXYZ, volume.grid
    modality = gates.modality or modality_of(array)
    reasons = []
    if len(array) > 1:
        reasons.append("several_volumes")
    if array.min() == array.max():
        reasons.append("constant")
    elif is_label_map(array[0]):
        reasons.append("label_map")
        modality = ""
    elif not modality:
        reasons.append("unknown_modality")
    if min(grid.shape_vox) < gates.min_slices:
        reasons.append("too_few_slices")
    content = np.ascontiguousarray(volume.reoriented("RAS").array_CXYZ, dtype=np.float32)
    return Facts(
        modality=modality,
        shape_vox=grid.shape_vox,
        spacing_mm=_rounded(grid.spacing_mm),
        orientation=grid.orientation,
        num_slices=grid.shape_vox[max(range(3), key=lambda axis: (grid.spacing_mm[axis], axis))],
        reasons=tuple(sorted(reasons)),
        digest=hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest(),
    )


def _rounded(spacing_mm: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(mm, 4) for mm in spacing_mm)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def modality_of(array: np.ndarray) -> str:
    """Modality by the values, for files whose header has none.

    CT if the least value lies in [-5000, -200] (air is -1000 HU, padding -2000 or -3024) and 99.9 % are below 5000; MR if no value is
    below -200; else unknown, "".
    """
    low = float(array.min())
    if low > -200:
        return "MR"
    sample = array.ravel(order="K")[:: max(1, array.size // 1_000_000)]
    return "CT" if low >= -5000 and float(np.percentile(sample, 99.9)) < 5000 else ""


def is_label_map(array_XYZ: np.ndarray) -> bool:
    """Whether the values look like labels: whole, none below 0, at most 256 kinds, and three of four neighbours inside are equal.

    Inside means that neither of the two is 0. Images of few grey levels have noise, so their neighbours differ.
    """
    if array_XYZ.min() < 0 or (array_XYZ.dtype.kind == "f" and not np.array_equal(array_XYZ, np.rint(array_XYZ))):
        return False
    if len(np.unique(array_XYZ)) > 256:
        return False
    inside = equal = 0
    for axis in range(3):
        one, two = np.moveaxis(array_XYZ, axis, 0)[:-1], np.moveaxis(array_XYZ, axis, 0)[1:]
        both = (one != 0) & (two != 0)
        inside += int(both.sum())
        equal += int(((one == two) & both).sum())
    return inside == 0 or equal >= 0.75 * inside


def _row(key: bytes, found: archive.Found, facts: Facts) -> Row:
    if found.kind == "dicom":
        patient, study, series = found.slices[0].key
        who = ("dicom", patient or study or series)
        scan, visit = ("dicom", patient, study, series), ("dicom", patient, study)
    else:
        who = scan = visit = ("file", str(found.files[0]))
    shared = {one.name: getattr(facts, one.name) for one in fields(Row) if hasattr(facts, one.name)}
    return Row(
        scan_id=pseudonym(key, "S", *scan),
        patient_id=pseudonym(key, "P", *who),
        study_id=pseudonym(key, "T", *visit),
        verdict="reject" if facts.reasons else "accept",
        content_hash=pseudonym(key, "C", facts.digest),
        split="",
        **shared,
    )


def _write(out: Path, key: bytes, sources: dict[str, archive.Source], *, failed: dict[Path, str], ignored: dict[Path, str]) -> None:
    # The private part, and the failures by pseudonym.
    private = out / "private"
    write_sources(private, sources)
    unread = [{"file_id": pseudonym(key, "F", str(path)), "reason": code, "path": str(path)} for path, code in failed.items()]
    aside = [{"file_id": "", "reason": code, "path": str(path)} for path, code in ignored.items()]
    write_csv(private / "files.csv", [*unread, *aside], ["file_id", "reason", "path"])
    for file in private.iterdir():
        file.chmod(0o600)
    named = [{name: row[name] for name in ("file_id", "reason")} for row in sorted(unread, key=lambda row: row["file_id"])]
    write_csv(out / "failures.csv", named, ["file_id", "reason"])


def _summary(rows: Sequence[Row], failed: dict[Path, str], ignored: dict[Path, str]) -> dict[str, Any]:
    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(values).items()))

    accepted = [row for row in rows if row.verdict == "accept"]
    return {
        "version": VERSION,
        "series": len(rows),
        "patients": len({row.patient_id for row in rows}),
        "verdicts": count(row.verdict for row in rows),
        "reasons": count(code for row in rows for code in row.reasons),
        "accepted_modalities": count(row.modality for row in accepted),
        "accepted_splits": count(row.split for row in accepted),
        "files_unreadable": count(failed.values()),
        "files_ignored": count(ignored.values()),
    }
