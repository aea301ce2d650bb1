"""Intensity changes and the patch swap: ranges, purity, and that the input is left alone."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from volssl.augment.corrupt import PatchSwap, rounds
from volssl.augment.intensity import Blur, Contrast, Gamma, Noise, gaussian_blur, zscore
from volssl.draws import Draws

TRANSFORMS = [Blur(), Noise(), Gamma(), Gamma(rescale=True), Contrast(), PatchSwap(swaps=20)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_apply_is_pure_and_per_sample(transform):
    x = torch.rand(3, 1, 16, 12, 12)
    before = x.clone()
    params = transform.sample(Draws(0, 5, 0, 3))
    once, twice = transform.apply(x, params), transform.apply(x, params)
    assert torch.equal(x, before), "the input was changed"
    assert torch.equal(once, twice)
    assert not torch.equal(once, x)
    alone = transform.apply(x[2:], transform.sample(Draws(0, 5, 2, 1)))
    torch.testing.assert_close(once[2:], alone)


@pytest.mark.parametrize(
    "transform", [Blur(share=0.0), Noise(share=0.0), Contrast(share=0.0), Gamma(share=0.0)], ids=lambda t: type(t).__name__
)
def test_share_zero_changes_nothing(transform):
    x = torch.rand(2, 1, 8, 8, 8)
    torch.testing.assert_close(transform.apply(x, transform.sample(Draws(0, 5, 0, 2))), x)


def test_swap_only_moves_voxels():
    x = torch.rand(2, 1, 64, 64, 32)
    swap = PatchSwap()
    swapped = swap.apply(x, swap.sample(Draws(0, 0, 0, 2)))
    assert torch.isin(swapped, x).all()
    moved = (swapped != x).float().mean((1, 2, 3, 4))
    # The reference's settings move about 17.4 % of a 64 x 64 x 32 view.
    assert ((moved > 0.15) & (moved < 0.19)).all(), moved


@pytest.mark.parametrize(("swaps", "dtype"), [(1, torch.float32), (15, torch.float32), (200, torch.float32), (40, torch.bfloat16)])
def test_swap_equals_a_plain_loop(swaps, dtype):
    x = torch.rand(3, 2, 10, 9, 8).to(dtype)
    swap = PatchSwap(patch_vox=(4, 3, 2), swaps=swaps)
    params = swap.sample(Draws(1, 2, 0, 3))
    plain, before = x.clone(), x.clone()
    room = torch.tensor([7, 7, 7])
    for b in range(3):
        for one, other in (params[b] * room).long():
            first_at, second_at = (
                (b, slice(None), *(slice(int(s), int(s) + n) for s, n in zip(corner, (4, 3, 2), strict=True))) for corner in (one, other)
            )
            first, second = plain[first_at].clone(), plain[second_at].clone()
            plain[second_at] = first
            plain[first_at] = second
    assert torch.equal(swap.apply(x, params), plain)
    assert torch.equal(x, before)


def test_swaps_that_share_a_voxel_wait_for_each_other():
    patch = np.array([2, 2, 2])
    apart = np.array([[[0, 0, 0], [2, 0, 0]], [[0, 2, 0], [2, 2, 0]], [[0, 0, 2], [2, 0, 2]]])
    assert rounds(apart, patch).tolist() == [0, 0, 0]
    chain = np.array([[[0, 0, 0], [9, 9, 9]], [[1, 1, 1], [5, 5, 5]], [[20, 0, 0], [30, 0, 0]], [[6, 6, 6], [20, 0, 1]]])
    assert rounds(chain, patch).tolist() == [0, 1, 0, 2]


def test_zscore_and_its_constant_case():
    x = torch.stack([torch.rand(1, 8, 8, 8) * 5 + 3, torch.full((1, 8, 8, 8), 0.7)])
    z = zscore(x)
    assert abs(float(z[0].mean())) < 1e-5 and abs(float(z[0].std(correction=0)) - 1) < 1e-4
    assert float(z[1].abs().max()) < 1e-2


def test_gamma_keeps_sign():
    x = torch.tensor([-0.5, 0.0, 0.25]).view(1, 1, 3, 1, 1)
    y = Gamma().apply(x, torch.tensor([0.5]))
    torch.testing.assert_close(y.flatten(), torch.tensor([-(0.5**0.5), 0.0, 0.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [(0.25, 0.375, 1.0), (0.0, 1.1, 0.5), (0.1, 3.0, 0.9)])
@pytest.mark.parametrize("sides", [(9, 20, 33), (1, 2, 3)])
def test_blur_by_taps_and_by_matrices_is_that_of_scipy(monkeypatch, sigma, sides):
    x = torch.rand(1, 2, *sides, generator=torch.Generator().manual_seed(0))
    before, window = x.clone(), torch.rand(1, 2, *(n + 5 for n in sides))[:, :, 2 : 2 + sides[0], 3 : 3 + sides[1], 1 : 1 + sides[2]]
    window.copy_(x)
    alone = gaussian_blur(x, torch.tensor([sigma]))
    assert torch.equal(x, before), "the input is not changed"
    wanted = [ndimage.gaussian_filter(of.double().numpy(), sigma, mode="nearest", truncate=4.0) for of in x[0]]
    torch.testing.assert_close(alone[0], torch.from_numpy(np.stack(wanted)).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gaussian_blur(window, torch.tensor([sigma])), alone, rtol=0, atol=0)
    sigma_B3 = torch.tensor([(0.0, 0.5, 0.0), sigma])
    batch = gaussian_blur(torch.cat([x, x]), sigma_B3)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("volssl.augment.intensity.FEW_TAPS", 0)
    torch.testing.assert_close(gaussian_blur(torch.cat([x, x]), sigma_B3), batch, rtol=1e-5, atol=1e-6)
    assert gaussian_blur(x.double(), torch.tensor([sigma])).dtype == torch.double
