import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.export.test_bundle import card
from tests.export.test_monai import run_bundle
from tests.labelled import blobs
from volssl import deploy, export, predict
from volssl.archive import read_label, write_nifti
from volssl.export import Options, bundle
from volssl.files import BadInput
from volssl.nets.unet import UNet
from volssl.segment import Inference, Model, Plan, Preparation, read_model, write_model
from volssl.volume import Grid, Volume


def run_of(folder, *, channels=1, regions=None):
    """A finetune run's model with weights as if it were trained, so that its label maps have more than one value."""
    torch.manual_seed(0)
    net = UNet(channels, width=2, depth=2, norm="instance", skips=True)
    plan = Plan(
        architecture={"name": "unet", "arguments": net.arguments},
        labels={"bright": 1, "dark": 2},
        channels=tuple(f"c{number}" for number in range(channels)),
        patch_vox=(16, 16, 16),
        preparation=Preparation(normalisation="window", window=(-1000, 1000), patches="zscore"),
        inference=Inference(flips=(True, False, False), precision="fp32"),
        regions=regions or {},
    )
    network = plan.network()
    folder.mkdir()
    write_model(folder, Model(plan, network.eval()))
    return folder


def image(channels=1):
    array, _ = blobs(3, (26, 21, 18))
    return Volume(np.stack([array] * channels), Grid(array.shape, np.diag([1.0, -1.0, 2.0, 1.0])))


@pytest.mark.parametrize("regions", [None, {"both": (1, 2), "dark": (2,)}])
def test_prediction_by_the_graph_gives_the_same_label_map(tmp_path, regions):
    run = run_of(tmp_path / "run", channels=2, regions=regions)
    message = export.run(run, to="onnx", out=tmp_path / "onnx").message
    assert "segmentation.onnx, patches of 16x16x16" in message
    mine, theirs = read_model(run).label_map(image(2)), deploy.read(tmp_path / "onnx").label_map(image(2))
    assert len(np.unique(mine)) > 1
    np.testing.assert_array_equal(theirs, mine)


def test_the_verb_predicts_from_the_exported_folder_as_from_the_run(tmp_path):
    run = run_of(tmp_path / "run")
    export.run(run, to="onnx", out=tmp_path / "onnx")
    volume = image()
    write_nifti(tmp_path / "scan.nii.gz", volume.array_CXYZ[0], volume.grid, np.int16)
    for source in ("run", "onnx"):
        predict.run(tmp_path / source, [tmp_path / "scan.nii.gz"], out=tmp_path / f"from_{source}")
    found = [read_label(tmp_path / f"from_{source}" / "scan.nii.gz").array_CXYZ for source in ("run", "onnx")]
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 1


def test_four_channels_fine_tuned_from_an_encoder_of_one_give_the_same_labels_by_the_graph(tmp_path):
    torch.manual_seed(1)
    one = UNet(1, width=2, depth=2, norm="instance")
    written = bundle.write(tmp_path / "bundle", one.encoder, card(one, architecture={"name": "unet", "arguments": one.arguments}))
    plan = read_model(run_of(tmp_path / "run", channels=4)).plan
    network = plan.network()
    bundle.into(network.net.encoder, bundle.load_bundle(written))
    before = [value.clone() for value in network.net.encoder.parameters()]
    F.cross_entropy(network(torch.randn(2, 4, 16, 16, 16)), torch.randint(3, (2, 16, 16, 16))).backward()
    torch.optim.SGD(network.parameters(), 0.5).step()
    assert all(not torch.equal(*pair) for pair in zip(before, network.net.encoder.parameters(), strict=True) if pair[0].ndim == 5)
    write_model(tmp_path / "run", Model(plan, network.eval()))
    export.run(tmp_path / "run", to="onnx", out=tmp_path / "onnx")
    mine, theirs = read_model(tmp_path / "run").label_map(image(4)), deploy.read(tmp_path / "onnx").label_map(image(4))
    assert len(np.unique(mine)) > 1
    np.testing.assert_array_equal(theirs, mine)


def test_the_graph_normalises_its_patches_itself(tmp_path):
    run = run_of(tmp_path / "run")
    export.run(run, to="onnx", out=tmp_path / "onnx")
    model, graph = read_model(run), deploy.read(tmp_path / "onnx")
    x = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        wanted = model.net(model.plan.preparation.patch(x))
        torch.testing.assert_close(graph.net(x), wanted, atol=1e-4, rtol=0)
        assert not torch.allclose(model.net(x), wanted, atol=1e-2)
        torch.testing.assert_close(graph.net(3 * x), wanted, atol=1e-4, rtol=0)


def test_another_patch_and_what_does_not_fit(tmp_path):
    run = run_of(tmp_path / "run")
    export.run(run, to="onnx", out=tmp_path / "wide", options=Options(patch=(24, 16, 16)))
    assert json.loads((tmp_path / "wide" / "onnx.json").read_text())["input"]["shape"] == ["batch", 1, 24, 16, 16]
    assert replace(deploy.read(tmp_path / "wide").plan, patch_vox=(24, 16, 16)) == deploy.read(tmp_path / "wide").plan
    with pytest.raises(BadInput, match="--patch: "):
        export.run(run, to="onnx", out=tmp_path / "out", options=Options(patch=(15, 16, 16)))
    with pytest.raises(BadInput, match="--to nnunet: takes a pretrained encoder; found a finetune run"):
        export.run(run, to="nnunet", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_graph_is_refused(tmp_path):
    export.run(run_of(tmp_path / "run"), to="onnx", out=tmp_path / "onnx")
    path = tmp_path / "onnx" / "segmentation.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="must be the file onnx.json was written for; found another"):
        deploy.read(tmp_path / "onnx")
    path.unlink()
    with pytest.raises(BadInput, match="found nothing there"):
        deploy.read(tmp_path / "onnx")


@pytest.mark.slow
def test_a_monai_bundle_of_regions_gives_the_label_map_on_the_image_s_own_grid(tmp_path):
    run = run_of(tmp_path / "run", channels=2, regions={"both": (1, 2), "dark": (2,)})
    message = export.run(run, to="monai", out=tmp_path / "monai").message
    assert "loaded without volssl" in message
    volume = image(2)
    for channel in range(2):
        write_nifti(tmp_path / "images" / f"scan_{channel:04d}.nii.gz", volume.array_CXYZ[channel], volume.grid, np.int16)
    run_bundle(tmp_path / "monai", tmp_path / "images", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.nii.gz")
    found, mine = read_label(path), read_model(run).label_map(volume)
    assert found.grid.almost_equal(volume.grid) and len(np.unique(mine)) > 1
    assert (found.array_CXYZ[0] == mine).mean() > 0.999  # shares within rounding of a half may fall to either side
