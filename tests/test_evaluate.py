import json

import numpy as np
import pytest

from volssl.__main__ import run_verb
from volssl.archive import write_nifti
from volssl.evaluate import Score, dice, run, score_case, summarise
from volssl.files import BadInput, read_csv
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
