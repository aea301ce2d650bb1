"""Which patches of a scan are looked at: within the body, enough of it in each, and what lies beyond the scan is air."""

import numpy as np
import pytest

from volssl.encode import patches_of
from volssl.scans import Scan, _box
from volssl.volume import Grid


def scan(array_XYZ, start, stop, key="a"):
    array = array_XYZ[None].astype(np.float32)
    grid = Grid(array_XYZ.shape, np.eye(4))
    return Scan("S", "P", "", grid, start, stop, (0.0, 1.0), lambda first, size: _box(array, first, size), key)


def test_a_grid_covers_the_body_and_leaves_out_air():
    array = np.zeros((40, 20, 20))
    array[4:22] = 0.5
    found = list(patches_of(scan(array, (4, 2, 2), (30, 18, 18)), (8, 8, 8), drawn=0, seed=0))
    # Along X windows begin at 4, 12, 20 and, to end with the body, 22: the one at 20 holds a fourth of body, the last none.
    assert sorted({patch.corner[0] for patch in found}) == [4, 12, 20]
    assert sorted({patch.corner[1:] for patch in found}) == [(2, 2), (2, 10), (10, 2), (10, 10)]
    assert {patch.corner[0]: patch.body_share for patch in found} == {4: 1.0, 12: 1.0, 20: 0.25}


def test_of_a_thin_body_the_patch_with_most_stays():
    array = np.zeros((32, 8, 8))
    array[9] = 1
    (patch,) = patches_of(scan(array, (0, 0, 0), (32, 8, 8)), (8, 8, 8), drawn=0, seed=0)
    assert patch.corner == (8, 0, 0) and patch.body_share == pytest.approx(1 / 8)


@pytest.mark.parametrize("drawn", [0, 2])
def test_a_body_narrower_than_the_patch_lies_in_its_middle(drawn):
    array = np.ones((6, 5, 12))
    for patch in patches_of(scan(array, (1, 0, 0), (5, 5, 12)), (8, 8, 8), drawn=drawn, seed=0):
        assert patch.corner[:2] == (-1, -1)  # 4 and 5 voxels in 8: two before, and one of three
        np.testing.assert_array_equal(patch.box_CXYZ[0, :, 0], 0)
        assert patch.box_CXYZ.sum() == 6 * 5 * 8


def test_draws_are_of_the_scan_and_the_seed_alone():
    array = np.ones((30, 30, 30))

    def corners(key, seed, number=3):
        return [patch.corner for patch in patches_of(scan(array, (0, 0, 0), (30, 30, 30), key), (8, 8, 8), drawn=number, seed=seed)]

    assert corners("a", 0) == corners("a", 0, 5)[:3]
    assert corners("a", 0) != corners("b", 0) and corners("a", 0) != corners("a", 1)
