"""Verb quality, and the end of verb index: what an archive holds, on one self-contained page, INDEX/quality.html.

All series are counted, a few of each verdict are shown: neither the page nor the memory grows with the archive. The page holds
pseudonyms and counts; its thumbnails are voxels, which may show a face.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from volssl import archive
from volssl.files import BadInput, Outcome, read_json, write_text
from volssl.glimpse import LARGEST_VOX, glimpse
from volssl.page import embedded, render
from volssl.pictures import window_of
from volssl.reasons import explained
from volssl.rows import SOURCES, Row, Rows, Sources
from volssl.thumbnails import middle_planes, planes_png
from volssl.volume import Volume

Over = Callable[..., Iterable[Any]]
SHOWN = {"accept": 6, "repair": 6, "reject": 8}  # thumbnails of each verdict
MOST_PARTS = 40
GROUPS = 400  # kinds of series of which samples are kept
UNSEEN = {"burned_in_annotation", "secondary_capture", "rgb"}  # screenshots, most of all, have names in their pixels
WINDOW_HU = (-1000.0, 700.0)
VERDICTS = {"accept": "accepted", "repair": "to repair", "reject": "refused"}
# That tag is free text: only these names leave the private folder.
VENDORS = {
    **{"SIEMENS": "Siemens", "GE MED": "GE", "GENERAL ELECTRIC": "GE", "PHILIPS": "Philips", "CANON": "Canon", "TOSHIBA": "Toshiba"},
    **{"HITACHI": "Hitachi", "FUJI": "Fujifilm", "SHIMADZU": "Shimadzu", "UIH": "United Imaging", "UNITED IMAGING": "United Imaging"},
    **{"NEUSOFT": "Neusoft", "SAMSUNG": "Samsung", "ESAOTE": "Esaote", "BRUKER": "Bruker", "HYPERFINE": "Hyperfine"},
}
# Ends of the columns of each histogram; the last column is open.
EDGES: dict[str, tuple[float, ...]] = {
    "in_plane": (0, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0),
    "step": (0, 0.8, 1.25, 1.75, 2.5, 3.5, 5.5, 8.0, 12.0),
    "slices": (1, 8, 16, 32, 64, 128, 256, 512, 1024),
    "extent": (0, 50, 100, 200, 300, 400, 500, 700, 1000),
}
TITLES = {
    "in_plane": "Pixel size in plane (mm)",
    "step": "Distance of slices (mm)",
    "slices": "Slices",
    "extent": "Length of the stack (mm)",
}


@dataclass(frozen=True)
class Look:
    """What a page shows: `thumbnails` of a few scans; `vendors` of the scanners, counted."""

    thumbnails: bool = True
    vendors: bool = False


@dataclass
class Tally:
    """Counts over all rows of an index, taken in one pass; numbers are counted at the precision that is shown."""

    series: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    modalities: Counter[tuple[str, str]] = field(default_factory=Counter)
    parts: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    numbers: dict[tuple[str, str], Counter[float]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Count one row."""
        self.series += 1
        self.verdicts[row.verdict] += 1
        self.modalities[row.modality or "unknown", row.verdict] += 1
        self.parts[row.body_part or "not said", row.verdict] += 1
        self.reasons.update((code, row.verdict) for code in row.reasons)
        self.repairs.update(row.repairs)
        if row.split:
            self.splits[row.split] += 1
        if row.usable and len(row.shape_vox) == 3 and len(row.spacing_mm) == 3:
            self._measure(row)

    def _measure(self, row: Row) -> None:
        axis = next((one for one in (2, 1, 0) if row.shape_vox[one] == row.num_slices), 2)
        in_plane = [one for one in range(3) if one != axis]
        self.sizes[row.shape_vox[in_plane[0]], row.shape_vox[in_plane[1]]] += 1
        found = {
            "in_plane": max(row.spacing_mm[one] for one in in_plane),
            "step": row.spacing_mm[axis],
            "slices": row.shape_vox[axis],
            "extent": round(row.shape_vox[axis] * row.spacing_mm[axis]),
        }
        for name, value in found.items():
            self.numbers.setdefault((name, row.modality), Counter())[round(float(value), 2)] += 1


