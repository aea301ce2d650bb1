"""The demo, end to end at a small size: every stage leaves what the next one needs, and the page shows all three runs."""

import re

import pytest

from volssl import demo, recipe
from volssl.__main__ import run_verb
from volssl.files import BadInput, Outcome, read_csv, read_json

STAGES = ["phantoms, DICOM", "phantoms, labelled", "index", "prepare", "pretrain"]
STAGES += [f"{verb}, {name}" for name in demo.RUNS for verb in ("finetune", "predict", "evaluate")] + ["report"]

# The demo's own recipes with a narrower network, smaller boxes and few steps.
FEWER = {
    "pretrain": [
        "net.width=4",
        "method.out_vox=[[16, 16, 16], [8, 8, 8]]",
        "method.crops.global_sizes_vox=[[16, 16, 16]]",
        "method.crops.local_sizes_vox=[[8, 8, 8]]",
        "patches.box_vox=[24, 24, 24]",
        "patches.workers=0",
        "training.steps=4",
        "saving.log_every=1",
    ],
    "finetune": ["net.width=4", "sampling.batch_size=1", "optimisation.steps=4", "saving.log_every=1"],
}


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_tells_its_seconds(tmp_path, monkeypatch):
    for name, value in {"PATIENTS": 4, "CASES": 4, "TESTS": 1, "SIZE_VOX": 40}.items():
        monkeypatch.setattr(demo, name, value)
    load = recipe.load

    def narrow(name, overrides=(), *, verb):
        fewer = FEWER.get(verb, []) if str(name).startswith("demo_") else []
        return load(name, [*fewer, *overrides], verb=verb)

    monkeypatch.setattr(recipe, "load", narrow)
    outcome = demo.run(out=tmp_path / "demo", seed=1)
    assert outcome.failed == 0
    told = read_json(tmp_path / "demo" / "demo.json")
    assert told["finished"]
    assert list(told["seconds"]) == STAGES
    assert told["total_seconds"] == pytest.approx(sum(told["seconds"].values()), abs=0.1)
    for name in demo.RUNS:
        assert set(told["dice"][name]["held-out"]) == {"liver", "lesion", "mean"}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert re.findall(r'section id="([^"]+)"', page) == ["comparison", "pretrain", "with_weights", "from_scratch"]
    assert page.count("data:image/png") >= 3
    assert "QUILLFEATHER" not in page
    assert str(tmp_path) not in page


def test_failed_cases_of_a_stage_are_told(tmp_path):
    stages = demo.Stages(tmp_path, 0)
    stages.do("index", lambda: Outcome(tmp_path / "index", failed=2))
    stages.do("prepare", lambda: Outcome(tmp_path / "store"))
    stages.finish()
    assert stages.failed == 2
    assert read_csv(tmp_path / "failures.csv") == [{"stage": "index", "reason": "2 failed; see index/failures.csv"}]


def test_a_folder_in_use_and_a_negative_seed_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(BadInput, match="must be new or empty"):
        demo.run(out=tmp_path)
    with pytest.raises(BadInput, match="seed"):
        demo.run(out=tmp_path / "demo", seed=-1)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, small_disk, capsys):
    for name, value in {"PATIENTS": 2, "CASES": 2, "TESTS": 1, "SIZE_VOX": 32}.items():
        monkeypatch.setattr(demo, name, value)
    out = small_disk("64k") / "demo"
    assert run_verb("demo", {"out": out}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert not list(out.rglob(".tmp-*"))
    assert read_json(out / "demo.json")["finished"] is False
