"""Two processes train as one: same losses as one process with the batch of both; a killed one ends the run, which resumes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_pretrain import TINY, make_store, state, train, untimed
from torch import nn

from volssl import processes


def torchrun(store, out, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "volssl", "pretrain", "--recipe", "pcrlv2", "--store", str(store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [*command, "--out", str(out), *TINY, *overrides], environment


def test_alone_everything_is_plain():
    assert processes.count() == 1 and processes.rank() == 0
    assert processes.mean(3.0, torch.device("cpu")) == 3.0
    ours, torchs = processes.BatchNorm3d(3), nn.BatchNorm3d(3)
    x = torch.randn(2, 3, 4, 4, 4)
    assert torch.equal(ours(x), torchs(x)) and torch.equal(ours.running_var, torchs.running_var)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["stop_gradient", "momentum"])
def test_two_processes_equal_one_with_the_batch_of_both(tmp_path, target):
    store = make_store(tmp_path / "store")
    # Steps so small that rounding is not blown up by the training itself: every step is then a check of the same sums.
    settings = ["training.steps=4", "training.lr=1e-6", "training.precision=fp32", f"method.comparison.target={target}"]
    train(store, tmp_path / "one", "patches.batch_size=4", *settings)
    command, environment = torchrun(store, tmp_path / "two", "patches.batch_size=2", *settings)
    subprocess.run(command, check=True, env=environment, timeout=300)
    one, two = untimed(tmp_path / "one"), untimed(tmp_path / "two")
    # The norm of the gradient divides by the spread of a few pooled features; what it sums is compared through the losses.
    # Warnings are texts that hold rounded figures: which there are is compared.
    assert [[k for k in row if "warning" in k] for row in one] == [[k for k in row if "warning" in k] for row in two]
    losses = [[{k: v for k, v in row.items() if not k.startswith(("grad_norm", "warning"))} for row in rows] for rows in (one, two)]
    assert len(one) == len(two) >= 4
    for row, other in zip(*losses, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4), (row, other)
    assert two[0] == pytest.approx(one[0], rel=1e-4, abs=1e-5), "gradients of the first step"
    assert (tmp_path / "two" / "bundle" / "card.json").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes(tmp_path):
    store = make_store(tmp_path / "store")
    out = tmp_path / "run"
    settings = ["training.steps=400", "saving.checkpoint_every=2", "saving.validate_every=400", "saving.pictures_every=400"]
    command, environment = torchrun(store, out, *settings)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    told = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(told[-1]), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    done = state(out)["steps_done"]
    assert 0 < done < 400 and not (out / "bundle").exists()
    command, environment = torchrun(store, out, *settings)
    process = subprocess.Popen([*command[: command.index(TINY[0])], "--resume", *command[command.index(TINY[0]) :]], env=environment)
    while state(out)["steps_done"] <= done and time.monotonic() < deadline + 100 and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    process.wait(timeout=120)
    assert state(out)["steps_done"] > done
