"""Verb study: does pretraining pay? Arms (bundles, pretraining recipes, always scratch) x label counts x seeds x folds on one data set.

All arms get the same draws of labelled cases, the same steps and augmentation, and the same search for a learning rate on the validation
cases. The test cases are scored once, with the learning rate that was chosen. Whatever would spoil this is refused before the first step.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volssl import pools
from volssl import recipe as recipes
from volssl.arms import SCRATCH, Plan, faults_of, planned, shrunk
from volssl.cells import DONE, LATER, Cell, Job, Means, do, make_store
from volssl.costs import disk_faults, estimated, sentences
from volssl.datasets import without_folders
from volssl.evaluate import judge_case
from volssl.files import BadInput, Outcome, check_out, claim_out, read_json, tell, track, write_json
from volssl.finetune import PARTS as FINETUNE_PARTS
from volssl.finetune import overlay_of, read_table
from volssl.holdout import divided, foreign_overlaps, known_images, overlaps, seen_of
from volssl.intake import read_case
from volssl.pictures import overlay_png
from volssl.protocols.dice import Dice
from volssl.protocols.protocol import Pair
from volssl.rounds import Study, count_left, ready
from volssl.segment import read_model
from volssl.store import Store
from volssl.study_page import write_page
from volssl.tally import case_gains, tally, telling
from volssl.targets import targets_of
from volssl.volume import Volume

# Nobody waits for a study: a job may take a day.
DAY = pools.Means(minutes=24 * 60)


@dataclass(frozen=True)
class Options:
    """What the command line says beside recipe, data and out.

    Attributes: quick: shrink the recipe to minutes, to see that it runs. estimate: stop after the checks and the estimate. hours: begin no
        job after so many; 0: no bound. resume, overwrite: as everywhere. overrides: `key=value` over the recipe.
    """

    quick: bool = False
    estimate: bool = False
    hours: float = 0.0
    resume: bool = False
    overwrite: bool = False
    overrides: Sequence[str] = ()


DEFAULTS = Options()


def run(recipe: str | Path, *, data: Path, out: Path, means: pools.Means = DAY, options: Options = DEFAULTS) -> Outcome:
    """Run a study, or what is left of it, and leave results.csv, summary.json and report.html.

    Args: data: a labelled folder. out: the study. means: processes here, or a cluster that sees the same files.
    Returns: `failed` counts the jobs in failures.csv; not `finished` where jobs are left for --resume.
    Raises: BadInput: before `out` is touched, with all that would spoil the study or cannot work.
    """
    data, out, begun = Path(data).absolute(), Path(out).absolute(), time.time()
    inputs = [data]
    check_out(out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    values = recipes.load(recipe, options.overrides, verb="study")
    plan = planned(shrunk(values) if options.quick else values, str(recipe))
    study = _checked(plan, data, out, means)
    claim_out(out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    _same_study(study, resume=options.resume)
    if any(jobs for left in count_left(study).values() for jobs in left.values()):
        estimate = estimated(study, _stores(study), max(1, means.workers))
        write_json(out / "estimate.json", estimate)
        if options.estimate:
            return Outcome(out, message=sentences(estimate, means.workers), finished=False)
        tell(f"study: {sentences(estimate, means.workers)}")
    not_after = begun + 3600 * options.hours if options.hours else None
    closed = _work(study, means, Means(plan.design.threads, not_after))
    return _ended(study, closed)


def _checked(plan: Plan, data: Path, out: Path, means: pools.Means) -> Study:
    """The study, if nothing stands against it. Raises: BadInput: with everything that does."""
    made = recipes.parse(plan.arms[0].finetune, FINETUNE_PARTS, "finetune")
    table = read_table(made, data)
    complaints: list[str] = []
    try:
        shares = tuple(divided(table, plan.split, plan.design.folds))
    except BadInput as error:
        shares = ()
        complaints.append(str(error))
    least = min((len({case.patient_id for case in one.pretrain}) for one in shares), default=None)
    if least is not None and plan.design.labels[-1] > least:
        complaints.append(f"design.labels: must be at most the {least} patients of the pretraining share; found {plan.design.labels[-1]}")
    used = {case.case_id: case for one in shares for case in (*one.pretrain, *one.validation, *one.test)}
    seen, unusable = seen_of(table, [used[name] for name in sorted(used)] if shares else table.cases)
    complaints += unusable
    spacings = sorted({one.spacing_mm for one in seen.values()})
    complaints += faults_of(plan, table, spacings)
    for one in shares:
        complaints += overlaps(one, seen)
    for arm in plan.arms:
        known = _known(complaints, arm.bundle, arm.images)
        complaints += [fault for one in shares for fault in foreign_overlaps(one, seen, known, arm.name)]
    study = Study(out, plan, table, shares, seen)
    if not complaints:
        complaints += disk_faults(study, means.workers)
    if complaints:
        unique = list(dict.fromkeys(complaints))
        raise BadInput(f"the study cannot begin; {len(unique)} thing(s) to mend:\n  " + "\n  ".join(unique))
    return study


def _known(complaints: list[str], bundle: Path | None, images: Path | None) -> set[str]:
    try:
        return (known_images(bundle, images) if bundle is not None else None) or set()
    except BadInput as error:
        complaints.append(str(error))
        return set()


def _same_study(study: Study, *, resume: bool) -> None:
    out, values = study.out, _without_folders(study.plan.values)
    if resume and any(out.iterdir()) and not (out / "recipe.yaml").exists():
        raise BadInput(f"--resume {out}: must be a study that was begun, or empty; found no recipe.yaml in it; choose another folder")
    splits = [shares.names() for shares in study.shares]
    digests = {name: list(seen.hashes) for name, seen in sorted(study.seen.items())}
    if resume and (out / "recipe.yaml").exists() and (out / "splits.json").exists():
        before = recipes.load(out / "recipe.yaml", verb="study")
        changed = sorted(key for key in before.keys() | values.keys() if before.get(key) != values.get(key))
        told = read_json(out / "splits.json")
        changed += [name for name, now in (("folds", splits), ("images", digests)) if told[name] != now]
        if changed:
            raise BadInput(f"--resume: recipe and data must be those the study began with; found others under {', '.join(changed)}")
    recipes.save(values, out / "recipe.yaml", verb="study")
    write_json(out / "splits.json", {"folds": splits, "images": digests})
    for arm in study.plan.arms:
        recipes.save(without_folders(arm.finetune), out / "arms" / arm.name / "finetune.yaml", verb="finetune")
        if arm.pretrain is not None:
            recipes.save(arm.pretrain, study.recipe(arm), verb="pretrain")


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the folders of the files that it names: a study says nothing of where they were."""
    arms = {name: {**arm, **_names(arm, ("bundle", "images"))} for name, arm in ((n, a or {}) for n, a in values["arms"].items())}
    named = {"arms": arms, "split": {**values["split"], **_names(values["split"], ("file",))}}
    return {**values, **named, "finetune": without_folders(values["finetune"])}


