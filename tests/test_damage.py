"""Damage tried on one phantom series, each alone: the verdict, the codes, and where it is mended the volume that comes out."""

import os
import shutil

import numpy as np
import pydicom
import pytest
from conftest import body_phantom, oblique_grid
from faults import change, shift
from pydicom.uid import ImplicitVRLittleEndian

from volssl import archive, index
from volssl.dicom_write import write_dicom_series, write_enhanced_ct
from volssl.files import read_csv
from volssl.gates import Gates
from volssl.volume import Grid

TAGS = {"PatientID": "Doe^Jane", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}


def smooth(grid: Grid) -> np.ndarray:
    """HU of a body that is a smooth function of the place in the patient, so that any sampling of it can be told right from wrong."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_vox], indexing="ij"), -1).reshape(-1, 3)
    x, y, z = grid.world(at).T
    values = 400 * np.sin(x / 19) * np.cos(y / 23) + 300 * np.sin(z / 17 + 1) - 300
    return values.reshape(grid.shape_vox)


@pytest.fixture
def series(tmp_path):
    grid = oblique_grid((40, 36, 14), (1.5, 1.75, 3.0))
    folder = tmp_path / "archive" / "series"
    write_dicom_series(folder, smooth(grid), grid, tags=TAGS)
    return folder


def files(series):
    return sorted(series.iterdir())


def examined(series, **gates):
    """Rows, how they are read, and failures of an index of the folder above."""
    out = series.parent.parent / "index"
    index.build([series.parent], out=out, overwrite=out.exists(), gates=Gates(**gates))
    loaded = index.load(out)
    rows = sorted(loaded.rows, key=lambda row: -row.num_slices)
    return rows, [loaded.sources[row.scan_id] for row in rows], [row["reason"] for row in read_csv(out / "failures.csv")]


def only(series, **gates):
    rows, sources, failures = examined(series, **gates)
    assert len(rows) == 1
    assert not failures
    return rows[0], sources[0]


def agree(volume, *, within_hu, margin=2):
    """What was read is what the body holds at the places it claims, away from the border where nothing was measured."""
    inner = tuple(slice(margin, -margin) for _ in range(3))
    return np.abs(volume.array_CXYZ[0][inner] - smooth(volume.grid)[inner]).max() <= within_hu


def test_undamaged(series):
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs) == ("accept", (), ())
    assert agree(archive.read_source(source), within_hu=0.51)


@pytest.mark.parametrize("gone", [[6], [4, 5, 9]])
def test_missing_slices_are_rejected(series, gone):
    names = files(series)
    for number in gone:
        names[number].unlink()
    row, source = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("missing_slice",))
    with pytest.raises(archive.Unreadable) as caught:
        archive.read_source(source)
    assert caught.value.code == "missing_slice"


@pytest.mark.parametrize("degrees", [-20, 3, 20])
def test_tilt_is_unsheared(tmp_path, degrees):
    grid = oblique_grid((40, 60, 14), (1.5, 1.5, 3.0))
    sheared = np.array(grid.affine)
    sheared[:3, 2] += np.tan(np.deg2rad(degrees)) * 3.0 * sheared[:3, 1] / 1.5
    tilted = Grid(grid.shape_vox, sheared)
    series = tmp_path / "archive" / "series"
    write_dicom_series(series, smooth(tilted), tilted, tags=TAGS)
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs) == ("repair", ("gantry_tilt",), ("unshear",))
    volume = archive.read_source(source)
    assert volume.grid.shape_vox == row.shape_vox
    axes = volume.grid.affine[:3, :3] / np.array(volume.grid.spacing_mm)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(volume.grid.spacing_mm, (1.5, 1.5, 3.0), atol=1e-4)
    # Every voxel that was measured is where it belongs; the box is wider by the lean, and empty there.
    wanted, got = smooth(volume.grid), volume.array_CXYZ[0].astype(float)
    ends = tilted.voxels(volume.grid.world(np.stack(np.meshgrid(*[np.arange(n) for n in row.shape_vox], indexing="ij"), -1).reshape(-1, 3)))
    inside = ((ends > 1) & (ends < np.array(tilted.shape_vox) - 2)).all(1).reshape(row.shape_vox)
    assert inside.mean() > 0.5
    assert np.abs(got - wanted)[inside].max() < 2.5
    far = ((ends < -1) | (ends > np.array(tilted.shape_vox))).any(1).reshape(row.shape_vox)
    assert far.any() == (abs(degrees) == 20) or abs(degrees) == 3
    assert (got[far] == got.min()).all()
    with pytest.raises(archive.Unreadable) as caught:
        archive.read_image(series)  # without leave to mend it
    assert caught.value.code == "gantry_tilt"


def test_a_duplicate_of_equal_pixels_goes(series):
    shutil.copy(files(series)[5], series / "copy.dcm")
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs, row.num_slices) == ("repair", ("duplicate_position",), ("drop_duplicates",), 14)
    assert agree(archive.read_source(source), within_hu=0.51)


def test_a_duplicate_of_other_pixels_is_rejected(series):
    shutil.copy(files(series)[5], series / "copy.dcm")
    data = pydicom.dcmread(series / "copy.dcm")
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(series / "copy.dcm")
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("duplicate_position", "duplicates_differ"))


@pytest.mark.parametrize(
    "tag, ones, others, code",
    [
        ("AcquisitionNumber", 1, 2, "several_volumes"),
        ("TemporalPositionIdentifier", 1, 2, "several_volumes"),
        ("EchoTime", 1, 2, "several_volumes"),
        ("DiffusionBValue", 1, 2, "several_volumes"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "R"], "several_volumes"),
        ("ConvolutionKernel", "B30f", "B70f", "mixed_kernel"),
    ],
)
def test_two_volumes_at_one_place_are_told_apart(series, tag, ones, others, code):
    for number, path in enumerate(files(series)):
        change(path, **{tag: ones})
        data = pydicom.dcmread(path)
        data.PixelData = (np.frombuffer(data.PixelData, dtype=np.uint16) + 7).tobytes()
        data.SOPInstanceUID = f"2.25.77{number}"
        setattr(data, tag, others)
        data.save_as(series / f"again{number}.dcm")
    rows, sources, _ = examined(series)
    assert [(row.verdict, row.reasons, row.repairs) for row in rows] == [("repair", (code,), ("split",))] * 2
    assert len({row.scan_id for row in rows}) == 2
    assert len({row.patient_id for row in rows}) == 1
    one, two = (archive.read_source(source).array_CXYZ for source in sources)
    assert set(np.unique(one - two)) in ({7}, {-7})


def test_jitter_of_a_fifth_of_a_millimetre_is_drawn_by_position(series):
    grid = oblique_grid((40, 36, 14), (1.5, 1.75, 3.0))
    rng = np.random.default_rng(3)
    moved = [0.0, *rng.choice([-0.2, 0.2], 12), 0.0]
    normal = grid.affine[:3, 2] / 3.0
    for number, path in enumerate(files(series)):
        place = np.array(grid.affine)
        place[:3, 3] += place[:3, 2] * number + moved[number] * normal
        body = smooth(Grid((40, 36, 1), place))[:, :, 0]
        data = pydicom.dcmread(path)
        data.PixelData = (np.rint(body.T) + 1024).astype(np.uint16).tobytes()
        data.save_as(path)
        shift(path, along=moved[number])
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs) == ("repair", ("uneven_gap",), ("resample_positions",))
    volume = archive.read_source(source)
    assert volume.grid.almost_equal(grid, tolerance_mm=1e-3)
    assert agree(volume, within_hu=2.0)
    # Taken as even, it would be off by up to the slope times 0.2 mm.
    naive = np.stack([pydicom.dcmread(path).pixel_array.T - 1024.0 for path in files(series)], -1)
    assert np.abs(naive - smooth(grid)).max() > 2 * np.abs(volume.array_CXYZ[0] - smooth(grid))[2:-2, 2:-2, 2:-2].max()
    row, _ = only(series, position_mm=0.5)
    assert row.verdict == "accept"


def test_a_slice_moved_sideways_is_put_back(series):
    shift(files(series)[6], lateral=0.4)
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs) == ("repair", ("shifted_slice",), ("resample_positions",))
    volume = archive.read_source(source)
    assert not agree(volume, within_hu=3.0)  # the phantom's slice was not where it says, so it is now elsewhere
    assert volume.grid.shape_vox == (40, 37, 14)


def test_mixed_orientations(series):
    change(files(series)[6], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    rows, _, _ = examined(series)
    assert [(row.num_slices, row.verdict, row.reasons) for row in rows] == [
        (13, "reject", ("missing_slice", "mixed_orientation")),
        (1, "reject", ("mixed_orientation", "too_few_slices")),
    ]


def test_a_second_stack_of_another_orientation_and_size_is_a_row_of_its_own(series):
    other = Grid((36, 30, 12), np.diag([-2.0, -2.0, 4.0, 1.0]))
    write_dicom_series(series / "more", smooth(other), other, tags=TAGS)
    for path in (series / "more").iterdir():
        change(path, SOPInstanceUID=f"2.25.9{path.stem[2:]}")
    rows, sources, _ = examined(series)
    assert [(row.verdict, row.repairs, row.shape_vox) for row in rows] == [
        ("repair", ("split",), (40, 36, 14)),
        ("repair", ("split",), (36, 30, 12)),
    ]
    assert all("mixed_size" in row.reasons for row in rows)
    assert all(agree(archive.read_source(source), within_hu=0.51) for source in sources)


def test_two_slice_localiser(series):
    for path in files(series)[2:]:
        path.unlink()
    for path in files(series):
        change(path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("localiser", "too_few_slices"))


def test_truncated_file(series):
    files(series)[3].write_bytes(files(series)[3].read_bytes()[:-100])
    row, source = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("truncated",))
    with pytest.raises(archive.Unreadable):
        archive.read_source(source)


def test_wrong_transfer_syntax_of_pixels(series):
    """Plain pixels that are said to be run-length encoded."""
    for path in files(series):
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1))
    rows, sources, failures = examined(series)
    assert [(row.verdict, row.reasons) for row in rows] == [("reject", ("wrong_syntax",))] and not failures
    with pytest.raises(archive.Unreadable):
        archive.read_source(sources[0])


def test_wrong_transfer_syntax_of_the_header(series):
    """Explicit value types that are said to be implicit: the general parser sees it."""
    for path in files(series):
        data = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0", 1)
        path.write_bytes(data)
    assert ImplicitVRLittleEndian in pydicom.dcmread(files(series)[0]).file_meta.TransferSyntaxUID
    row, source = only(series)
    assert row.verdict == "accept"
    assert agree(archive.read_source(source), within_hu=0.51)


def test_nan(series):
    shutil.rmtree(series)
    series.mkdir()
    array = body_phantom().astype(np.float32)
    array[3, 4, 5] = np.nan
    archive.write_nifti(series / "nan.nii.gz", array, oblique_grid(), np.float32)
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("not_finite",))


def test_one_file_without_permission(series, monkeypatch):
    locked = files(series)[4]
    if os.geteuid() == 0:  # root may read everything
        opened = os.open

        def denied(path, *args, **kwargs):
            if str(path) == str(locked):
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", denied)
    else:
        locked.chmod(0)
    rows, _, failures = examined(series)
    assert failures == ["no_permission"]
    assert [(row.verdict, row.reasons) for row in rows] == [("reject", ("missing_slice",))]


def test_links_that_loop_and_links_to_files_seen_before(series):
    (series / "loop").symlink_to(series.parent)
    (series / "itself").symlink_to(series / "itself")
    (series / "again.dcm").symlink_to(files(series)[3])
    rows, _, failures = examined(series)
    assert [(row.verdict, row.num_slices) for row in rows] == [("accept", 14)]
    assert failures == ["missing"]  # the link to itself leads nowhere


def test_empty_file(series):
    (series / "IM99999.dcm").touch()
    rows, _, failures = examined(series)
    assert [row.verdict for row in rows] == ["accept"]
    assert failures == ["empty_file"]


def test_a_file_that_shrinks_between_index_and_reading(series):
    row, source = only(series)
    assert row.verdict == "accept"
    source.files[5].write_bytes(source.files[5].read_bytes()[:-200])
    with pytest.raises(archive.Unreadable) as caught:
        archive.read_source(source)
    assert caught.value.code == "truncated"


def test_a_file_that_shrinks_while_it_is_read(series, monkeypatch):
    """After its header and its size were looked at, before its pixels are."""
    row, source = only(series)
    assert row.verdict == "accept"
    read = os.pread
    pixels = 40 * 36 * 2
    monkeypatch.setattr(os, "pread", lambda handle, count, at: read(handle, count, at)[: count - 2 * (count == pixels)])
    with pytest.raises(archive.Unreadable) as caught:
        archive.read_source(source)
    assert caught.value.code == "truncated"


def test_unicode_and_very_long_paths(series):
    strange = series / "Größe ☢ 画像" / ("long" * 50) / ("path" * 50) / "\udcff not utf-8"
    strange.mkdir(parents=True)
    for path in files(series):
        if path.is_file():
            path.rename(strange / f"{path.stem}\u202e.x")
    row, source = only(series)
    assert row.verdict == "accept"
    assert agree(archive.read_source(source), within_hu=0.51)
    assert "utf-8" in (series.parent.parent / "index/private/sources.jsonl").read_text()


def test_a_path_beyond_what_the_system_opens_is_named(series, monkeypatch):
    deep = series
    for _ in range(3):
        deep = deep / ("d" * 200)
    deep.mkdir(parents=True)
    scan = os.scandir

    def refused(path):
        if str(path) == str(deep):
            raise OSError(36, "File name too long", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    rows, _, failures = examined(series)
    assert [row.verdict for row in rows] == ["accept"]
    assert failures == ["unreadable_folder"]


def test_enhanced_multi_frame_is_read_frame_by_frame(series):
    shutil.rmtree(series)
    grid = oblique_grid((40, 36, 14), (1.5, 1.75, 3.0))
    write_enhanced_ct(series / "enhanced", smooth(grid)[None], grid, tags=TAGS)
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs, row.num_slices) == ("repair", ("multi_frame",), ("read_frames",), 14)
    volume = archive.read_source(source)
    assert volume.grid.almost_equal(grid, tolerance_mm=1e-3)
    assert agree(volume, within_hu=0.51)
    assert archive.read_image(series / "enhanced").grid.almost_equal(grid, tolerance_mm=1e-3)
    (found,) = archive.find([series]).scans
    np.testing.assert_array_equal(archive.read(found).array_CXYZ, volume.array_CXYZ)


def test_enhanced_files_of_one_frame_each_make_a_volume(series):
    shutil.rmtree(series)
    grid = oblique_grid((40, 36, 14), (1.5, 1.75, 3.0))
    for number in range(14):
        affine = grid.affine.copy()
        affine[:3, 3] = grid.world(np.array([[0, 0, number]]))[0]
        tags = TAGS | {"SOPInstanceUID": f"2.25.77{number}"}
        write_enhanced_ct(series / f"{number}", smooth(grid)[None, :, :, number : number + 1], Grid((40, 36, 1), affine), tags=tags)
    row, source = only(series)
    assert (row.verdict, row.reasons, row.repairs, row.num_slices) == ("repair", ("multi_frame",), ("read_frames",), 14)
    for volume in (archive.read_source(source), archive.read_image(series)):
        assert volume.grid.almost_equal(grid, tolerance_mm=1e-3)
        assert agree(volume, within_hu=0.51)


def test_enhanced_multi_frame_of_several_time_points(series):
    shutil.rmtree(series)
    grid = oblique_grid((40, 36, 14), (1.5, 1.75, 3.0))
    write_enhanced_ct(series / "enhanced", np.stack([smooth(grid), smooth(grid) + 50]), grid, tags=TAGS)
    rows, sources, _ = examined(series)
    assert [(row.verdict, row.reasons) for row in rows] == [("repair", ("multi_frame", "several_volumes"))] * 2
    one, two = (archive.read_source(source).array_CXYZ for source in sources)
    assert set(np.unique(one - two)) in ({50}, {-50})


CODES = {
    "computed": {"ImageType": ["DERIVED", "PRIMARY", "MPR"]},
    "secondary": {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
    "secondary_capture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
    "burned_in_annotation": {"BurnedInAnnotation": "YES"},
    "not_hu": {"RescaleType": "US"},
    "inverted_or_palette": {"PhotometricInterpretation": "MONOCHROME1"},
    "unsupported_modality": {"Modality": "US"},
    "not_an_image": {"Modality": "SEG"},
    "modality_mismatch": {"Modality": "MR", "RescaleType": "HU"},
}


@pytest.mark.parametrize("code", CODES)
def test_what_is_no_scan_is_rejected_with_its_code(series, code):
    for path in files(series):
        change(path, **CODES[code])
    row, _ = only(series)
    assert row.verdict == "reject"
    assert code in row.reasons


@pytest.mark.parametrize("kind", ["RTSTRUCT", "SR", "SEG", "PR", "KO", "RTDOSE", "RTPLAN"])
def test_what_is_no_image_is_rejected_beside_a_scan(series, kind):
    """In the very series, as some archives hold it."""
    shutil.copy(files(series)[5], series / "other")
    change(series / "other", Modality=kind, SOPInstanceUID="2.25.99")
    rows, sources, _ = examined(series)
    assert [(row.modality, row.num_slices) for row in rows] == [("CT", 14), ("OTHER", 1)]
    assert [row.verdict for row in rows] == ["repair", "reject"]
    assert rows[0].reasons == ("mixed_modality",) and "not_an_image" in rows[1].reasons
    assert agree(archive.read_source(sources[0]), within_hu=0.51)


def test_colour_pictures_are_rejected(series):
    for path in files(series):
        data = pydicom.dcmread(path)
        data.PixelData = bytes(3 * 40 * 36)
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
        data.save_as(path)
    row, _ = only(series)
    assert row.verdict == "reject"
    assert "rgb" in row.reasons


def test_a_header_of_another_modality_than_the_values_is_not_believed(series):
    """A CT whose header says MR, with HU in it; and a CT that holds no air."""
    for path in files(series):
        change(path, Modality="MR", RescaleType=None)
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("modality_mismatch",))
    for path in files(series):
        data = pydicom.dcmread(path)
        data.Modality = "CT"
        data.PixelData = (np.frombuffer(data.PixelData, dtype=np.uint16) + 2048).tobytes()
        data.save_as(path)
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("modality_mismatch",))


def test_analyze_does_not_say_which_side_is_left(series):
    shutil.rmtree(series)
    series.mkdir()
    import nibabel

    nibabel.save(nibabel.AnalyzeImage(body_phantom().astype(np.int16), oblique_grid().affine), series / "old.hdr")
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("no_orientation",))


def test_a_ct_of_stored_values_from_zero_on_is_not_hu(series):
    for path in files(series):
        change(path, RescaleIntercept="0")
    row, _ = only(series)
    assert (row.verdict, row.reasons) == ("reject", ("not_hu",))


def test_4d_nifti_is_split(series):
    shutil.rmtree(series)
    series.mkdir()
    import nibabel

    grid = oblique_grid()
    both = np.stack([body_phantom(seed=1), body_phantom(seed=2)], -1)
    nibabel.save(nibabel.Nifti1Image(both, grid.affine), series / "two.nii.gz")
    rows, sources, _ = examined(series)
    assert [(row.verdict, row.reasons, row.repairs) for row in rows] == [("repair", ("several_volumes",), ("split",))] * 2
    assert len({row.patient_id for row in rows}) == 1
    for source in sources:
        np.testing.assert_array_equal(archive.read_source(source).array_CXYZ[0], both[..., source.part[0]])


def test_packed_archives_are_refused_by_name(series):
    kinds = "zip", "tar", "gztar", "bztar", "xztar"
    for kind in kinds:
        shutil.make_archive(str(series / f"scans_{kind}"), kind, series, "IM00001.dcm")
    rows, _, failures = examined(series)
    assert [row.verdict for row in rows] == ["accept"]
    assert failures == ["packed_archive"] * len(kinds)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_thousand_tiny_series(tmp_path):
    grid = Grid((4, 4, 2), np.diag([-1.0, -1.0, 2.0, 1.0]))
    first = tmp_path / "first"
    write_dicom_series(first, np.zeros((4, 4, 2)), grid, tags=TAGS | {"SeriesInstanceUID": "2.25.1000000"})
    templates = [path.read_bytes() for path in files(first)]
    for number in range(10_000):
        folder = tmp_path / "archive" / f"{number // 100}"
        folder.mkdir(parents=True, exist_ok=True)
        for place, template in enumerate(templates):
            (folder / f"{number}_{place}").write_bytes(template.replace(b"2.25.1000000", f"2.25.1{number:06}".encode()))
    index.build([tmp_path / "archive"], out=tmp_path / "index")
    rows = index.load(tmp_path / "index").rows
    assert len(rows) == 10_000
    assert {row.reasons for row in rows} == {("too_few_slices",)}
