"""What a labelled case must be like to be used: one table of rules (docs/datasets.md), read here and nowhere else.

A case is refused with all that is wrong with it, or taken; what a rule settled on the way is a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volssl.archive import read_image
from volssl.datasets import Case, CaseTable
from volssl.files import BadInput
from volssl.volume import Volume, describe

OFF_GRID = 0.1  # share of a voxel by which grids of one case may differ: rounding of headers, never half a voxel
SHOWN = 8  # odd values that a complaint lists
MANY = 64  # more distinct values than any label map has


@dataclass(frozen=True, eq=False)
class Taken:
    """A case that may be used: image (all channels), label map (one channel, whole numbers) and what rules settled about it."""

    image: Volume
    label: Volume
    notes: tuple[str, ...]


def read_case(case: Case, table: CaseTable) -> tuple[Volume, Volume]:
    """Image (all channels) and label map of a case. Raises: BadInput: with everything about the case that does not hold."""
    taken = take_case(case, table)
    return taken.image, taken.label


def take_case(case: Case, table: CaseTable) -> Taken:
    """The same with the notes. Raises: BadInput: with everything about the case that does not hold."""
    faults: list[str] = []
    images = [image for path in case.images if (image := _read(path, faults, "image"))]
    if len(images) < len(case.images):
        raise _refused(case, faults)
    grid = images[0].grid
    channels = sum(len(image.array_CXYZ) for image in images)
    if channels != len(table.channels):
        faults.append(f"image must have {len(table.channels)} channel(s) ({', '.join(table.channels)}); found {channels}")
    for name, image in zip(table.channels[1:], images[1:], strict=False):
        faults += _off_grid(name, image, images[0])
    for name, array in zip(table.channels, (array for image in images for array in image.array_CXYZ), strict=False):
        faults += _odd_image(name, array, table)
    label, notes = _label(case, table, images[0], faults)
    if label is None or faults:
        raise _refused(case, faults)
    return Taken(Volume(np.concatenate([image.array_CXYZ for image in images]), grid), Volume(label.array_CXYZ, grid), tuple(notes))


def read_reference(case: Case, table: CaseTable) -> Volume:
    """The label map alone, by the same rules; the image is only read where the label map is drawn on its grid.

    Raises: BadInput: with everything about the label map that does not hold.
    """
    faults: list[str] = []
    image = _read(case.images[0], faults, "image") if case.label is not None and not isinstance(case.label, Path) else None
    label, _ = (None, []) if faults else _label(case, table, image, faults)
    if label is None or faults:
        raise _refused(case, faults)
    return label


def _refused(case: Case, faults: list[str]) -> BadInput:
    swapped = sum("looks like" in fault for fault in faults) > 1
    return BadInput(f"{case.case_id}: " + "; ".join(faults) + ("; are the two files swapped?" if swapped else ""))


def _read(path: Path, faults: list[str], what: str) -> Volume | None:
    try:
        return read_image(path)
    except BadInput as error:
        faults.append(f"{what}: {str(error).replace(str(path), path.name)}")
        return None


def _off_grid(name: str, volume: Volume, image: Volume) -> list[str]:
    if volume.grid.almost_equal(image.grid, tolerance_mm=OFF_GRID * min(image.grid.spacing_mm)):
        return []
    fault = f"{name} must lie on the image's grid, {describe(image)}; found {describe(volume)}"
    if volume.grid.shape_vox == image.grid.shape_vox and np.allclose(volume.grid.affine[:3, :3], image.grid.affine[:3, :3], atol=1e-3):
        shift = np.round(image.grid.voxels(volume.grid.affine[:3, 3][None])[0], 2)
        return [f"{fault}: shifted by {tuple(float(v) for v in shift)} voxels"]
    return [fault]


def _odd_image(name: str, array: np.ndarray, table: CaseTable) -> list[str]:
    low, high = float(array.min()), float(array.max())
    if low == high:
        return [f"{name} must hold an image; found the one value {low:g} everywhere"]
    known = {0, *table.labels.values(), *table.label_values, 255}
    if low < 0 or high > max(known) or not (values := set(np.unique(array).tolist())) <= known:
        return []
    return [f"{name} looks like a label map: it holds nothing but the values {sorted(values)}"]


def _label(case: Case, table: CaseTable, image: Volume | None, faults: list[str]) -> tuple[Volume | None, list[str]]:
    if case.label is None:
        faults.append("must have a label map; found none")
        return None, []
    if not isinstance(case.label, Path):
        assert image is not None
        try:
            label = Volume(case.label.draw(image.grid)[None], image.grid)
        except BadInput as error:
            faults.append(f"label: {error}")
            return None, []
    elif (label := _read(case.label, faults, "label")) is None:
        return None, []
    faults += _off_grid("label", label, image) if image is not None else []
    if len(label.array_CXYZ) != 1:
        faults.append(f"label must have one channel; found {len(label.array_CXYZ)}")
        return None, []
    return _values(label, table, faults)


def _values(label: Volume, table: CaseTable, faults: list[str]) -> tuple[Volume | None, list[str]]:
    """The label map as whole numbers that the table knows, and notes; what does not hold goes to `faults`."""
    array, notes = label.array_CXYZ, []
    if array.dtype.kind == "f":
        whole = np.rint(array).astype(np.int32)
        if not np.array_equal(whole, array):
            faults.append("label must hold whole numbers; found fractions: it looks like an image")
            return None, []
        array = whole
        notes.append("label was stored as floating-point whole numbers")
    found = {int(value) for value in np.unique(array)}
    if used := sorted(found & table.label_values.keys()):
        array = _mapped(array, table.label_values)
        notes.append("label values replaced: " + ", ".join(f"{value} by {table.label_values[value]}" for value in used))
        found = {table.label_values.get(value, value) for value in found}
    if unknown := sorted(found - {0, *table.labels.values()}):
        faults.append(_unknown(unknown, found, table.labels))
        return None, []
    if absent := [name for name, value in table.labels.items() if value not in found]:
        notes.append("label is empty" if found <= {0} else f"label holds no {', no '.join(absent)}")
    return Volume(array, label.grid), notes


def _mapped(array: np.ndarray, label_values: Mapping[int, int]) -> np.ndarray:
    mapped = array.astype(np.int32)
    for value, meant in label_values.items():
        mapped[array == value] = meant
    return mapped


def _unknown(unknown: list[int], found: set[int], labels: Mapping[str, int]) -> str:
    listed = ", ".join(map(str, unknown[:SHOWN])) + (", ..." if len(unknown) > SHOWN else "")
    fault = f"label values must be 0 or one of {dict(labels)}; found [{listed}]"
    if len(found) > MANY or min(unknown) < 0:
        return f"{fault}: {len(found)} values from {min(found)} to {max(found)}: it looks like an image"
    if found <= {0, 255}:
        return f"{fault}: a mask of 0 and 255; say what 255 stands for: data.label_values={{255: {min(labels.values())}}}"
    return f"{fault}; add them to the recipe's `labels`, or say what they stand for in data.label_values"
