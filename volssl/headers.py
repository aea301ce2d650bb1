"""A lean walk over the header of one DICOM file: the few values that an archive is judged by, and where the pixels lie.

About ten times as fast as a general parser, because it touches nothing else. Whatever is not plain (other byte order, deflated, tags out
of order, odd value types, letters beyond ASCII) is `Odd`: then the general parser is asked, and its answer stands. Only plain bytes are
read here, never mapped, so a file that shrinks meanwhile is short, and no more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

Values = dict[str, tuple[str, ...] | tuple[float, ...]]

# Keyword and value type of each tag that is read. CS, SH, LO, UI, LT are text, the rest numbers.
TAGS = {
    0x00080008: ("ImageType", b"CS"),
    0x00080016: ("SOPClassUID", b"UI"),
    0x00080018: ("SOPInstanceUID", b"UI"),
    0x00080060: ("Modality", b"CS"),
    0x00080070: ("Manufacturer", b"LO"),
    0x00100020: ("PatientID", b"LO"),
    0x00180015: ("BodyPartExamined", b"CS"),
    0x00180081: ("EchoTime", b"DS"),
    0x00181210: ("ConvolutionKernel", b"SH"),
    0x00189087: ("DiffusionBValue", b"FD"),
    0x0020000D: ("StudyInstanceUID", b"UI"),
    0x0020000E: ("SeriesInstanceUID", b"UI"),
    0x00200012: ("AcquisitionNumber", b"IS"),
    0x00200013: ("InstanceNumber", b"IS"),
    0x00200032: ("ImagePositionPatient", b"DS"),
    0x00200037: ("ImageOrientationPatient", b"DS"),
    0x00200100: ("TemporalPositionIdentifier", b"IS"),
    0x00280002: ("SamplesPerPixel", b"US"),
    0x00280004: ("PhotometricInterpretation", b"CS"),
    0x00280008: ("NumberOfFrames", b"IS"),
    0x00280010: ("Rows", b"US"),
    0x00280011: ("Columns", b"US"),
    0x00280030: ("PixelSpacing", b"DS"),
    0x00280100: ("BitsAllocated", b"US"),
    0x00280101: ("BitsStored", b"US"),
    0x00280103: ("PixelRepresentation", b"US"),
    0x00280301: ("BurnedInAnnotation", b"CS"),
    0x00281052: ("RescaleIntercept", b"DS"),
    0x00281053: ("RescaleSlope", b"DS"),
    0x00281054: ("RescaleType", b"LO"),
}
TEXT = (b"CS", b"SH", b"LO", b"UI")
SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
UNDEFINED = 0xFFFFFFFF
PIXELS = 0x7FE00010
PIXEL_TAGS = (0x7FE00008, 0x7FE00009, PIXELS)  # float, double, whole numbers
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
WINDOW = 8192
DEEPEST = 16
LONGEST = 4096  # bytes of one value

_HEAD = Struct("<HH2sH").unpack_from
_LENGTH = Struct("<I").unpack_from
_US = Struct("<H").unpack_from
_FD = Struct("<d").unpack_from


class Odd(Exception):
    """A header that this walk does not understand, which says nothing against it."""


@dataclass(frozen=True, slots=True)
class Header:
    """`values` by keyword; absent or empty elements are not in it. `pixels`: offset and length in bytes of the pixel element's value."""

    values: Values
    syntax: str
    pixels: tuple[int, int] | None
    size: int


class _Bytes:
    # A window on an open file.
    __slots__ = ("base", "data", "handle", "size")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.size = os.fstat(handle).st_size
        self.base = 0
        self.data = os.pread(handle, WINDOW, 0)

    def near(self, at: int) -> int:
        # Position in `data` of offset `at`, with 12 bytes after it unless the file ends before.
        pos = at - self.base
        if pos < 0 or pos + 12 > len(self.data):
            self.base, pos = at, 0
            self.data = os.pread(self.handle, WINDOW, at)
            if len(self.data) < 8:
                raise Odd("ends within an element")
        return pos

    def value(self, at: int, length: int) -> bytes:
        if at + length > self.size:  # asked before memory is taken for it
            raise Odd("ends within a value")
        pos = at - self.base
        found = self.data[pos : pos + length] if pos >= 0 and pos + length <= len(self.data) else os.pread(self.handle, length, at)
        if len(found) < length:
            raise Odd("ends within a value")
        return found


def scan(path: Path) -> Header:
    """Read the header of one file. Raises: Odd: ask the general parser; OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        file = _Bytes(handle)
        at, syntax = _begin(file)
        raw: dict[int, bytes] = {}
        pixels = _walk(file, at, syntax != IMPLICIT, raw)
    finally:
        os.close(handle)
    try:
        values = {TAGS[tag][0]: value for tag, found in raw.items() if (value := _value(found, TAGS[tag][1]))}
    except (ValueError, UnicodeDecodeError):
        raise Odd("a value is not of its type") from None
    return Header(values, syntax, pixels, file.size)


def begins_like_dicom(start: bytes) -> bool:
    """Whether the first 132 bytes or more of a file are DICOM's: with its mark behind a preamble, or without both."""
    if start[128:132] == b"DICM":
        return True
    if len(start) < 16:
        return False
    group, element, kind, _ = _HEAD(start, 0)
    if group not in (2, 8) or element > 0x0100:
        return False
    return kind in SHORT or kind in LONG or (group == 8 and _LENGTH(start, 4)[0] <= 128)


