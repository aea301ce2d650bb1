"""Parcels: what is unpacked is what was packed, in one piece of shared memory, which is used again when nobody needs it."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from volssl.parcels import ALIGNMENT, PIECES, Parcel, Shelf, pack, unpack

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    seen: Tensor
    target: Tensor


@dataclass(frozen=True)
class Example:
    pair: Pair
    sizes: tuple[Tensor, ...]
    named: dict[str, Tensor]
    scale: int
    none: Tensor | None = None


def example() -> Example:
    source = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 3, 4, 5, 6, generator=source)
    wide = torch.randn(2, 3, 4, 5, 6, generator=source).to(memory_format=torch.channels_last_3d)
    return Example(
        Pair(volume, volume),
        (torch.arange(3), torch.tensor(2.5, dtype=torch.float64), torch.empty(0, 7)),
        {"wide": wide, "repeated": torch.tensor([True, False]).expand(3, 2), "half": volume.bfloat16(), "window": volume[:, :, 1:3]},
        7,
    )


def tensors(value: Example) -> list[Tensor]:
    return [value.pair.seen, value.pair.target, *value.sizes, *value.named.values()]


def test_what_is_unpacked_is_what_was_packed():
    before = example()
    after = unpack(pack(before), CPU)
    assert (after.scale, after.none, list(after.named)) == (7, None, list(before.named))
    for one, other in zip(tensors(before), tensors(after), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert after.named["wide"].is_contiguous(memory_format=torch.channels_last_3d)


def test_all_lies_in_one_aligned_piece_of_shared_memory_and_nothing_twice():
    parcel = pack(example())
    assert parcel.content.is_shared()
    after = unpack(parcel, CPU)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(after) if tensor.numel()}
    assert storages == {parcel.content.untyped_storage().data_ptr()}
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors(after) if tensor.numel())
    assert after.pair.seen.data_ptr() == after.pair.target.data_ptr()
    used = sum(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors(after)[1:])
    assert parcel.content.numel() == used
    # What goes through a queue is small: the voxels stay where they are.
    assert len(ForkingPickler.dumps(parcel)) < 2000


def test_a_change_of_the_original_does_not_reach_the_parcel():
    before = example()
    parcel = pack(before)
    first = before.pair.seen.clone()
    before.pair.seen.zero_()
    assert torch.equal(unpack(parcel, CPU).pair.seen, first)


def test_volumes_go_to_the_device_and_numbers_stay():
    after = unpack(pack(example()), torch.device("meta"))
    assert {tensor.device.type for tensor in (after.pair.seen, after.named["wide"], after.named["half"])} == {"meta"}
    assert {tensor.device.type for tensor in (*after.sizes, after.named["repeated"])} == {"cpu"}


def test_without_tensors_and_with_what_cannot_be_packed():
    assert unpack(pack({"a": [1, "b"]}), CPU) == {"a": [1, "b"]}
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack(lambda: 0)


class Counted(Dataset[Parcel]):
    """Item i holds i everywhere; the later ones are larger."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Parcel:
        return pack({"volume": torch.full((1, 1, 8, 8, 8 + index // 30), float(index))}, self.shelf)


def received(workers: int) -> Iterator[tuple[int | None, Parcel]]:
    """The number of its piece and the parcel, in order."""
    shelf = Shelf(workers)
    answers: Any = DataLoader(Counted(shelf), batch_size=None, num_workers=workers, collate_fn=lambda parcel: parcel)
    return ((parcel.piece, shelf.received(parcel)) for parcel in answers)


def test_memory_is_used_again_when_its_last_tensor_is_gone_and_not_before():
    pieces, kept = [], []
    for index, (piece, parcel) in enumerate(received(2)):
        volume = unpack(parcel, CPU)["volume"]
        assert bool((volume == index).all())
        pieces.append(piece)
        if index in (10, 21, 40):
            kept.append((index, piece, volume[0, 0, 1]))  # a view alone keeps the memory
        del parcel, volume
    assert None not in pieces and len(set(pieces)) <= 14 and pieces.count(pieces[-1]) > 3
    for index, piece, part in kept:
        assert bool((part == index).all()) and piece not in pieces[index + 1 :]


def test_whoever_keeps_all_parcels_gets_fresh_memory():
    pieces, parcels = zip(*received(1), strict=True)
    assert pieces.count(None) == 60 - PIECES
    volumes = [unpack(parcel, CPU)["volume"] for parcel in parcels]
    assert all(bool((volume == index).all()) for index, volume in enumerate(volumes))


def test_what_a_backward_pass_needs_is_not_written_over():
    weight, sums = torch.ones((), requires_grad=True), []
    for _, parcel in received(1):
        sums.append((unpack(parcel, CPU)["volume"] * weight).mean())
        del parcel
    torch.stack(sums).sum().backward()
    assert weight.grad is not None and float(weight.grad) == pytest.approx(sum(range(60)))


def test_a_copy_in_other_memory_frees_the_piece_at_once(monkeypatch):
    shelf = Shelf(1)
    shelf._taken[3] = True
    parcel = Parcel(b"", torch.zeros(4, dtype=torch.uint8), piece=3)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
    assert shelf.received(parcel).piece is None and not shelf._taken[3]
    assert shelf.received(Parcel(b"", parcel.content)).content is parcel.content
