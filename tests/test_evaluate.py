import json

import numpy as np
import pytest

from volssl.__main__ import run_verb
from volssl.archive import write_nifti
from volssl.evaluate import Evaluation, Score, run, score_case, summarise
from volssl.files import BadInput, read_csv
from volssl.protocols.protocol import overlap as dice
from volssl.volume import Grid, Volume

GRID = Grid((4, 4, 4), np.diag([1.0, 1.0, 2.0, 1.0]))
RECIPE = "verb: finetune\nlabels: {liver: 1, lesion: 2}\n"


def maps(**boxes: tuple[int, int]) -> np.ndarray:
    """Slabs along X: name "l1" = (start, stop) sets label 1."""
    array = np.zeros((4, 4, 4), dtype=np.uint8)
    for name, (start, stop) in boxes.items():
        array[start:stop] = int(name[1:])
    return array


@pytest.fixture
def folders(tmp_path):
    predictions, references, recipe = tmp_path / "p", tmp_path / "r", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    for case, predicted, expected in (
        ("a", maps(l1=(0, 2)), maps(l1=(0, 2))),
        ("b", maps(l1=(0, 2), l2=(3, 4)), maps(l1=(1, 3), l2=(3, 4))),
    ):
        write_nifti(predictions / f"{case}.nii.gz", predicted, GRID, np.uint8)
        write_nifti(references / f"{case}.nii.gz", expected, GRID, np.uint8)
    return predictions, references, recipe, tmp_path / "out"


def test_dice_by_hand():
    one, other = np.zeros(10, dtype=bool), np.zeros(10, dtype=bool)
    one[:4], other[2:8] = True, True
    assert dice(one, other) == (pytest.approx(2 * 2 / (4 + 6)), "")


def test_the_rule_for_empty_cases():
    none, some = np.zeros(5, dtype=bool), np.ones(5, dtype=bool)
    assert dice(none, none)[0] == 1
    assert dice(none, some)[0] == 0
    assert dice(some, none)[0] == 0
    assert all(dice(*pair)[1] for pair in ((none, none), (none, some), (some, none)))


