"""The fine-tuning step and what it needs: loss, optimiser, running mean of the weights, checkpoint state. The loop is in `train`."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from monai.losses.dice import DiceLoss
from torch import Tensor

from volssl.cases import Augmentation, Batch, LabelledPatches
from volssl.checkpoints import Checkpoints, StopSignal, check_finite
from volssl.draws import Draws
from volssl.files import BadInput, track
from volssl.journal import Clock, Journal
from volssl.nets.heads import SegmentationNet
from volssl.running import Precision, fabric_precision, scaler_of
from volssl.schedule import warmup_cosine
from volssl.segment import Plan
from volssl.targets import region_masks


@dataclass(frozen=True)
class Optimisation:
    """How long and how fast; nothing is ever frozen.

    Attributes:
        steps: optimiser steps. lr: peak; linear warm-up over the share `warmup`, then cosine to 0. optimizer: adamw, or sgd with Nesterov
            momentum 0.99. clip: largest gradient norm, 0 for none. dice, cross_entropy: weights of the loss terms.
        deep_supervision: losses also at coarser scales, each with half the weight of the finer one. average: decay of the running mean of
            the weights, which is what is kept; 0 keeps the last weights.
        accept_mismatch: fine-tune a bundle although the recipe prepares voxels otherwise than its card says.
    """

    steps: int = 5000
    lr: float = 1e-3
    warmup: float = 0.05
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
    averaged = copy.deepcopy(net).requires_grad_(False).eval()
    parameters = net.parameters()
    if optimisation.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, optimisation.lr, momentum=0.99, nesterov=True, weight_decay=optimisation.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, optimisation.lr, weight_decay=optimisation.weight_decay)
    setup = fabric.setup_optimizers(optimizer)
    return Run(fabric, plan, net.train(), averaged, setup, patches, made["augmentation"], optimisation, made["saving"], seed)


def train(current: Run, checkpoints: Checkpoints, journal: Journal, stop: StopSignal) -> None:
    """The training loop: draw, augment, losses, backward, step, average; then what is due is written."""
    settings, clock = current.optimisation, Clock()
    for step in track(range(current.steps_done, settings.steps), total=settings.steps, label="finetune", start=current.steps_done):
        lr = settings.lr * warmup_cosine((step + 1) / settings.steps, warmup=settings.warmup)
        with clock.waiting():
            batch = current.patches.batch(step, current.fabric.device)
        x_BCXYZ, y_B1XYZ = _augmented(current, batch, step)
        with current.fabric.autocast():
            losses = _losses(current, x_BCXYZ, y_B1XYZ)
        numbers = {f"loss/{name}": value for name, value in check_finite(losses, step=step, scans=batch.case_ids).items()}
        current.fabric.backward(torch.stack(list(losses.values())).sum())
        numbers |= {"grad_norm": _step(current, lr, batch.case_ids), "lr": lr}
        _average(current, step)
        current.steps_done = step + 1
        clock.samples += len(batch.case_ids)
        if current.steps_done % current.saving.log_every == 0 or current.steps_done == settings.steps:
            journal.log(step=current.steps_done, progress=current.steps_done / settings.steps, **clock.read(), **numbers)
        if checkpoints.due(current.steps_done):
            checkpoints.save(current.state())
        if stop.asked:
            break
    checkpoints.save(current.state())


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
        of_scale = _of_regions(current.plan, logits.float(), y) if current.plan.regions else _of_labels(logits.float(), y)
        dice, entropy = dice + weight * of_scale[0], entropy + weight * of_scale[1]
    return {"dice": current.optimisation.dice * dice, "cross_entropy": current.optimisation.cross_entropy * entropy}


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
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if math.isfinite(norm) else 0.0


@torch.no_grad()
def _average(current: Run, step: int) -> None:
    # The first steps count less, so that the untrained weights are forgotten at once (as in TensorFlow's moving average).
    decay = min(current.optimisation.average, (1 + step) / (10 + step)) if current.optimisation.average else 0.0
    for mean, parameter in zip(current.averaged.parameters(), current.net.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)
    for mean, buffer in zip(current.averaged.buffers(), current.net.buffers(), strict=True):
        mean.copy_(buffer)


def kept(current: Run) -> SegmentationNet:
    """The network that a finished run leaves: the running mean."""
    return current.averaged.eval()
