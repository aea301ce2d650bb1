"""Patches: the stream is a function of (seed, step, rank); workers and resuming do not change it; body is preferred."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from volssl.files import BadInput
from volssl.parcels import unpack
from volssl.patches import PatchPlan, PatchStream, Source, deaths_told, loader, to_unit


@dataclass(frozen=True)
class Row:
    scan_id: str
    patient_id: str
    split: str
    shape_vox: tuple[int, int, int]


class MemoryStore:
    """A store in memory: scan S<n> holds at every voxel its own number, so a box tells where it came from."""

    window = (-1000.0, 1000.0)

    def __init__(self, shapes, body=None):
        self.rows = [Row(f"S{i}", f"P{i}", "val" if i == 0 else "train", shape) for i, shape in enumerate(shapes)]
        self.body = body

    def read_box(self, scan_id, start, size):
        shape = self.rows[int(scan_id[1:])].shape_vox
        whole = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) % 2000 - 1000
        if self.body is not None:
            whole = np.where(np.arange(shape[2]) < self.body, 50, -1000) * np.ones(shape, dtype=np.int64)
        box = np.full(size, -1000, dtype=np.int16)
        inside = tuple(slice(max(s, 0), min(s + n, e)) for s, n, e in zip(start, size, shape, strict=True))
        to = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
        box[to] = whole[inside]
        return box[None]


SHAPES = [(20, 20, 20), (24, 20, 16), (12, 30, 20)]
PLAN = PatchPlan(box_vox=(8, 8, 8), batch_size=3, workers=0)


def batches(workers=0, first=0, seed=0, rank=0, steps=6):
    plan = PatchPlan(box_vox=(8, 8, 8), batch_size=3, workers=workers)
    stream = PatchStream(MemoryStore(SHAPES), plan, source=Source(seed=seed, rank=rank), steps=steps)
    return [(b.boxes_BCXYZ, b.scan_ids, b.corners_B3.tolist()) for b in loader(stream, first_step=first)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(one, other, strict=True))


def test_workers_and_resuming_do_not_change_the_stream():
    whole = batches()
    assert same(whole, batches(workers=2))
    assert same(whole[4:], batches(first=4, workers=1))
    assert not same(whole, batches(seed=1))
    assert not same(whole, batches(rank=1))


def test_two_ranks_draw_what_one_process_with_both_batches_draws():
    store = MemoryStore(SHAPES)
    both = PatchStream(store, PatchPlan(box_vox=(8, 8, 8), batch_size=6, workers=0), source=Source(), steps=1)[0]
    ranks = [PatchStream(store, PLAN, source=Source(rank=rank), steps=1)[0] for rank in (0, 1)]
    assert torch.equal(both.boxes_BCXYZ, torch.cat([r.boxes_BCXYZ for r in ranks]))


def test_corners_say_where_the_box_came_from_and_only_the_split_is_read():
    store = MemoryStore(SHAPES)
    for boxes, scans, corners in batches():
        assert boxes.dtype == torch.int16 and boxes.shape == (3, 1, 8, 8, 8)
        for box, scan, corner in zip(boxes, scans, corners, strict=True):
            assert scan != "S0"
            assert np.array_equal(box.numpy(), store.read_box(scan, corner, (8, 8, 8)))
            assert min(corner) >= 0


def test_a_narrow_scan_stands_in_the_middle():
    plan = PatchPlan(box_vox=(8, 8, 8), batch_size=1, workers=0)
    stream = PatchStream(MemoryStore([(9, 9, 9), (4, 9, 9)]), plan, source=Source(), steps=3)
    assert {stream[step].corners_B3[0, 0].item() for step in range(3)} == {-2}


def test_boxes_hold_body_and_an_empty_scan_does_not_hang():
    def mean_share(min_body, body):
        plan = PatchPlan(box_vox=(8, 8, 8), batch_size=8, workers=0, min_body=min_body, attempts=20)
        stream = PatchStream(MemoryStore([(9, 9, 9), (16, 16, 64)], body=body), plan, source=Source(), steps=4)
        return float(np.mean([(stream[s].boxes_BCXYZ > -800).float().mean() for s in range(4)]))

    assert mean_share(0.5, 16) > 2 * mean_share(0.0, 16)
    assert mean_share(0.5, 0) == 0.0


def test_to_unit_maps_the_window_and_clips():
    x = to_unit(torch.tensor([-2000, -1000, 0, 1000, 3000], dtype=torch.int16), (-1000.0, 1000.0), torch.device("cpu"))
    assert x.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0] and x.dtype == torch.float32


def test_bad_plans_and_empty_splits():
    with pytest.raises(BadInput, match=r"box_vox.*batch_size.*min_body"):
        PatchPlan(box_vox=(0, 8, 8), batch_size=0, min_body=2.0)
    with pytest.raises(BadInput, match=r"split 'test' must hold.*train, val"):
        PatchStream(MemoryStore(SHAPES), PLAN, source=Source(split="test"), steps=1)


def doubled(boxes, step):
    return {"boxes": 2 * boxes, "step": step, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_made_of_the_boxes_arrives_in_their_place(workers):
    stream = PatchStream(MemoryStore(SHAPES), PatchPlan((8, 8, 8), 3, workers), source=Source(), steps=5, make=doubled)
    for step, (batch, (boxes, scan_ids, corners)) in enumerate(zip(loader(stream), batches(steps=5), strict=True)):
        made = unpack(batch.views, torch.device("cpu"))
        assert torch.equal(made["boxes"], 2 * boxes) and made["step"] == step
        assert workers == 0 or made["threads"] == 1
        assert batch.boxes_BCXYZ.numel() == 0 and batch.scan_ids == scan_ids and batch.corners_B3.tolist() == corners


@pytest.mark.parametrize("workers", [0, 1])
def test_a_complaint_of_the_stream_arrives_as_it_was_written(workers):
    def refuse(boxes, step):
        raise BadInput(f"step {step}: must be smaller")

    stream = PatchStream(MemoryStore(SHAPES), PatchPlan((8, 8, 8), 3, workers), source=Source(), steps=2, make=refuse)
    with pytest.raises(BadInput, match=r"^step 0: must be smaller$"):
        next(loader(stream))


@pytest.fixture(params=["threads as they are", "threads set"])
def threads(request):
    """Once the number of threads was set, torch begins threads in each worker before the worker's own code runs."""
    if request.param == "threads set":
        before = torch.get_num_threads()
        torch.set_num_threads(before + 2)
        yield
        torch.set_num_threads(before)
    else:
        yield


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_workers_leave_the_signals_of_a_whole_group_to_the_training_process():
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = set(multiprocessing.active_children())
    stream = PatchStream(MemoryStore(SHAPES), PatchPlan((8, 8, 8), 3, 1), source=Source(), steps=10**6)
    read = loader(stream)
    next(read)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mine
    [worker] = set(multiprocessing.active_children()) - before
    # Sent by another process, as a scheduler's are: from the parent SIGTERM still ends it.
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    subprocess.run(["kill", "-USR1", str(worker.pid)], check=True)
    for _ in range(30):  # more than was read ahead
        next(read)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
    with pytest.raises(BadInput, match="worker"), deaths_told():
        for _ in range(10**4):
            next(read)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_a_thread_without_the_block_does_not_let_a_signal_end_a_worker():
    read = loader(PatchStream(UnblockingStore(SHAPES), PatchPlan((8, 8, 8), 3, 1), source=Source(), steps=30))
    assert len(list(read)) == 30


