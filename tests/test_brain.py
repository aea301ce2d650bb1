"""The painted head: a function of its arguments, with a tumour that grows from visit to visit."""

import numpy as np
import pytest

from volssl.brain import ENHANCING, NECROSIS, OEDEMA, draw_tumour, paint_brain
from volssl.volume import Grid

GRID = Grid((32, 32, 32), np.array([[-5.6, 0, 0, 87], [0, -5.6, 0, 87], [0, 0, 5.6, -87], [0, 0, 0, 1.0]]))


def paint(visit=0, enhances=True, seed=0):
    return paint_brain(seed, 0, visit, tumour=draw_tumour(seed, 0, visit, enhances=enhances), grid=GRID)


def test_the_same_arguments_give_the_same_head():
    (one, labels), (again, _), (other, _) = paint(), paint(), paint(seed=1)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.shape == (4, 32, 32, 32) and labels.shape == (32, 32, 32)
    assert all(((image == 0) == (one[0] == 0)).all() for image in one)  # one brain mask
    assert set(np.unique(labels)) == {0, NECROSIS, OEDEMA, ENHANCING}


def test_the_tumour_grows_by_a_sixth_in_radius():
    first, second = paint()[1] > 0, paint(visit=1)[1] > 0
    assert second[first].mean() == 1.0  # it holds the first
    assert second.sum() / first.sum() == pytest.approx((7 / 6) ** 3, rel=0.2)


def test_without_enhancement_the_core_is_necrotic():
    rim, core = (paint(enhances=enhances)[1] for enhances in (True, False))
    assert np.array_equal(core == NECROSIS, (rim == NECROSIS) | (rim == ENHANCING))
    assert not (core == ENHANCING).any()
