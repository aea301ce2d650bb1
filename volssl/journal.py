"""What a run writes while it trains: metrics.jsonl, TensorBoard events, and its environment."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch

import volssl
from volssl.files import tell, write_json, write_text


class Journal:
    """Appends one JSON object per log step to `metrics.jsonl` and the same numbers to TensorBoard.

    On resume, lines after the step resumed from are cut off and `seconds` goes on from the last line kept, so that the file reads as if
    the run had never stopped.

    Args: out: the run's folder. steps_done: 0 for a new run. silent: write nothing, for all processes of a run but the first.
    """

    def __init__(self, out: Path, *, steps_done: int = 0, silent: bool = False) -> None:
        self._silent = silent
        if silent:
            return
        # TensorBoard's writer is slow to import, and only a run needs it.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._path = out / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= steps_done]
        self._seconds_before = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0)
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._warned = {key for line in kept for key in json.loads(line) if key.startswith("warning/")}
        self._stream = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        with mock.patch("socket.gethostname", return_value="volssl"):  # else the name of the machine is in the name of the file
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=steps_done + 1 if steps_done else None)

    def _lines(self) -> list[str]:
        # A run killed while it wrote can leave half a line at the end; it is written again after the resume.
        if not self._path.exists():
            return []
        whole = self._path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [line for line in whole.split("\n") if line]

    def log(self, *, step: int, progress: float, **numbers: float) -> None:
        """Write the numbers of one step; names as in the contract (`loss/restore`, `lr`). A number that is not finite becomes null."""
        if self._silent:
            return
        if "seconds" in numbers:
            numbers["seconds"] += self._seconds_before
        row: dict[str, Any] = {"step": step, "progress": round(progress, 6)}
        row |= {name: round(value, 8) if math.isfinite(value) else None for name, value in numbers.items()}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def warn(self, kind: str, text: str, *, step: int, progress: float) -> None:
        """Say what is amiss on stderr and in a row of its own, `warning/<kind>`; each kind once in a run, also over a resume."""
        if self._silent or f"warning/{kind}" in self._warned:
            return
        self._warned.add(f"warning/{kind}")
        row = {"step": step, "progress": round(progress, 6), f"warning/{kind}": text}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        self._board.add_text(f"warning/{kind}", text, step)
        tell(f"step {step}: {text}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._silent:
            self._stream.close()
            self._board.close()


@dataclass
class Clock:
    """Samples per second and the share of the time spent waiting for data, since the last reading."""

    samples: int = 0
    waited: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def read(self) -> dict[str, float]:
        """The numbers since the last reading; `seconds` since the start of this process's training."""
        now = time.monotonic()
        span = max(now - self.last, 1e-9)
        numbers = {
            "seconds": now - self.begun,
            "samples_per_second": self.samples / span,
            "data_wait_share": self.waited / span,
        }
        self.samples, self.waited, self.last = 0, 0.0, now
        return numbers


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, in order."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_environment(out: Path, *, device: torch.device, precision: str, seed: int) -> None:
    """Write environment.json: versions, device and threads; no host name, user or path."""
    write_json(
        out / "environment.json",
        {
            "volssl": volssl.__version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
            "threads": torch.get_num_threads(),
            "precision": precision,
            "seed": seed,
            "packages": {
                name: _version(name) for name in ("torch", "lightning", "monai", "numpy", "scipy", "blosc2", "SimpleITK", "nibabel")
            },
        },
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Only a checkout has one; an installed wheel is told by its version.
    root = Path(volssl.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None
