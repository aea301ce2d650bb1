"""What is looked at while it trains: pictures and losses on held-out scans. No look changes what is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from volssl import processes
from volssl.checkpoints import BEST, Checkpoints
from volssl.journal import Journal
from volssl.methods.method import unchanged
from volssl.pictures import restoration_png
from volssl.running import Run, stream_of, views_of


@dataclass(frozen=True)
class Saving:
    """When something is written: steps between log lines, pictures, checks on held-out scans and checkpoints (also by minutes)."""

    log_every: int = 20
    pictures_every: int = 1000
    validate_every: int = 500
    validation_batches: int = 4
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0


def look(current: Run, saving: Saving, checkpoints: Checkpoints, journal: Journal, *, views: object) -> None:
    """Write what is due after `current.steps_done` steps; `views`: of the last step, for its picture."""
    step, last = current.steps_done, current.steps_done == current.training.steps
    if step % saving.pictures_every == 0 or last:
        _picture(current, views)
    if (step % saving.validate_every == 0 or last) and any(row.split == "val" for row in current.store.rows):
        losses = _validate(current, saving.validation_batches)
        journal.log(step=step, progress=step / current.training.steps, **{f"val/{name}": value for name, value in losses.items()})
        if sum(losses.values()) < current.best:
            current.best = sum(losses.values())
            checkpoints.save(current.state(), BEST)


def _picture(current: Run, views: object) -> None:
    with current.fabric.autocast(), unchanged(current.method):
        columns = {name: x_BXYZ[:4].numpy() for name, x_BXYZ in current.method.pictures(views).items()}
    if processes.rank() == 0:
        picture = current.out / "pictures" / f"restoration_{current.steps_done:07d}.png"
        restoration_png(picture, columns, window=(0.0, 1.0), spacing_mm=current.store.spacing_mm)


def _validate(current: Run, batches: int) -> dict[str, float]:
    """Mean losses on fixed patches of the held-out split, with the fading terms as at the start, so that steps can be compared."""
    sums: dict[str, float] = {}
    with torch.no_grad(), current.fabric.autocast(), unchanged(current.method):
        for index, patches in enumerate(stream_of(current, "validation", "val", steps=batches)):
            views = views_of(current, patches, index, "validation")
            for _, losses in current.method.turns(views, 0.0):
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / batches
    return {name: processes.mean(value, current.fabric.device) for name, value in sums.items()}