class Sample:
    """A few rows of every kind, taken in one pass: those with the least scan_id, which is a keyed hash and so a fair draw."""

    def __init__(self, count: int, kind: Callable[[Row], Any]) -> None:
        self._count, self._kind = count, kind
        self._kept: dict[Any, list[tuple[_Backwards, Row]]] = {}
        self._sizes: Counter[Any] = Counter()

    def add(self, row: Row) -> None:
        """See one row."""
        kind = self._kind(row)
        self._sizes[kind] += 1
        if kind not in self._kept and len(self._kept) >= GROUPS:
            return
        kept = self._kept.setdefault(kind, [])
        heapq.heappush(kept, (_Backwards(row.scan_id), row))
        if len(kept) > self._count:
            heapq.heappop(kept)

    def rows(self) -> Iterator[Row]:
        """One row of each kind in turn, the commonest kind first."""
        kinds = sorted(self._kept, key=lambda kind: (-self._sizes[kind], str(kind)))
        columns = [sorted((row for _, row in self._kept[kind]), key=lambda row: row.scan_id) for kind in kinds]
        for place in range(self._count):
            yield from (column[place] for column in columns if place < len(column))


class _Backwards(str):
    """Text that sorts backwards, so that the head of a heap is the last."""

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def run(folder: Path, *, look: Look = Look()) -> Outcome:
    """Write the page of an index or a store anew.

    Raises: BadInput: neither an index nor a store.
    """
    folder = Path(folder)
    if (folder / "index.csv").is_file():
        return Outcome(write_quality(folder, look=look))
    if (folder / "store.json").is_file():
        from volssl.preview import write_preview

        return Outcome(write_preview(folder, thumbnails=look.thumbnails))
    raise BadInput(f"{folder}: must be an index or a store; found neither index.csv nor store.json")


def write_quality(index: Path, *, look: Look = Look(), over: Over = map) -> Path:
    """Write INDEX/quality.html from what the index left.

    Args: over: a `map`, possibly that of an executor; draws thumbnails.
    Returns: the page. Raises: BadInput: no index there.
    """
    tally = Tally()
    samples = {
        "accept": Sample(SHOWN["accept"], lambda row: (row.modality, row.body_part)),
        "repair": Sample(SHOWN["repair"], lambda row: row.reasons),
        "reject": Sample(SHOWN["reject"], lambda row: row.reasons),
    }
    for row in Rows(index / "index.csv"):
        tally.add(row)
        if look.thumbnails and not UNSEEN & set(row.reasons):
            samples[row.verdict].add(row)
    summary = read_json(index / "summary.json")
    page = render(
        "quality.html",
        tally=tally,
        summary=summary,
        verdicts=VERDICTS,
        reasons=_reason_rows(tally),
        files=[
            _file_row(kind, code, count) for kind in ("unreadable", "ignored") for code, count in summary.get(f"files_{kind}", {}).items()
        ],
        modalities=_modality_rows(tally),
        parts_table=_by_verdict(tally.parts)[:MOST_PARTS],
        charts=[_chart(name, tally) for name in EDGES],
        sizes=tally.sizes.most_common(8),
        vendors=_vendors(index) if look.vendors else [],
        shown=_figures(index, {verdict: list(islice(samples[verdict].rows(), SHOWN[verdict])) for verdict in VERDICTS}, over=over)
        if look.thumbnails
        else {},
    )
    write_text(index / "quality.html", page)
    return index / "quality.html"


# ------------------------------------------------------------------------------------------------ tables


def _by_verdict(counts: Counter[tuple[str, str]]) -> list[tuple[str, list[int]]]:
    # Name -> its count for each verdict, the commonest first.
    table: dict[str, list[int]] = {}
    for (name, verdict), count in counts.items():
        table.setdefault(name, [0] * len(VERDICTS))[list(VERDICTS).index(verdict)] += count
    return sorted(table.items(), key=lambda entry: (-sum(entry[1]), entry[0]))


def _reason_rows(tally: Tally) -> list[dict[str, Any]]:
    return [{"code": code, "counts": counts, "told": explained(code)} for code, counts in _by_verdict(tally.reasons)]


def _file_row(kind: str, code: str, count: int) -> dict[str, Any]:
    return {"kind": "not read" if kind == "unreadable" else "left aside", "code": code, "count": count, "told": explained(code)}


