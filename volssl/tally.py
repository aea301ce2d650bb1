"""What the cells of a study hold, put together: results.csv, a row per cell, test case and label; summary.json, what the page shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from volssl.arms import SCRATCH, Arm
from volssl.cells import PRETRAINED, RESULT, TEST, Cell, mean_dice, read_result
from volssl.compare import difference, mean_of, saved, verdict
from volssl.files import write_csv, write_json
from volssl.holdout import known_images
from volssl.page import without_paths
from volssl.rounds import Study, points
from volssl.targets import targets_of

COLUMNS = ("arm", "labels", "seed", "fold", "lr", "case", "label", "metric", "value", "note")
FAILURES = ("job", "reason")
MEAN = "mean over labels"


def tally(study: Study, failed: Mapping[str, str]) -> dict[str, Any]:
    """Write results.csv, failures.csv and summary.json; return the summary. failed: reasons by the name of the job, of this call."""
    tested = _tested(study, failed)
    write_csv(study.out / "results.csv", _rows(study, tested), COLUMNS)
    write_csv(study.out / "failures.csv", [{"job": job, "reason": failed[job]} for job in sorted(failed)], FAILURES)
    summary = {
        "kind": "study",
        "complete": len(tested) == sum(len(study.plan.design.seeds) for _ in points(study)),
        "cells": {"tested": len(tested), "planned": sum(len(study.plan.design.seeds) for _ in points(study))},
        "design": _design(study),
        "arms": [_arm(study, arm, tested, failed) for arm in study.plan.arms],
        "tuning": _tuning(study, failed),
        "failures": [{"job": job, "reason": failed[job]} for job in sorted(failed)],
        "hours": _hours(study),
        "pictures": [],
    }
    write_json(study.out / "summary.json", summary)
    return summary


Tested = dict[tuple[str, int, int, int], tuple[Cell, list[dict[str, Any]]]]  # (arm, labels, fold, seed) -> cell and its rows


def _tested(study: Study, failed: Mapping[str, str]) -> Tested:
    found: Tested = {}
    for arm, labels, fold in points(study):
        lr = study.choice(arm, labels, fold, failed)
        for seed in study.plan.design.seeds if lr is not None else ():
            assert lr is not None
            cell = Cell(arm.name, labels, seed, fold, lr)
            if (result := read_result(study.folder(cell), TEST)) is not None:
                found[arm.name, labels, fold, seed] = cell, result["test"]
    return found


def _rows(study: Study, tested: Tested) -> list[dict[str, Any]]:
    return [
        {
            "arm": cell.arm,
            "labels": cell.labels,
            "seed": cell.seed,
            "fold": cell.fold,
            "lr": f"{cell.lr:g}",
            **{key: row[key] for key in ("case", "label", "metric", "note")},
            "value": f"{row['value']:.6f}",
        }
        for cell, rows in (tested[key] for key in sorted(tested))
        for row in rows
    ]


def scores(study: Study, tested: Tested, arm: str, labels: int, *, label: str | None = None) -> np.ndarray:
    """Dice (seeds, cases) of an arm at a number of labels, the cases of all folds in a row; NaN where a seed lacks a fold.

    Args: label: one label; else each case's mean over them.
    """
    by_seed = []
    for seed in study.plan.design.seeds:
        folds = []
        for fold, shares in enumerate(study.shares):
            _, rows = tested.get((arm, labels, fold, seed), (None, []))
            chosen = [row for row in rows if label is None or row["label"] == label]
            folds += mean_dice(chosen) if chosen else [np.nan] * len(shares.test)
        by_seed.append(folds)
    return np.array(by_seed, dtype=float)


def folds_of(study: Study) -> np.ndarray:
    """The fold of every column of `scores`."""
    return np.concatenate([np.full(len(shares.test), fold) for fold, shares in enumerate(study.shares)])


def _arm(study: Study, arm: Arm, tested: Tested, failed: Mapping[str, str]) -> dict[str, Any]:
    design, folds_C = study.plan.design, folds_of(study)
    scratch = {n: scores(study, tested, SCRATCH, n) for n in design.labels}
    at = []
    for labels in design.labels:
        own_SC = scores(study, tested, arm.name, labels)
        gain = difference(own_SC, scratch[labels], folds_C) if arm.name != SCRATCH else {}
        names = targets_of(study.table.labels, study.table.regions)
        at.append(
            {
                "labels": labels,
                "lr": [study.choice(arm, labels, fold, failed) for fold in range(len(study.shares))],
                **mean_of(own_SC, folds_C),
                "by_label": {name: mean_of(scores(study, tested, arm.name, labels, label=name), folds_C).get("mean") for name in names},
                "gain": gain,
                "pays": verdict(gain, design.worth) if arm.name != SCRATCH else None,
                "saved": saved(own_SC, scratch, folds_C) if arm.name != SCRATCH else {},
            }
        )
    return {"name": arm.name, **_about(study, arm), "at": at}


def _about(study: Study, arm: Arm) -> dict[str, Any]:
    known = known_images(arm.bundle, arm.images) if arm.bundle is not None else None
    overlap = "unknown" if arm.bundle is not None and known is None else "none"
    start = "nothing: random first weights" if arm.name == SCRATCH else "a given bundle"
    if arm.pretrain is not None:
        start = f"{arm.pretrain['training'].get('steps', 'the default')} steps on the unlabelled share"
        start += f", those of {arm.pretrained}" if arm.pretrained != arm.name else ""
    return {"start": start, "overlap": overlap, "own": without_paths(_flat(arm.own)), "pretrain": _differing(study, arm)}


def _differing(study: Study, arm: Arm) -> str:
    """What an arm's pretraining sets for itself."""
    written = (study.plan.values["arms"][arm.name] or {}).get("pretrain") or {}
    return without_paths(_flat(written))


