"""The body is found, padding is no body, and a scan's values become stored ones."""

import numpy as np
import pytest

from volssl.body import Body, Intensity, body_box, find_body, padding_of, scaling_of, with_margin, without_padding
from volssl.volume import Grid, Volume


def cylinder(padding, shape=(60, 60, 12)):
    """Noisy air with a body in it, seen through a round field of view; outside of it stands `padding`."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:2]], indexing="ij")
    array = np.where((x**2 + y**2 < 0.3)[..., None], 0, -990) + rng.integers(-12, 13, shape)
    array[(x**2 + y**2) > 0.9] = padding
    return Volume(array[None].astype(np.int16), Grid(shape, np.eye(4)))


def test_body_box_is_that_of_the_largest_part():
    array = np.full((40, 30, 20), -1000)
    array[5:25, 6:26, 3:17] = 40
    array[34:38, 3:6, 2:5] = 500
    assert body_box(array, threshold=-500) == ((5, 6, 3), (25, 26, 17))
    start, stop = body_box(array, threshold=-500, stride=(2, 2, 1))
    assert all(0 <= a - b <= 2 for a, b in zip((5, 6, 3), start, strict=True))
    assert all(0 <= b - a <= 2 for a, b in zip((25, 26, 17), stop, strict=True))
    assert body_box(array, threshold=3000) is None


@pytest.mark.parametrize("padding", [-3024, -2000, -1024, 0, 3071])
def test_padding_outside_of_the_field_of_view_is_recognised(padding):
    volume = cylinder(padding)
    assert padding_of(volume) == padding
    plain = find_body(cylinder(-1000), Body(threshold=-500))
    found = find_body(volume, Body(threshold=-500), padding=padding)
    assert found == plain
    assert find_body(volume, Body(threshold=-500)).stop == ((60, 60, 12) if padding > -500 else plain.stop)


def test_what_was_measured_is_no_padding():
    volume = cylinder(-1000)
    array = volume.array_CXYZ.copy()
    array[0, 0, 0, 0] += 1
    assert padding_of(Volume(array, volume.grid)) is None
    noise = np.random.default_rng(0).integers(-9, 9, (1, 30, 30, 30))
    noise[0, ::29, ::29, ::29] = 4  # eight corners alone
    assert padding_of(Volume(noise, Grid((30, 30, 30), np.eye(4)))) in (None, 4.0)
    noise[noise == 4] = 5
    noise[0, ::29, ::29, ::29] = 4
    assert padding_of(Volume(noise, Grid((30, 30, 30), np.eye(4)))) is None


def test_padding_becomes_air_and_equal_tissue_stays():
    volume = cylinder(0)
    plane = volume.array_CXYZ[0, :, :, 5].astype(np.float32)
    inside = plane[20:40, 20:40].copy()
    assert (inside == 0).any()
    mended = without_padding(plane, 0.0, -1024.0)
    assert mended[0, 0] == -1024
    np.testing.assert_array_equal(mended[20:40, 20:40], inside)


def test_margin_stays_on_the_grid():
    grid = Grid((60, 60, 12), np.diag([1, 2, 5, 1]))
    found = find_body(cylinder(-1000), Body(threshold=-500))
    start, stop = with_margin(grid, found, 5.0)
    assert start == (found.start[0] - 5, found.start[1] - 3, 0)
    assert stop == (found.stop[0] + 5, found.stop[1] + 3, 12)


def test_percentiles_map_onto_the_window():
    values = np.arange(1001, dtype=np.float32).reshape(1, 7, 11, 13)
    volume = Volume(values, Grid((7, 11, 13), np.eye(4)))
    factor, offset = scaling_of(volume, -1.0, Intensity(clip=(0, 2000), window=(0, 1000), percentiles=(10.0, 90.0)))
    np.testing.assert_allclose([100 * factor + offset, 900 * factor + offset], [0, 1000], atol=1e-9)
    assert scaling_of(volume, 999.5, Intensity(percentiles=(10.0, 90.0))) is None
    assert scaling_of(volume, 0.0, Intensity()) == (1.0, 0.0)


def test_percentiles_of_large_scans_come_from_a_part(monkeypatch):
    monkeypatch.setattr("volssl.body.MANY_VOXELS", 2000)
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(0, 1, (1, 40, 40, 40)), Grid((40, 40, 40), np.eye(4)))
    factor, _ = scaling_of(volume, -9.0, Intensity(window=(0, 1000), percentiles=(2.28, 97.72)))
    assert 1000 / factor == pytest.approx(4, rel=0.1)  # two standard deviations to either side
