import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.export.test_bundle import card
from volssl import export, load_encoder
from volssl.export import Options, bundle
from volssl.export import onnx as graphs
from volssl.files import BadInput
from volssl.nets.folded import FoldedUNet
from volssl.nets.resenc import ResEncUNet
from volssl.nets.unet import UNet

NETS = {
    "unet": lambda: UNet(1, width=2, depth=3),
    "folded": lambda: FoldedUNet(1, width=4, depth=2, norm="instance"),
    "resenc": lambda: ResEncUNet(1, features=(4, 8), blocks=(1, 1)),
}


def written(folder, name):
    torch.manual_seed(1)
    net = NETS[name]()
    for _ in range(2):  # statistics that an untrained net does not have
        net(torch.randn(2, 1, 16, 16, 16))
    return bundle.write(folder, net.encoder, card(net, architecture={"name": name, "arguments": net.arguments}, patch_vox=(16, 16, 16)))


@pytest.mark.parametrize("name", NETS)
def test_the_graph_gives_every_feature_map_of_the_encoder_for_any_batch(tmp_path, name):
    export.run(written(tmp_path / "bundle", name), to="onnx", out=tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx")
    encoder, _ = load_encoder(tmp_path / "bundle")
    for batch in (1, 3):
        x = torch.randn(batch, 1, 16, 16, 16)
        with torch.no_grad():
            wanted = encoder(x)
        found = session.run(None, {"image": x.numpy()})
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
    about = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert [output["channels"] for output in about["outputs"]] == list(encoder.channels)
    assert about["difference_from_torch"] <= graphs.LARGEST_DIFFERENCE and about["card"]["spacing_mm"] == [1.0, 1.0, 1.0]


def test_the_graph_says_nothing_of_the_machine_that_wrote_it(tmp_path):
    export.run(written(tmp_path / "bundle", "unet"), to="onnx", out=tmp_path / "out")
    packed = (tmp_path / "out" / "encoder.onnx").read_bytes()
    for word in (b".py", b"/home", b'File "', str(tmp_path).encode(), b"site-packages"):
        assert word not in packed, word
    onnx.checker.check_model(onnx.load_from_string(packed), full_check=True)


def test_four_equal_channels_give_what_one_gave(tmp_path):
    source = written(tmp_path / "bundle", "unet")
    export.run(source, to="onnx", out=tmp_path / "out", options=Options(channels=4))
    x = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        wanted = load_encoder(source)[0](x)[-1]
    found = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx").run(None, {"image": x.repeat(1, 4, 1, 1, 1).numpy()})
    np.testing.assert_allclose(found[-1], wanted.numpy(), atol=1e-4)


def test_a_graph_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST_DIFFERENCE", 0.0)
    monkeypatch.setattr(graphs, "LARGEST_SHARE", 0.0)
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3), torch.nn.InstanceNorm3d(3))
    with pytest.raises(BadInput, match="ONNX Runtime must compute what torch does"):
        graphs.write_graph(tmp_path / "a.onnx", net, (1, 1, 8, 8, 8), ["y"])
    assert not (tmp_path / "a.onnx").exists()


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path):
    source = written(tmp_path / "bundle", "unet")
    with pytest.raises(BadInput, match="--patch: .*multiple"):
        export.run(source, to="onnx", out=tmp_path / "out", options=Options(patch=(18, 16, 16)))
    with pytest.raises(BadInput, match="--plans: is not for --to onnx"):
        export.run(source, to="onnx", out=tmp_path / "out", options=Options(plans=tmp_path / "x"))
    silent = json.loads((source / "card.json").read_text()) | {"patch_vox": None}
    (source / "card.json").write_text(json.dumps(silent))
    with pytest.raises(BadInput, match="--patch X,Y,Z: must be given"):
        export.run(source, to="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
