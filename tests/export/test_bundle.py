"""The bundle: written and read to the bit; refused with the full list when it does not fit or was changed."""

import hashlib
import json

import pytest
import torch

from volssl import load_decoder, load_encoder, match_weights
from volssl.export import bundle
from volssl.files import BadInput
from volssl.nets.folded import FoldedUNet
from volssl.nets.resenc import ResEncUNet
from volssl.nets.swinunetr import SwinUNETR
from volssl.nets.unet import UNet


def card(net, **changes):
    facts = {
        "architecture": {"name": "unet", "arguments": net.arguments},
        "in_channels": net.arguments["in_channels"],
        "spacing_mm": (1.0, 1.0, 1.0),
        "orientation": "RAS",
        "intensity": {"modality": "CT", "clip": [-1024, 3071], "window": [-1000, 1000], "normalisation": "zscore"},
        "method": "pcrlv2",
        "recipe": {},
        "steps": 3,
        "data": {"train_scans": 2, "train_patients": 2},
        "volssl_version": "0",
        "citations": ("x",),
    }
    return bundle.Card(**(facts | changes))


@pytest.fixture
def written(tmp_path):
    torch.manual_seed(0)
    net = UNet(width=4, depth=3)
    return net, bundle.write(tmp_path / "bundle", net.encoder, card(net))


def test_round_trip(written):
    net, folder = written
    encoder, facts = bundle.load_encoder(folder)
    for name, tensor in net.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    maps = encoder(torch.rand(1, 1, 16, 16, 16))
    assert [m.shape[2] for m in maps] == [16, 8, 4]
    assert facts["schema"] == 1 and facts["architecture"]["arguments"]["width"] == 4
    assert "sha256" in (folder / "README.md").read_text()


def test_a_run_folder_is_accepted(written):
    _, folder = written
    assert bundle.load_bundle(folder.parent).card["method"] == "pcrlv2"


def test_one_missing_one_extra_one_misshapen_are_all_listed(written):
    _, folder = written
    loaded = bundle.load_bundle(folder)
    names = list(loaded.state)
    missing = loaded.state.pop(names[0])
    loaded.state["not.there"] = missing
    loaded.state[names[1]] = torch.zeros(3)
    target = UNet(width=4, depth=3).encoder
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(BadInput) as caught:
        bundle.into(target, loaded)
    told = str(caught.value)
    assert f"missing in the bundle: {names[0]}" in told
    assert "left over in the bundle: not.there" in told
    assert f"misshapen: {names[1]}, bundle (3,)" in told
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_another_architecture_is_refused(written):
    _, folder = written
    with pytest.raises(BadInput, match="does not fit this encoder"):
        bundle.into(UNet(width=8, depth=3).encoder, bundle.load_bundle(folder))


def test_first_convolution_is_widened_by_repeat_over_n(written):
    net, folder = written
    wide = UNet(4, width=4, depth=3).encoder
    bundle.into(wide, bundle.load_bundle(folder))
    x = torch.rand(1, 1, 8, 8, 8)
    net.eval(), wide.eval()
    torch.testing.assert_close(wide(x.expand(-1, 4, -1, -1, -1))[-1], net.encoder(x)[-1], atol=1e-5, rtol=1e-4)


def test_changed_weights_and_newer_schema_are_refused(written):
    _, folder = written
    weights = folder / "encoder.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(BadInput, match="sha256"):
        bundle.load_bundle(folder)
    weights.write_bytes(original[: len(original) // 2])
    with pytest.raises(BadInput, match="sha256"):
        bundle.load_bundle(folder)
    weights.write_bytes(original)
    facts = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(facts | {"schema": 2}))
    with pytest.raises(BadInput, match="update volssl"):
        bundle.load_bundle(folder)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BadInput, match="must be a bundle"):
        bundle.load_bundle(tmp_path)


def test_a_folded_encoder_is_widened_too(tmp_path):
    torch.manual_seed(0)
    net = FoldedUNet(width=4, depth=2)
    facts = card(net, architecture={"name": "folded", "arguments": net.arguments})
    loaded = bundle.load_bundle(bundle.write(tmp_path / "bundle", net.encoder, facts))
    wide = FoldedUNet(3, width=4, depth=2).encoder
    bundle.into(wide, loaded)
    x = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(wide(x.expand(-1, 3, -1, -1, -1))[-1], net.encoder(x)[-1], atol=1e-5, rtol=1e-4)


@pytest.fixture
def with_decoder(tmp_path):
    torch.manual_seed(0)
    net = UNet(width=4, depth=3)
    return net, bundle.write(tmp_path / "whole", net.encoder, card(net), decoder=net.decoder)


@pytest.mark.parametrize("skips", [False, True])
def test_encoder_and_decoder_together_give_the_maps_of_the_net(tmp_path, skips):
    torch.manual_seed(0)
    net = UNet(width=4, depth=3, skips=skips).eval()
    folder = bundle.write(tmp_path / "whole", net.encoder, card(net), decoder=net.decoder)
    (encoder, facts), (decoder, again) = load_encoder(folder), load_decoder(folder)
    assert facts == again and facts["decoder"]["skips"] is skips
    assert facts["decoder"]["sha256"] == hashlib.sha256((folder / "decoder.safetensors").read_bytes()).hexdigest()
    x = torch.rand(1, 1, 8, 8, 16)
    with torch.no_grad():
        for one, other in zip(net(x), decoder(encoder(x)), strict=True):
            assert torch.equal(one, other)
    assert "load_decoder" in (folder / "README.md").read_text()


