"""BraTS: four MR contrasts of a skull-stripped head and the parts of its tumour, as published from 2018 to 2021 and from 2023 on.

2018 to 2021: <case>_t1, _t1ce, _t2, _flair, _seg, flat, in a folder per case, or those in HGG/ and LGG/; values 1 necrotic and
non-enhancing core, 2 oedema, 4 enhancing tumour. From 2023: <case>-t1n, -t1c, -t2w, -t2f, -seg; the enhancing tumour is 3. The order of
the channels is t1, t1ce, t2, flair for both. Tables (name_mapping.csv, survival) are passed over.
Source: Menze et al. 2015; Bakas et al. 2017; Baid et al. 2021; synapse.org/brats.
"""

from __future__ import annotations

import re
from pathlib import Path

from volssl.datasets import Case, CaseTable, alone, files_below
from volssl.files import BadInput

CHANNELS = ("t1", "t1ce", "t2", "flair")
OLD = re.compile(r"(?P<case>.+)_(?P<what>t1|t1ce|t2|flair|seg)\.nii(\.gz)?")
NEW = re.compile(r"(?P<case>.+)-(?P<what>t1n|t1c|t2w|t2f|seg)\.nii(\.gz)?")
OLD_NAME = {name: name for name in (*CHANNELS, "seg")}
NEW_NAME = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
# One case of 2020 was published with another name for its label map.
ODD_LABELS = {"W39_1998.09.19_Segm.nii": "BraTS20_Training_355", "W39_1998.09.19_Segm.nii.gz": "BraTS20_Training_355"}


def recognises(root: Path) -> bool:
    """Whether `root` is laid out this way: a contrast with contrast medium bears one of the two namings."""
    if (root / "dataset.json").exists():
        return False
    return any(match["what"] in ("t1ce", "t1c") for path in files_below(root) for match in [_match(OLD, path), _match(NEW, path)] if match)


def find_cases(root: Path) -> CaseTable:
    """The cases of a training folder. A contrast that is not there is named by the check of the table; a case without a label has None.

    Raises: BadInput: both namings in one folder, or a contrast that lies there twice.
    """
    files = list(files_below(root))
    found = {name: [m for path in files if (m := _match(pattern, path))] for name, pattern in (("old", OLD), ("new", NEW))}
    if found["old"] and found["new"]:
        old, new = (found[name][0].string for name in ("old", "new"))
        raise BadInput(f"data {root}: must be of one naming, for their label values differ; found {old} and {new}; read them one by one")
    naming, enhancing = (NEW_NAME, 3) if found["new"] else (OLD_NAME, 4)
    twice: dict[str, list[Path]] = {}
    for path in files:
        if match := _match(NEW if found["new"] else OLD, path):
            twice.setdefault(f"{match['case']} {match['what']}", []).append(path)
        elif path.name in ODD_LABELS:
            twice.setdefault(f"{ODD_LABELS[path.name]} seg", []).append(path)
    where = alone(twice, root)
    cases = []
    for name in sorted({what.rpartition(" ")[0] for what in where}):
        parts = {what: where.get(f"{name} {published}") for what, published in naming.items()}
        beside = next(path for path in parts.values() if path is not None)
        sign, ending = ("-" if found["new"] else "_"), ".nii.gz" if beside.name.endswith(".gz") else ".nii"
        images = tuple(parts[what] or beside.with_name(f"{name}{sign}{naming[what]}{ending}") for what in CHANNELS)
        cases.append(Case(name, patient_of(name), images, parts["seg"]))
    labels = {"necrosis": 1, "oedema": 2, "enhancing": enhancing}
    regions = {"WT": tuple(sorted(labels.values())), "TC": (1, enhancing), "ET": (enhancing,)}
    return CaseTable(tuple(cases), labels, CHANNELS, regions)


def contrast_of(name: str) -> tuple[str, str] | None:
    """(case, channel or "seg") of a file name in either naming, None for any other name."""
    for pattern, naming in ((OLD, OLD_NAME), (NEW, NEW_NAME)):
        if match := pattern.fullmatch(name):
            return match["case"], next(channel for channel, published in naming.items() if published == match["what"])
    return (ODD_LABELS[name], "seg") if name in ODD_LABELS else None


def _match(pattern: re.Pattern[str], path: Path) -> re.Match[str] | None:
    return pattern.fullmatch(path.name)


def patient_of(case: str) -> str:
    """The patient of a case: the number of BraTS-GLI-00000-001 and of BraTS2021_00000, the site and number of Brats18_TCIA01_147_1.

    Visits of one patient are one patient, and so are 2018's and 2019's cases of the same site and number. 2020's names tell nothing.
    """
    if match := re.fullmatch(r"BraTS-\w+-(\d+)-\d+|BraTS2021_(\d+)", case, re.IGNORECASE):
        return match[1] or match[2]
    if match := re.fullmatch(r"BraTS1\d_(.+)_\d+", case, re.IGNORECASE):
        return match[1]
    return case
