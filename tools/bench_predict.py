"""Labels out of a sliding window: against MONAI's SlidingWindowInferer, the same network and the same windows.

    python tools/bench_predict.py [--shape 512 512 300] [--patch 96] [--overlap 0.5] [--rounds 1] [--width 16] [--batch 2]
                                  [--threads N] [--only network cost memory] [--kept-too] [--out FILE]

A torso of `--shape` voxels, as noisy as a CT, 360 mm wide, in the window of soft tissue (-175 to 250 HU), on its own grid.

network  Seconds of the wall to the label map with a small U-Net (three scales, instance normalisation), first trained for some steps
         to tell air, fat and lean tissue, so that its labels are no noise. Reference: MONAI's inferer in fp32 on the prepared image, with
         channels_last_3d too, then argmax. Ours: as predict does it, preparation included, bf16 where the processor has dot products of it,
         windows of air left out. Then once more with the memory that predict asks the C library to keep, which nothing takes back: ours
         and, with --kept-too, the reference. Then the Dice between the two label maps, the lowest of all labels.
cost     CPU seconds of the same without a network: a predictor that copies shares of 4 and of 14 classes that were there before.
memory   Memory that label map and shares take beside the prepared image, at its peak, without a network, 4 and 14 classes; each in a fresh
         process.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers.inferer import SlidingWindowInferer
from paired import Row, paired, report, share
from scans import torso

from volssl.heap import keep_freed
from volssl.segment import Inference, Model, Plan, Preparation
from volssl.sliding import Windows, largest, slab_axis, slabs
from volssl.volume import Grid, Volume

LABELS = {"fat": 1, "lean tissue": 2}
WINDOW = (-175.0, 250.0)
FROM = (0.08, 0.42)  # of the window: -141 and 4 HU, about half-way between air, fat and lean tissue
PATCH_MM = 45.0  # sides of a patch while training, 32 voxels at least
Way = Callable[[], Any]
Predictor = Callable[[torch.Tensor], torch.Tensor]


def scan(shape: tuple[int, int, int]) -> Volume:
    """The torso, in a shape of which any side need not be a multiple of four."""
    larger = tuple(-(-n // 4) * 4 for n in shape)
    hu, grid = torso((larger[0], larger[1], larger[2]))
    return Volume(hu[None], grid).cropped((0, 0, 0), shape)


def trained(volume: Volume, settings: argparse.Namespace, steps: int = 400) -> Model:
    """A model that tells fat and lean tissue after some steps: enough for labels that are no noise."""
    side = (settings.patch,) * 3
    net = {"name": "unet", "arguments": {"width": settings.width, "depth": 3, "norm": "instance"}}
    inference = Inference(overlap=settings.overlap, batch=settings.batch)
    plan = Plan(net, LABELS, ("CT",), side, preparation=Preparation(window=WINDOW), inference=inference)
    torch.manual_seed(0)
    model = Model(plan, plan.network().to(memory_format=torch.channels_last_3d))  # pyright: ignore[reportCallIssue]
    x_XYZ = torch.from_numpy(plan.preparation.image(volume).array_CXYZ[0])
    # Instance normalisation takes away how bright a patch is as a whole: it must be wide enough for all three tissues to lie in it.
    wide = [4 * round(PATCH_MM / spacing / 4) for spacing in volume.grid.spacing_mm]
    small = [min(max(side, 32), n // 4 * 4) for side, n in zip(wide, x_XYZ.shape, strict=True)]
    optimizer = torch.optim.Adam(model.net.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        corners = [[int(torch.randint(0, n - side + 1, ())) for n, side in zip(x_XYZ.shape, small, strict=True)] for _ in range(2)]
        boxes = [tuple(slice(at, at + side) for at, side in zip(corner, small, strict=True)) for corner in corners]
        x = torch.stack([x_XYZ[box] for box in boxes])[:, None]
        smooth = F.avg_pool3d(x, 3, 1, 1, count_include_pad=False)
        target = (smooth > FROM[0]).long() + (smooth > FROM[1]).long()
        loss = F.cross_entropy(model.net(x), target[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.net.eval()
    return model


def of_monai(x_CXYZ: torch.Tensor, predict: Predictor, settings: argparse.Namespace) -> np.ndarray:
    """The label map by MONAI's inferer and argmax."""
    inferer = SlidingWindowInferer((settings.patch,) * 3, settings.batch, settings.overlap, mode="gaussian")
    with torch.no_grad():
        shares: Any = inferer(x_CXYZ[None], predict)
    return shares[0].argmax(0).to(torch.uint8).numpy()


def of_slabs(x_CXYZ: torch.Tensor, predict: Predictor, settings: argparse.Namespace, classes: int) -> np.ndarray:
    """The label map by slabs, with no window left out."""
    windows = Windows((settings.patch,) * 3, settings.overlap, settings.batch)
    axis = slab_axis(x_CXYZ.shape[1:])
    label_XYZ = torch.empty(x_CXYZ.shape[1:], dtype=torch.uint8)
    for first, stop, sums in slabs(x_CXYZ, predict, windows, empty_C=[1.0] + [0.0] * (classes - 1), averaged=False):
        label_XYZ.narrow(axis, first, stop - first).copy_(largest(sums))
    return label_XYZ.numpy()


