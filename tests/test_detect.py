"""Verb detect on the LUNA16 phantom: it learns, writes what the challenge takes, and stops and continues to the bit."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from volssl import detect
from volssl.detect import Options, run
from volssl.files import BadInput, read_csv, read_json
from volssl.phantom_luna import write_luna16

RECIPE = """
verb: detect
data: {split: official}
net: {name: unet, width: 4, depth: 3, norm: instance}
preparation: {spacing_mm: null, normalisation: window, window: [-1000, 400]}
boxes: {patch_vox: [12, 12, 12], batch_size: 8, negatives: 12}
changes: {shift_mm: 2, affine: {flip_share: [0.5, 0.5, 0.5], scale: 0.05, degrees: 10}, contrast: null, noise: {sd_max: 0.02, share: 0.3}}
learning: {steps: 6, lr: 5.0e-3, precision: fp32}
saving: {log_every: 2, checkpoint_every: 3}
"""


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    return write_luna16(tmp_path_factory.mktemp("luna") / "data", scans=6, subsets=2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "detect.yaml"
    path.write_text(RECIPE)
    return path


def figures(out):
    return {name: value["mean"] for name, value in read_json(out / "validation" / "summary.json")["metrics"]["nodule"].items()}


def test_it_learns_what_a_nodule_is(luna, recipe, tmp_path):
    run(recipe, data=luna, out=tmp_path / "run", options=Options(fold=1, overrides=("learning.steps=80",)))
    run(recipe, data=luna, out=tmp_path / "untrained", options=Options(fold=1, overrides=("learning.steps=1", "learning.lr=1e-9")))
    assert figures(tmp_path / "run")["auc"] > 0.95 and figures(tmp_path / "run")["cpm"] > 0.9
    assert figures(tmp_path / "untrained")["auc"] < 0.7 and figures(tmp_path / "untrained")["cpm"] < 0.5


def test_what_a_run_leaves(luna, recipe, tmp_path):
    table = Options(overrides=(f"boxes.candidates={luna / 'candidates_V2.csv'}",))  # the run tells its name alone
    outcome = run(recipe, data=luna, out=tmp_path / "run", options=table)
    held_out = {path.stem for path in (luna / "subset0").glob("*.mhd")}
    splits = read_json(tmp_path / "run" / "splits.json")
    assert set(splits["validation"]) == held_out and not set(splits["train"]) & held_out and splits["split"] == "official"
    rows = read_csv(tmp_path / "run" / "validation" / "candidates.csv")
    assert list(rows[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    given = [row for row in read_csv(luna / "candidates_V2.csv") if row["seriesuid"] in held_out]
    assert sorted((row["seriesuid"], row["coordX"], row["coordY"], row["coordZ"]) for row in rows) == sorted(
        (row["seriesuid"], row["coordX"], row["coordY"], row["coordZ"]) for row in given
    )
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    summary = read_json(tmp_path / "run" / "validation" / "summary.json")
    assert summary["protocol"] == "luna16" and summary["n_cases"] == 3
    assert "CPM" in outcome.message and "AUC" in outcome.message and outcome.failed == 0
    model = read_json(tmp_path / "run" / "model.json")
    assert model["task"] == "candidates" and model["patch_vox"] == [12, 12, 12]
    assert "head.weight" in load_file(tmp_path / "run" / "model.safetensors")
    for path in (tmp_path / "run").rglob("*.*"):
        if path.suffix in (".json", ".yaml", ".csv", ".jsonl"):
            assert str(luna) not in path.read_text()


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(luna, recipe, tmp_path, monkeypatch):
    run(recipe, data=luna, out=tmp_path / "whole")
    step_of = detect._step

    def step_then_signal(*given, step, **more):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(*given, step=step, **more)

    monkeypatch.setattr(detect, "_step", step_then_signal)
    assert not run(recipe, data=luna, out=tmp_path / "parts").finished
    monkeypatch.undo()
    run(recipe, data=luna, out=tmp_path / "parts", options=Options(resume=True))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in ("candidates.csv", "summary.json"):
        assert (tmp_path / "whole/validation" / name).read_text() == (tmp_path / "parts/validation" / name).read_text()
    with pytest.raises(BadInput, match="seed"):
        run(recipe, data=luna, out=tmp_path / "parts", options=Options(resume=True, seed=1))


def test_a_bundles_weights_reach_the_encoder(luna, recipe, tmp_path, monkeypatch):
    from test_finetune import write_bundle

    folder, encoder = write_bundle(tmp_path / "bundle", window=(-1000.0, 400.0), spacing_mm=(2.5, 2.5, 2.5))
    seen = {}

    def look(net, *rest, **more):
        seen.update({name: tensor.clone() for name, tensor in net.encoder.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(detect, "learn", look)
    fitting = ("net={name: unet, width: 4, depth: 2, norm: instance}", "preparation.spacing_mm=[2.5, 2.5, 2.5]")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data=luna, out=tmp_path / "run", options=Options(weights=folder, overrides=fitting))
    assert all(torch.equal(tensor, seen[name]) for name, tensor in encoder.state_dict().items())
    with pytest.raises(BadInput, match="spacing_mm must be the bundle's"):
        run(recipe, data=luna, out=tmp_path / "other", options=Options(weights=folder, overrides=fitting[:1]))
    with pytest.raises(BadInput, match="preparation.window must be"):
        wrong = (*fitting, "preparation.window=[-1000, 1000]")
        run(recipe, data=luna, out=tmp_path / "other", options=Options(weights=folder, overrides=wrong))


def test_a_held_out_scan_that_cannot_be_read_is_named_and_its_nodules_are_missed(luna, recipe, tmp_path):
    root = shutil.copytree(luna, tmp_path / "data")
    names = sorted(path.stem for path in (root / "subset0").glob("*.mhd"))
    annotated = {row["seriesuid"] for row in read_csv(root / "annotations.csv")}
    broken = next(name for name in names if name in annotated)
    raw = next(path for path in (root / "subset0").glob(f"{broken}.*raw"))
    raw.write_bytes(raw.read_bytes()[:1000])
    whole = run(recipe, data=luna, out=tmp_path / "whole")
    outcome = run(recipe, data=root, out=tmp_path / "run")
    assert whole.failed == 0 and outcome.failed == 1
    (failure,) = read_csv(tmp_path / "run" / "failures.csv")
    assert failure["case"] == broken and str(root) not in failure["reason"]
    assert read_json(tmp_path / "run" / "validation" / "summary.json")["n_cases"] == 3
    assert figures(tmp_path / "run")["sensitivity_8"] < 1


def test_mirror_images_average(luna, recipe, tmp_path):
    run(recipe, data=luna, out=tmp_path / "one")
    run(recipe, data=luna, out=tmp_path / "eight", options=Options(overrides=("scoring.flips=true", "scoring.batch=5")))
    one, eight = (
        [float(row["probability"]) for row in read_csv(tmp_path / name / "validation" / "candidates.csv")] for name in ("one", "eight")
    )
    assert one != eight and np.corrcoef(one, eight)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("boxes.patch_vox=[13, 12, 12]",), "boxes.patch_vox: "),
        (("boxes.candidates=absent.csv",), "found no absent.csv"),
        (("data={split: official, nodules: {source: spheres}}",), "detect reads LUNA16 and no masks"),
        (("learning.steps=0",), "steps >= 1"),
        (("learning.rate=1",), "unknown key"),
    ],
)
def test_refused_before_out_is_touched(luna, recipe, tmp_path, overrides, message):
    with pytest.raises(BadInput, match=message):
        run(recipe, data=luna, out=tmp_path / "run", options=Options(overrides=overrides))
    assert not (tmp_path / "run").exists()


def test_another_layout_is_refused(recipe, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match="must be laid out as LUNA16"):
        run(recipe, data=tmp_path / "data", out=tmp_path / "run")


def test_the_shipped_recipe_is_whole():
    from volssl import recipe as recipes

    assert recipes.parse(recipes.load("luna_detection", verb="detect"), detect.PARTS, "luna_detection")
