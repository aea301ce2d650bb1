"""The phantom data sets through the whole chain: finetune, predict, evaluate, report; and what a few steps reach above an untrained net."""

import shutil

import pytest

from volssl import evaluate, predict, report
from volssl.datasets import Data, open_dataset
from volssl.files import read_json
from volssl.finetune import Options, run
from volssl.nodules import Nodules
from volssl.phantom_luna import write_luna16
from volssl.phantom_sets import write_brats, write_lits

RECIPE = """
verb: finetune
data: {DATA}
labels: null
net: {name: unet, width: 4, depth: 3, norm: instance}
preparation: {spacing_mm: null, normalisation: NORMALISATION, nonzero: true, window: WINDOW}
folds: {count: 2, seed: 0}
sampling: {patch_vox: [24, 24, 24], batch_size: 2, foreground: 0.7, margin: 0.0}
augmentation: {affine: null, blur: null, contrast: null, gamma: null, noise: null}
optimisation: {steps: STEPS, lr: 1.0e-2, precision: fp32, average: 0.8}
inference: {overlap: 0.25}
saving: {log_every: 20, checkpoint_every: 100}
"""
SETS = {
    # name: (what the recipe says, region, Dice that so few steps must reach)
    "brats": ({"DATA": "", "NORMALISATION": "zscore", "WINDOW": "[0, 1]", "STEPS": "60"}, "WT", 0.5),
    "lits": ({"DATA": "", "NORMALISATION": "window", "WINDOW": "[-200, 300]", "STEPS": "60"}, "liver", 0.5),
    "luna16": (
        {
            "DATA": "split: official, nodules: {source: files, where: nodule_masks}",
            "NORMALISATION": "window",
            "WINDOW": "[-1000, 400]",
            "STEPS": "120",
        },
        "nodule",
        0.3,
    ),
}


def written(name, folder):
    if name == "brats":
        return write_brats(folder, patients=4, size_vox=32)
    if name == "lits":
        return write_lits(folder, cases=4, size_vox=32)
    return write_luna16(folder, scans=6, size_vox=48)


def score(out, region):
    return read_json(out / "summary.json")["metrics"][region]["dice"]["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_whole_chain(tmp_path, name):
    settings, region, least = SETS[name]
    data, recipe = written(name, tmp_path / "data"), tmp_path / "recipe.yaml"
    text = RECIPE
    for key, value in settings.items():
        text = text.replace(key, value)
    recipe.write_text(text)
    run(recipe, data=data, out=tmp_path / "run", options=Options(fold=1))
    run(recipe, data=data, out=tmp_path / "none", options=Options(fold=1, overrides=("optimisation.steps=1", "optimisation.lr=1e-9")))
    assert score(tmp_path / "run" / "validation", region) > max(least, score(tmp_path / "none" / "validation", region) + 0.15)

    nodules = Nodules("files", where="nodule_masks") if name == "luna16" else None
    cases = {case.case_id: case for case in open_dataset(data, data=Data(nodules=nodules)).cases}
    images, references = tmp_path / "images", tmp_path / "references"
    images.mkdir()
    references.mkdir()
    held_out = read_json(tmp_path / "run" / "splits.json")["validation"]
    for case in (cases[number] for number in held_out):
        label = case.label
        shutil.copy(label, references / f"{case.case_id}{'.nii.gz' if label.name.endswith('.gz') else '.nii'}")
        for channel, image in enumerate(case.images):
            if image.suffix == ".mhd":
                shutil.copytree(
                    image.parent, images, dirs_exist_ok=True, ignore=lambda _, names, keep=image.stem: [n for n in names if keep not in n]
                )
            else:
                mark = f"_{channel:04d}" if len(case.images) > 1 else ""
                shutil.copy(image, images / f"{case.case_id}{mark}{'.nii.gz' if image.name.endswith('.gz') else '.nii'}")
    assert predict.run(tmp_path / "run", [images], out=tmp_path / "predicted").failed == 0
    assert evaluate.run(tmp_path / "predicted", references, recipe=tmp_path / "run" / "recipe.yaml", out=tmp_path / "scores").failed == 0
    if name == "luna16":
        assert score(tmp_path / "scores", "1") == pytest.approx(score(tmp_path / "run" / "validation", region))
    report.run([tmp_path / "run"], out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
