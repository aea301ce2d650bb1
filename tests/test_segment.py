"""Geometry and intensities: what the network sees, and the way back to the image's own grid."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from labelled import blobs
from monai.inferers.utils import sliding_window_inference

from volssl.compiling import multiplies_bf16
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


def by_monai(model, volume):
    """The label map as it was made before there were slabs: all shares at once, by MONAI, then moved as a whole."""
    plan = model.plan
    prepared = plan.preparation.image(volume)

    @torch.no_grad()
    def shares(x):
        x = plan.preparation.patch(x)
        made = []
        for flips in itertools.product(*((False, True) if flip else (False,) for flip in plan.inference.flips)):
            axes = [2 + axis for axis, flip in enumerate(flips) if flip]
            logits = model.net(x.flip(axes))
            made.append((logits.sigmoid() if plan.regions else logits.softmax(1)).flip(axes))
        return torch.stack(made).mean(0)

    x = torch.from_numpy(np.ascontiguousarray(prepared.array_CXYZ))[None]
    made = sliding_window_inference(x, plan.patch_vox, 2, shares, overlap=plan.inference.overlap, mode="gaussian")[0].numpy()
    turned = volume.grid.reoriented("RAS")
    if not prepared.grid.almost_equal(turned):
        made = resample(Volume(made, prepared.grid), turned).array_CXYZ
    if plan.regions:
        label = np.zeros(turned.shape_vox, np.uint8)
        for (_, values), share in zip(plan.regions.items(), made, strict=True):
            label[share >= 0.5] = values[0]
    else:
        label = np.array(plan.values, np.uint8)[made.argmax(0)]
    return Volume(label[None], turned).reoriented(volume.grid.orientation).array_CXYZ[0]


REGIONS = {"whole": (2, 1), "core": (1,)}


@pytest.mark.parametrize("regions", [{}, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("spacing_mm", [None, (1.1, 0.7, 1.9)])
@pytest.mark.parametrize("affine", [GRIDS["anisotropic"], GRIDS["oblique"]], ids=["anisotropic", "oblique"])
def test_label_maps_are_those_of_monai(affine, spacing_mm, regions):
    inference = Inference(overlap=0.5, flips=(True, False, True), precision="fp32", skip_air=False)
    net = {"name": "unet", "arguments": {"in_channels": 2, "width": 4, "depth": 2, "norm": "instance"}}
    plan = Plan(
        net,
        {"core": 1, "rest": 2},
        ("T1", "T2"),
        (16, 12, 16),
        preparation=Preparation(spacing_mm, "zscore", patches="zscore"),
        inference=inference,
        regions=regions,
    )
    torch.manual_seed(3)
    model = Model(plan, plan.network().eval())
    image = np.stack([blobs(seed, (31, 22, 25))[0] for seed in range(2)])
    volume = Volume(image, Grid(image.shape[1:], affine))
    ours, theirs = model.label_map(volume), by_monai(model, volume)
    assert len(np.unique(theirs)) > 1
    # Sums of floats in another order: a voxel between two classes may fall to either side.
    assert (ours != theirs).mean() < 1e-3


def windowed(**inference):
    plan = Plan(tiny_model().plan.architecture, {"a": 2, "b": 5}, ("CT",), (8, 8, 8), inference=Inference(**inference))
    torch.manual_seed(0)
    return Model(plan, plan.network().eval())


def test_air_is_background_where_the_recipe_says_so():
    array = np.full((1, 24, 16, 16), -1200, np.int16)
    array[:, :6] = 40
    volume = Volume(array, Grid((24, 16, 16), np.eye(4)))
    biased = {skip: windowed(skip_air=skip) for skip in (True, False)}
    for model in biased.values():
        with torch.no_grad():
            model.net.heads[0].bias.copy_(torch.tensor([0.0, 0.0, 50.0]))  # finds label 5 wherever it looks
    assert (biased[False].label_map(volume) == 5).all()
    found = biased[True].label_map(volume)
    assert (found[:6] == 5).all() and (found[12:] == 0).all()
    plan = replace(biased[True].plan, preparation=Preparation(normalisation="zscore"))  # in MR nothing is left out
    assert (Model(plan, biased[True].net).label_map(volume) == 5).all()


def test_precision_reaches_the_network():
    volume = Volume(np.random.default_rng(0).integers(-900, 900, (1, 12, 12, 12)).astype(np.int16), Grid((12, 12, 12), np.eye(4)))
    made = {}
    for precision in ("fp32", "bf16"):
        kept = []
        windowed(precision=precision).label_map(volume, keep=lambda box, shares, kept=kept: kept.append(shares.clone()))
        made[precision] = torch.cat(kept, 1)
    assert made["bf16"].dtype == torch.float32
    assert 0 < (made["bf16"] - made["fp32"]).abs().max() < 0.05
    assert windowed().precision == ("bf16" if multiplies_bf16("cpu") else "fp32")


def test_a_net_in_training_is_used_in_evaluation_and_left_in_training():
    model = windowed()
    model.net.train()
    volume = Volume(np.random.default_rng(0).integers(-900, 900, (1, 12, 12, 12)).astype(np.int16), Grid((12, 12, 12), np.eye(4)))
    first = model.label_map(volume)
    assert model.net.training
    np.testing.assert_array_equal(first, model.label_map(volume))  # statistics of the batch norms did not move
