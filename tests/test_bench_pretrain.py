"""The bench that goes to a GPU machine runs there with few packages: what is missing costs its own figures alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHIVE = ("monai", "SimpleITK", "nibabel", "pydicom", "torchio", "jinja2", "typer")
STORE = ("blosc2", "pydantic", "lightning", "yaml", "safetensors", "tqdm")


@pytest.fixture
def without(tmp_path):
    """Run Python code or a script where some packages are missing."""

    def run(names, *command):
        for name in names:
            (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')\n")
        paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tools")))
        done = subprocess.run(
            [sys.executable, *command], env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_operations_and_bytes_need_torch_and_numpy_alone(without, tmp_path):
    out = tmp_path / "results.json"
    without(ARCHIVE + STORE, str(ROOT / "tools" / "bench_pretrain.py"), "--no-timing", "--out", str(out))
    ratios = {row["what"]: row["ratio"] for row in json.loads(out.read_text())["rows"]}
    assert len(ratios) == 6
    # The goals of the project for its default network; the figures are the same on every machine.
    assert ratios["operations of a step, batch 4"] <= 0.70 and ratios["operations of a step, batch 32"] <= 0.62
    assert max(ratio for what, ratio in ratios.items() if "bf16" in what) <= 0.4


def test_what_is_missing_end_to_end_is_named_and_the_rest_goes_on(without):
    told = json.loads(without(ARCHIVE + STORE, "-c", "import json, gpu_visit; print(json.dumps(gpu_visit.end_to_end(2, 1)))"))
    assert len(told) == 3 and all(value.startswith("failed: ModuleNotFoundError: No module named") for value in told.values())


@pytest.mark.slow
def test_end_to_end_needs_no_archive_library(without):
    small = [
        "net.width=2", "net.depth=2", "patches.box_vox=[24, 24, 24]", "method.crops.global_sizes_vox=[[16, 16, 16]]",
        "method.crops.local_sizes_vox=[[8, 8, 8]]", "method.out_vox=[[16, 16, 16], [8, 8, 8]]", "patches.batch_size=2", "patches.workers=1",
    ]  # fmt: skip
    told = json.loads(
        without(ARCHIVE, "-c", f"import json, gpu_visit; print(json.dumps(gpu_visit._figures(2, {small!r})))").splitlines()[-1]
    )
    assert told["samples_per_second"] > 0 and told["views"] == "workers"
