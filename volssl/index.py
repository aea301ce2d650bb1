"""Verb index: one row per volume with facts, verdict and split, free of identifiers; names and paths stay in INDEX/private/."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from volssl import archive
from volssl.dicom import Slice
from volssl.examine import Facts, examined
from volssl.files import BadInput, Outcome, claim_out, track, write_csv, write_json
from volssl.gates import Gates as Gates
from volssl.pseudonyms import claim_key, pseudonym
from volssl.quality import Look, write_quality
from volssl.register import Register
from volssl.rows import Index as Index
from volssl.rows import Row, SourcesFile, write_rows
from volssl.rows import load as load
from volssl.spool import Spool, packed, spooled, unpacked

VERSION = 2
SCHEDULED = ("unopened", "file")  # what `archive.walk` says of files that are to be read
TOLD = {"accept": "accepted", "repair": "to repair", "reject": "rejected"}
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
            register = Register(spool.base)
            facts_of = _facts(spool, over, gates)
            with SourcesFile(private) as sources:
                key = _enter(facts_of, register, sources, out=out, gates=gates, roots={Path(path).absolute() for path in archives})
                if not register.series:
                    _refuse(archives, spool, leave=[private] * fresh + [out] * made)
            register.divide(tolerance=gates.duplicate_tolerance, siblings=gates.siblings, seed=seed, share=gates.validation_share)
            _write_files(out, key, spool)
            failed = spool.count_aside(ignored=False)
            counts = {"files_unreadable": failed, "files_ignored": spool.count_aside(ignored=True)}
            write_json(out / "summary.json", {"version": VERSION, **register.summary(), **counts})
            write_rows(out / "index.csv", register.rows())
        write_quality(out, look=Look(gates.thumbnails, gates.vendors), over=over)
    told = ", ".join(f"{register.verdicts[verdict]} {name}" for verdict, name in TOLD.items())
    return Outcome(out, sum(failed.values()), f"{register.series} series: {told}")


def _refuse(archives: Sequence[Path], spool: Spool, *, leave: Sequence[Path]) -> None:
    # `leave`: folders that this run made.
    found = Counter(spool.count_aside(ignored=False)) + Counter(spool.count_aside(ignored=True))
    for folder in leave:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
    counts = ", ".join(f"{n} {code}" for code, n in sorted(found.items()))
    raise BadInput(f"archive {', '.join(map(str, archives))}: must hold scans; found {counts or 'no file'}")


def _gather(spool: Spool, archives: Sequence[Path], over: Callable[..., Iterable[Any]]) -> None:
    # Every file, and the header of every DICOM file, into the spool. Files are opened by the workers: a slow disk serves several at once.
    for files in _batched(archive.walk(archives, is_new=spool.is_new), 1000):
        spool.add_files(one for one in files if one[1] in SCHEDULED)
        spool.set_aside((one for one in files if one[1] not in SCHEDULED), ignored=archive.IGNORED)
    batches = over(_headers, _batched(spool.files("unopened"), BATCH))
    for slices, odd in track(batches, total=-(-spool.count("unopened") // BATCH), label=f"headers, {BATCH} files"):
        spool.add_slices(slices)
        spool.set_aside(odd, ignored=archive.IGNORED)


def _facts(spool: Spool, over: Callable[..., Iterable[Any]], gates: Gates) -> Iterator[Facts]:
    # Of every volume that can be read; files of the others are set aside.
    facts_of = over(partial(_examined, gates), _chained(spool.series(), spool.files("file")))
    for facts in (one for several in track(facts_of, total=spool.count_series() + spool.count("file"), label="index") for one in several):
        if facts.failure:
            spool.set_aside(((path, facts.failure) for path in facts.source.files), ignored=archive.IGNORED)
        else:
            yield facts


def _enter(
    facts_of: Iterable[Facts], register: Register, sources: SourcesFile, *, out: Path, gates: Gates, roots: Collection[Path]
) -> bytes:
    # Rows into the register, and how each is read into its file. Returns: the key, if there was a row.
    key = b""
    for facts in facts_of:
        key = key or claim_key(out, gates.key)
        row = _row(key, facts, gates)
        register.add(row, prints=facts.prints, place="" if facts.source.files[0].parent in roots else facts.place[:16])
        sources.add(row.scan_id, facts.source)
    return key


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


def _write_files(out: Path, key: bytes, spool: Spool) -> None:
    # The private list of files, and the failures by pseudonym.
    private = out / "private"
    aside = spool.aside(lambda path: pseudonym(key, "F", path))
    listed = ({"file_id": name, "reason": code, "path": _readable(path)} for name, code, path in aside)
    write_csv(private / "files.csv", listed, ["file_id", "reason", "path"])
    for file in private.iterdir():
        file.chmod(0o600)
    named = ({"file_id": name, "reason": code} for name, code in spool.failures())
    write_csv(out / "failures.csv", named, ["file_id", "reason"])


def _readable(path: str) -> str:
    # A name that is not UTF-8 is written with its bytes escaped.
    return os.fsencode(path).decode("utf-8", "backslashreplace")
