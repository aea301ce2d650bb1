"""Checkpoints: whole after a failed write, plain data only; signals; losses that are not finite."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from volssl.checkpoints import BEST, LAST, Checkpoints, NotFinite, StopSignal, check_finite
from volssl.files import BadInput


def test_round_trip_and_due(tmp_path):
    checkpoints = Checkpoints(tmp_path, every_steps=10, every_minutes=60)
    assert checkpoints.load() is None
    checkpoints.save({"steps_done": 3, "t": torch.arange(3)})
    checkpoints.save({"steps_done": 2}, BEST)
    assert torch.equal(checkpoints.load()["t"], torch.arange(3)) and checkpoints.load(BEST) == {"steps_done": 2}
    assert checkpoints.due(20) and not checkpoints.due(21)
    assert Checkpoints(tmp_path, every_steps=10, every_minutes=0).due(21)


def test_a_full_disk_is_told_as_such_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every_steps=10, every_minutes=60)
    checkpoints.save({"steps_done": 1})

    def half(path: Path, data: object) -> int:
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save({"steps_done": 2})
    assert checkpoints.load() == {"steps_done": 1}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [LAST]


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, every_steps=10, every_minutes=60)
    checkpoints.save({"t": torch.zeros(1000)})
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"last\.ckpt"):
        checkpoints.load()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_ask_and_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_not_finite_names_step_scans_and_terms():
    losses = {"restore": torch.tensor(1.0), "compare": torch.tensor(float("nan")), "mid": torch.tensor(float("inf"))}
    with pytest.raises(NotFinite, match=r"step 7.*compare = nan, mid = inf.*scans Sa, Sb"):
        check_finite(losses, step=7, scans=["Sb", "Sa", "Sa"])
    assert check_finite({"a": torch.tensor(2.0)}, step=0, scans=[]) == {"a": 2.0}
