"""The contract of a transform: draw the numbers, then apply them; spatial ones also undo them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from volssl.draws import Draws


class AbstractTransform(ABC):
    """A random change of a batch. `apply` is pure: the same batch and parameters give the same result, and its input is not changed."""

    @abstractmethod
    def sample(self, draws: Draws) -> Any:
        """Draw the numbers of a batch of `draws.batch_size` samples."""

    @abstractmethod
    def apply(self, x_BCXYZ: Tensor, params: Any) -> Tensor:
        """Apply them to (B, C, X, Y, Z)."""
