"""The view sampler against the figures of the reference's sampling (specification, sections 1.3 and 1.5), within four standard errors.

The reference draws corners in a scan less its borders: a volume of 350 x 350 x 300 leaves 209 x 209 x 266, and so on.
"""

import numpy as np
import pytest
import torch

from volssl.augment.crops import PairCrops, overlap
from volssl.draws import Draws
from volssl.methods.pcrlv2 import PCRLv2

NUMBER = 2500
OFFICIAL = PCRLv2.PRESETS["official"]["crops"]["room"]
SMALLEST = (64, 64, 32)


def drawn(parent, **settings):
    x = torch.zeros(1, 1, 1, 1, 1).expand(NUMBER, 1, *parent)  # shape alone, no memory
    one, other, crops = PairCrops(**settings).sample(Draws(0, 0, 0, NUMBER), x, (64, 64, 32))
    start_N23, size_N23 = (torch.stack(pair, 1).numpy() for pair in ((one.start_B3, other.start_B3), (one.size_B3, other.size_B3)))
    local_start, local_size = (torch.stack([getattr(c, name) for c in crops], 1).numpy() for name in ("start_B3", "size_B3"))
    return start_N23, size_N23, local_start, local_size


def close(values, wanted, rounding):
    """The mean of independent values is `wanted`, known to `rounding`, within four standard errors."""
    error = 4 * np.std(values, axis=0) / np.sqrt(len(values)) + rounding
    return (np.abs(np.mean(values, axis=0) - wanted) <= error).all()


def check_pairs(start_N23, size_N23, parent):
    """Mean overlap 0.41, union 116 x 116 x 90, both views of the smallest size in 1.0 to 1.4 % of the pairs."""
    iou = overlap(start_N23[:, 0], size_N23[:, 0], start_N23[:, 1], size_N23[:, 1])
    assert (iou > 0.3).all()
    assert close(iou, 0.41, 0.005)
    low, high = start_N23.min(1), (start_N23 + size_N23).max(1)
    assert (low >= 0).all() and (high <= np.array(parent)).all()
    assert close(high - low, (116, 116, 90), 1.0)
    smallest = (size_N23 == np.array(SMALLEST)).all(2)
    assert (smallest[:, 0] == smallest[:, 1]).all(), "the smallest pairs with itself alone"
    assert close(smallest[:, 0].astype(float), 0.012, 0.002)


@pytest.mark.parametrize("parent", [(159, 159, 226), (209, 209, 266), (259, 259, 306)])
def test_pairs_in_a_whole_volume_are_the_references(parent):
    start_N23, size_N23, _, _ = drawn(parent, locals=1)
    if parent[0] == 159:  # in the smallest volume boxes lie somewhat closer: the figures are of the middle one
        iou = overlap(start_N23[:, 0], size_N23[:, 0], start_N23[:, 1], size_N23[:, 1])
        assert close(iou, 0.42, 0.01)
    else:
        check_pairs(start_N23, size_N23, parent)


@pytest.mark.parametrize("parent", [(160, 160, 128), (144, 144, 128)])
def test_the_official_preset_draws_so_inside_a_parent_box(parent):
    start_N23, size_N23, _, _ = drawn(parent, locals=1, room=OFFICIAL)
    if parent == (160, 160, 128):
        check_pairs(start_N23, size_N23, parent)
    plain = drawn(parent, locals=1)
    iou, closer = (overlap(s[:, 0], n[:, 0], s[:, 1], n[:, 1]).mean() for s, n in ((start_N23, size_N23), plain[:2]))
    assert abs(iou - 0.41) < 0.015 and closer > iou + 0.005, "without room the parent pushes the boxes together"


def test_the_recipes_box_of_128_keeps_out_the_widest_pairs():
    # About four pairs in ten of the reference reach over more than 128 x 128 x 112 voxels: the mean overlap is then 0.44, not 0.41.
    start_N23, size_N23, _, _ = drawn((209, 209, 266), locals=1)
    union = (start_N23 + size_N23).max(1) - start_N23.min(1)
    assert close((union <= np.array([128, 128, 112])).all(1).astype(float), 0.62, 0.01)
    start_N23, size_N23, _, _ = drawn((128, 128, 112), locals=1, room=OFFICIAL)
    assert close(overlap(start_N23[:, 0], size_N23[:, 0], start_N23[:, 1], size_N23[:, 1]), 0.44, 0.005)


def contained(start_N23, size_N23, local_start, local_size):
    """Share of each sub-crop's volume that lies inside the box of both globals, (N, L)."""
    low, high = start_N23.min(1)[:, None], (start_N23 + size_N23).max(1)[:, None]
    shared = np.minimum(local_start + local_size, high) - np.maximum(local_start, low)
    return np.clip(shared, 0, None).prod(2) / local_size.prod(2)


def test_sub_crops_of_the_reference_and_of_the_paper():
    # Section 1.5: 47 % fully inside, 31 % at least half outside, 8 % fully outside, where only the corner is confined.
    share_NL = contained(*drawn((209, 209, 266), local_region="corner"))
    for chosen, wanted in ((share_NL >= 1, 0.47), (share_NL <= 0.5, 0.31), (share_NL == 0, 0.08)):
        assert close(chosen.mean(1), wanted, 0.01), (chosen.mean(), wanted)
    assert (contained(*drawn((209, 209, 266), local_region="inside")) == 1).all()


def test_sizes_of_sub_crops_are_drawn_alike():
    sizes = PairCrops().local_sizes_vox
    _, _, _, local_size = drawn((209, 209, 266))
    for size in sizes:
        assert close((local_size == np.array(size)).all(2).mean(1), 1 / len(sizes), 0.0)


def test_views_draw_their_sizes_from_all_that_can_pair():
    # Of pairs kept, larger sizes are more frequent than a quarter each, since larger boxes overlap more often; both views are alike.
    _, size_N23, _, _ = drawn((209, 209, 266), locals=1)
    for size in PairCrops().global_sizes_vox:
        share = (size_N23 == np.array(size)).all(2)
        assert close((share[:, 0].astype(float) - share[:, 1]), 0.0, 0.0) and share.any()
