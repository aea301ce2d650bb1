"""Verb bench: what a pretraining recipe would cost on this machine: samples per second, wait for data, memory, hours."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import volssl
from volssl import compiling
from volssl import recipe as recipes
from volssl.draws import generator
from volssl.files import BadInput, Outcome, claim_out, track, write_json
from volssl.journal import Clock
from volssl.patches import PatchStream, Source, deaths_told
from volssl.pretrain import PARTS, method_of, play
from volssl.running import Run, Training, open_fabric, start, training_batches, world_size
from volssl.store import About, Entry, Store

WARM_UP = 3  # steps that are not counted: memory is taken, kernels are chosen and compiled, workers start
SCANS = 4


def run(
    recipe: str | Path,
    *,
    store: Path | None = None,
    out: Path | None = None,
    steps: int = 10,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Train some steps of a recipe as `pretrain` does, and tell what all of them would take.

    Args: recipe, overrides: as for `pretrain`. store: from `volssl prepare`; without one a small synthetic store is made and deleted
        again. out: folder for bench.json; without one the figures are only told. steps: measured, after some that are not.
    Raises: BadInput: before step 0 for anything that cannot work.
    """
    if steps < 1:
        raise BadInput(f"bench: --steps must be at least 1; found {steps}")
    if world_size() > 1:
        raise BadInput(f"bench: one process must run it; found {world_size()}; run it without torchrun")
    values = recipes.load(recipe, overrides, verb="pretrain")
    made = recipes.parse(values, PARTS, str(recipe))
    method_of(made).check(made["patches"].box_vox, made["patches"].batch_size)
    if store is not None:
        store = Path(store)
        PatchStream(Store.open(store), made["patches"], source=Source(), steps=1)
    if out is not None:
        out = claim_out(Path(out), overwrite=overwrite, inputs=[store] if store is not None else [])
    with tempfile.TemporaryDirectory(prefix="volssl-bench-") as folder, deaths_told():
        opened = Store.open(store) if store is not None else synthetic_store(Path(folder) / "store", made["patches"].box_vox)
        figures = {"recipe": Path(recipe).stem, "store": "given" if store else "synthetic", **measure(made, opened, steps=steps)}
    if out is not None:
        write_json(out / "bench.json", figures)
    return Outcome(out or Path(), message=sentence(figures))


def measure(made: dict[str, Any], store: Store, *, steps: int) -> dict[str, Any]:
    """Figures of `steps` steps of a parsed recipe on a store; keys as in bench.json."""
    training: Training = made["training"]
    fabric = open_fabric(training.precision)
    method = method_of(made)
    # Whether views are compiled must not depend on how few steps are measured: the schedule stays the recipe's own.
    current = start(fabric, method, made, store=store, out=Path())
    batches = training_batches(current, steps=(WARM_UP + steps) * training.accumulate)
    begun = time.monotonic()
    with _peak_memory(fabric.device):
        _steps(current, batches, range(WARM_UP), Clock())
    warm_up = time.monotonic() - begun
    clock = Clock()
    with _peak_memory(fabric.device) as peak:
        _steps(current, batches, range(WARM_UP, WARM_UP + steps), clock)
        numbers = clock.read()
    samples = training.steps * training.accumulate * made["patches"].batch_size
    cuda = fabric.device.type == "cuda"
    return {
        "samples_per_second": numbers["samples_per_second"],
        "data_wait_share": numbers["data_wait_share"],
        "peak_memory_mb": peak[0],
        "hours": samples / numbers["samples_per_second"] / 3600,
        "warm_up_seconds": warm_up,
        "steps_measured": steps,
        "batch_size": made["patches"].batch_size,
        "device": torch.cuda.get_device_name(fabric.device) if cuda else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "workers": made["patches"].workers,
        "views": "workers" if made["patches"].workers_make_views(fabric.device) else "device",
        "precision": str(fabric._precision.precision),
        "compile": compiling.resolved(training.compile, device=fabric.device, steps=training.steps),
        "torch": torch.__version__,
        "volssl": volssl.__version__,
    }


def _steps(current: Run, batches: Iterator[Any], steps: range, clock: Clock) -> None:
    # As in a run, a step's numbers are read one step later, which waits for the device to have done it.
    earlier: dict[str, torch.Tensor] = {}
    for step in track(steps, total=steps.stop, label="bench", start=steps.start):
        with clock.waiting():
            patches = [next(batches) for _ in range(current.training.accumulate)]
        _, numbers = play(current, patches, step)
        _read(earlier)
        earlier = numbers
        clock.samples += sum(len(batch.scan_ids) for batch in patches)
    _read(earlier)


def _read(numbers: dict[str, torch.Tensor]) -> None:
    for name, value in numbers.items():
        if not np.isfinite(float(value)):
            raise BadInput(f"bench: every loss must be finite; found {name} {float(value)}; lower training.lr")


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Peak memory in MB: of the device's tensors inside the block on CUDA, else of this process since it began."""
    peak = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        # Kilobytes on Linux, bytes on macOS.
        peak[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def sentence(figures: dict[str, Any]) -> str:
    """The figures for people."""
    of = "GPU memory" if figures["device"][:3] != "CPU" else "memory of the main process"
    return (
        f"{figures['samples_per_second']:.3g} samples/s, {100 * figures['data_wait_share']:.1f} % of the time waiting for data, "
        f"peak {figures['peak_memory_mb'] / 1e3:.2f} GB ({of}); the whole recipe would take {figures['hours']:.3g} hours here\n"
        f"measured over {figures['steps_measured']} steps of batch {figures['batch_size']} on {figures['device']}, "
        f"{figures['precision']}, {figures['threads']} threads, {figures['workers']} workers, views by the {figures['views']}, "
        f"compile {figures['compile']}"
    )


def synthetic_store(path: Path, box_vox: tuple[int, int, int], *, scans: int = SCANS, shape: tuple[int, int, int] | None = None) -> Store:
    """A store of torso-like scans, a bit larger than a box if no shape is given, with a scanner's noise: they compress as scans do."""
    made = Store.create(path, About((1.0, 1.0, 1.0), "CT", (-1000.0, 1000.0), (-1024.0, 3071.0), recipe={}))
    shape = shape or (box_vox[0] * 3 // 2, box_vox[1] * 3 // 2, box_vox[2] * 3 // 2)
    affine = tuple(float(v) for v in np.eye(4).ravel())
    entries = []
    for number in range(scans):
        name = f"S{number}"
        entries.append(Entry(name, name, "CT", "train", 1, shape, (0, 0, 0), shape, affine, shape, affine, (1.0, 0.0), "synthetic"))
        made.write(_torso(number, shape)[None], entries[-1])
    made.finish(entries)
    return Store.open(path)


def _torso(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    source = generator(0, "bench", number)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    hu = np.where(x**2 + (y / 0.75) ** 2 < 0.85, np.float32(40), np.float32(-1000)) + 0 * z
    for side in (-0.42, 0.42):
        hu[((x - side) / 0.33) ** 2 + (y / 0.45) ** 2 + ((z - 0.2) / 0.7) ** 2 < 1] = -850
    hu[(x / 0.1) ** 2 + ((y + 0.55) / 0.1) ** 2 + 0 * z < 1] = 500
    hu += 15 * source.standard_normal(shape, dtype=np.float32)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
