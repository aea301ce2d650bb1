"""Training samples from prepared volumes: reading alone, views with all augmentation, and two worker processes.

    python tools/bench_patches.py [--samples 32] [--rounds 5] [--no-compile] [--out FILE]

Source: two synthetic torsos of 350x350x300 voxels (a chest at 1 mm, section 1.3 of the method's description) with the noise of a scanner,
int16, as a store and as .nii.gz files of the same voxels.
A sample is one parent box of 128x128x112, and from it PCRLv2's official views: two globals of one of four sizes, down-sampled to 64x64x32
behind a Gaussian against aliasing, with clean targets, and six sub-crops, re-sampled to 16x16x16; flip, affine, blur, noise, gamma, swap
(globals), z-score, with the same ranges on both sides. The boxes of both sides come from volssl's `PairCrops`, without tissue rule.

Rows, and what is compared:
views          both read boxes from the store with `PatchStream`; the reference cuts the crops by slicing, re-samples them with tio.Resample
               (antialias on) and applies TorchIO's chain, one crop after another; ours: PCRLv2.views on the batch, eager and with compiled
               resampling. CPU ms a sample, one thread.
reading        ours: `PatchStream` on the store, uniform as well (min_body 0), against
               - the whole reference: the reference's side of the rows above, all of a sample's views. Its goal: of what a sample costs
                 there, reading may take one fifteenth here;
               - TorchIO's reading alone, a Queue with a UniformSampler over the .nii.gz files, 16 boxes a volume (the reference code's
                 number), which keeps what it has unpacked;
               - TorchIO's reading alone, a volume unpacked for each box, as a plain dataset does.
               CPU ms a sample, one thread.
two workers    the same work on both sides, from the loader's start to the last sample, wall ms a sample, four times as many samples: the
               reference's side of the first rows in a torch DataLoader with 2 workers; volssl's loader with 2 workers that read and make
               the views, one thread each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import torchio
from bench_augment import torchio_chain
from paired import Row, paired, report, row
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from volssl.augment.spatial import Box
from volssl.bench import synthetic_store
from volssl.compiling import trouble
from volssl.draws import Draws
from volssl.methods.method import without_weights
from volssl.methods.pcrlv2 import PCRLv2
from volssl.nets.unet import UNet
from volssl.parcels import unpack
from volssl.patches import PatchPlan, PatchStream, Source, loader, to_unit
from volssl.running import ViewMaker
from volssl.store import Store

tio: Any = torchio
BOX = (128, 128, 112)
BATCH = 4
ENDLESS = 10**6
CPU = torch.device("cpu")


def our_views(method: PCRLv2, stream: PatchStream, step: int) -> Any:
    """One batch of views."""
    x_BCXYZ = to_unit(stream[step].boxes_BCXYZ, stream.store.window, CPU)
    return method.views(x_BCXYZ, Draws(0, step, 0, len(x_BCXYZ)), spacing_mm=(1.0, 1.0, 1.0))


class TorchioViews(Dataset[list[Tensor]]):
    """The reference: sample by sample, a box of the store, crops cut from it, re-sampled and put through TorchIO's chain."""

    def __init__(self, stream: PatchStream, method: PCRLv2, length: int) -> None:
        self.stream, self.crops, self.length = stream, method.crops, length
        self.of_global, self.of_local = torchio_chain()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        """Two targets, two globals, six sub-crops."""
        torch.set_num_threads(1)
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        parent = to_unit(self.stream[index].boxes_BCXYZ, self.stream.store.window, CPU)
        one, other, locals_ = self.crops.sample(Draws(0, index, 0, 1), parent, (64, 64, 32))
        views = [view for box in (one, other) for view in self.of_global(_resampled(parent, box, (64, 64, 32)))]
        return views + [self.of_local(_resampled(parent, box, (16, 16, 16))) for box in locals_]


def _resampled(parent: Tensor, box: Box, out: tuple[int, int, int]) -> Any:
    start, size = (of[0].int().tolist() for of in (box.start_B3, box.size_B3))
    (i, j, k), (a, b, c) = start, size
    image = tio.ScalarImage(tensor=parent[0, :, i : i + a, j : j + b, k : k + c])
    spacing = tuple(n / m for n, m in zip(size, out, strict=True))
    resampled = image if spacing == (1.0, 1.0, 1.0) else tio.Resample(spacing, antialias=max(spacing) > 1)(image)
    return resampled if tuple(resampled.spatial_shape) == out else tio.CropOrPad(out)(resampled)


