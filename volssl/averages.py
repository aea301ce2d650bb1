"""Running means of weights: a copy of a module that follows it from step to step."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def frozen_copy(net: Net) -> Net:
    """A copy that no optimiser changes: its parameters take no gradient."""
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def follow(mean: nn.Module, net: nn.Module, *, decay: float) -> None:
    """mean <- decay * mean + (1 - decay) * net, parameter by parameter; buffers stay. Args: mean: a `frozen_copy` of `net`."""
    for averaged, parameter in zip(mean.parameters(), net.parameters(), strict=True):
        averaged.lerp_(parameter, 1 - decay)


@torch.no_grad()
def keep_mean(mean: nn.Module, net: nn.Module, *, average: float, step: int) -> None:
    """The running mean that a run leaves, after its step number `step`, from 0; buffers, such as running statistics, are the last ones.

    Args: average: the decay; the first steps count less, min(average, (1 + step) / (10 + step)), so that the untrained weights are
        forgotten at once (as in TensorFlow's moving average). 0 keeps the last weights.
    """
    follow(mean, net, decay=min(average, (1 + step) / (10 + step)) if average else 0.0)
    for last, buffer in zip(mean.buffers(), net.buffers(), strict=True):
        last.copy_(buffer)
