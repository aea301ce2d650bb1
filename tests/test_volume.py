"""Facts and round trips of pure geometry."""

from itertools import permutations, product

import numpy as np
import pytest

from volssl.volume import Grid, Volume


def oblique(shape=(7, 9, 5), spacing=(0.7, 0.8, 2.5)) -> Grid:
    a, b = np.deg2rad(20), np.deg2rad(-15)
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn_z @ turn_x * np.array(spacing)
    affine[:3, 3] = (-11, 23, 5)
    return Grid(shape, affine)


ALL_CODES = ["".join(code) for axes in permutations(("LR", "PA", "IS")) for code in product(*axes)]


def test_facts_of_an_lps_grid():
    grid = Grid((4, 5, 6), np.diag([-2.0, -3.0, 4.0, 1.0]))
    assert grid.orientation == "LPS"
    assert grid.spacing_mm == (2, 3, 4)
    np.testing.assert_allclose(grid.world(np.array([[1, 1, 1]])), [[-2, -3, 4]])
    np.testing.assert_allclose(grid.reoriented("RAS").affine[:3, 3], [-6, -12, 0])


def test_world_and_voxels_undo_each_other():
    grid, points = oblique(), np.random.default_rng(0).normal(size=(20, 3)) * 30
    np.testing.assert_allclose(grid.voxels(grid.world(points)), points, atol=1e-9)


@pytest.mark.parametrize("code", ALL_CODES)
def test_every_orientation_keeps_every_voxel_where_it_is(code):
    grid = oblique()
    volume = Volume(np.random.default_rng(1).integers(-999, 999, (2, *grid.shape_vox)), grid)
    turned = volume.reoriented(code)
    assert turned.grid.orientation == code
    index = np.array([[1, 2, 3], [6, 8, 4], [0, 0, 0]])
    there = np.rint(turned.grid.voxels(grid.world(index))).astype(int)
    np.testing.assert_array_equal(volume.array_CXYZ[:, *index.T], turned.array_CXYZ[:, *there.T])
    back = turned.reoriented(grid.orientation)
    np.testing.assert_array_equal(back.array_CXYZ, volume.array_CXYZ)
    assert back.grid.almost_equal(grid, tolerance_mm=1e-9)


def test_crop_keeps_world_positions():
    grid = oblique()
    part = Volume(np.arange(315).reshape(1, 7, 9, 5), grid).cropped((1, 2, 1), (5, 8, 4))
    assert part.array_CXYZ.shape == (1, 4, 6, 3)
    np.testing.assert_allclose(part.grid.world(np.array([[0, 0, 0]])), grid.world(np.array([[1, 2, 1]])))
    with pytest.raises(ValueError, match="must lie within"):
        Volume(np.zeros((1, 7, 9, 5)), grid).cropped((0, 0, 0), (8, 9, 5))


def test_resampled_grid_keeps_centre_and_extent():
    grid = oblique((40, 30, 12))
    new = grid.resampled((1.0, 1.0, 1.0))
    np.testing.assert_allclose(new.spacing_mm, 1)
    assert new.shape_vox == (28, 24, 30)
    middle = lambda g: g.world(np.array([(np.array(g.shape_vox) - 1) / 2]))  # noqa: E731
    np.testing.assert_allclose(middle(new), middle(grid), atol=1e-9)
    assert new.orientation == grid.orientation


def test_almost_equal_looks_at_corners_and_shape():
    grid = oblique()
    moved = np.array(grid.affine)
    moved[0, 3] += 0.05
    assert grid.almost_equal(Grid(grid.shape_vox, moved), tolerance_mm=0.06)
    assert not grid.almost_equal(Grid(grid.shape_vox, moved), tolerance_mm=0.04)
    assert not grid.almost_equal(Grid((7, 9, 6), grid.affine))


@pytest.mark.parametrize(
    ("shape", "affine"), [((0, 2, 2), np.eye(4)), ((2, 2, 2), np.diag([1, 1, 0, 1])), ((2, 2, 2), np.full((4, 4), np.nan))]
)
def test_impossible_grids_are_refused(shape, affine):
    with pytest.raises(ValueError, match="Grid"):
        Grid(shape, affine)


def test_unknown_orientation_is_refused():
    with pytest.raises(ValueError, match="each of L/R"):
        oblique().reoriented("RRS")
