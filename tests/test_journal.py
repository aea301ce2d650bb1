"""The journal: one JSON object a line, cut at the step of a resume; an environment without names of machine or user."""

import getpass
import json
import math
import socket

import torch

from volssl.journal import Journal, read_metrics, write_environment


def test_lines_are_appended_and_cut_on_resume(tmp_path):
    with Journal(tmp_path) as journal:
        for step in (1, 2, 3):
            journal.log(step=step, progress=step / 4, **{"loss/a": 0.5, "lr": math.nan})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "prog')  # killed while writing
    assert [row["step"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()[:3])] == [1, 2, 3]
    with Journal(tmp_path, steps_done=2) as journal:
        journal.log(step=3, progress=0.75, **{"loss/a": 0.25})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["lr"] is None and rows[2]["loss/a"] == 0.25
    names = [file.name for file in (tmp_path / "tensorboard").iterdir()]
    assert names and all(".tfevents." in name and socket.gethostname() not in name for name in names)


def test_environment_names_neither_host_nor_user(tmp_path):
    write_environment(tmp_path, device=torch.device("cpu"), precision="32-true", seed=1)
    text = (tmp_path / "environment.json").read_text()
    facts = json.loads(text)
    assert facts["packages"]["torch"] == torch.__version__ and facts["seed"] == 1
    assert socket.gethostname() not in text.replace(facts["system"], "") or len(socket.gethostname()) < 4
    assert f"/{getpass.getuser()}" not in text


def test_seconds_go_on_after_a_resume(tmp_path):
    with Journal(tmp_path) as journal:
        for step in (1, 2, 3):
            journal.log(step=step, progress=step / 5, seconds=10.0 * step)
    with Journal(tmp_path, steps_done=2) as journal:
        journal.log(step=3, progress=0.6, seconds=25.0)  # counted from the resume
        journal.log(step=4, progress=0.8, lr=0.1)
    assert [row.get("seconds") for row in read_metrics(tmp_path)] == [10.0, 20.0, 45.0, None]


def test_environment_does_not_tell_the_arguments_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "QUILLFEATHER"])
    write_environment(tmp_path, device=torch.device("cpu"), precision="32-true", seed=1)
    assert "QUILLFEATHER" not in (tmp_path / "environment.json").read_text()