def _flat(values: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        parts.append(_flat(value, f"{prefix}{key}.") if nested else f"{prefix}{key} = {value}")
    return ", ".join(parts)


def _design(study: Study) -> dict[str, Any]:
    design, first = study.plan.design, study.shares[0]
    return {
        "labels": list(design.labels),
        "seeds": list(design.seeds),
        "folds": design.folds,
        "pretraining_seeds": design.pretraining_seeds,
        "worth": design.worth,
        "lr": list(study.plan.tuning.lr),
        "tuning_seeds": study.plan.tuning.seeds,
        "tuned_at": list(study.plan.tuning.at),
        "cases": {part: len(names) for part, names in first.names().items()},
        "targets": list(targets_of(study.table.labels, study.table.regions)),
        "steps": study.plan.arms[0].finetune.get("optimisation", {}).get("steps"),
        "threads": design.threads,
        "quick": design.quick,
        "develop": bool(study.plan.split.develop),
    }


def _tuning(study: Study, failed: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for fold in range(len(study.shares)):
        for arm in study.plan.arms:
            for labels in (None,) if study.plan.tuning.at else study.plan.design.labels:
                rows.append(_search(study, arm, labels, fold, failed))
    return rows


def _search(study: Study, arm: Arm, labels: int | None, fold: int, failed: Mapping[str, str]) -> dict[str, Any]:
    at = labels if labels is not None else study.plan.design.labels[0]
    found = {lr: study.validation(cells) for lr, cells in study.tuning(arm, at, fold).items()}
    told = [{"lr": lr, "dice": float(np.mean(values)) if values else None} for lr, values in found.items()]
    chosen = study.choice(arm, at, fold, failed)
    return {"arm": arm.name, "labels": labels, "fold": fold, "tried": told, "chosen": chosen, "at_end": _at_end(chosen, found)}


def _at_end(chosen: float | None, tried: Collection[float]) -> bool:
    """Whether a learning rate beyond those tried might have been better; two have no middle, so they tell nothing of it."""
    return chosen is not None and len(tried) > 2 and chosen in (min(tried), max(tried))


def _hours(study: Study) -> list[dict[str, Any]]:
    """Measured hours per arm: pretraining, the search, what the search did not have to do again, and the test runs."""
    return [{"arm": arm.name, **_hours_of(study, arm)} for arm in study.plan.arms]


def _hours_of(study: Study, arm: Arm) -> dict[str, float]:
    hours: dict[str, float] = dict.fromkeys(("pretraining", "search", "further", "test"), 0.0)
    for path in sorted((study.out / "pretrainings" / arm.name).glob(f"*/{PRETRAINED}")):
        hours["pretraining"] += (read_result(path.parent, PRETRAINED) or {})["seconds"] / 3600
    for path in sorted((study.out / "cells" / arm.name).glob(f"*/{RESULT}")):
        result = read_result(path.parent, RESULT) or {}
        hours["search" if result["validation"] else "further"] += result["seconds"] / 3600
        hours["test"] += (read_result(path.parent, TEST) or {"seconds": 0.0})["seconds"] / 3600
    return hours


def telling(summary: Mapping[str, Any]) -> list[str]:
    """The answer in plain sentences, one per number of labels; before those of a quick trial, that they mean nothing; after them, which
    arms chose at an end of the grid of learning rates."""
    warning = ["A quick trial with --quick: the answers below mean nothing."] if summary["design"].get("quick") else []
    ends = sorted({row["arm"] for row in summary["tuning"] if row["at_end"]})
    narrow = [f"tuning.lr may be too narrow: {', '.join(ends)} chose the lowest or highest learning rate tried"] if ends else []
    return warning + [_sentence(summary, place, labels) for place, labels in enumerate(summary["design"]["labels"])] + narrow


def _sentence(summary: Mapping[str, Any], place: int, labels: int) -> str:
    others: Sequence[Mapping[str, Any]] = [arm for arm in summary["arms"] if arm["name"] != SCRATCH]
    by_answer: dict[str, list[str]] = {}
    for arm in others:
        by_answer.setdefault(arm["at"][place]["pays"], []).append(arm["name"])
    return f"With {labels} labelled cases: " + "; ".join(f"{answer}: {', '.join(names)}" for answer, names in sorted(by_answer.items()))


def case_gains(study: Study, arm: str, labels: int) -> list[tuple[int, float]]:
    """Test cases of the first fold and their mean gain over the seeds, from the least to the greatest."""
    tested = _tested(study, {})
    gains_SC = scores(study, tested, arm, labels) - scores(study, tested, SCRATCH, labels)
    gains_C = np.nanmean(gains_SC, 0)[: len(study.shares[0].test)]
    return [(int(number), float(gains_C[number])) for number in np.argsort(gains_C, kind="stable")]
