"""The DICOM half of the archive: headers by pydicom, the order of slices and its checks by us, pixels by SimpleITK.

Common readers turn a broken series into wrong anatomy without a word: a missing slice becomes a larger spacing, a tilted gantry an
upright box. So the affine comes from our own reading of the positions, and SimpleITK only decodes the files in our order.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk

from volssl.files import BadInput
from volssl.volume import Grid, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
VOLUME_MODALITIES = ("CT", "MR", "PT")
PIXELS = 0x7FE00010
UNDEFINED_LENGTH = 0xFFFFFFFF
DEFLATED = "1.2.840.10008.1.2.1.99"
KEYWORDS = """
    PatientID StudyInstanceUID SeriesInstanceUID SOPInstanceUID Modality BodyPartExamined ImageType Rows Columns
    SamplesPerPixel PhotometricInterpretation NumberOfFrames BitsAllocated BitsStored PixelRepresentation RescaleSlope
    RescaleIntercept RescaleType PixelSpacing ImagePositionPatient ImageOrientationPatient PixelData"""

# pydicom quotes header values when it finds them odd: patients' data, which no log may hold.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


class Unreadable(BadInput):
    """A scan that cannot be read. `code` names the reason without naming the file, for tables that others may see."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return Unreadable, (self.code, str(self))


@dataclass(frozen=True)
class Limits:
    """What a series must keep to be taken as one even, upright stack of slices."""

    min_slices: int = 8
    position_mm: float = 0.1  # a slice may lie this far off its even place: positions are often written with one decimal
    position_share: float = 0.05  # or this share of the slice step, if that is more
    missing_from: float = 1.5  # a gap of this many usual steps or more means that slices are missing
    tilt_deg: float = 0.2  # between the stack's direction and the normal of the slices
    direction: float = 1e-3  # largest difference between direction cosines of one series


@dataclass(frozen=True)
class Slice:
    """What the header of one DICOM file says. Lengths in mm, world LPS as in DICOM; `faults` are reason codes."""

    path: Path
    patient: str
    study: str
    series: str
    instance: str
    modality: str
    body_part: str
    shape: tuple[int, int]  # rows, columns
    spacing: tuple[float, ...]  # between rows, between columns
    position: tuple[float, ...]
    axes: tuple[float, ...]  # direction along a row, then along a column
    values: tuple[float, float]  # least and largest value that its bits can hold, after rescaling
    whole: bool  # rescaling keeps whole numbers whole
    faults: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """Patient, study and series: what files of one series share. Without a series UID the folder stands for it."""
        return self.patient, self.study, self.series or f"folder:{self.path.parent}"


def is_dicom(path: Path) -> bool:
    """Whether the file bears the DICM mark behind its preamble; extensions say nothing. Raises: OSError."""
    with open(path, "rb") as stream:
        stream.seek(128)
        return stream.read(4) == b"DICM"


