"""Small synthetic data sets in the exact public layouts of BraTS and LiTS (LUNA16: `phantom_luna`), with the cases that go wrong.

Anatomy, label values, file names and folders are those of the public data; the voxels are larger, so that a test takes seconds. Every
voxel is a pure function of (seed, case).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from volssl.anatomy import draw_patient
from volssl.archive import write_nifti
from volssl.brain import CONTRASTS, ENHANCING, draw_tumour, paint_brain
from volssl.draws import generator
from volssl.files import BadInput, claim_out, write_csv, write_json
from volssl.phantom import FIRST_LABELLED
from volssl.torso import paint
from volssl.volume import Grid

HEAD_MM, BELLY_MM = 180.0, (250.0, 210.0, 190.0)
BRATS_YEARS = (2018, 2019, 2020, 2021, 2023)
LITS_NAMINGS = ("flat", "batches", "ct_seg", "msd")
NEW_NAMES = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
ODD_2020 = ("BraTS20_Training_355", "W39_1998.09.19_Segm")  # the one case of 2020 whose label map bears another name


@dataclass(frozen=True)
class Head:
    """One visit of one patient of a BraTS phantom. `name` as published; `folder` relative to the root."""

    name: str
    folder: str
    patient: int
    visit: int = 0


def write_brats(out: Path, *, patients: int = 4, year: int = 2021, seed: int = 0, size_vox: int = 48) -> Path:
    """Write a BraTS training folder as published in `year`: 2018, 2019, 2020, 2021 or 2023.

    Patient 1 has no enhancing tumour (its value, 4 until 2021 and 3 from 2023 on, is absent from its label map). In 2018, 2019 and 2023
    patient 0 was seen twice: two cases, one patient. 2018 and 2019 lie in HGG/ and LGG/; 2020 has its name_mapping.csv, its
    survival_info.csv and the odd label name of BraTS20_Training_355. Contrasts are t1, t1ce, t2, flair, int16, 0 outside of the brain.

    Args: out: new folder. size_vox: side of the cube of 180 mm.
    """
    if year not in BRATS_YEARS or patients < 2:
        raise BadInput(f"phantom: year must be one of {BRATS_YEARS} and patients >= 2; found {year}, {patients}")
    claim_out(out)
    grid = _centred((HEAD_MM, HEAD_MM, HEAD_MM), (size_vox, size_vox, size_vox), (0.0, 0.0, 0.0))
    heads = _heads(year, patients)
    for head in heads:
        tumour = draw_tumour(seed, head.patient, head.visit, enhances=head.patient != 1)
        images, labels = paint_brain(seed, head.patient, head.visit, tumour=tumour, grid=grid)
        if year < 2023:
            labels[labels == ENHANCING] = 4
        for contrast, image in zip(CONTRASTS, images, strict=True):
            name = f"{head.name}-{NEW_NAMES[contrast]}" if year == 2023 else f"{head.name}_{contrast}"
            write_nifti(out / head.folder / f"{name}{_ending(year)}", image, grid, np.int16)
        write_nifti(out / head.folder / f"{_label_name(head, year)}{_ending(year)}", labels, grid, np.uint8)
    if year == 2020:
        _tables_of_2020(out, heads)
    return out


def _heads(year: int, patients: int) -> list[Head]:
    if year == 2018:
        names = [f"Brats18_{site}" for site in ("TCIA01_147", "2013_10", "CBICA_AAB", "TCIA10_266")]
    elif year == 2019:
        names = [f"BraTS19_{site}" for site in ("TCIA01_147", "2013_10", "CBICA_AAB", "TCIA10_266")]
    elif year == 2020:
        return [Head(name, name, i) for i in range(patients) for name in [ODD_2020[0] if i == 0 else f"BraTS20_Training_{i:03d}"]]
    elif year == 2021:
        return [Head(name, name, i) for i in range(patients) for name in [f"BraTS2021_{(0, 2, 3, 5)[i % 4] + 6 * (i // 4):05d}"]]
    else:
        heads = [(i, visit) for i in range(patients) for visit in range(2 if i == 0 else 1)]
        return [
            Head(name, name, i, visit) for i, visit in heads for name in [f"BraTS-GLI-{(0, 2, 3, 5)[i % 4] + 6 * (i // 4):05d}-{visit:03d}"]
        ]
    names += [f"{names[2][:-1]}{chr(ord('C') + i)}" for i in range(max(0, patients - 4))]
    grades = ["LGG" if i in (1, 3) else "HGG" for i in range(patients)]
    heads = [(i, visit) for i in range(patients) for visit in range(2 if i == 0 else 1)]
    return [Head(name, f"{grades[i]}/{name}", i, visit) for i, visit in heads for name in [f"{names[i]}_{visit + 1}"]]


def _ending(year: int) -> str:
    return ".nii" if year == 2020 else ".nii.gz"


def _label_name(head: Head, year: int) -> str:
    if head.name == ODD_2020[0]:
        return ODD_2020[1]
    return f"{head.name}-seg" if year == 2023 else f"{head.name}_seg"


def _tables_of_2020(out: Path, heads: list[Head]) -> None:
    columns = (
        "Grade",
        "BraTS_2017_subject_ID",
        "BraTS_2018_subject_ID",
        "TCGA_TCIA_subject_ID",
        "BraTS_2019_subject_ID",
        "BraTS_2020_subject_ID",
    )
    rows = [dict.fromkeys(columns, "NA") | {"Grade": "HGG", "BraTS_2020_subject_ID": head.name} for head in heads]
    write_csv(out / "name_mapping.csv", rows, columns)
    columns = ("Brats20ID", "Age", "Survival_days", "Extent_of_Resection")
    write_csv(
        out / "survival_info.csv",
        [{"Brats20ID": heads[0].name, "Age": "60.5", "Survival_days": "289", "Extent_of_Resection": "GTR"}],
        columns,
    )


def write_lits(out: Path, *, cases: int = 4, naming: str = "flat", seed: int = 0, size_vox: int = 48) -> Path:
    """Write LiTS cases: CT of the upper abdomen with label maps of the liver (1) and its tumours (2).

    Case 1 has a liver without a tumour. Voxels lie in the orders in which the public volumes do: some have flipped axes.

    Args:
        out: new folder. naming: "flat" (volume-N.nii and segmentation-N.nii in one folder), "batches" (the same in Training Batch 1 and 2),
            "ct_seg" (CT/volume-N.nii and seg/segmentation-N.nii) or "msd" (Task03_Liver, whose second label is called cancer).
            size_vox: voxels across 250 mm.
    """
    if naming not in LITS_NAMINGS or cases < 2:
        raise BadInput(f"phantom: naming must be one of {LITS_NAMINGS} and cases >= 2; found {naming!r}, {cases}")
    claim_out(out)
    for number in range(cases):
        hu, labels, grid = _belly(seed, number, size_vox)
        image, label = (out / name for name in _lits_names(naming, number, cases))
        write_nifti(image, hu, grid, np.int16)
        write_nifti(label, labels, grid, np.uint8)
    if naming == "msd":
        pairs = [dict(zip(("image", "label"), (f"./{name}" for name in _lits_names(naming, n, cases)), strict=True)) for n in range(cases)]
        labels_json = {"0": "background", "1": "liver", "2": "cancer"}
        write_json(out / "dataset.json", {"name": "Liver", "modality": {"0": "CT"}, "labels": labels_json, "training": pairs, "test": []})
    return out


def _lits_names(naming: str, number: int, cases: int) -> tuple[str, str]:
    image, label = f"volume-{number}.nii", f"segmentation-{number}.nii"
    if naming == "batches":
        batch = f"Training Batch {1 if number < cases / 2 else 2}"
        return f"{batch}/{image}", f"{batch}/{label}"
    if naming == "ct_seg":
        return f"CT/{image}", f"seg/{label}"
    if naming == "msd":
        return f"imagesTr/liver_{number}.nii.gz", f"labelsTr/liver_{number}.nii.gz"
    return image, label


def _belly(seed: int, number: int, size_vox: int) -> tuple[np.ndarray, np.ndarray, Grid]:
    patient = draw_patient(seed, FIRST_LABELLED + 1000 + number)
    tumours = () if number == 1 else patient.lesions or (replace(patient.organs["liver_right"], radii=(18.0, 16.0, 17.0)),)
    shape = (size_vox, round(size_vox * BELLY_MM[1] / BELLY_MM[0]), round(size_vox * BELLY_MM[2] / BELLY_MM[0]))
    signs = ((-1, -1, 1), (1, -1, 1), (-1, 1, 1))[number % 3]
    grid = _centred(BELLY_MM, shape, (45.0, 0.0, -55.0), signs=signs)
    hu, labels = paint(replace(patient, lesions=tumours), grid)
    hu += generator(seed, "belly", number).normal(0, 12, hu.shape)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), labels, grid


def _centred(
    size_mm: tuple[float, float, float],
    shape_vox: tuple[int, int, int],
    centre_mm: tuple[float, float, float],
    *,
    signs: tuple[int, int, int] = (-1, -1, 1),
) -> Grid:
    affine = np.diag([*(sign * mm / n for sign, mm, n in zip(signs, size_mm, shape_vox, strict=True)), 1.0])
    affine[:3, 3] = np.array(centre_mm) - affine[:3, :3] @ ((np.array(shape_vox) - 1) / 2)
    return Grid(shape_vox, affine)
