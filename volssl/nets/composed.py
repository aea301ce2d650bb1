"""An up-step (transposed convolution 2x2x2, stride 2) and the 3x3x3 convolution behind it as one linear map.

Along one axis, sub-voxel s of coarse voxel i is fine voxel 2i + s, and tap t of the convolution carries it to fine voxel 2i + s + 1 - t.
So both together are a transposed convolution of 4 taps u = s + 2 - t, stride 2, padding 1: polynomials of degree 1 and 2 multiplied.
Per fine voxel that is 2 taps an axis, 8 instead of 27, and the up-sampled tensor never exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The product of two such polynomials from their values at 0, 1, -1 and infinity (Toom-Cook): 4 products an axis instead of 6, 64 instead
# of 216 in three. The numbers are exact in binary, so float32 loses next to nothing.
_VALUES_OF_2 = ((1.0, 0.0), (1.0, 1.0), (1.0, -1.0), (0.0, 1.0))
_VALUES_OF_3 = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (0.0, 0.0, 1.0))
_COEFFICIENTS = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.5, -0.5, -1.0), (-1.0, 0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 1.0))


def too_short(x_BCXYZ: Tensor, extent_vox: Sequence[int]) -> bool:
    """Whether a convolution must not be left to pad its input: training on a CPU, and any side is shorter than the kernel's extent.

    The bf16 gradient of the weights (seen with torch 2.13) then reads memory that nobody wrote, and writes beyond its own, as in the
    deepest maps of small crops. Padded by hand, where no side is shorter any more, it does not.
    """
    if x_BCXYZ.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return any(side < extent for side, extent in zip(x_BCXYZ.shape[2:], extent_vox, strict=True))


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave every tensor in its own type."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else nullcontext()


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has no autocast


def composing_pays(coarse_BAXYZ: Tensor, out_channels: int) -> bool:
    """Whether composing the kernel (once a call) costs less than it saves (for every voxel), in multiply-accumulates."""
    a, b = coarse_BAXYZ.shape[1], out_channels
    voxels = coarse_BAXYZ.shape[0] * coarse_BAXYZ[0, 0].numel()
    return voxels * (8 * a + 152 * b) > 64 * a * b


@contextmanager
def shared_kernels() -> Iterator[None]:
    """Within it the forward passes of one loss compose the kernel of an up-step once, instead of once a pass.

    It may hold several passes but no backward pass, which frees what the passes share. A kernel of weights that were changed since, or
    of another precision, is composed anew. Where a compiler traces the passes, nothing is shared.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


_SHARED: ContextVar[dict[Any, tuple[Tensor, Tensor | None]] | None] = ContextVar("kernels of this loss", default=None)


def is_composed(up: nn.ConvTranspose3d, weight_OMxyz: Tensor) -> bool:
    """Whether the kernel is there already, so that it costs nothing."""
    shared = _shared()
    return shared is not None and ("weight", *_key(up, weight_OMxyz)) in shared


