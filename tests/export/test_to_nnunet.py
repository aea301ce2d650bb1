"""nnU-Net's export: turned kernels see a turned image as volssl's the image; every name nnU-Net asks for; plans that pin the network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from volssl.export import Options, bundle, run
from volssl.export.nnunet import check, turned, weights_of
from volssl.export.nnunet_plans import _untransposed, name_of
from volssl.files import BadInput, read_json
from volssl.nets.resenc import ResEncUNet
from volssl.nets.unet import UNet

NET = {"features": (4, 6, 8), "blocks": (1, 2, 1), "strides": (1, (2, 2, 1), 2), "kernels": ((3, 3, 1), 3, 3)}
INTENSITY = {"modality": "CT", "clip": [-1024, 3071], "window": [-200, 300], "percentiles": None, "normalisation": "zscore"}


def made(folder, *, skips=False, with_decoder=True, net=None, name="resenc", **changes):
    torch.manual_seed(0)
    net = ResEncUNet(**NET, skips=skips) if net is None else net
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    facts = {
        "architecture": {"name": name, "arguments": net.arguments},
        "in_channels": net.arguments["in_channels"],
        "spacing_mm": (1.0, 1.5, 3.0),
        "orientation": "RAS",
        "intensity": INTENSITY,
        "method": "pcrlv2",
        "recipe": {},
        "steps": 3,
        "data": {},
        "volssl_version": "0",
        "citations": ("Zhou 2023",),
        "patch_vox": (16, 24, 8),
    }
    bundle.write(folder, net.encoder, bundle.Card(**(facts | changes)), decoder=net.decoder if with_decoder else None)
    return net.eval()


def loaded(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)


def stock(channels=1, classes=3):
    """As nnU-Net builds it from its plans, axes Z Y X written out by hand."""
    return ResidualEncoderUNet(
        channels,
        3,
        (4, 6, 8),
        nn.Conv3d,
        [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        [1, 2, 1],
        classes,
        [1, 1],
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def filled(network, weights):
    """Loaded as nnU-Net loads: every name but the segmentation layers'."""
    state = network.state_dict()
    wanted = {name for name in state if ".seg_layers." not in name}
    assert wanted == set(weights)
    network.load_state_dict(state | weights)
    return network


def turn(x_BCXYZ):
    return x_BCXYZ.transpose(2, 4)


@pytest.fixture
def exported(tmp_path):
    net = made(tmp_path / "run" / "bundle", skips=True)
    out = run(tmp_path / "run", to="nnunet", out=tmp_path / "out").out
    return net, out


def test_a_turned_image_gives_turned_maps_in_the_stock_network(exported):
    net, out = exported
    network = filled(stock(), loaded(out)["network_weights"]).eval()
    x = torch.randn(2, 1, 16, 8, 4)
    features = net.encoder(x)
    for one, other in zip(features, network.encoder(turn(x)), strict=True):
        torch.testing.assert_close(turn(one), other, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(one.mean((0, 1)).flatten(), other.mean((0, 1)).flatten(), atol=1e-3)  # the order of axes is seen
    # A decoder with skips comes whole, so the logits are those of the same segmentation layers on volssl's maps.
    for layer, logits, decoded in zip(network.decoder.seg_layers[::-1], network(turn(x)), net(x)[::-1], strict=True):
        torch.testing.assert_close(layer(turn(decoded)), logits, atol=1e-4, rtol=1e-4)


def test_four_names_of_one_tensor_hold_the_same(exported):
    weights = loaded(exported[1])["network_weights"]
    inner = "stages.1.blocks.0.conv1"
    four = [f"{part}.{inner}.{layer}.weight" for part in ("encoder", "decoder.encoder") for layer in ("conv", "all_modules.0")]
    assert all(torch.equal(weights[name], weights[four[0]]) for name in four)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    assert len({weights[name].data_ptr() for name in four}) == 1  # and stand in the file once


def test_names_and_shapes_are_those_that_nnunet_was_seen_to_have(tmp_path):
    """tests/export/nnunet_keys.json was written down from nnU-Net's own network by tools/check_nnunet.py."""
    recorded = read_json(Path(__file__).parent / "nnunet_keys.json")
    made(tmp_path / "bundle")
    out = run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=Options(channels=recorded["channels"])).out
    wanted = {name: shape for name, shape in recorded["shapes"].items() if ".seg_layers." not in name}
    assert {name: list(tensor.shape) for name, tensor in loaded(out)["network_weights"].items()} == wanted
    assert len(wanted) > 150 and json.loads(json.dumps(NET)) == recorded["net"]


