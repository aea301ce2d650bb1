"""What a study still has to do: from its plan and from what lies in its folder, the jobs that can be done now."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from volssl.arms import Arm, Plan
from volssl.cases import labelled_share
from volssl.cells import PRETRAINED, RESULT, TEST, Cell, Fitting, Job, Means, Pretraining, Testing, mean_dice, read_result
from volssl.compare import chosen_lr
from volssl.datasets import Case, CaseTable
from volssl.holdout import Seen, Shares


@dataclass(frozen=True)
class Study:
    """A study that may begin. shares: of each fold. seen: what the images hold, by case name; hashes alone are used."""

    out: Path
    plan: Plan
    table: CaseTable
    shares: tuple[Shares, ...]
    seen: Mapping[str, Seen]

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies."""
        return self.out / "cells" / cell.name

    def recipe(self, arm: Arm) -> Path:
        """Where an arm's pretraining recipe lies."""
        return self.out / "arms" / arm.name / "pretrain.yaml"

    def pretraining(self, arm: Arm, seed: int, fold: int) -> Path:
        """Where an arm's pretraining lies, perhaps another arm's with the same recipe. Args: seed: its own."""
        return self.out / "pretrainings" / arm.pretrained / f"seed_{seed}-fold_{fold}"

    def pretraining_seed(self, seed: int) -> int:
        """Which pretraining the fine-tunings of a seed start from."""
        return self.plan.design.seeds.index(seed) % self.plan.design.pretraining_seeds

    def weights(self, arm: Arm, seed: int, fold: int) -> Path | None:
        """The bundle a fine-tuning starts from; None: from scratch. It need not be there yet."""
        if arm.pretrain is None:
            return arm.bundle
        return self.pretraining(arm, self.pretraining_seed(seed), fold) / "bundle"

    def tuned_at(self, labels: int) -> tuple[int, ...]:
        """The numbers of labels whose validation chooses the learning rate for `labels`."""
        return self.plan.tuning.at or (labels,)

    def tuning(self, arm: Arm, labels: int, fold: int) -> dict[float, list[Cell]]:
        """The cells of the search that decides for `labels`: learning rate -> cells."""
        seeds = self.plan.design.seeds[: self.plan.tuning.seeds]
        at = self.tuned_at(labels)
        return {lr: [Cell(arm.name, n, seed, fold, lr) for n in at for seed in seeds] for lr in self.plan.tuning.lr}

    def is_tuning(self, cell: Cell) -> bool:
        """Whether a cell takes part in the search, and so has its validation cases scored."""
        wanted = cell.labels in (self.plan.tuning.at or self.plan.design.labels)
        return wanted and cell.seed in self.plan.design.seeds[: self.plan.tuning.seeds]

    def validation(self, cells: Collection[Cell]) -> list[float]:
        """Mean Dice of every validation case in the cells; empty unless all are done."""
        results = [read_result(self.folder(cell), RESULT) for cell in cells]
        return [value for result in results if result for value in mean_dice(result["validation"])] if all(results) else []

    def choice(self, arm: Arm, labels: int, fold: int, failed: Collection[str] = ()) -> float | None:
        """The learning rate chosen on the validation cases, or None while a cell of the search is open, or if all failed."""
        search = self.tuning(arm, labels, fold)
        done = {lr: self.validation(cells) for lr, cells in search.items()}
        if any(not done[lr] and not any(cell.name in failed for cell in cells) for lr, cells in search.items()):
            return None
        return chosen_lr(done)

    def drawn(self, fold: int, labels: int, seed: int) -> tuple[Case, ...]:
        """The labelled cases of a draw: the same for all arms, and inside that of more labels."""
        return tuple(labelled_share(self.shares[fold].pretrain, labels, seed))


def points(study: Study) -> Iterator[tuple[Arm, int, int]]:
    """Every arm, number of labels and fold."""
    for fold in range(len(study.shares)):
        for arm in study.plan.arms:
            for labels in study.plan.design.labels:
                yield arm, labels, fold


def ready(study: Study, means: Means, closed: Collection[str]) -> dict[str, Job]:
    """The jobs that can be done now, by name, arm after arm, so that the first ones can be compared before the last ones begin.

    Args: closed: names of those that failed, or are left for later, in this call.
    """
    jobs: dict[str, Job] = {}
    for arm, labels, fold in points(study):
        jobs |= _pretrainings(study, arm, fold, means)
        search = [cell for cells in study.tuning(arm, labels, fold).values() for cell in cells]
        lr = study.choice(arm, labels, fold, closed)
        final = [Cell(arm.name, labels, seed, fold, lr) for seed in study.plan.design.seeds] if lr is not None else []
        for cell in (*search, *final):
            if (job := _next(study, arm, cell, means, tested=cell in final)) is not None:
                jobs[cell.name] = job
    return {name: job for name, job in jobs.items() if name not in closed}


def _pretrainings(study: Study, arm: Arm, fold: int, means: Means) -> dict[str, Job]:
    if arm.pretrain is None or arm.pretrained != arm.name:
        return {}
    jobs: dict[str, Job] = {}
    hashes = tuple(digest for case in study.shares[fold].pretrain for digest in study.seen[case.case_id].hashes)
    for seed in range(study.plan.design.pretraining_seeds):
        out = study.pretraining(arm, seed, fold)
        if not (out / PRETRAINED).is_file():
            name = f"{arm.name}/pretraining-seed_{seed}-fold_{fold}"
            jobs[name] = Pretraining(out, study.recipe(arm), study.out / "stores" / f"fold_{fold}", seed, hashes, means)
    return jobs


def _next(study: Study, arm: Arm, cell: Cell, means: Means, *, tested: bool) -> Job | None:
    """The next job of a cell, or None: it waits for its pretraining, or is done."""
    out, shares = study.folder(cell), study.shares[cell.fold]
    if not (out / RESULT).is_file():
        weights = study.weights(arm, cell.seed, cell.fold)
        if weights is not None and arm.pretrain is not None and not (weights.parent / PRETRAINED).is_file():
            return None
        train = study.drawn(cell.fold, cell.labels, cell.seed)
        validation = shares.validation if study.is_tuning(cell) else ()
        return Fitting(cell, out, arm.finetune, weights, study.table, train, validation, means)
    if tested and not (out / TEST).is_file():
        return Testing(cell, out, study.table, shares.test, means)
    return None


def count_left(study: Study) -> dict[str, dict[str, int]]:
    """Per arm the pretrainings, fine-tunings of the search, further fine-tunings and test runs that are not done."""
    left: dict[str, dict[str, int]] = {arm.name: dict.fromkeys(("pretraining", "search", "further", "test"), 0) for arm in study.plan.arms}
    for fold in range(len(study.shares)):
        for arm in study.plan.arms:
            left[arm.name]["pretraining"] += len(_pretrainings(study, arm, fold, Means(1)))
    for arm in study.plan.arms:
        search = {cell for _, n, fold in points(study) for cells in study.tuning(arm, n, fold).values() for cell in cells}
        left[arm.name]["search"] += sum(not (study.folder(cell) / RESULT).is_file() for cell in search)
    for arm, labels, fold in points(study):
        lr = study.choice(arm, labels, fold)
        for seed in study.plan.design.seeds:
            cell = Cell(arm.name, labels, seed, fold, lr if lr is not None else study.plan.tuning.lr[0])
            fitted = study.is_tuning(cell) or (lr is not None and (study.folder(cell) / RESULT).is_file())
            left[arm.name]["further"] += not fitted
            left[arm.name]["test"] += not (lr is not None and (study.folder(cell) / TEST).is_file())
    return left
