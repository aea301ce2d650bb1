"""Geometry and intensities: what the network sees, and the way back to the image's own grid."""

import itertools
import json

import numpy as np
import pytest
import torch
from labelled import blobs

from volssl.files import BadInput
from volssl.resample import resample
from volssl.segment import Inference, Model, Plan, Preparation, onto_original, read_model, write_model
from volssl.sliding import slab_axis
from volssl.volume import Grid, Volume


def turned(spacing_mm, order, signs, degrees=0.0) -> np.ndarray:
    """An affine whose array axes lie along the world axes `order`, with `signs`, turned about z."""
    affine = np.eye(4)
    a = np.deg2rad(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    axes = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        axes[world, axis] = sign * spacing_mm[axis]
    affine[:3, :3] = about_z @ axes
    affine[:3, 3] = (-31, 12, 55)
    return affine


GRIDS = {
    "RAS": turned((1, 1, 1), (0, 1, 2), (1, 1, 1)),
    "flipped": turned((1, 1, 1), (0, 1, 2), (-1, -1, 1)),
    "permuted": turned((1, 1, 1), (2, 0, 1), (-1, 1, -1)),
    "anisotropic": turned((0.8, 0.9, 2.5), (0, 1, 2), (-1, 1, 1)),
    "oblique": turned((1.2, 1.2, 2), (1, 0, 2), (1, -1, 1), degrees=17),
}


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("spacing_mm", [None, (0.5, 0.5, 0.5)])
def test_a_label_map_pushed_through_predicts_geometry_comes_back(affine, spacing_mm):
    _, label = blobs(0, (24, 22, 20))
    original = Grid(label.shape, affine)
    preparation = Preparation(spacing_mm=spacing_mm)
    seen = preparation.label(Volume(label[None], original))
    assert seen.grid.orientation == "RAS"
    shares = np.stack([seen.array_CXYZ[0] == value for value in range(3)]).astype(np.float32)
    back, filled = together(shares, seen.grid, original)
    assert filled.all()
    assert back.shape == label.shape
    if spacing_mm is None:
        np.testing.assert_array_equal(back, label)
    else:
        # Nearest voxels of 0.5 mm and back: only voxels on the contour may differ.
        for value in (1, 2):
            assert 2 * ((back == value) & (label == value)).sum() / ((back == value).sum() + (label == value).sum()) > 0.9


def together(shares_KXYZ, seen, original):
    """Shares in runs of unequal length -> largest on the image's grid, and where anything was written."""
    axis = slab_axis(seen.shape_vox)
    ends = [0, 3, 4, 11, seen.shape_vox[axis]]
    runs = [(a, b, torch.from_numpy(shares_KXYZ).narrow(1 + axis, a, b - a)) for a, b in itertools.pairwise(ends)]
    turned = original.reoriented("RAS")
    index, filled = np.zeros(turned.shape_vox, np.uint8), np.zeros(turned.shape_vox, np.uint8)
    for box, part in onto_original(runs, seen, original):
        index[box], filled[box] = part.argmax(0), filled[box] + 1
    assert filled.max() == 1
    return [Volume(array[None], turned).reoriented(original.orientation).array_CXYZ[0] for array in (index, filled)]


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("spacing_mm", [(0.7, 0.7, 0.7), (1.7, 0.6, 2.9), (3, 3, 3)])
def test_shares_moved_part_by_part_are_those_moved_as_a_whole(affine, spacing_mm):
    original = Grid((24, 22, 20), affine)
    turned = original.reoriented("RAS")
    seen = turned.resampled(spacing_mm)
    shares = np.random.default_rng(0).random((3, *seen.shape_vox), np.float32)
    whole = resample(Volume(shares, seen), turned).array_CXYZ
    axis = slab_axis(seen.shape_vox)
    runs = [(a, min(a + 4, seen.shape_vox[axis])) for a in range(0, seen.shape_vox[axis], 4)]
    made = np.full_like(whole, np.nan)
    for box, part in onto_original([(a, b, torch.from_numpy(shares).narrow(1 + axis, a, b - a)) for a, b in runs], seen, original):
        made[(slice(None), *box)] = part
    np.testing.assert_allclose(made, whole, atol=1e-6)


class Threshold(torch.nn.Module):
    """Class 1 where the prepared value exceeds 0.6."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), 100 * (x - 0.6)], 1)


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_predictions_lie_on_the_inputs_grid(affine):
    image, label = blobs(3, (24, 22, 20))
    plan = Plan({}, {"bright": 7}, ("CT",), (16, 16, 16), inference=Inference(flips=(True, True, False)))
    model = Model(plan, Threshold())  # type: ignore[arg-type]
    np.testing.assert_array_equal(model.label_map(Volume(image[None], Grid(image.shape, affine))), 7 * (label == 1))


def test_the_channels_must_be_the_models():
    plan = Plan({}, {"bright": 1}, ("T1", "T2"), (16, 16, 16))
    with pytest.raises(BadInput, match="T1, T2"):
        Model(plan, Threshold()).label_map(Volume(np.zeros((1, 4, 4, 4)), Grid((4, 4, 4), np.eye(4))))  # type: ignore[arg-type]


class Nested(torch.nn.Module):
    """Region 1 where the prepared value exceeds 0.4, region 2 inside of it from 0.6 on."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([100 * (x - 0.4), 100 * (x - 0.6)], 1)


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_regions_are_written_on_the_inputs_grid(affine):
    image, label = blobs(3, (24, 22, 20))
    image = np.choose(label, (-1000, 0, 1000)).astype(np.int16)
    plan = Plan({}, {"rim": 3, "core": 9}, ("CT",), (16, 16, 16), regions={"whole": (3, 9), "core": (9,)})
    assert plan.outputs == 2
    model = Model(plan, Nested())  # type: ignore[arg-type]
    np.testing.assert_array_equal(model.label_map(Volume(image[None], Grid(image.shape, affine))), np.choose(label, (0, 3, 9)))


def tiny_model() -> Model:
    plan = Plan({"name": "unet", "arguments": {"width": 2, "depth": 2, "norm": "batch"}}, {"a": 2, "b": 5}, ("CT",), (8, 8, 8))
    return Model(plan, plan.network())


def test_write_and_read(tmp_path):
    model = tiny_model()
    write_model(tmp_path, model)
    read = read_model(tmp_path)
    assert read.plan == model.plan
    assert all(torch.equal(a, b) for a, b in zip(model.net.state_dict().values(), read.net.state_dict().values(), strict=True))


def test_regions_are_kept_in_order_and_a_model_without_them_is_read(tmp_path):
    net = {"name": "unet", "arguments": {"width": 2, "depth": 2, "norm": "batch"}}
    regions = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    plan = Plan(net, {"a": 1, "b": 2, "c": 4}, ("T1",), (8, 8, 8), regions=regions)
    write_model(tmp_path / "regions", Model(plan, plan.network()))
    read = read_model(tmp_path / "regions")
    assert list(read.plan.regions.items()) == list(regions.items())
    assert read.net(torch.zeros(1, 1, 8, 8, 8)).shape[1] == 3
    write_model(tmp_path / "old", tiny_model())
    values = json.loads((tmp_path / "old" / "model.json").read_text())
    assert values.pop("regions") == {}
    (tmp_path / "old" / "model.json").write_text(json.dumps(values | {"schema": 1}))
    assert read_model(tmp_path / "old").plan == tiny_model().plan


def test_a_changed_or_absent_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"model\.json"):
        read_model(tmp_path)
    write_model(tmp_path, tiny_model())
    with open(tmp_path / "model.safetensors", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(BadInput, match="another"):
        read_model(tmp_path)
