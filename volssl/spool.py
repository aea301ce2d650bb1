"""What the index has gathered so far, on disk: memory does not grow with the files and series of an archive."""

from __future__ import annotations

import errno
import os
import pickle
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from volssl.dicom import Slice

TABLES = """
CREATE TABLE files (path BLOB, kind TEXT, code TEXT);
CREATE TABLE slices (series BLOB, header BLOB);
CREATE TABLE seen (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""


def packed(one: Slice) -> tuple[bytes, bytes]:
    """A header with its series, as bytes: workers make and read them, so that the process that gathers need not."""
    return "\0".join(one.key).encode("utf-8", "surrogatepass"), pickle.dumps(one)


def unpacked(headers: Sequence[bytes]) -> list[Slice]:
    """The headers of one series; they were written by this very run."""
    return [pickle.loads(one) for one in headers]


@contextmanager
def spooled(folder: Path) -> Iterator[Spool]:
    """A spool in `folder` that goes at the end, whatever happens. Raises: OSError: the disk is full."""
    spool = Spool(folder)
    try:
        spool.open()
        yield spool
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
    finally:
        spool.close()


class Spool:
    """A temporary database in a private folder: it holds paths and headers, and goes when it is closed; `spooled` sees to that."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".spool.sqlite"
        self._base: sqlite3.Connection | None = None

    def open(self) -> None:
        """Begin with none of what a killed run left."""
        self.close()
        self._base = sqlite3.connect(self.file)
        self.file.chmod(0o600)
        self._base.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16000;" + TABLES)

    def close(self) -> None:
        """Delete it."""
        if self._base is not None:
            self.base.close()
            self._base = None
        self.file.unlink(missing_ok=True)

    @property
    def base(self) -> sqlite3.Connection:
        """The open database."""
        assert self._base is not None
        return self._base

    def is_new(self, device: int, number: int) -> bool:
        """Whether this file was not seen before."""
        return self.base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (f"{device}:{number}",)).rowcount == 1

    def add_files(self, files: Iterable[tuple[Path, str]]) -> None:
        """Keep files with their kind; codes of what is wrong with them come as kinds, too."""
        self.base.executemany("INSERT INTO files VALUES (?, ?, '')", ((os.fsencode(path), kind) for path, kind in files))

    def files(self, kind: str) -> Iterator[Path]:
        """Those of one kind, in the order they came."""
        for (path,) in self.base.execute("SELECT path FROM files WHERE kind = ? ORDER BY rowid", (kind,)):
            yield Path(os.fsdecode(path))

    def others(self, known: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
        """Those of no kind in `known`, with their code."""
        for path, kind in self.base.execute("SELECT path, kind FROM files ORDER BY rowid"):
            if kind not in known:
                yield Path(os.fsdecode(path)), kind

    def count(self, kind: str) -> int:
        """How many files are of one kind."""
        return int(self.base.execute("SELECT COUNT(*) FROM files WHERE kind = ?", (kind,)).fetchone()[0])

    def add_slices(self, slices: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep headers, packed."""
        self.base.executemany("INSERT INTO slices VALUES (?, ?)", slices)

    def count_series(self) -> int:
        """How many series the headers make."""
        self.base.execute("CREATE INDEX IF NOT EXISTS by_series ON slices (series)")
        return int(self.base.execute("SELECT COUNT(DISTINCT series) FROM slices").fetchone()[0])

    def series(self) -> Iterator[list[bytes]]:
        """The headers, packed, a series at a time, files in the order they came."""
        rows = self.base.execute("SELECT series, header FROM slices ORDER BY series, rowid")
        for _, group in groupby(rows, key=lambda row: row[0]):
            yield [header for _, header in group]
