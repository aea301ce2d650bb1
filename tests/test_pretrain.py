"""Pretraining end to end on a tiny store: it learns, resumes to the bit, stops on signals and on losses that are not finite."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from volssl import pretrain, running
from volssl.__main__ import run_verb
from volssl.checkpoints import Checkpoints, NotFinite
from volssl.compiling import trouble
from volssl.export.bundle import load_encoder
from volssl.files import BadInput, write_json
from volssl.journal import read_metrics
from volssl.methods.pcrlv2 import PCRLv2
from volssl.store import About, Entry, Store

TINY = [
    "net.width=4",
    "net.depth=3",
    "method.crops.global_sizes_vox=[[16, 16, 16], [20, 20, 16]]",
    "method.crops.local_sizes_vox=[[8, 8, 8]]",
    "method.crops.locals=2",
    "method.out_vox=[[16, 16, 16], [8, 8, 8]]",
    "patches.box_vox=[24, 24, 24]",
    "patches.batch_size=2",
    "patches.workers=0",
    "training.steps=8",
    "training.lr=0.01",
    "saving.log_every=1",
    "saving.pictures_every=4",
    "saving.validate_every=4",
    "saving.validation_batches=1",
    "saving.health_every=4",
    "saving.health_patches=8",
    "saving.probe_every=4",
    "saving.probe_patches=8",
]


def make_store(path, scans=3, side=40):
    about = About((1.0, 1.0, 1.0), "CT", (-1000.0, 1000.0), (-1024.0, 3071.0), recipe={})
    made = Store.create(path, about)
    entries = []
    for i in range(scans):
        rng = np.random.default_rng(i)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
        array = np.where((grid**2).sum(0) < 0.8, 40, -1000) + 300 * (np.abs(grid[0]) < 0.1 * (i + 1)) + rng.normal(0, 20, (side,) * 3)
        shape, eye = (side, side, side), tuple(np.eye(4).ravel().tolist())
        split = "val" if i == 0 else "train"
        entries.append(Entry(f"S{i}", f"P{i}", "CT", split, 1, shape, (0, 0, 0), shape, eye, shape, eye, (1.0, 0.0), "c"))
        made.write(array.clip(-1024, 3071).astype(np.int16)[None], entries[-1])
    made.finish(entries)
    return path


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def train(tiny_store, out, *overrides, **flags):
    return pretrain.run("pcrlv2", store=tiny_store, out=out, overrides=[*TINY, *overrides], **flags)


def state(out, name="last.ckpt"):
    return torch.load(out / "checkpoints" / name, weights_only=True)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def untimed(out):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second", "data_wait_share")} for row in read_metrics(out)]


@pytest.fixture(scope="module")
def whole(tiny_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny_store, out).failed == 0
    return out


def test_a_run_leaves_what_the_contract_says(whole):
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "bundle/card.json"):
        assert (whole / name).is_file(), name
    assert sorted(p.name for p in (whole / "pictures").iterdir()) == ["restoration_0000004.png", "restoration_0000008.png"]
    rows = [row for row in read_metrics(whole) if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    wanted = {"progress", "seconds", "samples_per_second", "data_wait_share", "lr", "loss/restore", "loss/restore_mid"}
    assert wanted | {"loss/compare_globals", "loss/compare_locals"} <= rows[0].keys()
    card = json.loads((whole / "bundle" / "card.json").read_text())
    assert card["steps"] == 8 and card["data"] == {"train_scans": 2, "train_patients": 2}


def test_the_bundle_holds_the_trained_encoder(whole):
    encoder, _ = load_encoder(whole / "bundle")
    trained = {k.removeprefix("net.encoder."): v for k, v in state(whole)["method"].items() if k.startswith("net.encoder.")}
    assert trained and same(trained, dict(encoder.state_dict()))


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed_equals_uninterrupted(tiny_store, whole, tmp_path, monkeypatch, workers):
    out = tmp_path / "run"
    real_step = pretrain._step
    calls = []

    def step_then_signal(current, party, lr):
        calls.append(1)
        if len(calls) in (3, 6):  # two interruptions
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGUSR1)[len(calls) == 6])
        return real_step(current, party, lr)

    monkeypatch.setattr(pretrain, "_step", step_then_signal)
    override = f"patches.workers={workers}"
    first = train(tiny_store, out, override)
    assert "after step 3" in first.message and not first.finished and not (out / "bundle").exists()
    assert "after step 6" in train(tiny_store, out, override, resume=True).message
    train(tiny_store, out, override, resume=True)
    assert same(state(out), state(whole))
    assert untimed(out) == untimed(whole)


def test_a_momentum_target_resumes_to_the_bit_and_stays_out_of_the_bundle(tiny_store, whole, tmp_path, monkeypatch):
    settings = ["method.comparison.target=momentum", "method.comparison.momentum=0.5"]
    train(tiny_store, tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_step", _killed_at(6, pretrain._step))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_store, tmp_path / "part", *settings, "saving.checkpoint_every=3")
    assert state(tmp_path / "part")["steps_done"] == 3
    train(tiny_store, tmp_path / "part", *settings, "saving.checkpoint_every=3", resume=True)
    assert same(state(tmp_path / "part"), state(tmp_path / "whole")) and untimed(tmp_path / "part") == untimed(tmp_path / "whole")
    made, plain = state(tmp_path / "whole"), state(whole)
    assert {k for k in made["method"] if not k.startswith("target.")} == plain["method"].keys()
    weights = ("weight", "bias")
    moved = {k: v for k, v in made["method"].items() if k.startswith("target.net.") and k.endswith(weights)}
    assert moved and not any(torch.equal(v, made["method"][k.removeprefix("target.")]) for k, v in moved.items() if v.ndim > 1)
    for name in ("encoder", "decoder"):
        held, held_before = (load_file(run / "bundle" / f"{name}.safetensors") for run in (tmp_path / "whole", whole))
        assert held.keys() == held_before.keys()
        assert all(torch.equal(value, made["method"][f"net.{name}.{key}"]) for key, value in held.items()), "the trained weights"
    params = [s["optimizers"]["all"]["param_groups"][0]["params"] for s in (made, plain)]
    assert params[0] == params[1], "the optimiser knows nothing of the copy"
    health = [{k for row in untimed(run) for k in row if k.startswith(("health/", "val/"))} for run in (tmp_path / "whole", whole)]
    assert health[0] == health[1] and any(k.startswith("health/rank") for k in health[0])


@pytest.mark.parametrize("settings", [(1, "device"), (1, "auto"), (2, "workers")], ids=str)
def test_neither_the_number_of_workers_nor_the_place_of_the_views_changes_a_bit(tiny_store, whole, tmp_path, settings):
    workers, views = settings
    train(tiny_store, tmp_path / "run", f"patches.workers={workers}", f"patches.views={views}")
    assert same(state(tmp_path / "run"), state(whole))
    assert untimed(tmp_path / "run") == untimed(whole)


def test_a_killed_worker_ends_the_run_with_one_error_and_it_resumes_to_the_bit(tiny_store, whole, tmp_path, monkeypatch, capsys):
    real_step, calls = pretrain._step, []

    def step_then_kill(current, party, lr):
        calls.append(1)
        if len(calls) == 5:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(60)  # the news arrives as a signal, wherever the training is
        return real_step(current, party, lr)

    settings = [*TINY, "patches.workers=1", "saving.checkpoint_every=2"]
    flags = {"recipe": "pcrlv2", "store": tiny_store, "out": tmp_path / "run", "overrides": settings}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_step", step_then_kill)
        assert run_verb("pretrain", flags) == 2
    message = capsys.readouterr().err
    assert message.count("every worker must live as long as the run") == 1 and "Traceback" not in message
    assert not (tmp_path / "run" / "bundle").exists()
    train(tiny_store, tmp_path / "run", *settings[len(TINY) :], resume=True)
    assert same(state(tmp_path / "run"), state(whole))


def test_a_nan_in_a_view_that_a_worker_made_is_found(tiny_store, tmp_path, monkeypatch):
    original = PCRLv2.views

    def poisoned(self, x_BCXYZ, draws, *, spacing_mm):
        made = original(self, x_BCXYZ, draws, spacing_mm=spacing_mm)
        if draws.step == 3 and draws.stream == "":
            made.locals[1, 0, 2, 2, 2] = float("nan")
        return made

    monkeypatch.setattr(PCRLv2, "views", poisoned)  # workers are forked and have it too
    with pytest.raises(NotFinite, match=r"step 3: .*compare_locals = nan.* on scans S\d"):
        train(tiny_store, tmp_path / "run", "patches.workers=2")


@pytest.mark.slow
@pytest.mark.skipif(bool(trouble("cpu")), reason="needs a C++ compiler that works")
def test_a_compiled_run_resumes_to_the_bit_and_equals_an_eager_one_up_to_rounding(tiny_store, tmp_path):
    # One graph for training and one for validation: each takes seconds to compile.
    settings = ["training.steps=4", "training.precision=fp32", "method.comparison.locals=0", "net.depth=2", "saving.checkpoint_every=2"]
    settings += ["saving.health_every=0", "saving.probe_every=0", "saving.validate_every=4", "training.compile=on"]
    train(tiny_store, tmp_path / "whole", *settings)
    # As if it had been killed after its second step.
    checkpoints = []
    real_save = Checkpoints.save

    def save(self, state, *rest):
        real_save(self, state, *rest)
        checkpoints.append(state["steps_done"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        patch.setattr(pretrain, "_step", _killed_at(3, pretrain._step))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_store, tmp_path / "part", *settings)
    assert max(checkpoints) == 2
    train(tiny_store, tmp_path / "part", *settings, resume=True)
    assert same(state(tmp_path / "part"), state(tmp_path / "whole"))
    eager = train(tiny_store, tmp_path / "eager", *settings[:-1]).out
    for name, tensor in state(eager)["method"].items():
        assert torch.allclose(tensor, state(tmp_path / "whole")["method"][name], rtol=1e-2, atol=1e-3), name


def _killed_at(step, real_step):
    calls = []

    def step_or_not(current, party, lr):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real_step(current, party, lr)

    return step_or_not


def test_a_folder_that_is_no_run_is_neither_continued_nor_is_the_store_replaced(tiny_store, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"must be a run that pretrain began.*no recipe\.yaml"):
        train(tiny_store, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    before = sorted(tiny_store.rglob("*"))
    with pytest.raises(BadInput):
        pretrain.run("pcrlv2", store=tiny_store, out=tiny_store, overwrite=True, overrides=TINY)
    assert sorted(tiny_store.rglob("*")) == before


def test_kill_without_warning_resumes_from_the_last_checkpoint(tiny_store, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "volssl", "pretrain", "--recipe", "pcrlv2", "--store", str(tiny_store), "--out", str(out), *TINY]
    command += ["saving.checkpoint_every=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    train(tiny_store, out, "saving.checkpoint_every=2", resume=True)
    assert same(state(out)["method"], state(whole)["method"])


def test_the_restoration_learns(tiny_store, tmp_path):
    # Batch normalisation over four samples makes the comparison's gradient rule so short a run; it is switched off here.
    settings = ["training.steps=100", "training.optimizer=adamw", "training.lr=0.003", "patches.batch_size=4"]
    settings += ["method.comparison.globals=0", "method.comparison.locals=0", "saving.validate_every=100", "saving.pictures_every=100"]
    train(tiny_store, tmp_path / "run", *settings)
    rows = [row for row in read_metrics(tmp_path / "run") if "lr" in row]
    first, last = (np.mean([row["loss/restore"] for row in part]) for part in (rows[:10], rows[-10:]))
    assert last < 0.75 * first, (first, last)


def test_accumulated_batches_draw_on(tiny_store, tmp_path):
    train(tiny_store, tmp_path / "run", "training.accumulate=2", "training.steps=2")
    assert state(tmp_path / "run")["steps_done"] == 2


def test_a_loss_that_is_not_finite_stops_with_step_scan_and_term(tiny_store, tmp_path, monkeypatch):
    original = running.to_unit
    calls = []

    def poisoned(boxes, window, device):
        calls.append(1)
        x = original(boxes, window, device)
        return x * float("nan") if len(calls) == 4 else x

    monkeypatch.setattr(running, "to_unit", poisoned)
    with pytest.raises(NotFinite, match=r"step 3: .*restore = nan.* on scans S\d"):
        train(tiny_store, tmp_path / "run")
    assert not (tmp_path / "run" / "bundle").exists()


def test_bad_input_before_step_0(tiny_store, whole, tmp_path):
    with pytest.raises(BadInput, match="unknown key; known are: .*steps"):
        train(tiny_store, tmp_path / "a", "training.epochs=3")
    with pytest.raises(BadInput, match="must fit into the box"):
        train(tiny_store, tmp_path / "a", "patches.box_vox=[18, 18, 18]")
    with pytest.raises(BadInput, match=r"store\.json"):
        train(tmp_path, tmp_path / "a")
    assert not (tmp_path / "a").exists(), "nothing may be left by a refused run"
    with pytest.raises(BadInput, match="must be new or empty"):
        train(tiny_store, whole)
    with pytest.raises(BadInput, match="found other values under training"):
        train(tiny_store, whole, "training.lr=0.5", resume=True)


@pytest.mark.parametrize(
    "settings, told",
    [
        (["patches.box_vox=[18, 24, 24]"], ["method.crops: global_sizes_vox", "(18, 24, 24)", "enlarge patches.box_vox"]),
        (["method.out_vox=[[16, 18, 16], [8, 8, 8]]"], ["method.out_vox: global", "found (16, 18, 16)"]),
        (["method.out_vox=[[16, 16, 16], [8, 6, 8]]"], ["method.out_vox: sub-crop", "found (8, 6, 8)"]),
        (["method.crops.min_overlap=1.0"], ["min_overlap: some pair of sizes must be able to exceed 1.0", "at most 1.000", "lower it"]),
        (["patches.batch_size=1"], ["patches.batch_size", "at least 2 samples", "found 1", "method.comparison.norm"]),
        (["method.comparison.decoder_scales=[2]"], ["decoder_scales", "0 (coarsest) to 1", "found (2,)"]),
        (
            [
                "patches.box_vox=[18, 24, 24]",
                "method.crops.min_overlap=1.0",
                "method.out_vox=[[18, 16, 16], [6, 8, 8]]",
                "patches.batch_size=1",
            ],
            ["global_sizes_vox", "min_overlap", "method.out_vox: global", "method.out_vox: sub-crop", "patches.batch_size"],
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_command_before_step_0(tiny_store, tmp_path, capsys, settings, told):
    out = tmp_path / "run"
    flags = {"recipe": "pcrlv2", "store": tiny_store, "out": out, "overrides": [*TINY, *settings]}
    assert run_verb("pretrain", flags) == 2
    message = capsys.readouterr().err
    for part in told:
        assert part in message, message
    assert "Traceback" not in message and not out.exists()


def test_a_nan_between_log_lines_is_found_before_anything_is_written(tiny_store, tmp_path, monkeypatch):
    # Losses are read while the next step runs: the step that is named, and the checkpoint that is left, must be the right ones.
    original, calls = running.to_unit, []

    def poisoned(boxes, window, device):
        calls.append(1)
        x = original(boxes, window, device)
        return x * float("nan") if len(calls) == 4 else x

    monkeypatch.setattr(running, "to_unit", poisoned)
    seldom = ["log_every=100", "validate_every=100", "pictures_every=100", "health_every=0", "probe_every=0", "checkpoint_every=3"]
    with pytest.raises(NotFinite, match=r"step 3: .*compare_locals = nan.* on scans S\d"):
        train(tiny_store, tmp_path / "run", *(f"saving.{key}" for key in seldom))
    left = state(tmp_path / "run")
    assert left["steps_done"] == 3
    assert all(torch.isfinite(value).all() for value in left["method"].values())


def test_a_store_of_another_version_is_refused(tmp_path):
    path = make_store(tmp_path / "store", scans=2, side=24)
    facts = json.loads((path / "store.json").read_text())
    write_json(path / "store.json", facts | {"version": 99})
    with pytest.raises(BadInput, match="must be of version 2 or 3; found 99"):
        train(path, tmp_path / "run")


def test_training_imports_no_archive_library(tiny_store, tmp_path):
    code = (
        "import sys; from volssl import pretrain; "
        f"pretrain.run('pcrlv2', store={str(tiny_store)!r}, out={str(tmp_path / 'run')!r}, overrides={[*TINY, 'training.steps=1']!r}); "
        "bad = {'nibabel', 'SimpleITK', 'pydicom', 'monai', 'dynamic_network_architectures', 'torchio', 'torchvision'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


RESENC = [one for one in TINY if not one.startswith(("net.", "saving."))] + [
    "net={name: resenc, features: [4, 6, 8], blocks: [1, 1, 1], norm: instance}",
    "training.steps=1",
    "saving={pictures_every: 9, validate_every: 9, health_every: 9, probe_every: 9}",
]


@pytest.mark.slow
def test_a_run_leaves_the_exports_that_its_recipe_names(tiny_store, tmp_path):
    out = tmp_path / "run"
    pretrain.run("pcrlv2", store=tiny_store, out=out, overrides=[*RESENC, "export=nnunet"])
    saved = torch.load(out / "nnunet" / "checkpoint.pth", weights_only=True)
    trained = state(out)["method"]["net.encoder.stem.convs.0.conv.weight"]
    assert torch.equal(saved["network_weights"]["encoder.stem.convs.0.conv.weight"], trained.transpose(2, 4))
    assert saved["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["3d_fullres"]["patch_size"] == [16, 16, 16]


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["export=nnunet"], "must be resenc.*found unet"),
        (["export=[bundle, onyx]"], "export: must be among bundle, nnunet.*; found onyx"),
        (["export=3"], "export"),
        ([*RESENC, "net.features=[4, 6]", "net.blocks=[1, 1]", "export=nnunet"], "at least 3 stages"),
    ],
)
def test_a_run_whose_export_nobody_could_load_does_not_begin(tiny_store, tmp_path, overrides, told):
    with pytest.raises(BadInput, match=told):
        train(tiny_store, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_worker_that_begins_anew_makes_the_same_views_and_needs_no_archive_library(tiny_store, whole, tmp_path):
    # As where processes are not forked; what a worker imports it then imports itself, and finds these missing.
    missing = tmp_path / "missing"
    missing.mkdir()
    for name in ("nibabel", "SimpleITK", "pydicom", "monai", "torchio"):
        (missing / f"{name}.py").write_text(f"raise ImportError('{name} is not there')\n")
    overrides = [*TINY, "patches.workers=1", "patches.views=workers"]
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nfrom pathlib import Path\nfrom volssl import pretrain\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        f"    pretrain.run('pcrlv2', store=Path({str(tiny_store)!r}), out=Path({str(tmp_path / 'run')!r}), overrides={overrides!r})\n"
    )
    paths = os.pathsep.join([str(missing), str(Path(pretrain.__file__).parents[1])])
    subprocess.run([sys.executable, str(script)], check=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
    assert same(state(tmp_path / "run"), state(whole))
