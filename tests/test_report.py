"""The report: one page with all a run left, nothing from outside, nothing of the machine, and a word on what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from volssl import report
from volssl.__main__ import run_verb
from volssl.evaluate import Score, write_scores
from volssl.files import BadInput
from volssl.pictures import Overlay, overlay_png, restoration_png

ENVIRONMENT = {"volssl": "0.0", "device": "CPU", "precision": "32-true", "seed": 3, "packages": {"torch": "2.13.0"}}


def write_run(folder: Path, recipe: str, steps: int) -> None:
    (folder / "pictures").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    with open(folder / "metrics.jsonl", "w") as lines:
        for step in range(10, steps + 1, 10):
            row = {"step": step, "progress": step / steps, "seconds": step * 0.5, "samples_per_second": 3 + step % 3}
            row |= {"data_wait_share": 0.1, "lr": 1e-3, "loss/restore": 1 / step, "loss/embed": -step / steps}
            lines.write(json.dumps(row) + "\n")
            if step % 50 == 0:
                lines.write(json.dumps({"step": step, "progress": step / steps, "val/restore": 1.3 / step}) + "\n")


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrain <b>narrow"
    write_run(folder, "verb: pretrain\nnet: {name: unet, width: 4}\nmethod: {name: pcrlv2}\ntraining: {steps: 200}\n", 200)
    (folder / "bundle").mkdir()
    card = {"spacing_mm": [4, 4, 4], "data": {"train_scans": 9, "train_patients": 7}}
    (folder / "bundle" / "card.json").write_text(json.dumps(card))
    patches = np.random.default_rng(0).random((2, 16, 16, 12))
    for step in (100, 150, 200):
        columns = {"input": patches, "target": patches, "restored": patches}
        path = folder / "pictures" / f"restoration_{step:07d}.png"
        restoration_png(path, columns, window=(0, 1), spacing_mm=(4, 4, 4))
    return folder


def write_finetuning(folder: Path, values: dict[str, list[float]], weights: str | None) -> Path:
    write_run(folder, "verb: finetune\nnet: {name: unet, width: 4}\noptimisation: {steps: 100}\n", 100)
    (folder / "validation").mkdir()
    labels = ("liver", "lesion")
    scores = [Score(case, label, "dice", v) for case, of in values.items() for label, v in zip(labels, of, strict=True)]
    write_scores(folder / "validation", [*scores[:-1], Score(**{**vars(scores[-1]), "note": "missed: by rule"})])
    splits = {"fold": 0, "train": ["a", "b"], "validation": list(values), "weights_sha256": weights}
    (folder / "splits.json").write_text(json.dumps(splits))
    image = np.random.default_rng(0).normal(size=(12, 10, 8))
    mask = (image > 1).astype(np.uint8)
    for number, case in enumerate(list(values)[:2]):
        case_picture = Overlay(image, mask, mask, (2.0, 2.0, 3.0), {"liver": (1,), "lesion": (2,)})
        overlay_png(folder / "pictures" / f"overlay_{number:04d}.png", case_picture, title=case)
    return folder


SCRATCH = {"c1": [0.9, 0.5], "c2": [0.8, 0.4], "c3": [0.7, 0.0]}
PRETRAINED = {"c1": [0.92, 0.6], "c2": [0.84, 0.4], "c3": [0.76, 0.2]}


def page_of(tmp_path: Path, *runs: Path) -> str:
    outcome = report.run(runs, out=tmp_path / "report.html")
    assert outcome.failed == 0
    return outcome.out.read_text(encoding="utf-8")


def test_a_page_is_self_contained_and_escaped(tmp_path, pretraining):
    page = page_of(tmp_path, pretraining)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert "http://" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert "&lt;b&gt;narrow" in page
    assert "<b>narrow" not in page


def test_a_pretraining_shows_facts_curves_and_the_last_and_first_picture(tmp_path, pretraining):
    page = page_of(tmp_path, pretraining)
    for words in ("9 scans, 7 patients", "pcrlv2", "unet (width 4)", "4 × 4 × 4 mm", "1 min 40 s", "torch"):
        assert words in page, words
    assert page.index("Step 200") < page.index("Step 100")
    assert "Step 150" not in page
    assert "data:image/svg+xml" in page


def test_finetunings_show_best_median_worst_and_the_paired_difference(tmp_path):
    scratch = write_finetuning(tmp_path / "scratch", SCRATCH, None)
    pretrained = write_finetuning(tmp_path / "pretrained", PRETRAINED, "0f" * 32)
    page = page_of(tmp_path, pretrained, scratch)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", page, flags=re.S)))
    assert "pretrained minus scratch" in text
    # worked by hand: liver +0.02 +0.04 +0.06, lesion +0.1 0 +0.2
    assert "3 cases in both runs, matched by name." in text
    assert re.search(r"liver dice 0\.840 0\.800 0\.040 0\.020 to 0\.060 3 / 0 3 – –", text)  # three pairs are too few for a test
    assert re.search(r"lesion dice 0\.400 0\.300 0\.100 0\.000 to 0\.200 2 / 0 3 – –", text)
    assert re.search(r"Best case by mean Dice over labels: case 0, 0\.760", text)
    assert re.search(r"Median case by mean Dice over labels: case 1, 0\.620", text)
    assert re.search(r"Worst case by mean Dice over labels: case 2, 0\.480", text)
    assert "No picture was written of it." in text  # c3 has none
    assert "lesion, missed: by rule: case 2" in text
    assert not re.search(r"\bc[123]\b", text)  # the page tells no name of a case
    assert "random (from scratch)" in text


def test_runs_without_a_common_case_are_not_compared(tmp_path):
    scratch = write_finetuning(tmp_path / "scratch", SCRATCH, None)
    other = write_finetuning(tmp_path / "other", {"d1": [0.5, 0.5]}, "0f")
    assert "no validation case in common" in page_of(tmp_path, scratch, other)


def write_evaluation(folder: Path, shift: float, cases: range, protocol: str = "brats_voxel") -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for case in range(30):
        for label in ("WT", "TC"):
            dice, distance, more = rng.uniform(0.3, 0.6), rng.uniform(5, 9), rng.uniform(1, 1.1)
            values = {"dice": dice + shift * more, "hd95": distance - 10 * shift, "lesions_fp": 1.0}
            rows += [Score(f"patient{case:02d}", label, metric, value) for metric, value in values.items() if case in cases]
    write_scores(folder, rows, protocol=protocol)
    return folder


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", page, flags=re.S)))


def test_two_evaluations_are_compared_case_by_case(tmp_path, capsys):
    one, other = write_evaluation(tmp_path / "new", 0.1, range(0, 12)), write_evaluation(tmp_path / "old", 0.0, range(2, 13))
    page = page_of(tmp_path, other, one)
    text = text_of(page)
    assert "new minus old" in text
    assert "10 cases in both runs" in text
    assert "new alone has 2, left out here: case 0, case 1" in text and "old alone has 1, left out here: case 10" in text
    # all of ten better: p = 2 / 2**10 = 0.002; of two labels the smaller is doubled
    assert re.search(r"WT dice [\d.]+ [\d.]+ 0\.10\d 0\.10\d to 0\.1\d+ 10 / 0 10 0\.002 0\.004", text)
    assert re.search(r"mean over labels dice [\d.]+ [\d.]+ 0\.10\d 0\.10\d to 0\.1\d+ 10 / 0 10 0\.002 0\.002", text)
    assert re.search(r"TC hd95 mm [\d.]+ [\d.]+ −1\.000 −1\.000 to −1\.000 10 / 0 10 0\.002", text)
    assert "hd95, mm: difference of each case" in text and "← new is better" in text
    assert "lesions_fp" not in text[text.index("new minus old") : text.index("Differences are taken")]
    assert "patient" not in text  # the page tells no name of a case; the command does
    assert page.count("<circle") == 2 * 3 * 10
    told = capsys.readouterr().err
    assert "cases of new alone, left out of the comparison: patient00, patient01" in told
    assert "cases of old alone, left out of the comparison: patient12" in told
    assert re.findall(r'(?:src|href)="([^"#][^"]*)"', page) == []


def test_different_protocols_are_pointed_out(tmp_path):
    one = write_evaluation(tmp_path / "a", 0.0, range(4), "brats_voxel")
    other = write_evaluation(tmp_path / "b", 0.0, range(4), "brats2023")
    assert "scored by different protocols (brats2023 and brats_voxel)" in text_of(page_of(tmp_path, one, other))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,WT,dice,0.5,\na,WT,dice,0.6,\n", "a, WT, dice stands 2 times"),
        ("a,WT,dice,nan,\n", "a, WT, dice is nan"),
        ("a,WT,dice,good,\n", "line 2 lacks its columns or a number"),
    ],
)
def test_a_table_that_volssl_did_not_write_is_refused(tmp_path, rows, words):
    folder = write_evaluation(tmp_path / "a", 0.0, range(4))
    (folder / "cases.csv").write_text("case,label,metric,value,note\n" + rows)
    with pytest.raises(BadInput, match=words):
        report.run([folder], out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_what_a_run_did_not_leave_is_said(tmp_path):
    for verb in ("pretrain", "finetune"):
        (tmp_path / verb).mkdir()
        (tmp_path / verb / "recipe.yaml").write_text(f"verb: {verb}\n")
    page = page_of(tmp_path, tmp_path / "pretrain", tmp_path / "finetune")
    for words in ("No pictures were written", "No validation was written", "there are no curves", "No environment"):
        assert words in page, words


def test_no_path_of_the_machine_gets_in(tmp_path, pretraining):
    (pretraining / "recipe.yaml").write_text("verb: pretrain\nstore: /home/anna/scans/store_1\nother: 'C:\\scans\\anna'\nshare: 1/2\n")
    page = page_of(tmp_path, pretraining)
    assert "anna" not in page
    assert str(tmp_path) not in page
    assert "share: 1/2" in page
    assert "store: [path]" in page


def test_wrong_input_is_answered_all_at_once(tmp_path, pretraining):
    (tmp_path / "store").mkdir()
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "recipe.yaml").write_text("verb: prepare\n")
    with pytest.raises(BadInput) as caught:
        report.run([tmp_path / "absent", tmp_path / "store", tmp_path / "prepared"], out=tmp_path / "r.html")
    for words in ("no such folder", "no recipe.yaml", "of prepare"):
        assert words in str(caught.value)
    with pytest.raises(BadInput, match="at least one"):
        report.run([], out=tmp_path / "r.html")
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(BadInput, match="new file"):
        report.run([pretraining], out=tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "mine"
    report.run([pretraining], out=tmp_path / "r.html", overwrite=True)
    with pytest.raises(BadInput, match="a folder"):
        report.run([pretraining], out=tmp_path / "store", overwrite=True)


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "recipe.yaml").write_text("verb: pretrain\n")
    page = page_of(tmp_path, tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert "run (2)" in page
    assert len(set(re.findall(r'section id="([^"]+)"', page))) == 2


def test_a_full_disk_leaves_no_page_or_the_earlier_one(tmp_path, pretraining, small_disk, capsys):
    out = small_disk("8k") / "report.html"
    out.write_text("earlier")
    assert run_verb("report", {"runs": [pretraining], "out": out, "overwrite": True}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert out.read_text() == "earlier"


def test_a_full_disk_by_a_write_that_fails(tmp_path, pretraining, no_room_after, capsys):
    no_room_after(0)
    assert run_verb("report", {"runs": [pretraining], "out": tmp_path / "new" / "report.html"}) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())
