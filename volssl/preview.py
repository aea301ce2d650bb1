"""What a store holds, on one self-contained page: STORE/preview.html. Counts over all volumes in one pass, pictures of a few."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from volssl.files import BadInput, write_text
from volssl.page import embedded, render
from volssl.pictures import PLANE_AXIS, PLANES, plane_of
from volssl.reasons import explained
from volssl.store import Entry, Store, read_about
from volssl.thumbnails import Box, planes_png

SHOWN = {"train": 9, "val": 3}
AXES = ("left to right", "back to front", "feet to head")


@dataclass
class Tally:
    """Counts over all volumes of a store; numbers are counted at the precision that is shown."""

    volumes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    patients: dict[str, set[int]] = field(default_factory=dict)
    sizes: dict[tuple[str, int], Counter[int]] = field(default_factory=dict)
    shares: Counter[int] = field(default_factory=Counter)
    first: dict[str, list[Entry]] = field(default_factory=lambda: {split: [] for split in SHOWN})

    def add(self, row: Entry) -> None:
        """Count one volume."""
        self.volumes += 1
        self.splits[row.split] += 1
        self.patients.setdefault(row.split, set()).add(hash(row.patient_id))
        body = np.subtract(row.body_stop, row.body_start)
        for axis in range(3):
            self.sizes.setdefault(("stored", axis), Counter())[row.shape_vox[axis]] += 1
            self.sizes.setdefault(("body", axis), Counter())[int(body[axis])] += 1
        self.shares[round(100 * float(np.prod(body, dtype=float) / np.prod(row.shape_vox, dtype=float)))] += 1
        kept = self.first.get(row.split)
        if kept is not None and len(kept) < SHOWN[row.split]:  # the manifest is sorted by keyed hashes: a fair draw
            kept.append(row)


def write_preview(store: Path, *, thumbnails: bool = True) -> Path:
    """Write STORE/preview.html. The same store gives the same page. Returns: the page. Raises: BadInput: no finished store there."""
    path = Path(store)
    about, tally = read_about(path), Tally()
    for row in _entries(path / "manifest.csv"):
        tally.add(row)
    opened, failed = Store(path, about, []), _failures(path / "failures.csv")
    page = render(
        "preview.html",
        about=about,
        spacing=" × ".join(f"{mm:g}" for mm in about.spacing_mm),
        window=" to ".join(f"{value:g}" for value in about.window),
        clip=" to ".join(f"{value:g}" for value in about.clip),
        volumes=tally.volumes,
        patients={split: len(tally.patients.get(split, ())) for split in SHOWN},
        splits={split: tally.splits[split] for split in SHOWN},
        extents=_extents(tally, about.spacing_mm),
        body_share=_range(tally.shares),
        failures=[{"code": code, "count": count, "told": explained(code)} for code, count in failed.most_common()],
        shown={split: [_figure(opened, row) for row in rows] for split, rows in tally.first.items()} if thumbnails else {},
    )
    write_text(path / "preview.html", page)
    return path / "preview.html"


def _entries(manifest: Path) -> Iterator[Entry]:
    if not manifest.is_file():
        raise BadInput(f"store {manifest.parent}: must be finished; found no manifest.csv; run `volssl prepare` on it with --resume")
    try:
        with open(manifest, newline="", encoding="utf-8") as lines:
            yield from map(Entry.of, csv.DictReader(lines))
    except (KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{manifest}: must be a manifest as prepare writes it; {type(error).__name__} while reading") from None


def _failures(table: Path) -> Counter[str]:
    if not table.is_file():
        return Counter()
    with open(table, newline="", encoding="utf-8") as lines:
        return Counter(row["reason"] for row in csv.DictReader(lines))


def _extents(tally: Tally, spacing_mm: tuple[float, ...]) -> list[dict[str, str]]:
    # Of the stored boxes and of the bodies in them, along each axis.
    table = []
    for axis, name in enumerate(AXES):
        stored, body = (tally.sizes.get((kind, axis), Counter()) for kind in ("stored", "body"))
        row = {"name": name, "vox": _range(stored), "mm": _range(stored, spacing_mm[axis]), "body": _range(body, spacing_mm[axis])}
        table.append(row)
    return table


def _range(counts: Counter[int], unit: float = 1.0) -> str:
    # Median, least and largest.
    if not counts:
        return "–"
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    middle = values[int(np.searchsorted(ends, 0.5 * ends[-1]))]
    low, middle, high = (f"{value * unit:.0f}" for value in (values[0], middle, values[-1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def _figure(store: Store, row: Entry) -> dict[str, Any]:
    # Three slices through the middle of the body, each read by itself.
    middle = [(start + stop) // 2 for start, stop in zip(row.body_start, row.body_stop, strict=True)]
    planes = []
    for plane in PLANES:
        start, size = [0, 0, 0], list(row.shape_vox)
        start[PLANE_AXIS[plane]], size[PLANE_AXIS[plane]] = middle[PLANE_AXIS[plane]], 1
        planes.append(plane_of(store.read_box(row.scan_id, start, size)[0], plane, 0))
    box = Box(row.body_start, row.body_stop)
    picture = planes_png(planes, store.about.spacing_mm, window=store.about.window, box=box)
    return {"row": row, "picture": embedded(picture, "png"), "shape": " × ".join(map(str, row.shape_vox))}
