"""Which cases are learnt from, held out, or kept for a test: by drawn folds, by the data set's own folds, or as a file says.

A file is never completed or mended: a name that the data lack, a case on two sides and a patient on two sides are errors that name them.
"""

# A side is a list of case names: "train", "validation" (held out), "test" (never touched).

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volssl.cases import Folds, split
from volssl.datasets import Case, CaseTable, stem
from volssl.files import BadInput, read_csv, read_json, sha256

OFFICIAL = "official"
SIDES = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
Sides = dict[str, list[str]]


@dataclass(frozen=True)
class Division:
    """The cases of one fold. `folds`: held-out cases of each. `left_out`: cases that a file does not name. `source`: for splits.json."""

    train: tuple[Case, ...]
    held_out: tuple[Case, ...]
    test: tuple[Case, ...]
    left_out: tuple[Case, ...]
    folds: tuple[tuple[Case, ...], ...]
    source: str


def divide(table: CaseTable, folds: Folds, *, given: str | Path | None, fold: int) -> Division:
    """Divide the cases.

    Args: folds: how folds are drawn if nothing is given. given: None, "official", or a file or folder (`read_sides`). fold: held out.
    Raises: BadInput: a fold that is not there, or what the file or the data set's own folds get wrong, all at once.
    """
    if given is None:
        sides, source = _of_folds([[case.case_id for case in one] for one in split(table, folds)]), "drawn"
    elif str(given) == OFFICIAL:
        sides, source = _official(table), OFFICIAL
    else:
        sides, source = read_sides(Path(given)), f"sha256:{_digest(Path(given))}"
        _check(sides, table, Path(given))
    if not 0 <= fold < len(sides):
        raise BadInput(f"--fold must lie between 0 and {len(sides) - 1}; found {fold}")
    by_name = {case.case_id: case for case in table.cases}
    chosen = {side: tuple(by_name[name] for name in sorted(names)) for side, names in sides[fold].items()}
    used = {name for names in sides[fold].values() for name in names}
    return Division(
        train=chosen["train"],
        held_out=chosen["validation"],
        test=chosen.get("test", ()),
        left_out=tuple(case for case in table.cases if case.case_id not in used),
        folds=tuple(tuple(by_name[name] for name in sorted(one["validation"])) for one in sides),
        source=source,
    )


def _of_folds(folds: Sequence[Sequence[str]]) -> list[Sides]:
    return [
        {"train": [name for other, names in enumerate(folds) if other != number for name in names], "validation": list(fold)}
        for number, fold in enumerate(folds)
    ]


def _official(table: CaseTable) -> list[Sides]:
    if not table.folds:
        raise BadInput("data.split: official: this folder has no folds of its own (LUNA16's subsets are such); set null, or name a file")
    numbers = sorted(set(table.folds.values()))
    if len(numbers) < 2:
        raise BadInput(f"data.split: official: at least two of the data set's folds must be there; found only {numbers[0]}")
    sides = _of_folds([[case.case_id for case in table.cases if table.folds[case.case_id] == number] for number in numbers])
    _check(sides, table, Path(OFFICIAL))
    return sides


def read_sides(path: Path) -> list[Sides]:
    """The sides of each fold that a file names.

    Args: path: JSON of nnU-Net (splits_final.json: a list of {"train", "val"}) or one mapping of sides; CSV with the columns case, fold
        (fold: a number, or train, valid, test); text files of one name a line, told by train, valid or test in their names, as a folder
        or as one of them. A name may bear folders before it and an image ending.
    Raises: BadInput: none of these.
    """
    if path.is_dir() or path.suffix.lower() == ".txt":
        return [_of_texts(path)]
    if not path.exists():
        raise BadInput(f"--split {path}: must be a file or a folder; found nothing there")
    if path.suffix.lower() == ".csv":
        return _of_rows(path)
    if path.suffix.lower() != ".json":
        raise BadInput(f"--split {path}: must be .json, .csv or .txt, or a folder of .txt; found {path.suffix or 'no ending'}")
    values = read_json(path)
    folds = values if isinstance(values, list) else [values]
    return [_of_mapping(fold, path) for fold in folds] or _refuse(path, "at least one fold", "none")


