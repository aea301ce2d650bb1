"""A label map on the slices of a DICOM series -> DICOM SEG that opens over the series in a viewer.

Such a file names the patient as the series does: that is what it is for. It needs the extra `volssl[dicomseg]`.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

import volssl
from volssl.archive import Source, Unreadable
from volssl.dicom import WithinFile
from volssl.files import BadInput, atomic

# Repairs after which the voxels are still those of the slices.
HARMLESS = {"drop_duplicates", "split", "read_frames"}
STRUCTURE = ("91723000", "Anatomical Structure")
ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
TUMOUR = (ABNORMAL, ("108369006", "Neoplasm"))
LESION = (ABNORMAL, ("52988006", "Lesion"))
# SNOMED CT: category and type of labels by their names, in lower case with spaces, as public data sets call them.
CODES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    **dict.fromkeys(("tumor", "tumour", "cancer", "neoplasm", "liver tumor", "liver tumour", "kidney tumor", "kidney tumour"), TUMOUR),
    **dict.fromkeys(("lesion", "lesions"), LESION),
    **dict.fromkeys(("nodule", "nodules", "lung nodule"), (ABNORMAL, ("27925004", "Nodule"))),
    **dict.fromkeys(("edema", "oedema", "peritumoral edema", "peritumoral oedema"), (ABNORMAL, ("79654002", "Edema"))),
    **dict.fromkeys(("necrosis", "necrotic core"), (ABNORMAL, ("6574001", "Necrosis"))),
    "cyst": (ABNORMAL, ("367643001", "Cyst")),
    "aorta": (STRUCTURE, ("15825003", "Aorta")),
    "bone": (STRUCTURE, ("272673000", "Bone")),
    "brain": (STRUCTURE, ("12738006", "Brain")),
    "colon": (STRUCTURE, ("71854001", "Colon")),
    "esophagus": (STRUCTURE, ("32849002", "Esophagus")),
    "gallbladder": (STRUCTURE, ("28231008", "Gallbladder")),
    "heart": (STRUCTURE, ("80891009", "Heart")),
    "hippocampus": (STRUCTURE, ("5366008", "Hippocampus")),
    "kidney": (STRUCTURE, ("64033007", "Kidney")),
    "liver": (STRUCTURE, ("10200004", "Liver")),
    "lung": (STRUCTURE, ("39607008", "Lung")),
    "pancreas": (STRUCTURE, ("15776009", "Pancreas")),
    "prostate": (STRUCTURE, ("41216001", "Prostate")),
    "pulmonary artery": (STRUCTURE, ("81040000", "Pulmonary artery")),
    "spleen": (STRUCTURE, ("78961009", "Spleen")),
    "stomach": (STRUCTURE, ("69695003", "Stomach")),
}
PRIVATE = "99VOLSSL"  # coding scheme of all other names: the code is the label's value, the meaning its name
# What a SEG must repeat from its series, and what of it may be empty: anonymised series often lack some.
NEEDED = ("FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
MAY_BE_EMPTY = "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split()


@dataclass(frozen=True)
class Maker:
    """What the file says it was made by. model: name and version of the trained model, such as a checksum; labels: name -> value."""

    labels: Mapping[str, int]
    model: str


def check_installed() -> None:
    """Raises: BadInput: the extra is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise BadInput("--format dicomseg: needs highdicom; install the extra: pip install 'volssl[dicomseg]'")


def check_source(source: Source | None) -> None:
    """Raises: Unreadable: no DICOM, or a series that was moved onto another grid when it was mended."""
    if source is None or source.kind != "dicom":
        raise Unreadable("not_dicom", "a DICOM SEG refers to a DICOM series, and this is another kind of file; ask for --format nifti")
    if moved := sorted(set(source.repairs) - HARMLESS):
        raise Unreadable(
            "moved_grid",
            f"the series had to be moved onto an even grid ({', '.join(moved)}), so its labels do not lie on its slices; "
            "ask for --format nifti, which bears that grid",
        )
    if source.part and len(source.files) > 1:
        raise Unreadable("moved_grid", "the series lies in several multi-frame files, to which one DICOM SEG cannot refer; use nifti")


def write_dicom_seg(path: Path, label_XYZ: np.ndarray, *, source: Source, maker: Maker, more: Sequence[Source] = ()) -> None:
    """Write one segment per label, named and coded, over the slices of `source`.

    Args: label_XYZ: as `archive.read_source` gives voxels: columns, rows, slices in the order of `source.files`. more: series of the other
        channels, which are referred to as well.
    Raises: Unreadable: as `check_source`; a header that lacks what a SEG must repeat, such as the frame of reference.
    """
    from highdicom import UID
    from highdicom.seg import Segmentation

    check_source(source)
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # as pydicom, it quotes headers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = _headers(source)
        lacking = sorted({tag for image in images for tag in NEEDED if not image.get(tag)})
        if lacking:
            raise Unreadable("no_reference", f"the series must have {', '.join(lacking)} in each of its files; found some without")
        try:
            made = Segmentation(
                source_images=images,
                pixel_array=_frames(label_XYZ, source, images, [value for _, value in _ordered(maker)]),
                segmentation_type="BINARY",
                segment_descriptions=[_segment(number, *label, maker) for number, label in enumerate(_ordered(maker), 1)],
                series_instance_uid=UID(),
                series_number=_series_number(images[0]),
                sop_instance_uid=UID(),
                instance_number=1,
                manufacturer="volssl",
                manufacturer_model_name=maker.model[:64],
                software_versions=volssl.__version__,
                device_serial_number=maker.model[:64],
                content_label="SEGMENTATION",
                content_description="Automatic segmentation",
                series_description="volssl segmentation",
                further_source_images=[header for one in more for header in _headers(one)] or None,
            )
        except (AttributeError, ValueError, TypeError, KeyError) as error:  # their texts quote headers
            raise Unreadable("no_reference", f"the headers of the series do not bear a DICOM SEG ({type(error).__name__})") from None
        with atomic(path) as temporary:
            made.save_as(temporary)


def _ordered(maker: Maker) -> list[tuple[str, int]]:
    return sorted(maker.labels.items(), key=lambda item: item[1])


def _headers(source: Source) -> list[pydicom.Dataset]:
    headers = []
    for path in dict.fromkeys(source.files):
        with WithinFile(path) as stream:
            header = pydicom.dcmread(stream, force=True, stop_before_pixels=True)
        for keyword in ("SOPInstanceUID", "SOPClassUID"):  # of a file whose header lacks them its meta part tells the same
            if not header.get(keyword) and (told := header.file_meta.get(f"MediaStorage{keyword}")):
                setattr(header, keyword, told)
        for keyword in MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, "")
        headers.append(header)
    return headers


def _frames(label_XYZ: np.ndarray, source: Source, images: Sequence[pydicom.Dataset], values: Sequence[int]) -> np.ndarray:
    # Segment numbers (frame, row, column) in the order of the source's frames.
    numbers = np.zeros(256, np.uint8)
    numbers[list(values)] = np.arange(1, len(values) + 1)
    slices = numbers[label_XYZ].transpose(2, 1, 0)
    if not source.part:
        return slices
    frames = np.zeros((int(images[0].NumberOfFrames), *slices.shape[1:]), np.uint8)
    frames[list(source.part)] = slices
    return frames


def _series_number(image: pydicom.Dataset) -> int:
    # One of its own beside the source's, as viewers sort by it.
    return int(image.get("SeriesNumber") or 0) % 10000 + 10000


def _segment(number: int, name: str, value: int, maker: Maker) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    category, kind = coded(name, value)
    return SegmentDescription(
        segment_number=number,
        segment_label=_text(name),
        segmented_property_category=CodedConcept(*category),
        segmented_property_type=CodedConcept(*kind),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=f"volssl {maker.model}"[:64], family=codes.DCM.ArtificialIntelligence, version=volssl.__version__
        ),
    )


def coded(name: str, value: int) -> tuple[tuple[str, str, str], tuple[str, str, str]]:
    """Category and type of a label, each as code, scheme and meaning: SNOMED CT for the names in `CODES`, else the private scheme."""
    known = CODES.get(" ".join(name.lower().replace("_", " ").replace("-", " ").split()))
    if known is None:
        return (STRUCTURE[0], "SCT", STRUCTURE[1]), (f"LABEL{value}", PRIVATE, _text(name))
    return tuple((code, "SCT", meaning) for code, meaning in known)  # type: ignore[return-value]


def _text(name: str) -> str:
    # At most 64 characters, and none that DICOM reads as a separator.
    return name.replace("\\", "/")[:64] or "label"
