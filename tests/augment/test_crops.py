"""Pairs of boxes and their sub-crops: overlap, containment, reachability."""

import numpy as np
import pytest
import torch

from volssl.augment.crops import PairCrops, Tissue, body_share, overlap
from volssl.draws import Draws
from volssl.files import BadInput

PARENT = (128, 128, 112)
OUT = (64, 64, 32)


def sample(crops, batch=1, step=0, first=0, x=None):
    x = torch.zeros(1, 1, *PARENT).expand(batch, -1, -1, -1, -1) if x is None else x
    return crops.sample(Draws(0, step, first, batch), x, OUT)


def test_overlap_by_hand():
    one, other = np.array([[0, 0, 0]]), np.array([[2, 0, 0]])
    size = np.array([[4, 4, 4]])
    assert overlap(one, size, other, size)[0] == pytest.approx(32 / 96)


def test_pairs_overlap_and_locals_lie_inside():
    crops = PairCrops()
    one, other, local_boxes = sample(crops, 200)
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
    whole = sample(PairCrops(), 4, 3)
    alone = sample(PairCrops(), 1, 3, 2)
    assert (whole[0].start_B3[2] == alone[0].start_B3[0]).all() and (whole[2][5].start_B3[2] == alone[2][5].start_B3[0]).all()


def test_impossible_plans_are_refused():
    with pytest.raises(BadInput, match="must fit into the box"):
        PairCrops().check((96, 96, 96))
    with pytest.raises(BadInput, match=r"found at most 1\.000"):
        PairCrops(global_sizes_vox=((8, 8, 8),), min_overlap=1.0).check((32, 32, 32))


def test_all_that_cannot_work_is_told_at_once():
    with pytest.raises(BadInput) as caught:
        PairCrops(global_sizes_vox=((40, 8, 8), (8, 8, 8)), min_overlap=1.0).check((32, 32, 32))
    assert "must fit into the box" in str(caught.value) and "found at most 1.000" in str(caught.value)
    with pytest.raises(BadInput, match=r"no pair of global boxes overlapped enough in 12800 draws"):
        PairCrops(global_sizes_vox=((24, 24, 24),), min_overlap=0.999, room=(4, 4, 4)).check((128, 128, 128))


def inside_share(region, batch=300):
    one, other, local_boxes = sample(PairCrops(local_region=region), batch)
    low = torch.minimum(one.start_B3, other.start_B3)
    high = torch.maximum(one.start_B3 + one.size_B3, other.start_B3 + other.size_B3)
    inside = [((b.start_B3 >= low) & (b.start_B3 + b.size_B3 <= high)).all(1) for b in local_boxes]
    return float(torch.stack(inside).float().mean())


def test_regions_of_the_sub_crops():
    # Section 1.5: with the reference's rule 47 % of the sub-crops lie fully inside the box of both globals (a larger volume there).
    assert inside_share("inside") == 1.0
    assert 0.40 < inside_share("corner") < 0.54
    assert inside_share("anywhere") < 0.8


def test_tissue_rule_prefers_what_it_should_and_never_hangs():
    x = torch.zeros(1, 1, *PARENT)
    x[..., :, :, 56:] = 0.5  # body above -150 HU in the upper half
    sizes = ((32, 32, 32),)

    def body(rule, **more):
        crops = PairCrops(global_sizes_vox=sizes, tissue=Tissue(rule=rule, limit=0.05, **more))
        shares = []
        for step in range(30):
            one, other, _ = sample(crops, 1, step, x=x)
            for box in (one, other):
                low, high = box.start_B3[0, 2], box.start_B3[0, 2] + box.size_B3[0, 2]
                shares.append(float((high - max(float(low), 56)).clamp(min=0) / 32))
        return shares

    assert max(body("body")) <= 0.15 and min(body("air")) >= 0.85
    assert 0.3 < float(np.mean(body("none"))) < 0.7
    # Relative to the output the limit of these small crops is 0.05 * 32**3 / (64 * 64 * 32): even stricter.
    assert max(body("body", relative_to="output")) <= 0.15
    full = PairCrops(global_sizes_vox=sizes, tissue=Tissue(rule="body", attempts=3))
    assert sample(full, 1, x=torch.ones(1, 1, *PARENT))[0].start_B3.shape == (1, 3)


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 6, 11)])
def test_body_share_is_the_mean_of_each_block(shape):
    body = torch.rand(2, *shape) > 0.4
    again = torch.nn.functional.avg_pool3d(body[:, None].float(), 4, ceil_mode=True, count_include_pad=False)[:, 0]
    torch.testing.assert_close(body_share(body), again)


def test_body_is_found_alike_in_every_type_of_number():
    x = torch.rand(2, 1, 12, 8, 9).bfloat16()
    crops = PairCrops(tissue=Tissue(rule="body", level=0.5))
    assert np.array_equal(crops._body(x), crops._body(x.float()))
    assert np.array_equal(crops._body(x), body_share(x[:, 0] >= 0.5))
