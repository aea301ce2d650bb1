"""The fine-tuning step and what it needs: loss, optimiser, running mean of the weights, checkpoint state. The loop is in `train`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from monai.losses.dice import DiceLoss
from torch import Tensor, nn

from volssl.averages import frozen_copy, keep_mean
from volssl.cases import Augmentation, Batch, LabelledPatches
from volssl.checkpoints import Checkpoints, StopSignal, check_finite
from volssl.draws import Draws
from volssl.files import BadInput, track
from volssl.journal import Clock, Journal
from volssl.nets.heads import SegmentationNet
from volssl.running import Precision, fabric_precision, scaler_of
from volssl.schedule import Schedule, rate
from volssl.segment import Plan
from volssl.targets import region_masks


@dataclass(frozen=True)
class EncoderPace:
    """How the encoder follows the rest of the network.

    Attributes: lr: factor of its learning rate. layers: a further factor for each level towards the input, so that with 0.5 the first of
        four levels moves at an eighth of the last one's rate. freeze: share of the steps in which it stands still, its running statistics
        too. warmup: share of the steps after that in which its rate rises linearly from near 0.
    """

    lr: float = 1.0
    layers: float = 1.0
    freeze: float = 0.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and self.layers > 0 and 0 <= self.freeze <= 1 and 0 <= self.warmup <= 1):
            raise BadInput(f"lr >= 0, layers > 0, freeze and warmup in [0, 1] must hold; found {self}")

    def factor(self, progress: float, *, frozen: float) -> float:
        """Of the encoder's rate at `progress`, besides the levels' own factors."""
        return self.lr * min(1.0, max(0.0, progress - frozen) / self.warmup if self.warmup else 1.0)


@dataclass(frozen=True)
class Optimisation:
    """How long and how fast; nothing is frozen unless `encoder` or the sawtooth says so.

    Attributes:
        steps: optimiser steps. lr: peak. schedule: cosine or poly (power 0.9) after a linear rise over the share `warmup`, or sawtooth, see
            `volssl.schedule`. encoder: see `EncoderPace`. optimizer: adamw, or sgd with Nesterov
            momentum 0.99. clip: largest gradient norm, 0 for none. dice, cross_entropy: weights of the loss terms.
        deep_supervision: losses also at coarser scales, each with half the weight of the finer one. average: decay of the running mean of
            the weights, which is what is kept; 0 keeps the last weights.
        accept_mismatch: fine-tune a bundle although the recipe prepares voxels otherwise than its card says.
    """

    steps: int = 5000
    lr: float = 1e-3
    warmup: float = 0.05
    schedule: Schedule = "cosine"
    encoder: EncoderPace = field(default_factory=lambda: EncoderPace())
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-2
    clip: float = 12.0
    dice: float = 1.0
    cross_entropy: float = 1.0
    deep_supervision: bool = False
    average: float = 0.99
    precision: Precision = "auto"
    accept_mismatch: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or not 0 <= self.warmup <= 1 or not 0 <= self.average < 1 or self.dice + self.cross_entropy <= 0:
            raise BadInput("steps >= 1, lr > 0, warmup in [0, 1], average in [0, 1) and a loss weight above 0 must hold")
        if self.schedule == "sawtooth" and not 0 < self.warmup < 0.5:
            raise BadInput(f"the sawtooth rises twice, so warmup must lie between 0 and 0.5; found {self.warmup}")

    @property
    def frozen(self) -> float:
        """Share of the steps in which the encoder stands still."""
        return max(self.encoder.freeze, self.warmup if self.schedule == "sawtooth" else 0.0)


@dataclass(frozen=True)
class Saving:
    """Steps between log lines and checkpoints (these also by minutes)."""

    log_every: int = 20
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0


@dataclass
class Run:
    """What a running fine-tuning holds; `state` gives what a checkpoint must hold to continue to the bit."""

    fabric: Fabric
    plan: Plan
    net: SegmentationNet
    averaged: SegmentationNet
    optimizer: Any
    patches: LabelledPatches
    augmentation: Augmentation
    optimisation: Optimisation
    saving: Saving
    seed: int
    steps_done: int = 0

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        scaler = scaler_of(self.fabric)
        return {
            "version": 1,
            "steps_done": self.steps_done,
            "net": self.net.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state. Raises: BadInput: if it is of another recipe."""
        try:
            self.net.load_state_dict(state["net"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise BadInput(f"--resume: the checkpoint must be of the same recipe; it does not fit: {error}") from None
        scaler = scaler_of(self.fabric)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]


def start(plan: Plan, net: SegmentationNet, made: dict[str, Any], patches: LabelledPatches, *, seed: int) -> Run:
    """Network on the device, its optimiser and its running mean. made: the parsed recipe."""
    optimisation: Optimisation = made["optimisation"]
    fabric = Fabric(accelerator="auto", devices=1, precision=fabric_precision(optimisation.precision))
    net.to(fabric.device, memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    averaged = frozen_copy(net).eval()
    parameters = _groups(net, optimisation.encoder)
    if optimisation.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, optimisation.lr, momentum=0.99, nesterov=True, weight_decay=optimisation.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, optimisation.lr, weight_decay=optimisation.weight_decay)
    setup = fabric.setup_optimizers(optimizer)
    return Run(fabric, plan, net.train(), averaged, setup, patches, made["augmentation"], optimisation, made["saving"], seed)


def _groups(net: SegmentationNet, pace: EncoderPace) -> Any:
    """What the optimiser moves: all alike, or the rest and each level of the encoder as a group with the `factor` of its rate."""
    if pace == EncoderPace():
        return net.parameters()
    inside = {id(parameter): name for name, parameter in net.net.encoder.named_parameters()}
    groups: dict[int | None, list[nn.Parameter]] = {}
    for parameter in net.parameters():
        groups.setdefault(_level(inside[id(parameter)]) if id(parameter) in inside else None, []).append(parameter)
    last = max(level for level in groups if level is not None)
    return [
        {"params": some, "of_encoder": level is not None, "factor": 1.0 if level is None else pace.layers ** (last - level)}
        for level, some in groups.items()
    ]


def _level(name: str) -> int:
    # "levels.2.0.conv.weight" and "layers2.0..." are of level 2; a stem or an embedding, without a number, belongs to the first.
    number = re.search(r"\d+", name)
    return int(number.group()) if number else 0


def train(current: Run, checkpoints: Checkpoints, journal: Journal, stop: StopSignal) -> None:
    """The training loop: draw, augment, losses, backward, step, average; then what is due is written."""
    settings, clock = current.optimisation, Clock()
    batches = _read_ahead(current)
    for step in track(range(current.steps_done, settings.steps), total=settings.steps, label="finetune", start=current.steps_done):
        progress = (step + 1) / settings.steps
        lr = settings.lr * rate(settings.schedule, progress, warmup=settings.warmup)
        _freeze(current.net, progress <= settings.frozen)
        with clock.waiting():
            batch = next(batches).to(current.fabric.device)
        x_BCXYZ, y_B1XYZ = _augmented(current, batch, step)
        with current.fabric.autocast():
            losses = _losses(current, x_BCXYZ, y_B1XYZ)
        numbers = {f"loss/{name}": value for name, value in check_finite(losses, step=step, scans=batch.case_ids).items()}
        current.fabric.backward(torch.stack(list(losses.values())).sum())
        numbers |= {"grad_norm": _step(current, lr, batch.case_ids), "lr": lr}
        keep_mean(current.averaged, current.net, average=settings.average, step=step)
        current.steps_done = step + 1
        clock.samples += len(batch.case_ids)
        if current.steps_done % current.saving.log_every == 0 or current.steps_done == settings.steps:
            journal.log(step=current.steps_done, progress=current.steps_done / settings.steps, **clock.read(), **numbers)
        if checkpoints.due(current.steps_done):
            checkpoints.save(current.state())
        if stop.asked:
            break
    checkpoints.save(current.state())


def _read_ahead(current: Run) -> Iterator[Batch]:
    """The batches of the steps to come; a thread reads the next one while this one is trained on."""
    steps = range(current.steps_done, current.optimisation.steps)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead = reader.submit(current.patches.batch, steps.start)
        for step in steps:
            batch = ahead.result()
            if step + 1 < steps.stop:
                ahead = reader.submit(current.patches.batch, step + 1)
            yield batch


def _freeze(net: SegmentationNet, frozen: bool) -> None:
    encoder = net.net.encoder
    if encoder.training == frozen:
        encoder.requires_grad_(not frozen).train(not frozen)


def _augmented(current: Run, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    draws = Draws(current.seed, step, 0, len(batch.case_ids), "finetune")
    x, y = current.augmentation.apply(batch, draws, patch_vox=current.plan.patch_vox, classes=len(current.plan.values))
    return current.plan.preparation.patch(x).contiguous(memory_format=torch.channels_last_3d), y


def _losses(current: Run, x_BCXYZ: Tensor, y_B1XYZ: Tensor) -> dict[str, Tensor]:
    """Dice over the batch and cross-entropy, weighted; at several scales their weighted mean.

    Of labels: softmax, background left out of the Dice. Of regions: sigmoid, each region by itself.
    """
    outputs = current.net(x_BCXYZ)
    scales = outputs if isinstance(outputs, list) else [outputs]
    total = sum(0.5**i for i in range(len(scales)))
    dice, entropy = x_BCXYZ.new_zeros(()), x_BCXYZ.new_zeros(())
    for i, logits in enumerate(scales):
        weight = 0.5**i / total
        y = y_B1XYZ if i == 0 else F.interpolate(y_B1XYZ.float(), size=logits.shape[2:], mode="nearest-exact").long()
        of_scale = loss_terms(current.plan, logits.float(), y)
        dice, entropy = dice + weight * of_scale[0], entropy + weight * of_scale[1]
    return {"dice": current.optimisation.dice * dice, "cross_entropy": current.optimisation.cross_entropy * entropy}


def loss_terms(plan: Plan, logits_BKXYZ: Tensor, y_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and cross-entropy of logits for class indices (B, 1, X, Y, Z): of labels by softmax, of regions by sigmoid."""
    return _of_regions(plan, logits_BKXYZ, y_B1XYZ) if plan.regions else _of_labels(logits_BKXYZ, y_B1XYZ)


def _of_labels(logits_BKXYZ: Tensor, y_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:
    soft_dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    return soft_dice(logits_BKXYZ, y_B1XYZ), F.cross_entropy(logits_BKXYZ, y_B1XYZ[:, 0])


def _of_regions(plan: Plan, logits_BRXYZ: Tensor, y_B1XYZ: Tensor) -> tuple[Tensor, Tensor]:
    masks_BRXYZ = region_masks(y_B1XYZ, values=plan.values, regions=plan.regions)
    soft_dice = DiceLoss(sigmoid=True, batch=True)
    return soft_dice(logits_BRXYZ, masks_BRXYZ), F.binary_cross_entropy_with_logits(logits_BRXYZ, masks_BRXYZ)


def _step(current: Run, lr: float, cases: list[str]) -> float:
    clip, optimizer = current.optimisation.clip, current.optimizer
    total = current.fabric.clip_gradients(current.net, optimizer, max_norm=clip or math.inf, error_if_nonfinite=False)
    assert total is not None
    norm = float(total)
    # A gradient scaler skips a step whose gradients overflowed and lowers its scale; without one nothing may be swallowed.
    if scaler_of(current.fabric) is None:
        check_finite({"gradient": torch.tensor(norm)}, step=current.steps_done, scans=cases)
    settings = current.optimisation
    of_encoder = settings.encoder.factor((current.steps_done + 1) / settings.steps, frozen=settings.frozen)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0) * (of_encoder if group.get("of_encoder") else 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if math.isfinite(norm) else 0.0


def kept(current: Run) -> SegmentationNet:
    """The network that a finished run leaves: the running mean."""
    return current.averaged.eval()
