"""Changes of intensity: blur, noise, gamma, contrast and brightness, lowered resolution, z-scoring. Input scale [0, 1] unless stated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from volssl.augment.transform import AbstractTransform
from volssl.draws import Draws

FEW_TAPS = 4  # reach in voxels up to which a sum of taps is faster than products: by a factor of 2 at 4, 3 at 2


def gaussian_blur(x_BCXYZ: Tensor, sigma_B3: Tensor) -> Tensor:
    """Gaussian blur with own sigma (voxels) per sample and axis, edges repeated; sigma 0 leaves the axis as it is.

    Small matrix products along each axis: exact for any sigma, and batched where a convolution would need a kernel per sample. The
    matrices are banded, so a block of rows reads only the columns near it. On a CPU a small sigma is cheaper summed up tap by tap.
    """
    sigma_B3 = sigma_B3.to("cpu", torch.float32)
    (channels, *sides), y = x_BCXYZ.shape[1:], x_BCXYZ if x_BCXYZ.dtype == torch.float64 else x_BCXYZ.float()
    # Y comes first since its product takes a window of a larger array as it is, without a copy.
    for axis in (1, 0, 2):
        sigma_B = sigma_B3[:, axis]
        if not bool((sigma_B > 0).any()):
            continue
        if _reach(sigma_B) <= FEW_TAPS and y.device.type == "cpu":
            blurred = [_by_taps(y[b : b + 1], sigma_B[b : b + 1], 2 + axis) for b in range(len(y))]
            y = blurred[0] if len(blurred) == 1 else torch.cat(blurred)
            continue
        weights = _blur_matrix(sigma_B, sides[axis]).to(x_BCXYZ.device, y.dtype, non_blocking=True)
        if axis == 1:
            y = _banded(weights.repeat_interleave(channels * sides[0], 0), y.flatten(0, 2), 1, _reach(sigma_B))
        elif axis == 0:
            y = _banded(weights.repeat_interleave(channels, 0), y.reshape(-1, sides[0], sides[1] * sides[2]), 1, _reach(sigma_B))
        else:
            y = _banded(weights, y.reshape(len(sigma_B), -1, sides[2]), 2, _reach(sigma_B))
        y = y.view(x_BCXYZ.shape)
    return y.to(x_BCXYZ.dtype)


def _by_taps(y_BCXYZ: Tensor, sigma_1: Tensor, axis: int) -> Tensor:
    # A sum of shifted copies: each goes over the voxels once, in order, which the products of tall matrices with small ones do not.
    if float(sigma_1) == 0:
        return y_BCXYZ
    weights = _weights(sigma_1)[0].tolist()
    side, reach = y_BCXYZ.shape[axis], len(weights) // 2
    total = y_BCXYZ * weights[reach]
    for shift in (one for j in range(1, reach + 1) for one in (j, -j)):
        share, far = weights[reach + shift], min(abs(shift), side)
        first, last = (0, side - far) if shift > 0 else (far, 0)  # where the copy begins, and where the edge voxel is repeated
        total.narrow(axis, first, side - far).add_(y_BCXYZ.narrow(axis, far - first, side - far), alpha=share)
        total.narrow(axis, last, far).add_(y_BCXYZ.narrow(axis, side - 1 if shift > 0 else 0, 1), alpha=share)
    return total


def _banded(weights_Bnn: Tensor, y_Bnn: Tensor, axis: int, reach: int) -> Tensor:
    """weights @ y (axis 1) or y @ weights.T (axis 2), where the weights are 0 further than `reach` off the diagonal."""
    side = weights_Bnn.shape[1]
    block = 16 if reach <= 4 else 32
    if side <= 2 * block or y_Bnn.device.type != "cpu":
        return weights_Bnn @ y_Bnn if axis == 1 else y_Bnn @ weights_Bnn.mT
    result = y_Bnn.new_empty(y_Bnn.shape)
    for first in range(0, side, block):
        rows, near = slice(first, first + block), slice(max(first - reach, 0), first + block + reach)
        if axis == 1:
            result[:, rows] = weights_Bnn[:, rows, near] @ y_Bnn[:, near]
        else:
            result[:, :, rows] = y_Bnn[:, :, near] @ weights_Bnn[:, rows, near].mT
    return result


def _reach(sigma_B: Tensor) -> int:
    return max(1, int(4 * float(sigma_B.max()) + 0.5))


def _weights(sigma_B: Tensor) -> Tensor:
    # The Gaussian about a voxel, (B, 2 reach + 1), cut at 4 sigma as scipy does.
    reach = _reach(sigma_B)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma_B[:, None].clamp(min=1e-3)) ** 2)
    weights = torch.where(offsets.abs() <= (4 * sigma_B[:, None] + 0.5).floor(), weights, 0.0)
    return weights / weights.sum(1, keepdim=True)


def _blur_matrix(sigma_B: Tensor, side: int) -> Tensor:
    # Row i holds the weights about voxel i; what falls outside goes to the edge voxel.
    weights, reach = _weights(sigma_B), _reach(sigma_B)
    source = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)).clamp(0, side - 1)
    matrix = torch.zeros(len(sigma_B), side, side)
    return matrix.scatter_add_(2, source.expand(len(sigma_B), -1, -1), weights[:, None].expand(-1, side, -1).contiguous())


@dataclass(frozen=True)
class Blur(AbstractTransform):
    """Gaussian blur, sigma U(0, sigma_max) voxels per axis, applied to a share of the samples."""

    sigma_max: float = 2.0
    share: float = 1.0

    def sample(self, draws: Draws) -> Tensor:
        """sigma (B, 3)."""
        chosen = draws.fork("chosen").bernoulli(self.share, 1)
        return draws.fork("sigma").uniform(0, self.sigma_max, 3) * chosen

    def apply(self, x_BCXYZ: Tensor, params: Tensor) -> Tensor:
        """Blurred copy."""
        return gaussian_blur(x_BCXYZ, params)


@dataclass(frozen=True)
class Noise(AbstractTransform):
    """Additive Gaussian noise of standard deviation U(0, sd_max), applied to a share of the samples."""

    sd_max: float = 0.25
    share: float = 1.0

    def sample(self, draws: Draws) -> tuple[Tensor, Draws]:
        """Standard deviations (B,) and the stream of the noise itself."""
        chosen = draws.fork("chosen").bernoulli(self.share)
        return draws.fork("sd").uniform(0, self.sd_max) * chosen, draws.fork("noise")

    def apply(self, x_BCXYZ: Tensor, params: tuple[Tensor, Draws]) -> Tensor:
        """Noisy copy."""
        sd_B, stream = params
        return torch.addcmul(x_BCXYZ, stream.noise_like(x_BCXYZ), sd_B.to(x_BCXYZ.device, x_BCXYZ.dtype).view(-1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Gamma(AbstractTransform):
    """sign(v) |v|**g with log g = U(-log_max, log_max); with `rescale`, on each sample's own range (for z-scored input)."""

    log_max: float = 0.3
    share: float = 1.0
    rescale: bool = False

    def sample(self, draws: Draws) -> Tensor:
        """Exponents (B,)."""
        chosen = draws.fork("chosen").bernoulli(self.share)
        return torch.exp(draws.fork("log").uniform(-self.log_max, self.log_max) * chosen)

    def apply(self, x_BCXYZ: Tensor, params: Tensor) -> Tensor:
        """Copy with changed gamma."""
        exponent = params.to(x_BCXYZ.device, x_BCXYZ.dtype).view(-1, 1, 1, 1, 1)
        if not self.rescale:
            return x_BCXYZ.sign() * x_BCXYZ.abs().clamp(min=1e-12) ** exponent
        low, high = x_BCXYZ.amin((2, 3, 4), keepdim=True), x_BCXYZ.amax((2, 3, 4), keepdim=True)
        span = (high - low).clamp(min=1e-6)
        return ((x_BCXYZ - low) / span) ** exponent * span + low


