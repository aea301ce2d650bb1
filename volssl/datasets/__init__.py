"""Shelf of public folder layouts: each file turns one into a table of labelled cases.

A layout is a module with `recognises(root) -> bool` and `find_cases(root) -> CaseTable`; `open_dataset` finds it on the shelf.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from volssl.files import BadInput, read_csv

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")


@dataclass(frozen=True)
class Case:
    """One labelled case. `images`: one file per channel, or a single file that holds all channels. `label`: None where none is given."""

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class CaseTable:
    """The labelled cases of a folder, sorted by case_id. `labels`: name -> value, without background. `channels`: names, in order.

    `regions`: overlapping targets, each the union of some label values, from the largest to the smallest ({"WT": (1, 2, 4), "TC": (1, 4),
    "ET": (4,)}); empty where every label is a target of its own.
    """

    cases: tuple[Case, ...]
    labels: dict[str, int]
    channels: tuple[str, ...]
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)


def layouts() -> dict[str, ModuleType]:
    """Every layout on the shelf, by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def open_dataset(root: Path, layout: str | None = None) -> CaseTable:
    """The cases of the folder `root`; without `layout` it is recognised.

    Raises: BadInput: no such folder, unknown or unrecognised layout, no cases, missing files, repeated case names.
    """
    root, shelf = Path(root), layouts()
    if not root.is_dir():
        raise BadInput(f"data {root}: must be a folder; found {'a file' if root.exists() else 'nothing there'}")
    if layout is not None and layout not in shelf:
        raise BadInput(f"layout: must be one of {', '.join(shelf)}; found {layout!r}")
    fitting = [layout] if layout else [name for name, module in shelf.items() if module.recognises(root)]
    if len(fitting) != 1:
        found = f"several fit: {', '.join(fitting)}" if fitting else "none fits"
        raise BadInput(f"data {root}: must be laid out as one of {', '.join(shelf)}; {found}; set data.layout in the recipe")
    return _checked(shelf[fitting[0]].find_cases(root), root)


def _checked(table: CaseTable, root: Path) -> CaseTable:
    names = [case.case_id for case in table.cases]
    faults = [
        f"{name}: a case name must be unique; found it {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1
    ]
    for case in table.cases:
        missing = [path.name for path in (*case.images, *([case.label] if case.label else [])) if not path.exists()]
        faults += [f"{case.case_id}: file must exist; {name} is missing" for name in missing]
    if not table.cases:
        faults.append("must hold at least one case; found none")
    if not table.labels or sorted(set(table.labels.values())) != sorted(table.labels.values()) or min(table.labels.values()) < 1:
        faults.append(f"labels must be names with different whole numbers above 0; found {table.labels}")
    if faults:
        raise BadInput(f"data {root}: {len(faults)} fault(s); mend them:\n  " + "\n  ".join(faults))
    patients = _patients(root, names)
    cases = [Case(case.case_id, patients.get(case.case_id, case.patient_id), case.images, case.label) for case in table.cases]
    return replace(table, cases=tuple(sorted(cases, key=lambda case: case.case_id)))


def _patients(root: Path, names: Iterable[str]) -> dict[str, str]:
    """case -> patient from an optional `patients.csv` (columns case, patient): neither layout can say that two cases are one patient."""
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
    """File name without its image suffix: `case_1.nii.gz` -> `case_1`."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem
