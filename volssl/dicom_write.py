"""Write a volume as a DICOM CT series: one file per slice, explicit VR little endian. For phantoms and tests of the readers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

from volssl.volume import Grid

INTERCEPT_HU = -1024
LPS = np.diag([-1.0, -1.0, 1.0])  # DICOM's world axes in terms of RAS+


def uid(*parts: object) -> str:
    """A DICOM UID under 2.25 that depends on `parts` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:15], 'big')}"


def write_dicom_series(folder: Path, array_XYZ: np.ndarray, grid: Grid, *, tags: Mapping[str, Any]) -> None:
    """Write Hounsfield units as one CT series into `folder`, as IM00001.dcm and on, slice by slice along the third axis.

    The first axis becomes the columns' direction and the second the rows', whatever their orientation in the patient.
    Values are rounded, and kept within -1024 .. 3071 HU (12 bits). `tags` are set on every slice by keyword; among them
    must be PatientID, StudyInstanceUID, SeriesInstanceUID. The slices' own UIDs follow from that of the series.
    """
    missing = {"PatientID", "StudyInstanceUID", "SeriesInstanceUID"} - set(tags)
    if missing or array_XYZ.shape != grid.shape_vox:
        raise ValueError(f"write_dicom_series: lacks {missing}, or shapes differ: {array_XYZ.shape}, {grid.shape_vox}")
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.clip(np.rint(array_XYZ) - INTERCEPT_HU, 0, 4095).astype(np.uint16)
    for index in range(grid.shape_vox[2]):
        data = _slice(grid, index)
        data.SOPInstanceUID = uid(tags["SeriesInstanceUID"], index)
        data.PixelData = np.ascontiguousarray(stored[:, :, index].T).tobytes()
        for keyword, value in tags.items():
            setattr(data, keyword, value)
        data.file_meta = _meta(UID(data.SOPInstanceUID))
        data.save_as(folder / f"IM{index + 1:05d}.dcm", enforce_file_format=True)


def write_enhanced_ct(path: Path, arrays_TXYZ: np.ndarray, grid: Grid, *, tags: Mapping[str, Any]) -> None:
    """Write Hounsfield units of one or more time points as one enhanced multi-frame CT file, slices inside of time points.

    The frames are placed by per-frame functional groups, in an order that is not that of their places. `tags` as above.
    """
    counts = range(len(arrays_TXYZ)), range(grid.shape_vox[2])
    order = [(time, index) for time in counts[0] for index in reversed(counts[1])]
    first = _slice(grid, 0)
    data = Dataset()
    for keyword in "Modality Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit".split():
        setattr(data, keyword, first[keyword].value)
    data.SOPClassUID, data.ImageType, data.PixelRepresentation = EnhancedCTImageStorage, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], 0
    data.SOPInstanceUID, data.NumberOfFrames = uid(tags["SeriesInstanceUID"], "frames"), len(order)
    shared, scaling, measures, turn = Dataset(), Dataset(), Dataset(), Dataset()
    scaling.RescaleIntercept, scaling.RescaleSlope, scaling.RescaleType = str(INTERCEPT_HU), "1", "HU"
    measures.PixelSpacing, measures.SliceThickness = first.PixelSpacing, first.SliceThickness
    turn.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PixelValueTransformationSequence, shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [scaling], [measures], [turn]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = [_frame(grid, time, index) for time, index in order]
    stored = np.clip(np.rint(arrays_TXYZ) - INTERCEPT_HU, 0, 4095).astype(np.uint16)
    data.PixelData = b"".join(np.ascontiguousarray(stored[time, :, :, index].T).tobytes() for time, index in order)
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    data.file_meta = _meta(UID(data.SOPInstanceUID), EnhancedCTImageStorage)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def _frame(grid: Grid, time: int, index: int) -> Dataset:
    group, content, place = Dataset(), Dataset(), Dataset()
    content.TemporalPositionIndex, content.StackID, content.InStackPositionNumber = time + 1, "1", index + 1
    place.ImagePositionPatient = _slice(grid, index).ImagePositionPatient
    group.FrameContentSequence, group.PlanePositionSequence = [content], [place]
    return group


def _slice(grid: Grid, index: int) -> Dataset:
    spacing_mm = np.array(grid.spacing_mm)
    directions = LPS @ grid.affine[:3, :3] / spacing_mm
    corner = LPS @ grid.world(np.array([[0, 0, index]]))[0]
    data = Dataset()
    data.SOPClassUID = CTImageStorage
    data.Modality = "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.InstanceNumber = index + 1
    data.ImagePositionPatient = [_decimal(value) for value in corner]
    data.ImageOrientationPatient = [_decimal(value) for value in (*directions[:, 0], *directions[:, 1])]
    data.PixelSpacing = [_decimal(spacing_mm[1]), _decimal(spacing_mm[0])]  # between rows, then between columns
    data.SliceThickness = _decimal(spacing_mm[2])
    data.SliceLocation = _decimal(corner @ np.cross(directions[:, 0], directions[:, 1]))
    data.Rows, data.Columns = grid.shape_vox[1], grid.shape_vox[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = str(INTERCEPT_HU), "1", "HU"
    data.WindowCenter, data.WindowWidth = "40", "400"
    return data


def _decimal(value: float) -> str:
    # DICOM's decimal strings hold 16 characters.
    return f"{float(value) + 0.0:.10g}"[:16]


def _meta(instance: UID, kind: UID = CTImageStorage) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return meta