def _begin(file: _Bytes) -> tuple[int, str]:
    # Where the data set begins, and its transfer syntax.
    data = file.data
    if data[128:132] != b"DICM":
        if not begins_like_dicom(data) or _HEAD(data, 0)[0] == 2:
            raise Odd("no mark")
        return 0, EXPLICIT if data[4:6] in SHORT else IMPLICIT
    at, syntax = 132, ""
    while at < file.size:
        pos = file.near(at)
        group, element, kind, length = _HEAD(file.data, pos)
        if group != 2:
            break
        begin = at + 8
        if kind in LONG:
            (length,), begin = _LENGTH(file.data, pos + 8), at + 12
        elif kind not in SHORT:
            raise Odd("file meta")
        if element == 0x0010:
            syntax = file.value(begin, length).rstrip(b"\0 ").decode("ascii", "replace")
        at = begin + length
    if syntax in ("", BIG_ENDIAN, DEFLATED) or not syntax.startswith("1.2.840.10008.1.2"):
        raise Odd("transfer syntax")
    return at, syntax


def _walk(file: _Bytes, at: int, explicit: bool, raw: dict[int, bytes]) -> tuple[int, int] | None:
    # Gathers the values of TAGS; returns where the pixels lie.
    last, size = 0, file.size
    data, base, end = file.data, file.base, -1  # the window; looked up here, since this loop is what takes the time
    while at < size:
        pos = at - base
        if pos < 0 or at > end:
            pos = file.near(at)
            data, base = file.data, file.base
            end = base + len(data) - 12
        group, element, kind, length = _HEAD(data, pos)
        begin = at + 8
        if not explicit:
            (length,) = _LENGTH(data, pos + 4)
            if kind in SHORT or kind in LONG:
                raise Odd("explicit after all")
        elif kind in LONG:
            (length,), begin = _LENGTH(data, pos + 8), at + 12
        elif kind not in SHORT:
            raise Odd("value type")
        tag = group << 16 | element
        if tag <= last:
            raise Odd("order")
        last = tag
        if tag in PIXEL_TAGS:
            return begin, length
        if length == UNDEFINED:
            if explicit and kind != b"SQ":
                raise Odd("undefined length")
            at, end = _after_items(file, begin, explicit, 0), -1
            continue
        if tag in TAGS:
            if (explicit and kind != TAGS[tag][1]) or length > LONGEST:
                raise Odd("value type or length")
            pos = begin - base
            raw[tag] = data[pos : pos + length] if pos + length <= len(data) else file.value(begin, length)
        at = begin + length
    if at > size:
        raise Odd("ends within an element")
    return None


def _after_items(file: _Bytes, at: int, explicit: bool, depth: int) -> int:
    # The offset after a sequence of undefined length that begins at `at`.
    if depth > DEEPEST:
        raise Odd("depth")
    while True:
        pos = file.near(at)
        group, element, _, _ = _HEAD(file.data, pos)
        tag, (length,) = group << 16 | element, _LENGTH(file.data, pos + 4)
        at += 8
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            raise Odd("item")
        at = _after_elements(file, at, explicit, depth) if length == UNDEFINED else at + length


def _after_elements(file: _Bytes, at: int, explicit: bool, depth: int) -> int:
    # The offset after an item of undefined length whose elements begin at `at`.
    while True:
        pos = file.near(at)
        group, element, kind, length = _HEAD(file.data, pos)
        if group << 16 | element == ITEM_END:
            return at + 8
        begin = at + 8
        if not explicit:
            (length,) = _LENGTH(file.data, pos + 4)
        elif kind in LONG:
            (length,), begin = _LENGTH(file.data, pos + 8), at + 12
        elif kind not in SHORT:
            raise Odd("value type")
        if length == UNDEFINED:
            if explicit and kind != b"SQ":
                raise Odd("undefined length")
            at = _after_items(file, begin, explicit, depth + 1)
        else:
            at = begin + length


def _value(raw: bytes, kind: bytes) -> tuple[str, ...] | tuple[float, ...]:
    if kind == b"US":
        if len(raw) % 2:
            raise ValueError("odd length")
        return tuple(float(_US(raw, at)[0]) for at in range(0, len(raw), 2))
    if kind == b"FD":
        if len(raw) % 8:
            raise ValueError("odd length")
        return tuple(_FD(raw, at)[0] for at in range(0, len(raw), 8))
    if b"\x1b" in raw:
        raise ValueError("escape")
    text = raw.decode("ascii").rstrip("\0 ")
    if kind in TEXT:
        return tuple(part.strip(" \0") for part in text.split("\\")) if text.strip() else ()
    return tuple(float(part) for part in text.split("\\")) if text.strip() else ()


def fragments_are_whole(path: Path, at: int) -> bool:
    """Whether encapsulated pixels that begin at `at` reach their end mark: only the marks of the fragments are read. Raises: OSError."""
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        while at + 8 <= size:
            stream.seek(at)
            group, element, _, _ = _HEAD(mark := stream.read(8).ljust(8, b"\0"), 0)
            tag, (length,) = group << 16 | element, _LENGTH(mark, 4)
            if tag == SEQUENCE_END:
                return True
            if tag != ITEM or length == UNDEFINED:
                return False
            at += 8 + length
    return False
