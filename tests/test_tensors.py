import json

import pytest
import torch

from volssl.files import BadInput
from volssl.tensors import load_tensors, save_tensors


def test_what_is_written_is_read_to_the_bit(tmp_path):
    given = {"a": torch.randn(3, 2).t(), "b": torch.arange(4).to(torch.uint8), "c": torch.randn(2).to(torch.bfloat16)}
    save_tensors(tmp_path / "w.safetensors", given)
    found = load_tensors(tmp_path / "w.safetensors")
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def safetensors_of(header, data=b""):
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "header of 0 bytes told in a file of 0"),
        ((2**62).to_bytes(8, "little") + b"{}", "found a header of"),
        (safetensors_of({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}), "asks for"),
        (safetensors_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)), "asks for 16 bytes of tensors; found 8"),
        (safetensors_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)), "asks for 4 bytes of tensors; found 9"),
        (safetensors_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "does not tell types and shapes"),
        (safetensors_of({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "does not tell types and shapes"),
        (safetensors_of(b"[" * 300_000), "does not tell types and shapes"),
        (safetensors_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(4)), "must be a safetensors file"),
    ],
)
def test_a_hostile_weights_file_is_refused_before_it_takes_memory(tmp_path, content, told):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=told):
        load_tensors(path)
