"""Pixels as SimpleITK decodes them, whatever their bits; only what was asked for is mended."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from volssl.dicom import Unreadable, header
from volssl.dicom_write import write_dicom_series, write_enhanced_ct
from volssl.pixels import read_series, read_slice, read_stack
from volssl.stacks import Stack

TAGS = {"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}


@pytest.fixture
def one(tmp_path, phantom):
    write_dicom_series(tmp_path, *phantom, tags=TAGS)
    return tmp_path / "IM00004.dcm"


LAYOUTS = [
    # allocated, stored, signed, slope, intercept
    (16, 12, 0, "1", "-1024"),
    (16, 16, 0, "1", "0"),
    (16, 16, 1, "1", "-1024"),
    (16, 12, 1, "1", "0"),
    (16, 12, 0, "2", "-2000"),
    (16, 12, 0, "0.37", "-5.5"),
    (8, 8, 0, "1", "0"),
    (8, 8, 1, "3", "-7"),
    (32, 32, 1, "1", "10"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_pixels_are_those_of_simpleitk(one, layout):
    allocated, stored, signed, slope, intercept = layout
    rng = np.random.default_rng(0)
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1)) if signed else (0, 2**stored)
    kind = f"{'i' if signed else 'u'}{allocated // 8}"
    values = rng.integers(max(low, -30000), min(high, 30000), (20, 24)).astype(kind)
    data = pydicom.dcmread(one)
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = allocated, stored, stored - 1, signed
    data.RescaleSlope, data.RescaleIntercept, data.PixelData = slope, intercept, values.tobytes()
    data["PixelData"].VR = "OW"
    data.save_as(one)
    want = sitk.GetArrayFromImage(sitk.ReadImage(str(one)))[0]
    got = read_slice(header(one))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got, values * float(slope) + float(intercept), rtol=1e-6)


def test_unused_bits_do_not_count(one):
    data = pydicom.dcmread(one)
    values = np.frombuffer(data.PixelData, dtype=np.uint16)
    data.PixelData = (values | 0x8000).tobytes()
    data.save_as(one)
    np.testing.assert_array_equal(read_slice(header(one)), values.reshape(20, 24).astype(int) - 1024)


def test_a_volume_is_its_slices_in_the_least_type_that_holds_them(one):
    slices = [header(path) for path in sorted(one.parent.iterdir())]
    volume = read_series(slices)
    assert volume.array_CXYZ.dtype == np.int16
    for at, part in enumerate(slices):
        np.testing.assert_array_equal(volume.array_CXYZ[0, :, :, at], read_slice(part).T)


def test_real_series_are_those_of_simpleitk(real_data):
    for folder in ("abdomen_ct/KiTS-00072_dicom", "other/dicom2nifti/generic/anatomical/001_implicit"):
        for path in sorted((real_data / folder).iterdir()):
            want = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0]
            np.testing.assert_array_equal(read_slice(header(path)), want)


@pytest.mark.parametrize("syntax", [pydicom.uid.RLELossless])
def test_compressed_frames_of_one_file(tmp_path, phantom, syntax):
    array, grid = phantom
    write_enhanced_ct(tmp_path / "plain", np.stack([array, array + 3]), grid, tags=TAGS)
    data = pydicom.dcmread(tmp_path / "plain")
    data.compress(syntax, generate_instance_uid=False)
    data.save_as(tmp_path / "packed")
    from volssl.dicom import frames_of

    plain, packed = (frames_of(header(tmp_path / name)) for name in ("plain", "packed"))
    for at in (0, 5, 17):
        np.testing.assert_array_equal(read_slice(packed[at]), read_slice(plain[at]))


def test_what_was_not_asked_for_is_not_mended(one):
    stack = Stack((header(one),), None, ("gantry_tilt", "several_volumes"))
    with pytest.raises(Unreadable) as caught:
        read_stack(stack, repairs=("unshear",))
    assert caught.value.code == "several_volumes"


def test_absurd_sizes_are_refused_before_memory_is_taken(one):
    slices = [header(path) for path in sorted(one.parent.iterdir())]
    from dataclasses import replace

    with pytest.raises(Unreadable) as caught:
        read_series([replace(part, shape=(65535, 65535)) for part in slices])
    assert caught.value.code == "too_large"
