"""Fine-tuning end to end on tiny cases: it learns, resumes to the bit, starts from a bundle, and refuses what cannot work."""

import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from labelled import LABELS, write_msd, write_recipe
from safetensors.torch import load_file

from volssl import evaluate, finetune, fitting, predict
from volssl import recipe as recipes
from volssl.__main__ import run_verb
from volssl.archive import read_image, read_label
from volssl.checkpoints import Checkpoints, NotFinite
from volssl.datasets import open_dataset
from volssl.evaluate import Evaluation
from volssl.export import bundle
from volssl.files import BadInput, read_csv, read_json
from volssl.finetune import PARTS, Options, run
from volssl.journal import read_metrics
from volssl.nets.unet import UNet
from volssl.segment import Plan
from volssl.volume import Grid


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_msd(tmp_path_factory.mktemp("data"), cases=6)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


@pytest.fixture(scope="module")
def trained(data, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "trained"
    run(recipe, data=data, out=out, options=Options(overrides=("optimisation.steps=80",)))
    return out


def write_bundle(folder, *, width=4, window=(-1000.0, 1000.0), normalisation="none", spacing_mm=(1.0, 1.0, 1.0)):
    torch.manual_seed(7)
    net = UNet(1, width=width, depth=2, norm="instance")
    card = bundle.Card(
        architecture={"name": "unet", "arguments": net.arguments},
        in_channels=1,
        spacing_mm=spacing_mm,
        orientation="RAS",
        intensity={"modality": "CT", "clip": [-1024, 3071], "window": list(window), "normalisation": normalisation},
        method="pcrlv2",
        recipe={},
        steps=1,
        data={"train_scans": 1, "train_patients": 1},
        volssl_version="0",
        citations=(),
    )
    return bundle.write(folder, net.encoder, card), net.encoder


def weights(out):
    return load_file(out / "model.safetensors")


def mean_dice(out):
    return read_json(out / "validation" / "summary.json")["metrics"]["mean"]["dice"]["mean"]


def untimed(out):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second", "data_wait_share")} for row in read_metrics(out)]


def test_it_learns(data, recipe, trained, tmp_path):
    losses = [row["loss/dice"] + row["loss/cross_entropy"] for row in read_metrics(trained)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    run(recipe, data=data, out=tmp_path / "untrained", options=Options(overrides=("optimisation.steps=1", "optimisation.lr=1e-9")))
    assert mean_dice(trained) > 0.8
    assert mean_dice(trained) > mean_dice(tmp_path / "untrained") + 0.3


def test_regions_are_learned_and_scored_on_the_label_map(data, recipe, tmp_path):
    overrides = ("regions={both: [1, 2], dark: [2]}", "optimisation.steps=100", "optimisation.deep_supervision=true")
    run(recipe, data=data, out=tmp_path / "run", options=Options(overrides=overrides))
    assert weights(tmp_path / "run")["heads.0.weight"].shape[0] == 2
    assert read_json(tmp_path / "run" / "model.json")["regions"] == {"both": [1, 2], "dark": [2]}
    assert mean_dice(tmp_path / "run") > 0.75
    values = {int(v) for path in (tmp_path / "run" / "validation").glob("*.nii.gz") for v in np.unique(read_label(path).array_CXYZ)}
    assert values == {0, 1, 2}


def test_the_held_out_cases_are_scored_by_the_recipes_protocol(data, tmp_path):
    """A model that finds nothing gets the protocol's worst values, region by region."""
    table = dataclasses.replace(open_dataset(data), regions={"both": (1, 2), "dark": (2,)})
    nothing = SimpleNamespace(label_map=lambda image: np.zeros(image.grid.shape_vox, dtype=np.uint8))
    outcome = finetune._validate(tmp_path, nothing, table, list(table.cases[:2]), evaluation=Evaluation("brats_voxel"))
    assert outcome.message == "mean Dice 0.0000 over 2 held-out cases and 2 labels"
    summary = read_json(tmp_path / "validation" / "summary.json")
    assert summary["protocol"] == "brats_voxel" and set(summary["metrics"]) == {"both", "dark", "mean"}
    assert summary["metrics"]["dark"]["hd95"]["mean"] == pytest.approx(373.13, abs=0.005)


def test_the_loss_of_regions_is_the_formula_of_the_papers():
    """Soft Dice of each region over the batch, averaged, and binary cross-entropy, written here once more."""
    regions = {"both": (1, 2), "dark": (2,)}
    plan = Plan({}, LABELS, ("CT",), (4, 4, 4), regions=regions)
    logits = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 3, (2, 1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    dice, entropy = fitting._of_regions(plan, logits, y)
    wanted_dice, wanted_entropy = 0.0, 0.0
    for r, held in enumerate(regions.values()):
        p, g = 1 / (1 + np.exp(-logits[:, r].double().numpy())), np.isin(y[:, 0].numpy(), held)
        wanted_dice += (1 - (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5)) / 2
        wanted_entropy += -np.where(g, np.log(p), np.log(1 - p)).mean() / 2
    assert float(dice) == pytest.approx(wanted_dice, abs=1e-5)
    assert float(entropy) == pytest.approx(wanted_entropy, abs=1e-5)


def test_what_a_run_leaves(data, trained):
    splits = read_json(trained / "splits.json")
    assert sorted(splits["train"] + splits["validation"]) == [f"case_{i}" for i in range(6)]
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "model.json", "checkpoints/last.ckpt"):
        assert (trained / name).exists()
    rows = read_csv(trained / "validation" / "cases.csv")
    assert {(row["case"], row["label"]) for row in rows} == {(case, label) for case in splits["validation"] for label in LABELS}
    for number, case in enumerate(splits["validation"]):
        image = read_image(data / "imagesTr" / f"{case}.nii.gz")
        assert read_label(trained / "validation" / f"{case}.nii.gz").grid.almost_equal(image.grid)
        assert (trained / "pictures" / f"overlay_{number:04d}.png").exists()
    assert str(data) not in "".join(path.read_text() for path in trained.glob("*.json*"))


def test_predict_and_evaluate_give_the_validation_again(data, recipe, trained, tmp_path):
    names = read_json(trained / "splits.json")["validation"]
    outcome = predict.run(trained, [data / "imagesTr" / f"{name}.nii.gz" for name in names], out=tmp_path / "p")
    assert outcome.failed == 0
    references = tmp_path / "r"
    references.mkdir()
    for name in names:
        shutil.copy(data / "labelsTr" / f"{name}.nii.gz", references)
    assert evaluate.run(tmp_path / "p", references, recipe=recipe, out=tmp_path / "e").failed == 0
    assert read_json(tmp_path / "e" / "summary.json") == read_json(trained / "validation" / "summary.json")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(data, recipe, tmp_path, monkeypatch, number):
    run(recipe, data=data, out=tmp_path / "whole")
    step = fitting._step

    def step_then_signal(current, lr, cases):
        if current.steps_done == 3:
            os.kill(os.getpid(), number)
        return step(current, lr, cases)

    monkeypatch.setattr(fitting, "_step", step_then_signal)
    stopped = run(recipe, data=data, out=tmp_path / "parts")
    assert "stopped by a signal after step 4" in stopped.message and not stopped.finished
    assert not (tmp_path / "parts" / "model.json").exists()
    monkeypatch.undo()
    torch.randn(3)  # the state of torch's own generator must not matter
    run(recipe, data=data, out=tmp_path / "parts", options=Options(resume=True))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    for name in ("cases.csv", "summary.json"):
        assert (tmp_path / "whole/validation" / name).read_text() == (tmp_path / "parts/validation" / name).read_text()


def test_resume_wants_the_same_run(data, recipe, tmp_path):
    run(recipe, data=data, out=tmp_path / "run")
    with pytest.raises(BadInput, match="optimisation, seed"):
        run(recipe, data=data, out=tmp_path / "run", options=Options(resume=True, seed=1, overrides=("optimisation.steps=9",)))


def test_a_bundles_weights_reach_the_encoder(data, recipe, tmp_path, monkeypatch):
    folder, encoder = write_bundle(tmp_path / "bundle")
    seen = {}

    def look(current, *rest):
        seen.update({name: tensor.clone() for name, tensor in current.net.net.encoder.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("volssl.finetune.train", look)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data=data, out=tmp_path / "run", options=Options(weights=folder))
    assert all(torch.equal(tensor, seen[name]) for name, tensor in encoder.state_dict().items())


def test_a_run_tells_the_voxels_it_took_from_the_card(data, recipe, tmp_path):
    folder, _ = write_bundle(tmp_path / "bundle", window=(-500.0, 700.0), spacing_mm=(2.0, 2.0, 2.0))
    settings = {"weights": folder, "overrides": ("weights.preparation=card", "optimisation.steps=1")}
    run(recipe, data=data, out=tmp_path / "run", options=Options(**settings))
    used = read_json(tmp_path / "run" / "splits.json")["weights"]["prepared"]
    assert (used["window"], used["spacing_mm"]) == ([-500.0, 700.0], [2.0, 2.0, 2.0])
    assert used == read_json(tmp_path / "run" / "model.json")["preparation"]
    assert "splits.json, weights.prepared" in (tmp_path / "run" / "recipe.yaml").read_text().splitlines()[0]
    run(recipe, data=data, out=tmp_path / "run", options=Options(**settings, resume=True))


def test_the_encoder_is_trained_too(data, recipe, tmp_path):
    folder, encoder = write_bundle(tmp_path / "bundle")
    run(recipe, data=data, out=tmp_path / "run", options=Options(weights=folder))
    after = {name.removeprefix("net.encoder."): tensor for name, tensor in weights(tmp_path / "run").items()}
    assert all(not torch.equal(tensor, after[name]) for name, tensor in encoder.state_dict().items() if "weight" in name)
    assert read_json(tmp_path / "run" / "splits.json")["weights_sha256"] == read_json(folder / "card.json")["sha256"]


def test_more_input_channels_take_the_first_kernel_by_share(recipe, tmp_path, monkeypatch):
    root = write_msd(tmp_path / "two", channels=2)
    for path in (root / "imagesTr").iterdir():
        volume = read_image(path)
        nibabel.save(nibabel.Nifti1Image(np.stack([volume.array_CXYZ[0]] * 2, -1), volume.grid.affine), path)
    folder, encoder = write_bundle(tmp_path / "bundle")
    seen = []

    def look(current, *rest):
        seen.append(current.net.net.encoder.levels[0][0].conv.weight.detach().clone())
        raise KeyboardInterrupt

    monkeypatch.setattr("volssl.finetune.train", look)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data=root, out=tmp_path / "run", options=Options(weights=folder))
    assert torch.equal(seen[0], encoder.levels[0][0].conv.weight.repeat(1, 2, 1, 1, 1) / 2)


def test_with_and_without_weights_see_the_same_batches_and_decoder(data, recipe, tmp_path, monkeypatch):
    folder, _ = write_bundle(tmp_path / "bundle")
    seen, decoders = [], []
    losses = fitting._losses

    def look(current, x, y):
        if current.steps_done == 0:
            decoders.append({name: tensor.clone() for name, tensor in current.net.state_dict().items() if "encoder" not in name})
        seen.append((x.clone(), y.clone()))
        return losses(current, x, y)

    monkeypatch.setattr(fitting, "_losses", look)
    run(recipe, data=data, out=tmp_path / "scratch")
    torch.randn(5)  # the state of torch's own generator must not matter
    run(recipe, data=data, out=tmp_path / "warm", options=Options(weights=folder))
    assert len(seen) == 12
    for (x, y), (x_warm, y_warm) in zip(seen[:6], seen[6:], strict=True):
        assert torch.equal(x, x_warm) and torch.equal(y, y_warm)
    assert decoders[0] and all(torch.equal(tensor, decoders[1][name]) for name, tensor in decoders[0].items())


def test_a_full_disk_loses_nothing(data, recipe, tmp_path, small_disk, capsys):
    run(recipe, data=data, out=tmp_path / "whole")
    out = small_disk("400k") / "run"  # room for one checkpoint; the next is written beside it before it takes its place
    assert run_verb("finetune", {"recipe": recipe, "data": data, "out": out}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert not list(out.rglob(".tmp-*")) and not (out / "model.json").exists()
    assert Checkpoints(out, 1, 1).load()["steps_done"] == 3
    small_disk("8m")
    assert run_verb("finetune", {"recipe": recipe, "data": data, "out": out, "resume": True}) == 0
    whole, mended = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], mended[name]) for name in whole)
    assert untimed(tmp_path / "whole") == untimed(out)


