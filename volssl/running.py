"""A running pretraining: its settings, its state, its device, and where its patches and views come from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor

from volssl import compiling, processes
from volssl.averages import frozen_copy
from volssl.draws import Draws
from volssl.files import BadInput
from volssl.methods.method import AbstractMethod, without_weights
from volssl.parcels import unpack
from volssl.patches import Patches, PatchPlan, PatchStream, Source, loader, to_unit
from volssl.store import Store

Precision = Literal["auto", "fp32", "bf16", "fp16"]
FABRIC_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: optimiser steps. accumulate: batches per step. lr: peak. warmup: share of the steps in which it rises; then cosine to 0.
        optimizer: sgd (momentum 0.9, the reference's) or adamw. clip: largest gradient norm, 0 for none.
        precision: auto is bf16 on CUDA and on a CPU with bf16 dot products, else fp32; fp16 scales the loss.
        compile: see `compiling.speed_up`. average: decay of the running mean of the net's weights, which is then what the bundle holds,
        see `keep_mean`; 0 keeps the last weights.
    """

    steps: int = 75_000
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    clip: float = 0.0
    precision: Precision = "auto"
    compile: compiling.Compile = "auto"
    average: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.average < 1:
            raise BadInput(f"average must lie in [0, 1); found {self.average}")
        if self.steps < 1 or self.accumulate < 1 or self.lr <= 0 or not 0 <= self.warmup <= 1:
            raise BadInput(
                f"steps >= 1, accumulate >= 1, lr > 0 and warmup in [0, 1] must hold; "
                f"found {self.steps}, {self.accumulate}, {self.lr}, {self.warmup}"
            )


