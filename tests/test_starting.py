"""What a fine-tuning starts from: voxels as the card says, channels by a named policy, the decoder as far as it fits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from volssl import recipe as recipes
from volssl.datasets import Case, CaseTable
from volssl.export import bundle
from volssl.files import BadInput
from volssl.finetune import PARTS
from volssl.nets.folded import FoldedUNet
from volssl.nets.unet import UNet
from volssl.segment import Preparation
from volssl.starting import first_weights, plan_of, taken, told_by_hand

CT = {"modality": "CT", "clip": [-1024, 3071], "window": [-200.0, 300.0], "normalisation": "zscore"}
MR = {"modality": "MR", "clip": [0, 2000], "window": [0.0, 1000.0], "normalisation": "zscore"}
MR_RECIPE = Preparation(spacing_mm=(1.0, 1.0, 1.0), normalisation="zscore", nonzero=True)


def given(intensity=CT, *, net=UNet, decoder=False, spacing_mm=(1.5, 1.5, 2.0)) -> bundle.Bundle:
    torch.manual_seed(7)
    built = net(1, width=2, depth=3, norm="batch")
    name = "unet" if net is UNet else "folded"
    card = {"architecture": {"name": name, "arguments": built.arguments}, "in_channels": 1, "spacing_mm": list(spacing_mm)}
    card |= {"intensity": intensity, "sha256": "0"} | ({"decoder": {"skips": False, "sha256": "0"}} if decoder else {})
    return bundle.Bundle(built.encoder.state_dict(), card, built.decoder.state_dict() if decoder else None)


def made(own, /, *, net="unet", **weights):
    values = {"net": {"name": net, "width": 2, "depth": 3, "norm": "batch"}, "sampling": {"patch_vox": [16, 16, 16]}, "weights": weights}
    return recipes.parse(values, PARTS, "test") | {"preparation": own}


def table(channels=1) -> CaseTable:
    return CaseTable((Case("a", "a", (Path("x"),), None),), {"one": 1}, tuple(f"c{i}" for i in range(channels)))


def preparation(recipe, intensity, /, **weights):
    return plan_of(made(recipe, **weights), table(), given(intensity)).preparation


def test_voxels_are_the_cards_where_it_is_asked():
    own = Preparation(spacing_mm=(1.0, 1.0, 1.0), window=(-1000.0, 1000.0))
    assert plan_of(made(own, preparation="card"), table()).preparation == own  # from scratch
    wanted = Preparation((1.5, 1.5, 2.0), "window", (-200.0, 300.0), patches="zscore")
    assert preparation(own, CT, preparation="card") == wanted
    assert preparation(own, CT, preparation="recipe") == own
    with pytest.raises(BadInput, match=r"(?s)spacing_mm must be.*preparation.window must be"):
        first_weights(plan_of(made(own), table(), given()), given(), made=made(own), seed=0)


def test_an_mr_recipe_keeps_its_brain_where_patches_are_normalised_anyway():
    kept = preparation(MR_RECIPE, MR, preparation="card")
    assert kept == replace(MR_RECIPE, spacing_mm=(1.5, 1.5, 2.0), patches="zscore")
    unscaled = preparation(MR_RECIPE, MR | {"normalisation": "none"}, preparation="card")
    assert unscaled.normalisation == "percentile" and unscaled.nonzero


def test_percentile_and_zscore_are_one_to_a_network_that_normalises_patches():
    from volssl.volume import Grid, Volume

    array = torch.rand(1, 12, 12, 12, generator=torch.Generator().manual_seed(0)).mul(900).numpy()
    volume = Volume(array, Grid((12, 12, 12), torch.eye(4).numpy()))
    seen = []
    for normalisation in ("percentile", "zscore"):
        how = replace(MR_RECIPE, normalisation=normalisation, patches="zscore")
        seen.append(how.patch(torch.from_numpy(how.image(volume).array_CXYZ)[None]))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-4)


def test_ct_weights_reach_mr_only_where_it_is_said():
    for source in ("card", "recipe"):
        with pytest.raises(BadInput, match="data's modality; found one of CT" if source == "card" else "normalisation must be window"):
            first_weights(plan_of(made(MR_RECIPE, preparation=source), table(), given()), given(), made=made(MR_RECIPE), seed=0)
    assert preparation(MR_RECIPE, CT, preparation="card", across_modalities=True) == replace(MR_RECIPE, patches="zscore")


def test_a_preparation_given_by_hand_is_checked_and_not_replaced():
    values = {"weights": {"preparation": "card", "decoder": True}, "preparation": {}}
    assert told_by_hand(values, ["sampling.batch_size=3"]) == values
    assert told_by_hand(values, ["preparation.window=[0, 1]"])["weights"] == {"preparation": "recipe", "decoder": True}


@pytest.mark.parametrize("net", ["unet", "folded"])
@pytest.mark.parametrize("policy", ["repeat", "first", "random"])
def test_four_channels_from_one(net, policy):
    source = given(net=UNet if net == "unet" else FoldedUNet)
    settings = made(MR_RECIPE, net=net, preparation="card", across_modalities=True, channels=policy)
    plan = plan_of(settings, table(4), source)
    built, scratch = first_weights(plan, source, made=settings, seed=3), first_weights(plan, None, made=settings, seed=3)
    name = next(name for name, tensor in source.state.items() if tensor.ndim == 5)
    kernel, old, untrained = built.net.encoder.state_dict()[name], source.state[name], scratch.net.encoder.state_dict()[name]
    n = old.shape[1]
    expected = {"repeat": old.repeat(1, 4, 1, 1, 1) / 4, "first": torch.cat([old, torch.zeros(old.shape[0], 3 * n, 3, 3, 3)], 1)}
    assert torch.equal(kernel, expected.get(policy, untrained))
    others = [key for key in source.state if key != name]
    assert all(torch.equal(built.net.encoder.state_dict()[key], source.state[key]) for key in others)
    assert taken(plan, built, source, settings["weights"])["weights"]["channels"] == policy
    if policy != "random":  # equal channels (repeat) or the first alone give the activations of the source
        x = torch.rand(1, 1, 16, 16, 16)
        one = UNet(1, width=2, depth=3).encoder if net == "unet" else FoldedUNet(1, width=2, depth=3, norm="batch").encoder
        one.load_state_dict(source.state)
        four = x.repeat(1, 4, 1, 1, 1) if policy == "repeat" else torch.cat([x, torch.rand(1, 3, 16, 16, 16)], 1)
        torch.testing.assert_close(built.net.encoder.eval()(four)[-1], one.eval()(x)[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("net", ["unet", "folded"])
def test_the_decoder_comes_along_as_far_as_it_fits(net):
    source = given(net=UNet if net == "unet" else FoldedUNet, decoder=True)
    settings = made(MR_RECIPE, net=net, preparation="card", across_modalities=True, decoder=True)
    plan = plan_of(settings, table(), source)
    built, scratch = first_weights(plan, source, made=settings, seed=3), first_weights(plan, None, made=settings, seed=3)
    said = taken(plan, built, source, settings["weights"])["weights"]["decoder"]
    assert [name.rsplit("steps.")[1] for name in said["untrained_for_skips"]] == ["0.block.conv.weight", "1.block.conv.weight"]
    state, untrained = built.net.decoder.state_dict(), scratch.net.decoder.state_dict()
    assert said["loaded"] == len(state) - 2
    assert source.decoder is not None
    for name, tensor in state.items():
        below = source.decoder[name].shape[1] if tensor.ndim == 5 else None
        assert torch.equal(tensor[:, :below] if below else tensor, source.decoder[name]), name
        if name in said["untrained_for_skips"]:
            assert torch.equal(tensor[:, below:], untrained[name][:, below:]) and tensor.shape[1] > below, name


def test_a_decoder_that_reads_nothing_from_its_skips_gives_the_maps_of_the_bundle():
    source = given(decoder=True)
    settings = made(MR_RECIPE, net="unet", preparation="card", across_modalities=True, decoder=True)
    plan = plan_of(settings, table(), source)
    built = first_weights(plan, source, made=settings, seed=3).net.eval()
    without = UNet(1, width=2, depth=3, norm="batch", skips=False).eval()
    without.encoder.load_state_dict(source.state)
    without.decoder.load_state_dict(source.decoder)
    with torch.no_grad():
        for step in built.decoder.steps:
            step.block.conv.weight[:, step.up.in_channels :] = 0
        image = torch.rand(1, 1, 16, 16, 16)
        found = built(image.repeat(1, len(table().channels), 1, 1, 1))
        for one, other in zip(found, without(image), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_decoder_that_differs_in_more_than_skips_is_refused():
    source = given(decoder=True)
    settings = made(Preparation(), preparation="card", decoder=True)
    plan = plan_of(settings, table(), source)
    assert source.decoder is not None
    odd = dict(source.decoder)
    odd["extra"] = odd.pop("seconds.0.conv.bias")
    odd["seconds.1.conv.bias"] = torch.zeros(9)
    with pytest.raises(BadInput, match=r"(?s)missing.*: seconds.0.*left over.*: extra.*misshapen: seconds.1"):
        first_weights(plan, replace(source, decoder=odd), made=settings, seed=0)
    with pytest.raises(BadInput, match="found an encoder alone"):
        first_weights(plan, given(), made=settings, seed=0)
