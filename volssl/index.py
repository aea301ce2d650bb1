"""Verb index: one row per volume with facts, verdict and split, free of identifiers; names and paths stay in INDEX/private/."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from volssl import archive
from volssl.dicom import Slice
from volssl.examine import Facts, examined
from volssl.files import BadInput, Outcome, claim_out, track, write_csv, write_json
from volssl.fingerprint import Print, twins
from volssl.gates import Gates as Gates
from volssl.pseudonyms import claim_key, pseudonym
from volssl.quality import Look, write_quality
from volssl.rows import Index as Index
from volssl.rows import Row, SourcesFile, write_rows
from volssl.rows import load as load
from volssl.splits import split
from volssl.spool import Spool, packed, spooled, unpacked

VERSION = 2
BATCH = 64  # headers that a worker reads at a time


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
    made = not Path(out).exists()
    out = claim_out(out, resume=resume, overwrite=overwrite)
    private = out / "private"
    fresh = not private.exists()
    private.mkdir(mode=0o700, exist_ok=True)
    with _mapper(workers) as over:
        with spooled(private) as spool:
            _gather(spool, archives, over)
            others = dict(spool.others(("unopened", "file")))
            failed = {path: kind for path, kind in others.items() if kind not in archive.IGNORED}
            ignored = {path: kind for path, kind in others.items() if kind in archive.IGNORED}
            total = spool.count_series() + spool.count("file")
            facts_of = over(partial(_examined, gates), _chained(spool.series(), spool.files("file")))
            key, rows, prints, places = b"", [], [], {}
            roots = {Path(path).absolute() for path in archives}
            with SourcesFile(private) as sources:
                for facts in (one for several in track(facts_of, total=total, label="index") for one in several):
                    if facts.failure:
                        failed |= dict.fromkeys(facts.source.files, facts.failure)
                        continue
                    key = key or claim_key(out, gates.key)
                    rows.append(_row(key, facts, gates))
                    prints.append(facts.prints if rows[-1].usable else ())
                    if rows[-1].usable and facts.place and facts.source.files[0].parent not in roots:
                        places.setdefault(facts.place[:16], []).append(rows[-1].scan_id)
                    sources.add(rows[-1].scan_id, facts.source)
                if not rows:
                    _refuse(archives, failed, ignored, leave=[private] * fresh + [out] * made)
        rows = _with_twins(rows, prints, gates)
        siblings = ((names[0], other) for names in places.values() if len(names) <= gates.siblings for other in names[1:])
        rows = split(rows, seed=seed, share=gates.validation_share, twins=siblings)
        _write_files(out, key, failed=failed, ignored=ignored)
        write_json(out / "summary.json", _summary(rows, failed, ignored))
        write_rows(out / "index.csv", rows)
        write_quality(out, look=Look(gates.thumbnails, gates.vendors), over=over)
    counts = Counter(row.verdict for row in rows)
    return Outcome(
        out, len(failed), f"{len(rows)} series: {counts['accept']} accepted, {counts['repair']} to repair, {counts['reject']} rejected"
    )


def _refuse(archives: Sequence[Path], failed: dict[Path, str], ignored: dict[Path, str], *, leave: Sequence[Path]) -> None:
    # `leave`: folders that this run made.
    for folder in leave:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
    counts = ", ".join(f"{n} {code}" for code, n in sorted(Counter([*failed.values(), *ignored.values()]).items()))
    raise BadInput(f"archive {', '.join(map(str, archives))}: must hold scans; found {counts or 'no file'}")


def _gather(spool: Spool, archives: Sequence[Path], over: Callable[..., Iterable[Any]]) -> None:
    # Every file, and the header of every DICOM file, into the spool. Files are opened by the workers: a slow disk serves several at once.
    for files in _batched(archive.walk(archives, is_new=spool.is_new), 1000):
        spool.add_files(files)
    batches = over(_headers, _batched(spool.files("unopened"), BATCH))
    unread: list[tuple[Path, str]] = []
    for slices, odd in track(batches, total=-(-spool.count("unopened") // BATCH), label=f"headers, {BATCH} files"):
        spool.add_slices(slices)
        unread += odd
    spool.add_files(unread)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _headers(paths: Sequence[Path]) -> tuple[list[tuple[bytes, bytes]], list[tuple[Path, str]]]:
    # Headers as the spool keeps them, and the files that have none.
    answers = [(path, archive.header_or_code(path)) for path in paths]
    slices = [packed(answer) for _, answer in answers if isinstance(answer, Slice)]
    return slices, [(path, answer) for path, answer in answers if not isinstance(answer, Slice)]


def _examined(gates: Gates, item: list[bytes] | Path) -> list[Facts]:
    return examined(gates, item if isinstance(item, Path) else unpacked(item))


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    if workers == 0:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in range(workers):
            pool.submit(_headers, [])  # so that they start, and import, while the folders are walked
        try:
            yield partial(_in_order, pool, 4 * workers)
        except BrokenProcessPool:
            raise BadInput(
                "index: a worker process died, for want of memory or in a decoder; run again with fewer --workers, or --content none"
            ) from None


def _in_order(pool: ProcessPoolExecutor, ahead: int, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    # As `map`, but only a few items are under way, so that memory does not grow with their number.
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chained(*several: Iterable[Any]) -> Iterator[Any]:
    for one in several:
        yield from one


def _row(key: bytes, facts: Facts, gates: Gates) -> Row:
    shared = {one.name: getattr(facts, one.name) for one in fields(Row) if hasattr(facts, one.name)}
    verdict = gates.verdict(facts.reasons)
    return Row(
        scan_id=pseudonym(key, "S", *facts.identity),
        patient_id=pseudonym(key, "P", *facts.patient),
        study_id=pseudonym(key, "T", *facts.study),
        verdict=verdict,
        content_hash=pseudonym(key, "C", facts.digest),
        split="",
        repairs=facts.source.repairs if verdict == "repair" else (),
        **shared,
    )


def _with_twins(rows: list[Row], prints: Sequence[Sequence[Print]], gates: Gates) -> list[Row]:
    # Copies of one scan get one content hash, the least of theirs, so that every reader of the table sees them.
    hashes = {row.scan_id: row.content_hash for row in rows}
    leader = {name: name for name in hashes.values()}

    def root(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for one, two in twins([row.scan_id for row in rows], prints, tolerance=gates.duplicate_tolerance):
        low, high = sorted((root(hashes[one]), root(hashes[two])))
        leader[high] = low
    return [replace(row, content_hash=root(row.content_hash)) for row in rows]


def _write_files(out: Path, key: bytes, *, failed: dict[Path, str], ignored: dict[Path, str]) -> None:
    # The private list of files, and the failures by pseudonym.
    private = out / "private"
    unread = [{"file_id": pseudonym(key, "F", str(path)), "reason": code, "path": _readable(path)} for path, code in failed.items()]
    aside = [{"file_id": "", "reason": code, "path": _readable(path)} for path, code in ignored.items()]
    write_csv(private / "files.csv", [*unread, *aside], ["file_id", "reason", "path"])
    for file in private.iterdir():
        file.chmod(0o600)
    named = [{name: row[name] for name in ("file_id", "reason")} for row in sorted(unread, key=lambda row: row["file_id"])]
    write_csv(out / "failures.csv", named, ["file_id", "reason"])


def _readable(path: Path) -> str:
    # A name that is not UTF-8 is written with its bytes escaped.
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _summary(rows: Sequence[Row], failed: dict[Path, str], ignored: dict[Path, str]) -> dict[str, Any]:
    def count(values: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(values).items()))

    usable = [row for row in rows if row.usable]
    return {
        "version": VERSION,
        "series": len(rows),
        "patients": len({row.patient_id for row in rows}),
        "verdicts": count(row.verdict for row in rows),
        "reasons": count(code for row in rows for code in row.reasons),
        "repairs": count(code for row in rows for code in row.repairs),
        "accepted_modalities": count(row.modality for row in usable),
        "accepted_splits": count(row.split for row in usable),
        "duplicates": len(usable) - len({row.content_hash for row in usable}),
        "files_unreadable": count(failed.values()),
        "files_ignored": count(ignored.values()),
    }
