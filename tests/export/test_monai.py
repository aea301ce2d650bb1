import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.export.test_bundle import card
from volssl import export, load_encoder
from volssl.archive import write_nifti
from volssl.export import Options, bundle
from volssl.export import monai as bundles
from volssl.export.monai_schema import SCHEMA
from volssl.files import BadInput
from volssl.nets.unet import UNet
from volssl.volume import Grid

RUN = """
import sys
sys.modules["volssl"] = None
sys.path.insert(0, ".")
from monai.bundle import run
run(config_file="configs/inference.json", meta_file="configs/metadata.json", dataset_dir=sys.argv[1], output_dir=sys.argv[2])
"""


def run_bundle(folder, images, out):
    """MONAI's own verb on a bundle, in a process that has no volssl."""
    done = subprocess.run([sys.executable, "-B", "-c", RUN, str(images), str(out)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def written(folder, **changes):
    torch.manual_seed(1)
    net = UNet(1, width=2, depth=2)
    net(torch.randn(2, 1, 16, 16, 16))  # statistics that an untrained net does not have
    facts = {"architecture": {"name": "unet", "arguments": net.arguments}, "patch_vox": (16, 16, 16)}
    return bundle.write(folder, net.encoder, card(net, **(facts | changes)))


@pytest.mark.slow
def test_an_encoder_runs_in_monai_without_volssl_as_it_does_here(tmp_path):
    source = written(tmp_path / "bundle")
    out = tmp_path / "out"
    assert "verified offline" in export.run(source, to="monai", out=out).message
    array = np.random.default_rng(0).integers(-1500, 1500, (16, 16, 16)).astype(np.int16)
    write_nifti(tmp_path / "images" / "scan.nii.gz", array, Grid((16, 16, 16), np.eye(4)), np.int16)
    run_bundle(out, tmp_path / "images", tmp_path / "features")
    found = np.load(tmp_path / "features" / "0000.npy")
    encoder, about = load_encoder(source)
    low, high = about["intensity"]["window"]
    x = torch.from_numpy(((array - low) / (high - low)).clip(0, 1)).float()[None, None]
    x = (x - x.mean()) / x.std(correction=0)  # the card says zscore
    with torch.no_grad():
        np.testing.assert_allclose(found, encoder(x)[-1][0].numpy(), atol=1e-4)
    told = json.loads((out / "configs" / "metadata.json").read_text())
    assert told["volssl_card"]["spacing_mm"] == [1.0, 1.0, 1.0]
    assert not re.search(str(tmp_path), "".join(path.read_text() for path in out.rglob("*.json")))


FINETUNE = """
import sys
sys.modules["volssl"] = None
sys.path.insert(0, ".")
import torch
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
parser = ConfigParser()
parser.read_config("configs/inference.json")
network = parser.get_parsed_content("network")
code = open("docs/README.md").read().split("```python")[2].split("```")[0]
exec(code)
x = torch.randn(2, 4, 16, 16, 16)
before = [value.clone() for value in whole.net.net.encoder.parameters()]
torch.testing.assert_close(whole.eval().net.net.encoder(x)[-1], network.encoder(x)[-1])
whole.train()
DiceCELoss(softmax=True, to_onehot_y=True)(whole(x), torch.randint(3, (2, 1, 16, 16, 16))).backward()
torch.optim.SGD(whole.parameters(), 0.1).step()
assert any(not torch.equal(a, b) for a, b in zip(before, whole.net.net.encoder.parameters()))
"""


@pytest.mark.slow
def test_four_channels_are_fine_tuned_in_monai_from_an_encoder_of_one(tmp_path):
    source = written(tmp_path / "bundle")
    export.run(source, to="monai", out=tmp_path / "out", options=Options(channels=4))
    done = subprocess.run([sys.executable, "-B", "-c", FINETUNE], cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / "out" / "models" / "model.pt", weights_only=True)
    one, _ = load_encoder(source)
    first = next(name for name, tensor in one.state_dict().items() if tensor.ndim == 5)
    torch.testing.assert_close(state[f"encoder.{first}"], one.state_dict()[first].repeat(1, 4, 1, 1, 1) / 4)


def test_what_it_carries_asks_for_nothing_of_volssl():
    modules = bundles.copied()
    assert {"standalone", "unet", "resenc", "folded", "swinunetr", "blocks", "composed", "normalise", "targets"} <= modules.keys()
    for name, text in modules.items():
        assert not re.search(r"^\s*(from|import) volssl", text, re.MULTILINE), name
        compile(text, name, "exec")


def test_a_network_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "STAND_INS", bundles.STAND_INS | {"normalise": "raise ImportError('broken on purpose')"})
    with pytest.raises(BadInput, match="must load in MONAI without volssl; found: .*broken on purpose"):
        export.run(written(tmp_path / "bundle"), to="monai", out=tmp_path / "out")


def test_the_schema_is_no_milder_than_monais():
    # The names that MONAI's schema of 2024-07-25 requires.
    required = "schema version monai_version pytorch_version numpy_version required_packages_version task description authors copyright"
    assert set(SCHEMA["required"]) == {*required.split(), "network_data_format"}


def test_sides_and_options_that_do_not_fit(tmp_path):
    source = written(tmp_path / "bundle", patch_vox=None)
    with pytest.raises(BadInput, match="--patch X,Y,Z: must be given"):
        export.run(source, to="monai", out=tmp_path / "out")
    with pytest.raises(BadInput, match="--patch: every side must be a multiple"):
        export.run(source, to="monai", out=tmp_path / "out", options=Options(patch=(15, 16, 16)))
    with pytest.raises(BadInput, match="--plans: is not for --to monai"):
        export.run(source, to="monai", out=tmp_path / "out", options=Options(plans=tmp_path / "x"))
    assert not (tmp_path / "out").exists()