def _modality_rows(tally: Tally) -> list[dict[str, Any]]:
    rows = []
    for modality, counts in _by_verdict(tally.modalities):
        ranges = {name: _range(tally.numbers.get((name, modality), Counter())) for name in EDGES}
        rows.append({"modality": modality, "counts": counts, "ranges": ranges})
    return rows


def _range(counts: Counter[float]) -> str:
    # Median, and the middle nine tenths.
    if not counts:
        return "–"
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    low, middle, high = (values[int(np.searchsorted(ends, share * ends[-1]))] for share in (0.05, 0.5, 0.95))
    return f"{middle:g}" if low == high else f"{middle:g} ({low:g} to {high:g})"


def _chart(name: str, tally: Tally) -> dict[str, Any]:
    edges = EDGES[name]
    columns = np.zeros(len(edges), dtype=int)
    for (measured, _), counts in tally.numbers.items():
        if measured == name:
            for value, count in counts.items():
                columns[max(0, int(np.searchsorted(edges, value, side="right")) - 1)] += count
    most = max(1, int(columns.max()))
    return {
        "title": TITLES[name],
        "columns": [{"from": f"{edge:g}", "count": int(count), "share": count / most} for edge, count in zip(edges, columns, strict=True)],
    }


# ------------------------------------------------------------------------------------------------ thumbnails


def _figures(index: Path, shown: dict[str, list[Row]], *, over: Over) -> dict[str, list[dict[str, Any]]]:
    """Captions with pictures of the rows of each verdict; a scan that cannot be drawn says why."""
    file = index / "private" / SOURCES
    if not file.is_file():  # the private part was left behind
        return {verdict: [] for verdict in shown}
    sources = Sources(file)
    drawn = iter(over(_picture, [(row, sources[row.scan_id]) for rows in shown.values() for row in rows]))
    return {verdict: [_figure(row, *next(drawn)) for row in rows] for verdict, rows in shown.items()}


def _figure(row: Row, picture: bytes, why: str) -> dict[str, Any]:
    told = [(code, explained(code)[0]) for code in row.reasons]
    return {"row": row, "facts": _facts(row), "picture": embedded(picture, "png"), "why": why, "told": told}


def _picture(what: tuple[Row, archive.Source]) -> tuple[bytes, str]:
    row, source = what
    if row.shape_vox and float(np.prod(np.array(row.shape_vox, dtype=float))) > LARGEST_VOX:
        return b"", "too large to be drawn here"
    try:
        volume = _volume(row, source).reoriented("RAS")
    except archive.Unreadable as error:
        return b"", explained(error.code)[0]
    except MemoryError:
        return b"", explained("out_of_memory")[0]
    array_XYZ = volume.array_CXYZ[0]
    window = WINDOW_HU if row.modality == "CT" else window_of(array_XYZ, np.zeros(array_XYZ.shape, dtype=bool))
    return planes_png(middle_planes(array_XYZ), volume.grid.spacing_mm, window=window), ""


def _volume(row: Row, source: archive.Source) -> Volume:
    try:
        return archive.read_source(source)
    except archive.Unreadable:
        seen = glimpse(source) if row.verdict == "reject" else None
        if seen is None:
            raise
        return seen


def _vendors(index: Path) -> list[tuple[str, int]]:
    """Series of each maker of scanners, the commonest first. One header of each series is read again."""
    if not (index / "private" / SOURCES).is_file():
        raise BadInput(f"{index / 'private'}: must be there to count the makers of scanners; found nothing; leave out --vendors")
    counts: Counter[str] = Counter()
    for source in Sources(index / "private" / SOURCES).values():
        if source.kind == "dicom":
            found = archive.header_or_code(source.files[0])
            said = "" if isinstance(found, str) else found.vendor.upper()
            counts[next((name for word, name in VENDORS.items() if word in said), "another" if said else "not said")] += 1
    return counts.most_common()


def _facts(row: Row) -> list[str]:
    shape = " × ".join(map(str, row.shape_vox))
    spacing = " × ".join(f"{mm:g}" for mm in row.spacing_mm)
    return [
        one for one in (row.modality, row.body_part.lower(), f"{shape} voxels" if shape else "", f"{spacing} mm" if spacing else "") if one
    ]
