"""Random numbers as a pure function of (seed, stream, step, sample): independent of workers, ranks and batch sizes, and so resumable."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """A counter-based generator (Philox) whose numbers depend on nothing but the arguments."""
    return np.random.Generator(np.random.Philox(key=_key(seed, stream, *counters)))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of SplitMix64


def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(seed: int, stream: str, *counters: int) -> int:
    text = "/".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """Numbers for the samples of one batch; sample b draws from (seed, stream, step, first_sample + b) alone.

    `first_sample` is the place of this batch in the global batch (rank times local batch size), so that two processes draw what
    one process with both batches would. The numbers lie on the CPU (few, and decided there), whole volumes of noise on the batch's device.
    Drawing from the same stream twice gives the same numbers: `fork` a stream per purpose.
    """

    seed: int
    step: int
    first_sample: int
    batch_size: int
    stream: str = ""

    def fork(self, name: str) -> Draws:
        """An independent stream named below this one."""
        return replace(self, stream=f"{self.stream}/{name}")

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers in [low, high): float32, (B, *shape)."""
        unit = (self._bits(*shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return torch.from_numpy((low + (high - low) * unit).astype(np.float32))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (Box-Muller): float32, (B, *shape). For whole volumes take `noise_like`."""
        radius = self.fork("radius").uniform(0.0, 1.0, *shape)
        angle = self.fork("angle").uniform(0.0, 2.0 * np.pi, *shape)
        return torch.sqrt(-2.0 * torch.log1p(-radius)) * torch.cos(angle)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high): int64, (B, *shape). The bias of the remainder is below 2**-32 for ranges under 2**32."""
        return torch.from_numpy((self._bits(*shape) % np.uint64(high - low)).astype(np.int64) + low)

    def bernoulli(self, probability: float, *shape: int) -> Tensor:
        """True with `probability`: bool, (B, *shape)."""
        return self.uniform(0.0, 1.0, *shape) < probability

    def _bits(self, *shape: int) -> np.ndarray:
        # SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: all samples in one vectorised call, where a generator
        # object per sample and purpose would cost 40 ms a step at batch 32.
        key = np.uint64(_key(self.seed, self.stream, self.step) & 0xFFFF_FFFF_FFFF_FFFF)
        samples = np.arange(self.first_sample, self.first_sample + self.batch_size, dtype=np.uint64)
        counters = np.arange(1, int(np.prod(shape, dtype=np.int64)) + 1, dtype=np.uint64)
        with np.errstate(over="ignore"):
            keys_B = _mix(key ^ _mix((samples + np.uint64(1)) * GOLDEN))
            return _mix(keys_B[:, None] + counters[None] * GOLDEN).reshape(self.batch_size, *shape)

    def noise_like(self, x_BCXYZ: Tensor) -> Tensor:
        """Standard normal noise of the shape of a batch, drawn on its device, each sample from its own generator.

        The numbers differ between CPU and CUDA (torch's generators do), but not between runs on one kind of device.
        """
        noise = torch.empty_like(x_BCXYZ)
        for b in range(self.batch_size):
            source = torch.Generator(x_BCXYZ.device)
            source.manual_seed(_key(self.seed, self.stream, self.step, self.first_sample + b) & 0x7FFF_FFFF_FFFF_FFFF)
            noise[b].normal_(generator=source)
        return noise
