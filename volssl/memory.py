"""How much memory a training step takes, by arithmetic: what the backward pass keeps, the weights and what the optimiser keeps of them.

An estimate, not a measurement: work space of the convolution library, fragmentation and the framework's own share are not in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from volssl.fitting import loss_terms
from volssl.segment import Plan

WEIGHT_BYTES = 4 + 4 + 8 + 4  # per weight: itself, its gradient, two moments of AdamW, the running mean


def training_gb(plan: Plan, *, batch_size: int, half: bool) -> float:
    """GB (1e9 bytes) of a fine-tuning step: the tensors that autograd saves for the backward pass, found by a step on the meta device
    (shapes without values), the largest one twice more for its gradient, and the weights with what the optimiser keeps.

    Args: half: activations of two bytes, as under autocast to bf16 or fp16, else four; losses are taken in float32.
    """
    kind = torch.bfloat16 if half else torch.float32
    with torch.device("meta"):
        net = plan.network().to(kind).train()
        x_BCXYZ = torch.zeros(batch_size, len(plan.channels), *plan.patch_vox, dtype=kind)
        y_B1XYZ = torch.zeros(batch_size, 1, *plan.patch_vox, dtype=torch.long)
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    saved: dict[int, Any] = {}  # the storages themselves, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = net(x_BCXYZ)
        scales = outputs if isinstance(outputs, list) else [outputs]
        kept = [loss_terms(plan, logits.float(), _at(y_B1XYZ, logits)) for logits in scales]
    sizes = [storage.nbytes() for storage in saved.values()]
    count = sum(parameter.numel() for parameter in net.parameters())
    assert kept
    return (sum(sizes) + 2 * max(sizes) + count * (WEIGHT_BYTES + (2 if half else 0))) / 1e9


def _at(y_B1XYZ: Tensor, logits_BKXYZ: Tensor) -> Tensor:
    return y_B1XYZ.new_zeros(len(y_B1XYZ), 1, *logits_BKXYZ.shape[2:])
