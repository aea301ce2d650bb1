"""The contract of a self-supervised method."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from volssl.draws import Draws

Turn = tuple[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Glance:
    """What a method shows of a batch, for `health`.

    Attributes: pooled: by name, the vectors (B, D) of two views of the same patches, in front of any normalisation over the batch.
        compared: whether the method pulls these together. deepest_BCXYZ: the encoder's deepest map. restored, target: on the [0, 1] scale,
        or None where nothing is restored.
    """

    pooled: Mapping[str, tuple[Tensor, Tensor]]
    compared: bool
    deepest_BCXYZ: Tensor
    restored: Tensor | None
    target: Tensor | None


class AbstractMethod(nn.Module, ABC):
    """Views of a batch, and the turns in which the parties (generator, critic, ...) learn from them.

    `pretrain` calls, per step: `views`, then for every turn of `turns` backward and a step of that party's optimiser, then `after_step`.
    The generator `turns` goes on only after that party's step, so a method's order of play is read in its own file.
    """

    citation: ClassVar[str]
    normalisation: ClassVar[str]  # what happens to a [0, 1] patch before the encoder, for the bundle's card
    encoder: nn.Module
    net: Any  # the backbone: a module with encoder, decoder, stride and arguments
    view_vox: tuple[int, int, int]  # of the largest view: what the encoder is used to see

    @abstractmethod
    def check(self, box_vox: tuple[int, int, int], batch_size: int) -> None:
        """Raise BadInput before step 0 if a batch of `batch_size` parent boxes of `box_vox` voxels cannot be trained on."""

    @abstractmethod
    def views(self, x_BCXYZ: Tensor, draws: Draws, *, spacing_mm: tuple[float, float, float]) -> Any:
        """Make a step's views from parent boxes on the [0, 1] scale: a frozen dataclass that also holds the numbers drawn for it.

        Called on a copy `without_weights`, here or in a worker: views depend on the boxes and the draws alone.
        """

    @abstractmethod
    def turns(self, views: Any, progress: float) -> Iterator[Turn]:
        """Yield (party, weighted losses by name) for each optimiser step; `progress` in [0, 1]."""

    @abstractmethod
    def pictures(self, views: Any) -> Mapping[str, Tensor]:
        """Columns to look at, (B, X, Y, Z) each on the [0, 1] scale: what was seen, the target, what was restored."""

    @abstractmethod
    def glance(self, views: Any) -> Glance:
        """What `health` judges the representation by; called without gradients and in evaluation mode."""

    @abstractmethod
    def features(self, x_BCXYZ: Tensor) -> Tensor:
        """Pooled features (B, D) of the encoder for clean patches on the [0, 1] scale: what a frozen encoder would offer."""

    def parties(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that learn, by party; each party gets an optimiser of its own."""
        return {"all": [parameter for parameter in self.parameters() if parameter.requires_grad]}

    def compile_views(self) -> None:
        """Compile what of the views pays for it; nothing unless a method says so."""

    def after_step(self, progress: float) -> None:
        """What happens after a step, such as a moving average."""


def without_weights(method: AbstractMethod) -> AbstractMethod:
    """A copy that has the settings and no parameters, buffers or parts: enough to make views, and light to send to another process."""
    light = copy.copy(method)
    light._parameters, light._buffers, light._modules = {}, {}, {}
    return light


def middle(x_BCXYZ: Tensor) -> Tensor:
    """First channel of a batch as float32 on the CPU, for pictures."""
    return x_BCXYZ[:, 0].detach().to("cpu", torch.float32)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put buffers, modes and torch's random state back as they were: a look at the network must not change what is trained."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    modes = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(devices={p.device for p in module.parameters() if p.device.type == "cuda"}):
        try:
            yield
        finally:
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])
            for part, training in modes.items():
                part.training = training


@contextmanager
def gathering_statistics(module: nn.Module) -> Iterator[bool]:
    """Within it, batch normalisation forgets its running statistics and takes the mean over the batches that pass; after it, evaluation
    mode uses them. Yields whether there is any batch normalisation.

    Running statistics of a training lag behind and mix all kinds of views; those of an untrained net are empty. Source: "precise" batch
    normalisation, Wu and Johnson 2021 (arXiv 2105.07576), section 3.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    try:
        yield bool(norms)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.eval()
