"""Copies of a scan are found whatever their type and orientation; other scans are not taken for copies."""

import numpy as np
import pytest
from conftest import body_phantom, oblique_grid

from volssl.fingerprint import planes, print_of_stack, prints_of, twins
from volssl.volume import Grid, Volume


def pairs(*volumes, tolerance=1e-3):
    prints = [prints_of(volume) for volume in volumes]
    return sorted(set(twins([str(n) for n in range(len(volumes))], prints, tolerance=tolerance)))


def test_turned_scaled_and_rounded_copies_are_found():
    volume = Volume(body_phantom()[None], oblique_grid())
    turned = volume.reoriented("PIR")
    scaled = Volume(volume.array_CXYZ * np.float32(0.37) + 11, volume.grid)
    rounded = Volume(np.rint(scaled.array_CXYZ), volume.grid)
    joined = {name for pair in pairs(volume, turned, scaled, rounded) for name in pair}
    assert joined == {"0", "1", "2", "3"}


def test_other_noise_other_scan():
    one, two = (Volume(body_phantom(seed=seed)[None], oblique_grid()) for seed in (0, 1))
    assert pairs(one, two) == []
    assert pairs(one, two, tolerance=0.1) == [("0", "1")]


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "SAL", "ILP", "ARS", "LSA", "SPR"])
def test_four_slices_of_a_stack_are_those_of_the_whole(code):
    """Only four slices of a DICOM series are decoded; they must match a file in which any axis may be the slices'."""
    volume = Volume(body_phantom((17, 14, 11))[None], Grid((17, 14, 11), np.diag([1.0, 2.0, 3.0, 1.0])))
    turned = volume.reoriented(code)
    count = turned.grid.shape_vox[2]
    (one,) = print_of_stack(turned.grid, [turned.array_CXYZ[0, :, :, at] for at in planes(count)])
    (other,) = [found for found in prints_of(volume) if found.axis == one.axis]
    assert one.shape_vox == other.shape_vox == (17, 14, 11)
    np.testing.assert_allclose(one.means, other.means, atol=1e-6)


def test_planes_mirror_each_other():
    for count in range(1, 60):
        chosen = planes(count)
        assert sorted(count - 1 - at for at in chosen) == sorted(chosen) == list(chosen)
        assert chosen[0] >= 0 and chosen[-1] < count


def test_constant_volumes_have_no_print():
    assert prints_of(Volume(np.zeros((1, 9, 9, 9), dtype=np.int16), Grid((9, 9, 9), np.eye(4)))) == []


def test_many_scans_of_one_shape():
    rng = np.random.default_rng(0)
    grid = Grid((8, 8, 8), np.eye(4))
    volumes = [Volume(rng.integers(0, 1000, (1, 8, 8, 8)), grid) for _ in range(60)]
    copies = [Volume(volumes[n].array_CXYZ.astype(np.float32), grid) for n in (3, 41)]
    assert pairs(*volumes, *copies) == [("3", "60"), ("41", "61")]
