"""The jobs of a study: a pretraining, a fine-tuning and its scores. Each has a folder of its own whose last file says that it is done.

A job is a plain value that any process can do, here or on a cluster with the same file system; what it computes depends on that value and
on the data alone, so neither the number of workers nor the order matters.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from volssl import finetune, pretrain
from volssl import recipe as recipes
from volssl.archive import Source
from volssl.datasets import Case, CaseTable, without_folders
from volssl.evaluate import judge_case
from volssl.files import BadInput, Outcome, place_of, read_json, write_csv, write_json
from volssl.holdout import Seen
from volssl.intake import read_case
from volssl.journal import read_metrics
from volssl.page import without_paths
from volssl.prepare import Settings, about_of, prepare_one
from volssl.protocols.dice import Dice
from volssl.protocols.protocol import Pair
from volssl.rows import Row
from volssl.segment import Model, read_model
from volssl.store import Store
from volssl.targets import targets_of
from volssl.volume import Volume

DONE, LATER = "", "later"  # answers of a job; any other is the reason why it failed
RESULT, TEST, PRETRAINED = "result.json", "test.json", "pretrained.json"


@dataclass(frozen=True)
class Cell:
    """One fine-tuning of a study."""

    arm: str
    labels: int
    seed: int
    fold: int
    lr: float

    @property
    def name(self) -> str:
        """Its folder below STUDY/cells."""
        return f"{self.arm}/labels_{self.labels:04d}-seed_{self.seed}-fold_{self.fold}-lr_{self.lr:g}"


@dataclass(frozen=True)
class Means:
    """How a job is done. threads: of torch. not_after: the time (of time.time) after which it is left for later; None: no bound."""

    threads: int
    not_after: float | None = None


@dataclass(frozen=True)
class Pretraining:
    """A job: one arm's pretraining; its bundle comes to lie in `out`/bundle. hashes: of the images in the store."""

    out: Path
    recipe: Path
    store: Path
    seed: int
    hashes: tuple[str, ...]
    means: Means

    def run(self) -> str:
        """Do it, or go on with it. Returns: DONE, LATER or a reason."""
        asked = (f"training.seed={self.seed}",)
        outcome = pretrain.run(self.recipe, store=self.store, out=self.out, resume=True, overrides=asked)
        if not outcome.finished:
            return LATER
        write_csv(self.out / "bundle" / "images.csv", ({"content_hash": digest} for digest in sorted(self.hashes)), ["content_hash"])
        _sweep(self.out)
        write_json(self.out / PRETRAINED, {"seconds": _seconds(self.out)})
        return DONE


@dataclass(frozen=True)
class Fitting:
    """A job: one cell's fine-tuning, with the scores of the validation cases if it takes part in the search for a learning rate."""

    cell: Cell
    out: Path
    recipe: Mapping[str, Any]
    weights: Path | None
    table: CaseTable
    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    means: Means

    def run(self) -> str:
        """Do it, or go on with it. Returns: DONE, LATER or a reason."""
        values = recipes.laid_over(self.recipe, {"optimisation": {"lr": self.cell.lr}})
        made = recipes.parse(values, finetune.PARTS, self.cell.name)
        splits = {"train": [case.case_id for case in self.train], "labels": self.cell.labels, "seed": self.cell.seed}
        task = finetune.Task(without_folders(values), made, self.table, self.train, (), splits)
        options = finetune.Options(weights=self.weights, seed=self.cell.seed, resume=True)
        model = finetune.fit(task, out=self.out, options=options)
        if isinstance(model, Outcome):
            return LATER
        scores = scored(model, self.table, self.validation)
        _sweep(self.out)
        write_json(self.out / RESULT, {"seconds": _seconds(self.out), "train": len(self.train), "validation": scores})
        return DONE


@dataclass(frozen=True)
class Testing:
    """A job: the test cases, scored once with a cell's model."""

    cell: Cell
    out: Path
    table: CaseTable
    test: tuple[Case, ...]
    means: Means

    def run(self) -> str:
        """Do it. Returns: DONE."""
        begun = time.monotonic()
        scores = scored(read_model(self.out), self.table, self.test)
        write_json(self.out / TEST, {"seconds": time.monotonic() - begun, "test": scores})
        return DONE