def test_what_a_decoder_without_skips_lacks_is_fresh_and_said(tmp_path):
    net = made(tmp_path / "bundle")
    outcome = run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out")
    weights = loaded(outcome.out)["network_weights"]
    for number in (0, 1):
        up = net.decoder.state_dict()[f"transpconvs.{number}.weight"]
        assert torch.equal(weights[f"decoder.transpconvs.{number}.weight"], turn(up))
        assert weights[f"decoder.stages.{number}.convs.0.norm.weight"].eq(1).all()  # nnU-Net's own beginning, not the pretraining's
        assert weights[f"decoder.stages.{number}.convs.0.conv.bias"].eq(0).all()
    told = "encoder and decoder.transpconvs.0, decoder.transpconvs.1 come from the pretraining; freshly initialised: decoder.stages.0"
    assert told in outcome.message and "freshly initialised: decoder.stages.0, decoder.stages.1" in (outcome.out / "README.md").read_text()
    again = run(tmp_path / "bundle", to="nnunet", out=tmp_path / "again").out
    assert (again / "checkpoint.pth").read_bytes() == (outcome.out / "checkpoint.pth").read_bytes()


def test_an_encoder_alone_gets_a_fresh_decoder(tmp_path):
    net = made(tmp_path / "bundle", with_decoder=False)
    outcome = run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out")
    assert outcome.message.startswith("encoder comes from the pretraining; freshly initialised: decoder.transpconvs.0")
    network = filled(stock(), loaded(outcome.out)["network_weights"]).eval()
    x = torch.randn(1, 1, 8, 8, 4)
    torch.testing.assert_close(turn(net.encoder(x)[-1]), network.encoder(turn(x))[-1], atol=1e-4, rtol=1e-4)


def test_one_channel_feeds_a_network_of_four(tmp_path):
    net = made(tmp_path / "bundle")
    out = run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=Options(channels=4)).out
    network = filled(stock(4), loaded(out)["network_weights"]).eval()
    x = torch.randn(1, 1, 8, 8, 4)
    torch.testing.assert_close(turn(net.encoder(x)[-1]), network.encoder(turn(x).expand(-1, 4, -1, -1, -1))[-1], atol=1e-4, rtol=1e-4)
    assert loaded(out)["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 4
    assert len(read_json(out / "nnUNetPlans.json")["configurations"]["3d_fullres"]["normalization_schemes"]) == 4


def test_newer_nnunet_finds_what_it_reads(exported):
    """The reads of `preprocess_like_nnssl` and of its trainer's `load_pretrained_weights`, one after the other."""
    net, out = exported
    saved = loaded(out)
    plan, weights = saved["nnssl_adaptation_plan"], saved["network_weights"]
    architecture = dict(plan["architecture_plans"])
    assert architecture.pop("arch_class_name").endswith("ResidualEncoderUNet") and "norm_op" in architecture.pop(
        "arch_kwargs_requiring_import"
    )
    assert architecture["arch_kwargs"] == plan["architecture_kwargs"] and architecture["arch_kwargs"]["strides"][1] == [1, 2, 2]
    configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
    assert configuration["spacing"] == [3.0, 1.5, 1.0] and configuration["patch_size"] == [8, 24, 16]
    assert plan["recommended_downstream_patchsize"] == [8, 24, 16] and plan["key_to_lpe"] is None
    assert saved["citations"][0].keys() >= {"type", "name", "apa_citations"} and saved["citations"][0]["apa_citations"] == ["Zhou 2023"]
    assert plan["key_to_stem"] not in weights  # the stem does not lie in the encoder's stages
    network = stock(3)
    of_stages, of_stem = (
        {name.removeprefix(f"{key}."): tensor for name, tensor in weights.items() if name.startswith(key)}
        for key in (plan["key_to_encoder"], plan["key_to_stem"])
    )
    wide = weights[plan["keys_to_in_proj"][0] + ".weight"].repeat(1, 3, 1, 1, 1) / 3
    of_stem |= {f"{key}.weight".removeprefix("encoder.stem."): wide for key in plan["keys_to_in_proj"]}
    network.get_submodule("encoder.stages").load_state_dict(of_stages)
    network.get_submodule("encoder.stem").load_state_dict(of_stem)
    x = torch.randn(1, 1, 8, 8, 4)
    found = network.eval().encoder(turn(x).expand(-1, 3, -1, -1, -1))[-1]
    torch.testing.assert_close(turn(net.encoder(x)[-1]), found, atol=1e-4, rtol=1e-4)


PLANNED = {
    "dataset_name": "Dataset042_Thing",
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [5.0, 0.9, 0.8],
    "original_median_shape_after_transp": [30, 120, 110],
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [2, 0, 1],
    "transpose_backward": [1, 2, 0],
    "configurations": {
        "2d": {},
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "batch_size": 3,
            "patch_size": [20, 63, 50],
            "median_image_size_in_voxels": [30.0, 120.0, 110.0],
            "spacing": [5.0, 0.9, 0.8],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "use_mask_for_norm": [False, True],
            "batch_dice": True,
        },
    },
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 900.0, "std": 80.0, "median": 1.0, "min": -9.0, "max": 9.0, "percentile_00_5": -900.0, "percentile_99_5": 900.0},
        "1": {"mean": 5.0, "std": 6.0, "percentile_00_5": 0.0, "percentile_99_5": 9.0},
    },
}