def test_a_bundle_without_a_decoder_says_so(written):
    _, folder = written
    assert bundle.load_bundle(folder).decoder is None and "decoder" not in json.loads((folder / "card.json").read_text())
    with pytest.raises(BadInput, match="found an encoder alone"):
        load_decoder(folder)


def test_an_encoder_written_over_a_whole_bundle_leaves_no_decoder(with_decoder):
    net, folder = with_decoder
    bundle.write(folder, net.encoder, card(net))
    assert not (folder / "decoder.safetensors").exists() and bundle.load_bundle(folder).decoder is None


def test_missing_extra_and_misshapen_decoder_tensors_are_all_listed(with_decoder):
    _, folder = with_decoder
    loaded = bundle.load_bundle(folder)
    first, second, *_ = loaded.decoder
    loaded.decoder["not.there"] = loaded.decoder.pop(first)
    loaded.decoder[second] = torch.zeros(3)
    target = UNet(width=4, depth=3).decoder
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(BadInput) as caught:
        bundle.into(target, loaded, part="decoder")
    told = str(caught.value)
    faults = (f"missing in the bundle: {first}", "left over in the bundle: not.there", f"misshapen: {second}")
    for part in ("does not fit this decoder: 3 of", *faults):
        assert part in told
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_a_decoder_without_skips_does_not_enter_one_with_them(with_decoder):
    _, folder = with_decoder
    with pytest.raises(BadInput, match=r"misshapen: steps.0.block.conv.weight"):
        bundle.into(UNet(width=4, depth=3, skips=True).decoder, bundle.load_bundle(folder), part="decoder")


def test_a_changed_lost_or_unnamed_decoder_is_refused(with_decoder):
    _, folder = with_decoder
    weights = folder / "decoder.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(BadInput, match=r"decoder.safetensors: must be the file its card was written for"):
        bundle.load_bundle(folder)
    weights.unlink()
    with pytest.raises(BadInput, match=r"decoder.safetensors: must exist"):
        load_encoder(folder)
    weights.write_bytes(original)
    facts = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(facts | {"decoder": {"skips": False}}))
    with pytest.raises(BadInput, match="must hold `skips` and `sha256`"):
        bundle.load_bundle(folder)
    del facts["decoder"]
    (folder / "card.json").write_text(json.dumps(facts))
    with pytest.raises(BadInput, match="must name its sha256 under `decoder`"):
        bundle.load_bundle(folder)


@pytest.mark.parametrize(
    "name, make",
    [
        ("resenc", lambda channels: ResEncUNet(channels, features=(4, 6), blocks=(1, 1))),
        ("swinunetr", lambda channels: SwinUNETR(channels, width=3, depths=(1,), window=3)),
    ],
)
def test_encoders_of_other_packages_are_widened_too(tmp_path, name, make):
    torch.manual_seed(0)
    net = make(1)
    facts = card(net, architecture={"name": name, "arguments": net.arguments})
    loaded = bundle.load_bundle(bundle.write(tmp_path / "bundle", net.encoder, facts, decoder=net.decoder))
    wide = make(3).encoder
    bundle.into(wide, loaded)
    x = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(wide(x.expand(-1, 3, -1, -1, -1))[-1], net.encoder(x)[-1], atol=1e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="does not fit this encoder"):
        bundle.into(UNet(width=4, depth=3).encoder, loaded)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"width": 2**20, "depth": 3}, "no number may be above"),
        ({"width": 2, "depth": 12_000}, "12000 layers cannot have weights"),
        ({"width": 8192, "depth": 3}, "must be that of the encoder's weights"),
        ({"width": 4, "depth": 2}, "must be that of the encoder's weights"),
    ],
)
def test_a_card_that_asks_for_another_net_than_its_weights_is_refused_before_it_is_built(written, arguments, told):
    _, folder = written
    facts = json.loads((folder / "card.json").read_text())
    facts["architecture"]["arguments"] |= arguments
    (folder / "card.json").write_text(json.dumps(facts))
    with pytest.raises(BadInput, match=told):
        load_encoder(folder)


def test_the_report_names_matched_missing_left_over_and_misshapen_tensors(written):
    net, folder = written
    loaded = bundle.load_bundle(folder)
    whole = match_weights(net.encoder, loaded)
    assert whole.fits and set(whole.matched) == set(net.encoder.state_dict()) and whole.lines() == []
    names = list(loaded.state)
    loaded.state["not.there"] = loaded.state.pop(names[0])
    loaded.state[names[1]] = torch.zeros(3)
    found = match_weights(net.encoder, loaded)
    assert not found.fits and set(found.matched) == set(names[2:])
    assert list(found.missing) == [names[0]] and list(found.left_over) == ["not.there"]
    assert found.misshapen == {names[1]: ((3,), tuple(net.encoder.state_dict()[names[1]].shape))}
    assert len(found.lines()) == 3


def test_an_encoder_is_loaded_for_more_channels(written):
    net, folder = written
    wide, _ = load_encoder(folder, in_channels=4)
    x = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(wide(x.expand(-1, 4, -1, -1, -1))[-1], net.eval().encoder(x)[-1], atol=1e-5, rtol=1e-4)


def test_a_pickle_in_place_of_the_weights_is_not_executed(written):
    _, folder = written
    torch.save({"a": torch.zeros(1)}, folder / "encoder.safetensors")
    facts = json.loads((folder / "card.json").read_text())
    digest = hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(facts | {"sha256": digest}))
    with pytest.raises(BadInput, match="must be a whole safetensors file"):
        load_encoder(folder)
