"""Checkpoints that survive a kill, signals that ask for one, and the loss check that stops a run before it saves nonsense."""

from __future__ import annotations

import io
import math
import pickle
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from volssl import processes
from volssl.files import BadInput, atomic

LAST, BEST = "last.ckpt", "best.ckpt"


class NotFinite(BadInput):
    """A loss became NaN or infinite; the message names the step, the scans and the term."""


@dataclass
class Checkpoints:
    """Writes `out/checkpoints/last.ckpt` and `best.ckpt`, atomically: a kill leaves the earlier file whole.

    Attributes: every_steps, every_minutes: whichever comes first.
    """

    out: Path
    every_steps: int
    every_minutes: float

    def __post_init__(self) -> None:
        self._folder = self.out / "checkpoints"
        self._last_time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self.every_steps == 0 or time.monotonic() - self._last_time >= 60 * self.every_minutes

    def save(self, state: Mapping[str, Any], name: str = LAST) -> None:
        """Write tensors and plain values as `name`; of several processes the first writes."""
        self._last_time = time.monotonic()
        if processes.rank() > 0:
            return
        # By way of memory: torch answers a full disk with an unclear RuntimeError, the plain write with the system's own word.
        packed = io.BytesIO()
        torch.save(dict(state), packed)
        with atomic(self._folder / name) as temporary:
            temporary.write_bytes(packed.getbuffer())

    def load(self, name: str = LAST) -> dict[str, Any] | None:
        """Read a checkpoint back onto the CPU, or None if there is none. Raises: BadInput: if it cannot be read."""
        path = self._folder / name
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadInput(f"checkpoint {name}: must be one that volssl wrote; cannot be read: {error}") from None


class StopSignal:
    """While entered, SIGTERM and SIGUSR1 (a scheduler's warning) set `asked` instead of ending the process."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Terms:
    """The numbers of a step on their way to the host: one transfer, which nobody waits for before `read`.

    So a GPU need not stand still after every step: the loop reads the numbers of a step while it computes the next, and always before
    anything is written.

    Args: values: scalars on one device, by name. step, scans: told if one is not finite. forgiven: names that may be infinite or NaN,
        and are then read as 0: a gradient's norm where a gradient scaler skips the step.
    """

    def __init__(self, values: Mapping[str, Tensor], *, step: int, scans: list[str], forgiven: Collection[str] = ()) -> None:
        self._names, self._step, self._scans, self._forgiven = list(values), step, scans, forgiven
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._done: torch.cuda.Event | None = None
        self._numbers = stacked
        if stacked.is_cuda:
            self._numbers = torch.empty(stacked.shape, pin_memory=True).copy_(stacked, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> dict[str, float]:
        """The numbers. Raises: NotFinite: naming the step, the scans of the batch and every term that is not finite."""
        if self._done is not None:
            self._done.synchronize()
        numbers = dict(zip(self._names, self._numbers.tolist(), strict=True))
        bad = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value) and name not in self._forgiven]
        if bad:
            raise NotFinite(
                f"step {self._step}: every loss must be finite; found {', '.join(bad)} on scans {', '.join(sorted(set(self._scans)))}; "
                "the last checkpoint is from before this step: lower the learning rate, or look at these scans and exclude them"
            )
        return {name: value if math.isfinite(value) else 0.0 for name, value in numbers.items()}


def check_finite(losses: Mapping[str, Tensor], *, step: int, scans: list[str]) -> dict[str, float]:
    """The losses as numbers, at once; see `Terms`. Raises: NotFinite."""
    return Terms(losses, step=step, scans=scans).read()
