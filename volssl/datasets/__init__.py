"""Shelf of public folder layouts: each file turns one into a table of labelled cases.

A layout is a module with `recognises(root) -> bool` and `find_cases(root) -> CaseTable`; `open_dataset` finds it on the shelf. One whose
labels can come from several sources has `with_labels(table, root, nodules) -> CaseTable` besides.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from volssl.files import BadInput, read_csv
from volssl.nodules import Nodules
from volssl.volume import Grid

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
CUT = (*SUFFIXES, ".hdr", ".img.gz", ".img")  # Analyze can be predicted, but no layout of labelled cases holds it
DEPTH = 4  # folders below the root in which a layout looks for its files


class Drawn(Protocol):
    """A label map that is computed and not read."""

    def draw(self, grid: Grid) -> np.ndarray:
        """The label map, uint8 XYZ, on the image's grid. Raises: BadInput."""
        ...


@dataclass(frozen=True)
class Case:
    """One labelled case. `images`: one file per channel, or a single file that holds all channels. `label`: None where none is given."""

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    label: Path | Drawn | None


@dataclass(frozen=True)
class CaseTable:
    """The labelled cases of a folder, sorted by case_id. `labels`: name -> value, without background. `channels`: names, in order.

    `regions`: overlapping targets, each the union of some label values, from the largest to the smallest ({"WT": (1, 2, 4), "TC": (1, 4),
    "ET": (4,)}); empty where every label is a target of its own. `folds`: case -> its fold in the data set's own division, or empty.
    `label_values`: value in a file -> what it stands for, where the recipe says so.
    """

    cases: tuple[Case, ...]
    labels: dict[str, int]
    channels: tuple[str, ...]
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    folds: dict[str, int] = field(default_factory=dict)
    label_values: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """How a folder is read.

    Attributes:
        layout: a file of the shelf, or null to recognise it. split: a file or folder that names the cases of each side, "official" for the
            data set's own folds, or null to draw folds. nodules: where LUNA16's masks come from. leave_out: cases that are not used.
        label_values: value in the label files -> value that it stands for ({255: 1}); values that are not named stay.
    """

    layout: str | None = None
    split: str | None = None
    nodules: Nodules | None = None
    leave_out: tuple[str, ...] = ()
    label_values: dict[int, int] = field(default_factory=dict)


