"""nnU-Net v2: `dataset.json`, `imagesTr/<case>_0000<ending>` with one file per channel, `labelsTr/<case><ending>`.

Source: github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from volssl.datasets import Case, CaseTable, numbered, whole_numbers
from volssl.files import BadInput, read_json


def recognises(root: Path) -> bool:
    """Whether `root` is laid out this way: dataset.json with channel_names."""
    path = root / "dataset.json"
    values = read_json(path) if path.exists() else None
    return isinstance(values, dict) and "channel_names" in values and not isinstance(values.get("training"), list)


def find_cases(root: Path) -> CaseTable:
    """The cases of imagesTr, or of dataset.json's optional `dataset` mapping.

    Raises: BadInput: dataset.json that lacks a key or holds something else than the layout says.
    """
    path = root / "dataset.json"
    values = read_json(path)
    kinds = (("channel_names", dict), ("labels", dict), ("file_ending", str))
    faults = [f"{key} must be a {kind.__name__}" for key, kind in kinds if not isinstance(values.get(key), kind)]
    if faults:
        raise BadInput(f"{path}: {'; '.join(faults)}")
    channels = numbered(values["channel_names"], f"{path}: channel_names")
    cases = (
        _listed(root, values["dataset"], f"{path}: dataset")
        if isinstance(values.get("dataset"), dict)
        else _scanned(root, values["file_ending"], len(channels))
    )
    return CaseTable(tuple(cases), whole_numbers(values["labels"], f"{path}: labels"), channels)


def _listed(root: Path, given: dict[str, Any], where: str) -> list[Case]:
    for name, entry in given.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not all(isinstance(file, str) for file in [*images, entry.get("label")]):
            raise BadInput(f"{where}: {name} must be a mapping with `images`, a list of files, and `label`, a file; found {entry!r}")
    return [Case(name, name, tuple(root / image for image in entry["images"]), root / entry["label"]) for name, entry in given.items()]


def _scanned(root: Path, ending: str, channels: int) -> list[Case]:
    # A case is known by its first channel or its label; a channel that is missing is then named by the check of the table.
    first, found = f"_0000{ending}", set()
    for path in (root / "imagesTr").glob(f"*{first}"):
        found.add(path.name[: -len(first)])
    for path in (root / "labelsTr").glob(f"*{ending}"):
        found.add(path.name[: -len(ending)])
    return [
        Case(
            name, name, tuple(root / "imagesTr" / f"{name}_{c:04d}{ending}" for c in range(channels)), root / "labelsTr" / f"{name}{ending}"
        )
        for name in sorted(found)
        if not name.startswith(".")
    ]
