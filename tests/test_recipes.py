"""The recipes of BraTS, LiTS and LUNA16 end to end on phantoms in their public layouts, with narrow nets and few steps."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import write_bundle

from volssl import evaluate, predict, report
from volssl.archive import read_image, write_nifti
from volssl.datasets import Data, Nodules, open_dataset, stem
from volssl.files import read_csv, read_json
from volssl.finetune import Options, run
from volssl.journal import read_metrics
from volssl.phantom_luna import write_luna16
from volssl.phantom_sets import write_brats, write_lits
from volssl.predict import Extras

NARROW = (
    "net={name: unet, width: 4, depth: 3, norm: instance}",
    "folds.count=2",
    "sampling.patch_vox=[24, 24, 24]",
    "sampling.batch_size=2",
    "sampling.memory_gb=1",
    "optimisation.deep_supervision=false",
    "optimisation.lr=0.01",
    "optimisation.warmup=0.1",
    "optimisation.average=0.9",
    "optimisation.precision=fp32",
    "inference.flips=[false, false, false]",
    "inference.overlap=0.25",
    "saving.log_every=5",
)
FILES = "data.nodules={source: files, where: nodule_masks}"
# recipe -> phantom, own overrides, the region whose Dice is looked at, what it must reach, which is well above an untrained net's
CASES = {
    "brats": (lambda out: write_brats(out, patients=4, size_vox=32), ("preparation.spacing_mm=[6, 6, 6]",), "WT", 0.5),
    "lits": (lambda out: write_lits(out, cases=4, size_vox=32), ("preparation.spacing_mm=[8, 8, 8]",), "liver", 0.6),
    "luna": (
        lambda out: write_luna16(out, scans=6, size_vox=48),
        (
            "preparation.spacing_mm=null",
            "cleaning={}",
            "preparation.patches=none",
            "augmentation={affine: null, blur: null, contrast: null, gamma: null, noise: null}",
            FILES,
        ),
        "nodule",
        0.2,
    ),
}
STEPS = {"brats": 50, "lits": 50, "luna": 120}


def figures(folder: Path) -> dict[tuple[str, str], float]:
    """(region, metric) -> mean of a summary."""
    metrics = read_json(folder / "summary.json")["metrics"]
    return {(region, name): one["mean"] for region, of in metrics.items() for name, one in of.items()}


def dice(folder: Path, region: str) -> float:
    """Mean over the cases that hold the region: one without a nodule scores 1 where nothing at all is predicted."""
    rows = [row for row in read_csv(folder / "cases.csv") if (row["label"], row["metric"]) == (region, "dice")]
    values = [float(row["value"]) for row in rows if not row["note"].startswith("absent")]
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_folds_predict_evaluate_report(name, tmp_path):
    write, own, region, wanted = CASES[name]
    data, runs = write(tmp_path / "data"), [tmp_path / "run0", tmp_path / "run1"]
    for fold, out in enumerate(runs):
        options = Options(fold=fold, overrides=(*NARROW, *own, f"optimisation.steps={STEPS[name]}"))
        assert run(name, data=data, out=out, options=options).failed == 0
    untrained = Options(overrides=(*NARROW, *own, "optimisation.steps=1", "optimisation.lr=1e-9"))
    run(name, data=data, out=tmp_path / "untrained", options=untrained)
    validated = [figures(out / "validation") for out in runs]
    reached = sum(dice(out / "validation", region) for out in runs) / 2
    assert reached > wanted
    assert reached > dice(tmp_path / "untrained" / "validation", region) + min(0.2, wanted)
    inputs = _held_out(name, data, tmp_path)
    assert _predicted_and_evaluated(tmp_path, "alone", inputs) == pytest.approx(validated[0])
    both = _predicted_and_evaluated(tmp_path, "both", inputs, Extras(ensemble=[runs[1]]))
    assert dice(tmp_path / "both_scores", region) > wanted and both != validated[0]
    report.run([*runs, tmp_path / "both_scores"], out=tmp_path / "report.html")
    assert f"{both[region, 'dice']:.3f}" in (tmp_path / "report.html").read_text(encoding="utf-8")
    waited = [row["data_wait_share"] for out in runs for row in read_metrics(out)[1:]]
    assert sum(waited) / len(waited) < 0.1


def _predicted_and_evaluated(out: Path, name: str, inputs: list[Path], extras: Extras = predict.ALONE) -> dict[tuple[str, str], float]:
    """Inputs through the verbs predict and evaluate, the latter told by the run's folder what it scores; the figures."""
    assert predict.run(out / "run0", inputs, out=out / name, extras=extras).failed == 0
    assert evaluate.run(out / name, out / "references", recipe=out / "run0", out=out / f"{name}_scores").failed == 0
    return figures(out / f"{name}_scores")


def _held_out(name: str, data: Path, out: Path) -> list[Path]:
    """The held-out cases of fold 0 as a user has them: folders of BraTS's own files, or images; their label maps under references/."""
    nodules = Data(nodules=Nodules(source="files", where="nodule_masks")) if name == "luna" else Data()
    cases = {case.case_id: case for case in open_dataset(data, data=nodules).cases}
    (out / "references").mkdir()
    inputs = []
    for case in read_json(out / "run0" / "splits.json")["validation"]:
        image, label = cases[case].images[0], cases[case].label
        named = (
            label.name if name == "lits" else f"{case}{label.name.removeprefix(stem(label))}"
        )  # segmentation-N is known to be of volume-N
        shutil.copy(label, out / "references" / named)
        if name == "luna":  # as NIfTI: a copy of .mhd needs its .raw
            volume = read_image(image)
            image = out / "in" / f"{case}.nii.gz"
            write_nifti(image, volume.array_CXYZ[0], volume.grid, "int16")
        inputs.append(image.parent if name == "brats" else image)
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_recipe_starts_from_a_ct_bundle(name, tmp_path):
    write, own, *_ = CASES[name]
    spacing_mm = (8.0, 8.0, 8.0) if name == "lits" else (6.0, 6.0, 6.0)
    folder, encoder = write_bundle(tmp_path / "bundle", window=(-900.0, 900.0), normalisation="zscore", spacing_mm=spacing_mm)
    more = ("net={name: unet, width: 4, depth: 2, norm: instance}", "optimisation.steps=1", "optimisation.lr=1e-9")
    # Spacing and window are the card's where the recipe is of CT; only voxels of its own recipe are known to a CT encoder in BraTS.
    own = [override for override in own if name == "brats" or not override.startswith("preparation.")]
    run(name, data=write(tmp_path / "data"), out=tmp_path / "run", options=Options(weights=folder, overrides=(*NARROW, *own, *more)))
    said, model = read_json(tmp_path / "run" / "splits.json")["weights"], read_json(tmp_path / "run" / "model.json")
    first = load_file(tmp_path / "run" / "model.safetensors")["net.encoder.levels.0.0.conv.weight"]
    channels = 4 if name == "brats" else 1
    torch.testing.assert_close(first, encoder.levels[0][0].conv.weight.repeat(1, channels, 1, 1, 1) / channels, atol=1e-6, rtol=0)
    assert said["channels"] == ("repeat" if name == "brats" else "as the bundle's") and said["modality"] == "CT"
    assert model["preparation"]["spacing_mm"] == list(spacing_mm)
    assert model["preparation"]["normalisation"] == ("zscore" if name == "brats" else "window")
    assert name == "brats" or model["preparation"]["window"] == [-900, 900]