def layouts() -> dict[str, ModuleType]:
    """Every layout on the shelf, by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


READ_AS_IS = Data()


def open_dataset(root: Path, layout: str | None = None, *, data: Data = READ_AS_IS) -> CaseTable:
    """The cases of the folder `root`; without `layout` (or `data.layout`) it is recognised.

    Raises: BadInput: no such folder, unknown or unrecognised layout, no cases, missing files, repeated case names.
    """
    root, shelf = Path(root), layouts()
    module = shelf[_named(root, layout or data.layout, shelf)]
    table = module.find_cases(root)
    if hasattr(module, "with_labels"):
        table = module.with_labels(table, root, data.nodules)
    elif data.nodules is not None:
        raise BadInput("data.nodules: is for a layout whose masks can come from several sources (luna16); set it to null")
    unknown = sorted(set(data.leave_out) - {case.case_id for case in table.cases})
    if unknown:
        raise BadInput(f"data.leave_out: must name cases of {root}; found no case {', '.join(unknown)}")
    kept = tuple(case for case in table.cases if case.case_id not in data.leave_out)
    return _checked(replace(table, cases=kept, label_values=data.label_values), root)


def _named(root: Path, layout: str | None, shelf: Mapping[str, ModuleType]) -> str:
    if not root.is_dir():
        raise BadInput(f"data {root}: must be a folder; found {'a file' if root.exists() else 'nothing there'}")
    if layout is not None and layout not in shelf:
        raise BadInput(f"layout: must be one of {', '.join(shelf)}; found {layout!r}")
    fitting = [layout] if layout else [name for name, module in shelf.items() if module.recognises(root)]
    if len(fitting) != 1:
        found = f"several fit: {', '.join(fitting)}" if fitting else "none fits"
        raise BadInput(f"data {root}: must be laid out as one of {', '.join(shelf)}; {found}; set data.layout in the recipe")
    return fitting[0]


def _checked(table: CaseTable, root: Path) -> CaseTable:
    names = [case.case_id for case in table.cases]
    faults = [
        f"{name}: a case name must be unique; found it {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1
    ]
    for case in table.cases:
        missing = [path.name for path in (*case.images, case.label) if isinstance(path, Path) and not path.exists()]
        faults += [f"{case.case_id}: file must exist; {name} is missing" for name in missing]
    if not table.cases:
        faults.append("must hold at least one case; found none")
    if not table.labels or sorted(set(table.labels.values())) != sorted(table.labels.values()) or min(table.labels.values()) < 1:
        faults.append(f"labels must be names with different whole numbers above 0; found {table.labels}")
    if faults:
        raise BadInput(f"data {root}: {len(faults)} fault(s); mend them:\n  " + "\n  ".join(faults))
    patients = _patients(root, names)
    cases = [replace(case, patient_id=patients.get(case.case_id, case.patient_id)) for case in table.cases]
    return replace(table, cases=tuple(sorted(cases, key=lambda case: case.case_id)))


def _patients(root: Path, names: Iterable[str]) -> dict[str, str]:
    """case -> patient from an optional `patients.csv` (columns case, patient): most layouts cannot say that two cases are one patient."""
    path = root / "patients.csv"
    if not path.exists():
        return {}
    rows = read_csv(path)
    if not rows or not {"case", "patient"} <= rows[0].keys():
        raise BadInput(f"{path}: must have the columns case, patient")
    given = {row["case"]: row["patient"] for row in rows}
    lacking = sorted(set(names) - given.keys())
    if lacking:
        raise BadInput(f"{path}: must name the patient of every case; found none for {', '.join(lacking)}")
    return given


def whole_numbers(labels: Mapping[str, Any], where: str) -> dict[str, int]:
    """name -> value, background (0) left out. Raises: BadInput: for values that are not whole numbers, such as regions."""
    bad = [f"{name}: {value!r}" for name, value in labels.items() if isinstance(value, bool) or not str(value).isdigit()]
    if bad:
        raise BadInput(f"{where}: every label must be a whole number; found {', '.join(bad)}; overlapping regions are not supported here")
    return {str(name): int(value) for name, value in labels.items() if int(value) != 0}


def numbered(names: Any, where: str) -> tuple[str, ...]:
    """The names of a mapping "0", "1", ... -> name, in order. Raises: BadInput: for anything else."""
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))} or not names:
        raise BadInput(f'{where}: must map the channels, "0", "1", ... without a gap, to their names; found {names!r}')
    return tuple(str(names[str(number)]) for number in range(len(names)))


def stem(path: Path) -> str:
    """File name without its image suffix: `case_1.nii.gz` -> `case_1`. What follows any other point stays: `1.3.6.1` is a series."""
    return next((path.name[: -len(suffix)] for suffix in CUT if path.name.lower().endswith(suffix)), path.name)


def without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose `data` names files without the folders they lie in: a run says nothing of where its data were."""
    data = values.get("data")
    if not isinstance(data, Mapping):
        return dict(values)

    def named(held: Mapping[str, Any], key: str) -> dict[str, Any]:
        return {**held, key: Path(held[key]).name} if isinstance(held.get(key), str) else dict(held)

    data = named(data, "split")
    if isinstance(data.get("nodules"), Mapping):
        data["nodules"] = named(data["nodules"], "where")
    return {**values, "data": data}


def files_below(root: Path) -> Iterator[Path]:
    """Files of a folder and of those in it, at most four deep, sorted; hidden ones (macOS leaves `._` twins) are passed over."""
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                waiting += [(path, depth + 1)] if depth < DEPTH else []
            else:
                yield path


def alone(found: Mapping[str, list[Path]], root: Path) -> dict[str, Path]:
    """What -> its one file. Raises: BadInput: naming everything of which there are several."""
    faults = [
        f"{what}: one file must hold; found {', '.join(str(path.relative_to(root)) for path in paths)}"
        for what, paths in sorted(found.items())
        if len(paths) > 1
    ]
    if faults:
        raise BadInput(f"data {root}: {len(faults)} file(s) are there more than once; remove the others:\n  " + "\n  ".join(faults))
    return {what: paths[0] for what, paths in found.items()}
