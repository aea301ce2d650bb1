"""What a study will take before it begins: room on disk, told from the sizes of its networks, and hours, told by timing a few steps."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volssl import bench, finetune, pretrain
from volssl import recipe as recipes
from volssl.arms import SCRATCH, Arm
from volssl.cells import scored
from volssl.files import BadInput, Outcome
from volssl.journal import read_metrics
from volssl.pretrain import method_of
from volssl.rounds import Study, count_left
from volssl.starting import plan_of
from volssl.store import Store

TIMED_STEPS = 5
FLOAT_BYTES = 4
RUNNING = 5  # a running fine-tuning holds weights, their mean and the optimiser's two; and the model it leaves
PRETRAINING = 8  # weights and the optimiser's two, in two checkpoints and one being written, and the bundle
AVERAGING = 3  # the running mean, in each of those checkpoints
CELL_BYTES = 200_000  # tables and logs of a cell


def disk_faults(study: Study, workers: int) -> list[str]:
    """The complaint that there is no room for what is left to do, if there is none."""
    need = _bytes(study, workers)
    there = next(folder for folder in (study.out, *study.out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if need <= free:
        return []
    return [f"--out: must have room for about {need / 1e9:.3g} GB; {free / 1e9:.3g} GB are free; make room or choose another folder"]


def _bytes(study: Study, workers: int) -> float:
    total = 0.0
    for arm in study.plan.arms:
        left = count_left(study)[arm.name]
        made = recipes.parse(arm.finetune, finetune.PARTS, arm.name)
        model = FLOAT_BYTES * _parameters(plan_of(made, study.table).network())
        total += (left["search"] + left["further"]) * (model + CELL_BYTES) + max(1, workers) * RUNNING * model
        if arm.pretrain is not None:
            made = recipes.parse(arm.pretrain, pretrain.PARTS, arm.name)
            each = PRETRAINING + (AVERAGING if made["training"].average else 0)
            total += left["pretraining"] * each * FLOAT_BYTES * _parameters(method_of(made))
    return total


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def estimated(study: Study, stores: Sequence[Store], workers: int) -> dict[str, Any]:
    """Hours of what is left to do, by arm and part, from a few steps of each recipe in this process with the study's threads.

    An arm whose pretraining breaks in its first steps is told as such, and counted with none: it will be shown as failed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(study.plan.design.threads)
    try:
        step_s, test_s, validation_s = _finetuning(study)
        timed = {arm.name: _pretraining(arm, stores) for arm in study.plan.arms if arm.pretrained in ("", arm.name)}
    finally:
        torch.set_num_threads(before)
    rows = []
    for arm in study.plan.arms:
        left, steps = count_left(study)[arm.name], arm.finetune["optimisation"].get("steps", 5000)
        fitting = step_s * steps / 3600
        rows.append(
            {
                "arm": arm.name,
                "pretraining": left["pretraining"] * timed[arm.pretrained or arm.name][0],
                "search": left["search"] * (fitting + validation_s / 3600),
                "further": left["further"] * fitting,
                "test": left["test"] * test_s / 3600,
                "jobs": left,
                "trouble": timed[arm.pretrained or arm.name][1],
            }
        )
    total = sum(row[part] for row in rows for part in ("pretraining", "search", "further", "test"))
    return {"seconds_per_finetuning_step": step_s, "arms": rows, "hours": total, "hours_with_workers": total / max(1, workers)}


def sentences(estimate: Mapping[str, Any], workers: int) -> str:
    """The estimate for people, a line per arm."""
    lines = []
    for row in estimate["arms"]:
        jobs = row["jobs"]
        parts = [f"{jobs[part]} {word} {row[part]:.3g} h" for part, word in WORDS.items() if jobs[part]]
        lines.append(f"  {row['arm']}: " + (", ".join(parts) or "nothing left to do") + (f"; {row['trouble']}" if row["trouble"] else ""))
    told = f"; {estimate['hours_with_workers']:.3g} h with {workers} workers that do not slow each other down" if workers > 1 else ""
    return f"estimate: {estimate['hours']:.3g} h of work{told}\n" + "\n".join(lines)


WORDS = {"pretraining": "pretraining(s)", "search": "fine-tunings of the search", "further": "further fine-tunings", "test": "test runs"}


def _finetuning(study: Study) -> tuple[float, float, float]:
    """Seconds per step, per test run and per validation run of scratch."""
    arm = next(arm for arm in study.plan.arms if arm.name == SCRATCH)
    few = {"optimisation": {"steps": TIMED_STEPS}, "saving": {"log_every": 1, "checkpoint_every": 10 * TIMED_STEPS}}
    values = recipes.laid_over(arm.finetune, few)
    made = recipes.parse(values, finetune.PARTS, arm.name)
    shares, design = study.shares[0], study.plan.design
    train = study.drawn(0, design.labels[0], design.seeds[0])
    with tempfile.TemporaryDirectory(prefix="volssl-study-") as folder, redirect_stderr(io.StringIO()):
        out = Path(folder) / "timed"
        model = finetune.fit(finetune.Task(values, made, study.table, train, (), {}), out=out, options=finetune.Options())
        seconds = [row["seconds"] for row in read_metrics(out)]
    if isinstance(model, Outcome):
        raise BadInput("study: stopped while it was timed")
    begun = time.monotonic()
    some = shares.test[:2]
    scored(model, study.table, some)
    per_case = (time.monotonic() - begun) / len(some)
    # The first steps find out which kernels to use.
    return float(np.median(np.diff(seconds)[1:])), per_case * len(shares.test), per_case * len(shares.validation)


def _pretraining(arm: Arm, stores: Sequence[Store]) -> tuple[float, str]:
    """Hours of one pretraining, and what went wrong while it was timed."""
    if arm.pretrain is None:
        return 0.0, ""
    made = recipes.parse(arm.pretrain, pretrain.PARTS, arm.name)
    training = made["training"]
    # A shorter run than what is timed has no schedule for it.
    made["training"] = dataclasses.replace(training, steps=max(training.steps, bench.WARM_UP + TIMED_STEPS))
    with redirect_stderr(io.StringIO()):
        try:
            rate = bench.measure(made, stores[0], steps=TIMED_STEPS)["samples_per_second"]
        except BadInput as error:
            return 0.0, f"its pretraining cannot be timed: {error}"
    return training.steps * training.accumulate * made["patches"].batch_size / rate / 3600, ""
