"""Crop, resize, flip and affine in one resampling: facts on ramps, no shear, anti-aliasing."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from volssl.augment.intensity import gaussian_blur
from volssl.augment.spatial import Affine, Box, by_gathers, compiled_sampler, rotation, take
from volssl.compiling import trouble
from volssl.draws import Draws


def box(start, size):
    return Box(torch.tensor([start], dtype=torch.float32), torch.tensor([size], dtype=torch.float32))


def test_an_unturned_crop_is_the_slice():
    x = torch.rand(1, 2, 12, 10, 8)
    crop = take(x, box((3, 2, 1), (6, 4, 5)), (6, 4, 5))
    torch.testing.assert_close(crop, x[:, :, 3:9, 2:6, 1:6], atol=1e-5, rtol=0)


def test_resize_of_a_ramp_keeps_positions():
    ramp = torch.arange(32.0).view(1, 1, 32, 1, 1).expand(1, 1, 32, 8, 8).contiguous()
    crop = take(ramp, box((8, 0, 0), (16, 8, 8)), (8, 8, 8))
    # Output voxel i covers source voxels 8 + 2 i and the next: its centre lies at 8.5 + 2 i.
    torch.testing.assert_close(crop[0, 0, :, 4, 4], 8.5 + 2 * torch.arange(8.0), atol=1e-3, rtol=0)


def test_flip_turns_the_axis_round():
    x = torch.rand(1, 1, 6, 5, 4)
    flip = torch.diag_embed(torch.tensor([[-1.0, 1.0, 1.0]]))
    torch.testing.assert_close(take(x, box((0, 0, 0), (6, 5, 4)), (6, 5, 4), matrix_B33=flip), x.flip(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.5)])
@pytest.mark.parametrize("size", [(48, 48, 24), (48, 24, 24)])
def test_rotation_does_not_shear_a_noncubic_patch(spacing, size):
    # A ball in millimetres must stay a ball: its second moments stay equal along all axes.
    sides = torch.tensor([48, 48, 48]) / torch.tensor(spacing)
    axes = [((torch.arange(int(n)) - (int(n) - 1) / 2) * s) for n, s in zip(sides, spacing, strict=True)]
    distance = (axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None] ** 2).sqrt()
    ball = torch.sigmoid(8 - distance)[None, None]
    angle = torch.deg2rad(torch.tensor([[35.0, 20.0, 40.0]]))
    whole = box((0, 0, 0), ball.shape[2:])
    turned = take(ball, whole, size, matrix_B33=rotation(angle), spacing_mm=spacing)[0, 0]
    step = torch.tensor(ball.shape[2:]) * torch.tensor(spacing) / torch.tensor(size)
    grid = torch.stack(torch.meshgrid(*((torch.arange(n) - (n - 1) / 2) * s for n, s in zip(size, step, strict=True)), indexing="ij"), -1)
    weight = turned / turned.sum()
    moments = torch.einsum("xyz,xyzi,xyzj->ij", weight, grid, grid)
    eigenvalues = torch.linalg.eigvalsh(moments)
    assert eigenvalues[-1] / eigenvalues[0] < 1.12, eigenvalues


def test_rotation_turns_the_principal_axis_by_its_angle():
    x = torch.zeros(1, 1, 40, 40, 20)
    x[0, 0, 5:35, 19:21, 9:11] = 1
    turned = take(x, box((0, 0, 0), (40, 40, 20)), (40, 40, 20), matrix_B33=rotation(torch.deg2rad(torch.tensor([[0.0, 0.0, 30.0]]))))[0, 0]
    where = turned.nonzero().float()
    weight = turned[turned > 0]
    centred = where - (where * weight[:, None]).sum(0) / weight.sum()
    _, vectors = torch.linalg.eigh(torch.einsum("n,ni,nj->ij", weight, centred, centred))
    main = vectors[:, -1]
    # The matrix maps output to source, so the object turns by -30 degrees about Z.
    assert abs(np.rad2deg(np.arctan2(float(main[1]), float(main[0]))) % 180 - 150) < 1.5


def test_downsampling_does_not_alias():
    stripes = (torch.arange(64) % 2).float().view(1, 1, 64, 1, 1).expand(1, 1, 64, 8, 8).contiguous()
    crop = take(stripes, box((4, 0, 0), (48, 8, 8)), (16, 8, 8))
    plain = torch.nn.functional.interpolate(stripes[:, :, 4:52], size=(16, 8, 8), mode="nearest")
    assert crop.std() < 0.05 < plain.std()


def test_affine_ranges_and_flips():
    matrix = Affine(flip_share=(0.5, 0.0, 0.0), scale=0.1, degrees=10).sample(Draws(0, 0, 0, 2000))
    determinant = torch.linalg.det(matrix)
    assert 0.45 < float((determinant < 0).float().mean()) < 0.55
    lengths = torch.linalg.svdvals(matrix)
    assert lengths.min() > 1 / 1.1 - 1e-4 and lengths.max() < 1 / 0.9 + 1e-4
    assert torch.equal(Affine(degrees=0, scale=0, flip_share=(0, 0, 0)).sample(Draws(0, 0, 0, 1))[0], torch.eye(3))


def test_labels_stay_labels_under_nearest():
    labels = torch.randint(0, 4, (1, 1, 10, 10, 10)).float()
    turned = take(labels, box((0, 0, 0), (10, 10, 10)), (8, 8, 8), matrix_B33=rotation(torch.rand(1, 3)), mode="nearest")
    assert set(turned.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_blur_agrees_with_scipy_and_is_per_sample():
    x = torch.rand(3, 1, 14, 12, 10)
    sigma = torch.tensor([[1.5, 0.7, 0.0], [0.0, 0.0, 0.0], [0.4, 2.0, 1.0]])
    ours = gaussian_blur(x, sigma)
    for sample in range(3):
        reference = gaussian_filter(x[sample, 0].numpy(), sigma[sample].tolist(), mode="nearest", truncate=4.0)
        torch.testing.assert_close(ours[sample, 0], torch.from_numpy(reference), atol=2e-4, rtol=0)


def turned_boxes(rows, step=0):
    draws = Draws(0, step, 0, rows)
    size = torch.randint(10, 30, (rows, 3), generator=torch.Generator().manual_seed(step)).float()
    room = torch.tensor([40.0, 36.0, 30.0]) - size
    return Box(draws.fork("start").uniform(0, 1, 3) * room, size), Affine(degrees=30).sample(draws)


def test_eight_reads_equal_grid_sample():
    x = torch.rand(3, 2, 40, 36, 30)
    boxes, matrix = turned_boxes(3)
    plain = take(x, boxes, (12, 10, 14), matrix_B33=matrix)
    torch.testing.assert_close(take(x, boxes, (12, 10, 14), matrix_B33=matrix, sampler=by_gathers), plain, atol=2e-5, rtol=0)
    outside = Box(torch.full((3, 3), -8.0), torch.full((3, 3), 30.0))
    assert float((take(x, outside, (8, 8, 8)) == 0).float().mean()) > 0.3
    torch.testing.assert_close(take(x, outside, (8, 8, 8), sampler=by_gathers), take(x, outside, (8, 8, 8)), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_compiled_reads_equal_grid_sample():
    if why := trouble("cpu"):
        pytest.skip(f"no compiler here: {why}")
    x = torch.rand(3, 1, 40, 36, 30)
    sampler = compiled_sampler()
    for step in range(2):
        boxes, matrix = turned_boxes(3, step)
        plain = take(x, boxes, (12, 10, 14), matrix_B33=matrix)
        compiled = take(x, boxes, (12, 10, 14), matrix_B33=matrix, sampler=sampler)
        torch.testing.assert_close(compiled, plain, atol=2e-5, rtol=0)
        assert torch.equal(compiled, take(x, boxes, (12, 10, 14), matrix_B33=matrix, sampler=sampler))


def test_a_row_is_cut_from_its_own_parent_whatever_stands_beside_it(monkeypatch):
    x = torch.rand(2, 1, 40, 36, 30)
    boxes, matrix = turned_boxes(6)  # three boxes per parent: rows 0 and 1 are the first boxes of parents 0 and 1, and so on
    rows = take(x, boxes, (12, 10, 14), matrix_B33=matrix)
    for r in range(6):
        alone = Box(boxes.start_B3[r : r + 1], boxes.size_B3[r : r + 1])
        torch.testing.assert_close(
            rows[r : r + 1], take(x[r % 2 :][:1], alone, (12, 10, 14), matrix_B33=matrix[r : r + 1]), atol=2e-5, rtol=0
        )
    # Large windows are taken one by one on a CPU; that must not show.
    monkeypatch.setattr("volssl.augment.spatial.SMALL", 1)
    torch.testing.assert_close(take(x, boxes, (12, 10, 14), matrix_B33=matrix), rows, atol=2e-5, rtol=0)


def test_bf16_is_interpolated_in_float32():
    # In bf16 itself a place at 150 voxels would be known to within a voxel.
    ramp = (torch.arange(160.0) / 160).view(1, 1, 160, 1, 1).expand(1, 1, 160, 8, 8).contiguous()
    size = (80, 8, 8)
    fine = take(ramp, box((0, 0, 0), (160, 8, 8)), size)
    coarse = take(ramp.bfloat16(), box((0, 0, 0), (160, 8, 8)), size)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), fine, atol=4e-3, rtol=0)


@pytest.mark.parametrize("sides", [(70, 80, 96), (33, 40, 64), (9, 7, 5)])
def test_banded_blur_agrees_with_scipy(sides):
    x = torch.rand(1, 1, *sides)
    for sigma in ([0.4, 0.3, 0.9], [2.0, 1.5, 1.9], [0.0, 0.0, 1.0]):
        reference = gaussian_filter(x[0, 0].numpy(), sigma, mode="nearest", truncate=4.0)
        torch.testing.assert_close(gaussian_blur(x, torch.tensor([sigma]))[0, 0], torch.from_numpy(reference), atol=2e-4, rtol=0)


def test_blur_takes_a_window_of_a_larger_array_as_it_is():
    x = torch.rand(1, 2, 50, 50, 50)
    window = x[:, :, 3:43, 5:45, 2:42]
    sigma = torch.tensor([[0.4, 0.3, 0.9]])
    assert torch.equal(gaussian_blur(window, sigma), gaussian_blur(window.contiguous(), sigma))
