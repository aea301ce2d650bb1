"""Bytes that mean harm, for the fuzz tests: mutations of good DICOM, NIfTI, MetaImage and NRRD files, as hypothesis strategies."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from conftest import body_phantom, oblique_grid
from hypothesis import strategies as st

from volssl.dicom_write import write_dicom_series, write_enhanced_ct

SHAPE = (8, 9, 8)
TAGS = {"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
# Numbers at which readers break: extremes of each width, signs, undefined length.
EDGES = [0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
WORDS = [
    b"-1",
    b"0",
    b"1e308",
    b"nan",
    b"inf",
    b"99999999999999999999",
    b"%s%n",
    b"\xff\xfe",
    b"",
    b" ",
    b"\n",
    b"=",
    b"..",
    b"/",
    b"LIST",
    b"\\",
]


def seeds(folder: Path) -> dict[str, bytes]:
    """Good files by extension, all small; one of each coding."""
    array, grid = body_phantom(SHAPE), oblique_grid(SHAPE)
    write_dicom_series(folder / "series", array, grid, tags=TAGS)
    write_enhanced_ct(folder / "enhanced", np.stack([array, array + 1]), grid, tags=TAGS)
    one = (folder / "series" / "IM00001.dcm").read_bytes()
    data = pydicom.dcmread(folder / "series" / "IM00001.dcm")
    data.ReferencedImageSequence = [pydicom.Dataset()]
    data["ReferencedImageSequence"].is_undefined_length = True
    data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    data.save_as(folder / "rle")
    made = {
        "explicit.dcm": one,
        "bare.dcm": one[one.index(b"\x08\x00\x08\x00CS") :],
        "rle.dcm": (folder / "rle").read_bytes(),
        "enhanced.dcm": (folder / "enhanced").read_bytes(),
    }
    data = pydicom.dcmread(folder / "series" / "IM00002.dcm")
    data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    data.save_as(folder / "implicit", implicit_vr=True, little_endian=True)
    made["implicit.dcm"] = (folder / "implicit").read_bytes()
    image = nibabel.Nifti1Image(array, grid.affine)
    made["x.nii"] = image.to_bytes()
    made["x.nii.gz"] = gzip.compress(image.to_bytes())
    made["two.nii"] = nibabel.Nifti2Image(np.stack([array, array], -1), grid.affine).to_bytes()
    for name, compress in {"x.mha": False, "z.mha": True, "x.nrrd": False, "z.nrrd": True}.items():
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(array.T)), str(folder / name), compress)
        made[name] = (folder / name).read_bytes()
    return made


@st.composite
def mutations(draw: st.DrawFn, names: list[str]) -> tuple[str, list[tuple[str, int, int]]]:
    """Which seed, and what is done to it: (kind, where, with what); `where` is taken modulo the length."""
    kinds = ["byte", "short", "int", "big", "word", "cut", "drop", "repeat", "swap", "number"]
    steps = st.tuples(st.sampled_from(kinds), st.integers(0, 2**20), st.integers(0, 2**16))
    return draw(st.sampled_from(names)), draw(st.lists(steps, min_size=1, max_size=6))


def mutated(good: bytes, steps: list[tuple[str, int, int]], *, packed: bool = False) -> bytes:
    """The bytes after all steps. A packed file is unpacked first and packed again, so that its header is reached."""
    data = bytearray(gzip.decompress(good) if packed else good)
    for kind, where, what in steps:
        # Three of four steps go where headers are.
        at = where % max(1, min(len(data), 700) if where % 4 else len(data))
        _apply(data, kind, at, what)
    return gzip.compress(bytes(data)) if packed and steps[0][2] % 8 else bytes(data)


def _apply(data: bytearray, kind: str, at: int, what: int) -> None:
    edge, word = EDGES[what % len(EDGES)], WORDS[what % len(WORDS)]
    match kind:
        case "byte":
            data[at : at + 1] = bytes([what % 256])
        case "short":
            data[at : at + 2] = (edge & 0xFFFF).to_bytes(2, "little")
        case "int":
            data[at : at + 4] = edge.to_bytes(4, "little")
        case "big":
            data[at : at + 8] = (edge << 32 | edge).to_bytes(8, "big")
        case "word":
            data[at : at + len(word)] = word
        case "cut":
            del data[at:]
        case "drop":
            del data[at : at + what % 64]
        case "repeat":
            data[at:at] = data[at : at + what % 64] * (1 + what % 50)
        case "swap":
            data[at : at + 16] = data[at : at + 16][::-1]
        case "number":
            # A decimal number of a text header or of a DS, replaced.
            for place in range(at, min(len(data), at + 64)):
                if 48 <= data[place] <= 57:
                    end = place
                    while end < len(data) and 48 <= data[end] <= 57:
                        end += 1
                    data[place:end] = word
                    break


def bomb(count: int) -> bytes:
    """`count` zeros, packed."""
    return zlib.compress(bytes(count), 9)
