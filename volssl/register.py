"""The rows of an index while it is made, on disk: copies are joined and patients divided there, so that memory holds numbers alone."""

from __future__ import annotations

import pickle
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from volssl.fingerprint import Print, close_pairs
from volssl.rows import Row
from volssl.splits import held_out

TABLES = """
CREATE TABLE series (number INTEGER PRIMARY KEY, scan_id TEXT, patient_id TEXT, content_hash TEXT, usable INTEGER, place TEXT, row BLOB);
CREATE TABLE prints (number INTEGER PRIMARY KEY, series INTEGER, kind TEXT, means BLOB);
CREATE TABLE patients (number INTEGER PRIMARY KEY, patient_id TEXT UNIQUE, split TEXT);
"""
INDICES = """
CREATE INDEX by_scan ON series (scan_id);
CREATE INDEX by_patient ON series (patient_id, usable);
CREATE INDEX by_content ON series (content_hash, usable);
CREATE INDEX by_place ON series (place) WHERE place != '';
CREATE INDEX by_kind ON prints (kind);
"""


class Register:
    """Rows go in one by one, are joined and divided, and come out in the order of their scan_id.

    Args: base: an open, temporary database; whoever made it deletes it.
    """

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base
        self.series = 0
        self.verdicts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._modalities: Counter[str] = Counter()
        base.executescript(TABLES)

    def add(self, row: Row, *, prints: Sequence[Print] = (), place: str = "") -> None:
        """Take one row. Of a usable one also its fingerprints, and `place`, which is equal for files of one grid in one folder, or ""."""
        self.series += 1
        self.verdicts[row.verdict] += 1
        self._reasons.update(row.reasons)
        self._repairs.update(row.repairs)
        self._modalities.update([row.modality] * row.usable)
        values = (self.series, row.scan_id, row.patient_id, row.content_hash, row.usable, place if row.usable else "", pickle.dumps(row))
        self._base.execute("INSERT INTO series VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        for one in prints if row.usable else ():
            kept = (self.series, repr((one.shape_vox, one.axis)), np.asarray(one.means, dtype=np.float32).tobytes())
            self._base.execute("INSERT INTO prints (series, kind, means) VALUES (?, ?, ?)", kept)

    def divide(self, *, tolerance: float, siblings: int, seed: int, share: float) -> None:
        """Give copies one content hash, the least of theirs, and every usable row its split; once, after all rows are in.

        Args: tolerance: as in `fingerprint.close_pairs`. siblings: so many rows of one place, or fewer, are one patient's. seed, share: as
            in `splits.held_out`. Patients who hold one and the same scan stay together.
        """
        self._base.executescript(INDICES)
        kinds = self._base.execute("SELECT kind FROM prints GROUP BY kind HAVING COUNT(*) > 1")
        for (kind,) in kinds:
            self._join_copies(kind, tolerance)
        self._base.execute(
            "INSERT INTO patients (patient_id, split) "
            "SELECT patient_id, 'train' FROM series WHERE usable GROUP BY patient_id ORDER BY patient_id"
        )
        names = (name for (name,) in self._base.execute("SELECT patient_id FROM patients ORDER BY number"))
        chosen = np.flatnonzero(held_out(names, self._joins(siblings), seed=seed, share=share))
        self._base.executemany("UPDATE patients SET split = 'val' WHERE number = ?", ((int(place) + 1,) for place in chosen))

    def _join_copies(self, kind: str, tolerance: float) -> None:
        found = self._base.execute("SELECT number, series FROM prints WHERE kind = ? ORDER BY number", (kind,))
        numbers_N2 = np.fromiter(found, dtype=np.dtype((np.int64, 2)))

        def means_of(places: np.ndarray) -> np.ndarray:
            blobs = [self._one("SELECT means FROM prints WHERE number = ?", int(number)) for number in numbers_N2[places, 0]]
            return np.frombuffer(b"".join(blobs), dtype=np.float32).reshape(len(blobs), -1)

        for pair in close_pairs(len(numbers_N2), means_of, tolerance=tolerance):
            one, two = (self._one("SELECT content_hash FROM series WHERE number = ?", int(numbers_N2[place, 1])) for place in pair)
            if one != two:
                self._base.execute("UPDATE series SET content_hash = ? WHERE content_hash = ?", (min(one, two), max(one, two)))

    def _joins(self, siblings: int) -> Iterator[tuple[int, int]]:
        # Places of patients, in the order of their pseudonyms, who hold one scan or whose files lie side by side.
        who = "SELECT {0}, patients.number - 1 FROM series JOIN patients USING (patient_id) WHERE usable {1} ORDER BY {0}"
        few = "AND place != '' AND place IN (SELECT place FROM series WHERE place != '' GROUP BY place HAVING COUNT(*) BETWEEN 2 AND ?)"
        for found in (self._base.execute(who.format("content_hash", "")), self._base.execute(who.format("place", few), (siblings,))):
            yield from _with_the_first(found)

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of their scan_id, as `divide` left them."""
        query = "SELECT row, content_hash, split FROM series LEFT JOIN patients ON usable AND series.patient_id = patients.patient_id"
        for row, content_hash, split in self._base.execute(query + " ORDER BY scan_id, series.number"):
            yield replace(pickle.loads(row), content_hash=content_hash, split=split or "")

    def summary(self) -> dict[str, Any]:
        """Counts over all rows, for summary.json; after `divide`."""
        splits = self._base.execute("SELECT split, COUNT(*) FROM series JOIN patients USING (patient_id) WHERE usable GROUP BY split")
        return {
            "series": self.series,
            "patients": self._one("SELECT COUNT(*) FROM (SELECT DISTINCT patient_id FROM series)"),
            "verdicts": _sorted(self.verdicts),
            "reasons": _sorted(self._reasons),
            "repairs": _sorted(self._repairs),
            "accepted_modalities": _sorted(self._modalities),
            "accepted_splits": _sorted(dict(splits)),
            "duplicates": self._one("SELECT COUNT(*) - COUNT(DISTINCT content_hash) FROM series WHERE usable"),
        }

    def _one(self, query: str, *values: Any) -> Any:
        return self._base.execute(query, values).fetchone()[0]


def _with_the_first(found: Iterable[tuple[str, int]]) -> Iterator[tuple[int, int]]:
    # Of sorted (group, number): each number with the first one of its group.
    group, first = "", 0
    for name, number in found:
        if name != group:
            group, first = name, number
        elif number != first:
            yield first, number


def _sorted(counts: Counter[str] | dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))
