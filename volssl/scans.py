"""Scans as an encoder is to see them: those of a store as they lie there, images and DICOM prepared as the bundle's card says.

For a store no library that reads archives is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volssl.card import preparation_of, stored_as
from volssl.files import BadInput
from volssl.store import Entry, Store, Triple
from volssl.volume import Grid

if TYPE_CHECKING:
    from volssl.inputs import Item
    from volssl.preparation import Preparation

BODY_ABOVE = 0.1  # on the [0, 1] scale, as where patches are drawn for pretraining


@dataclass(frozen=True)
class Scan:
    """One scan. `read(start, size)` gives the voxels of a box, (C, X, Y, Z), air beyond the scan; `window` are the values that map to 0, 1.

    Attributes: scan_id, patient_id, split: of the store; of a file a running number with a hash of its voxels, "" and "". name: of the
        image file, where that was asked for. grid: of the voxels. start, stop: of the body. key: what patches are drawn by.
    """

    scan_id: str
    patient_id: str
    split: str
    grid: Grid
    start: Triple
    stop: Triple
    window: tuple[float, float]
    read: Callable[[Sequence[int], Sequence[int]], np.ndarray]
    key: str
    name: str = ""


@dataclass(frozen=True)
class Given:
    """A scan that is opened when its turn comes. `shown`: how tables call it. `told`: a complaint about it, without paths."""

    shown: str
    open: Callable[[], Scan]
    told: Callable[[BadInput], str]
    patient_id: str = ""


def is_store(path: Path) -> bool:
    """Whether a prepared store lies there, finished or not."""
    return (path / "store.json").is_file()


def of_store(path: Path, card: Mapping[str, Any]) -> list[Given]:
    """The scans of a store, in the order of its manifest. Raises: BadInput: no finished store, or voxels other than the card says."""
    store = Store.open(path)
    if faults := _faults(store, card):
        raise BadInput(f"store {path}: must hold voxels as the bundle's card says; prepare it with like=BUNDLE:\n  " + "\n  ".join(faults))
    told = partial(_without, str(store.path))
    return [Given(row.scan_id, partial(_stored, store, row, card["in_channels"]), told, row.patient_id) for row in store.rows]


def _without(folder: str, error: BadInput) -> str:
    return str(error).replace(folder, "the store")


def _faults(store: Store, card: Mapping[str, Any]) -> list[str]:
    about = store.about
    found = {
        "orientation": about.orientation,
        "modality": about.modality,
        "spacing_mm": list(about.spacing_mm),
        "intensity.clip": list(about.clip),
        "intensity.window": list(about.window),
        "intensity.percentiles": (about.recipe.get("intensity") or {}).get("percentiles"),
    }
    wanted = {"orientation": card["orientation"], **stored_as(card)}
    return [f"{key} must be {value}; found {found[key]}" for key, value in wanted.items() if found[key] != value]


def _stored(store: Store, row: Entry, channels: int) -> Scan:
    if row.channels != channels:
        raise BadInput(f"the scan must have the encoder's {channels} channel(s); found {row.channels}")
    return Scan(
        scan_id=row.scan_id,
        patient_id=row.patient_id,
        split=row.split,
        grid=Grid(row.shape_vox, np.array(row.affine).reshape(4, 4)),
        start=row.body_start,
        stop=row.body_stop,
        window=store.window,
        read=partial(store.read_box, row.scan_id),
        key=row.scan_id,
    )


def of_files(paths: Sequence[Path], card: Mapping[str, Any], *, names: bool) -> tuple[list[Given], list[dict[str, str]]]:
    """Images and DICOM series, and failures.csv's rows of what cannot be read or is refused by the index's gates.

    Args: names: whether tables may hold the names of image files; else a number stands for each input.
    Raises: BadInput: nothing there.
    """
    from volssl.inputs import gather, reason_of
    from volssl.preparation import Preparation

    items, failures = gather(paths, channels=card["in_channels"], distinct=False)
    preparation = Preparation(**preparation_of(card))
    given = []
    for number, item in enumerate(items, start=1):
        shown = item.shown if names else f"input {number}"
        opens = partial(_prepared, item, number, preparation, names=names, channels=card["in_channels"])
        given.append(Given(shown, opens, partial(reason_of, files=item.files)))
    if not names:
        failures = [{**row, "input": f"unreadable input {number}"} for number, row in enumerate(failures, start=1)]
    return given, failures


def _prepared(item: Item, number: int, preparation: Preparation, *, names: bool, channels: int) -> Scan:
    from volssl.body import Body, find_body
    from volssl.inputs import voxel_hash

    volume = item.read()
    if len(volume.array_CXYZ) != channels:
        raise BadInput(f"the image must have the encoder's {channels} channel(s); found {len(volume.array_CXYZ)}")
    key = voxel_hash(volume)
    seen = preparation.image(volume)
    body = find_body(seen, Body(threshold=BODY_ABOVE))
    if body is None:
        raise BadInput("no_body: the image must hold a body; found nothing above air")
    made = Scan(
        scan_id=f"{number:05d}_{key}",
        patient_id="",
        split="",
        grid=seen.grid,
        start=body.start,
        stop=body.stop,
        window=(0.0, 1.0),
        read=partial(_box, seen.array_CXYZ),
        key=key,
    )
    return replace(made, name=item.shown) if names else made


def _box(array_CXYZ: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    box = np.zeros((len(array_CXYZ), *(int(side) for side in size)), np.float32)
    inner = [(max(0, int(a)), min(n, int(a) + int(w))) for a, w, n in zip(start, size, array_CXYZ.shape[1:], strict=True)]
    if all(a < b for a, b in inner):
        where = tuple(slice(a - int(s), b - int(s)) for (a, b), s in zip(inner, start, strict=True))
        box[(slice(None), *where)] = array_CXYZ[(slice(None), *(slice(a, b) for a, b in inner))]
    return box