class UnblockingStore(MemoryStore):
    """Begins a thread that takes SIGTERM, as a library may."""

    threads: ClassVar[list[threading.Thread]] = []

    def read_box(self, *given):
        if not self.threads:
            began = threading.Event()
            self.threads.append(threading.Thread(target=_takes_signals, args=(began,), daemon=True))
            self.threads[0].start()
            assert began.wait(10)
        return super().read_box(*given)


def _takes_signals(began):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    began.set()


def test_a_killed_worker_is_one_clear_complaint():
    before = set(multiprocessing.active_children())
    stream = PatchStream(MemoryStore(SHAPES), PatchPlan((8, 8, 8), 3, 1), source=Source(), steps=10**6)
    read = loader(stream)
    next(read)
    [worker] = set(multiprocessing.active_children()) - before
    with (
        pytest.raises(BadInput, match=r"patches.workers: every worker must live.*found: DataLoader worker.*lower.*--resume"),
        deaths_told(),
    ):
        os.kill(worker.pid, signal.SIGKILL)
        # It may be told by a signal at any place, or when the next batch is asked for.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            next(read)
    with pytest.raises(RuntimeError, match="something else"), deaths_told():
        raise RuntimeError("something else")


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset"), RuntimeError("received 0 items of ancdata")], ids=repr)
def test_a_worker_that_dies_while_it_hands_over_is_told_alike(error, monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            raise error
            yield

    monkeypatch.setattr("volssl.patches.DataLoader", Broken)
    stream = PatchStream(MemoryStore(SHAPES), PLAN, source=Source(), steps=2)
    with pytest.raises(BadInput, match=f"found: DataLoader worker broke off, {type(error).__name__}"), deaths_told():
        next(loader(stream))


def test_who_makes_the_views():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    asked = {"auto": (True, False), "device": (False, False), "workers": (True, True)}
    for views, (on_cpu, on_gpu) in asked.items():
        plan = PatchPlan(workers=1, views=views)
        assert (plan.workers_make_views(cpu), plan.workers_make_views(gpu)) == (on_cpu, on_gpu)
    assert not PatchPlan(workers=0).workers_make_views(cpu)
    with pytest.raises(BadInput, match=r"views: workers.*found workers: 0"):
        PatchPlan(workers=0, views="workers")