def planned(folder, **changes):
    (folder / "nnUNetPlans.json").write_text(json.dumps(PLANNED | changes))
    return folder / "nnUNetPlans.json"


def test_plans_pin_the_network_and_keep_the_rest(tmp_path):
    made(tmp_path / "bundle")
    out = run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=Options(plans=planned(tmp_path))).out
    plans, card = read_json(out / "nnUNetPlans.json"), read_json(tmp_path / "bundle" / "card.json")
    pinned = plans["configurations"].pop("3d_fullres")
    assert plans["configurations"] == {} and plans["plans_name"] == name_of(card) == f"volsslPlans_{card['sha256'][:8]}"
    assert (plans["dataset_name"], plans["transpose_forward"], plans["transpose_backward"]) == ("Dataset042_Thing", [0, 1, 2], [0, 1, 2])
    # nnU-Net had put the last axis first: 20 lay along the third, 63 along the first, 50 along the second; strides in all 2, 4, 4.
    assert plans["original_median_spacing_after_transp"] == [0.9, 0.8, 5.0] and pinned["patch_size"] == [64, 48, 20]
    assert pinned["spacing"] == [3.0, 1.5, 1.0] and pinned["batch_size"] == 3 and pinned["batch_dice"] is True
    assert pinned["architecture"]["arch_kwargs"]["kernel_sizes"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert pinned["data_identifier"] == f"{plans['plans_name']}_3d_fullres"
    shown = plans["foreground_intensity_properties_per_channel"]
    assert (shown["0"]["percentile_00_5"], shown["0"]["percentile_99_5"], shown["0"]["mean"], shown["0"]["std"]) == (-200, 300, 300, 80)
    assert shown["1"] == PLANNED["foreground_intensity_properties_per_channel"]["1"]  # another modality stays as planned
    assert pinned["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"] and pinned["use_mask_for_norm"] == [False, True]
    assert loaded(out)["network_weights"]["encoder.stem.convs.0.conv.weight"].shape[1] == 2  # one for each channel of the plans
    told = (out / "README.md").read_text()
    assert f"nnUNetv2_train 042 3d_fullres 0 -p {plans['plans_name']} -pretrained_weights checkpoint.pth" in told


def test_a_window_without_further_normalisation_is_shown_to_the_letter(tmp_path):
    """nnU-Net's CT scheme: clipped, minus mean, divided by deviation; here [low, high] must become [0, 1]."""
    made(tmp_path / "bundle", intensity=INTENSITY | {"normalisation": "none"})
    for options in (Options(plans=planned(tmp_path)), Options()):
        run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=options, overwrite=True)
        shown = read_json(tmp_path / "out" / "nnUNetPlans.json")["foreground_intensity_properties_per_channel"]["0"]
        values = [min(max(hu, shown["percentile_00_5"]), shown["percentile_99_5"]) for hu in (-1000, -200, 50, 300, 900)]
        assert [(hu - shown["mean"]) / shown["std"] for hu in values] == [0, 0, 0.5, 1, 1]


def test_axes_are_put_back_where_the_images_have_them():
    assert _untransposed([30, 10, 20], [2, 0, 1]) == [10, 20, 30]