@dataclass(frozen=True)
class Contrast(AbstractTransform):
    """Scaling about the sample's mean by U(1 - contrast, 1 + contrast) and a shift by U(-brightness, brightness), per channel."""

    contrast: float = 0.25
    brightness: float = 0.1
    share: float = 1.0
    channels: int = 1

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Factors and shifts (B, channels)."""
        chosen = draws.fork("chosen").bernoulli(self.share, 1)
        factor = 1 + draws.fork("contrast").uniform(-self.contrast, self.contrast, self.channels) * chosen
        return factor, draws.fork("brightness").uniform(-self.brightness, self.brightness, self.channels) * chosen

    def apply(self, x_BCXYZ: Tensor, params: tuple[Tensor, Tensor]) -> Tensor:
        """Copy with changed contrast."""
        factor, shift = (p.to(x_BCXYZ.device, x_BCXYZ.dtype)[:, :, None, None, None] for p in params)
        mean = x_BCXYZ.mean((2, 3, 4), keepdim=True)
        return (x_BCXYZ - mean) * factor + mean + shift


def zscore(x_BCXYZ: Tensor) -> Tensor:
    """Each sample and channel with its own mean and standard deviation; a constant one becomes 0 instead of failing."""
    shape = x_BCXYZ.shape
    return F.layer_norm(x_BCXYZ.flatten(2), (x_BCXYZ[0, 0].numel(),), eps=1e-8).view(shape)
