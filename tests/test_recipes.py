"""The recipes of BraTS, LiTS and LUNA16 end to end on phantoms in their public layouts, with narrow nets and few steps."""

import shutil
from pathlib import Path

import pytest

from volssl import evaluate, predict, report
from volssl.archive import read_image, write_nifti
from volssl.datasets import Data, Nodules, open_dataset, stem
from volssl.files import read_json
from volssl.finetune import Options, run
from volssl.journal import read_metrics
from volssl.phantom_luna import write_luna16
from volssl.phantom_sets import write_brats, write_lits

NARROW = (
    "net={name: unet, width: 6, depth: 3, norm: instance}",
    "folds.count=2",
    "sampling.patch_vox=[32, 32, 32]",
    "sampling.batch_size=2",
    "sampling.memory_gb=1",
    "optimisation.deep_supervision=false",
    "optimisation.lr=0.005",
    "optimisation.warmup=0.1",
    "optimisation.average=0.9",
    "optimisation.precision=fp32",
    "inference.flips=[false, false, false]",
    "inference.overlap=0.25",
    "saving.log_every=5",
)
# recipe -> phantom, own overrides, the region whose Dice is looked at, what it must reach
CASES = {
    "brats": (write_brats, ("preparation.spacing_mm=[4, 4, 4]",), "WT", 0.6),
    "lits": (write_lits, ("preparation.spacing_mm=[5, 5, 5]",), "liver", 0.6),
    "luna": (
        write_luna16,
        ("preparation.spacing_mm=[5, 5, 5]", "data.nodules={source: files, where: nodule_masks}", "cleaning={}"),
        "nodule",
        0.15,
    ),
}
STEPS = 60


def dice(folder: Path, region: str) -> float:
    return read_json(folder / "summary.json")["metrics"][region]["dice"]["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_folds_predict_evaluate_report(name, tmp_path):
    write, own, region, wanted = CASES[name]
    data = write(tmp_path / "data")
    overrides = (*NARROW, *own)
    for fold in (0, 1):
        options = Options(fold=fold, overrides=(*overrides, f"optimisation.steps={STEPS}"))
        assert run(name, data=data, out=tmp_path / f"run{fold}", options=options).failed == 0
    untrained = Options(overrides=(*overrides, "optimisation.steps=1", "optimisation.lr=1e-9"))
    run(name, data=data, out=tmp_path / "untrained", options=untrained)
    reached = (dice(tmp_path / "run0" / "validation", region) + dice(tmp_path / "run1" / "validation", region)) / 2
    assert reached > wanted
    assert reached > dice(tmp_path / "untrained" / "validation", region) + min(0.2, wanted)
    evaluated = _predicted_and_evaluated(name, data, tmp_path)
    assert evaluated == pytest.approx(dice(tmp_path / "run0" / "validation", region), abs=1e-6) if name == "lits" else evaluated >= 0
    report.run([tmp_path / "run0", tmp_path / "run1"], out=tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    waited = [row["data_wait_share"] for row in read_metrics(tmp_path / "run0")][1:]
    assert sum(waited) / len(waited) < 0.1


def _predicted_and_evaluated(name: str, data: Path, out: Path) -> float:
    """The held-out cases of fold 0 through the verbs predict and evaluate; their Dice."""
    region = CASES[name][2]
    names = read_json(out / "run0" / "splits.json")["validation"]
    nodules = Data(nodules=Nodules(source="files", where="nodule_masks")) if name == "luna" else Data()
    cases = {case.case_id: case for case in open_dataset(data, data=nodules).cases}
    (out / "in").mkdir()
    (out / "references").mkdir()
    for case in names:
        for number, image in enumerate(cases[case].images):
            if image.suffix == ".mhd":
                volume = read_image(image)
                write_nifti(out / "in" / f"{case}.nii.gz", volume.array_CXYZ[0], volume.grid, "int16")
            else:
                channel = f"_{number:04d}" if len(cases[case].images) > 1 else ""
                shutil.copy(image, out / "in" / f"{case}{channel}{_ending(image)}")
        shutil.copy(cases[case].label, out / "references" / f"{case}{_ending(cases[case].label)}")
    assert predict.run(out / "run0", [out / "in"], out=out / "predicted").failed == 0
    assert evaluate.run(out / "predicted", out / "references", recipe=out / "run0" / "recipe.yaml", out=out / "scores").failed == 0
    return dice(out / "scores", region)


def _ending(path: Path) -> str:
    return path.name.removeprefix(stem(path))
