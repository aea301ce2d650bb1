"""Files of tensors by name: safetensors, read only if what they declare fills them exactly, and written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from volssl.files import BadInput, atomic

LARGEST_HEADER = 2**26  # bytes: names, types and shapes of the tensors; a network's are some hundred kilobytes
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def save_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name as a safetensors file, atomically."""
    # By way of memory: the plain write answers a full disk with the system's own word.
    packed = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    with atomic(path) as temporary:
        temporary.write_bytes(packed)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file whose declared tensors fill it exactly. Raises: BadInput: if it is none."""
    if fault := _size_fault(path):
        raise BadInput(f"{path}: must be a whole safetensors file; {fault}; export it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: must be a safetensors file; {error}") from None


def _size_fault(path: Path) -> str | None:
    # Looked at before any memory is taken: the header's length, and the bytes that its shapes and types ask for.
    size = path.stat().st_size
    with open(path, "rb") as stream:
        told = int.from_bytes(stream.read(8), "little")
        if size < 8 or told > min(LARGEST_HEADER, size - 8):
            return f"found a header of {told} bytes told in a file of {size}"
        try:
            header = json.loads(stream.read(told))
            tensors = [about for name, about in header.items() if name != "__metadata__"]
            needed = sum(BYTES[about["dtype"]] * math.prod(map(_side, about["shape"])) for about in tensors)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "found a header that does not tell types and shapes of tensors"
    there = size - 8 - told
    return None if needed == there else f"its header asks for {needed} bytes of tensors; found {there}"


def _side(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value
