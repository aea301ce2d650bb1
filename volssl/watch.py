"""What is looked at while it trains: pictures, losses on held-out scans, health, the probe. No look changes what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from volssl import health, probe, processes
from volssl.checkpoints import BEST, Checkpoints
from volssl.files import BadInput
from volssl.journal import Journal
from volssl.methods.method import gathering_statistics, unchanged
from volssl.patches import Patches, PatchStream, Source, to_unit
from volssl.pictures import restoration_png
from volssl.running import Run, stream_of, views_of


@dataclass(frozen=True)
class Saving:
    """When something is looked at and written, in steps.

    Attributes: log_every: losses. pictures_every. validate_every, validation_batches: losses on held-out scans. health_every,
        health_patches: figures of the representation, on about as many fixed patches of held-out scans (of training scans without any).
        probe_every, probe_patches: the position probe, on as many patches of training scans and of held-out ones; 0 steps for never.
        checkpoint_every, checkpoint_minutes: whichever comes first.
    """

    log_every: int = 20
    pictures_every: int = 1000
    validate_every: int = 500
    validation_batches: int = 4
    health_every: int = 500
    health_patches: int = 128
    probe_every: int = 2500
    probe_patches: int = 256
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0

    def __post_init__(self) -> None:
        least = {"log_every": 1, "pictures_every": 1, "validate_every": 1, "checkpoint_every": 1, "health_every": 0, "probe_every": 0}
        least |= {"validation_batches": 1, "health_patches": 2, "probe_patches": 2}
        faults = [f"{key} >= {low} must hold; found {getattr(self, key)}" for key, low in least.items() if getattr(self, key) < low]
        if faults:
            raise BadInput("; ".join(faults))

    def due(self, step: int) -> bool:
        """Whether anything but a checkpoint is due after `step` steps."""
        every = (self.log_every, self.pictures_every, self.validate_every, self.health_every, self.probe_every)
        return any(number and step % number == 0 for number in every)


def look(current: Run, saving: Saving, checkpoints: Checkpoints, journal: Journal, *, views: object) -> None:
    """Write what is due after `current.steps_done` steps; `views`: of the last step, for its picture."""
    step, last = current.steps_done, current.steps_done == current.training.steps
    progress = step / current.training.steps
    if step % saving.pictures_every == 0 or last:
        _picture(current, views)
    if (step % saving.validate_every == 0 or last) and _has_held_out(current):
        losses = _validate(current, saving.validation_batches)
        journal.log(step=step, progress=progress, **{f"val/{name}": value for name, value in losses.items()})
        if sum(losses.values()) < current.best:
            current.best = sum(losses.values())
            checkpoints.save(current.state(), BEST)
    if saving.health_every and (step % saving.health_every == 0 or last):
        numbers, compared = _health(current, saving.health_patches)
        journal.log(step=step, progress=progress, **{f"health/{name}": value for name, value in numbers.items()})
        for kind, text in health.complaints(numbers, progress=progress, compared=compared).items():
            journal.warn(kind, text, step=step, progress=progress)
    if saving.probe_every and (step % saving.probe_every == 0 or last):
        _probe(current, saving.probe_patches, journal)


def look_at_untrained(current: Run, saving: Saving, journal: Journal) -> None:
    """The probe's answer before the first step: what the training has to beat."""
    if saving.probe_every:
        _probe(current, saving.probe_patches, journal)


def _has_held_out(current: Run) -> bool:
    return any(row.split == "val" for row in current.store.rows)


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
    return processes.mean_of(sums, current.fabric.device)


def _health(current: Run, patches: int) -> tuple[dict[str, float], bool]:
    """The figures of `health`, and whether the method compares views."""
    split = "val" if _has_held_out(current) else "train"
    stream = PatchStream(current.store, current.plan, source=_source(current, split, "health"), steps=_batches(current, patches))

    def glances() -> Iterator[health.Evidence]:
        for index in range(len(stream)):
            yield health.evidence_of(current.method.glance(views_of(current, stream[index], index, "health")))

    with torch.no_grad(), current.fabric.autocast(), unchanged(current.method):
        with gathering_statistics(current.method) as needed:
            if needed:
                for _ in glances():
                    pass
        evidence = health.gathered(list(glances()))
    return health.measure(evidence), evidence.compared


def _probe(current: Run, patches: int, journal: Journal) -> None:
    """The position probe, on clean patches of the size that the encoder is used to."""
    step, progress = current.steps_done, current.steps_done / current.training.steps
    with torch.no_grad(), current.fabric.autocast(), unchanged(current.method):
        with gathering_statistics(current.method) as needed:
            if needed:
                _sample(current, "train", patches)
        fitted = _sample(current, "train", patches)
        held_out = _sample(current, "val", patches) if _has_held_out(current) else None
    numbers = probe.position_r2(fitted, held_out)
    if numbers:
        journal.log(step=step, progress=progress, **{f"health/{name}": value for name, value in numbers.items()})
    else:
        text = "probe: needs at least two scans in the store, one to learn from and one to be asked about; found 1: no probe in this run"
        journal.warn("probe", text, step=step, progress=progress)


def _sample(current: Run, split: str, patches: int) -> probe.Sample:
    plan = dataclasses.replace(current.plan, box_vox=current.method.view_vox)
    stream = PatchStream(current.store, plan, source=_source(current, split, "probe"), steps=_batches(current, patches))
    rows = {row.scan_id: row for row in stream.rows}
    numbers = {scan_id: number for number, scan_id in enumerate(rows)}
    read = [stream[index] for index in range(len(stream))]
    features = [_features(current, batch) for batch in read]
    position = torch.from_numpy(np.concatenate([probe.positions(batch, rows) for batch in read]))
    scan = torch.tensor([numbers[scan_id] for batch in read for scan_id in batch.scan_ids])
    device = current.fabric.device
    gathered = [processes.gather(part.to(device)).cpu().numpy() for part in (torch.cat(features).double(), position, scan)]
    return probe.Sample(gathered[0], gathered[1], gathered[2])


def _features(current: Run, batch: Patches) -> torch.Tensor:
    return current.method.features(to_unit(batch.boxes_BCXYZ, current.store.window, current.fabric.device))


def _source(current: Run, split: str, stream: str) -> Source:
    return Source(split, current.training.seed, stream, processes.rank())


def _batches(current: Run, patches: int) -> int:
    return max(1, -(-patches // (current.plan.batch_size * processes.count())))
