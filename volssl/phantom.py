"""Synthetic CT with known anatomy: a DICOM archive without labels, and labelled cases of the liver and its lesions.

Every voxel is a pure function of (seed, patient, series). Labelled patients are others than those of the archive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from volssl.anatomy import draw_patient
from volssl.archive import write_nifti
from volssl.dicom_write import uid, write_dicom_series
from volssl.draws import generator
from volssl.files import BadInput, Outcome, claim_out, track, write_json
from volssl.torso import ORGANS, paint
from volssl.volume import Grid

LABELS = {"background": 0, "liver": 1, "lesion": 2}
FIRST_LABELLED = 100_000  # number of the first labelled patient: the archive's patients come before
REACH_MM = (-158.0, 172.0)  # from below the liver to the tips of the lungs
HIGH_HU, LOW_HU = 3071, -1024


@dataclass(frozen=True)
class Series:
    """How a patient is scanned: the grid, the noise (HU) and the words of the header."""

    grid: Grid
    noise_hu: float
    description: str
    position: str = "HFS"


def scan(seed: int, patient: int, number: int, series: Series, *, organs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scan a patient: Hounsfield units as int16 and the label map as uint8, both XYZ on the grid of `series`; organs: see `paint`."""
    hu, labels = paint(draw_patient(seed, patient), series.grid, organs=organs)
    rng = generator(seed, "noise", patient, number)
    # A scanner blurs by about half a voxel; reconstruction leaves its noise correlated within the slice.
    hu = ndimage.gaussian_filter(hu, (0.5, 0.5, 0.35))
    noise = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0.65, 0.65, 0.0))
    hu += noise * np.float32(series.noise_hu / noise.std())
    x, y = (np.linspace(-1, 1, n) for n in hu.shape[:2])
    hu[x[:, None] ** 2 + y[None, :] ** 2 > 1.02] = LOW_HU  # outside of the field of view
    return np.clip(np.rint(hu), LOW_HU, HIGH_HU).astype(np.int16), labels


def write_archive(out: Path, *, patients: int, seed: int = 0, size_vox: int = 128) -> Path:
    """Write CT scans of `patients` patients as DICOM series, with odd orientations and made-up identifiers among them.

    Args: out: new folder; it gets a folder per patient and series. size_vox: rows and columns of a slice.
    """
    _check(patients, "patients")
    claim_out(out)
    for patient in range(patients):
        for number, series in enumerate(_series_of(seed, patient, size_vox)):
            hu, _ = scan(seed, patient, number, series)
            folder = out / f"patient_{patient + 1:03d}" / f"series_{number + 1}"
            write_dicom_series(folder, hu, series.grid, tags=_tags(seed, patient, number, series))
    return out


def run(out: Path, *, cases: int, organs: bool = False, size: int = 96, seed: int = 0) -> Outcome:
    """Verb phantom: a labelled folder of synthetic CT, as `write_labelled` lays it out; size: rows and columns of a slice."""
    write_labelled(Path(out), cases=cases, seed=seed, size_vox=size, organs=organs)
    return Outcome(Path(out), message=f"{cases} synthetic scans with labels")


def write_labelled(
    out: Path, *, cases: int, seed: int = 0, layout: str = "msd", size_vox: int = 128, tests: int = 0, organs: bool = False
) -> Path:
    """Write labelled CT scans in the layout "msd" (Medical Segmentation Decathlon) or "nnunet" (version 2).

    Args: out: new folder. cases: labelled patients, one scan each. tests: further patients, scans in imagesTs and
        their labels in labelsTs. organs: label kidneys and gallbladder too.
    """
    _check(cases, "cases")
    _check(size_vox, "size")
    labelled = LABELS | (ORGANS if organs else {})
    if layout not in ("msd", "nnunet"):
        raise BadInput(f'phantom: layout must be "msd" or "nnunet"; found {layout!r}')
    claim_out(out)
    names: dict[str, list[str]] = {"Tr": [], "Ts": []}
    for index in track(range(cases + tests), total=cases + tests, label="phantoms"):
        part = "Tr" if index < cases else "Ts"
        patient = FIRST_LABELLED + index
        series = _series_of(seed, patient, size_vox)[0]
        hu, labels = scan(seed, patient, 0, series, organs=organs)
        name = f"phantom_{index + 1:03d}"
        image = f"{name}_0000.nii.gz" if layout == "nnunet" else f"{name}.nii.gz"
        write_nifti(out / f"images{part}" / image, hu, series.grid, np.int16)
        write_nifti(out / f"labels{part}" / f"{name}.nii.gz", labels, series.grid, np.uint8)
        names[part].append(name)
    write_json(out / "dataset.json", _dataset(layout, names, labelled))
    return out


