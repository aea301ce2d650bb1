"""PCRLv2's views on one CPU core: this project's batched transforms against the reference's chain written with TorchIO.

    python tools/bench_augment.py [--samples 8] [--rounds 7] [--no-compile] [--out FILE]

One sample is 2 global crops of 64x64x32, with their clean targets, and 6 sub-crops of 16x16x16: float32 on [0, 1], already cut and
resized. Both sides draw and apply, with the same ranges: flip along x (p 0.5), affine (scale 0.9 to 1.1 per axis, rotation +-10 degrees
about each axis), [the globals' target is this], blur (sigma 0 to 2 voxels per axis), noise (sd 0 to 0.25), gamma (log +-0.3), for
globals 100 swaps of 8x4x4 patches, z-score.

Reference: TorchIO transforms one crop after another, as section 4 of the method's description and the authors' loader do.
Ours: `volssl.augment` through PCRLv2's own `Corruption`, in batches of all samples; eager, and with the resampling compiled.
Both sides keep to one thread; CPU milliseconds per sample are counted. The sides take turns within every round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import SimpleITK as sitk
import torch
import torchio
from paired import paired, report, row
from torch import Tensor

from volssl.augment.spatial import Affine, Box, Sampler, compiled_sampler, take
from volssl.compiling import trouble
from volssl.draws import Draws
from volssl.methods.pcrlv2 import Corruption

tio: Any = torchio  # its lazy imports are unknown to a type checker
GLOBALS, LOCALS = 2, 6


def torchio_chain() -> tuple[Callable[[Any], list[Tensor]], Callable[[Any], Tensor]]:
    """The reference's chain for one image: of a global its target and what is seen, of a sub-crop what is seen."""
    geometry = tio.Compose([tio.RandomFlip(axes=0, flip_probability=0.5), tio.RandomAffine(scales=0.1, degrees=10)])
    corrupt = tio.Compose([tio.RandomBlur((0, 2)), tio.RandomNoise(0, (0, 0.25)), tio.RandomGamma((-0.3, 0.3))])
    swap, zscore = tio.RandomSwap(patch_size=(8, 4, 4), num_iterations=100), tio.ZNormalization()

    def of_global(crop: Any) -> list[Tensor]:
        turned = geometry(crop)
        target = copy.deepcopy(turned)
        return [target.data, zscore(swap(corrupt(turned))).data]

    return of_global, lambda crop: zscore(corrupt(geometry(crop))).data


def torchio_views(globals_: Tensor, locals_: Tensor) -> Callable[[], list[Tensor]]:
    """The reference: views of crops (N, 1, X, Y, Z), one at a time."""
    of_global, of_local = torchio_chain()

    def run() -> list[Tensor]:
        made = [view for crop in globals_ for view in of_global(tio.ScalarImage(tensor=crop))]
        return made + [of_local(tio.ScalarImage(tensor=crop)) for crop in locals_]

    return run


def our_views(globals_: Tensor, locals_: Tensor, sampler: Sampler | None) -> Callable[[], list[Tensor]]:
    """The same with this project's transforms; every call draws other numbers."""
    geometry, corruption = Affine(), Corruption()
    step = iter(range(10**9))

    def view(crops: Tensor, draws: Draws, swap: bool) -> tuple[Tensor, Tensor]:
        size = (crops.shape[2], crops.shape[3], crops.shape[4])
        whole = Box(torch.zeros(len(crops), 3), torch.tensor(size).expand(len(crops), 3))
        target = take(crops, whole, size, matrix_B33=geometry.sample(draws), sampler=sampler)
        return target, corruption.seen(target, draws, swap=swap)

    def run() -> list[Tensor]:
        number = next(step)
        target, seen = view(globals_, Draws(0, number, 0, len(globals_), "globals"), True)
        return [target, seen, view(locals_, Draws(0, number, 0, len(locals_), "locals"), False)[1]]

    return run


def crops(samples: int) -> tuple[Tensor, Tensor]:
    """Noise, smoothed to look like anatomy to no transform in particular: (2 N, 1, 64, 64, 32) and (6 N, 1, 16, 16, 16) on [0, 1]."""
    source = torch.Generator().manual_seed(0)
    return torch.rand(GLOBALS * samples, 1, 64, 64, 32, generator=source), torch.rand(LOCALS * samples, 1, 16, 16, 16, generator=source)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="samples in a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    globals_, locals_ = crops(given.samples)
    ours = {"eager": our_views(globals_, locals_, None)}
    why = "left out" if given.no_compile else trouble("cpu")
    if why:
        print(f"compiled: not measured: {why}")
    else:
        ours["compiled"] = our_views(globals_, locals_, compiled_sampler())
    seconds = paired(torchio_views(globals_, locals_), ours, rounds=given.rounds)
    goals = {"eager": 3.0, "compiled": 6.0}
    rows = [row(f"views, {name}, per core", seconds[name], per=given.samples, goal=goals[name]) for name in ours]
    report(f"views of PCRLv2, CPU ms a sample, TorchIO {tio.__version__} -> volssl", rows, given.out)


if __name__ == "__main__":
    main()
