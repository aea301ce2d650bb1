"""Store -> batches of boxes, drawn as a pure function of (seed, step, rank).

A batch is one item of a map-style dataset indexed by the step, so the stream does not depend on the number of workers, and a resumed run
asks for the next step and gets what it would have got. The workers that read may also make a method's views.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from volssl.draws import generator
from volssl.files import BadInput
from volssl.parcels import Parcel, Shelf, pack
from volssl.store import Store

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Patches:
    """One batch. boxes_BCXYZ: int16 as stored. scan_ids: pseudonyms. corners_B3: first voxel of each box in its stored array.
    views: what a worker made of the boxes, which then have stayed there (there are none here)."""

    boxes_BCXYZ: Tensor
    scan_ids: list[str]
    corners_B3: Tensor
    views: Parcel | None = None

    def pin_memory(self) -> Patches:
        """Copy in page-locked memory, for CUDA."""
        return replace(self, boxes_BCXYZ=self.boxes_BCXYZ.pin_memory(), views=self.views and self.views.pin_memory())


@dataclass(frozen=True)
class PatchPlan:
    """Which boxes are read.

    Attributes:
        box_vox: sides of the parent box of a sample. batch_size: samples per step and process. workers: reading processes.
        views: where views are made: on the "device" that trains, by the "workers" on the CPU, one thread each, or "auto": by the workers
            where the device is a CPU and there are any. The numbers are the same on a CPU; a GPU draws other noise.
        min_body: a box should hold at least this share of body; the best of `attempts` draws is taken, so a small scan cannot hang it.
        body_above: what counts as body, on the [0, 1] scale of the store's window (0.1 of a [-1000, 1000] HU window is -800 HU, which
            leaves out air but not lung vessels).
    """

    box_vox: Size = (128, 128, 112)
    batch_size: int = 8
    workers: int = 2
    views: Literal["auto", "device", "workers"] = "auto"
    min_body: float = 0.2
    body_above: float = 0.1
    attempts: int = 4

    def __post_init__(self) -> None:
        faults = []
        if min(self.box_vox) < 1:
            faults.append(f"box_vox must be positive; found {self.box_vox}")
        if self.batch_size < 1 or self.workers < 0 or self.attempts < 1:
            faults.append(
                f"batch_size >= 1, workers >= 0, attempts >= 1 must hold; found {self.batch_size}, {self.workers}, {self.attempts}"
            )
        if self.views == "workers" and self.workers < 1:
            faults.append(
                f"views: workers can make them only where there are any; found workers: {self.workers}; raise it or set views: auto"
            )
        if not 0 <= self.min_body <= 1:
            faults.append(f"min_body must lie in [0, 1]; found {self.min_body}")
        if faults:
            raise BadInput("; ".join(faults))

    def workers_make_views(self, device: torch.device) -> bool:
        """What `views` comes to where `device` trains."""
        return self.views == "workers" or (self.views == "auto" and self.workers > 0 and device.type == "cpu")


@dataclass(frozen=True)
class Source:
    """Who draws: split of the store, seed, stream name (so that validation differs from training), rank and number of processes."""

    split: str = "train"
    seed: int = 0
    stream: str = "patches"
    rank: int = 0


class PatchStream(Dataset[Patches]):
    """Batches by step. Every sample b of a step draws from (seed, stream, step, rank * batch_size + b) alone.

    Args: make: turns the boxes of a step into views, for which a batch then holds a parcel instead of its boxes.
    Raises: BadInput: if the split holds no scan.
    """

    def __init__(
        self, store: Store, plan: PatchPlan, *, source: Source, steps: int, make: Callable[[Tensor, int], Any] | None = None
    ) -> None:
        self.store, self.plan, self.source, self.steps, self.make = store, plan, source, steps, make
        self.rows = [row for row in store.rows if row.split == source.split]
        if not self.rows:
            splits = sorted({row.split for row in store.rows})
            raise BadInput(
                f"store: split {source.split!r} must hold at least one scan; found none; splits there: {', '.join(splits) or 'none'}"
            )
        low, high = store.window
        self._body_level = low + plan.body_above * (high - low)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Patches:
        """The batch of `step`."""
        return self.batch(step)

    def batch(self, step: int, shelf: Shelf | None = None) -> Patches:
        """The batch of `step`. Args: shelf: in a worker, memory for its views."""
        drawn = [self._sample(step, self.source.rank * self.plan.batch_size + b) for b in range(self.plan.batch_size)]
        boxes, scan_ids, corners = zip(*drawn, strict=True)
        patches = Patches(torch.from_numpy(np.stack(boxes)), list(scan_ids), torch.tensor(corners))
        if self.make is None:
            return patches
        made = pack(self.make(patches.boxes_BCXYZ, step), shelf)
        return replace(patches, boxes_BCXYZ=patches.boxes_BCXYZ.new_empty(0), views=made)

    def _sample(self, step: int, sample: int) -> tuple[np.ndarray, str, list[int]]:
        draws = generator(self.source.seed, self.source.stream, step, sample)
        row = self.rows[int(draws.integers(len(self.rows)))]
        best_share, best = -1.0, (np.empty(0), [0, 0, 0])
        for _ in range(self.plan.attempts):
            corner = [_corner(draws, room - side) for room, side in zip(row.shape_vox, self.plan.box_vox, strict=True)]
            box = self.store.read_box(row.scan_id, corner, self.plan.box_vox)
            # A count of bytes is several times as fast as their mean, and none is needed where any box will do.
            share = np.count_nonzero(box > self._body_level) / box.size if self.plan.min_body > 0 else 0.0
            if share > best_share:
                best_share, best = share, (box, corner)
            if share >= self.plan.min_body:
                break
        return best[0], row.scan_id, best[1]


def _corner(draws: np.random.Generator, room: int) -> int:
    # A scan narrower than the box stands in its middle; the rest is filled as outside.
    return int(draws.integers(room + 1)) if room >= 0 else room // 2


class _Steps(torch.utils.data.Sampler[int]):
    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last)

    def __iter__(self) -> Iterator[int]:
        return iter(self._range)

    def __len__(self) -> int:
        return len(self._range)


class _Answers(Dataset[Patches | BadInput]):
    """A stream whose complaints are items, so that they arrive as they were written: torch would put a traceback into their text."""

    def __init__(self, stream: PatchStream, shelf: Shelf | None) -> None:
        self.stream, self.shelf = stream, shelf

    def __getitem__(self, step: int) -> Patches | BadInput:
        try:
            return self.stream.batch(step, self.shelf)
        except BadInput as complaint:
            return complaint


def loader(stream: PatchStream, *, first_step: int = 0, pin: bool = False) -> Iterator[Patches]:
    """Batches of the steps from `first_step` to the stream's end, read ahead by the plan's workers; `pin` for a CUDA device.

    The workers start at once. Raises: BadInput: what the stream raises, here or in a worker.
    """
    workers = min(stream.plan.workers, max(stream.steps - first_step, 0))
    ahead = 2 if stream.make else 4  # batches per worker: what is read ahead lies in shared memory
    shelf = Shelf(workers) if workers and stream.make else None
    answers: DataLoader[Any] = DataLoader(
        _Answers(stream, shelf),
        batch_size=None,
        sampler=_Steps(first_step, stream.steps),
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin,
        persistent_workers=False,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    with _held_back(signal.SIGTERM):
        return _told(iter(answers), shelf)


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    # A process begun within it has the signal blocked from its first instruction, and so has every thread of it: torch begins threads in
    # a worker, if the parent's number of threads was set, before a worker can say anything about signals.
    if sys.platform != "linux":  # elsewhere a worker could not let it through again
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    # A scheduler, `timeout` and Ctrl-C signal the whole group: the training process then saves, and needs its workers until it has.
    del worker
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nothing tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # Linux keeps a blocked signal for who waits for it, ignored or not; ignored, it cannot end a worker by way of a thread that some
        # library began without the block.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():  # pyright: ignore[reportOptionalMemberAccess]
        pass
    os._exit(0)


def _told(answers: Iterator[Any], shelf: Shelf | None) -> Iterator[Patches]:
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except (EOFError, ConnectionError, RuntimeError) as error:
            # How it looks when a worker dies while it hands something over; its own errors are told as "Caught ... in DataLoader worker".
            if str(error).startswith("Caught") or (isinstance(error, RuntimeError) and "ancdata" not in str(error)):
                raise
            raise RuntimeError(f"DataLoader worker broke off, {type(error).__name__}") from error
        if isinstance(answer, BadInput):
            raise answer
        if shelf is not None and answer.views is not None:
            answer = replace(answer, views=shelf.received(answer.views))
        yield answer


def _as_is(batch: Any) -> Any:
    return batch


@contextmanager
def deaths_told() -> Iterator[None]:
    """Within it the death of a worker, which torch tells wherever the training just is, is one clear complaint. Raises: BadInput."""
    try:
        yield
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        if not what.startswith("DataLoader worker"):
            raise
        raise BadInput(
            f"patches.workers: every worker must live as long as the run; found: {what.strip()}; where memory ran out, lower "
            "patches.workers or patches.batch_size; continue with --resume"
        ) from None


def to_unit(boxes_BCXYZ: Tensor, window: tuple[float, float], device: torch.device) -> Tensor:
    """Move int16 boxes to the device (half the bytes of float32) and map the window to [0, 1], clipped: float32."""
    low, high = window
    x_BCXYZ = boxes_BCXYZ.to(device, non_blocking=True).float()
    return x_BCXYZ.sub_(low).div_(high - low).clamp_(0, 1)
