"""Verb export: a proven bundle comes out as it went in; a bad one is refused before anything is touched."""

from __future__ import annotations

import pytest
import torch

from volssl import load_decoder, load_encoder
from volssl.export import bundle, run
from volssl.files import BadInput, write_json
from volssl.nets.unet import UNet


@pytest.fixture
def folder(tmp_path):
    """A run folder that holds a bundle of a narrow net."""
    net = UNet(width=2, depth=2)
    card = bundle.Card(
        architecture={"name": "unet", "arguments": net.arguments},
        in_channels=1,
        spacing_mm=(1.0, 1.0, 1.0),
        orientation="RAS",
        intensity={"modality": "CT", "clip": [-1024, 3071], "window": [-1000, 1000], "normalisation": "none"},
        method="pcrlv2",
        recipe={},
        steps=0,
        data={},
        volssl_version="0",
        citations=(),
    )
    bundle.write(tmp_path / "run" / "bundle", net.encoder, card, decoder=net.decoder)
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "bundle"])
def test_a_run_and_its_bundle_export_alike(folder, tmp_path, inside):
    out = run(folder / inside, to="bundle", out=tmp_path / "out").out
    assert {path.name for path in out.iterdir()} == {"encoder.safetensors", "decoder.safetensors", "card.json", "README.md", "export.json"}
    x_BCXYZ = torch.randn(1, 1, 8, 8, 8)
    (before, _), (after, card) = load_encoder(folder), load_encoder(out)
    for one, other in zip(before(x_BCXYZ), after(x_BCXYZ), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(load_decoder(folder)[0](before(x_BCXYZ)), load_decoder(out)[0](after(x_BCXYZ)), strict=True):
        assert torch.equal(one, other)
    assert card["method"] == "pcrlv2"
    run(folder, to="bundle", out=out, overwrite=True)
    with pytest.raises(BadInput, match="must be new or empty"):
        run(folder, to="bundle", out=out)


def test_an_unknown_format_lists_the_known(folder, tmp_path):
    with pytest.raises(BadInput, match="--to onyx: must be one of bundle, nnunet"):
        run(folder, to="onyx", out=tmp_path / "out")


def test_a_damaged_bundle_leaves_out_untouched(folder, tmp_path):
    out = run(folder, to="bundle", out=tmp_path / "out").out
    weights = folder / "bundle" / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(BadInput, match="sha256"):
        run(folder, to="bundle", out=out, overwrite=True)
    load_encoder(out)


def test_the_source_is_never_overwritten(folder):
    for out in (folder, folder / "bundle"):
        with pytest.raises(BadInput, match="outside the source"):
            run(folder / "bundle", to="bundle", out=out, overwrite=True)


def test_an_encoder_alone_is_exported_alone(folder, tmp_path):
    whole = bundle.load_bundle(folder)
    (folder / "bundle" / "decoder.safetensors").unlink()
    write_json(folder / "bundle" / "card.json", {key: value for key, value in whole.card.items() if key != "decoder"})
    out = run(folder, to="bundle", out=tmp_path / "out").out
    assert {path.name for path in out.iterdir()} == {"encoder.safetensors", "card.json", "README.md", "export.json"}
    assert bundle.load_bundle(out).decoder is None
