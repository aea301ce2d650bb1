"""Components and their meetings; how protocols match lesions is tested with them."""

import numpy as np
import pytest

from volssl.lesions import components, match_by_dilation, meetings


@pytest.mark.parametrize(("connectivity", "count"), [(6, 3), (18, 2), (26, 1)])
def test_components_by_neighbourhood(connectivity, count):
    mask = np.zeros((5, 5, 5), dtype=bool)
    mask[1, 1, 1] = mask[2, 2, 1] = mask[3, 3, 2] = True  # over an edge, then over a corner
    numbers, found = components(mask, connectivity)
    assert found == count == numbers.max()
    assert ((numbers > 0) == mask).all()


def test_meetings():
    one, other = np.array([0, 1, 1, 2, 2]), np.array([3, 3, 0, 3, 3])
    assert meetings(one, other) == {(1, 3): 1, (2, 3): 2}
    assert meetings(one, np.zeros(5, dtype=int)) == {}


def test_a_lesion_at_the_border_and_one_prediction_for_two_lesions():
    reference, predicted = np.zeros((40, 8, 8), dtype=bool), np.zeros((40, 8, 8), dtype=bool)
    reference[0:4, 0:4, 0:4] = reference[20:24, 0:4, 0:4] = True
    predicted[0:24, 0:4, 0:4] = True
    found = match_by_dilation(predicted, reference, dilation=3, voxel_mm3=2.0)
    assert [lesion.found for lesion in found.lesions] == [(1,), (1,)] and found.false == ()
    assert [lesion.volume_mm3 for lesion in found.lesions] == [128, 128]
    assert [lesion.dice for lesion in found.lesions] == [pytest.approx(2 * 64 / (64 + 24 * 16))] * 2
    mask, lesion = found.masks(found.lesions[1])
    assert mask.sum() == 24 * 16 and lesion.sum() == 64
