"""An object with all its tensors in one piece of memory: how views travel from a worker to the training process.

Between processes torch passes every tensor as an open file of its own; views hold dozens, and a few batches ahead that would reach the
limit of open files. A parcel is one, and reaches a GPU in one transfer.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, that of torch's own allocations: some products depend on it in their last bit


@dataclass(frozen=True)
class Parcel:
    """A packed object. frame: its pickle, with places instead of tensors. content: the tensors' bytes, uint8."""

    frame: bytes
    content: Tensor

    def pin_memory(self) -> Parcel:
        """Copy in page-locked memory, for CUDA."""
        return Parcel(self.frame, self.content.pin_memory())


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.size = 0
        self.places: dict[int, tuple[Any, ...]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self.places:
            # Dense tensors keep their order in memory, others are made dense.
            strides = torch.empty_like(obj, device="meta").stride()
            self.places[id(obj)] = (self.size, obj.dtype, tuple(obj.shape), strides)
            self.tensors.append(obj)
            self.size += -(-obj.numel() * obj.element_size() // ALIGNMENT) * ALIGNMENT
        return self.places[id(obj)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, parcel: Parcel, device: torch.device) -> None:
        super().__init__(io.BytesIO(parcel.frame))
        self._near = parcel.content
        self._there = parcel.content.to(device, non_blocking=True)

    def persistent_load(self, pid: Any) -> Tensor:
        start, dtype, shape, strides = pid
        source = self._there if len(shape) >= 4 else self._near
        return _tensor_at(source, start, dtype, shape, strides)


def _tensor_at(content: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    stop = start + torch.Size(shape).numel() * dtype.itemsize
    return content[start:stop].view(dtype).as_strided(shape, strides)


def pack(value: Any) -> Parcel:
    """Copy `value`, a dataclass of tensors (or lists, dictionaries, numbers, text around them; on the CPU), into shared memory."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    content = torch.empty(packer.size, dtype=torch.uint8).share_memory_()
    for tensor, (start, dtype, shape, strides) in zip(packer.tensors, packer.places.values(), strict=True):
        _tensor_at(content, start, dtype, shape, strides).copy_(tensor)
    return Parcel(file.getvalue(), content)


def unpack(parcel: Parcel, device: torch.device) -> Any:
    """The object again, its tensors lying in the parcel's memory. On another device lie then the volumes, tensors of at least 4 axes;
    the numbers stay on the CPU, where they were drawn."""
    return _Unpacker(parcel, device).load()
