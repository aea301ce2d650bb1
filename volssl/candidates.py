"""Tables of findings and of candidates, as LUNA16 gives them, and label maps taken as such. Positions are in world mm, LPS as in the files.

`annotations.csv`: seriesuid, coordX, coordY, coordZ, diameter_mm. `annotations_excluded.csv`: the same, irrelevant findings.
`seriesuids.csv`: one scan per line, no header. A table of candidates: seriesuid, coordX, coordY, coordZ, probability, and perhaps class.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volssl.files import BadInput, read_csv
from volssl.froc import Candidates, Findings
from volssl.lesions import components
from volssl.volume import Volume

PLACE = ("coordX", "coordY", "coordZ")
UNKNOWN_DIAMETER_MM = 10.0  # the challenge's value where a diameter is below 0, as for most irrelevant findings
TOLD = 8  # faults that a complaint lists
LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class References:
    """Findings by scan, and all scans, also those without findings. known: whether a file named the scans."""

    findings: Mapping[str, Findings]
    series: tuple[str, ...]
    known: bool


def is_findings(path: Path) -> bool:
    """Whether `path` is a table of findings, or a folder with one."""
    return path.suffix.lower() == ".csv" or (_kit(path) / "annotations.csv").is_file()


def _kit(folder: Path) -> Path:
    # The data set's own folder holds the challenge's tables, with irrelevant findings and the list of scans, further down.
    kit = folder / "evaluationScript" / "annotations"
    return kit if (kit / "annotations.csv").is_file() else folder


def read_references(path: Path) -> References:
    """Findings of annotations.csv or of the folder that holds it, beside it perhaps annotations_excluded.csv and seriesuids.csv.

    Of LUNA16's own folder those in evaluationScript/annotations are read.

    A diameter below 0 in annotations_excluded.csv is taken as 10 mm. Where seriesuids.csv is there, it says which scans count; where it is
    not, those with a finding do.
    Raises: BadInput: missing files or columns, values that are no numbers, a scan named twice.
    """
    folder = _kit(path) if path.is_dir() else path.parent
    annotations = folder / "annotations.csv" if path.is_dir() else path
    rows = [(row, True) for row in _rows(annotations, (*PLACE, "diameter_mm"))]
    if (excluded := folder / "annotations_excluded.csv").is_file():
        rows += [(row, False) for row in _rows(excluded, (*PLACE, "diameter_mm"), may_be_empty=True)]
    if bad := [f"{row.series} {row.values[3]:g}" for row, counts in rows if counts and row.values[3] <= 0]:
        raise BadInput(f"{annotations.name}: diameter_mm must be > 0; found {_some(bad)}")
    named = _series(folder / "seriesuids.csv")
    by_series: dict[str, list[tuple[_Row, bool]]] = {}
    for row, counts in rows:
        by_series.setdefault(row.series, []).append((row, counts))
    findings = {series: _findings(of) for series, of in by_series.items()}
    return References(findings, tuple(sorted(findings) if named is None else named), named is not None)


def read_candidates(path: Path, references: References) -> dict[str, Candidates]:
    """Candidates by scan. Raises: BadInput: missing columns, scores that are no numbers, rows given twice, scans that are not evaluated."""
    rows = _rows(path, (*PLACE, "probability"), optional="class")
    faults = []
    places = [(row.series, row.values[:3]) for row in rows]
    if twice := [f"{series} at {place}" for series, place in _repeated(places)]:
        faults.append(f"every candidate must be given once; found twice {_some(twice)}")
    known = set(references.series)
    if references.known and (strangers := sorted({row.series for row in rows} - known)):
        faults.append(f"every scan must be one of seriesuids.csv's {len(known)}; found {_some(strangers)}")
    classes = {row.extra for row in rows}
    if ("" in classes and len(classes) > 1) or not classes <= {"", "0", "1"}:
        faults.append(f"class must be 0 or 1 in every row, or the column absent; found {_some(sorted(map(repr, classes)))}")
    if faults:
        raise BadInput(f"candidates {path.name}: " + "; ".join(faults) + "; mend the table")
    by_series: dict[str, list[_Row]] = {}
    for row in rows:
        by_series.setdefault(row.series, []).append(row)
    return {series: _candidates(of) for series, of in by_series.items()}


def candidates_of(volume: Volume) -> Candidates:
    """A label map's 26-connected components as candidates: centres, and probability 1, since a label map tells none."""
    at_N3, _ = _parts(volume)
    return Candidates(at_N3, np.ones(len(at_N3)), told=False)


