"""What the index has gathered so far, on disk: memory does not grow with the files and series of an archive."""

from __future__ import annotations

import errno
import os
import pickle
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from volssl.dicom import Slice

# The index stands from the beginning: made over many rows, it would be sorted in a temporary file outside of the private folder.
TABLES = """
CREATE TABLE files (path BLOB, kind TEXT);
CREATE TABLE aside (path BLOB UNIQUE, code TEXT, ignored INTEGER, file_id TEXT);
CREATE TABLE slices (series BLOB, header BLOB);
CREATE INDEX by_series ON slices (series);
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
        """Keep files that are to be read, with their kind."""
        self.base.executemany("INSERT INTO files VALUES (?, ?)", ((os.fsencode(path), kind) for path, kind in files))

    def files(self, kind: str) -> Iterator[Path]:
        """Those of one kind, in the order they came."""
        for (path,) in self.base.execute("SELECT path FROM files WHERE kind = ? ORDER BY rowid", (kind,)):
            yield Path(os.fsdecode(path))

    def set_aside(self, files: Iterable[tuple[Path, str]], *, ignored: Collection[str]) -> None:
        """Keep files that are no scans, each once, with a code: one of `ignored`, or why it cannot be read. The last word counts."""
        rows = ((os.fsencode(path), code, code in ignored) for path, code in files)
        self.base.executemany(
            "INSERT INTO aside VALUES (?, ?, ?, '') ON CONFLICT DO UPDATE SET code = excluded.code, ignored = excluded.ignored", rows
        )

    def count_aside(self, *, ignored: bool) -> dict[str, int]:
        """How many files were ignored, or could not be read, by code."""
        return dict(self.base.execute("SELECT code, COUNT(*) FROM aside WHERE ignored = ? GROUP BY code ORDER BY code", (ignored,)))

    def aside(self, name: Callable[[str], str]) -> Iterator[tuple[str, str, str]]:
        """(file_id, code, path): of files that cannot be read, as `name` makes it of the path, then of those ignored, without one."""
        self.base.create_function("name", 1, lambda path: name(os.fsdecode(path)), deterministic=True)
        self.base.execute("UPDATE aside SET file_id = name(path) WHERE NOT ignored")
        for ignored in (False, True):
            found = self.base.execute("SELECT file_id, code, path FROM aside WHERE ignored = ? ORDER BY rowid", (ignored,))
            yield from ((file_id, code, os.fsdecode(path)) for file_id, code, path in found)

    def failures(self) -> Iterator[tuple[str, str]]:
        """file_id and code of the files that cannot be read, in the order of the former, once `aside` has named them."""
        yield from self.base.execute("SELECT file_id, code FROM aside WHERE NOT ignored ORDER BY file_id")

    def count(self, kind: str) -> int:
        """How many files are of one kind."""
        return int(self.base.execute("SELECT COUNT(*) FROM files WHERE kind = ?", (kind,)).fetchone()[0])

    def add_slices(self, slices: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep headers, packed."""
        self.base.executemany("INSERT INTO slices VALUES (?, ?)", slices)

    def count_series(self) -> int:
        """How many series the headers make."""
        return int(self.base.execute("SELECT COUNT(DISTINCT series) FROM slices").fetchone()[0])

    def series(self) -> Iterator[list[bytes]]:
        """The headers, packed, a series at a time, files in the order they came."""
        rows = self.base.execute("SELECT series, header FROM slices ORDER BY series, rowid")
        for _, group in groupby(rows, key=lambda row: row[0]):
            yield [header for _, header in group]
