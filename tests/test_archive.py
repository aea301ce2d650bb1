"""One phantom in every format is one volume; what cannot be read is an error with a code."""

import gzip
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from volssl import archive
from volssl.dicom_write import write_dicom_series
from volssl.files import BadInput
from volssl.volume import Grid

TAGS = {"PatientID": "Doe^Jane", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
LPS = np.diag([-1.0, -1.0, 1.0])


def write_itk(path, array_XYZ, grid):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_XYZ.T))
    image.SetSpacing(grid.spacing_mm)
    image.SetDirection((LPS @ grid.affine[:3, :3] / np.array(grid.spacing_mm)).ravel())
    image.SetOrigin(LPS @ grid.affine[:3, 3])
    sitk.WriteImage(image, str(path), True)


def write(folder, kind, phantom):
    array, grid = phantom
    if kind == "dicom":
        write_dicom_series(folder / "series", array, grid, tags=TAGS)
        return folder / "series"
    path = folder / f"scan{kind}"
    if kind.startswith(".nii"):
        archive.write_nifti(path, array, grid, np.int16)
    elif kind == ".hdr":
        nibabel.save(nibabel.Nifti1Pair(array, grid.affine), path.with_suffix(".img"))
    else:
        write_itk(path, array, grid)
    return path


FORMATS = [".nii", ".nii.gz", ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr", "dicom"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_reads_to_the_same_volume(tmp_path, phantom, kind):
    volume = archive.read_image(write(tmp_path, kind, phantom))
    np.testing.assert_array_equal(volume.array_CXYZ[0], phantom[0])
    assert volume.grid.almost_equal(phantom[1], tolerance_mm=1e-3)


@pytest.mark.parametrize("code", ["RAS", "LPI", "PIR", "SAL"])
@pytest.mark.parametrize("kind", [".nii.gz", ".nrrd"])
def test_turned_files_lie_at_the_same_place(tmp_path, phantom, code, kind):
    array, grid = phantom
    turned = archive.Volume(array[None], grid).reoriented(code)
    back = archive.read_image(write(tmp_path, kind, (turned.array_CXYZ[0], turned.grid))).reoriented(grid.orientation)
    np.testing.assert_array_equal(back.array_CXYZ[0], array)
    assert back.grid.almost_equal(grid, tolerance_mm=1e-3)


def test_one_dicom_file_stands_for_its_series(tmp_path, phantom):
    folder = write(tmp_path, "dicom", phantom)
    write_dicom_series(tmp_path / "two", *phantom, tags=TAGS | {"SeriesInstanceUID": "2.25.3"})
    for path in (tmp_path / "two").iterdir():
        path.rename(folder / f"second_{path.name}")
    assert archive.read_image(folder / "IM00003.dcm").array_CXYZ.shape == (1, 24, 20, 12)
    with pytest.raises(BadInput, match="one DICOM series; found 2"):
        archive.read_image(folder)


def test_find_accounts_for_every_file(tmp_path, phantom):
    folder = write(tmp_path, "dicom", phantom)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"no_extension_{number}")
    for kind in (".mhd", ".nii.gz"):
        write(tmp_path, kind, phantom)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "notes.txt").write_text("hello")
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "brain.mgz").write_bytes(b"1234")
    (tmp_path / "broken.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    found = archive.find([tmp_path, tmp_path / "deep"])
    assert sorted((scan.kind, len(scan.files)) for scan in found.scans) == [("dicom", 12), ("file", 1), ("file", 1)]
    assert {path.name: code for path, code in found.ignored.items()} == {"notes.txt": "not_an_image", "scan.zraw": "companion"}
    want = {"empty.nii.gz": "empty_file", "brain.mgz": "unsupported_format", "broken.nii": "missing"}
    assert {path.name: code for path, code in found.unreadable.items()} == want


def test_find_needs_paths_that_exist(tmp_path):
    with pytest.raises(BadInput, match="must exist"):
        archive.find([tmp_path / "nowhere"])


def test_a_file_that_may_not_be_read(tmp_path, phantom, monkeypatch):
    path = write(tmp_path, ".nii.gz", phantom)
    if os.geteuid() == 0:  # root may read everything

        def denied(*args, **kwargs):
            raise PermissionError

        monkeypatch.setattr(nibabel, "load", denied)
    else:
        path.chmod(0)
    with pytest.raises(archive.Unreadable) as caught:
        archive.read_image(path)
    assert caught.value.code == "no_permission"


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"])
def test_truncated_files_are_errors_without_noise(tmp_path, phantom, kind, capfd):
    path = write(tmp_path, kind, phantom)
    data = {".mhd": tmp_path / "scan.zraw", ".nhdr": tmp_path / "scan.raw.gz"}.get(kind, path)
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(archive.Unreadable) as caught:
        archive.read_image(path)
    assert caught.value.code in ("truncated", "undecodable")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(tmp_path, phantom, bad):
    array = phantom[0].astype(np.float32)
    array[3, 4, 5:7] = bad
    archive.write_nifti(tmp_path / "x.nii.gz", array, phantom[1], np.float32)
    with pytest.raises(BadInput, match="found 2 of 5760 voxels"):
        archive.read_image(tmp_path / "x.nii.gz")


def test_geometry_that_is_unknown_or_sheared_is_refused(tmp_path, phantom):
    array, grid = phantom
    image = nibabel.Nifti1Image(array, None)
    nibabel.save(image, tmp_path / "none.nii.gz")
    sheared = np.array(grid.affine)
    sheared[:3, 2] += 0.2 * sheared[:3, 0]
    nibabel.save(nibabel.Nifti1Image(array, sheared), tmp_path / "sheared.nii.gz")
    (tmp_path / "raw.nrrd").write_bytes(b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n" + bytes(8))
    for name, code in {"none.nii.gz": "no_orientation", "sheared.nii.gz": "sheared", "raw.nrrd": "no_orientation"}.items():
        with pytest.raises(archive.Unreadable) as caught:
            archive.read_image(tmp_path / name)
        assert caught.value.code == code


def test_fourth_axis_becomes_channels_and_trailing_ones_go(tmp_path, phantom):
    array, grid = phantom
    nibabel.save(nibabel.Nifti1Image(np.stack([array, array + 1], -1), grid.affine), tmp_path / "two.nii.gz")
    nibabel.save(nibabel.Nifti1Image(array[..., None, None], grid.affine), tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(archive.read_image(tmp_path / "two.nii.gz").array_CXYZ, np.stack([array, array + 1]))
    assert archive.read_image(tmp_path / "one.nii.gz").array_CXYZ.shape == (1, 24, 20, 12)


def test_scaled_nifti_gives_scaled_values(tmp_path, phantom):
    image = nibabel.Nifti1Image(phantom[0], phantom[1].affine)
    image.header.set_slope_inter(0.5, -1024)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    header = nibabel.load(tmp_path / "scaled.nii.gz")
    want = np.asanyarray(header.dataobj)
    got = archive.read_image(tmp_path / "scaled.nii.gz").array_CXYZ
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_labels_are_whole_numbers_whatever_their_type(tmp_path, phantom):
    grid = phantom[1]
    labels = np.random.default_rng(0).integers(0, 4, grid.shape_vox)
    for dtype in (np.uint8, np.int16, np.float32):
        archive.write_nifti(tmp_path / "label.nii.gz", labels, grid, dtype)
        read = archive.read_label(tmp_path / "label.nii.gz").array_CXYZ
        assert np.issubdtype(read.dtype, np.integer)
        np.testing.assert_array_equal(read[0], labels)
    archive.write_nifti(tmp_path / "half.nii.gz", labels / 2, grid, np.float32)
    with pytest.raises(BadInput, match="whole numbers"):
        archive.read_label(tmp_path / "half.nii.gz")


def test_written_nifti_is_the_same_bytes_every_time_and_names_nothing(tmp_path, phantom):
    array, grid = phantom
    for name in ("somebody.nii.gz", "other.nii.gz"):
        archive.write_nifti(tmp_path / name, array, grid, np.int16)
    one, two = (gzip.decompress((tmp_path / name).read_bytes()) for name in ("somebody.nii.gz", "other.nii.gz"))
    assert one == two
    assert b"somebody" not in (tmp_path / "somebody.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.nii.gz", "somebody.nii.gz"]


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(BadInput, match="must exist"):
        archive.read_image(tmp_path / "nothing.nii.gz")
    (tmp_path / "text").write_text("no image")
    with pytest.raises(BadInput, match="must be DICOM or one of"):
        archive.read_image(tmp_path / "text")
    with pytest.raises(BadInput, match="found 0"):
        archive.read_image(tmp_path)


def test_derived_formats_of_one_real_scan_are_one_volume(real_data):
    folder = real_data / "other/derived_formats"
    reference = archive.read_image(folder / "ct_mha.mha").reoriented("RAS")
    names = "ct_4d_singleton.nii.gz ct_int32.nii.gz ct_mhd_raw.mhd ct_mhd_zraw.mhd ct_nhdr.nhdr ct_nrrd_gzip.nrrd ct_qform_only.nii.gz "
    for name in (names + "ct_reoriented_LPI.nii.gz ct_reoriented_PIR.nii.gz ct_sform_only.nii.gz").split():
        volume = archive.read_image(folder / name).reoriented("RAS")
        assert volume.grid.almost_equal(reference.grid, tolerance_mm=1e-2), name
        np.testing.assert_array_equal(volume.array_CXYZ, reference.array_CXYZ, err_msg=name)


def test_real_oblique_dicom_agrees_with_simpleitk(real_data):
    """Voxel positions and values of our reading are those of SimpleITK's own series reader, where that can be trusted."""
    folder = real_data / "brain_mr/studyforrest_T1w_dicom"
    series = [scan for scan in archive.find([folder]).scans if scan.kind == "dicom"]
    volume = archive.read(series[0])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    for index in [(0, 0, 0), (100, 50, 3), (17, 200, 30)]:
        world = LPS @ image.TransformIndexToPhysicalPoint(index)
        there = np.rint(volume.grid.voxels(world[None])[0]).astype(int)
        np.testing.assert_allclose(volume.grid.world(there[None])[0], world, atol=0.02)
        assert volume.array_CXYZ[0][tuple(there)] == image[index]


def test_grid_of_written_nifti_comes_back(tmp_path):
    grid = Grid((4, 5, 6), np.diag([-2.0, 3.0, 0.5, 1.0]))
    archive.write_nifti(tmp_path / "x.nii", np.zeros((4, 5, 6)), grid, np.uint8)
    assert archive.read_image(tmp_path / "x.nii").grid.almost_equal(grid, tolerance_mm=1e-4)
