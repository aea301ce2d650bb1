"""Verb finetune: a bundle's encoder, or none, -> a segmentation network trained on one fold's labelled cases and validated on the rest.

The step is in `fitting.train`; the rest is here. From scratch is the same run without weights. The number of steps is fixed and the
last (averaged) weights are kept: the held-out fold is looked at once, at the end, and chooses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volssl import recipe as recipes
from volssl.archive import write_nifti
from volssl.cases import Augmentation, Folds, LabelledPatches, Sampling, labelled_share
from volssl.checkpoints import Checkpoints, StopSignal
from volssl.components import Cleaning
from volssl.datasets import Case, CaseTable, Data, open_dataset, without_folders
from volssl.division import Division, divide
from volssl.evaluate import Evaluation, headline, judge_case, write_judged
from volssl.export import bundle
from volssl.files import BadInput, Outcome, check_out, claim_out, read_json, track, write_json
from volssl.fitting import Optimisation, Saving, kept, start, train
from volssl.intake import read_case
from volssl.journal import Journal, write_environment
from volssl.pictures import Overlay, overlay_png
from volssl.protocols.protocol import Pair, Score
from volssl.segment import Inference, Model, Preparation, write_model
from volssl.starting import Weights, first_weights, plan_of, same_voxels, taken, told_by_hand
from volssl.targets import check_regions
from volssl.volume import Volume


@dataclass(frozen=True)
class Options:
    """What the command line says about a run, beside recipe, data and out.

    Attributes: weights: bundle, or None for from scratch. fold: held out. labels: share (float) or count (int) of the training patients.
        seed: of first weights and draws. split: file of sides or "official", over the recipe's data.split. resume, overwrite: as
        everywhere. overrides: `key=value` over the recipe.
    """

    weights: Path | None = None
    fold: int = 0
    labels: float = 1.0
    seed: int = 0
    split: Path | None = None
    resume: bool = False
    overwrite: bool = False
    overrides: Sequence[str] = ()


PARTS = {
    "data": Data,
    "labels": dict[str, int] | None,
    "regions": dict[str, tuple[int, ...]] | None,
    "net": "nets",
    "preparation": Preparation,
    "weights": Weights,
    "folds": Folds,
    "sampling": Sampling,
    "augmentation": Augmentation,
    "optimisation": Optimisation,
    "inference": Inference,
    "cleaning": Cleaning,
    "evaluation": Evaluation,
    "saving": Saving,
}


DEFAULTS = Options()
CARDS = "By weights.preparation: card, the bundle's voxels went before `preparation`: what was used is in splits.json, weights.prepared."


def run(recipe: str | Path, *, data: Path, out: Path, options: Options = DEFAULTS) -> Outcome:
    """Fine-tune on the labelled folder `data` and leave a run folder with the model and its validation.

    Raises: BadInput: before `out` is touched for anything that cannot work; NotFinite: for a loss that is not finite.
    """
    out = Path(out)
    claim = {"resume": options.resume, "overwrite": options.overwrite}
    inputs = [Path(path) for path in (data, options.weights) if path is not None]
    check_out(out, **claim, inputs=inputs)
    values = told_by_hand(recipes.load(recipe, options.overrides, verb="finetune"), options.overrides)
    made = recipes.parse(values, PARTS, str(recipe))
    table = read_table(made, data)
    made["evaluation"].build().targets(table.labels, table.regions)  # what cannot be scored is told before hours of training
    division = divide(table, made["folds"], given=options.split or made["data"].split, fold=options.fold)
    chosen = labelled_share(division.train, options.labels, made["folds"].seed)
    splits = _splits(division, chosen, made, options)
    task = Task(without_folders(values), made, table, tuple(chosen), division.held_out, splits)
    model = fit(task, out=out, options=options, inputs=inputs)
    if isinstance(model, Outcome):
        return model
    return _validate(out, model, table, list(division.held_out), evaluation=made["evaluation"])


@dataclass(frozen=True)
class Task:
    """What a run is to learn.

    Attributes: values, made: the recipe as written and as parsed by PARTS. table: with the recipe's labels. train: cases to learn from.
        held_out: cases that are only checked. splits: what splits.json says, besides the checksum of the weights.
    """

    values: dict[str, Any]
    made: dict[str, Any]
    table: CaseTable
    train: tuple[Case, ...]
    held_out: tuple[Case, ...]
    splits: dict[str, Any]


def fit(task: Task, *, out: Path, options: Options, inputs: Sequence[Path] = ()) -> Model | Outcome:
    """Train on the task's cases and leave in `out` all but a validation; an unfinished Outcome where a signal stopped it.

    Args: options: weights, seed, resume and overwrite count here. inputs: what --overwrite must not delete.
    Raises: BadInput: before `out` is touched for anything that cannot work; NotFinite: for a loss that is not finite.
    """
    given = bundle.load_bundle(Path(options.weights)) if options.weights is not None else None
    made, plan = task.made, plan_of(task.made, task.table, given)
    net = first_weights(plan, given, made=made, seed=options.seed)
    prepared = {"preparation": plan.preparation, "sampling": made["sampling"]}
    patches = LabelledPatches(task.table, train=task.train, held_out=task.held_out, **prepared, seed=options.seed)
    if given is not None and plan.preparation.spacing_mm is None:
        same_voxels(patches.cases, made, given)
    claim_out(out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    splits = task.splits | {"notes": patches.notes} | taken(plan, net, given, made["weights"])
    claim_run(out, task.values, splits, resume=options.resume)
    current = start(plan, net, made, patches, seed=options.seed)
    checkpoints = Checkpoints(out, made["saving"].checkpoint_every, made["saving"].checkpoint_minutes)
    if options.resume and (state := checkpoints.load()) is not None:
        current.restore(state)
    write_environment(out, device=current.fabric.device, precision=str(current.fabric._precision.precision), seed=options.seed)
    with StopSignal() as stop, Journal(out, steps_done=current.steps_done) as journal:
        train(current, checkpoints, journal, stop)
    if current.steps_done < made["optimisation"].steps:
        return Outcome(out, message=f"stopped by a signal after step {current.steps_done}; continue with --resume", finished=False)
    model = Model(plan, kept(current))
    write_model(out, model)
    return model


def read_table(made: dict[str, Any], data: Path) -> CaseTable:
    """The cases of a folder with the labels of a parsed recipe. Raises: BadInput: as `open_dataset`, and labels at odds with the data."""
    return _labelled(open_dataset(Path(data), data=made["data"]), made["labels"], made["regions"])


def _labelled(table: CaseTable, labels: dict[str, int] | None, regions: dict[str, tuple[int, ...]] | None) -> CaseTable:
    """The table with the recipe's labels and regions, where it names some."""
    given = table.labels if labels is None else labels
    faults = [f"{name}: value must be 1 to 255 and its own; found {value}" for name, value in given.items() if not 1 <= value <= 255]
    if len(set(given.values())) != len(given) or not given:
        faults.append(f"every label must have its own value; found {given}")
    faults += [
        f"{name}: value must be the data set's, {table.labels[name]}; found {value}"
        for name, value in given.items()
        if table.labels.get(name, value) != value
    ]
    unknown = sorted(set(given.values()) - set(table.labels.values()))
    if unknown:
        faults.append(f"values must be among the data set's, {table.labels}; found {unknown}")
    if faults:
        raise BadInput("labels: " + "; ".join(faults))
    chosen = table.regions if regions is None else regions
    check_regions(given, chosen)
    return dataclasses.replace(table, labels=dict(sorted(given.items(), key=lambda item: item[1])), regions=chosen)


