"""Series on disk: right order and place, and each damage with its own code."""

import numpy as np
import pydicom
import pytest
from faults import change, shift
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from volssl.dicom import Unreadable, header, is_dicom
from volssl.dicom_write import write_dicom_series
from volssl.pixels import read_series, same_pixels
from volssl.stacks import Limits, stacks_of
from volssl.volume import Grid

TAGS = {"PatientID": "Doe^Jane", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2", "BodyPartExamined": "CHEST"}


@pytest.fixture
def series(tmp_path, phantom):
    write_dicom_series(tmp_path, *phantom, tags=TAGS)
    return tmp_path


def reasons(folder) -> set[str]:
    stacks = stacks_of([header(path) for path in sorted(folder.iterdir())], same=same_pixels)
    return {code for stack in stacks for code in stack.reasons}


def test_series_reads_to_the_phantom_whatever_the_order_of_files(series, phantom):
    array, grid = phantom
    slices = [header(path) for path in sorted(series.iterdir(), reverse=True)]
    volume = read_series([slices[i] for i in np.random.default_rng(0).permutation(len(slices))])
    # The normal of the slices points the way of the third axis here, so the voxel order is the phantom's.
    assert volume.grid.almost_equal(grid, tolerance_mm=1e-5)
    assert volume.array_CXYZ.dtype == np.int16
    np.testing.assert_array_equal(volume.array_CXYZ[0], array)
    assert not reasons(series)


def test_header_tells_facts_and_whose_series_it_is(series):
    one = header(series / "IM00001.dcm")
    assert one.key == ("Doe^Jane", "2.25.1", "2.25.2")
    assert (one.modality, one.body_part, one.shape) == ("CT", "CHEST", (20, 24))
    assert one.pixels.values == (-1024, 3071)
    assert one.pixels.whole and one.pixels.plain
    assert is_dicom(one.path)


def files(series):
    return sorted(series.iterdir())


DAMAGES = {
    "missing_slice": lambda s: files(s)[5].unlink(),
    "duplicate_position": lambda s: change(files(s)[3], ImagePositionPatient=pydicom.dcmread(files(s)[4]).ImagePositionPatient),
    "uneven_gap": lambda s: shift(files(s)[6], along=0.5),
    "shifted_slice": lambda s: shift(files(s)[6], lateral=0.5),
    "gantry_tilt": lambda s: [shift(path, lateral=0.3 * i) for i, path in enumerate(files(s))],
    "mixed_orientation": lambda s: change(files(s)[2], ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
    "mixed_size": lambda s: change(files(s)[2], Rows=10),
    "mixed_spacing": lambda s: change(files(s)[2], PixelSpacing=[1, 1]),
    "too_few_slices": lambda s: [path.unlink() for path in files(s)[3:]],
    "no_geometry": lambda s: change(files(s)[2], ImagePositionPatient=None),
    "not_an_image": lambda s: change(files(s)[2], Rows=None),
    "rgb": lambda s: change(files(s)[2], SamplesPerPixel=3),
    "inverted_or_palette": lambda s: change(files(s)[2], PhotometricInterpretation="MONOCHROME1"),
    "multi_frame": lambda s: change(files(s)[2], NumberOfFrames=2),
    "localiser": lambda s: change(files(s)[2], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "not_hu": lambda s: change(files(s)[2], RescaleIntercept=None),
    "unsupported_modality": lambda s: change(files(s)[2], Modality="US"),
    "truncated": lambda s: files(s)[2].write_bytes(files(s)[2].read_bytes()[:-100]),
}


@pytest.mark.parametrize("code", DAMAGES)
def test_every_damage_has_its_code(series, code):
    DAMAGES[code](series)
    assert code in reasons(series)
    if code not in ("localiser", "too_few_slices"):
        with pytest.raises(Unreadable) as caught:
            read_series([header(path) for path in files(series)])
        assert caught.value.code != "undecodable"


@pytest.mark.parametrize("along", [0.05, -0.05])
def test_rounding_of_positions_is_no_gap(series, along):
    shift(files(series)[6], along=along)
    assert not reasons(series)


def test_min_slices_is_a_setting(series):
    slices = [header(path) for path in files(series)]
    assert stacks_of(slices, Limits(min_slices=13), same=same_pixels)[0].reasons == ("too_few_slices",)
    assert not stacks_of(slices, Limits(min_slices=12), same=same_pixels)[0].reasons


def test_slopes_that_are_fractions_and_differ_are_applied_slice_by_slice(series, phantom):
    for number, path in enumerate(files(series)):
        change(path, RescaleSlope=f"{0.5 + number / 8}", RescaleIntercept="-10.25", Modality="PT", RescaleType=None)
    volume = read_series([header(path) for path in files(series)])
    stored = phantom[0].astype(np.float32) + 1024
    np.testing.assert_allclose(volume.array_CXYZ[0], stored * (0.5 + np.arange(12) / 8) - 10.25, atol=1e-3)


def test_bytes_that_no_decoder_takes_are_an_error_without_noise(series, capfd):
    for path in files(series):
        data = pydicom.dcmread(path)
        data.PixelData = encapsulate([b"\xff\x4f\xff\x51 this is no image"])
        data.file_meta.TransferSyntaxUID = JPEG2000Lossless
        data["PixelData"].is_undefined_length = True
        data.save_as(path)
    with pytest.raises(Unreadable, match="cannot be decoded"):
        read_series([header(path) for path in files(series)])
    assert capfd.readouterr() == ("", "")


def test_a_header_that_is_none(tmp_path):
    (tmp_path / "x").write_bytes(b"\0" * 128 + b"DICM" + b"\x01\x02garbage" * 9)
    try:
        assert "not_an_image" in header(tmp_path / "x").faults
    except Unreadable as error:
        assert error.code == "undecodable"  # noqa: PT017 - either answer is right


def test_slices_in_a_patient_turned_head_first_come_out_in_ras(tmp_path, phantom):
    array, _ = phantom
    grid = Grid(array.shape, np.diag([-1.0, -1.0, 2.0, 1.0]))
    write_dicom_series(tmp_path, array, grid, tags=TAGS)
    volume = read_series([header(path) for path in files(tmp_path)]).reoriented("RAS")
    np.testing.assert_array_equal(volume.array_CXYZ[0], array[::-1, ::-1])


def test_compressed_twins_hold_identical_pixels(real_data):
    """JPEG 2000, JPEG lossless, JPEG-LS and RLE of one series."""
    folders = sorted(real_data.glob("other/dicom2nifti/generic/compressed_*/001"))
    stacks = []
    for folder in folders:
        slices = [header(path) for path in files(folder)]
        stacks.append(read_series(slices).array_CXYZ)
    assert len(stacks) == 4
    for stack in stacks[1:]:
        np.testing.assert_array_equal(stack, stacks[0])


def test_real_gantry_tilt_is_named(real_data):
    assert "gantry_tilt" in reasons(real_data / "other/dicom2nifti/failing/gantrytilting/001")
