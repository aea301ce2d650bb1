"""Image files other than DICOM: NIfTI through nibabel; MetaImage and NRRD are read here.

Their usual reader is C++ that bad bytes can bring down. What a header declares is held against the bytes that are there before memory is
taken for it. World RAS+ leaves here.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volssl.dicom import LPS_TO_RAS, Unreadable
from volssl.volume import Grid, Volume

NIFTI = (".nii", ".nii.gz", ".hdr")
META = (".mha", ".mhd")
NRRD = (".nrrd", ".nhdr")
LARGEST = 1 << 34  # bytes of one decoded image
BOMB = 1 << 31  # from here on, what unpacks to more than BOMB_RATIO times its size is refused; scans reach 20, large empty masks 1000
BOMB_RATIO = 300
MOST_PACKED = 1040  # deflate cannot do better, so a header that declares more is wrong
HEADER = 1 << 16  # bytes of a text header
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}  # fmt: skip
SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
}


# nibabel quotes header values when it finds them odd.
logging.getLogger("nibabel").setLevel(logging.CRITICAL)


def read_file(path: Path) -> Volume:
    """Read one image file by its extension; a fourth axis becomes the channels. Raises: Unreadable: with a `code`."""
    name = path.name.lower()
    try:
        if name.endswith(NIFTI):
            return _read_nifti(path)
        return _read_meta(path) if name.endswith(META) else _read_nrrd(path)
    except (Unreadable, MemoryError):
        raise
    except PermissionError:
        raise Unreadable("no_permission", f"{path}: must be readable; permission denied") from None
    except FileNotFoundError as error:
        raise Unreadable("missing", f"{path}: must have its pixels beside it; found no {Path(str(error.filename)).name}") from None
    except EOFError:
        raise _truncated(path) from None
    except Exception as error:  # a parser on foreign bytes may raise anything
        raise Unreadable("undecodable", f"{path}: cannot be decoded ({type(error).__name__}); is it whole?") from None


def _truncated(path: Path) -> Unreadable:
    return Unreadable("truncated", f"{path}: ends before its last voxel")


def _hold(path: Path, declared: int, stored: int, *, packed: bool) -> None:
    # What is declared must fit what is there, before memory is taken for it.
    if declared > LARGEST or (packed and declared > BOMB and declared > BOMB_RATIO * stored):
        raise Unreadable("too_large", f"{path}: must unpack to at most {LARGEST} bytes; its {stored} bytes declare {declared}")
    if declared > (MOST_PACKED * stored + 1024 if packed else stored):
        raise _truncated(path)


def _read_nifti(path: Path) -> Volume:
    import nibabel  # takes half of the time in which a process of ours starts, and DICOM needs it not

    image: Any = nibabel.load(path, mmap=False)
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or min(shape) < 1:
        raise Unreadable("not_3d", f"{path}: must have three axes; found {len(shape)}")
    pixels = Path(image.file_map["image"].filename)
    packed = pixels.name.lower().endswith(".gz")
    _hold(path, math.prod(shape) * image.get_data_dtype().itemsize, pixels.stat().st_size, packed=packed)
    if not isinstance(image, nibabel.Nifti1Pair) or not (image.header["qform_code"] or image.header["sform_code"]):
        raise Unreadable("no_orientation", f"{path}: must have a q-form or an s-form; without, left and right are not known")
    if np.dtype(image.get_data_dtype()).fields:
        raise Unreadable("rgb", f"{path}: must hold one number per voxel; found colours")
    array = _scaled(image.dataobj)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4):
        raise Unreadable("not_3d", f"{path}: must have three axes, or four with channels last; found {array.ndim}")
    array_CXYZ = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    x, y, z = array_CXYZ.shape[1:]
    return Volume(_native(array_CXYZ), Grid((x, y, z), np.asarray(image.affine)))


def _scaled(data: Any) -> np.ndarray:
    # float32 instead of nibabel's float64; whole numbers that are only shifted stay whole.
    stored = np.asanyarray(data.get_unscaled())
    slope, shift = float(data.slope), float(data.inter)
    if (slope, shift) == (1.0, 0.0) or stored.dtype.kind not in "iuf":
        return stored
    if stored.dtype.kind != "f" and stored.dtype.itemsize <= 2 and slope.is_integer() and shift.is_integer():
        low, high = (int(end) * int(slope) + int(shift) for end in (stored.min(), stored.max()))
        if min(low, high) >= -(2**15) and max(low, high) < 2**15:
            return (stored.astype(np.int32) * int(slope) + int(shift)).astype(np.int16)
    return (stored.astype(np.float64) * slope + shift).astype(np.float32)


def _native(array: np.ndarray) -> np.ndarray:
    # Whole numbers up to 2^24 stay exact in float32.
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_meta(path: Path) -> Volume:
    with open(path, "rb") as stream:
        fields, begin = _meta_header(path, stream.read(HEADER))
    shape = [int(n) for n in fields["dimsize"].split()]
    if len(shape) not in (3, 4) or min(shape) < 1 or int(fields["ndims"]) != len(shape):
        raise Unreadable("not_3d", f"{path}: must have three axes, or four; found {len(shape)}")
    channels = int(fields.get("elementnumberofchannels", "1"))
    if channels != 1:
        raise Unreadable("rgb", f"{path}: must hold one number per voxel; found {channels}")
    if fields.get("binarydata", "true").lower() != "true":
        raise Unreadable("unsupported_format", f"{path}: pixels must be binary; found text")
    swapped = fields.get("elementbyteordermsb", fields.get("binarydatabyteordermsb", "false")).lower() == "true"
    kind = np.dtype((">" if swapped else "<") + META_TYPES[fields["elementtype"].upper()])
    packed = "zlib" if fields.get("compresseddata", "false").lower() == "true" else "raw"
    source = fields["elementdatafile"]
    where = path if source.upper() in ("LOCAL", "LOCALFILE") else _beside(path, source)
    skip = begin if where == path else int(fields.get("headersize", "0"))
    array = _elements(path, where, skip, (kind, shape, packed))
    return _placed(array, _meta_affine(fields, len(shape)))


def _meta_header(path: Path, start: bytes) -> tuple[dict[str, str], int]:
    fields: dict[str, str] = {}
    at = 0
    while "elementdatafile" not in fields:
        end = start.find(b"\n", at)
        line = start[at : end if end >= 0 else len(start)].decode("latin-1").strip()
        if line and "=" not in line:
            raise Unreadable("undecodable", f"{path}: every line of its header must be `key = value`")
        if not line and end < 0:
            raise Unreadable("undecodable", f"{path}: its header must end with ElementDataFile")
        key, _, value = line.partition("=")
        fields[key.strip().lower()] = value.strip()
        at = end + 1 if end >= 0 else len(start)
    return fields, at


def _meta_affine(fields: dict[str, str], axes: int) -> np.ndarray:
    def numbers(keys: Sequence[str], default: np.ndarray) -> np.ndarray:
        for key in keys:
            if key in fields:
                return np.array([float(v) for v in fields[key].split()]).reshape(default.shape)
        return default

    turn = numbers(("transformmatrix", "rotation", "orientation"), np.eye(axes))[:3, :3]
    spacing = numbers(("elementspacing", "elementsize"), np.ones(axes))[:3]
    affine = np.eye(4)
    affine[:3, :3] = turn.T * spacing  # the file lists the direction of each axis in turn
    affine[:3, 3] = numbers(("offset", "position", "origin"), np.zeros(axes))[:3]
    return LPS_TO_RAS @ affine


def _read_nrrd(path: Path) -> Volume:
    with open(path, "rb") as stream:
        fields, begin = _nrrd_header(path, stream.read(HEADER))
    sizes = [int(n) for n in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or min(sizes) < 1:
        raise Unreadable("undecodable", f"{path}: must have as many sizes as axes, each at least 1")
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", "").lower())
    space = SPACES.get(fields.get("space", "").lower().removesuffix("-time"))
    if space is None or len(directions) != len(sizes):
        raise Unreadable("no_orientation", f"{path}: must name its space; without, left and right are not known")
    world = [axis for axis, text in enumerate(directions) if text != "none"]
    other = [axis for axis in range(len(sizes)) if axis not in world]
    if len(world) != 3 or len(other) > 1:
        raise Unreadable("not_3d", f"{path}: must have three axes in space and at most one other; found {len(world)} and {len(other)}")
    if other and fields.get("kinds", "").split()[other[0] : other[0] + 1] in (["RGB-color"], ["RGBA-color"], ["3-color"], ["4-color"]):
        raise Unreadable("rgb", f"{path}: must hold one number per voxel; found colours")
    if fields["type"].lower() not in NRRD_TYPES:
        raise Unreadable("not_numbers", f"{path}: must hold numbers; found blocks")
    kind = np.dtype((">" if fields.get("endian", "little").lower() == "big" else "<") + NRRD_TYPES[fields["type"].lower()])
    source = fields.get("data file", fields.get("datafile", ""))
    where = _beside(path, source) if source else path
    skip = (begin if where == path else 0) + int(fields.get("byte skip", fields.get("byteskip", "0")))
    if int(fields.get("line skip", fields.get("lineskip", "0"))):
        raise Unreadable("unsupported_format", f"{path}: lines before the pixels are not skipped")
    array = _elements(path, where, skip, (kind, sizes, fields["encoding"].lower()))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[float(v) for v in directions[axis].strip("()").split(",")] for axis in world]).T
    affine[:3, 3] = [float(v) for v in fields.get("space origin", "(0,0,0)").strip().strip("()").split(",")]
    return _placed(np.moveaxis(array, other[0], -1) if other else array, np.diag([*space, 1.0]) @ affine)


def _nrrd_header(path: Path, start: bytes) -> tuple[dict[str, str], int]:
    head, blank, _ = start.partition(b"\n\n") if b"\n\n" in start else start.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").splitlines()
    if not lines or not lines[0].startswith("NRRD000"):
        raise Unreadable("undecodable", f"{path}: must begin with NRRD's mark")
    fields = {}
    for line in lines[1:]:
        key, colon, value = line.partition(": ")
        if colon and not line.startswith("#") and ":=" not in key:
            fields[key.strip().lower()] = value.strip()
    if not blank and not ({"data file", "datafile"} & set(fields)):
        raise Unreadable("truncated", f"{path}: its header must end with an empty line")
    return fields, len(head) + len(blank)


def _beside(path: Path, name: str) -> Path:
    # The file of the pixels lies with its header: a header is no way to other folders.
    if not name or "%" in name or name.upper() == "LIST" or "/" in name or "\\" in name or name in (".", ".."):
        raise Unreadable("unsupported_format", f"{path}: must name one file of pixels in its own folder")
    return path.parent / name


def _elements(path: Path, where: Path, skip: int, layout: tuple[np.dtype, Sequence[int], str]) -> np.ndarray:
    # Voxels with the file's first axis first. `layout`: type, sizes, encoding.
    kind, sizes, encoding = layout
    declared = math.prod(sizes) * kind.itemsize
    with open(where, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if encoding not in ("raw", "zlib", "gzip", "gz", "bzip2", "bz2"):
            raise Unreadable("unsupported_format", f"{path}: pixels must be raw, gzip or bzip2")
        _hold(path, declared, size - max(0, skip), packed=encoding != "raw")
        stream.seek(skip if skip >= 0 else size - declared)
        data = stream.read(declared) if encoding == "raw" else _unpacked(stream, encoding, declared)
    if len(data) < declared:
        raise _truncated(path)
    return np.frombuffer(data, dtype=kind).reshape(tuple(sizes), order="F")


def _unpacked(stream: BinaryIO, encoding: str, declared: int) -> bytes:
    if encoding in ("gzip", "gz"):
        with gzip.open(stream) as plain:
            return plain.read(declared)
    if encoding in ("bzip2", "bz2"):
        with bz2.open(stream) as plain:
            return plain.read(declared)
    inflater, parts, found = zlib.decompressobj(47), [], 0
    while found < declared and not inflater.eof and (block := stream.read(1 << 20)):
        while block and found < declared:
            parts.append(inflater.decompress(block, declared - found))
            found += len(parts[-1])
            block = inflater.unconsumed_tail
    return b"".join(parts)


def _placed(array: np.ndarray, affine: np.ndarray) -> Volume:
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    array_CXYZ = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    x, y, z = array_CXYZ.shape[1:]
    return Volume(_native(array_CXYZ), Grid((x, y, z), affine))