def _splits(division: Division, train: list[Case], made: dict[str, Any], options: Options) -> dict[str, Any]:
    def names(cases: Sequence[Case]) -> list[str]:
        return [case.case_id for case in cases]

    return {
        "fold": options.fold,
        "labels": options.labels,
        "seed": options.seed,
        "split": division.source,
        "split_seed": made["folds"].seed,
        "train": names(train),
        "validation": names(division.held_out),
        "test": names(division.test),
        "left_out": sorted({*names(division.left_out), *made["data"].leave_out}),
        "folds": [names(fold) for fold in division.folds],
    }


def claim_run(out: Path, values: dict[str, Any], splits: dict[str, Any], *, resume: bool, verb: str = "finetune") -> None:
    """Write recipe.yaml and splits.json into a claimed folder. Raises: BadInput: --resume of another run, or of no run."""
    if resume and any(out.iterdir()) and not (out / "recipe.yaml").exists():
        raise BadInput(f"--resume {out}: must be a run that {verb} began, or empty; found no recipe.yaml in it; choose another folder")
    if resume and (out / "recipe.yaml").exists() and (out / "splits.json").exists():
        before = recipes.load(out / "recipe.yaml", verb=verb)
        changed = sorted(key for key in before.keys() | values.keys() if before.get(key) != values.get(key) and key != "saving")
        told = read_json(out / "splits.json")
        changed += sorted(key for key in splits if told.get(key) != splits[key])
        if changed:
            raise BadInput(
                f"--resume: recipe, data and options must be those the run began with; found other values under {', '.join(changed)}; "
                "start a new run"
            )
    by_card = splits.get("weights", {}).get("preparation") == "card"
    recipes.save(values, out / "recipe.yaml", verb=verb, remark=CARDS if by_card else "")
    write_json(out / "splits.json", splits)


def _validate(out: Path, model: Model, table: CaseTable, held_out: list[Case], *, evaluation: Evaluation) -> Outcome:
    """Segment the held-out fold on its own grids; leave label maps, scores and pictures."""
    protocol, judged = evaluation.build(), []
    targets = protocol.targets(table.labels, table.regions)
    for number, case in enumerate(track(held_out, total=len(held_out), label="validate")):
        image, reference = read_case(case, table)
        predicted = model.label_map(image)
        write_nifti(out / "validation" / f"{case.case_id}.nii.gz", predicted, image.grid, np.uint8)
        pair = Pair(case.case_id, Volume(predicted[None], image.grid), reference, targets)
        judged.append(judge_case(pair, protocol))
        overlay = overlay_of(image, pair, scores=judged[-1].rows)
        # A picture goes into reports that are passed on: it bears the case's number in splits.json, not its name.
        overlay_png(out / "pictures" / f"overlay_{number:04d}.png", overlay, title=f"case {number}")
    summary = write_judged(out / "validation", judged, protocol, evaluation.protocol)
    return Outcome(out, message=f"{headline(summary)} over {len(held_out)} held-out cases and {len(targets)} labels")


def overlay_of(image: Volume, pair: Pair, *, scores: Sequence[Score]) -> Overlay:
    """One segmented case as a picture shows it: RAS+, with its scores; of several channels the last (FLAIR of BraTS)."""
    turned = image.reoriented("RAS")
    return Overlay(
        image_XYZ=turned.array_CXYZ[-1],
        reference_XYZ=pair.reference.reoriented("RAS").array_CXYZ[0],
        predicted_XYZ=pair.predicted.reoriented("RAS").array_CXYZ[0],
        spacing_mm=turned.grid.spacing_mm,
        targets=pair.targets,
        dice={score.label: score.value for score in scores if score.metric == "dice"},
    )
