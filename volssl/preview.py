"""What a store holds, on one self-contained page: STORE/preview.html. Counts over all volumes, pictures of a few."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from volssl.files import read_csv, write_text
from volssl.page import embedded, render
from volssl.pictures import PLANE_AXIS, PLANES, plane_of
from volssl.reasons import explained
from volssl.store import Entry, Store
from volssl.thumbnails import Box, planes_png

SHOWN = {"train": 9, "val": 3}
AXES = ("left to right", "back to front", "feet to head")


def write_preview(store: Path, *, thumbnails: bool = True) -> Path:
    """Write STORE/preview.html. The same store gives the same page. Returns: the page. Raises: BadInput: no finished store there."""
    path = Path(store)
    opened = Store.open(path)
    rows = opened.rows
    failed = Counter(row["reason"] for row in read_csv(path / "failures.csv")) if (path / "failures.csv").exists() else Counter()
    entries = {split: [row for row in rows if row.split == split] for split in SHOWN}
    page = render(
        "preview.html",
        about=opened.about,
        spacing=" × ".join(f"{mm:g}" for mm in opened.about.spacing_mm),
        window=" to ".join(f"{value:g}" for value in opened.about.window),
        clip=" to ".join(f"{value:g}" for value in opened.about.clip),
        volumes=len(rows),
        patients={split: len({row.patient_id for row in entries[split]}) for split in SHOWN},
        splits={split: len(entries[split]) for split in SHOWN},
        extents=_extents(rows, opened.about.spacing_mm),
        body_share=_range([_share(row) for row in rows]),
        failures=[{"code": code, "count": count, "told": explained(code)} for code, count in failed.most_common()],
        shown={split: [_figure(opened, row) for row in entries[split][:count]] for split, count in SHOWN.items()} if thumbnails else {},
    )
    write_text(path / "preview.html", page)
    return path / "preview.html"


def _extents(rows: list[Entry], spacing_mm: tuple[float, ...]) -> list[dict[str, str]]:
    # Of the stored boxes and of the bodies in them, along each axis.
    table = []
    for axis, name in enumerate(AXES):
        stored = [row.shape_vox[axis] for row in rows]
        body = [(row.body_stop[axis] - row.body_start[axis]) * spacing_mm[axis] for row in rows]
        length = [n * spacing_mm[axis] for n in stored]
        table.append({"name": name, "vox": _range(stored), "mm": _range(length), "body": _range(body)})
    return table


def _share(row: Entry) -> float:
    body = np.prod(np.subtract(row.body_stop, row.body_start), dtype=float)
    return 100 * float(body / np.prod(row.shape_vox, dtype=float))


def _range(values: list[Any]) -> str:
    if not values:
        return "–"
    low, middle, high = (f"{value:.0f}" for value in np.quantile(values, (0, 0.5, 1)))
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