Job = Pretraining | Fitting | Testing


def do(job: Job) -> str:
    """Do one job. Returns: DONE, LATER, or the reason why it failed, without paths and names of cases."""
    if job.means.not_after is not None and time.time() >= job.means.not_after:
        return LATER
    with _threads(job.means.threads), redirect_stderr(io.StringIO()):
        try:
            return job.run()
        except BadInput as error:
            return _plain(str(error), job)
        except OSError as error:
            return f"{type(error).__name__}: {os.strerror(error.errno) if error.errno else 'no number'}"
        except Exception as error:  # one arm must not end the others; its text may quote a file
            return place_of(error)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plain(text: str, job: Job) -> str:
    text = without_paths(text.replace(str(job.out), job.out.name))
    known = job.train + job.validation if isinstance(job, Fitting) else ()
    for case in sorted(known, key=lambda case: -len(case.case_id)):
        text = text.replace(case.case_id, "a case")
    return " ".join(text.split())


def _sweep(out: Path) -> None:
    # What was needed to go on: several times the size of what is kept.
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)


def _seconds(out: Path) -> float:
    return max((float(row.get("seconds", 0.0)) for row in read_metrics(out)), default=0.0)


def scored(model: Model, table: CaseTable, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Dice of every case and target, on the case's own grid; a case is told by its place among them."""
    targets, rows = targets_of(table.labels, table.regions), []
    for number, case in enumerate(cases):
        image, reference = read_case(case, table)
        predicted = Volume(model.label_map(image)[None], image.grid)
        judged = judge_case(Pair(str(number), predicted, reference, targets), Dice())
        rows += [vars(score) | {"case": number} for score in judged.rows]
    return rows


def mean_dice(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean Dice over the labels of every case, in the order of the cases."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["metric"] == "dice":
            values.setdefault(row["case"], []).append(row["value"])
    return [sum(values[case]) / len(values[case]) for case in sorted(values)]


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """What a job left in its folder, or None if it is not done."""
    return read_json(folder / name) if (folder / name).is_file() else None


def make_store(path: Path, settings: Settings, *, table: CaseTable, cases: Sequence[Case], seen: Mapping[str, Seen]) -> Store:
    """The store of the unlabelled images of `cases`: every channel a scan, named after its content. Raises: BadInput: one that cannot be.

    Whatever lay there is looked at again, scan by scan, so that a stopped call can be repeated.
    """
    path.mkdir(parents=True, exist_ok=True)
    store = Store.create(path, about_of(settings))
    faults, names = [], []
    for case in cases:
        for number, digest in enumerate(seen[case.case_id].hashes):
            source = Source("file", (case.images[number],)) if len(case.images) > 1 else Source("file", case.images, _part(table, number))
            row = _row(digest, settings, seen[case.case_id])
            if store.entry(row.scan_id) is None and (code := prepare_one(store, settings, row, source)):
                faults.append(f"{case.case_id}: {code}")
            names.append(row.scan_id)
    if faults:
        raise BadInput(f"prepare: {len(faults)} image(s) cannot be pretrained on; mend them or leave them out:\n  " + "\n  ".join(faults))
    entries = (store.entry(name) for name in sorted(set(names)))
    store.finish(entry for entry in entries if entry is not None)
    return Store.open(path)


def _part(table: CaseTable, number: int) -> tuple[int, ...]:
    return (number,) if len(table.channels) > 1 else ()


def _row(digest: str, settings: Settings, seen: Seen) -> Row:
    name = digest[:24]
    shape = (0, 0, 0)  # told by an index alone
    return Row(
        scan_id=f"S{name}",
        patient_id=f"P{name}",
        study_id=f"T{name}",
        modality=settings.modality,
        body_part="",
        shape_vox=shape,
        spacing_mm=seen.spacing_mm,
        orientation="RAS",
        num_slices=0,
        verdict="accept",
        reasons=(),
        content_hash=digest,
        split="train",
    )
