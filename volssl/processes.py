"""Several processes that train as one: sums over them, gradients averaged, batch normalisation over all their samples.

The processes are started by `torchrun` or SLURM; a single process does nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def mean(value: float, device: torch.device) -> float:
    """Mean of a number over the processes; every process must call it."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / count()


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, one under another in their order; every process must call it with as many rows."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_of(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Means of numbers by name over the processes, in one exchange; every process must call it with the same names."""
    if count() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / count()).tolist(), strict=True))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; those that took no part are the same ones everywhere."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= count()
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation of (B, C) whose statistics, in training, are those of the samples of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return _over_all(input, self) if self.training and count() > 1 else super().forward(input)


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation of (B, C, X, Y, Z) whose statistics, in training, are those of the samples of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        return _over_all(input, self) if self.training and count() > 1 else super().forward(input)


def _over_all(x: Tensor, norm: BatchNorm1d | BatchNorm3d) -> Tensor:
    # torch's SyncBatchNorm exists for CUDA alone; this also runs under gloo. Every process has as many samples.
    axes, shape = [0, *range(2, x.ndim)], (1, -1, *(1,) * (x.ndim - 2))
    values = x.float()
    number = values.numel() // values.shape[1] * count()
    mean_C = all_reduce(values.sum(axes)) / number
    centred = values - mean_C.view(shape)
    variance_C = all_reduce(centred.square().sum(axes)) / number
    _remember(norm, mean_C.detach(), variance_C.detach() * number / max(number - 1, 1))
    scale_C = norm.weight * torch.rsqrt(variance_C + norm.eps)
    return (centred * scale_C.view(shape) + norm.bias.view(shape)).to(x.dtype)


@torch.no_grad()
def _remember(norm: BatchNorm1d | BatchNorm3d, mean_C: Tensor, variance_C: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean_C.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance_C.to(norm.running_var.dtype), share)
