"""The lean walk gives what pydicom gives, or says that it cannot."""

import warnings

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian

from volssl import headers
from volssl.dicom import general_value, header
from volssl.dicom_write import write_dicom_series

TAGS = {"PatientID": "Doe^Jane", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
KEYWORDS = [keyword for keyword, _ in headers.TAGS.values()]


@pytest.fixture
def one(tmp_path, phantom):
    write_dicom_series(tmp_path, *phantom, tags=TAGS)
    return tmp_path / "IM00003.dcm"


def by_pydicom(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(path, force=True, specific_tags=KEYWORDS)
        return {keyword: value for keyword in KEYWORDS if (value := general_value(data.get(keyword)))}


def save(data, path, **how):
    data.save_as(path, **how)
    return path


def test_values_and_place_of_pixels(one):
    found = headers.scan(one)
    assert found.values == by_pydicom(one)
    assert found.values["Rows"] == (20.0,)
    assert found.values["PatientID"] == ("Doe^Jane",)
    assert found.syntax == headers.EXPLICIT
    whole = one.read_bytes()
    assert found.pixels == (len(whole) - 2 * 24 * 20, 2 * 24 * 20)
    assert whole[found.pixels[0] :] == pydicom.dcmread(one).PixelData


def test_implicit_twin_and_sequences_of_both_kinds(one, tmp_path):
    data = pydicom.dcmread(one)
    inner = Dataset()
    inner.PatientID = "not this one"
    inner.OtherPatientIDsSequence = Sequence([Dataset()])
    inner["OtherPatientIDsSequence"].is_undefined_length = True
    for undefined in (False, True):
        data.ReferencedImageSequence = Sequence([inner, inner])
        data["ReferencedImageSequence"].is_undefined_length = undefined
        for item in data.ReferencedImageSequence:
            item.is_undefined_length_sequence_item = undefined
        explicit = headers.scan(save(data, tmp_path / f"explicit{undefined}"))
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        implicit = headers.scan(save(data, tmp_path / f"implicit{undefined}", implicit_vr=True, little_endian=True))
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        assert explicit.values == implicit.values == by_pydicom(one)
        assert implicit.syntax == headers.IMPLICIT


def test_long_private_values_are_stepped_over(one, tmp_path):
    data = pydicom.dcmread(one)
    data.add_new(0x00090010, "LO", "VENDOR")
    data.add_new(0x00091001, "OB", b"\1" * 200_000)
    assert headers.scan(save(data, tmp_path / "x")).values == by_pydicom(one)


ODD = {
    "letters": lambda d, p: (setattr(d, "SpecificCharacterSet", "ISO_IR 192"), setattr(d, "PatientID", "Jané"), save(d, p)),
    "number": lambda d, p: (save(d, p), p.write_bytes(p.read_bytes().replace(b"IS\x02\x003 ", b"IS\x02\x00x "))),
    "cut": lambda d, p: (save(d, p), p.write_bytes(p.read_bytes()[:400])),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_left_to_the_general_parser(one, tmp_path, kind):
    data = pydicom.dcmread(one)
    ODD[kind](data, tmp_path / "odd")
    with pytest.raises(headers.Odd):
        headers.scan(tmp_path / "odd")


def test_odd_files_get_the_general_parsers_values(one, tmp_path):
    data = pydicom.dcmread(one)
    ODD["letters"](data, tmp_path / "odd")
    assert header(tmp_path / "odd").patient == "Jané"


def test_without_preamble_and_meta(one, tmp_path):
    whole = one.read_bytes()
    begin = whole.index(b"\x08\x00\x08\x00CS")
    (tmp_path / "bare").write_bytes(whole[begin:])
    assert headers.begins_like_dicom(whole[begin : begin + 132])
    assert headers.scan(tmp_path / "bare").values == headers.scan(one).values
    assert not headers.begins_like_dicom(b"\x08\x00 is a short text about something else")
    assert not headers.begins_like_dicom(b"")


def test_compressed_pixels_end_with_their_mark(one, tmp_path):
    data = pydicom.dcmread(one)
    data.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
    data.PixelData = pydicom.encaps.encapsulate([b"12345678", b"abcdefgh"])
    data["PixelData"].is_undefined_length = True
    path = save(data, tmp_path / "x")
    at, length = headers.scan(path).pixels
    assert length == headers.UNDEFINED
    assert headers.fragments_are_whole(path, at)
    path.write_bytes(path.read_bytes()[:-12])
    assert not headers.fragments_are_whole(path, at)
    assert "truncated" in header(path).faults


def test_every_real_file_gives_the_general_parsers_values(real_data):
    odd, plain = [], 0
    for path in sorted(real_data.rglob("*")):
        if not path.is_file() or not headers.begins_like_dicom(path.open("rb").read(132)):
            continue
        try:
            found = headers.scan(path)
        except headers.Odd:
            odd.append(path.name)
            continue
        plain += 1
        assert found.values == by_pydicom(path), path
    # Big-endian, deflated, and one without a transfer syntax.
    want = ["ExplVR_BigEnd.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "image_dfl.dcm", "meta_missing_tsyntax.dcm"]
    assert odd == want
    assert plain > 100
