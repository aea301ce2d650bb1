"""Every backbone end to end: two steps of PCRLv2 on a tiny store, the bundle of it, and a segmentation network that takes the encoder."""

import pytest
import torch
import yaml
from labelled import write_msd, write_recipe
from safetensors.torch import load_file
from test_pretrain import TINY, make_store, state

from volssl import finetune, load_decoder, load_encoder, predict, pretrain
from volssl.draws import Draws
from volssl.files import BadInput
from volssl.finetune import Options
from volssl.recipe import parse

# Recipe entries: one of every kind of normalisation, sides of the sub-crops (8) that leave more than a voxel, few channels.
NETS = {
    "unet": "{name: unet, width: 3, depth: 3, norm: group}",
    "folded": "{name: folded, width: 4, depth: 2, norm: instance, unfolded: 4}",
    "resenc": "{name: resenc, features: [4, 6, 8], blocks: [1, 1, 2], strides: [1, [2, 2, 1], 2], norm: batch}",
    "swinunetr": "{name: swinunetr, width: 6, depths: [1], window: 3, norm: group}",
}

VIEWS = {
    "crops": {"global_sizes_vox": [[16, 16, 16], [20, 20, 16]], "locals": 2, "local_sizes_vox": [[8, 8, 8]]},
    "out_vox": [[16, 16, 16], [8, 8, 8]],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_msd(tmp_path_factory.mktemp("data"), cases=4)


def pretrained(store, out, net, *overrides):
    settings = ["training.steps=2", "training.precision=fp32", "saving.validate_every=2", "saving.pictures_every=2"]
    pretrain.run("pcrlv2", store=store, out=out, overrides=[*TINY, f"net={net}", *settings, *overrides])
    return out


@pytest.mark.parametrize("name", NETS)
def test_pretrain_bundle_finetune_predict(name, store, data, tmp_path, monkeypatch):
    run = pretrained(store, tmp_path / "pretrained", NETS[name])
    encoder, card = load_encoder(run)
    decoder, _ = load_decoder(run)
    assert card["architecture"]["name"] == name and card["decoder"]["skips"] is False
    trained = {k.removeprefix("net."): v for k, v in state(run)["method"].items() if k.startswith("net.")}
    loaded = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[k], loaded[k]) for k in trained)

    starts = []
    real_train = finetune.train

    def look(current, *rest):
        starts.append(current.net.net.encoder.state_dict())
        assert current.net.net.decoder.skips
        x = torch.rand(2, 1, 16, 16, 16)
        with torch.no_grad():
            current.net.eval()
            for one, other in zip(current.net.net.encoder(x), encoder(x), strict=True):
                torch.testing.assert_close(one, other)
            current.net.train()
        real_train(current, *rest)

    monkeypatch.setattr(finetune, "train", look)
    settings = ("optimisation.steps=2", "optimisation.deep_supervision=true", "preparation.patches=zscore", f"net={NETS[name]}")
    recipe = write_recipe(tmp_path / "tiny.yaml")
    finetune.run(recipe, data=data, out=tmp_path / "finetuned", options=Options(weights=run, overrides=settings))
    assert len(starts) == 1 and load_file(tmp_path / "finetuned" / "model.safetensors")
    image = next((data / "imagesTr").iterdir())
    assert predict.run(tmp_path / "finetuned", [image], out=tmp_path / "maps").failed == 0


@pytest.mark.parametrize(
    "preset, norm, precision",
    [
        ("official", "batch", torch.bfloat16),
        ("paper", "batch", torch.float32),
        ("official", "instance", torch.float32),
        ("official", "group", torch.float32),
        ("paper", "group", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", NETS)
def test_every_normalisation_trains_in_every_backbone_and_head(name, preset, norm, precision):
    recipe = {"net": yaml.safe_load(NETS[name]) | {"norm": norm}, "method": {"name": "pcrlv2", "preset": preset, **VIEWS}}
    made = parse(recipe, {"net": "nets", "method": "methods"}, "test")
    torch.manual_seed(0)
    method = made["method"].build(made["net"].build()).train()
    method.check((24, 24, 24), 2)
    reached: set[str] = set()
    for step in range(6):
        x = torch.rand(2, 1, 24, 24, 24, generator=torch.Generator().manual_seed(step))
        views = method.views(x, Draws(0, step, 0, 2), spacing_mm=(1.0, 1.0, 1.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            [(_, losses)] = list(method.turns(views, 0.5))
        method.zero_grad()
        sum(losses.values()).backward()
        gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        reached |= gradients.keys()
    assert reached == {key for key, _ in method.named_parameters()}


@pytest.mark.parametrize("name, stride", [("resenc", [4, 4, 2]), ("swinunetr", [4, 4, 4])])
def test_sides_that_do_not_fit_are_refused_before_step_0(name, stride, store, tmp_path):
    with pytest.raises(BadInput, match="sub-crop: every side must be a multiple of the net's stride"):
        pretrained(store, tmp_path / "run", NETS[name], "method.out_vox=[[16, 16, 16], [8, 6, 8]]")
    with pytest.raises(BadInput, match="sub-crop: .* leaves one voxel"):
        pretrained(store, tmp_path / "run", NETS[name], f"method.out_vox=[[16, 16, 16], {stride}]", "net.norm=instance")
    assert not (tmp_path / "run").exists()