def _names(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: Path(values[key]).name for key in keys if isinstance(values.get(key), str)}


def _stores(study: Study) -> list[Store]:
    """The unlabelled share of every fold as a store, where an arm is pretrained here."""
    if study.plan.prepare is None:
        return []
    return [
        make_store(study.out / "stores" / f"fold_{fold}", study.plan.prepare, table=study.table, cases=shares.pretrain, seen=study.seen)
        for fold, shares in enumerate(study.shares)
    ]


def _work(study: Study, means: pools.Means, how: Means) -> dict[str, str]:
    """Do all that can be done; the jobs that did not end well, with their reasons."""
    closed: dict[str, str] = {}
    left = sum(jobs for of_arm in count_left(study).values() for jobs in of_arm.values())
    for name, answer in track(_answers(study, means, how, closed), total=left, label="study"):
        if isinstance(answer, pools.Lost):
            answer = f"its process was lost: {answer.code}"
        if answer != DONE:
            closed[name] = answer
    return closed


def _answers(study: Study, means: pools.Means, how: Means, closed: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    begun: set[str] = set()
    for name, answer in pools.spread(do, _next_jobs(study, how, closed, begun), means, ahead=0):
        begun.discard(name)
        yield name, answer


def _next_jobs(study: Study, how: Means, closed: Collection[str], begun: set[str]) -> Iterator[tuple[str, tuple[Job]] | None]:
    # Looked for anew each time, as every job that ends makes room for others: a worker waits only where nothing else can be done.
    while jobs := ready(study, how, closed):
        name = next((name for name in jobs if name not in begun), None)
        if name is None:
            yield None
            continue
        begun.add(name)
        yield name, (jobs[name],)


def _ended(study: Study, closed: Mapping[str, str]) -> Outcome:
    failed = {name: reason for name, reason in closed.items() if reason != LATER}
    summary = tally(study, failed)
    summary["pictures"] = _pictures(study, summary) if summary["complete"] else []  # part of a study leads nowhere yet
    write_json(study.out / "summary.json", summary)
    write_page(study.out)
    told = "\n".join(telling(summary))
    finished = LATER not in closed.values()
    if not finished:
        told = f"{summary['cells']['tested']} of {summary['cells']['planned']} cells are done; go on with --resume\n" + told
    return Outcome(study.out, len(failed), told, finished=finished)


def _pictures(study: Study, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draw the test cases on which the leading arm gained most, the median and least, by scratch and by that arm."""
    place = len(study.plan.design.labels) // 2
    labels = study.plan.design.labels[place]
    gains = {arm["name"]: arm["at"][place]["gain"].get("mean") for arm in summary["arms"] if arm["name"] != SCRATCH}
    known = {name: gain for name, gain in gains.items() if gain is not None}
    if not known or not study.plan.design.overlays:
        return []
    leading = max(sorted(known), key=lambda name: known[name])
    order = case_gains(study, leading, labels)
    count = min(study.plan.design.overlays, len(order))
    chosen = sorted({round(place * (len(order) - 1) / max(1, count - 1)) for place in range(count)}, reverse=True)
    told = []
    for rank in chosen:
        number, gain = order[rank]
        files = {arm: _draw(study, arm, labels, number) for arm in (SCRATCH, leading)}
        told.append({"case": number, "gain": gain, "labels": labels, "files": files})
    return told


def _draw(study: Study, arm_name: str, labels: int, number: int) -> str:
    """Draw a test case of the first fold as the first seed segments it; the picture's place in the study."""
    arm = next(arm for arm in study.plan.arms if arm.name == arm_name)
    lr = study.choice(arm, labels, 0)
    assert lr is not None
    model = read_model(study.folder(Cell(arm.name, labels, study.plan.design.seeds[0], 0, lr)))
    image, reference = read_case(study.shares[0].test[number], study.table)
    predicted = Volume(model.label_map(image)[None], image.grid)
    pair = Pair(str(number), predicted, reference, targets_of(study.table.labels, study.table.regions))
    name = f"pictures/case_{number:04d}-{arm_name}-labels_{labels}.png"
    overlay = overlay_of(image, pair, scores=judge_case(pair, Dice()).rows)
    overlay_png(study.out / name, overlay, title=f"case {number}: {arm_name}, {labels} labels")
    return name