def _refuse(path: Path, wanted: str, found: Any) -> Any:
    raise BadInput(f"--split {path}: must hold {wanted}; found {found}")


def _of_mapping(fold: Any, path: Path) -> Sides:
    sides: Sides = {}
    for key, names in fold.items() if isinstance(fold, dict) else ():
        if key in SIDES and isinstance(names, list) and all(isinstance(name, str) for name in names):
            sides[SIDES[key]] = [_plain(name) for name in names]
    return _whole(sides, path)


def _whole(sides: Sides, path: Path) -> Sides:
    if not sides.get("train") or not sides.get("validation"):
        _refuse(path, "names for train and for validation (val, valid)", ", ".join(side for side in sides if sides[side]) or "neither")
    return sides


def _plain(name: str) -> str:
    return stem(Path(name.strip().strip(",").replace("\\", "/")))


def _of_texts(path: Path) -> Sides:
    folder = path if path.is_dir() else path.parent
    # brats_train.txt goes with brats_valid.txt, not with the luna_valid.txt beside it.
    own = _words(path)[0] if path.is_file() else None
    sides: Sides = {}
    for file in sorted(folder.glob("*.txt")):
        prefix, side = _words(file)
        if side is None or (own is not None and prefix != own):
            continue
        if side in sides:
            _refuse(path, f"one file of names for {side}", f"{file.name} and another; name one of those that are meant")
        sides[side] = [_plain(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return _whole(sides, path)


def _words(file: Path) -> tuple[str, str | None]:
    words = re.split(r"[^A-Za-z0-9]+", file.stem.lower())
    sides = [SIDES[word] for word in words if word in SIDES]
    return "_".join(word for word in words if word not in SIDES), sides[0] if len(sides) == 1 else None


def _of_rows(path: Path) -> list[Sides]:
    rows = read_csv(path)
    if not rows or not {"case", "fold"} <= rows[0].keys():
        _refuse(path, "the columns case, fold", ", ".join(rows[0]) if rows else "no rows")
    folds: dict[str, list[str]] = {}
    for row in rows:
        folds.setdefault(row["fold"].strip().lower(), []).append(_plain(row["case"]))
    if all(fold in SIDES for fold in folds):
        return [_whole({SIDES[fold]: names for fold, names in folds.items()}, path)]
    if all(fold.isdigit() for fold in folds) and len(folds) > 1:
        return _of_folds([folds[fold] for fold in sorted(folds, key=int)])
    return _refuse(path, "two or more numbered folds, or train, valid and test", ", ".join(sorted(folds)))


def _check(sides: list[Sides], table: CaseTable, path: Path) -> None:
    """Raises: BadInput: with every name that the data lack, that stands twice, and every patient on two sides."""
    patient = {case.case_id: case.patient_id for case in table.cases}
    faults: dict[str, None] = {}
    for fold in sides:
        places: dict[str, list[str]] = {}
        of_patient: dict[str, set[str]] = {}
        for side, names in fold.items():
            for name in names:
                places.setdefault(name, []).append(side)
                if name in patient:
                    of_patient.setdefault(patient[name], set()).add(side)
        faults |= dict.fromkeys(f"{name}: must be a case of the data; found none of that name" for name in places if name not in patient)
        faults |= dict.fromkeys(f"{name}: must stand once; found it in {' and '.join(p)}" for name, p in places.items() if len(p) > 1)
        faults |= dict.fromkeys(
            f"patient {name}: all cases must lie on one side; found {', '.join(c for c in sorted(places) if patient.get(c) == name)} on "
            f"{' and '.join(sorted(found))}"
            for name, found in of_patient.items()
            if len(found) > 1
        )
    if faults:
        raise BadInput(f"--split {path}: {len(faults)} fault(s):\n  " + "\n  ".join(faults))


def _digest(path: Path) -> str:
    return sha256(path) if path.is_file() else "+".join(sha256(file)[:16] for file in sorted(path.glob("*.txt")))