def test_plans_that_are_none(tmp_path):
    made(tmp_path / "bundle")
    two = {"configurations": {"2d": {}}}
    odd = {"configurations": {"3d_fullres": {"spacing": [1, 1], "patch_size": 3}}, "transpose_forward": [0, 0, 1]}
    for content, told in (
        ({}, "must be an nnUNetPlans.json"),
        (PLANNED | {"configurations": []}, "must be an nnUNetPlans.json"),
        (PLANNED | two, "must plan 3d_fullres; found 2d"),
        (PLANNED | odd, "patch_size must be.*spacing must be.*transpose_forward must be.*normalization_schemes must name"),
        (PLANNED | {"foreground_intensity_properties_per_channel": {"0": {}}}, "normalization_schemes must name"),
    ):
        (tmp_path / "plans.json").write_text(json.dumps(content))
        with pytest.raises(BadInput, match=told):
            run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=Options(plans=tmp_path / "plans.json"))
    with pytest.raises(BadInput, match="must be the 2 of the plans; found 3"):
        run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=Options(planned(tmp_path), 3))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "net, name, told",
    [
        (lambda: UNet(width=2, depth=2), "unet", "must be resenc.*found unet.*net.name=resenc"),
        (lambda: ResEncUNet(features=(4, 6), blocks=(1, 1)), "resenc", "at least 3 stages.*found 2 stages, 1 decoder level"),
        (lambda: ResEncUNet(**NET, norm="batch"), "resenc", "norm must be instance, as nnU-Net's; found batch"),
        (lambda: ResEncUNet(2, **NET), "resenc", "--channels must be a multiple of the encoder's 2; found 3"),
    ],
)
def test_a_net_that_nnunet_does_not_build_is_refused_before_anything_is_written(tmp_path, net, name, told):
    made(tmp_path / "bundle", net=net(), name=name)
    with pytest.raises(BadInput, match=told):
        run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out", options=Options(channels=3))
    assert not (tmp_path / "out").exists()


def test_all_that_does_not_fit_comes_at_once(tmp_path):
    made(tmp_path / "bundle", net=ResEncUNet(features=(4, 8), blocks=(1, 1), norm="group"))
    with pytest.raises(BadInput, match="norm must be.*at least 3 stages"):
        run(tmp_path / "bundle", to="nnunet", out=tmp_path / "out")


def test_the_check_after_writing_would_find_a_fault(tmp_path, exported):
    _, out = exported
    saved = loaded(out)
    layers = saved["nnssl_adaptation_plan"]["architecture_kwargs"]
    check(out / "checkpoint.pth", layers, 1)
    weights = saved["network_weights"]
    weights["extra"] = weights.pop("decoder.transpconvs.0.bias")
    weights["encoder.stem.convs.0.conv.weight"] = weights["encoder.stem.convs.0.conv.weight"].transpose(2, 4)
    torch.save(saved, tmp_path / "broken.pth")
    with pytest.raises(BadInput) as caught:
        check(tmp_path / "broken.pth", layers, 1)
    for told in ("missing: decoder.transpconvs.0.bias", "left over: extra", "misshapen: encoder.stem.convs.0.conv.weight"):
        assert told in str(caught.value)


def test_only_kernels_are_turned():
    state = turned({"a": torch.arange(24.0).view(1, 1, 2, 3, 4), "b": torch.arange(3.0)})
    assert state["a"].shape == (1, 1, 4, 3, 2) and state["a"][0, 0, 3, 1, 0] == 7 and state["b"].tolist() == [0, 1, 2]


def test_a_run_exports_after_its_store_is_gone(tmp_path, exported):
    shutil.rmtree(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing but the bundle is there to be read
    assert run(tmp_path / "run", to="nnunet", out=tmp_path / "out").out.is_dir()


def test_formats_refuse_what_they_do_not_take_and_replace_their_own(tmp_path, exported):
    with pytest.raises(BadInput, match="--channels: is not for --to bundle"):
        run(tmp_path / "run", to="bundle", out=tmp_path / "other", options=Options(channels=2))
    for to in ("bundle", "nnunet"):
        run(tmp_path / "run", to=to, out=tmp_path / "other", overwrite=True)
        assert read_json(tmp_path / "other" / "export.json")["format"] == to
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
        "README.md",
        "checkpoint.pth",
        "export.json",
        "nnUNetPlans.json",
    ]


def test_the_random_state_of_the_caller_stays(tmp_path, exported):
    state = torch.get_rng_state()
    loaded_bundle = bundle.load_bundle(tmp_path / "run")
    weights_of(loaded_bundle, loaded(exported[1])["nnssl_adaptation_plan"]["architecture_kwargs"], 1)
    assert torch.equal(torch.get_rng_state(), state)