def measure_network(settings: argparse.Namespace) -> list[Row]:
    """The whole way with a network, and whether the labels are the same."""
    volume = scan(settings.shape)
    volume = Volume(volume.array_CXYZ, Grid(volume.grid.shape_vox, np.diag([*volume.grid.spacing_mm, 1.0])))  # RAS+ already
    model = trained(volume, settings)
    x_CXYZ = torch.from_numpy(model.plan.preparation.image(volume).array_CXYZ)

    def plain(x_BCXYZ: torch.Tensor) -> torch.Tensor:
        return model.net(x_BCXYZ.contiguous(memory_format=torch.channels_last_3d)).softmax(1)

    ways: dict[str, Way] = {"ours": lambda: model.label_map(volume), "MONAI": lambda: of_monai(x_CXYZ, plain, settings)}
    made: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {}

    def turns(names: list[str], note: str) -> None:
        for _, name in itertools.product(range(settings.rounds), names):
            begun = time.monotonic()
            made[name] = ways[name]()
            seconds.setdefault(name + note, []).append(time.monotonic() - begun)

    turns(["ours", "MONAI"], "")
    kept = ", memory kept"
    pairs: list[tuple[str, str, str, float | None]] = [("MONAI", "ours", "network", 2.0)]
    if keep_freed():
        turns(["ours", "MONAI"] if settings.kept_too else ["ours"], kept)
        pairs.append(("MONAI", "ours" + kept, "network, memory kept by ours", None))
        if settings.kept_too:
            pairs.append(("MONAI" + kept, "ours" + kept, "network, memory kept by both", None))
    rows = []
    for reference, ours, title, goal in pairs:
        ratios = [a / b for a, b in zip(seconds[reference], seconds[ours], strict=True)]
        middle = statistics.median(seconds[reference]), statistics.median(seconds[ours])
        rows.append(Row(f"{title}, {model.precision}", "s", *middle, statistics.median(ratios), min(ratios), max(ratios), goal))
    dice = min(_dice(made["MONAI"] == value, made["ours"] == value) for value in LABELS.values())
    return [*rows, Row("network, lowest Dice with MONAI's labels", "", 1.0, dice, dice, dice, dice, 0.999)]


def _dice(one: np.ndarray, two: np.ndarray) -> float:
    return 2 * float((one & two).sum()) / max(1.0, float(one.sum() + two.sum()))


def _copying(classes: int, settings: argparse.Namespace) -> Predictor:
    shares = torch.rand(settings.batch, classes, *(settings.patch,) * 3)
    return lambda x_BCXYZ: shares[: len(x_BCXYZ)].clone()  # a copy, as MONAI multiplies it in place


def measure_cost(settings: argparse.Namespace) -> list[Row]:
    """What surrounds the network."""
    x_CXYZ = torch.rand(1, *settings.shape)
    rows = []
    for classes, goal in ((4, 0.6), (14, None)):
        copying = _copying(classes, settings)
        reference, ours = lambda p=copying: of_monai(x_CXYZ, p, settings), lambda p=copying, k=classes: of_slabs(x_CXYZ, p, settings, k)
        seconds = paired(reference, {"ours": ours}, rounds=settings.rounds)["ours"]
        rows.append(share(f"cost without the network, {classes} classes", seconds, "s", goal))
    return rows


def _extra(name: str, classes: int, settings: argparse.Namespace) -> float:
    # In GB: the peak of the process less what it held when all but shares and label map was there.
    torch.set_num_threads(settings.threads)
    x_CXYZ = torch.rand(1, *settings.shape)
    predict = _copying(classes, settings)
    tiny = argparse.Namespace(**(vars(settings) | {"shape": (settings.patch,) * 3}))
    way = of_monai if name == "MONAI" else lambda x, p, s: of_slabs(x, p, s, classes)
    way(torch.rand(1, *tiny.shape), predict, tiny)  # libraries make themselves at home
    before = _kib("VmRSS")
    way(x_CXYZ, predict, settings)
    return (_kib("VmHWM") - before) * 1024 / 1e9


def _kib(what: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])


def measure_memory(settings: argparse.Namespace) -> list[Row]:
    """What is held beside the image."""
    rows = []
    for classes in (4, 14):
        found = {}
        for name in ("MONAI", "ours"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found[name] = pool.submit(_extra, name, classes, settings).result()
        rows.append(share(f"memory beside the image, {classes} classes", ([found["MONAI"]], [found["ours"]]), "GB", 0.45))
    return rows


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=["network", "cost", "memory"], default=["network", "cost", "memory"])
    parser.add_argument("--kept-too", action="store_true")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    settings.shape = tuple(settings.shape)
    torch.set_num_threads(settings.threads)
    measures = {"network": measure_network, "cost": measure_cost, "memory": measure_memory}
    rows = [row for name, measure in measures.items() if name in settings.only for row in measure(settings)]
    title = f"{'x'.join(map(str, settings.shape))}, windows of {settings.patch}^3, overlap {settings.overlap}, {settings.threads} thread(s)"
    report(title, rows, settings.out)


if __name__ == "__main__":
    main()
