"""Files and folders that a verb leaves: out folders, atomic writes, tables, progress; and the two ways a verb ends."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class BadInput(ValueError):
    """A complaint for the user: where, what must hold, what was found, what to do. The command line answers it with exit code 2."""


@dataclass(frozen=True)
class Outcome:
    """How a verb ended. `failed` counts the cases named in failures.csv; more than none gives exit code 3.

    `finished` is False where a signal asked it to stop and --resume continues.
    """

    out: Path
    failed: int = 0
    message: str = ""
    finished: bool = True


def place_of(error: BaseException) -> str:
    """Type of an unexpected error and where in the code it came up: what a log may hold, since its text may quote a scan's header."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


def claim_out(out: Path, *, resume: bool | None = None, overwrite: bool | None = None, inputs: Sequence[Path] = ()) -> Path:
    """Make the folder `out`, or refuse it.

    A folder that holds files is refused unless `resume` (its contents stay) or `overwrite` (its contents go, unless one of `inputs`
    is or lies among them). None stands for a flag that the verb does not have.
    Raises: BadInput: as `check_out`.
    """
    out = Path(out)
    check_out(out, resume=resume, overwrite=overwrite, inputs=inputs)
    if overwrite and out.is_dir():
        _empty(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def check_out(out: Path, *, resume: bool | None = None, overwrite: bool | None = None, inputs: Sequence[Path] = ()) -> None:
    """Refuse what `claim_out` would refuse, and touch nothing: for a verb that reads for minutes before it writes.

    Raises: BadInput: if `out` is a file, is in use without a flag, holds an input that --overwrite would delete, or both flags are set.
    """
    if resume and overwrite:
        raise BadInput("--resume and --overwrite exclude each other; give one of them")
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} must be a folder; found a file; choose another name")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not resume and not overwrite:
        offers = [(resume, "--resume to continue"), (overwrite, "--overwrite to replace it")]
        ways = " or ".join(way for flag, way in offers if flag is not None)
        found = f"--out {out} must be new or empty; found {sum(1 for _ in out.iterdir())} entries; choose another folder"
        raise BadInput(f"{found}, or give {ways}" if ways else found)
    # --overwrite deletes a tree: only one that volssl itself left, never a home folder given by mistake, and never what it is to read.
    if overwrite and not any((out / mark).exists() for mark in MARKS):
        raise BadInput(f"--overwrite {out}: must be a folder that volssl wrote (with one of {', '.join(MARKS)}); delete it yourself")
    if overwrite and (lost := [path for path in inputs if Path(path).resolve().is_relative_to(out.resolve())]):
        raise BadInput(f"--overwrite {out}: would delete the input {lost[0]}; choose another --out")


MARKS = (
    "recipe.yaml",
    "store.json",
    "index.csv",
    "summary.json",
    "environment.json",
    "demo.json",
    "cases.csv",
    "card.json",
    "bench.json",
    "export.json",
    "features.json",
)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix="".join(path.suffixes[-2:]), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder in TMPDIR. Raises: BadInput: no room is left there, lest --out be taken for the disk that is full."""
    try:
        with tempfile.TemporaryDirectory(prefix="volssl-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadInput(f"TMPDIR {tempfile.gettempdir()}: must have room for a bundle; {error.strerror}; make room or set another") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder itself is on disk.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises: BadInput: if it is absent or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: must exist; found nothing there") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: must be JSON; {error}") from None


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a table with a header, atomically, row by row. A row with other keys than `columns` is a programmer's error."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(columns), lineterminator="\n", extrasaction="raise")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a table as a list of rows, all values strings. Raises: BadInput: if it is absent."""
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    except FileNotFoundError:
        raise BadInput(f"{path}: must exist; found nothing there") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def track(items: Iterable[T], *, total: int, label: str, start: int = 0) -> Iterator[T]:
    """Pass `items` on and show how far it has come on stderr: a bar on a terminal, else a line at most every 10 seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, initial=start, desc=label, dynamic_ncols=True)
        return
    begun = last = time.monotonic()
    done = start
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= 10 or done == total:
            last = now
            rate = (done - start) / max(now - begun, 1e-9)
            left = (total - done) / rate if rate > 0 else 0.0
            sys.stderr.write(f"{label}: {done}/{total}, {rate:.3g}/s, {_clock(left)} left\n")
            sys.stderr.flush()


def tell(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
        return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{rest:02d}"
