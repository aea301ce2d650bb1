"""LiTS: CT of the liver and its tumours: volume-N and segmentation-N anywhere below the root; values 1 liver, 2 tumour.

One folder, Training Batch 1 and 2, or CT/ and seg/ (there also N.nii in both) are read, and the Decathlon's Task03_Liver, which is the same
data (131 cases) under other names, if the layout is named. Cases of the test batch (test-volume-N) have no labels and are passed over.
Source: Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), 2023.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from volssl.datasets import Case, CaseTable, alone, files_below, msd
from volssl.files import BadInput

LABELS = {"liver": 1, "tumour": 2}
REGIONS = {"liver": (1, 2), "tumour": (2,)}
NAMED = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?")
NUMBERED = re.compile(r"(\d+)\.nii(\.gz)?")
IMAGE_FOLDERS, LABEL_FOLDERS = ("ct",), ("seg", "label", "labels")


def recognises(root: Path) -> bool:
    """Whether `root` holds a volume-N or a CT/N; the Decathlon's Task03_Liver is recognised as `msd`, and read here if named."""
    if (root / "dataset.json").exists():
        return False
    return any(kind == "volume" for path in files_below(root) if (found := _place(path)) for kind, _ in [found])


def find_cases(root: Path) -> CaseTable:
    """The cases, named volume-N. A volume that is not there is named by the check of the table; one without a label has None.

    Raises: BadInput: a file that is there twice, or a Decathlon folder that is not of the liver.
    """
    if (root / "dataset.json").exists():
        return _decathlon(root)
    found: dict[str, list[Path]] = {}
    for path in files_below(root):
        if place := _place(path):
            found.setdefault(f"{place[0]}-{place[1]}", []).append(path)
    where = alone(found, root)
    cases = []
    for number in sorted({int(name.rpartition("-")[2]) for name in where}):
        name, label = f"volume-{number}", where.get(f"segmentation-{number}")
        image = where.get(name) or root / f"{name}.nii"
        cases.append(Case(name, name, (image,), label))
    return CaseTable(tuple(cases), LABELS, ("CT",), REGIONS)


def _place(path: Path) -> tuple[str, int] | None:
    if match := NAMED.fullmatch(path.name):
        return match[1], int(match[2])
    folder = path.parent.name.lower()
    if (match := NUMBERED.fullmatch(path.name)) and folder in IMAGE_FOLDERS + LABEL_FOLDERS:
        return "volume" if folder in IMAGE_FOLDERS else "segmentation", int(match[1])
    return None


def _decathlon(root: Path) -> CaseTable:
    table = msd.find_cases(root)
    if set(table.labels.values()) != {1, 2} or "liver" not in {name.lower() for name in table.labels}:
        raise BadInput(f"data {root}: layout lits reads the Decathlon's Task03_Liver (liver 1, cancer 2); found the labels {table.labels}")
    return replace(table, labels=LABELS, regions=REGIONS)
