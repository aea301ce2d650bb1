"""Verb pretrain: train a method on a prepared store, and leave a bundle. The step is in `_train`; the rest is the run around it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric

import volssl
from volssl import processes
from volssl import recipe as recipes
from volssl.checkpoints import BEST, Checkpoints, StopSignal, check_finite
from volssl.draws import Draws
from volssl.export import bundle
from volssl.files import BadInput, Outcome, claim_out, track
from volssl.journal import Clock, Journal, write_environment
from volssl.methods.method import AbstractMethod, unchanged
from volssl.patches import Patches, PatchPlan, PatchStream, Source, loader, to_unit
from volssl.pictures import restoration_png
from volssl.schedule import warmup_cosine
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
    """

    steps: int = 75_000
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    clip: float = 0.0
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or self.lr <= 0 or not 0 <= self.warmup <= 1:
            raise BadInput(
                f"steps >= 1, accumulate >= 1, lr > 0 and warmup in [0, 1] must hold; "
                f"found {self.steps}, {self.accumulate}, {self.lr}, {self.warmup}"
            )


@dataclass(frozen=True)
class Saving:
    """When something is written: steps between log lines, pictures, checks on held-out scans and checkpoints (also by minutes)."""

    log_every: int = 20
    pictures_every: int = 1000
    validate_every: int = 500
    validation_batches: int = 4
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0


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
    steps_done: int = 0
    best: float = float("inf")

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        scaler = scaler_of(self.fabric)
        return {
            "version": 1,
            "steps_done": self.steps_done,
            "best": self.best,
            "method": self.method.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state. Raises: BadInput: if it is of another recipe."""
        try:
            self.method.load_state_dict(state["method"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise BadInput(f"--resume: the checkpoint must be of the same recipe; it does not fit: {error}") from None
        scaler = scaler_of(self.fabric)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.steps_done, self.best = state["steps_done"], state["best"]


def scaler_of(fabric: Fabric) -> Any:
    """The gradient scaler of fp16, or None."""
    return getattr(fabric._precision, "scaler", None)


PARTS = {"net": "nets", "method": "methods", "patches": PatchPlan, "training": Training, "saving": Saving}


def run(
    recipe: str | Path,
    *,
    store: Path,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Pretrain by `recipe` on the store and leave a run folder with a bundle.

    Args: recipe: path or name of a shipped recipe. store: from `volssl prepare`. out: the run. resume: continue from its last checkpoint,
        to the bit. overrides: `key=value` over the recipe; on resume the run's own recipe must be asked for again.
    Raises: BadInput: before step 0 for anything that cannot work; NotFinite: for a loss that is not finite.
    """
    values = recipes.load(recipe, overrides, verb="pretrain")
    made = recipes.parse(values, PARTS, str(recipe))
    opened = Store.open(Path(store))
    method = _method(made)
    method.check(made["patches"].box_vox, made["patches"].batch_size)
    training = made["training"]
    PatchStream(opened, made["patches"], source=Source(seed=training.seed), steps=1)
    fabric = _fabric(training.precision)
    out = Path(out)
    if processes.rank() == 0:
        claim_out(out, resume=resume, overwrite=overwrite)
        _same_recipe(out, values, resume=resume)
    fabric.barrier()
    current = _start(fabric, method, made, opened, out)
    card = _card(made, values, opened, method)
    bundle.prove(method.encoder, card)
    checkpoints = Checkpoints(out, made["saving"].checkpoint_every, made["saving"].checkpoint_minutes)
    if resume and (state := checkpoints.load()) is not None:
        current.restore(state)
    if processes.rank() == 0:
        write_environment(out, device=fabric.device, precision=str(fabric._precision.precision), seed=training.seed)
    with StopSignal() as stop, Journal(out, steps_done=current.steps_done, silent=processes.rank() > 0) as journal:
        _train(current, made["saving"], checkpoints, journal, stop)
    if current.steps_done < training.steps:
        return Outcome(out, message=f"stopped by a signal after step {current.steps_done}; continue with --resume")
    if processes.rank() == 0:
        bundle.write(out / "bundle", method.encoder, dataclasses.replace(card, steps=current.steps_done))
    return Outcome(out, message=f"{training.steps} steps done; weights in bundle/")


def _method(made: dict[str, Any]) -> AbstractMethod:
    # The first weights depend on the seed alone, whatever ran in this process before.
    with torch.random.fork_rng():
        torch.manual_seed(made["training"].seed)
        return made["method"].build(made["net"].build())


def _same_recipe(out: Path, values: dict[str, Any], *, resume: bool) -> None:
    path = out / "recipe.yaml"
    if resume and path.exists():
        before = recipes.load(path, verb="pretrain")
        changed = sorted(key for key in before.keys() | values.keys() if before.get(key) != values.get(key) and key != "saving")
        if changed:
            raise BadInput(
                f"--resume: the recipe must be the one the run began with; found other values under {', '.join(changed)}; start a new run"
            )
    recipes.save(values, path, verb="pretrain")


def fabric_precision(asked: Precision) -> Any:
    """Lightning's name of a precision; auto takes bf16 only where the hardware multiplies it, as emulation is many times slower."""
    if asked == "auto":
        capable = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        asked = "bf16" if capable else "fp32"
    return FABRIC_PRECISION[asked]


def _fabric(precision: Precision) -> Fabric:
    """One process, or what `torchrun` started: each with its own device. The module is not wrapped: the loop averages gradients itself,
    since only some heads take part in a step."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    many: dict[str, Any] = {"devices": local, "num_nodes": world // local, "strategy": "ddp"} if world > 1 else {"devices": 1}
    fabric = Fabric(accelerator="auto", precision=fabric_precision(precision), **many)
    fabric.launch()
    return fabric


def _start(fabric: Fabric, method: AbstractMethod, made: dict[str, Any], store: Store, out: Path) -> Run:
    training: Training = made["training"]
    method.to(fabric.device, memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    optimizers = {}
    for party, parameters in method.parties().items():
        if training.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, training.lr, momentum=0.9, weight_decay=training.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, training.lr, weight_decay=training.weight_decay)
        optimizers[party] = fabric.setup_optimizers(optimizer)
    return Run(fabric, method.train(), optimizers, training, made["patches"], store, out)


def _train(current: Run, saving: Saving, checkpoints: Checkpoints, journal: Journal, stop: StopSignal) -> None:
    """The training loop: views, then per turn backward and step, then what is due is written."""
    training, method, fabric = current.training, current.method, current.fabric
    batches = iter(_stream(current, "patches", "train", training.steps * training.accumulate, current.steps_done * training.accumulate))
    clock = Clock()
    remaining = range(current.steps_done, training.steps)
    for step in track(remaining, total=training.steps, label="pretrain", start=current.steps_done):
        progress = step / training.steps
        lr = training.lr * warmup_cosine((step + 1) / training.steps, warmup=training.warmup)
        with clock.waiting():
            patches = [next(batches) for _ in range(training.accumulate)]
        views = [_views(current, batch, step * training.accumulate + i) for i, batch in enumerate(patches)]
        scans = [scan for batch in patches for scan in batch.scan_ids]
        sums: dict[str, float] = {}
        for party, losses in _turns(current, views, progress, scans):
            sums |= losses
            sums[f"grad_norm/{party}"] = _step(current, party, lr, scans)
        method.after_step(progress)
        current.steps_done = step + 1
        clock.samples += len(scans)
        if current.steps_done % saving.log_every == 0 or current.steps_done == training.steps:
            numbers = {name: processes.mean(value, fabric.device) for name, value in sums.items()} | {"lr": lr}
            journal.log(step=current.steps_done, progress=current.steps_done / training.steps, **clock.read(), **numbers)
        _write_what_is_due(current, saving, checkpoints, journal, views[0])
        if processes.mean(float(stop.asked), fabric.device) > 0:
            break
    checkpoints.save(current.state())


def _turns(current: Run, views: list[Any], progress: float, scans: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    # All batches of an accumulated step play the same turn, then its party steps, then the next turn begins.
    plays = [current.method.turns(of_batch, progress) for of_batch in views]
    share = 1 / len(plays)
    while True:
        party, sums = "", {}
        for play in plays:
            with current.fabric.autocast():
                turn = next(play, None)
            if turn is None:
                return
            party, losses = turn
            for name, value in check_finite(losses, step=current.steps_done, scans=scans).items():
                sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + share * value
            current.fabric.backward(torch.stack(list(losses.values())).sum() * share)
        yield party, sums


def _step(current: Run, party: str, lr: float, scans: list[str]) -> float:
    optimizer, clip = current.optimizers[party], current.training.clip
    processes.average_gradients(current.method.parameters())
    measured = current.fabric.clip_gradients(current.method, optimizer, max_norm=clip or float("inf"), error_if_nonfinite=False)
    norm = float("nan") if measured is None else float(measured)
    # A gradient scaler skips a step whose gradients overflowed and lowers its scale; without one nothing may be swallowed.
    if scaler_of(current.fabric) is None:
        check_finite({f"gradient of {party}": torch.tensor(norm)}, step=current.steps_done, scans=scans)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if math.isfinite(norm) else 0.0


def _stream(current: Run, stream: str, split: str, steps: int, first: int = 0) -> Any:
    patches = PatchStream(current.store, current.plan, source=Source(split, current.training.seed, stream, processes.rank()), steps=steps)
    return loader(patches, first_step=first, pin=current.fabric.device.type == "cuda")


def _views(current: Run, patches: Patches, index: int, stream: str = "") -> Any:
    x_BCXYZ = to_unit(patches.boxes_BCXYZ, current.store.window, current.fabric.device)
    draws = Draws(current.training.seed, index, processes.rank() * len(x_BCXYZ), len(x_BCXYZ), stream)
    return current.method.views(x_BCXYZ, draws, spacing_mm=current.store.spacing_mm)


def _write_what_is_due(current: Run, saving: Saving, checkpoints: Checkpoints, journal: Journal, views: Any) -> None:
    step, last = current.steps_done, current.steps_done == current.training.steps
    if step % saving.pictures_every == 0 or last:
        with current.fabric.autocast(), unchanged(current.method):
            columns = {name: x_BXYZ[:4].numpy() for name, x_BXYZ in current.method.pictures(views).items()}
        if processes.rank() == 0:
            picture = current.out / "pictures" / f"restoration_{step:07d}.png"
            restoration_png(picture, columns, window=(0.0, 1.0), spacing_mm=current.store.spacing_mm)
    if (step % saving.validate_every == 0 or last) and any(row.split == "val" for row in current.store.rows):
        losses = _validate(current, saving.validation_batches)
        journal.log(
            step=step,
            progress=step / current.training.steps,
            **{f"val/{name}": value for name, value in losses.items()},
        )
        if sum(losses.values()) < current.best:
            current.best = sum(losses.values())
            checkpoints.save(current.state(), BEST)
    if checkpoints.due(step):
        checkpoints.save(current.state())


def _validate(current: Run, batches: int) -> dict[str, float]:
    """Mean losses on fixed patches of the held-out split, with the fading terms as at the start, so that steps can be compared."""
    sums: dict[str, float] = {}
    with torch.no_grad(), current.fabric.autocast(), unchanged(current.method):
        for index, patches in enumerate(_stream(current, "validation", "val", batches)):
            views = _views(current, patches, index, "validation")
            for _, losses in current.method.turns(views, 0.0):
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / batches
    return {name: processes.mean(value, current.fabric.device) for name, value in sums.items()}


def _card(made: dict[str, Any], values: dict[str, Any], store: Store, method: AbstractMethod) -> bundle.Card:
    net = made["net"]
    arguments = dict(method.net.arguments)
    train = [row for row in store.rows if row.split == "train"]
    return bundle.Card(
        architecture={"name": net.name, "arguments": arguments},
        in_channels=arguments["in_channels"],
        spacing_mm=store.spacing_mm,
        orientation=store.about.orientation,
        intensity={
            "modality": store.about.modality,
            "clip": list(store.about.clip),
            "window": list(store.window),
            "normalisation": method.normalisation,
        },
        method=made["method"].name,
        recipe=values,
        steps=0,
        data={"train_scans": len(train), "train_patients": len({row.patient_id for row in train})},
        volssl_version=volssl.__version__,
        citations=(method.citation,),
    )
