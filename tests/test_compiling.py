"""What is compiled, and what happens where nothing can be."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from volssl import compiling
from volssl.files import BadInput
from volssl.recipe import parse
from volssl.running import Training

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Method:
    """Remembers what was compiled."""

    def __init__(self):
        self.done = []
        self.net = self

    def compile_views(self):
        self.done.append("views")

    def compile(self):
        self.done.append("net")


@pytest.mark.parametrize(
    ("asked", "device", "steps", "done"),
    [
        ("auto", CPU, compiling.STEPS, ["views"]),
        ("auto", CPU, compiling.STEPS - 1, []),
        ("auto", GPU, 10**6, []),
        ("off", CPU, 10**6, []),
        ("views", CPU, 1, ["views"]),
        ("on", CPU, 1, ["views", "net"]),
    ],
)
def test_what_is_compiled(monkeypatch, asked, device, steps, done):
    monkeypatch.setattr(compiling, "trouble", lambda kind: "")
    method = Method()
    compiling.speed_up(method, asked, device=device, steps=steps)
    assert method.done == done


def test_without_a_compiler_auto_warns_and_the_others_are_refused(monkeypatch):
    monkeypatch.setattr(compiling, "trouble", lambda kind: "no g++")
    method = Method()
    with pytest.warns(UserWarning, match=r"found: no g\+\+; .* views are made uncompiled"):
        compiling.speed_up(method, "auto", device=CPU, steps=10**6)
    for asked in ("views", "on"):
        with pytest.raises(BadInput, match=r"needs a C\+\+ compiler that works; found: no g\+\+.*training.compile=off"):
            compiling.speed_up(method, asked, device=CPU, steps=1)
    assert method.done == []


def test_a_compiler_that_is_not_there_is_found_out(monkeypatch, tmp_path):
    # A process of its own: what was compiled before is remembered.
    code = "from volssl.compiling import trouble; print(trouble('cpu') or 'none')"
    environment = {"PATH": str(tmp_path), "CXX": str(tmp_path / "nothing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    told = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() != "none"


@pytest.mark.parametrize(("word", "means"), [("off", "off"), ("on", "on"), ("auto", "auto"), ("views", "views")])
def test_yaml_words(word, means):
    values = yaml.safe_load(f"training: {{compile: {word}}}")
    training = parse(values, {"training": Training}, "mine")["training"]
    assert compiling.resolved(training.compile, device=GPU, steps=1) == ("off" if means == "auto" else means)