def findings_of(volume: Volume) -> Findings:
    """A label map's 26-connected components as findings: centres, and the radius of a ball of the same volume."""
    at_N3, volumes_mm3 = _parts(volume)
    return Findings(at_N3, np.cbrt(volumes_mm3 * 3 / (4 * math.pi)), np.ones(len(at_N3), dtype=bool))


def _parts(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    numbers, count = components(volume.array_CXYZ[0] > 0, 26)
    voxels_N3 = np.argwhere(numbers)
    of = numbers[tuple(voxels_N3.T)]
    sizes = np.bincount(of, minlength=count + 1)[1:]
    centres = [np.bincount(of, voxels_N3[:, axis], minlength=count + 1)[1:] / np.maximum(sizes, 1) for axis in range(3)]
    at_N3 = volume.grid.world(np.stack(centres, axis=1)) * LPS
    return at_N3, sizes * float(abs(np.linalg.det(volume.grid.affine[:3, :3])))


# ------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class _Row:
    series: str
    values: tuple[float, ...]
    extra: str


def _rows(path: Path, columns: Sequence[str], optional: str = "", *, may_be_empty: bool = False) -> list[_Row]:
    try:
        read = read_csv(path)
        with open(path, newline="", encoding="utf-8") as lines:
            header = next(csv.reader(lines), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path.name}: must be a table of text (CSV); {error}") from None
    lacking = [name for name in ("seriesuid", *columns) if name not in header]
    if lacking or not (read or may_be_empty):
        found = f"the columns {', '.join(header)}" if lacking and header else "no rows"
        raise BadInput(f"{path.name}: must have rows with the columns seriesuid, {', '.join(columns)}; found {found}; mend the table")
    rows, faults = [], []
    for line, row in enumerate(read, start=2):
        values = [_number(row[name]) for name in columns]
        bad = [f"line {line}, {name}: {row[name]!r}" for name, value in zip(columns, values, strict=True) if not math.isfinite(value)]
        faults += [*bad, *([f"line {line}: no seriesuid"] if not row["seriesuid"] else [])]
        rows.append(_Row(row["seriesuid"], tuple(values), (row.get(optional) or "").strip()))
    if faults:
        raise BadInput(f"{path.name}: {', '.join(columns)} must be finite numbers; found {_some(faults)}; mend the table")
    return rows


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _series(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    names = [line.split(",")[0].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [name for name in names if name.lower() != "seriesuid"]
    if twice := _repeated(names):
        raise BadInput(f"{path.name}: every scan must be named once; found twice {_some(twice)}")
    if not names:
        raise BadInput(f"{path.name}: must name the scans, one per line; found none")
    return sorted(names)


def _repeated(items: Sequence[Any]) -> list[Any]:
    return sorted(item for item, count in Counter(items).items() if count > 1)


def _findings(rows: Sequence[tuple[_Row, bool]]) -> Findings:
    values = np.array([row.values for row, _ in rows])
    diameters = np.where(values[:, 3] < 0, UNKNOWN_DIAMETER_MM, values[:, 3])
    return Findings(values[:, :3], diameters / 2, np.array([counts for _, counts in rows]))


def _candidates(rows: Sequence[_Row]) -> Candidates:
    values = np.array([row.values for row in rows])
    classes = np.array([int(row.extra) for row in rows]) if rows[0].extra else None
    return Candidates(values[:, :3], values[:, 3], classes)


def _some(found: Iterable[str]) -> str:
    listed = list(found)
    more = f" and {len(listed) - TOLD} more" if len(listed) > TOLD else ""
    return ", ".join(listed[:TOLD]) + more