def composed_up_conv(coarse_BAXYZ: Tensor, up: nn.ConvTranspose3d, weight_OMxyz: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`conv3d(up(x), weight, bias, padding=1)` as one transposed convolution; (B, A, X, Y, Z) -> (B, O, 2X, 2Y, 2Z).

    The bias of the up-step reaches the output through the zero padding, less at the border: the same map of a constant input.
    """
    y = _apply(coarse_BAXYZ, _kernel(up, "weight", weight_OMxyz))
    if up.bias is not None:
        ones = coarse_BAXYZ.new_ones(1, 1, *coarse_BAXYZ.shape[2:])
        constant = _apply(ones, _kernel(up, "bias", weight_OMxyz))
        y += constant if bias_O is None else constant + bias_O.to(constant.dtype).view(1, -1, 1, 1, 1)
    elif bias_O is not None:
        y += bias_O.to(y.dtype).view(1, -1, 1, 1, 1)
    return y


def _kernel(up: nn.ConvTranspose3d, part: str, weight_OMxyz: Tensor) -> Tensor:
    """Of the up-step's weights, or of its bias as a map of a constant."""
    shared, key = _shared(), (part, *_key(up, weight_OMxyz))
    if shared is None or key not in shared:
        of_up = up.weight
        if part == "bias":
            assert up.bias is not None
            of_up = up.bias.view(1, -1, 1, 1, 1).expand(-1, -1, 2, 2, 2)
        kernel = _compose(of_up, weight_OMxyz)
        if shared is None:
            return kernel
        kind = of_up.device.type
        rounded = kernel.detach().to(torch.get_autocast_dtype(kind)) if _autocasts(kind) else None
        shared[key] = kernel, rounded
    kernel, rounded = shared[key]
    if rounded is None:
        return kernel
    used = _Rounded.apply(kernel, rounded)
    assert isinstance(used, Tensor)
    return used


def _shared() -> dict[Any, tuple[Tensor, Tensor | None]] | None:
    return None if torch.compiler.is_compiling() else _SHARED.get()


def _key(up: nn.ConvTranspose3d, weight_OMxyz: Tensor) -> tuple[Any, ...]:
    if torch.compiler.is_compiling():
        return ()
    kind = up.weight.device.type
    precision = torch.get_autocast_dtype(kind) if _autocasts(kind) else up.weight.dtype
    versions = [tensor._version for tensor in (up.weight, weight_OMxyz, up.bias) if tensor is not None]
    return id(up), id(up.weight), *versions, precision, torch.is_grad_enabled()


class _Rounded(torch.autograd.Function):
    # A kernel as autocast would round it, in one piece of memory for all passes; their gradients are added in the kernel's own precision.

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = kernel.dtype
        return rounded.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def _apply(x_BAXYZ: Tensor, kernel_AOxyz: Tensor) -> Tensor:
    if too_short(x_BAXYZ, (2, 2, 2)):  # the other way round it is a convolution of 4 taps, over an output that is twice as long
        return F.conv_transpose3d(x_BAXYZ, kernel_AOxyz, stride=2)[:, :, 1:-1, 1:-1, 1:-1]
    return F.conv_transpose3d(x_BAXYZ, kernel_AOxyz, stride=2, padding=1)


def _compose(up_AMxyz: Tensor, weight_OMxyz: Tensor) -> Tensor:
    """The kernel (A, O, 4, 4, 4) of the composed map; in float32 also under autocast, as its rounding would add to the weights'."""
    with no_autocast(up_AMxyz.device):
        if up_AMxyz.dtype in (torch.bfloat16, torch.float16):
            up_AMxyz, weight_OMxyz = up_AMxyz.float(), weight_OMxyz.float()
        kernel = _Compose.apply(up_AMxyz, weight_OMxyz)
    assert isinstance(kernel, Tensor)
    return kernel


class _Compose(torch.autograd.Function):
    # By hand, since autograd would keep the 64 values of both kernels, many times the weights, until the backward pass.

    @staticmethod
    def forward(ctx: Any, up_AMxyz: Tensor, weight_OMxyz: Tensor) -> Tensor:
        ctx.save_for_backward(up_AMxyz, weight_OMxyz)
        products = _values(up_AMxyz, _VALUES_OF_2) @ _values(weight_OMxyz.flip(2, 3, 4), _VALUES_OF_3).mT
        return _along_axes(products, _COEFFICIENTS)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        up_AMxyz, weight_OMxyz = ctx.saved_tensors
        of_products = _values(gradients[0], tuple(zip(*_COEFFICIENTS, strict=True)))
        of_up = of_products @ _values(weight_OMxyz.flip(2, 3, 4), _VALUES_OF_3)
        of_weight = of_products.mT @ _values(up_AMxyz, _VALUES_OF_2)
        transposed = [tuple(zip(*matrix, strict=True)) for matrix in (_VALUES_OF_2, _VALUES_OF_3)]
        return _along_axes(of_up, transposed[0]), _along_axes(of_weight, transposed[1]).flip(2, 3, 4)


def _values(kernel_PQxyz: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    # (P, Q, n, n, n) -> (64, P, Q): `matrix` applied along each of the three axes.
    p, q, *_ = kernel_PQxyz.shape
    taps = kernel_PQxyz.flatten(2).movedim(2, 0).reshape(-1, p * q)
    return (_threefold(matrix, taps) @ taps).view(-1, p, q)


def _along_axes(values_VPQ: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    # (64, P, Q) -> (P, Q, n, n, n).
    _, p, q = values_VPQ.shape
    n = len(matrix)
    return (_threefold(matrix, values_VPQ) @ values_VPQ.flatten(1)).view(n, n, n, p, q).permute(3, 4, 0, 1, 2).contiguous()


def _threefold(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    one = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(torch.kron(one, one), one)
