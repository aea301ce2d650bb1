"""Verb bench: figures that fit what was run, no store needed, nothing half-written."""

import json

import pytest

from volssl import bench
from volssl.files import BadInput
from volssl.store import Store

TINY = [
    "net.width=2",
    "net.depth=2",
    "method.crops.global_sizes_vox=[[16, 16, 16]]",
    "method.crops.local_sizes_vox=[[8, 8, 8]]",
    "method.crops.locals=2",
    "method.out_vox=[[16, 16, 16], [8, 8, 8]]",
    "patches.box_vox=[24, 24, 24]",
    "patches.batch_size=4",
    "patches.workers=0",
    "training.steps=3600",
    "training.precision=fp32",
    "training.compile=off",
]


def test_figures_of_a_tiny_recipe(tmp_path):
    outcome = bench.run("pcrlv2", out=tmp_path / "b", steps=2, overrides=TINY)
    figures = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert figures["hours"] == pytest.approx(3600 * 4 / figures["samples_per_second"] / 3600)
    assert figures["samples_per_second"] > 0 and 0 <= figures["data_wait_share"] <= 1 and figures["peak_memory_mb"] > 50
    assert (figures["batch_size"], figures["steps_measured"], figures["compile"], figures["store"]) == (4, 2, "off", "synthetic")
    assert str(tmp_path) not in json.dumps(figures)
    assert f"{figures['hours']:.3g} hours" in outcome.message and outcome.failed == 0


def test_a_given_store_is_read_and_accumulation_counts(tmp_path):
    store = bench.synthetic_store(tmp_path / "store", (24, 24, 24)).path
    outcome = bench.run("pcrlv2", store=store, steps=1, overrides=[*TINY, "training.accumulate=2"])
    assert "samples/s" in outcome.message and sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_the_synthetic_store_compresses_as_scans_do(tmp_path):
    store = bench.synthetic_store(tmp_path / "store", (64, 64, 64))
    assert Store.open(store.path).rows == store.rows and len(store.rows) == bench.SCANS
    raw = 2 * 96**3
    share = store.volume_path("S0").stat().st_size / raw
    # Real CT at 1 mm takes a bit more than half of its int16; without noise it would be a tenth.
    assert 0.3 < share < 0.9
    assert not (store.read_box("S0", (0, 0, 0), (96, 96, 96)) == store.read_box("S1", (0, 0, 0), (96, 96, 96))).all()


@pytest.mark.parametrize(
    ("overrides", "steps", "part"),
    [
        ([*TINY, "patches.box_vox=[12, 12, 12]"], 1, "must fit into the box"),
        ([*TINY, "training.pace=3"], 1, "unknown key"),
        (TINY, 0, "--steps must be at least 1; found 0"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, overrides, steps, part):
    with pytest.raises(BadInput, match=part):
        bench.run("pcrlv2", out=tmp_path / "b", steps=steps, overrides=overrides)
    assert not (tmp_path / "b").exists()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="one process"):
        bench.run("pcrlv2", steps=1, overrides=TINY)
