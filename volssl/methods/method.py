"""The contract of a self-supervised method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from volssl.draws import Draws

Turn = tuple[str, dict[str, Tensor]]


class AbstractMethod(nn.Module, ABC):
    """Views of a batch, and the turns in which the parties (generator, critic, ...) learn from them.

    `pretrain` calls, per step: `views`, then for every turn of `turns` backward and a step of that party's optimiser, then `after_step`.
    The generator `turns` goes on only after that party's step, so a method's order of play is read in its own file.
    """

    citation: ClassVar[str]
    normalisation: ClassVar[str]  # what happens to a [0, 1] patch before the encoder, for the bundle's card
    encoder: nn.Module
    net: Any  # the backbone: a module with encoder, decoder, stride and arguments

    @abstractmethod
    def check(self, box_vox: tuple[int, int, int], batch_size: int) -> None:
        """Raise BadInput before step 0 if a batch of `batch_size` parent boxes of `box_vox` voxels cannot be trained on."""

    @abstractmethod
    def views(self, x_BCXYZ: Tensor, draws: Draws, *, spacing_mm: tuple[float, float, float]) -> Any:
        """Make a step's views from parent boxes on the [0, 1] scale: a frozen dataclass that also holds the numbers drawn for it."""

    @abstractmethod
    def turns(self, views: Any, progress: float) -> Iterator[Turn]:
        """Yield (party, weighted losses by name) for each optimiser step; `progress` in [0, 1]."""

    @abstractmethod
    def pictures(self, views: Any) -> Mapping[str, Tensor]:
        """Columns to look at, (B, X, Y, Z) each on the [0, 1] scale: what was seen, the target, what was restored."""

    def parties(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by party; each gets an optimiser of its own."""
        return {"all": list(self.parameters())}

    def compile_views(self) -> None:
        """Compile what of the views pays for it; nothing unless a method says so."""

    def after_step(self, progress: float) -> None:
        """What happens after a step, such as a moving average."""


def middle(x_BCXYZ: Tensor) -> Tensor:
    """First channel of a batch as float32 on the CPU, for pictures."""
    return x_BCXYZ[:, 0].detach().to("cpu", torch.float32)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put the buffers back as they were: a look at the network in training mode must not move its running statistics."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name])