@pytest.mark.parametrize("files", range(14))
def test_a_disk_that_fills_up_at_any_file_is_one_clear_error(data, recipe, tmp_path, monkeypatch, no_room_after, files, capsys):
    wanted = {"recipe": recipe, "data": data, "out": tmp_path / "run", "overrides": ("optimisation.steps=3",)}
    no_room_after(files)
    assert run_verb("finetune", wanted) == 2
    assert f"--out {tmp_path / 'run'}: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".tmp-*"))
    monkeypatch.undo()
    assert run_verb("finetune", wanted | {"resume": True}) == 0
    assert len(list((tmp_path / "run" / "validation").glob("*.nii.gz"))) == 3


REFUSED = [
    ({"weights": {"width": 8}}, "misshapen"),
    ({"weights": {"window": (-200.0, 300.0)}}, "preparation.window must be"),
    ({"weights": {"normalisation": "zscore"}}, "preparation.patches must be zscore"),
    ({"weights": {"spacing_mm": (2.0, 1.0, 1.0)}}, r"null.*in 3 of 3 training cases, such as \(1\.0, 1\.0, 1\.0\) mm in case_"),
    ({"weights": {"spacing_mm": (2.0, 1.0, 1.0)}, "overrides": ("preparation.spacing_mm=[1, 1, 1]",)}, "preparation.spacing_mm must be"),
    ({"fold": 2}, "--fold"),
    ({"labels": 5}, "--labels"),
    ({"overrides": ("folds.count=7",)}, "7 folds, 6 patient"),
    ({"overrides": ("labels={bright: 1}",)}, r"(?s)6 of 6 cases.*found \[2\]"),
    ({"overrides": ("labels={bright: 1, dark: 2, other: 3}",)}, "among the data set's"),
    ({"overrides": ("labels={bright: 2, dark: 1}",)}, "bright: value must be the data set's, 1; found 2"),
    ({"overrides": ("regions={both: [1, 2], bright: [1, 2]}",)}, "exactly one value"),
    ({"overrides": ("regions={bright: [1]}",)}, "dark lies in none"),
    ({"overrides": ("net.in_channels=4",)}, "net.in_channels"),
    ({"overrides": ("sampling.patch_vox=[15, 16, 16]",)}, "multiple of the net's stride 2"),
    ({"overrides": ("sampling.patch=3",)}, "unknown key"),
    ({"overrides": ("optimisation.steps=0",)}, "steps >= 1"),
    ({"overrides": ("evaluation.protocol=brats2022",)}, "must be one of brats2023"),
    ({"overrides": ("evaluation={protocol: lits2017}", "labels={bright: 1}")}, "label"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refused_before_out_is_touched(data, recipe, tmp_path, given, message):
    if "weights" in given:
        given = given | {"weights": write_bundle(tmp_path / "bundle", **given["weights"])[0]}
    with pytest.raises(BadInput, match=message):
        run(recipe, data=data, out=tmp_path / "run", options=Options(**given))
    assert not (tmp_path / "run").exists()


def test_labels_that_a_label_map_cannot_hold_are_refused(recipe, tmp_path):
    root = write_msd(tmp_path / "data")
    values = read_json(root / "dataset.json")
    values["labels"]["300"] = "giant"
    (root / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match="giant: value must be 1 to 255"):
        run(recipe, data=root, out=tmp_path / "run", options=Options(overrides=("labels=null",)))


def test_out_is_looked_at_before_the_cases_are_read(recipe, tmp_path, monkeypatch):
    root = write_msd(tmp_path / "in" / "data")
    monkeypatch.setattr("volssl.finetune.LabelledPatches", None)  # so that reading would be a TypeError
    (tmp_path / "in" / "recipe.yaml").write_text("verb: finetune")
    with pytest.raises(BadInput, match="must be new or empty"):
        run(recipe, data=root, out=tmp_path / "in")
    with pytest.raises(BadInput, match="would delete the input"):
        run(recipe, data=root, out=tmp_path / "in", options=Options(overwrite=True))
    assert (root / "dataset.json").exists()


def test_resume_does_not_write_into_a_folder_of_somebody_else(data, recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"found no recipe\.yaml"):
        run(recipe, data=data, out=tmp_path, options=Options(resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_mismatch_can_be_accepted(data, recipe, tmp_path):
    folder, _ = write_bundle(tmp_path / "bundle", window=(-200.0, 300.0), spacing_mm=(2.0, 1.0, 1.0))
    options = Options(weights=folder, overrides=("optimisation.accept_mismatch=true",))
    assert run(recipe, data=data, out=tmp_path / "run", options=options).failed == 0


def test_a_missing_label_is_named(recipe, tmp_path):
    root = write_msd(tmp_path / "data")
    (root / "labelsTr" / "case_2.nii.gz").unlink()
    with pytest.raises(BadInput, match="case_2"):
        run(recipe, data=root, out=tmp_path / "run")


def test_a_loss_that_is_not_finite_names_step_term_and_cases(data, recipe, tmp_path, monkeypatch):
    losses = fitting._losses

    def broken(current, x, y):
        made = losses(current, x, y)
        return made | {"dice": made["dice"] * float("nan")} if current.steps_done == 2 else made

    monkeypatch.setattr(fitting, "_losses", broken)
    with pytest.raises(NotFinite, match=r"step 2.*dice = nan.*case_"):
        run(recipe, data=data, out=tmp_path / "run")


def test_labels_draws_a_share_of_the_training_fold(data, recipe, tmp_path):
    run(recipe, data=data, out=tmp_path / "run", options=Options(labels=0.34, overrides=("optimisation.steps=1",)))
    splits = read_json(tmp_path / "run" / "splits.json")
    assert len(splits["train"]) == 1
    assert len(splits["validation"]) == 3
    assert not set(splits["train"]) & set(splits["validation"])


def test_every_method_and_seed_draws_the_same_cases_and_more_of_them_hold_the_fewer(data, recipe, tmp_path):
    folder, _ = write_bundle(tmp_path / "bundle")
    arms = {"scratch": {}, "weights": {"weights": folder}, "seed": {"seed": 7}, "more": {"labels": 2}}
    for name, arm in arms.items():
        options = Options(**{"labels": 1, "fold": 1, "overrides": ("folds.count=2", "optimisation.steps=1")} | arm)
        run(recipe, data=data, out=tmp_path / name, options=options)
    drawn = {name: set(read_json(tmp_path / name / "splits.json")["train"]) for name in arms}
    assert drawn["scratch"] == drawn["weights"] == drawn["seed"] and len(drawn["scratch"]) == 1
    assert drawn["scratch"] < drawn["more"]


def test_settings_that_are_off_by_default(recipe, tmp_path):
    grid = Grid((20, 18, 16), np.diag([-1.0, 1.0, 2.0, 1.0]))
    root = write_msd(tmp_path / "data", grid=grid)
    wanted = (
        "optimisation.deep_supervision=true",
        "optimisation.optimizer=sgd",
        "optimisation.average=0",
        "preparation.spacing_mm=[1, 1, 1]",
        "preparation.patches=zscore",
        "inference.flips=[true, false, true]",
        "net={name: folded, width: 2, depth: 2}",
    )
    outcome = run(recipe, data=root, out=tmp_path / "run", options=Options(overrides=wanted))
    assert outcome.failed == 0
    label = read_label(next((tmp_path / "run" / "validation").glob("*.nii.gz")))
    assert label.grid.almost_equal(grid)


@pytest.mark.parametrize("name", ["hippocampus", "segment", "demo_finetune"])
def test_shipped_recipes_are_whole(name):
    assert recipes.parse(recipes.load(name, verb="finetune"), PARTS, name)
