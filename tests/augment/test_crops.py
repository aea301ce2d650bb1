"""Pairs of boxes and their sub-crops: overlap, containment, reachability."""

import numpy as np
import pytest

from volssl.augment.crops import PairCrops, overlap
from volssl.draws import Draws
from volssl.files import BadInput

PARENT = (128, 128, 112)


def test_overlap_by_hand():
    one, other = np.array([[0, 0, 0]]), np.array([[2, 0, 0]])
    size = np.array([[4, 4, 4]])
    assert overlap(one, size, other, size)[0] == pytest.approx(32 / 96)


def test_pairs_overlap_and_locals_lie_inside():
    crops = PairCrops()
    one, other, local_boxes = crops.sample(Draws(0, 0, 0, 200), PARENT)
    arrays = [a.numpy() for a in (one.start_B3, one.size_B3, other.start_B3, other.size_B3)]
    assert (overlap(*arrays) > 0.3).all()
    low = np.minimum(arrays[0], arrays[2])
    high = np.maximum(arrays[0] + arrays[1], arrays[2] + arrays[3])
    assert (low >= 0).all() and (high <= np.array(PARENT)).all()
    assert len(local_boxes) == 6
    for box in local_boxes:
        start, size = box.start_B3.numpy(), box.size_B3.numpy()
        assert (start >= low).all() and (start + size <= high).all()


def test_only_the_reachable_pairs_of_sizes_are_kept():
    # Section 1.3: the smallest size can pair with itself alone.
    small = (64, 64, 32)
    assert [pair for pair in PairCrops().pairs() if small in pair] == [(small, small)]


def test_a_sample_does_not_depend_on_its_batch():
    whole = PairCrops().sample(Draws(0, 3, 0, 4), PARENT)
    alone = PairCrops().sample(Draws(0, 3, 2, 1), PARENT)
    assert (whole[0].start_B3[2] == alone[0].start_B3[0]).all() and (whole[2][5].start_B3[2] == alone[2][5].start_B3[0]).all()


def test_impossible_plans_are_refused():
    with pytest.raises(BadInput, match="must fit into the box"):
        PairCrops().check((96, 96, 96))
    with pytest.raises(BadInput, match=r"found at most 1\.000"):
        PairCrops(global_sizes_vox=((8, 8, 8),), min_overlap=1.0).check((32, 32, 32))
