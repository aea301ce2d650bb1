"""Whether and how parts of a training run are compiled (`training.compile` of a recipe), and whether a device multiplies bf16 itself."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch

from volssl.files import BadInput

# YAML reads the bare words on and off as True and False.
Compile = Literal["auto", "off", "views", "on", True, False]
STEPS = 2000  # below this a compilation of about a minute costs more than it saves


@cache
def trouble(kind: str) -> str:
    """Why nothing can be compiled for the devices of `kind` ("cpu", "cuda"), found out by compiling a line; empty if it can."""
    try:
        torch.compile(_double, dynamic=True)(torch.ones(3, device=kind))
    except (RuntimeError, OSError, ImportError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def multiplies_bf16(kind: str) -> bool:
    """Whether devices of `kind` ("cpu", "cuda") have dot products of bf16; emulation is many times slower than float32."""
    return kind == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def speed_up(method: Any, asked: Compile, *, device: torch.device, steps: int) -> None:
    """Compile parts of `method` in place; results agree up to rounding, and a resumed run must ask for the same.

    Args: asked: "views" compiles the views' resampling, "on" also the network, "off" nothing; "auto" the views' on a CPU for runs of
        2000 `steps` or more, and says so where it cannot.
    Raises: BadInput: "views" or "on" where nothing can be compiled.
    """
    what = resolved(asked, device=device, steps=steps)
    if what == "off":
        return
    if why := trouble(device.type):
        kind = "a C++ compiler" if device.type == "cpu" else "Triton"
        text = f"training.compile: needs {kind} that works; found: {why}; install it (on Debian g++ and python3-dev)"
        if asked != "auto":
            raise BadInput(f"{text}, or set training.compile=off")
        warnings.warn(f"{text}; the views are made uncompiled, which is slower and otherwise the same")
        return
    method.compile_views()
    if what == "on":
        # In place, so that the names of the weights stay; globals and sub-crops have a graph each.
        method.net.compile()


def resolved(asked: Compile, *, device: torch.device, steps: int) -> Compile:
    """What "auto" stands for, and YAML's True and False."""
    if isinstance(asked, bool):
        return "on" if asked else "off"
    if asked != "auto":
        return asked
    return "views" if device.type == "cpu" and steps >= STEPS else "off"
