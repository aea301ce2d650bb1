"""The table of an index: one row per scan in index.csv, and in INDEX/private/ how each is read."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from volssl.archive import Source
from volssl.files import BadInput, atomic, write_csv

SOURCES = "sources.jsonl"


@dataclass(frozen=True)
class Row:
    """One scan: a row of index.csv. `verdict` is accept, repair or reject, with `reasons` as codes.

    `repairs` are the codes of what reading mends; only a row with the verdict repair has some.
    """

    scan_id: str
    patient_id: str
    study_id: str
    modality: str
    body_part: str
    shape_vox: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    orientation: str
    num_slices: int
    verdict: str
    reasons: tuple[str, ...]
    content_hash: str
    split: str
    repairs: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether it can be prepared."""
        return self.verdict in ("accept", "repair")


class Sources(Mapping[str, Source]):
    """How each scan of an index is read, by scan_id. Looked up on disk: 16 bytes a scan are kept, a hash of its name and its place."""

    def __init__(self, file: Path) -> None:
        self.file = file
        begins, hashes, begin = array("q"), array("q"), 0
        with open(file, "rb") as lines:
            for line in lines:
                begins.append(begin)
                hashes.append(_hash(_name(line)))
                begin += len(line)
        order = np.argsort(np.frombuffer(hashes, dtype=np.int64), kind="stable")
        self._hashes, self._begins = np.frombuffer(hashes, dtype=np.int64)[order], np.frombuffer(begins, dtype=np.int64)[order]

    def __getitem__(self, scan_id: str) -> Source:
        near, end = (int(np.searchsorted(self._hashes, _hash(scan_id), side=side)) for side in ("left", "right"))
        with open(self.file, "rb") as lines:
            for begin in reversed(self._begins[near:end].tolist()):  # of lines with one name the last counts
                lines.seek(begin)
                line = lines.readline()
                if _name(line) == scan_id:
                    return Source.of(json.loads(line)[scan_id])
        raise KeyError(scan_id)

    def __contains__(self, scan_id: object) -> bool:
        # By its hash of 64 bits alone, without a look at the disk.
        place = int(np.searchsorted(self._hashes, _hash(str(scan_id))))
        return place < len(self._hashes) and self._hashes[place] == _hash(str(scan_id))

    def __iter__(self) -> Iterator[str]:
        with open(self.file, "rb") as lines:
            yield from map(_name, lines)

    def __len__(self) -> int:
        return len(self._begins)


def _name(line: bytes) -> str:
    return line[2:].split(b'"', 1)[0].decode()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


class Rows(Iterable[Row]):
    """The rows of an index.csv, read from disk each time they are gone through.

    Raises: BadInput, while they are: no such file, not such a table, or another one than the time before.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._facts: tuple[int, int, int] | None = None

    def __iter__(self) -> Iterator[Row]:
        try:
            with open(self.file, newline="", encoding="utf-8") as lines:
                now = os.fstat(lines.fileno())
                facts = (now.st_ino, now.st_size, now.st_mtime_ns)
                if self._facts not in (None, facts):
                    raise BadInput(f"{self.file}: must stay as it is while it is used; found another; run again")
                self._facts = facts
                yield from map(parsed, csv.DictReader(lines))
        except FileNotFoundError:
            raise BadInput(f"{self.file}: must exist; found nothing there; run `volssl index`") from None
        except BadInput:
            raise
        except (KeyError, ValueError, AttributeError) as error:
            raise BadInput(f"{self.file}: must be as `volssl index` writes it; {error!r}") from None


@dataclass(frozen=True)
class Index:
    """A loaded index: its rows, and from its private part how each scan is read."""

    rows: list[Row]
    sources: Mapping[str, Source]


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write index.csv, row by row; `rows` come in the order of their scan_id."""
    write_csv(file, map(_text, rows), [one.name for one in fields(Row)])


class SourcesFile:
    """Writes how each scan is read, a line of JSON each; the file appears when the `with` block ends without an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> SourcesFile:
        self._exit = ExitStack()
        temporary = self._exit.enter_context(atomic(self.folder / SOURCES))
        self._stream = self._exit.enter_context(open(temporary, "w", encoding="utf-8"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def add(self, scan_id: str, source: Source) -> None:
        """Write one."""
        self._stream.write(json.dumps({scan_id: source.as_json()}) + "\n")


def opened(index: Path) -> tuple[Rows, Sources]:
    """What `volssl index` left, checked and not kept: its rows, and how each is read.

    Raises: BadInput: no index there, or without its private part.
    """
    rows, private = Rows(Path(index) / "index.csv"), Path(index) / "private"
    for _ in rows:  # whether they can be read at all comes first
        pass
    if not (private / SOURCES).is_file():
        raise BadInput(f"{private}: must name the files of every series; found no {SOURCES}; run index again")
    sources = Sources(private / SOURCES)
    if missing := sum(row.scan_id not in sources for row in rows):
        raise BadInput(f"{private}: must name the files of every series; found none for {missing}; run index again")
    return rows, sources


def load(index: Path) -> Index:
    """The same with all rows in memory, a kilobyte each. Raises: BadInput: as `opened`."""
    rows, sources = opened(index)
    return Index(list(rows), sources)


def parsed(row: dict[str, str]) -> Row:
    """A row of index.csv, from its text. Raises: KeyError, ValueError: not such a row."""
    values: dict[str, Any] = {one.name: row[one.name] for one in fields(Row)}
    values["shape_vox"] = tuple(map(int, row["shape_vox"].split()))
    values["spacing_mm"] = tuple(map(float, row["spacing_mm"].split()))
    values["num_slices"] = int(row["num_slices"])
    for name in ("reasons", "repairs"):
        values[name] = tuple(code for code in row[name].split(";") if code)
    return Row(**values)


def _text(row: Row) -> dict[str, str]:
    values = asdict(row)
    for name in ("shape_vox", "spacing_mm"):
        values[name] = " ".join(map(str, values[name]))
    return values | {"reasons": ";".join(row.reasons), "repairs": ";".join(row.repairs)}
