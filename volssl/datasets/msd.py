"""Medical Segmentation Decathlon: `dataset.json` that lists pairs of `imagesTr/` and `labelsTr/`; several channels lie in one 4D file.

Source: Antonelli et al., The Medical Segmentation Decathlon, 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from volssl.datasets import Case, CaseTable, numbered, stem, whole_numbers
from volssl.files import BadInput, read_json


def recognises(root: Path) -> bool:
    """Whether `root` is laid out this way: dataset.json with a list of training pairs."""
    path = root / "dataset.json"
    return path.exists() and isinstance(_read(path).get("training"), list)


def find_cases(root: Path) -> CaseTable:
    """The training pairs that dataset.json lists; a case is named after its image file.

    Raises: BadInput: dataset.json that lacks a key or holds something else than the layout says.
    """
    path = root / "dataset.json"
    values = _read(path)
    faults = [
        f"{key} must be a {kind.__name__}" for key, kind in (("training", list), ("labels", dict)) if not isinstance(values.get(key), kind)
    ]
    if faults:
        raise BadInput(f"{path}: {'; '.join(faults)}")
    cases = []
    for number, pair in enumerate(values["training"]):
        if not isinstance(pair, dict) or not isinstance(pair.get("image"), str):
            raise BadInput(f"{path}: training[{number}] must be a mapping with `image` and `label`; found {pair!r}")
        if not isinstance(pair.get("label"), str | None):
            raise BadInput(f"{path}: training[{number}].label must be a file name; found {pair['label']!r}")
        image = root / pair["image"]
        cases.append(Case(stem(image), stem(image), (image,), root / pair["label"] if pair.get("label") else None))
    # The Decathlon writes value -> name.
    labels = whole_numbers({name: value for value, name in values["labels"].items()}, f"{path}: labels")
    return CaseTable(tuple(cases), labels, numbered(values.get("modality", {"0": "image"}), f"{path}: modality"))


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise BadInput(f"{path}: must be a mapping; found {type(values).__name__}")
    return values
