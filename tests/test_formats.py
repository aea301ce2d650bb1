"""MetaImage, NRRD and NIfTI: as SimpleITK and nibabel read them, and refused where a header declares what cannot be there."""

import gzip
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from volssl import formats
from volssl.dicom import LPS_TO_RAS, Unreadable
from volssl.formats import read_file


def written(path, array_XYZ, grid, *, compress):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_XYZ.T))
    affine = LPS_TO_RAS @ grid.affine
    image.SetSpacing(grid.spacing_mm)
    image.SetDirection((affine[:3, :3] / np.array(grid.spacing_mm)).ravel())
    image.SetOrigin(affine[:3, 3])
    sitk.WriteImage(image, str(path), compress)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd", "x.nhdr"])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_as_simpleitk_reads_it(tmp_path, phantom, name, kind, compress):
    array = (phantom[0] % 100).astype(kind)
    path = written(tmp_path / name, array, phantom[1], compress=compress)
    volume = read_file(path)
    np.testing.assert_array_equal(volume.array_CXYZ[0], sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T)
    np.testing.assert_array_equal(volume.array_CXYZ[0], array)
    assert volume.grid.almost_equal(phantom[1], tolerance_mm=1e-3)


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_big_endian(tmp_path, phantom, name):
    path = written(tmp_path / name, phantom[0], phantom[1], compress=False)
    head, _, _ = path.read_bytes().partition(phantom[0].T.tobytes()[:8])
    for one, two in ((b"MSB = False", b"MSB = True"), (b"endian: little", b"endian: big")):
        head = head.replace(one, two)
    path.write_bytes(head + phantom[0].T.astype(">i2").tobytes())
    np.testing.assert_array_equal(read_file(path).array_CXYZ[0], phantom[0])


def test_nrrd_spaces_and_lists(tmp_path):
    data = np.arange(2 * 3 * 4 * 5, dtype="<i2")
    head = "NRRD0005\n# comment\ntype: int16\ndimension: 4\nspace: {}\nsizes: 2 3 4 5\nspace directions: none (1,0,0) (0,2,0) (0,0,3)\n"
    head += "kinds: list domain domain domain\nendian: little\nencoding: raw\nspace origin: (7,8,9)\nkey:=value\n\n"
    for space, signs in {"left-posterior-superior": (-1, -1, 1), "RAS": (1, 1, 1), "left-anterior-superior": (-1, 1, 1)}.items():
        (tmp_path / "x.nrrd").write_bytes(head.format(space).encode() + data.tobytes())
        volume = read_file(tmp_path / "x.nrrd")
        np.testing.assert_array_equal(volume.array_CXYZ, data.reshape(2, 3, 4, 5, order="F"))
        np.testing.assert_allclose(
            volume.grid.affine, np.diag([*signs, 1.0]) @ np.array([[1, 0, 0, 7], [0, 2, 0, 8], [0, 0, 3, 9], [0, 0, 0, 1.0]])
        )


def test_4d_meta_image_and_nifti_2(tmp_path, phantom):
    array, grid = phantom
    both = np.stack([array, array + 1], -1)
    image = sitk.GetImageFromArray(np.ascontiguousarray(both.T), isVector=False)
    sitk.WriteImage(image, str(tmp_path / "x.mha"), True)
    np.testing.assert_array_equal(read_file(tmp_path / "x.mha").array_CXYZ, np.moveaxis(both, -1, 0))
    nibabel.save(nibabel.Nifti2Image(array, grid.affine), tmp_path / "x.nii")
    np.testing.assert_array_equal(read_file(tmp_path / "x.nii").array_CXYZ[0], array)


def test_shifted_whole_numbers_stay_whole(tmp_path, phantom):
    image = nibabel.Nifti1Image((phantom[0] + 1024).astype(np.int16), phantom[1].affine)
    image.header.set_slope_inter(1, -1024)
    nibabel.save(image, tmp_path / "x.nii.gz")
    raw = bytearray(gzip.decompress((tmp_path / "x.nii.gz").read_bytes()))
    raw[352:] = (phantom[0] + 1024).astype("<i2").tobytes(order="F")
    raw[112:120] = np.array([1.0, -1024.0], dtype="<f4").tobytes()
    (tmp_path / "x.nii").write_bytes(raw)
    volume = read_file(tmp_path / "x.nii")
    assert volume.array_CXYZ.dtype == np.int16
    np.testing.assert_array_equal(volume.array_CXYZ[0], np.asanyarray(nibabel.load(tmp_path / "x.nii").dataobj))
    np.testing.assert_array_equal(volume.array_CXYZ[0], phantom[0])


def refused(path):
    with pytest.raises(Unreadable) as caught:
        read_file(path)
    return caught.value.code


@pytest.mark.parametrize("size", [20_000, 2_000_000_000])
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, phantom, size):
    """8 TB and 10^27 voxels, plain and packed."""
    path = written(tmp_path / "x.mha", *phantom, compress=True)
    path.write_bytes(path.read_bytes().replace(b"DimSize = 24 20 12", f"DimSize = {size} {size} {size}".encode()))
    assert refused(path) in ("too_large", "truncated")
    path = written(tmp_path / "x.nrrd", *phantom, compress=True)
    path.write_bytes(path.read_bytes().replace(b"sizes: 24 20 12", f"sizes: {size} {size} {size}".encode()))
    assert refused(path) in ("too_large", "truncated")
    image = nibabel.Nifti1Image(phantom[0], phantom[1].affine)
    raw = bytearray(image.to_bytes())
    raw[42:48] = np.array([min(size, 32767)] * 3, dtype="<i2").tobytes()
    (tmp_path / "x.nii").write_bytes(raw)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(raw))
    assert refused(tmp_path / "x.nii") in ("too_large", "truncated")
    assert refused(tmp_path / "x.nii.gz") in ("too_large", "truncated")


def test_what_unpacks_to_far_too_much_is_refused_unread(tmp_path, monkeypatch):
    """3 GB of zeros in 3 MB: its header is right, so only the ratio tells."""
    monkeypatch.setattr(formats.gzip, "open", lambda *args: pytest.fail("must not be unpacked"))
    head = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 1500 1500 1500\nspace: LPS\n"
    head += b"space directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: gzip\n\n"
    (tmp_path / "x.nrrd").write_bytes(head + bytes(3_400_000))
    assert refused(tmp_path / "x.nrrd") == "too_large"


def test_no_more_is_unpacked_than_declared(tmp_path, phantom):
    path = written(tmp_path / "x.mha", *phantom, compress=True)
    head = path.read_bytes().partition(b"LOCAL\n")[0]
    bomb = zlib.compress(phantom[0].T.tobytes() + bytes(50_000_000), 9)
    path.write_bytes(head + b"LOCAL\n" + bomb)
    np.testing.assert_array_equal(read_file(path).array_CXYZ[0], phantom[0])


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "%03d.raw 1 9 1", "LIST", "..", ""])
def test_pixels_lie_beside_their_header(tmp_path, phantom, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "secret").write_bytes(phantom[0].tobytes())
    path = written(tmp_path / "sub" / "x.mhd", *phantom, compress=False)
    path.write_bytes(path.read_bytes().replace(b"x.raw", name.encode()))
    assert refused(path) == "unsupported_format"


def test_missing_pixels(tmp_path, phantom):
    path = written(tmp_path / "x.mhd", *phantom, compress=False)
    (tmp_path / "x.raw").unlink()
    assert refused(path) == "missing"