def test_cases_and_summary(folders):
    predictions, references, recipe, out = folders
    outcome = run(predictions, references, recipe=recipe, out=out)
    assert outcome.failed == 0
    rows = read_csv(out / "cases.csv")
    assert list(rows[0]) == ["case", "label", "metric", "value", "note"]
    assert {(row["case"], row["label"]): float(row["value"]) for row in rows} == {
        ("a", "liver"): 1,
        ("a", "lesion"): 1,  # absent from both
        ("b", "liver"): 0.5,
        ("b", "lesion"): 1,
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["protocol"] == "dice"
    assert summary["n_cases"] == 2
    liver = summary["metrics"]["liver"]["dice"]
    assert liver["mean"] == 0.75
    assert liver["sd"] == pytest.approx(np.std([1, 0.5], ddof=1))
    assert liver["ci95"] == [0.5, 1.0]
    assert liver["n"] == 2
    assert summary["metrics"]["mean"]["dice"]["mean"] == pytest.approx((1 + 0.75) / 2)


def test_a_missing_prediction_is_named_and_scores_0(folders):
    predictions, references, recipe, out = folders
    (predictions / "b.nii.gz").unlink()
    outcome = run(predictions, references, recipe=recipe, out=out)
    assert outcome.failed == 1
    assert [row["case"] for row in read_csv(out / "failures.csv")] == ["b"]
    assert json.loads((out / "summary.json").read_text())["metrics"]["liver"]["dice"]["mean"] == 0.5


@pytest.mark.parametrize(
    ("grid", "array", "reason"),
    [
        (Grid((4, 4, 4), np.diag([1.0, 1.0, 2.5, 1.0])), maps(l1=(0, 2)), "one grid"),
        (Grid((4, 4, 5), GRID.affine), np.zeros((4, 4, 5), dtype=np.uint8), "one grid"),
        (GRID, maps(l7=(0, 2)), "7"),
    ],
)
def test_another_grid_or_value_fails_that_case_alone(folders, grid, array, reason):
    predictions, references, recipe, out = folders
    write_nifti(predictions / "a.nii.gz", array, grid, np.uint8)
    assert run(predictions, references, recipe=recipe, out=out).failed == 1
    (row,) = read_csv(out / "failures.csv")
    assert row["case"] == "a"
    assert reason in row["reason"]
    assert str(predictions) not in (out / "failures.csv").read_text()


def test_a_truncated_prediction_fails_without_its_path(folders):
    predictions, references, recipe, out = folders
    whole = (predictions / "a.nii.gz").read_bytes()
    (predictions / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert run(predictions, references, recipe=recipe, out=out).failed == 1
    assert str(predictions) not in (out / "failures.csv").read_text()


def test_without_labels_in_the_recipe_every_value_is_a_label(folders):
    predictions, references, recipe, out = folders
    recipe.write_text("verb: finetune\nlabels: null\n")
    run(predictions, references, recipe=recipe, out=out)
    assert {row["label"] for row in read_csv(out / "cases.csv")} == {"1", "2"}


def test_folders_without_a_common_name_are_refused(folders):
    predictions, references, recipe, out = folders
    for path in predictions.iterdir():
        path.rename(path.with_name(f"pred_{path.name}"))
    with pytest.raises(BadInput, match="such as pred_a and a; rename"):
        run(predictions, references, recipe=recipe, out=out)
    assert not out.exists()


def test_empty_folders_are_refused_before_out_is_touched(folders):
    predictions, _, recipe, out = folders
    empty = predictions.parent / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="must hold label maps"):
        run(predictions, empty, recipe=recipe, out=out)
    assert not out.exists()


def test_a_missed_structure_never_improves_the_mean():
    reference = maps(l1=(0, 2))
    found = score_case("x", Volume(reference[None], GRID), Volume(reference[None], GRID), {"liver": 1})
    missed = score_case("y", Volume(maps()[None], GRID), Volume(reference[None], GRID), {"liver": 1})
    both = summarise([*found, *missed])["metrics"]["liver"]["dice"]
    assert both["mean"] == 0.5
    assert both["n"] == 2


def test_the_interval_is_the_same_every_time():
    scores = [Score(str(i), "liver", "dice", i / 10) for i in range(10)]
    assert summarise(scores) == summarise(scores)
    low, high = summarise(scores)["metrics"]["liver"]["dice"]["ci95"]
    assert low < 0.45 < high


@pytest.mark.parametrize("labels", ["{}", "{background: 0}", "{liver: 1, lesion: 1}", "{liver: 1.5}", "3"])
def test_labels_must_name_something_each_with_its_value(folders, labels):
    predictions, references, recipe, out = folders
    recipe.write_text(f"verb: finetune\nlabels: {labels}\n")
    with pytest.raises(BadInput, match="label"):
        run(predictions, references, recipe=recipe, out=out)
    assert not out.exists()


def test_a_full_disk_is_one_clear_error_and_room_mends_it(folders, small_disk, capsys):
    predictions, references, recipe, _ = folders
    wanted = {"predictions": predictions, "references": references, "recipe": recipe, "out": small_disk("4k") / "out"}
    assert run_verb("evaluate", wanted) == 2
    assert f"--out {wanted['out']}: No space left on device" in capsys.readouterr().err
    assert [path.name for path in wanted["out"].iterdir()] == ["failures.csv"]
    small_disk("1m")
    assert run_verb("evaluate", wanted | {"out": wanted["out"].with_name("again")}) == 0


@pytest.mark.parametrize("files", range(3))
def test_a_disk_that_fills_up_at_any_file_is_one_clear_error(folders, no_room_after, files, capsys):
    predictions, references, recipe, out = folders
    no_room_after(files)
    assert run_verb("evaluate", {"predictions": predictions, "references": references, "recipe": recipe, "out": out}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert len(list(out.iterdir())) == files


# ------------------------------------------------------------------------------------------------ protocols


def table_of(out) -> dict[tuple[str, str, str], float]:
    return {(row["case"], row["label"], row["metric"]): float(row["value"]) for row in read_csv(out / "cases.csv")}


def test_the_protocol_is_the_recipes_or_the_options(folders):
    predictions, references, recipe, out = folders
    run(predictions, references, recipe=recipe, out=out, protocol="lits2017")
    assert json.loads((out / "summary.json").read_text())["protocol"] == "lits2017"
    recipe.write_text(RECIPE + "evaluation: {protocol: lits2017}\n")
    run(predictions, references, recipe=recipe, out=out, overwrite=True)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["protocol"] == "lits2017" and "recall_50" in summary["metrics"]["lesion"]
    run(predictions, references, recipe=recipe, out=out, overwrite=True, protocol="dice")
    assert json.loads((out / "summary.json").read_text())["protocol"] == "dice"


@pytest.mark.parametrize(
    ("lines", "protocol", "words"),
    [
        ("", "brats2022", "must be one of brats2023, brats_voxel, dice, lits2017, luna16"),
        ("evaluation: {protocol: brats2023, settings: {dilate: 3}}", None, "known are: dilation, least_mm3, worst_mm"),
        ("evaluation: {protocol: brats2023, settings: {dilation: -1}}", None, "dilation and least_mm3"),
        ("evaluation: {protocoll: dice}", None, "known are: protocol, settings"),
        ("labels: {a: 1, b: 2, c: 9}", "brats2023", "values 1, 2, 4"),
        ("labels: {a: 1}", "lits2017", "a liver and the tumours"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused_before_out_is_touched(folders, lines, protocol, words):
    predictions, references, recipe, out = folders
    recipe.write_text(f"verb: finetune\n{lines}\n")
    with pytest.raises(BadInput, match=words):
        run(predictions, references, recipe=recipe, out=out, protocol=protocol)
    assert not out.exists()


def test_settings_reach_the_protocol():
    assert vars(Evaluation("brats2023", {"dilation": 1, "least_mm3": 2}).build()) == {"dilation": 1, "least_mm3": 2.0, "worst_mm": 374.0}


def test_regions_of_the_recipe_are_scored(folders):
    predictions, references, recipe, out = folders
    recipe.write_text(RECIPE + "regions: {whole: [1, 2], lesion: [2]}\n")
    run(predictions, references, recipe=recipe, out=out)
    # b: 2 + 1 of 4 slabs predicted, 2 + 1 expected, 1 + 1 in common.
    assert table_of(out)[("b", "whole", "dice")] == pytest.approx(2 * 2 / 6, abs=1e-6)


def test_without_a_recipe_every_value_is_a_label(folders):
    predictions, references, _, out = folders
    assert run(predictions, references, out=out).message == "mean Dice 0.8750 over 2 cases, protocol dice"


@pytest.mark.parametrize(("protocol", "worst"), [("brats2023", 374.0), ("brats_voxel", 373.128664), ("lits2017", 9001.0)])
def test_a_case_without_a_prediction_gets_the_worst_of_everything(folders, protocol, worst):
    predictions, references, recipe, out = folders
    run(predictions, references, recipe=recipe, out=out, protocol=protocol)
    before, whole = json.loads((out / "summary.json").read_text())["metrics"], table_of(out)
    (predictions / "a.nii.gz").unlink()
    assert run(predictions, references, recipe=recipe, out=out, protocol=protocol, overwrite=True).failed == 1
    after, found = json.loads((out / "summary.json").read_text())["metrics"], table_of(out)
    assert whole.keys() == found.keys()
    assert max(value for (case, _, _), value in found.items() if case == "a") == worst
    assert {value for (case, _, metric), value in found.items() if case == "a" and metric.endswith("dice")} == {0.0}
    assert after["mean"]["dice"]["mean"] < before["mean"]["dice"]["mean"]
    for region, metrics in before.items():
        for metric, numbers in metrics.items():
            if "dice" in metric and metric in after[region]:
                assert after[region][metric]["mean"] <= numbers["mean"]


def test_a_reference_that_cannot_be_read_still_leaves_its_case_in_the_mean(folders):
    predictions, references, recipe, out = folders
    (references / "b.nii.gz").write_bytes(b"no image")
    assert run(predictions, references, recipe=recipe, out=out, protocol="brats_voxel").failed == 1
    assert {value for (case, _, metric), value in table_of(out).items() if case == "b" and metric == "dice"} == {0.0}


@pytest.mark.parametrize("enhancing", [3, 4])
def test_bare_values_of_brats_are_its_regions_by_what_is_found_on_both_sides(tmp_path, enhancing):
    predictions, references, out = tmp_path / "p", tmp_path / "r", tmp_path / "out"
    # The references hold no enhancing tumour at all: only the prediction tells the convention.
    write_nifti(references / "a.nii.gz", maps(l1=(0, 1), l2=(1, 3)), GRID, np.uint8)
    write_nifti(predictions / "a.nii.gz", maps(l1=(0, 1), l2=(1, 2), **{f"l{enhancing}": (2, 3)}), GRID, np.uint8)
    assert run(predictions, references, out=out, recipe="brats").failed == 0
    found = {region: value for (_, region, metric), value in table_of(out).items() if metric == "dice"}
    assert found == {"WT": 1, "TC": pytest.approx(2 / 3, abs=1e-6), "ET": 0}
    write_nifti(references / "b.nii.gz", maps(**{f"l{7 - enhancing}": (0, 1)}), GRID, np.uint8)
    with pytest.raises(BadInput, match=r"in predictions as in references; found \[1, 2, 3, 4\]"):
        run(predictions, references, out=out, recipe="brats", overwrite=True)


def test_published_names_of_label_maps_are_those_of_their_images(tmp_path):
    predictions, references, out = tmp_path / "p", tmp_path / "r", tmp_path / "out"
    for predicted, reference in (("a", "a_seg"), ("b", "b-seg"), ("volume-3", "segmentation-3"), ("c_seg", "c_seg")):
        write_nifti(predictions / f"{predicted}.nii.gz", maps(l1=(0, 2)), GRID, np.uint8)
        write_nifti(references / f"{reference}.nii.gz", maps(l1=(0, 2)), GRID, np.uint8)
    write_nifti(references / "d_seg.nii.gz", maps(l1=(0, 2)), GRID, np.uint8)  # its image was not predicted
    assert run(predictions, references, out=out).failed == 1
    assert {case: value for (case, _, _), value in table_of(out).items()} == {"a": 1, "b": 1, "volume-3": 1, "c_seg": 1, "d_seg": 0}


def test_a_runs_folder_names_what_its_recipe_leaves_open(folders):
    predictions, references, recipe, out = folders
    recipe.write_text("verb: finetune\nlabels: null\nregions: null\n")
    (recipe.parent / "model.json").write_text('{"labels": {"liver": 1, "lesion": 2}, "regions": {"whole": [1, 2], "lesion": [2]}}')
    for given in (recipe, recipe.parent):
        run(predictions, references, recipe=given, out=out, overwrite=True)
        assert {label for _, label, _ in table_of(out)} == {"whole", "lesion"}
    recipe.write_text(RECIPE + "regions: {}\n")  # what the recipe says goes first
    run(predictions, references, recipe=recipe, out=out, overwrite=True)
    assert {label for _, label, _ in table_of(out)} == {"liver", "lesion"}


# ------------------------------------------------------------------------------------------------ candidates


@pytest.fixture
def luna(tmp_path):
    findings = tmp_path / "luna"
    findings.mkdir()
    (findings / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\ns1,-1.5,-1.5,4,5\ns2,0,0,0,8\n")
    (findings / "annotations_excluded.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\ns1,60,0,0,-1\n")
    (findings / "seriesuids.csv").write_text("s1\ns2\ns3\n")
    (tmp_path / "candidates.csv").write_text(
        "seriesuid,coordX,coordY,coordZ,probability\ns1,-1,-1,4,0.9\ns1,61,0,0,0.95\ns1,200,0,0,0.3\ns3,0,0,0,0.5\n"
    )
    return tmp_path / "candidates.csv", findings, tmp_path / "out"


def test_candidates_against_findings(luna):
    candidates, findings, out = luna
    assert run(candidates, findings, out=out, protocol="luna16").failed == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_cases"] == 3
    nodule = summary["metrics"]["nodule"]
    # One of two nodules is hit above all that is false; three scans are in the denominator.
    assert nodule["cpm"]["mean"] == nodule["sensitivity_0.125"]["mean"] == 0.5
    assert nodule["auc"]["mean"] == 1.0
    assert table_of(out)[("s1", "nodule", "ignored_marks")] == 1
    assert table_of(out)[("s2", "nodule", "hits")] == 0


def test_label_maps_against_findings(luna):
    _, findings, out = luna
    (findings / "seriesuids.csv").write_text("s1\ns3\n")
    label_map = np.zeros((4, 4, 4), dtype=np.uint8)
    label_map[1:3, 1:3, 1:4] = 1  # centre at voxel (1.5, 1.5, 2): RAS (1.5, 1.5, 4) mm, LPS (-1.5, -1.5, 4)
    predictions = out.parent / "maps"
    write_nifti(predictions / "s1.nii.gz", label_map, GRID, np.uint8)
    assert run(predictions, findings, out=out, protocol="luna16").failed == 1  # s3 has no prediction, and counts
    assert [row["case"] for row in read_csv(out / "failures.csv")] == ["s3"]
    assert json.loads((out / "summary.json").read_text())["metrics"]["nodule"]["cpm"]["mean"] == 1


def test_other_protocols_and_other_references_do_not_take_candidates(luna, folders):
    candidates, findings, out = luna
    with pytest.raises(BadInput, match="luna16"):
        run(candidates, findings, out=out)
    with pytest.raises(BadInput, match=r"annotations\.csv"):
        run(candidates, folders[1], out=out, protocol="luna16")
    candidates.write_text("seriesuid,coordX,coordY,coordZ\ns1,1,1,1\n")
    with pytest.raises(BadInput, match="probability"):
        run(candidates, findings, out=out, protocol="luna16")
    assert not out.exists()
