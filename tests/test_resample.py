"""Landmarks stay where they are, fine texture does not alias, and slabs are the whole to the bit."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from volssl.resample import resample, slabs
from volssl.volume import Grid, Volume


def blob(grid, centre_mm, sigma_mm=6.0):
    index_N3 = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_vox], indexing="ij"), -1).reshape(-1, 3)
    distance = np.linalg.norm(grid.world(index_N3) - centre_mm, axis=1)
    return np.exp(-0.5 * (distance / sigma_mm) ** 2).reshape(grid.shape_vox)


def centroid(volume):
    array = volume.array_CXYZ[0].astype(np.float64)
    index_N3 = np.argwhere(array > 1e-4)
    weight = array[tuple(index_N3.T)]
    return (volume.grid.world(index_N3) * weight[:, None]).sum(0) / weight.sum()


def oblique(shape=(48, 44, 30), spacing=(1.3, 1.5, 2.5), degrees=17.0, turned=(-1, -1, 1)):
    a = np.deg2rad(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ np.diag(turned) * np.array(spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2)
    return Grid(shape, affine)


@pytest.mark.parametrize("turned", [(-1, -1, 1), (1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (3.0, 2.0, 2.5)])
def test_landmarks_stay_within_a_tenth_of_a_millimetre(turned, spacing):
    grid, landmark = oblique(turned=turned), np.array([4.3, -3.1, 2.2])
    volume = Volume(blob(grid, landmark)[None].astype(np.float32), grid).reoriented("RAS")
    moved = resample(volume, volume.grid.resampled(spacing))
    np.testing.assert_allclose(moved.grid.spacing_mm, spacing)
    np.testing.assert_allclose(centroid(moved), landmark, atol=0.1)
    back = resample(moved, grid)
    assert back.grid.almost_equal(grid, tolerance_mm=0)
    np.testing.assert_allclose(centroid(back), landmark, atol=0.1)


def test_resampling_onto_the_same_grid_changes_nothing():
    grid = oblique((9, 8, 7))
    array = np.random.default_rng(0).integers(-900, 900, (2, 9, 8, 7)).astype(np.int16)
    for order in ("linear", "nearest"):
        again = resample(Volume(array, grid), grid, order=order)
        np.testing.assert_allclose(again.array_CXYZ, array, atol=1e-3)
    assert resample(Volume(array, grid), grid, order="nearest").array_CXYZ.dtype == np.int16


def test_linear_is_linear_and_outside_is_fill():
    grid = Grid((10, 10, 10), np.eye(4))
    ramp = Volume(np.arange(10, dtype=np.float32)[None, :, None, None] * np.ones((1, 10, 10, 10), dtype=np.float32), grid)
    fine = resample(ramp, Grid((19, 1, 1), np.diag([0.5, 1, 1, 1])))
    np.testing.assert_allclose(fine.array_CXYZ[0, :, 0, 0], np.arange(19) / 2, atol=1e-5)
    beyond = resample(ramp, Grid((4, 1, 1), np.array([[1, 0, 0, 8.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])), fill=-7.0)
    np.testing.assert_allclose(beyond.array_CXYZ[0, :, 0, 0], [8, 9, -7, -7])


def test_fine_stripes_do_not_alias():
    """Stripes of one voxel, seen at every third voxel, would keep their full contrast as broad false stripes."""
    grid = Grid((60, 8, 8), np.eye(4))
    stripes = np.where(np.arange(60) % 2, 100.0, -100.0)[None, :, None, None] * np.ones((1, 60, 8, 8))
    coarse = grid.resampled((3.0, 1.0, 1.0))
    smooth = resample(Volume(stripes.astype(np.float32), grid), coarse).array_CXYZ
    assert np.abs(stripes[0, 1::3, 0, 0]).min() == 100
    # sigma = sqrt(9 - 1) / 2.355 = 1.201 voxels leaves exp(-(pi sigma)^2 / 2) = 0.08 % of the finest wave; the border is reflected.
    assert np.abs(smooth[:, 2:-2]).max() < 1.0
    across = resample(Volume(stripes.astype(np.float32), grid), grid.resampled((1.0, 2.0, 1.0))).array_CXYZ
    np.testing.assert_allclose(np.abs(across), 100, atol=1e-3)  # smoothed along the coarser axis only


def test_nearest_makes_no_new_labels():
    grid = oblique((20, 18, 9))
    labels = np.random.default_rng(0).choice([0, 3, 7], (1, 20, 18, 9)).astype(np.uint8)
    moved = resample(Volume(labels, grid), grid.resampled((3, 3, 3)), order="nearest")
    assert set(np.unique(moved.array_CXYZ)) <= {0, 3, 7}


@pytest.mark.parametrize("code", ["RAS", "LPI", "SAR", "ASL"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 4.0), (1.3, 3.0, 2.5)])
def test_slabs_are_the_whole_to_the_bit(code, spacing):
    grid = oblique((31, 26, 23), (1.3, 1.7, 2.5))
    array = np.random.default_rng(0).integers(-900, 900, (2, 31, 26, 23)).astype(np.int16)
    volume = Volume(array.transpose(0, 3, 2, 1).copy().transpose(0, 3, 2, 1), grid).reoriented(code)
    target = volume.grid.resampled(spacing)
    whole = resample(volume, target).array_CXYZ
    for depth in (1, 3, 7):
        made = np.full(whole.shape, np.nan, np.float32)
        for part, slab in slabs(volume, target, depth=depth):
            made[:, *part] = slab
        np.testing.assert_array_equal(made, whole)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.7, 1.0), (4.0, 3.0, 3.0)])
def test_straight_axes_give_what_filter_and_simpleitk_give(spacing):
    """The same formula by other means: scipy's Gaussian, then SimpleITK's linear interpolation."""
    grid = Grid((33, 28, 21), np.diag([1.3, 1.7, 2.5, 1]))
    array = np.random.default_rng(0).normal(0, 300, grid.shape_vox).astype(np.float32)
    target = grid.resampled(spacing).cropped((-3, 0, 2), (20, 9, 12))
    smooth = array
    for axis, (old, new) in enumerate(zip(grid.spacing_mm, spacing, strict=True)):
        if new > old * 1.000001:
            sigma = np.sqrt((new / old) ** 2 - 1) / (2 * np.sqrt(2 * np.log(2)))
            smooth = ndimage.gaussian_filter1d(smooth, sigma, axis=axis, mode="nearest", truncate=3.0)
    image = sitk.GetImageFromArray(smooth.T)
    image.SetSpacing(grid.spacing_mm)
    reference = sitk.Image(target.shape_vox, sitk.sitkFloat32)
    reference.SetSpacing(target.spacing_mm)
    reference.SetOrigin(target.affine[:3, 3])
    want = sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), sitk.sitkLinear, -7.0)).T
    got = resample(Volume(array[None], grid), target, fill=-7.0).array_CXYZ[0]
    assert (got == -7).any()
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_planes_are_mended_before_they_are_resampled():
    grid = Grid((6, 6, 6), np.eye(4))
    volume = Volume(np.full((1, 6, 6, 6), 5.0, np.float32), grid)
    for _, slab in slabs(volume, grid.resampled((2, 2, 2)), mend=lambda plane: np.minimum(plane, 3, out=plane)):
        np.testing.assert_allclose(slab, 3, rtol=1e-6)
    assert (volume.array_CXYZ == 5).all()
