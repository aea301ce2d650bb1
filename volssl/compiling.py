"""Whether and how parts of a training run are compiled: `training.compile` of a recipe."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch

from volssl.files import BadInput

Compile = Literal["auto", "off", "on"]
STEPS = 2000  # below this a compilation of about a minute costs more than it saves


@cache
def trouble(kind: str) -> str:
    """Why nothing can be compiled for the devices of `kind` ("cpu", "cuda"), found out by compiling a line; empty if it can."""
    try:
        torch.compile(_double, dynamic=True)(torch.ones(3, device=kind))
    except (RuntimeError, OSError, ImportError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def speed_up(method: Any, asked: Compile, *, device: torch.device, steps: int) -> None:
    """Compile parts of `method` in place; results agree up to rounding, and a resumed run must ask for the same.

    Args: asked: "on" compiles the views' resampling and the network; "auto" only the resampling, on a CPU, for runs of 2000 `steps` or
        more, and says so where it cannot; "off" nothing.
    Raises: BadInput: "on" where nothing can be compiled.
    """
    if asked == "off" or (asked == "auto" and (device.type != "cpu" or steps < STEPS)):
        return
    if why := trouble(device.type):
        kind = "a C++ compiler" if device.type == "cpu" else "Triton"
        text = f"training.compile: needs {kind} that works; found: {why}; install it (on Debian g++ and python3-dev)"
        if asked == "on":
            raise BadInput(f"{text}, or set training.compile=off")
        warnings.warn(f"{text}; the views are made uncompiled, which is slower and otherwise the same")
        return
    method.compile_views()
    if asked == "on":
        # In place, so that the names of the weights stay; globals and sub-crops have a graph each.
        method.net.compile()