def _check(count: int, what: str) -> None:
    if count < 1:
        raise BadInput(f"phantom: {what} must be >= 1; found {count}")


def _series_of(seed: int, patient: int, size_vox: int) -> list[Series]:
    """One or two series of a patient. Of every six patients one has two, and three lie or are stored in an odd way."""
    rng = generator(seed, "scanner", patient)
    field_mm = float(rng.uniform(345, 400))
    thick_mm = float(rng.choice([3.0, 3.5, 4.0, 5.0])) * max(1.0, 96 / size_vox)
    noise_hu = float(rng.uniform(8, 26))
    kind = patient % 6 if patient < FIRST_LABELLED else 0
    plain = Series(_grid(field_mm, size_vox, thick_mm), noise_hu, "Chest abdomen")
    if kind == 1:
        return [plain, Series(_grid(0.95 * field_mm, size_vox, 1.5 * thick_mm), 0.6 * noise_hu, "Thick slices")]
    if kind == 2:
        return [Series(_grid(field_mm, size_vox, thick_mm, signs=(-1, -1, -1)), noise_hu, "Head to feet")]
    if kind == 3:
        return [Series(_grid(field_mm, size_vox, thick_mm, tilt_deg=(9, 5)), noise_hu, "Oblique")]
    if kind == 4:
        return [Series(_grid(field_mm, size_vox, thick_mm, signs=(1, -1, -1)), noise_hu, "Feet first", "FFS")]
    return [plain]


def _grid(
    field_mm: float,
    size_vox: int,
    thick_mm: float,
    *,
    signs: tuple[int, int, int] = (-1, -1, 1),
    tilt_deg: tuple[float, float] = (0.0, 0.0),
) -> Grid:
    # As scanners store it: columns towards the patient's left, rows towards the back; `tilt_deg` turns about x and y.
    depth = round((REACH_MM[1] - REACH_MM[0]) / thick_mm)
    spacing = np.array([field_mm / size_vox, field_mm / size_vox, thick_mm])
    a, b = np.deg2rad(tilt_deg)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_y @ about_x @ np.diag(spacing * signs)
    shape = (size_vox, size_vox, depth)
    centre = np.array([0.0, -24.0, sum(REACH_MM) / 2])
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def _tags(seed: int, patient: int, number: int, series: Series) -> dict[str, str]:
    # The identifiers are made up, and are there so that tests can show that nothing of them gets through.
    rng = generator(seed, "words", patient)
    family = rng.choice(["QUILLFEATHER", "MARROWBONE", "THISTLEWOOD", "OKONKWARE", "LINDQVISTA", "PEREGRINI"])
    given = rng.choice(["ADA", "BORIS", "CHIDI", "DALIA", "EMIL", "FUMIKO"])
    date = f"20{rng.integers(12, 24)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
    return {
        "PatientName": f"{family}^{given}",
        "PatientID": f"PHANTOM-{seed}-{patient:05d}",
        "PatientBirthDate": f"19{rng.integers(40, 99)}0{rng.integers(1, 10)}17",
        "PatientSex": str(rng.choice(["F", "M"])),
        "InstitutionName": "Phantom General Hospital",
        "ReferringPhysicianName": "WHITLOWE^GRETA",
        "AccessionNumber": f"ACC{rng.integers(10**6):07d}",
        "StudyDate": date,
        "StudyTime": "101500",
        "StudyID": str(patient + 1),
        "StudyDescription": f"CT torso of {given.title()} {family.title()}",
        "SeriesNumber": str(number + 1),
        "SeriesDescription": series.description,
        "BodyPartExamined": "CHEST",
        "PatientPosition": series.position,
        "Manufacturer": "volssl phantom",
        "StudyInstanceUID": uid("volssl", seed, patient),
        "SeriesInstanceUID": uid("volssl", seed, patient, number),
        "FrameOfReferenceUID": uid("volssl", seed, patient, "frame"),
    }


def _dataset(layout: str, names: dict[str, list[str]], labelled: dict[str, int]) -> dict[str, object]:
    if layout == "nnunet":
        return {
            "channel_names": {"0": "CT"},
            "labels": labelled,
            "numTraining": len(names["Tr"]),
            "file_ending": ".nii.gz",
        }
    return {
        "name": "Phantom liver",
        "description": "Synthetic torsos made by volssl; no patient",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for name, value in labelled.items()},
        "numTraining": len(names["Tr"]),
        "numTest": len(names["Ts"]),
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names["Tr"]],
        "test": [f"./imagesTs/{name}.nii.gz" for name in names["Ts"]],
    }
