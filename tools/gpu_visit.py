"""What only a GPU can tell, for `bench_pretrain.py --device cuda`: end to end from a store, and the ways to compute an up-step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import paired, row

WORKERS = (8, 14)


def visit(batch: int, steps: int) -> dict[str, Any]:
    """Figures of the recipe pcrlv2 end to end, uncompiled and compiled, and milliseconds of the up-steps."""
    return end_to_end(batch, steps) | {"up-step ms, plain layers against": up_steps(batch)}


def end_to_end(batch: int, steps: int) -> dict[str, Any]:
    """Figures of whole training steps from a store; needs lightning, blosc2, pydantic and PyYAML, and says so where one is missing."""
    told: dict[str, Any] = {}
    for workers, compile_ in [(WORKERS[0], "off"), (WORKERS[1], "off"), (WORKERS[1], "on")]:
        name = f"end to end, batch {batch}, {workers} workers, compile {compile_}"
        overrides = [f"patches.batch_size={batch}", f"patches.workers={workers}", "training.precision=bf16", f"training.compile={compile_}"]
        try:
            told[name] = _figures(steps, overrides)
        except (ImportError, RuntimeError, ValueError) as error:  # the other figures of a visit are still wanted
            told[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    return told


def _figures(steps: int, overrides: list[str]) -> dict[str, Any]:
    from volssl import bench
    from volssl.files import read_json

    with tempfile.TemporaryDirectory() as folder:
        bench.run("pcrlv2", out=Path(folder) / "bench", steps=steps, overrides=overrides)
        return read_json(Path(folder) / "bench" / "bench.json")


def up_steps(batch: int) -> list[str]:
    """Forward and backward of the three composed up-steps in bf16: the two layers, one transposed convolution of 4 taps (what volssl does),
    and a convolution of 2 taps for all 8 parities of an output voxel, then interleaved."""
    shapes = ((128, 64, (32, 32, 16)), (256, 128, (16, 16, 8)), (512, 256, (8, 8, 4)))
    return [line for a, b, size in shapes for line in up_step(batch, (a, b), size, torch.device("cuda"))]


def up_step(batch: int, channels: tuple[int, int], size: tuple[int, int, int], device: torch.device) -> list[str]:
    """The rows of one up-step from `size` to twice that."""
    a, b = channels

    def made(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, device=device, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()

    x, up, weight = made(batch, a, *size), made(a, a, 2, 2, 2), made(b, a, 3, 3, 3)
    taps_4, parities = made(a, b, 4, 4, 4), made(8 * b, a, 2, 2, 2)
    seed = made(batch, b, *(2 * n for n in size)).detach()
    ways = {
        "transposed": lambda: F.conv_transpose3d(x, taps_4, stride=2, padding=1),
        "parities": lambda: _interleaved(F.conv3d(x, parities, padding=1), b, size),
    }
    seconds = paired(
        _pass(lambda: F.conv3d(F.conv_transpose3d(x, up, stride=2), weight, padding=1), seed),
        {name: _pass(way, seed) for name, way in ways.items()},
        rounds=10,
        clock=_finished,
    )
    return [row(f"{a} to {b} channels, {name}", seconds[name]).line() for name in ways]


def _interleaved(y: torch.Tensor, channels: int, size: tuple[int, int, int]) -> torch.Tensor:
    y = y.unflatten(1, (8, channels))
    fine = torch.empty(len(y), channels, *(2 * n for n in size), dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
    for p in range(8):
        i, j, k = p // 4, p // 2 % 2, p % 2
        fine[:, :, i::2, j::2, k::2] = y[:, p, :, i : i + size[0], j : j + size[1], k : k + size[2]]
    return fine


def _pass(forward: Callable[[], torch.Tensor], seed: torch.Tensor) -> Callable[[], None]:
    return lambda: forward().backward(seed)


def _finished() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