@dataclass
class Run:
    """What a running pretraining holds; `state` gives what a checkpoint must hold to continue to the bit."""

    fabric: Fabric
    method: AbstractMethod
    optimizers: dict[str, Any]
    training: Training
    plan: PatchPlan
    store: Store
    out: Path
    averaged: Any = None
    steps_done: int = 0
    best: float = float("inf")

    @property
    def kept(self) -> Any:
        """The backbone that a finished run leaves: the running mean if there is one, or that of the method."""
        return self.averaged if self.averaged is not None else self.method.net

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        scaler = scaler_of(self.fabric)
        averaged = {"averaged": self.averaged.state_dict()} if self.averaged is not None else {}
        return {
            "version": 1,
            "steps_done": self.steps_done,
            "best": self.best,
            "method": self.method.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": scaler.state_dict() if scaler is not None else {},
            **averaged,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state. Raises: BadInput: if it is of another recipe."""
        try:
            self.method.load_state_dict(state["method"])
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise BadInput(f"--resume: the checkpoint must be of the same recipe; it does not fit: {error}") from None
        scaler = scaler_of(self.fabric)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.steps_done, self.best = state["steps_done"], state["best"]


def start(fabric: Fabric, method: AbstractMethod, made: dict[str, Any], *, store: Store, out: Path) -> Run:
    """The method on its device with an optimiser per party. Args: made: the recipe's parts `training` and `patches`."""
    training: Training = made["training"]
    method.to(fabric.device, memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    averaged = frozen_copy(method.net) if training.average else None
    compiling.speed_up(method, training.compile, device=fabric.device, steps=training.steps)
    optimizers = {}
    for party, parameters in method.parties().items():
        if training.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, training.lr, momentum=0.9, weight_decay=training.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, training.lr, weight_decay=training.weight_decay)
        optimizers[party] = fabric.setup_optimizers(optimizer)
    return Run(fabric, method.train(), optimizers, training, made["patches"], store, out, averaged)


def world_size() -> int:
    """Number of processes that `torchrun` or SLURM is starting, known before they meet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def open_fabric(precision: Precision) -> Fabric:
    """One process, or what `torchrun` started: each with its own device. The module is not wrapped: the loop averages gradients itself,
    since only some heads take part in a step."""
    world, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    many: dict[str, Any] = {"devices": local, "num_nodes": world // local, "strategy": "ddp"} if world > 1 else {"devices": 1}
    fabric = Fabric(accelerator="auto", precision=fabric_precision(precision), **many)
    fabric.launch()
    return fabric


def fabric_precision(asked: Precision) -> Any:
    """Lightning's name of a precision; auto takes bf16 only where the hardware multiplies it, as emulation is many times slower."""
    if asked == "auto":
        asked = "bf16" if compiling.multiplies_bf16("cuda" if torch.cuda.is_available() else "cpu") else "fp32"
    return FABRIC_PRECISION[asked]


def scaler_of(fabric: Fabric) -> Any:
    """The gradient scaler of fp16, or None."""
    return getattr(fabric._precision, "scaler", None)


def training_batches(current: Run, *, steps: int, first: int = 0) -> Iterator[Patches]:
    """Batches of the training from number `first` to `steps`, for `views_of`; with their views, where the workers make them."""
    make = None
    if current.plan.workers_make_views(current.fabric.device):
        make = _maker(current, "")
        if compiling.resolved(current.training.compile, device=current.fabric.device, steps=current.training.steps) != "off":
            _compile_before_the_workers_start(current, make)
    return _batches(current, "patches", "train", first=first, steps=steps, make=make)


def stream_of(current: Run, stream: str, split: str, *, steps: int) -> Iterator[Patches]:
    """Batches to look at, whose views `views_of` makes; `stream` names the draws, so that a look draws other boxes than the training."""
    return _batches(current, stream, split, steps=steps)


def _batches(current: Run, stream: str, split: str, *, steps: int, first: int = 0, make: ViewMaker | None = None) -> Iterator[Patches]:
    source = Source(split, current.training.seed, stream, processes.rank())
    patches = PatchStream(current.store, current.plan, source=source, steps=steps, make=make)
    return loader(patches, first_step=first, pin=current.fabric.device.type == "cuda")


@dataclass(frozen=True)
class ViewMaker:
    """Boxes as stored -> a method's views, as a function of (seed, stream, number of the batch, rank) alone.

    On a CPU it keeps to one thread, in a worker as in the training process: products of matrices depend on the number of threads in their
    last bit. Attributes: method: without weights. window, spacing_mm: of the store.
    """

    method: AbstractMethod
    window: tuple[float, float]
    spacing_mm: tuple[float, float, float]
    seed: int
    stream: str
    rank: int
    device: torch.device = torch.device("cpu")

    def __call__(self, boxes_BCXYZ: Tensor, index: int) -> Any:
        """The views of batch `index`."""
        with _one_thread() if self.device.type == "cpu" else nullcontext():
            x_BCXYZ = to_unit(boxes_BCXYZ, self.window, self.device)
            draws = Draws(self.seed, index, self.rank * len(x_BCXYZ), len(x_BCXYZ), self.stream)
            return self.method.views(x_BCXYZ, draws, spacing_mm=self.spacing_mm)


def _maker(current: Run, stream: str, device: torch.device = torch.device("cpu")) -> ViewMaker:
    store = current.store
    light = without_weights(current.method)
    return ViewMaker(light, store.window, store.spacing_mm, current.training.seed, stream, processes.rank(), device)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compile_before_the_workers_start(current: Run, make: ViewMaker) -> None:
    # Forked workers take over what is compiled; otherwise each of them would compile the same for itself.
    channels, air = current.store.rows[0].channels, round(current.store.window[0])
    boxes = torch.full((current.plan.batch_size, channels, *current.plan.box_vox), air, dtype=torch.int16)
    make(boxes, 0)


def views_of(current: Run, patches: Patches, index: int, stream: str = "") -> Any:
    """The method's views of a batch: those a worker made, or made now on the device."""
    device = current.fabric.device
    return unpack(patches.views, device) if patches.views is not None else _maker(current, stream, device)(patches.boxes_BCXYZ, index)
