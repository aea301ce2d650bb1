"""Strings planted wherever an archive can hold text, and a search that finds them again however a file is packed."""

from __future__ import annotations

import base64
import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pydicom
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from volssl.store import _sum

# No English word, hexadecimal number or base64 by chance holds these.
MARK = "ZQXJVK"
DATES = ("19270613", "1927-06-13", "1927.06.13", "13.06.1927", "06/13/1927", "13 Jun 1927")
TIME = "031459.265358"
UID = "1.2.826.0.1.3680043.99.7193"
NUMBER = "77193.447"
AGE = "087Y"
TEXT = {"AE": 16, "CS": 16, "LO": 64, "LT": 10240, "PN": 64, "SH": 16, "ST": 1024, "UC": 1000, "UR": 1000, "UT": 1000}
# What makes a file a slice of a CT volume keeps its meaning.
STRUCTURE = set(
    """Modality PhotometricInterpretation ImageType RescaleType PatientPosition SOPClassUID BurnedInAnnotation SpecificCharacterSet
    PixelPresentation VolumetricProperties FrameType LossyImageCompression ConversionType QueryRetrieveLevel PixelSpacing
    ImagePositionPatient ImageOrientationPatient RescaleIntercept RescaleSlope InstanceNumber NumberOfFrames AcquisitionNumber
    EchoTime DiffusionBValue TemporalPositionIdentifier ConvolutionKernel LossyImageCompressionRatio LossyImageCompressionMethod
    SliceThickness""".split()
)


def word(number: int) -> str:
    """The mark with a number, 16 characters at most."""
    return f"{MARK}{number:X}"


def plant_dicom(path: Path, patient: int) -> int:
    """Fill every text, date, time, UID, age and number tag of the standard, of private blocks and of a nested sequence.

    Returns: how many tags hold a planted string.
    """
    data = pydicom.dcmread(path)
    planted = 0
    for tag, (kind, multiplicity, _, retired, keyword) in DicomDictionary.items():
        wide = kind.split(" or ")[0]
        if tag >> 16 < 8 or tag >> 16 in (0x28, 0x7FE0, 0x5400) or not keyword or keyword in STRUCTURE or retired or multiplicity == "0":
            continue
        value = _value(wide, planted, patient)
        if value is not None:
            data.add_new(tag, wide, value)
            planted += 1
    for vendor in range(3):
        block = data.private_block(0x0009 + 2 * vendor, word(90_000 + vendor), create=True)
        for place, kind in enumerate(("LO", "UN", "ST", "OB")):
            text = f"private {word(91_000 + 10 * vendor + place)}"
            block.add_new(place, kind, text.encode().ljust(40) if kind in ("UN", "OB") else text)
    inner = Dataset()
    inner.PatientID, inner.StudyDescription = word(92_000), f"nested {word(92_001)}"
    data.RequestAttributesSequence = Sequence([inner])
    data.PatientID, data.PatientName = f"{MARK}-PAT-{patient}", f"{MARK}^PATIENT{patient}"
    data.StudyInstanceUID, data.SeriesInstanceUID = f"{UID}.1.{patient}", f"{UID}.2.{patient}"
    data.SOPInstanceUID = f"{UID}.3.{patient}.{data.InstanceNumber}"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.SourceApplicationEntityTitle = word(93_000)
    data.file_meta.ImplementationVersionName = word(93_001)
    data.preamble = word(93_002).encode().ljust(128, b"\0")
    data.save_as(path, enforce_file_format=True)
    return planted


def _value(kind: str, number: int, patient: int) -> object:
    if kind in TEXT:
        return word(number + patient * 0x10000)[: TEXT[kind]]
    others = {"DA": DATES[0], "TM": TIME, "DT": DATES[0] + TIME, "AS": AGE, "DS": NUMBER}
    return {**others, "UI": f"{UID}.{number}", "UN": word(number).encode()}.get(kind)


def needles(*more: str) -> list[bytes]:
    """What must not be found, in lower case: the planted strings, and the mark in UTF-16."""
    texts = [MARK, *DATES, TIME, UID, NUMBER, *more]
    return [text.lower().encode() for text in texts] + [MARK.encode("utf-16-le").lower()]


def found_in(name: str, content: bytes, wanted: list[bytes], depth: int = 0) -> Iterator[str]:
    """Where in a file, unpacked as deeply as it is packed, a string stands."""
    small = content.lower()
    yield from (f"{name}: {needle!r}" for needle in wanted if needle in small)
    if depth < 6:
        for inner, unpacked in unpacked_of(content):
            yield from found_in(f"{name} > {inner}", unpacked, wanted, depth + 1)


def unpacked_of(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Everything that a file holds packed: gzip, zip, PNG text, blosc2 with its metadata, base64."""
    if content[:2] == b"\x1f\x8b":
        yield "gzip", gzip.decompress(content)
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            for inside in packed.infolist():
                yield f"zip {inside.filename}", packed.read(inside)
    for start in re.finditer(b"\x89PNG\r\n\x1a\n", content):
        yield from _png(content[start.start() :])
    if content[2:10] == b"b2frame\0":
        yield from _blosc2(content)
    for one in re.finditer(rb"[A-Za-z0-9+/]{64,}={0,2}", content):
        whole = one[0][: len(one[0]) // 4 * 4]
        yield "base64", base64.b64decode(whole)


def _png(content: bytes) -> Iterator[tuple[str, bytes]]:
    at = 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, chunk = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        if kind == b"zTXt":
            yield "zTXt", zlib.decompress(chunk.split(b"\0", 1)[1][1:])
        elif kind == b"iTXt":
            keyword, _, rest = chunk.partition(b"\0")
            text = rest[2:].split(b"\0", 2)[2]
            yield "iTXt", keyword + (zlib.decompress(text) if rest[:1] == b"\1" else text)
        elif kind not in (b"IDAT", b"PLTE"):
            yield kind.decode("latin-1"), chunk
        if kind == b"IEND":
            return
        at += 12 + length


def _blosc2(content: bytes) -> Iterator[tuple[str, bytes]]:
    array = blosc2.ndarray_from_cframe(content)
    voxels = np.ascontiguousarray(array[:])
    if "steps" in array.schunk.vlmeta:
        _sum(voxels, int(str(array.schunk.vlmeta["steps"])))
    yield "voxels", voxels.tobytes()
    for kind, layer in (("meta", array.schunk.meta), ("vlmeta", array.schunk.vlmeta)):
        for key in layer:
            yield f"{kind} {key}", str(layer[key]).encode()


def search(folder: Path, wanted: list[bytes], *, leave_out: tuple[str, ...] = ()) -> list[str]:
    """All finds in the names and bytes of everything below `folder`, but in folders named in `leave_out`."""
    finds: list[str] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if set(leave_out) & set(inside.parts):
            continue
        finds += [f"name of {inside}: {needle!r}" for needle in wanted if needle in str(inside).lower().encode()]
        if path.is_file():
            finds += found_in(str(inside), path.read_bytes(), wanted)
    return finds
