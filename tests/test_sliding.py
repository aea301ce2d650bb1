"""Sliding window: MONAI's windows and weights are the oracle; and what is our own, slabs, air and the running maximum."""

import itertools

import numpy as np
import pytest
import torch
from monai.inferers.utils import sliding_window_inference

from volssl.sliding import Windows, importance, largest, slab_axis, slabs, starts

torch.manual_seed(0)
CONV = torch.nn.Conv3d(2, 3, 3, padding=1)  # looks beyond its voxel, so that each window answers otherwise
EMPTY = [1.0, 0.0, 0.0]


@torch.no_grad()
def predict(x_BCXYZ):
    return CONV(x_BCXYZ).softmax(1)


def together(x_CXYZ, windows, *, predict=predict, **options):
    """All slabs at once, and how many planes each held; every plane comes once, in order."""
    axis = slab_axis(x_CXYZ.shape[1:])
    parts, at = [], 0
    for first, stop, shares_CXYZ in slabs(x_CXYZ, predict, windows, **{"empty_C": EMPTY, **options}):
        assert first == at < stop
        at = stop
        assert shares_CXYZ.shape[1 + axis] == stop - first
        parts.append(shares_CXYZ.clone())
    assert at == x_CXYZ.shape[1 + axis]
    return torch.cat(parts, 1 + axis)


SHAPES = [(30, 22, 17), (40, 8, 9), (5, 7, 50), (16, 16, 16), (15, 33, 16)]
PATCHES = [(16, 16, 16), (8, 12, 10), (64, 16, 20)]


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(("shape", "patch_vox"), list(itertools.product(SHAPES, PATCHES)))
def test_shares_and_labels_are_monais(shape, patch_vox, overlap):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    theirs = sliding_window_inference(x[None], patch_vox, 3, predict, overlap=overlap, mode="gaussian")[0]
    windows = Windows(patch_vox, overlap, 3)
    assert (together(x, windows) - theirs).abs().max() < 1e-6
    assert torch.equal(largest(together(x, windows, averaged=False)), theirs.argmax(0).byte())


def test_windows_by_hand():
    assert starts(10, 4, 0.5) == [0, 2, 4, 6]
    assert starts(11, 4, 0.5) == [0, 2, 4, 6, 7]  # the last one ends with the volume
    assert starts(4, 4, 0.5) == [0]
    assert starts(3, 8, 0.0) == [-2]  # 3 voxels are added at its end, 2 before
    assert starts(5, 4, 0.9) == [0, 1]
    weight = importance((5, 5, 96))
    assert weight[2, 2, 47] == pytest.approx(np.exp(-0.5 * (0.5 / 12) ** 2))
    assert weight.min() == pytest.approx(1e-3)


def test_the_largest_is_the_first_of_equal_ones():
    shares = torch.tensor([[0.2, 0.5, 0.0], [0.4, 0.5, 0.0], [0.4, 0.0, 0.0]]).view(3, 3, 1, 1)
    assert largest(shares).flatten().tolist() == [1, 0, 0]
    many = torch.rand(5, 70, 90, 50)
    assert torch.equal(largest(many), many.argmax(0).byte())
    turned = many.permute(0, 3, 1, 2)
    assert torch.equal(largest(turned), turned.argmax(0).byte())


def island(side=48):
    """Air at 0 but for a block of values in one corner."""
    x = torch.zeros(2, side, side, side)
    x[:, 3:15, 2:14, 5:15] = torch.rand(2, 12, 12, 10) + 0.1
    return x


def test_windows_of_air_are_not_predicted_and_stand_for_background():
    seen = []

    def count(x):
        assert (x != 0).flatten(1).any(1).all()
        seen.append(len(x))
        return predict(x)

    x, windows = island(), Windows((16, 16, 16), 0.5, 2)
    made = together(x, windows, predict=count, air=0.0)
    assert sum(seen) == 8  # of 125: those that begin at 0 or 8 along each axis
    everywhere = together(x, windows)
    assert torch.equal(made[:, :8, :8, :8], everywhere[:, :8, :8, :8])  # no window of air reaches there
    np.testing.assert_allclose(made[0, 24:, 24:, 24:], 1, atol=1e-6)
    np.testing.assert_allclose(made.sum(0), 1, atol=1e-6)
    regions = together(x, windows, air=0.0, empty_C=[0.0, 0.0, 0.0])
    assert (regions[:, 24:] == 0).all()
    # Where air and body windows meet, the left-out ones count as certain background, so the share of all else only falls.
    assert (regions <= everywhere + 1e-6).all()


def test_one_voxel_that_is_no_air_keeps_a_window():
    x = torch.zeros(2, 16, 16, 16)
    for value, kept in ((0.0, 0), (1e-6, 1)):
        x[1, 7, 13, 3] = value  # off the coarse look
        calls = []
        together(x, Windows((16, 16, 16)), predict=lambda x, calls=calls: calls.append(1) or predict(x), air=0.0)
        assert len(calls) == kept


def test_a_volume_of_nothing_but_air_is_background():
    made = together(torch.zeros(2, 20, 9, 9), Windows((16, 16, 16)), predict=lambda x: 1 / 0, air=0.0)
    assert torch.equal(largest(made), torch.zeros(20, 9, 9, dtype=torch.uint8))


def test_memory_is_that_of_a_slab():
    """No tensor that the generator holds grows with the volume's length."""
    held = {}
    for length in (64, 256):
        generator = slabs(torch.zeros(2, length, 8, 8), predict, Windows((16, 8, 8)), empty_C=EMPTY)
        next(generator)
        frame = generator.gi_frame.f_locals
        held[length] = [frame["sums"].sums_CXYZ.numel(), frame["weights"].sums_CXYZ.numel()]
    assert held[64] == held[256] == [3 * 16 * 64, 16 * 64]
