"""The classifier of candidates on disk: read as it was written, and only whole."""

import shutil

import pytest
import torch

from volssl import recipe as recipes
from volssl.classifier import PARTS, first_net, read_classifier, write_classifier
from volssl.files import BadInput

RECIPE = """
verb: detect
net: {name: unet, width: 4, depth: 2, norm: batch}
preparation: {spacing_mm: null, normalisation: window, window: [-1000, 400]}
boxes: {patch_vox: [8, 8, 8], batch_size: 4}
learning: {precision: fp32}
"""


@pytest.fixture
def written(tmp_path):
    """A run's folder with a classifier whose running statistics are not those of a new one; the classifier."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    made = recipes.parse(recipes.load(folder / "recipe.yaml", verb="detect"), PARTS, "recipe")
    net = first_net(made, None, seed=3)
    net(torch.randn(4, 1, 8, 8, 8))
    write_classifier(folder, net, made)
    return folder, net.eval()


def test_what_is_read_answers_as_what_was_written(written):
    folder, net = written
    read, made = read_classifier(folder, ("scoring.batch=3",))
    x = torch.randn(2, 1, 8, 8, 8)
    torch.testing.assert_close(read(x), net(x))  # its weights lie in another order in memory
    assert not read.training and read(x).shape == (2,)
    held, given = read.state_dict(), net.state_dict()
    assert held.keys() == given.keys() and all(torch.equal(held[name], given[name]) for name in given)
    assert made["scoring"].batch == 3 and made["preparation"].window == (-1000, 400) and made["boxes"].patch_vox == (8, 8, 8)


def test_only_a_whole_run_of_detect_is_a_model(written):
    folder, _ = written

    def refused(message):
        with pytest.raises(BadInput, match=message):
            read_classifier(folder)

    told, recipe, weights = (folder / name for name in ("model.json", "recipe.yaml", "model.safetensors"))
    whole, given, held = told.read_text(), recipe.read_text(), weights.read_bytes()
    told.write_text(whole.replace('"candidates"', '"other"'))
    refused("one of another verb")
    told.write_text(whole.replace('"schema": 1', '"schema": 99'))
    refused("update volssl")
    told.write_text(whole)
    recipe.write_text(given.replace("-1000", "-900"))
    refused("found another preparation")
    recipe.write_text(given.replace("width: 4", "width: 8"))
    refused("found another architecture")
    recipe.write_text(given)
    weights.write_bytes(held[:-1])
    refused("found another")
    shutil.rmtree(folder)
    refused("found no model.json")
