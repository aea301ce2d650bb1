"""The table of an index: one row per scan in index.csv, and in INDEX/private/ how each is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from volssl.archive import Source
from volssl.files import BadInput, atomic, read_csv, write_csv

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
    """How each scan of an index is read, by scan_id. Looked up on disk, so that 100,000 series take no memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._begins: dict[str, int] = {}
        with open(file, "rb") as lines:
            begin = 0
            for line in lines:
                self._begins[line[2:].split(b'"', 1)[0].decode()] = begin
                begin += len(line)

    def __getitem__(self, scan_id: str) -> Source:
        begin = self._begins[scan_id]
        with open(self.file, "rb") as lines:
            lines.seek(begin)
            return Source.of(json.loads(lines.readline())[scan_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._begins)

    def __len__(self) -> int:
        return len(self._begins)


@dataclass(frozen=True)
class Index:
    """A loaded index: its rows, and from its private part how each scan is read."""

    rows: list[Row]
    sources: Mapping[str, Source]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write index.csv, sorted by scan_id."""
    write_csv(file, [_text(row) for row in sorted(rows, key=lambda row: row.scan_id)], [one.name for one in fields(Row)])


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


def load(index: Path) -> Index:
    """Read what `volssl index` left. Raises: BadInput: no index there, or without its private part."""
    index = Path(index)
    table = read_csv(index / "index.csv")
    try:
        rows = [parsed(row) for row in table]
    except (KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{index / 'index.csv'}: must be as `volssl index` writes it; {error!r}") from None
    if not (index / "private" / SOURCES).is_file():
        raise BadInput(f"{index / 'private'}: must name the files of every series; found no {SOURCES}; run index again")
    sources = Sources(index / "private" / SOURCES)
    if missing := [row.scan_id for row in rows if row.scan_id not in sources]:
        raise BadInput(f"{index / 'private'}: must name the files of every series; found none for {len(missing)}; run index again")
    return Index(rows, sources)


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