def torchio_boxes(store: Store, folder: Path, per_volume: int) -> Iterator[Tensor]:
    """Boxes from TorchIO's queue over .nii.gz files of the store's volumes, so many of each volume that it unpacks, for ever."""
    subjects = []
    for entry in store.rows:
        path = folder / f"{entry.scan_id}.nii.gz"
        if not path.exists():
            tio.ScalarImage(tensor=store.read_box(entry.scan_id, (0, 0, 0), entry.shape_vox)).save(path)
        subjects.append(tio.Subject(image=tio.ScalarImage(path)))
    dataset, sampler = tio.SubjectsDataset(subjects), tio.UniformSampler(BOX)
    queue = tio.Queue(dataset, max_length=per_volume, samples_per_volume=per_volume, sampler=sampler, num_workers=0)
    while True:
        for patch in tio.SubjectsLoader(queue, batch_size=1):
            yield patch["image"]["data"]


def counted(run: Callable[[int], object], start: int = 0) -> Callable[[], object]:
    """A call with the next number each time."""
    numbers = iter(range(start, ENDLESS))
    return lambda: run(next(numbers))


def measure(given: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows."""
    store = synthetic_store(folder / "store", BOX, scans=2, shape=(350, 350, 300))
    stream, single = (
        PatchStream(store, PatchPlan(box_vox=BOX, batch_size=n, workers=workers, min_body=0.0), source=Source(), steps=ENDLESS)
        for n, workers in ((BATCH, 2), (1, 0))
    )
    methods = {"eager": PCRLv2(UNet(width=1))}
    if not given.no_compile and not trouble("cpu"):
        methods["compiled"] = PCRLv2(UNet(width=1))
        methods["compiled"].compile_views()
    return one_core(given, stream, single, methods) + reading(given, stream, folder) + two_workers(given, stream, single, methods)


def one_core(given: argparse.Namespace, stream: PatchStream, single: PatchStream, methods: dict[str, PCRLv2]) -> list[Row]:
    """Views on one core, and our reading against the whole reference."""
    samples, steps = given.samples, given.samples // BATCH
    reference = TorchioViews(single, methods["eager"], samples)
    ours = {
        name: counted(lambda n, made=made: [our_views(made, stream, n * steps + i) for i in range(steps)]) for name, made in methods.items()
    }
    ours["reading"] = counted(lambda n: [stream[n * steps + i] for i in range(steps)])
    seconds = paired(counted(lambda n: [reference[n * samples + i] for i in range(samples)]), ours, rounds=given.rounds)
    rows = [row(f"views cut from the store, {name}, per core", seconds[name], per=samples, goal=3.5) for name in methods]
    return [*rows, row("reading, against the whole reference chain", seconds["reading"], per=samples, goal=15.0)]


def reading(given: argparse.Namespace, stream: PatchStream, folder: Path) -> list[Row]:
    """Our reading against TorchIO's."""
    rows = []
    for per_volume, boxes, what in (
        (16, 16, "TorchIO's reading, 16 boxes a volume"),
        (1, BATCH, "TorchIO's reading, a volume for each box"),
    ):
        queue = torchio_boxes(stream.store, folder, per_volume)
        ours = {"ours": counted(lambda n, steps=boxes // BATCH: [stream[n * steps + i] for i in range(steps)])}
        seconds = paired(lambda queue=queue, boxes=boxes: [next(queue) for _ in range(boxes)], ours, rounds=given.rounds)
        rows.append(row(f"reading, against {what}", seconds["ours"], per=boxes))
    return rows


def two_workers(given: argparse.Namespace, stream: PatchStream, single: PatchStream, methods: dict[str, PCRLv2]) -> list[Row]:
    """Both sides with two workers that read and make the views."""
    samples = 4 * given.samples
    reference = TorchioViews(single, methods["eager"], samples)
    wall = paired(
        lambda: [None for _ in DataLoader(reference, batch_size=BATCH, num_workers=2)],
        {name: lambda made=made: _with_workers(made, stream, samples // BATCH) for name, made in methods.items()},
        rounds=given.rounds,
        clock=time.perf_counter,
    )
    return [row(f"two workers, {name}, wall", wall[name], per=samples, goal=5.0) for name in methods]


def _with_workers(method: PCRLv2, stream: PatchStream, steps: int) -> None:
    make = ViewMaker(without_weights(method), stream.store.window, (1.0, 1.0, 1.0), 0, "", 0)
    until = PatchStream(stream.store, stream.plan, source=stream.source, steps=steps, make=make)
    for patches in loader(until):
        assert patches.views is not None
        unpack(patches.views, CPU)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="samples in a measured call, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given, Path(folder))
    report(f"samples from prepared volumes, TorchIO {tio.__version__} -> volssl", rows, given.out)


if __name__ == "__main__":
    main()
