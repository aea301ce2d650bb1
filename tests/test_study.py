"""The study end to end on tiny cases: the same table however it is run, failures shown, and what would spoil it refused."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from labelled import blobs, write_msd

from volssl import cells, pools, report
from volssl import recipe as recipes
from volssl import study as verb_study
from volssl.__main__ import run_verb
from volssl.archive import write_nifti
from volssl.arms import faults_of, planned, shrunk
from volssl.datasets import Case, CaseTable, open_dataset
from volssl.export import bundle
from volssl.files import BadInput, read_csv, read_json
from volssl.holdout import Seen, Shares, divided
from volssl.nets.unet import UNet
from volssl.rounds import Study, count_left, ready
from volssl.study import Options, run
from volssl.volume import Grid

NET = {"name": "unet", "width": 4, "depth": 2, "norm": "instance"}
RECIPE = {
    "verb": "study",
    "split": {"pretrain": 5, "validation": 2, "test": 3, "seed": 0},
    "design": {"labels": [2, 5], "seeds": [0, 1], "overlays": 2},
    "tuning": {"lr": [0.002, 0.01]},
    "prepare": {
        "modality": "CT",
        "spacing_mm": [1, 1, 1],
        "body": {"threshold": -800, "margin_mm": 5},
        "intensity": {"clip": [-1024, 3071], "window": [-1000, 1000]},
    },
    "finetune": {
        "labels": {"bright": 1, "dark": 2},
        "net": NET,
        "preparation": {"spacing_mm": None, "normalisation": "window", "window": [-1000, 1000], "patches": "zscore"},
        "sampling": {"patch_vox": [16, 16, 16], "batch_size": 1, "foreground": 0.5, "margin": 0.0},
        "optimisation": {"steps": 6, "precision": "fp32", "average": 0.9},
        "saving": {"log_every": 3, "checkpoint_every": 100},
    },
    "pretrain": {
        "net": NET,
        "method": {
            "name": "pcrlv2",
            "crops": {"global_sizes_vox": [[12, 12, 12], [16, 12, 12]], "min_overlap": 0.1, "locals": 1, "local_sizes_vox": [[8, 8, 8]]},
            "out_vox": [[16, 16, 16], [8, 8, 8]],
        },
        "patches": {"box_vox": [16, 16, 16], "batch_size": 2, "workers": 0, "min_body": 0.0},
        "training": {"steps": 3, "lr": 0.01, "precision": "fp32", "compile": "off"},
        "saving": {"health_every": 0, "probe_every": 0, "log_every": 1},
    },
    "arms": {"scratch": {}, "pcrlv2": {"pretrain": {}}},
}
OFTEN = ("hours", "pictures")  # of the summary: measured, or drawn only where cells are tested


def written(path, **changes):
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_msd(tmp_path_factory.mktemp("data"), cases=10)


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    assert run(written(folder / "r.yaml"), data=data, out=out).failed == 0
    return out, folder / "r.yaml"


def table_of(out):
    return (out / "results.csv").read_bytes(), {key: value for key, value in read_json(out / "summary.json").items() if key not in OFTEN}


def test_what_a_study_leaves(study):
    out, _ = study
    rows = read_csv(out / "results.csv")
    assert {(row["arm"], row["labels"], row["seed"]) for row in rows} == {
        (arm, n, seed) for arm in ("scratch", "pcrlv2") for n in "25" for seed in "01"
    }
    assert len(rows) == 8 * 3 * 2 and {row["case"] for row in rows} == {"0", "1", "2"}
    summary = read_json(out / "summary.json")
    assert summary["complete"] and not summary["failures"]
    for arm in summary["arms"]:
        for at in arm["at"]:
            values = [float(row["value"]) for row in rows if (row["arm"], row["labels"]) == (arm["name"], str(at["labels"]))]
            assert at["mean"] == pytest.approx(np.mean(values), abs=1e-6) and at["ci95"][0] <= at["mean"] <= at["ci95"][1]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "data:image/svg" in page
    assert all(f"{at['gain']['mean']:.3f}".replace("-", "−") in page for at in summary["arms"][1]["at"])


def test_the_chosen_learning_rate_is_the_best_in_validation_for_every_arm(study):
    out, _ = study
    for row in read_json(out / "summary.json")["tuning"]:
        assert row["chosen"] == max(row["tried"], key=lambda tried: tried["dice"])["lr"]
        assert {tried["lr"] for tried in row["tried"]} == {0.002, 0.01}
    used = {(row["arm"], row["labels"]): float(row["lr"]) for row in read_csv(out / "results.csv")}
    told = {(row["arm"], str(row["labels"])): row["chosen"] for row in read_json(out / "summary.json")["tuning"]}
    assert used == told


def test_only_validation_cases_choose_and_only_the_chosen_is_tested(study):
    out, _ = study
    shares = read_json(out / "splits.json")["folds"][0]
    assert not set(shares["test"]) & (set(shares["validation"]) | set(shares["pretrain"]))
    for path in (out / "cells").glob("*/*/result.json"):
        scored = {row["case"] for row in read_json(path)["validation"]}
        assert scored == (set(range(len(shares["validation"]))) if "seed_0" in str(path) else set())
    chosen = {(row["arm"], row["labels"]): row["chosen"] for row in read_json(out / "summary.json")["tuning"]}
    for path in (out / "cells").glob("*/*/model.json"):
        cell = re.fullmatch(r"labels_(\d+)-seed_\d-fold_0-lr_(.*)", path.parent.name)
        is_chosen = chosen[path.parent.parent.name, int(cell[1])] == float(cell[2])
        assert (path.parent / "test.json").exists() == is_chosen


def test_arms_share_their_draws_which_are_nested_and_never_tested(study):
    out, _ = study
    shares = read_json(out / "splits.json")["folds"][0]
    drawn = {}
    for path in (out / "cells").glob("*/*/splits.json"):
        told = read_json(path)
        drawn.setdefault((told["labels"], told["seed"]), set()).add(frozenset(told["train"]))
        assert set(told["train"]) <= set(shares["pretrain"])
    assert all(len(of_arms) == 1 for of_arms in drawn.values()) and len(drawn) == 4
    for seed in (0, 1):
        assert set.union(*map(set, drawn[2, seed])) < set.union(*map(set, drawn[5, seed]))
    assert drawn[2, 0] != drawn[2, 1]
    stored = {row["content_hash"] for row in read_csv(out / "stores" / "fold_0" / "manifest.csv")}
    images = read_json(out / "splits.json")["images"]
    assert stored == {images[name][0] for name in shares["pretrain"]}


def test_a_deleted_cell_gives_the_same_table_to_the_bit(study, data, tmp_path):
    out, recipe = study
    copy = shutil.copytree(out, tmp_path / "copy")
    before = table_of(copy)
    gone = next((copy / "cells" / "pcrlv2").glob("labels_0002-seed_0*"))
    weights = (gone / "model.safetensors").read_bytes()
    shutil.rmtree(gone)
    tested = next((copy / "cells" / "scratch").glob("*/test.json"))
    tested.unlink()
    assert run(recipe, data=data, out=copy, options=Options(resume=True)).failed == 0
    assert (gone / "model.safetensors").read_bytes() == weights
    assert table_of(copy) == before


@pytest.mark.slow
def test_two_processes_give_the_same_table_to_the_bit(study, data, tmp_path):
    out, recipe = study
    copy = shutil.copytree(out, tmp_path / "copy")
    before = table_of(copy)
    for cell in [*(copy / "cells" / "pcrlv2").glob("labels_0005-seed_0*"), copy / "pretrainings"]:
        shutil.rmtree(cell)
    assert run(recipe, data=data, out=copy, means=pools.Means(workers=2), options=Options(resume=True)).failed == 0
    assert table_of(copy) == before
    for cell in (copy / "cells").glob("*/*/model.safetensors"):
        assert cell.read_bytes() == (out / cell.relative_to(copy)).read_bytes()
    twin, old = (next((root / "pretrainings").glob("*/*/bundle/encoder.safetensors")) for root in (copy, out))
    assert twin.read_bytes() == old.read_bytes()


def test_the_report_of_a_study_is_its_page(study, tmp_path):
    out, _ = study
    assert run_verb("report", {"runs": [out], "out": tmp_path / "again.html", "overwrite": False}) == 0
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()
    with pytest.raises(BadInput, match="alone"):
        report.run([out, out], out=tmp_path / "two.html")


def test_no_page_names_a_case_or_a_path(study, data):
    out, _ = study
    text = "".join((out / name).read_text() for name in ("report.html", "summary.json", "results.csv", "failures.csv", "estimate.json"))
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "case_0" not in text.replace("case_0000", "").replace("case_0001", "").replace("case_0002", "")
    assert str(data) not in text and str(out) not in text


def test_an_arm_that_fails_is_shown_as_failed(data, tmp_path):
    broken = {"pretrain": {"training": {"lr": 1.0e30, "optimizer": "sgd", "steps": 4}}}
    design = {"labels": [2], "seeds": [0]}
    recipe = written(tmp_path / "r.yaml", arms={**RECIPE["arms"], "broken": broken}, design=design, tuning={"lr": [0.01]})
    given = {"recipe": recipe, "data": data, "out": tmp_path / "out", "estimate": False, "quick": False, "overrides": ()}
    assert run_verb("study", given) == 3
    summary = read_json(tmp_path / "out" / "summary.json")
    arm = next(arm for arm in summary["arms"] if arm["name"] == "broken")
    assert arm["at"][0]["pays"] == "failed" and "mean" not in arm["at"][0] and not summary["complete"]
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    assert failure["job"].startswith("broken/pretraining") and "finite" in failure["reason"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert failure["job"] in page and "<td>broken</td>" in page
    assert next(arm for arm in summary["arms"] if arm["name"] == "pcrlv2")["at"][0]["gain"]


def test_what_a_job_raises_costs_itself_alone(monkeypatch, tmp_path):
    cell = cells.Cell("scratch", 2, 0, 0, 0.01)
    job = cells.Testing(cell, tmp_path, None, (), cells.Means(1))
    assert "must be a finished finetune run" in cells.do(job) and str(tmp_path) not in cells.do(job)
    monkeypatch.setattr(cells, "read_model", lambda folder: 1 / 0)
    assert "ZeroDivisionError at test_study.py" in cells.do(job)
    assert cells.do(cells.Testing(cell, tmp_path, None, (), cells.Means(1, not_after=0.0))) == cells.LATER


def test_hours_leave_the_rest_for_later(study, data, tmp_path):
    out, recipe = study
    copy = shutil.copytree(out, tmp_path / "copy")
    before = table_of(copy)
    shutil.rmtree(copy / "cells" / "pcrlv2")
    outcome = run(recipe, data=data, out=copy, options=Options(resume=True, hours=1e-9))
    assert not outcome.finished and "4 of 8 cells" in outcome.message
    assert "Not finished" in (copy / "report.html").read_text()
    assert run(recipe, data=data, out=copy, options=Options(resume=True)).finished
    assert table_of(copy) == before


def test_everything_that_spoils_it_is_told_at_once_and_nothing_written(data, tmp_path):
    spoilt = shutil.copytree(data, tmp_path / "data")
    image, label = blobs(100)
    grid = Grid(image.shape, np.eye(4))
    (shares,) = divided(_table(spoilt), planned({k: v for k, v in RECIPE.items() if k != "verb"}, "r").split, 1)
    for case in (shares.pretrain[0], shares.test[0]):
        write_nifti(case.images[0], image, grid, np.int16)
        write_nifti(case.label, label, grid, np.uint8)
    net = UNet(1, width=6, depth=2, norm="instance")
    _bundle(tmp_path / "wide", net)
    arms = {
        **RECIPE["arms"],
        "given": {"bundle": str(tmp_path / "wide")},
        "views": {"pretrain": {"method": {"out_vox": [[15, 16, 16], [8, 8, 8]]}}},
    }
    recipe = written(tmp_path / "r.yaml", arms=arms, design={"labels": [2, 6], "seeds": [0]})
    with pytest.raises(BadInput) as error:
        run(recipe, data=spoilt, out=tmp_path / "out")
    told = str(error.value)
    assert "4 thing(s) to mend" in told
    for part in ("at most the 5 patients", f"{shares.pretrain[0].case_id} (pretrain)", "the same values", "arms.given: ", "multiple of"):
        assert part in told, part
    assert not (tmp_path / "out").exists()


def test_no_room_is_told_before_it_begins(data, tmp_path, monkeypatch):
    monkeypatch.setattr("volssl.costs.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(BadInput, match="must have room for about"):
        run(written(tmp_path / "r.yaml"), data=data, out=tmp_path / "out")


def test_a_bundle_that_saw_the_test_cases_is_refused_and_an_untold_one_is_unknown(study, data, tmp_path):
    out, _ = study
    made = next((out / "pretrainings" / "pcrlv2").glob("*/bundle"))
    arms = {"scratch": {}, "given": {"bundle": str(made)}}
    other = {"split": {**RECIPE["split"], "seed": 1}, "design": {"labels": [2], "seeds": [0]}, "tuning": {"lr": [0.01]}}
    recipe = written(tmp_path / "r.yaml", arms=arms, **other)
    with pytest.raises(BadInput, match="must not have been pretrained on test cases"):
        run(recipe, data=data, out=tmp_path / "out")
    untold = shutil.copytree(made, tmp_path / "untold")
    (untold / "images.csv").unlink()
    recipe = written(tmp_path / "r.yaml", arms={"scratch": {}, "given": {"bundle": str(untold)}}, **other)
    assert run(recipe, data=data, out=tmp_path / "out").failed == 0
    assert "<strong>unknown</strong>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"arms": {"pcrlv2": {"pretrain": {}}}}, "must hold scratch"),
        ({"arms": {"scratch": {"pretrain": {}}, "a": {"pretrain": {}}}}, "must start from nothing"),
        ({"arms": {"scratch": {}, "a": {}}}, "either bundle or pretrain"),
        ({"arms": {"scratch": {}, "a": {"pretrain": {"training": {"step": 1}}}}}, "training.step: unknown key"),
        ({"arms": {"scratch": {}, "a": {"pretrain": {}, "finetune": {"optimisation": {"steps": 9}}}}}, "is the same for all arms"),
        ({"tuning": {"lr": [0.01], "at": [3]}}, "must be among design.labels"),
        ({"design": {"labels": [5, 2]}}, "rising"),
        ({"prepare": None}, "how images become a store"),
        ({"tuning": {"lr": [0.01], "seeds": 4}}, "at most the 3 of design.seeds"),
    ],
)
def test_faults_of_a_recipe(change, told):
    values = {key: value for key, value in {**RECIPE, **change}.items() if key != "verb"}
    if "seeds" not in values["design"]:
        values["design"] = values["design"] | {"seeds": [0, 1, 2]}
    with pytest.raises(BadInput, match=re.escape(told)):
        planned(values | ({"design": {"labels": [2, 5]}} if "tuning" in change and "seeds" in change["tuning"] else {}), "r.yaml")


def test_faults_of_all_arms_come_together():
    values = {key: value for key, value in RECIPE.items() if key != "verb"}
    arms = {"scratch": {}, "a": {"pretrain": {"method": {"out_vox": 3}}}, "b": {"bundel": "x"}}
    with pytest.raises(BadInput) as error:
        planned(values | {"arms": arms}, "r.yaml")
    assert "arms.a: " in str(error.value) and "bundel" in str(error.value)


def test_one_learning_rate_per_arm_is_chosen_at_the_counts_asked_for(tmp_path):
    values = {key: value for key, value in RECIPE.items() if key != "verb"} | {"tuning": {"lr": [0.1, 0.2], "at": [5]}}
    study = Study(tmp_path, planned(values, "r"), _table(None), (), {})
    scratch = study.plan.arms[0]
    for lr, dice in ((0.1, 0.4), (0.2, 0.6)):
        cell = cells.Cell("scratch", 5, 0, 0, lr)
        study.folder(cell).mkdir(parents=True)
        row = {"case": 0, "label": "bright", "metric": "dice", "value": dice, "note": ""}
        (study.folder(cell) / "result.json").write_text(json.dumps({"validation": [row]}))
    assert study.choice(scratch, 2, 0) == study.choice(scratch, 5, 0) == 0.2
    assert not study.is_tuning(cells.Cell("scratch", 2, 0, 0, 0.1)) and study.is_tuning(cells.Cell("scratch", 5, 0, 0, 0.1))


def test_quick_shrinks():
    values = shrunk({key: value for key, value in RECIPE.items() if key != "verb"})
    plan = planned(values, "r")
    assert [arm.name for arm in plan.arms] == ["scratch", "pcrlv2"]
    assert plan.design.labels == (2, 5) and plan.design.seeds == (0,) and plan.split.test == 2
    assert plan.design.quick and not planned({key: value for key, value in RECIPE.items() if key != "verb"}, "r").design.quick
    assert plan.arms[1].pretrain["training"]["steps"] == 3 and plan.arms[1].finetune["optimisation"]["steps"] == 4


@pytest.mark.parametrize("name", ["study_hippocampus", "study_hippocampus_levers", "study_phantom_ct"])
def test_shipped_recipes_hold(name):
    plan = planned(recipes.load(name, verb="study"), name)
    if not plan.split.develop:
        assert {"scratch", "official", "paper", "no_restoration", "no_comparison", "skips"} <= {arm.name for arm in plan.arms}
    labels = {"a": 1} if plan.arms[0].finetune["labels"] is None else plan.arms[0].finetune["labels"]
    table = CaseTable((), labels, ("image",))
    assert faults_of(plan, table, [(1.0, 1.0, 1.0)]) == []
    steps = {arm.finetune["optimisation"]["steps"] for arm in plan.arms}
    assert len(steps) == 1


def test_arms_of_one_pretraining_share_it(tmp_path):
    values = {key: value for key, value in RECIPE.items() if key != "verb"}
    over = {"finetune": {"weights": {"decoder": True}}}
    arms = {"scratch": {}, "one": {"pretrain": {}}, "two": {"pretrain": {}, **over}, "three": {"pretrain": {"training": {"steps": 9}}}}
    plan = planned(values | {"arms": arms}, "r")
    assert [arm.pretrained for arm in plan.arms] == ["", "one", "one", "three"]
    study = Study(tmp_path, plan, _table(None), _shares(tmp_path), _seen())
    assert [left["pretraining"] for left in count_left(study).values()] == [0, 1, 0, 1]
    jobs = ready(study, cells.Means(1), ())
    assert [name for name in jobs if "pretraining" in name] == ["one/pretraining-seed_0-fold_0", "three/pretraining-seed_0-fold_0"]
    assert study.weights(plan.arms[1], 0, 0) == study.weights(plan.arms[2], 0, 0) != study.weights(plan.arms[3], 0, 0)
    assert not any(name.startswith(("one/labels", "two/labels")) for name in jobs)
    made = study.pretraining(plan.arms[1], 0, 0)
    made.mkdir(parents=True)
    (made / "pretrained.json").write_text("{}")
    jobs = ready(study, cells.Means(1), ())
    assert {name.split("/")[0] for name in jobs} == {"scratch", "one", "two", "three"}


def test_arm_after_arm_and_what_a_job_makes_possible_before_the_next_arm(tmp_path, monkeypatch):
    """A worker that is free takes what the first arms still lack, so that a short sitting shows something of them."""
    values = {key: value for key, value in RECIPE.items() if key != "verb"}
    arms = {"scratch": {}, "one": {"pretrain": {}}, "two": {"pretrain": {"training": {"steps": 9}}}}
    study = Study(tmp_path, planned(values | {"arms": arms, "tuning": {"lr": [0.1]}}, "r"), _table(None), _shares(tmp_path), _seen())
    done: list[tuple[str, str]] = []

    def do(job):
        done.append((job.out.parent.name, type(job).__name__))
        job.out.mkdir(parents=True, exist_ok=True)
        row = {"case": 0, "label": "bright", "metric": "dice", "value": 0.5, "note": ""}
        name = {"Pretraining": cells.PRETRAINED, "Fitting": cells.RESULT, "Testing": cells.TEST}[type(job).__name__]
        (job.out / name).write_text(json.dumps({"validation": [row]}))
        return cells.DONE

    monkeypatch.setattr(verb_study, "do", do)
    assert list(verb_study._answers(study, pools.Means(0), cells.Means(1), {}))
    order = [arm for arm, _ in done]
    assert order == sorted(order, key=["scratch", "one", "two"].index)
    for arm in ("one", "two"):
        kinds = [kind for name, kind in done if name == arm]
        assert kinds[0] == "Pretraining" and kinds.count("Fitting") == kinds.count("Testing") == 4  # two numbers of labels, two seeds
        assert kinds[1:3] == ["Fitting", "Testing"]


def test_a_free_worker_begins_the_next_arm_while_a_pretraining_runs(tmp_path):
    values = {key: value for key, value in RECIPE.items() if key != "verb"}
    arms = {"scratch": {}, "one": {"pretrain": {}}, "two": {"pretrain": {"training": {"steps": 9}}}}
    study = Study(tmp_path, planned(values | {"arms": arms}, "r"), _table(None), _shares(tmp_path), _seen())
    begun: set[str] = set()
    jobs = verb_study._next_jobs(study, cells.Means(1), (), begun)
    first = {name: job for name, (job,) in itertools.takewhile(lambda job: job is not None, jobs)}
    assert begun == set(first) == set(ready(study, cells.Means(1), ()))
    assert [name for name in first if not name.startswith("scratch")] == ["one/pretraining-seed_0-fold_0", "two/pretraining-seed_0-fold_0"]
    assert next(jobs) is None  # all that is ready has been begun; what ends makes room for more
    made = first["two/pretraining-seed_0-fold_0"].out
    made.mkdir(parents=True)
    (made / cells.PRETRAINED).write_text("{}")
    begun.discard("two/pretraining-seed_0-fold_0")
    assert next(jobs)[0].startswith("two/labels")


def test_an_arm_may_take_the_decoder_of_its_pretraining():
    values = {key: value for key, value in RECIPE.items() if key != "verb"}
    over = {"finetune": {"weights": {"decoder": True}}}
    arms = {"scratch": {}, "without": {"pretrain": {}, **over}, "with": {"pretrain": {"net": {"skips": True}}, **over}}
    assert faults_of(planned(values | {"arms": arms}, "r"), _table(None), [(1.0, 1.0, 1.0)]) == []


@pytest.mark.slow
def test_a_quick_study_of_phantoms(tmp_path):
    assert run_verb("phantom", {"out": tmp_path / "data", "cases": 8, "organs": True, "size": 40, "seed": 0}) == 0
    narrow = ("finetune.net.width=4", "pretrain.net.width=4", "finetune.inference.overlap=0.0")
    given = {"recipe": "study_phantom_ct", "data": tmp_path / "data", "out": tmp_path / "out", "quick": True, "overrides": narrow}
    assert run_verb("study", given) == 0
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert {row["arm"] for row in rows} == {"scratch", "official"} and {row["labels"] for row in rows} == {"2", "5"}
    assert {row["label"] for row in rows} == {"liver", "lesion", "kidney", "gallbladder"}
    header = (tmp_path / "out" / "report.html").read_text().split("</header>")[0]
    assert "A quick trial" in header and read_json(tmp_path / "out" / "summary.json")["design"]["quick"] is True


def _shares(root):
    return (Shares(*(tuple(Case(name, name, (root,), None) for name in part) for part in (["a", "b", "c", "d", "e"], ["v"], ["t"]))),)


def _seen():
    return {name: Seen((1.0, 1.0, 1.0), (name,), ()) for name in "abcdevt"}


def _table(root):
    return open_dataset(root) if root is not None else CaseTable((), {"bright": 1}, ("CT",))


def _bundle(folder, net):
    card = bundle.Card(
        architecture={"name": "unet", "arguments": net.arguments},
        in_channels=1,
        spacing_mm=(1.0, 1.0, 1.0),
        orientation="RAS",
        intensity={"modality": "CT", "clip": [-1024, 3071], "window": [-1000, 1000], "normalisation": "zscore"},
        method="pcrlv2",
        recipe={},
        steps=1,
        data={},
        volssl_version="0",
        citations=(),
    )
    return bundle.write(folder, net.encoder, card)
