"""Surface distances: against google-deepmind/surface-distance, facts by hand, and what must hold for any two masks."""

import time
from typing import ClassVar

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from surface_distance import lookup_tables, metrics

from volssl import surface
from volssl.surface import bounding_box, surfaces

ANISOTROPIC = (0.7, 1.3, 4.0)


class Ndimage:
    """The names that the oracle, written for older releases, looks for in scipy.ndimage."""

    filters: ClassVar = scipy.ndimage
    morphology: ClassVar = scipy.ndimage


@pytest.fixture
def oracle(monkeypatch):
    """surface-distance 0.1 from PyPI, on this numpy and scipy."""
    monkeypatch.setattr(metrics, "ndimage", Ndimage)
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    return metrics


def blobs(seed: int, shape=(14, 12, 10), sigma=1.2, quantile=0.75) -> np.ndarray:
    """A ragged mask that touches the border."""
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return noise > np.quantile(noise, quantile)


def box(*ranges: tuple[int, int], shape=(12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*of) for of in ranges)] = True
    return mask


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), ANISOTROPIC, (2.9, 1.0, 1.7)])
def test_the_area_of_every_code_is_the_oracles(spacing_mm):
    ours = surface._areas_mm2(spacing_mm)
    # Bit b of ours stands for CORNERS[b]; the oracle's kernel gives the first corner the highest bit.
    reversed_code = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
    np.testing.assert_allclose(ours[reversed_code], lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm), atol=1e-12)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), ANISOTROPIC])
@pytest.mark.parametrize("seed", range(4))
def test_all_distances_are_the_oracles(oracle, seed, spacing_mm):
    # The oracle is exact where the masks keep away from the border (its crop, it says, holds only there).
    one, other = np.pad(blobs(seed), 2), np.pad(blobs(seed + 100, sigma=2.0, quantile=0.9), 2)
    found, expected = surfaces(one, other, spacing_mm), oracle.compute_surface_distances(other, one, spacing_mm)
    for percent in (50, 95, 100):
        assert found.percentile(percent) == pytest.approx(oracle.compute_robust_hausdorff(expected, percent))
    distances = np.concatenate([expected["distances_gt_to_pred"], expected["distances_pred_to_gt"]])
    areas = np.concatenate([expected["surfel_areas_gt"], expected["surfel_areas_pred"]])
    assert found.average() == pytest.approx((distances * areas).sum() / areas.sum())
    assert found.root_mean_square() == pytest.approx(np.sqrt((distances**2 * areas).sum() / areas.sum()))
    assert found.maximum() == pytest.approx(distances.max())
    to_reference, to_predicted = oracle.compute_average_surface_distance(expected)[::-1]
    assert np.average(found.to_reference_mm, weights=found.predicted_mm2) == pytest.approx(to_reference)
    assert np.average(found.to_predicted_mm, weights=found.reference_mm2) == pytest.approx(to_predicted)


def test_the_oracle_misses_a_structure_where_others_score_it_perfect(oracle):
    none = oracle.compute_surface_distances(box((2, 4), (2, 4), (2, 4)), np.zeros((12, 12, 12), dtype=bool), (1, 1, 1))
    assert oracle.compute_robust_hausdorff(none, 95) == np.inf
    with pytest.raises(ValueError, match="no surface"):
        surfaces(np.zeros((12, 12, 12), dtype=bool), box((2, 4), (2, 4), (2, 4)), (1, 1, 1))


def test_a_shifted_box_by_hand():
    # Shifted by two voxels of 4 mm: the far faces lie 8 mm apart, and nothing is further.
    one, other = box((2, 6), (2, 6), (2, 6)), box((2, 6), (2, 6), (4, 8))
    found = surfaces(one, other, ANISOTROPIC)
    assert found.maximum() == pytest.approx(8.0)
    assert found.percentile(95) == pytest.approx(8.0)


def test_a_single_voxel_by_hand():
    # Eight corners, each cut by one triangle whose corners are the middles of three edges: area sqrt(3)/8 at 1 mm.
    found = surfaces(box((3, 4), (3, 4), (3, 4)), box((3, 4), (3, 4), (6, 7)), (1, 1, 1))
    assert found.predicted_mm2.sum() == pytest.approx(np.sqrt(3))
    # Corners at z = 3 and 4 against z = 6 and 7: half of the surface 3 away, half 2.
    assert sorted(found.to_reference_mm) == [2] * 4 + [3] * 4
    assert found.average() == 2.5
    assert found.root_mean_square() == pytest.approx(np.sqrt(6.5))


def test_a_mask_at_the_border_has_the_surface_it_has_inside():
    at_border = surfaces(box((0, 12), (0, 12), (0, 5)), box((0, 12), (0, 12), (0, 7)), ANISOTROPIC)
    inside = surfaces(np.pad(box((0, 12), (0, 12), (0, 5)), 3), np.pad(box((0, 12), (0, 12), (0, 7)), 3), ANISOTROPIC)
    for name in ("to_reference_mm", "predicted_mm2", "to_predicted_mm", "reference_mm2"):
        np.testing.assert_allclose(np.sort(getattr(at_border, name)), np.sort(getattr(inside, name)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.tuples(*[st.integers(0, 3)] * 3), spacing=st.tuples(*[st.floats(0.3, 5)] * 3))
def test_identity_symmetry_and_translation(seed, shift, spacing):
    one, other = blobs(seed, (8, 7, 6)), blobs(seed + 1, (8, 7, 6))
    assert surfaces(one, one, spacing).maximum() == 0
    forth, back = surfaces(one, other, spacing), surfaces(other, one, spacing)
    moved = surfaces(*[np.pad(mask, [(step, 4 - step) for step in shift]) for mask in (one, other)], spacing)
    for of in (lambda s: s.percentile(95), lambda s: s.average(), lambda s: s.root_mean_square(), lambda s: s.maximum()):
        assert of(forth) == pytest.approx(of(back)) == pytest.approx(of(moved))
    scaled = surfaces(one, other, [2 * step for step in spacing])
    assert scaled.percentile(95) == pytest.approx(2 * forth.percentile(95))
    assert forth.average() <= forth.root_mean_square() * (1 + 1e-9) <= forth.maximum() * (1 + 1e-9)


def test_the_bounding_box():
    one, other = box((2, 3), (5, 7), (0, 1)), box((4, 5), (6, 9), (3, 12))
    assert bounding_box(one) == (slice(2, 3), slice(5, 7), slice(0, 1))
    assert bounding_box(one, other) == (slice(2, 5), slice(5, 9), slice(0, 12))
    assert bounding_box(one, margin=2) == (slice(0, 5), slice(3, 9), slice(0, 3))
    assert bounding_box(np.zeros((4, 4, 4), dtype=bool)) == (slice(0, 4),) * 3


def test_a_tumour_in_a_whole_head_takes_seconds_at_most():
    at = np.stack(np.meshgrid(*[np.arange(n) for n in (240, 240, 155)], indexing="ij", sparse=False)).astype(np.float32)
    tumour = ((at - np.array([100, 120, 80], dtype=np.float32).reshape(3, 1, 1, 1)) ** 2).sum(0) < 35**2
    far = np.roll(tumour, (8, -5, 3), axis=(0, 1, 2))
    far[10:13, 10:13, 10:13] = True  # a false positive far away, which spoils a bounding box
    begun = time.perf_counter()
    surfaces(tumour, far, (1, 1, 1))
    assert time.perf_counter() - begun < 10  # about 0.2 s on a quiet core