def header(path: Path) -> Slice:
    """Read the header of one DICOM file; pixels are measured, not read. Raises: Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these quote header values as well
            data = pydicom.dcmread(path, defer_size=1024, specific_tags=list(KEYWORDS.split()))
            return _slice(path, data)
    except PermissionError:
        raise Unreadable("no_permission", f"{path}: must be readable; permission denied") from None
    except MemoryError:
        raise
    except Exception as error:  # a parser on foreign bytes may raise anything
        raise Unreadable("undecodable", f"{path}: must be a DICOM file; {type(error).__name__} while parsing") from None


def _slice(path: Path, data: pydicom.Dataset) -> Slice:
    def numbers(keyword: str) -> tuple[float, ...]:
        value = data.get(keyword)
        return () if value is None or value == "" else tuple(float(v) for v in np.atleast_1d(np.array(value, dtype=float)))

    def text(keyword: str) -> str:
        return str(data.get(keyword) or "").strip()

    slope, intercept = (numbers("RescaleSlope") or (1.0,))[0], (numbers("RescaleIntercept") or (0.0,))[0]
    bits, signed = int(data.get("BitsStored") or 16), bool(data.get("PixelRepresentation") or 0)
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1]) * slope + intercept
    return Slice(
        path=path,
        patient=text("PatientID"),
        study=text("StudyInstanceUID"),
        series=text("SeriesInstanceUID"),
        instance=text("SOPInstanceUID"),
        modality=text("Modality").upper(),
        body_part=text("BodyPartExamined").upper(),
        shape=(int(data.get("Rows") or 0), int(data.get("Columns") or 0)),
        spacing=numbers("PixelSpacing"),
        position=numbers("ImagePositionPatient"),
        axes=numbers("ImageOrientationPatient"),
        values=(float(ends.min()), float(ends.max())),
        whole=slope.is_integer() and intercept.is_integer(),
        faults=tuple(_faults(path, data)),
    )


def _faults(path: Path, data: pydicom.Dataset) -> Iterator[str]:
    # Reason codes that one file's header gives rise to.
    if not data.get("Rows") or not data.get("Columns"):
        yield "not_an_image"
        return
    modality = str(data.get("Modality") or "").upper()
    if modality not in VOLUME_MODALITIES:
        yield "unsupported_modality"
    if int(data.get("SamplesPerPixel") or 1) != 1:
        yield "rgb"
    elif str(data.get("PhotometricInterpretation") or "MONOCHROME2") != "MONOCHROME2":
        yield "inverted_or_palette"
    if int(data.get("NumberOfFrames") or 1) > 1:
        yield "multi_frame"
    if "LOCALIZER" in [str(part).upper() for part in np.atleast_1d(data.get("ImageType") or "")]:
        yield "localiser"
    if modality == "CT" and (data.get("RescaleIntercept") is None or str(data.get("RescaleType") or "HU") != "HU"):
        yield "not_hu"
    if _truncated(path, data):
        yield "truncated"


def _truncated(path: Path, data: pydicom.Dataset) -> bool:
    if PIXELS not in data:  # pydicom drops an element whose end it does not find
        return True
    raw: Any = data.get_item(PIXELS, keep_deferred=True)
    if raw.length == UNDEFINED_LENGTH:  # compressed: the decoder finds out
        return False
    frames, samples = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel") or 1)
    bits = int(data.Rows) * int(data.Columns) * frames * samples * int(data.get("BitsAllocated") or 16)
    deflated = str(data.file_meta.get("TransferSyntaxUID", "")) == DEFLATED
    return raw.length * 8 < bits or (not deflated and raw.value_tell + raw.length > path.stat().st_size)


def check(slices: Sequence[Slice], limits: Limits = Limits()) -> tuple[list[Slice], Grid | None, list[str]]:
    """Sort a series along the normal of its slices.

    Returns: the sorted slices, their grid (None if there is none) and the reason codes against the series, sorted.
    """
    reasons = {code for one in slices for code in one.faults}
    if "not_an_image" in reasons:
        return list(slices), None, sorted(reasons)
    if any(len(one.position) != 3 or len(one.axes) != 6 or len(one.spacing) != 2 or min(one.spacing) <= 0 for one in slices):
        return list(slices), None, sorted(reasons | {"no_geometry"})
    first = slices[0]
    if any(one.shape != first.shape for one in slices):
        reasons.add("mixed_size")
    if not np.allclose([one.spacing for one in slices], first.spacing, rtol=1e-3, atol=0):
        reasons.add("mixed_spacing")
    axes = np.array([one.axes for one in slices])
    if np.abs(axes - axes[0]).max() > limits.direction:
        return list(slices), None, sorted(reasons | {"mixed_orientation"})
    row, column = axes[0, :3], axes[0, 3:]
    if abs(row @ column) > limits.direction or not np.allclose(np.linalg.norm([row, column], axis=1), 1, atol=limits.direction):
        return list(slices), None, sorted(reasons | {"no_geometry"})
    normal = np.cross(row, column)
    order = sorted(slices, key=lambda one: (float(np.dot(one.position, normal)), one.instance))
    if len(order) < limits.min_slices:
        reasons.add("too_few_slices")
    step, stack_reasons = _stack(np.array([one.position for one in order]), normal, limits)
    reasons |= stack_reasons
    return order, None if step is None else _grid(order, step), sorted(reasons)


def _stack(positions_N3: np.ndarray, normal: np.ndarray, limits: Limits) -> tuple[np.ndarray | None, set[str]]:
    # The step from slice to slice as a vector, and what is wrong with the stack.
    gaps = np.diff(positions_N3 @ normal)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    if usual == 0.0:
        return None, {"duplicate_position"} if len(gaps) else {"too_few_slices"}
    reasons = set()
    if (gaps < 0.5 * usual).any() and (gaps < limits.position_mm).any():
        reasons.add("duplicate_position")
    if (gaps >= limits.missing_from * usual).any():
        reasons.add("missing_slice")
    step = (positions_N3[-1] - positions_N3[0]) / (len(positions_N3) - 1)
    if np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))) > limits.tilt_deg:
        reasons.add("gantry_tilt")
    if not reasons & {"duplicate_position", "missing_slice"}:
        off_N3 = positions_N3 - (positions_N3[0] + np.arange(len(positions_N3))[:, None] * step)
        allowed = max(limits.position_mm, limits.position_share * usual)
        along = np.abs(off_N3 @ normal)
        if along.max() > allowed:
            reasons.add("uneven_gap")
        if np.linalg.norm(off_N3 - (off_N3 @ normal)[:, None] * normal, axis=1).max() > allowed:
            reasons.add("shifted_slice")
    return step, reasons


def _grid(order: Sequence[Slice], step: np.ndarray) -> Grid:
    first = order[0]
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.axes[:3]) * first.spacing[1]  # x runs along a row: from column to column
    affine[:3, 1] = np.array(first.axes[3:]) * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    return Grid((first.shape[1], first.shape[0], len(order)), LPS_TO_RAS @ affine)


def read_series(slices: Sequence[Slice]) -> Volume:
    """Decode one series. Values are rescaled (HU in CT). Raises: Unreadable: not one even stack, or a file that cannot be decoded."""
    order, grid, reasons = check(slices, Limits(min_slices=2))
    blocking = [code for code in reasons if code != "localiser"]
    where = f"{order[0].path.parent}: series of {len(order)} DICOM files"
    if blocking or grid is None:
        raise Unreadable(blocking[0], f"{where}: must be one even stack of slices; found {', '.join(blocking)}; see `volssl index`")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in order])
    least, largest = min(one.values[0] for one in order), max(one.values[1] for one in order)
    small = all(one.whole for one in order) and least >= -(2**15) and largest < 2**15
    reader.SetOutputPixelType(sitk.sitkInt16 if small else sitk.sitkFloat32)
    try:
        with quiet():
            array_ZYX = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError:  # its text names files
        raise Unreadable("undecodable", f"{where}: pixels cannot be decoded") from None
    if array_ZYX.shape != grid.shape_vox[::-1]:
        raise Unreadable("undecodable", f"{where}: must decode to {grid.shape_vox} voxels; found {array_ZYX.shape[::-1]}")
    return Volume(array_ZYX.transpose(2, 1, 0)[None], grid)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the C++ readers from writing to stderr: their warnings hold file names and header text. Their errors still raise."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
