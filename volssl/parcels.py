"""An object with all its tensors in one piece of memory: how views travel from a worker to the training process.

Between processes torch passes every tensor as an open file of its own; views hold dozens, and a few batches ahead that would reach the
limit of open files. A parcel is one, and reaches a GPU in one transfer.
"""

from __future__ import annotations

import io
import pickle
import weakref
from ctypes import c_bool
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, that of torch's own allocations: some products depend on it in their last bit
PIECES = 8  # of memory that a worker uses again and again; further parcels, of whoever keeps many, get fresh memory


@dataclass(frozen=True)
class Parcel:
    """A packed object.

    Attributes: frame: its pickle, with places instead of tensors. content: the tensors' bytes, uint8. piece: number of the shelf's piece
        that `content` is, until `Shelf.received` has it; None: of none.
    """

    frame: bytes
    content: Tensor
    piece: int | None = None

    def pin_memory(self) -> Parcel:
        """Copy in page-locked memory, for CUDA."""
        return replace(self, content=self.content.pin_memory())


class _Watched(np.ndarray):
    # An array that can be watched for its end.
    pass


class Shelf:
    """Shared memory that the workers of a loader use again and again: for fresh memory the kernel takes longer than the copy into it.

    A piece is written anew when the training process holds no tensor in it any more. Args: workers: how many there will be.
    """

    def __init__(self, workers: int) -> None:
        # Set by the worker that owns a piece, cleared by the training process.
        self._taken = RawArray(c_bool, PIECES * workers)
        self._pieces: dict[int, Tensor] = {}  # this process's, by number

    def piece(self, size: int) -> tuple[Tensor, int | None]:
        """In a worker: `size` bytes that nobody uses and the number of their piece, or None where all pieces are in use."""
        worker = torch.utils.data.get_worker_info()
        assert worker is not None, "pieces are taken by workers"
        own = range(PIECES * worker.id, PIECES * (worker.id + 1))
        number = next((number for number in own if not self._taken[number]), None)
        if number is None:
            return _shared(size), None
        if number not in self._pieces or self._pieces[number].numel() < size:
            self._pieces[number] = _shared(size)
        self._taken[number] = True
        return self._pieces[number][:size], number

    def received(self, parcel: Parcel) -> Parcel:
        """In the training process: the parcel, whose piece is free again when the last tensor in it is gone."""
        number = parcel.piece
        if number is None:
            return parcel
        if parcel.content.is_pinned():  # a copy
            self._free(number)
            return replace(parcel, piece=None)
        self._pieces[number] = parcel.content  # keeps it mapped
        # Views of a tensor share its storage, and only the storage's end is that of all of them; it holds the array it was made from.
        watched = parcel.content.numpy().view(_Watched)
        weakref.finalize(watched, self._free, number).atexit = False
        return replace(parcel, content=torch.from_numpy(watched), piece=None)

    def _free(self, number: int) -> None:
        self._taken[number] = False


def _shared(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8).share_memory_()


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


def pack(value: Any, shelf: Shelf | None = None) -> Parcel:
    """Copy `value`, a dataclass of tensors (or lists, dictionaries, numbers, text around them; on the CPU), into shared memory.

    Args: shelf: whose memory to use, in a worker.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    content, piece = shelf.piece(packer.size) if shelf is not None else (_shared(packer.size), None)
    for tensor, (start, dtype, shape, strides) in zip(packer.tensors, packer.places.values(), strict=True):
        _tensor_at(content, start, dtype, shape, strides).copy_(tensor)
    return Parcel(file.getvalue(), content, piece)


def unpack(parcel: Parcel, device: torch.device) -> Any:
    """The object again, its tensors lying in the parcel's memory. On another device lie then the volumes, tensors of at least 4 axes;
    the numbers stay on the CPU, where they were drawn."""
    return _Unpacker(parcel, device).load()
