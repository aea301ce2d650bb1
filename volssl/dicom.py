"""What the header of a DICOM file says of its images: by the lean walk of `headers`, and by pydicom where a file is odd."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.multival import MultiValue

from volssl import headers
from volssl.files import BadInput
from volssl.headers import Header, Odd, Values

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
VOLUME_MODALITIES = ("CT", "MR", "PT")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Values of ImageType that name what was computed from images: projections, reformats, maps, screens.
COMPUTED = set(
    "MIP MINIP MPR CPR PROJECTION VRT SSD 3D VOLREN RENDERED SCREENSHOT SCREEN CAPTURE REPORT POSDISP COLLAGE SUBTRACTION SUB PERFUSION "
    "ADC EADC FA TRACEW TENSOR TTP CBF CBV MTT RCBV RCBF PHASE VELOCITY T1_MAP T2_MAP T2_STAR_MAP FIELD_MAP".split()
) | {"PROJECTION IMAGE", "VOLUME RENDER", "DOSE_INFO", "T1 MAP", "T2 MAP", "PHASE MAP"}
FARTHEST_MM = 1e6
AIR_HU = -200  # a CT whose bits cannot hold this or less is not in HU

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
class Pixels:
    """How the pixels of one file are stored. `offset` and `length` in bytes; `length` may be undefined if they are encapsulated."""

    syntax: str
    offset: int
    length: int
    allocated: int
    stored: int
    signed: bool
    slope: float
    intercept: float

    @property
    def plain(self) -> bool:
        """Whether they lie in the file as little-endian whole numbers."""
        return self.syntax in (headers.IMPLICIT, headers.EXPLICIT) and self.length != headers.UNDEFINED and self.allocated in (8, 16, 32)

    @property
    def whole(self) -> bool:
        """Whether rescaling keeps whole numbers whole."""
        return self.slope.is_integer() and self.intercept.is_integer()

    @property
    def values(self) -> tuple[float, float]:
        """Least and largest value that the bits can hold, after rescaling."""
        ends = (-(2 ** (self.stored - 1)), 2 ** (self.stored - 1) - 1) if self.signed else (0, 2**self.stored - 1)
        low, high = sorted(end * self.slope + self.intercept for end in ends)
        return low, high


@dataclass(frozen=True)
class Slice:
    """What the header of one DICOM file, or of one frame of it, says. Lengths in mm, world LPS; `faults` are reason codes.

    `kind` tells apart what may share a series and a place: kernel, acquisition, echo time, b-value, time point, type of image.
    `frame` is -1 if the file holds one image.
    """

    path: Path
    patient: str
    study: str
    series: str
    instance: str
    number: int
    modality: str
    body_part: str
    vendor: str
    shape: tuple[int, int]  # rows, columns
    spacing: tuple[float, ...]  # between rows, between columns
    position: tuple[float, ...]
    axes: tuple[float, ...]  # direction along a row, then along a column
    kind: tuple[tuple[str, str], ...]
    pixels: Pixels
    faults: tuple[str, ...]
    frames: int = 1
    frame: int = -1

    @property
    def key(self) -> tuple[str, str, str]:
        """Patient, study and series: what files of one series share. Without a series UID the folder stands for it."""
        return self.patient, self.study, self.series or f"folder:{self.path.parent}"


KINDS = {
    "kernel": "ConvolutionKernel",
    "acquisition": "AcquisitionNumber",
    "time": "TemporalPositionIdentifier",
    "echo": "EchoTime",
    "b_value": "DiffusionBValue",
    "image_type": "ImageType",
}


class WithinFile(io.BufferedReader):
    """A file from which no more is asked than it holds: a parser that trusts a declared length takes memory for it first."""

    def __init__(self, path: Path | str, mode: str = "rb") -> None:
        super().__init__(io.FileIO(str(path), mode.replace("b", "")))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def is_dicom(path: Path) -> bool:
    """Whether the file begins like DICOM, with or without preamble; extensions say nothing. Raises: OSError."""
    with open(path, "rb", buffering=0) as stream:
        return headers.begins_like_dicom(stream.read(132))


def header(path: Path) -> Slice:
    """Read the header of one DICOM file; pixels are measured, not read. Raises: Unreadable."""
    path = Path(path)
    try:
        try:
            found = headers.scan(path)
        except Odd:
            found = _by_pydicom(path)
        return _slice(path, found)
    except (Unreadable, MemoryError):
        raise
    except PermissionError:
        raise Unreadable("no_permission", f"{path}: must be readable; permission denied") from None
    except FileNotFoundError:
        raise Unreadable("missing", f"{path}: must exist; found nothing there") from None
    except Exception as error:  # a parser on foreign bytes may raise anything
        raise Unreadable("undecodable", f"{path}: must be a DICOM file; {type(error).__name__} while parsing") from None


def _by_pydicom(path: Path) -> Header:
    keywords = [keyword for keyword, _ in headers.TAGS.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these quote header values as well
        with WithinFile(path) as stream:
            data = pydicom.dcmread(stream, force=True, defer_size=1024, specific_tags=[*keywords, "PixelData"])
        values = {keyword: value for keyword in keywords if (value := general_value(data.get(keyword)))}
    syntax = str(data.file_meta.get("TransferSyntaxUID", "")) if hasattr(data, "file_meta") else ""
    pixels = None
    if headers.PIXELS in data:  # pydicom drops an element whose end it does not find
        raw: Any = data.get_item(headers.PIXELS, keep_deferred=True)
        pixels = (int(raw.value_tell or 0), int(raw.length))
    if not values:
        raise Unreadable("undecodable", f"{path}: must be a DICOM file; found no value in its header")
    # Its own idea of the syntax decides; without one it took the file for little-endian.
    implicit = bool(getattr(data, "is_implicit_VR", data.original_encoding[0]))
    return Header(values, syntax or (headers.IMPLICIT if implicit else headers.EXPLICIT), pixels, path.stat().st_size)


def general_value(value: Any) -> tuple[str, ...] | tuple[float, ...]:
    """A value as pydicom gives it, as the lean walk would: text without padding, or numbers."""
    if value is None or value == "":
        return ()
    parts = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
    if all(isinstance(part, (int, float)) or hasattr(part, "real") for part in parts):
        return tuple(float(part) for part in parts)
    return tuple(str(part).strip(" \0") for part in parts)


def _slice(path: Path, found: Header) -> Slice:
    values = found.values

    def text(keyword: str) -> str:
        return "\\".join(map(str, values.get(keyword, ())))

    def number(keyword: str, default: float) -> float:
        return float(values.get(keyword, (default,))[0])

    pixels = Pixels(
        found.syntax,
        *(found.pixels or (0, 0)),
        allocated=int(number("BitsAllocated", 16)),
        stored=min(64, max(1, int(number("BitsStored", 16)))),
        signed=number("PixelRepresentation", 0) == 1,
        slope=number("RescaleSlope", 1),
        intercept=number("RescaleIntercept", 0),
    )
    return Slice(
        path=path,
        patient=text("PatientID"),
        study=text("StudyInstanceUID"),
        series=text("SeriesInstanceUID"),
        instance=text("SOPInstanceUID"),
        number=int(number("InstanceNumber", 0)),
        modality=text("Modality").upper(),
        body_part=text("BodyPartExamined").upper(),
        vendor=text("Manufacturer"),
        shape=(int(number("Rows", 0)), int(number("Columns", 0))),
        spacing=_numbers(values.get("PixelSpacing", ())),
        position=_numbers(values.get("ImagePositionPatient", ())),
        axes=_numbers(values.get("ImageOrientationPatient", ())),
        kind=tuple((name, text(keyword)) for name, keyword in KINDS.items() if keyword in values),
        pixels=pixels,
        faults=tuple(_faults(path, found, pixels)),
        frames=max(1, int(number("NumberOfFrames", 1))),
    )


def _numbers(found: tuple[Any, ...]) -> tuple[float, ...]:
    # Lengths and directions; none if one of them is out of this world. Raises: ValueError: text.
    numbers = tuple(map(float, found))
    return numbers if all(abs(number) < FARTHEST_MM for number in numbers) else ()


def _faults(path: Path, found: Header, pixels: Pixels) -> Iterator[str]:
    # Reason codes that one file's header gives rise to.
    values = found.values
    rows, columns = (int(float((values.get(keyword) or (0,))[0])) for keyword in ("Rows", "Columns"))
    if rows < 1 or columns < 1:
        yield "not_an_image"
        return
    modality = str(values.get("Modality", ("",))[0]).upper()
    if modality in ("SEG", "RTDOSE", "PR", "KO", "SR", "RTSTRUCT", "RTPLAN"):
        yield "not_an_image"
    elif modality not in VOLUME_MODALITIES:
        yield "unsupported_modality"
    if int(float(values.get("SamplesPerPixel", (1,))[0])) != 1:
        yield "rgb"
    elif str(values.get("PhotometricInterpretation", ("MONOCHROME2",))[0]) != "MONOCHROME2":
        yield "inverted_or_palette"
    if float((values.get("NumberOfFrames") or (1,))[0]) > 1:
        yield "multi_frame"
    if str(values.get("BurnedInAnnotation", ("NO",))[0]).upper() == "YES":
        yield "burned_in_annotation"
    yield from _provenance(values, modality)
    if modality == "CT" and not _is_hu(values.get("RescaleIntercept"), values.get("RescaleType"), pixels):
        yield "not_hu"
    native = found.syntax in (headers.IMPLICIT, headers.EXPLICIT, headers.BIG_ENDIAN, headers.DEFLATED)
    if found.pixels and native == (found.pixels[1] == headers.UNDEFINED):
        yield "wrong_syntax"  # compressed pixels are always encapsulated, others never
    elif _truncated(path, found, rows * columns):
        yield "truncated"


def _is_hu(intercept: Any, kind: Any, pixels: Pixels) -> bool:
    # An intercept must be given, the type HU or not said, and air within what the bits can hold.
    return bool(intercept) and str((kind or ("HU",))[0]) == "HU" and pixels.values[0] <= AIR_HU


def _provenance(values: Values, modality: str) -> Iterator[str]:
    kinds = [str(part).upper() for part in values.get("ImageType", ())]
    if "LOCALIZER" in kinds:
        yield "localiser"
    if str(values.get("SOPClassUID", ("",))[0]).startswith(SECONDARY_CAPTURE):
        yield "secondary_capture"
    elif COMPUTED & set(kinds[2:]):
        yield "computed"
    elif kinds[1:2] == ["SECONDARY"] and modality != "MR":
        yield "secondary"
    elif kinds[:1] == ["DERIVED"]:
        yield "derived"


def _truncated(path: Path, found: Header, pixels_per_frame: int) -> bool:
    if found.pixels is None:
        return True
    offset, length = found.pixels
    if length == headers.UNDEFINED:
        return found.syntax not in (headers.DEFLATED, "") and not headers.fragments_are_whole(path, offset)
    frames, samples, allocated = (
        int(float(found.values.get(keyword, (default,))[0]))
        for keyword, default in (("NumberOfFrames", 1), ("SamplesPerPixel", 1), ("BitsAllocated", 16))
    )
    short = length * 8 < pixels_per_frame * max(1, frames) * samples * allocated
    return short or (found.syntax != headers.DEFLATED and offset + length > found.size)


def frames_of(one: Slice) -> list[Slice]:
    """The frames of an enhanced multi-frame file, each with its own place, by its functional groups. Raises: Unreadable: it has none."""
    wanted = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with WithinFile(one.path) as stream:
                data = pydicom.dcmread(stream, force=True, specific_tags=wanted)
            shared = (data.get(wanted[0]) or [pydicom.Dataset()])[0]
            groups = list(data.get(wanted[1]) or [])
            if len(groups) != one.frames:
                raise Unreadable("multi_frame", f"{one.path}: must place each of its {one.frames} frames; found {len(groups)} places")
            return [_frame(one, number, (group, shared)) for number, group in enumerate(groups)]
    except (Unreadable, MemoryError):
        raise
    except Exception as error:
        raise Unreadable("undecodable", f"{one.path}: frames must be described; {type(error).__name__} while parsing") from None


def _frame(one: Slice, number: int, groups: tuple[Any, Any]) -> Slice:
    def of(sequence: str, keyword: str) -> tuple[Any, ...]:
        for group in groups:
            for item in group.get(sequence) or ():
                if value := general_value(item.get(keyword)):
                    return value
        return ()

    first = lambda found, default: float(found[0]) if found else default  # noqa: E731 - reads best in place
    scaling = "PixelValueTransformationSequence"
    intercept = of(scaling, "RescaleIntercept")
    kind = {
        "kernel": of("CTReconstructionSequence", "ConvolutionKernel"),
        "time": of("FrameContentSequence", "TemporalPositionIndex"),
        "echo": of("MREchoSequence", "EffectiveEchoTime"),
        "b_value": of("MRDiffusionSequence", "DiffusionBValue"),
        "stack": of("FrameContentSequence", "StackID"),
    }
    slope, offset = first(of(scaling, "RescaleSlope"), one.pixels.slope), first(intercept, one.pixels.intercept)
    pixels = replace(one.pixels, slope=slope, intercept=offset)
    faults = set(one.faults) - ({"not_hu"} if _is_hu(intercept, of(scaling, "RescaleType"), pixels) else set())
    return replace(
        one,
        number=number,
        frame=number,
        instance=f"{one.instance}.{number}",
        spacing=_numbers(of("PixelMeasuresSequence", "PixelSpacing")) or one.spacing,
        position=_numbers(of("PlanePositionSequence", "ImagePositionPatient")) or one.position,
        axes=_numbers(of("PlaneOrientationSequence", "ImageOrientationPatient")) or one.axes,
        kind=tuple((name, "\\".join(map(str, value))) for name, value in kind.items() if value),
        pixels=pixels,
        faults=tuple(sorted(faults)),
    )
