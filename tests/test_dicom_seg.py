"""DICOM SEG: read back with highdicom, its voxels lie where SimpleITK and pydicom say that the series' voxels lie."""

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.sr.codedict import codes

from volssl.archive import Unreadable, find, read_source
from volssl.dicom_seg import CODES, Maker, coded, write_dicom_seg
from volssl.dicom_write import uid, write_dicom_series, write_enhanced_ct
from volssl.examine import examine_series
from volssl.inputs import GATES
from volssl.volume import Grid

MAKER = Maker({"liver": 5, "odd thing": 2}, "0123456789abcdef")
TAGS = {"PatientID": "X1", "PatientName": "Doe^Jane", "StudyInstanceUID": uid("study"), "SeriesInstanceUID": uid("series")}
TAGS |= {"FrameOfReferenceUID": uid("frame"), "SeriesNumber": 3}


def grid(order=(0, 1, 2), signs=(-1, -1, 1), degrees=0.0, shape=(20, 16, 9)):
    """A grid with its axes along the world axes `order`, turned about the patient's left-right axis."""
    a = np.deg2rad(degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    axes = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        axes[world, axis] = sign * (0.8, 0.9, 2.5)[axis]
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes
    affine[:3, 3] = (31, 12, -55)
    return Grid(shape, affine)


GRIDS = {
    "axial": grid(),
    "oblique": grid(degrees=23),
    "sagittal": grid((1, 2, 0), (-1, -1, 1)),
    "coronal": grid((0, 2, 1), (-1, -1, 1)),
    "feet first, mirrored": grid(signs=(1, -1, -1)),
}


def series_of(folder):
    (found,) = find([folder]).scans
    (facts,) = examine_series(GATES, list(found.slices))
    return facts.source


def label_map(shape):
    """One block per label; the second lies in the patient's left, at another height."""
    label = np.zeros(shape, np.uint8)
    label[2:5, 3:9, 4:7] = 5
    label[12:17, 1:3, 5:6] = 2
    return label


def written(path):
    """Segment name -> world LPS positions of its voxels, sorted, as highdicom reads them."""
    seg = highdicom.seg.segread(path)
    volume = seg.get_volume(combine_segments=True, relabel=False)
    places = {}
    for description in seg.SegmentSequence:
        voxels = np.argwhere(volume.array == description.SegmentNumber)
        places[description.SegmentLabel] = _sorted(volume.map_indices_to_reference(voxels))
    return seg, places


def _sorted(mm_N3):
    mm_N3 = np.round(mm_N3, 2) + 0.0
    return mm_N3[np.lexsort(mm_N3.T)]


@pytest.mark.parametrize("where", GRIDS.values(), ids=GRIDS)
def test_segments_lie_where_the_labels_lie(tmp_path, where):
    hu = np.random.default_rng(0).integers(-900, 900, where.shape_vox)
    write_dicom_series(tmp_path / "series", hu, where, tags=TAGS)
    files = sorted((tmp_path / "series").iterdir())
    for number, file in enumerate(files):  # names that say nothing of the order
        file.rename(file.with_name(f"{(7 * number) % len(files)}.dcm"))
    source = series_of(tmp_path / "series")
    volume = read_source(source)
    label = label_map(volume.array_CXYZ.shape[1:])
    write_dicom_seg(tmp_path / "seg.dcm", label, source=source, maker=MAKER)
    _, places = written(tmp_path / "seg.dcm")
    # SimpleITK tells where the series' voxels lie; our own grid has no say.
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    image = reader.Execute()
    theirs = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    ours = volume.array_CXYZ[0]
    flipped = not np.array_equal(theirs, ours)
    assert np.array_equal(theirs[..., ::-1] if flipped else theirs, ours)
    for name, value in MAKER.labels.items():
        voxels = np.argwhere((label[..., ::-1] if flipped else label) == value)
        expected = [image.TransformIndexToPhysicalPoint([int(n) for n in voxel]) for voxel in voxels]
        np.testing.assert_allclose(places[name], _sorted(np.array(expected)), atol=0.02)


def test_left_is_left(tmp_path):
    """In an axial head-first series the patient's left is at large LPS x, and in columns to the right."""
    where = grid()
    write_dicom_series(tmp_path / "series", np.zeros(where.shape_vox), where, tags=TAGS)
    label = np.zeros(where.shape_vox, np.uint8)
    label[-1, 0, 0] = 5
    write_dicom_seg(tmp_path / "seg.dcm", label, source=series_of(tmp_path / "series"), maker=MAKER)
    _, places = written(tmp_path / "seg.dcm")
    np.testing.assert_allclose(places["liver"], [[-31 + 19 * 0.8, -12, -55]], atol=1e-3)


def test_what_the_file_refers_to_and_says(tmp_path):
    where = grid()
    write_dicom_series(tmp_path / "series", np.zeros(where.shape_vox), where, tags=TAGS)
    write_dicom_seg(tmp_path / "seg.dcm", label_map(where.shape_vox), source=series_of(tmp_path / "series"), maker=MAKER)
    seg, _ = written(tmp_path / "seg.dcm")
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == TAGS[keyword]
    assert seg.SeriesInstanceUID != TAGS["SeriesInstanceUID"]
    (referred,) = seg.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == TAGS["SeriesInstanceUID"]
    slices = {pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / "series").iterdir()}
    assert {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence} == slices
    # Each frame comes from the one slice in whose plane it lies.
    at = {data.SOPInstanceUID: data.ImagePositionPatient for data in map(pydicom.dcmread, (tmp_path / "series").iterdir())}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (derived,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert frame.PlanePositionSequence[0].ImagePositionPatient == at[derived.ReferencedSOPInstanceUID]
    odd, liver = seg.SegmentSequence
    assert (liver.SegmentLabel, liver.SegmentedPropertyTypeCodeSequence[0].CodeValue) == ("liver", "10200004")
    assert odd.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99VOLSSL"
    assert odd.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "odd thing"
    assert (liver.SegmentAlgorithmType, liver.SegmentAlgorithmName[:6]) == ("AUTOMATIC", "volssl")


def test_codes_are_those_of_the_dictionary():
    known = {(code.value, code.meaning) for code in (getattr(codes.SCT, name) for name in codes.SCT.dir())}
    assert {code for pair in CODES.values() for code in pair} <= known
    assert coded("Liver_Tumour", 2)[1][0] == "108369006"


def test_one_plane_or_no_voxel_at_all(tmp_path):
    where = grid()
    write_dicom_series(tmp_path / "series", np.zeros(where.shape_vox), where, tags=TAGS)
    source = series_of(tmp_path / "series")
    label = np.zeros(where.shape_vox, np.uint8)
    write_dicom_seg(tmp_path / "none.dcm", label, source=source, maker=MAKER)
    assert not highdicom.seg.segread(tmp_path / "none.dcm").pixel_array.any()
    label[3, 4, 5] = 2
    write_dicom_seg(tmp_path / "one.dcm", label, source=source, maker=MAKER)
    _, places = written(tmp_path / "one.dcm")
    np.testing.assert_allclose(places["odd thing"], [[-31 + 3 * 0.8, -12 + 4 * 0.9, -55 + 5 * 2.5]], atol=1e-3)


def test_a_multi_frame_file(tmp_path):
    where = grid(degrees=10)
    hu = np.random.default_rng(0).integers(-900, 900, (1, *where.shape_vox))
    write_enhanced_ct(tmp_path / "in" / "frames.dcm", hu, where, tags=TAGS | {"InstanceNumber": 1})
    source = series_of(tmp_path / "in")
    assert source.repairs == ("read_frames",)
    volume = read_source(source)
    label = label_map(volume.array_CXYZ.shape[1:])
    write_dicom_seg(tmp_path / "seg.dcm", label, source=source, maker=MAKER)
    _, places = written(tmp_path / "seg.dcm")
    for name, value in MAKER.labels.items():
        world = volume.grid.world(np.argwhere(label == value)) * [-1, -1, 1]
        np.testing.assert_allclose(places[name], _sorted(world), atol=0.02)


def test_a_series_moved_onto_another_grid_is_refused(tmp_path):
    where = grid()
    write_dicom_series(tmp_path / "series", np.zeros(where.shape_vox), where, tags=TAGS)
    for file in (tmp_path / "series").iterdir():
        data = pydicom.dcmread(file)
        data.ImagePositionPatient[1] += 0.3 * data.ImagePositionPatient[2]  # the gantry was tilted
        data.save_as(file)
    source = series_of(tmp_path / "series")
    assert source.repairs == ("unshear",)
    with pytest.raises(Unreadable, match="unshear.*--format nifti"):
        write_dicom_seg(tmp_path / "seg.dcm", read_source(source).array_CXYZ[0].astype(np.uint8), source=source, maker=MAKER)
    assert not (tmp_path / "seg.dcm").exists()


def test_equal_duplicates_are_left_out(tmp_path):
    where = grid()
    write_dicom_series(tmp_path / "series", np.zeros(where.shape_vox), where, tags=TAGS)
    file = sorted((tmp_path / "series").iterdir())[4]
    data = pydicom.dcmread(file)
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid("copy")
    data.save_as(file.with_name("copy.dcm"))
    source = series_of(tmp_path / "series")
    assert source.repairs == ("drop_duplicates",)
    write_dicom_seg(tmp_path / "seg.dcm", label_map(where.shape_vox), source=source, maker=MAKER)
    _, places = written(tmp_path / "seg.dcm")
    assert len(places["liver"]) == 3 * 6 * 3


def test_a_series_without_a_frame_of_reference_is_refused_without_a_word_of_its_header(tmp_path):
    where = grid()
    write_dicom_series(tmp_path / "series", np.zeros(where.shape_vox), where, tags={**TAGS, "FrameOfReferenceUID": ""})
    with pytest.raises(Unreadable, match="FrameOfReferenceUID") as caught:
        write_dicom_seg(tmp_path / "seg.dcm", label_map(where.shape_vox), source=series_of(tmp_path / "series"), maker=MAKER)
    assert "Doe" not in str(caught.value)


def test_real_series(real_data, tmp_path):
    """What an archive holds, not what we wrote ourselves; one of the two was stripped of what a SEG must refer to."""
    source = series_of(real_data / "abdomen_ct" / "KiTS-00072_dicom")
    volume = read_source(source)
    bright = (volume.array_CXYZ[0] > 300).astype(np.uint8)
    write_dicom_seg(tmp_path / "seg.dcm", bright, source=source, maker=Maker({"bone": 1}, "x"))
    _, places = written(tmp_path / "seg.dcm")
    world = volume.grid.world(np.argwhere(bright)) * [-1, -1, 1]
    assert len(places["bone"]) == len(world) > 1000
    np.testing.assert_allclose(places["bone"].mean(0), world.mean(0), atol=0.05)
    source = series_of(real_data / "abdomen_ct" / "TotalSegmentator_example_ct_dicom")
    label = np.zeros(read_source(source).grid.shape_vox, np.uint8)
    with pytest.raises(Unreadable, match="must have SeriesInstanceUID, StudyInstanceUID in each"):
        write_dicom_seg(tmp_path / "stripped.dcm", label, source=source, maker=Maker({"bone": 1}, "x"))
