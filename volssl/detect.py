"""Verb detect: which candidates are nodules (LUNA16's false-positive reduction), by an encoder and a linear head on its pooled maps.

Learns from the candidates of the training scans and scores those of the held-out ones. The number of steps is fixed and the last
weights are kept: the held-out scans choose nothing. With `model` a finished run scores new candidates, without labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from volssl import recipe as recipes
from volssl.candidate_boxes import Batch, CandidateBoxes, Changes, Places, read_places
from volssl.candidates import References, read_references
from volssl.cases import labelled_share
from volssl.checkpoints import Checkpoints, StopSignal, check_finite
from volssl.classifier import COLUMNS, PARTS, CandidateNet, autocast, first_net, rows_of, scores, unplaced, write_classifier
from volssl.datasets import Case, CaseTable, Data, luna16, without_folders
from volssl.division import divide
from volssl.draws import Draws
from volssl.evaluate import headline, write_judged
from volssl.export import bundle
from volssl.files import BadInput, Outcome, check_out, claim_out, track, write_csv
from volssl.finetune import Options, claim_run
from volssl.froc import Candidates, Findings, Scan
from volssl.journal import Clock, Journal, write_environment
from volssl.protocols.luna16 import Luna16
from volssl.schedule import warmup_cosine
from volssl.screening import screen

KITS = ("evaluationScript/annotations", ".")  # folders of the data with annotations.csv, the challenge's own first
DEFAULTS = Options()
OF_LEARNING = ("weights", "fold", "labels", "seed", "split", "resume")  # options that scoring has no use for


def run(recipe: str | Path | None = None, *, data: Path, out: Path, model: Path | None = None, options: Options = DEFAULTS) -> Outcome:
    """Learn from the candidates of LUNA16's folder `data` and leave a run folder with the model and the held-out candidates' scores.

    Args: model: in place of a recipe, a finished run whose classifier scores the candidates of `data`; see `screening.screen`.
    Raises: BadInput: before `out` is touched for anything that cannot work; NotFinite: for a loss that is not finite.
    """
    if (recipe is None) == (model is None):
        raise BadInput(
            f"detect: either --recipe (to learn) or --model (a run, to score) must be given; found {'both' if recipe else 'neither'}"
        )
    if model is not None:
        if odd := [name for name in OF_LEARNING if getattr(options, name) != getattr(DEFAULTS, name)]:
            raise BadInput(f"--model: nothing is learnt, so no --{', --'.join(odd)} may be given")
        return screen(Path(model), data=data, out=out, overwrite=options.overwrite, overrides=options.overrides)
    assert recipe is not None
    out, root = Path(out), Path(data)
    claim = {"resume": options.resume, "overwrite": options.overwrite}
    inputs = [Path(path) for path in (data, options.weights) if path is not None]
    check_out(out, **claim, inputs=inputs)
    values = recipes.load(recipe, options.overrides, verb="detect")
    made = recipes.parse(values, PARTS, str(recipe))
    table = _scans(root, made["data"])
    division = divide(table, made["folds"], given=options.split or made["data"].split, fold=options.fold)
    train = labelled_share(division.train, options.labels, made["folds"].seed)
    places = read_places(root / made["boxes"].candidates, [case.case_id for case in (*train, *division.held_out)])
    references = _references(root)
    given = bundle.load_bundle(Path(options.weights)) if options.weights is not None else None
    net = first_net(made, given, seed=options.seed)
    kept = {"preparation": made["preparation"], "boxes": made["boxes"]}
    boxes = CandidateBoxes(train, places, references.findings, **kept, seed=options.seed)
    claim_out(out, **claim, inputs=inputs)
    splits = _splits(division, train, options, digest=given.card["sha256"] if given else None)
    claim_run(out, _without_folders(values), splits, resume=options.resume, verb="detect")
    if not learn(net, boxes, made, out=out, options=options):
        return Outcome(out, message="stopped by a signal; continue with --resume", finished=False)
    write_classifier(out, net, made)
    return validate(out, net, division.held_out, places=places, findings=references.findings, made=made)


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    boxes = values.get("boxes") or {}
    named = {"boxes": {**boxes, "candidates": Path(boxes["candidates"]).name}} if "candidates" in boxes else {}
    return without_folders(values) | named


def _scans(root: Path, data: Data) -> CaseTable:
    if not root.is_dir() or not luna16.recognises(root):
        raise BadInput(f"data {root}: must be laid out as LUNA16 (subset0 ... with .mhd files, or .mhd files beside annotations.csv)")
    if data.layout not in (None, "luna16") or data.nodules is not None or data.label_values:
        raise BadInput("data: detect reads LUNA16 and no masks: layout, nodules and label_values must be left out")
    table = luna16.find_cases(root)
    cases = tuple(case for case in table.cases if case.case_id not in data.leave_out)
    return CaseTable(cases, table.labels, table.channels, folds={case.case_id: table.folds[case.case_id] for case in cases if table.folds})


def _references(root: Path) -> References:
    kit = next((root / name for name in KITS if (root / name / "annotations.csv").is_file()), None)
    if kit is None:
        raise BadInput(f"data {root}: must hold annotations.csv, or the challenge's {KITS[0]}; found neither")
    return read_references(kit)


def _splits(division: Any, train: Sequence[Case], options: Options, *, digest: str | None) -> dict[str, Any]:
    sides = {"train": train, "validation": division.held_out, "test": division.test, "left_out": division.left_out}
    names = {side: [case.case_id for case in cases] for side, cases in sides.items()}
    chosen = {"fold": options.fold, "labels": options.labels, "seed": options.seed, "split": division.source}
    return {**chosen, **names, "weights_sha256": digest}


def learn(net: CandidateNet, boxes: CandidateBoxes, made: Mapping[str, Any], *, out: Path, options: Options) -> bool:
    """The training loop; False where a signal stopped it. Raises: NotFinite."""
    settings, saving = made["learning"], made["saving"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device, memory_format=torch.channels_last_3d).train()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(net.parameters(), settings.lr, weight_decay=settings.weight_decay)
    checkpoints, done = Checkpoints(out, saving.checkpoint_every, saving.checkpoint_minutes), 0
    if options.resume and (state := checkpoints.load()) is not None:
        done = _restored(net, optimizer, state)
    write_environment(out, device=device, precision=settings.precision, seed=options.seed)
    clock, total = Clock(), settings.steps

    def state_after(steps: int) -> dict[str, Any]:
        return {"version": 1, "steps_done": steps, "net": net.state_dict(), "optimizer": optimizer.state_dict()}

    with StopSignal() as stop, Journal(out, steps_done=done) as journal:
        for step in track(range(done, total), total=total, label="detect", start=done):
            with clock.waiting():
                batch = boxes.batch(step, device)
            lr = settings.lr * warmup_cosine((step + 1) / total, warmup=settings.warmup)
            numbers = _step(net, optimizer, batch, made, step=step, lr=lr, seed=options.seed)
            clock.samples, done = clock.samples + len(batch.y_B), step + 1
            if done % saving.log_every == 0 or done == total:
                journal.log(step=done, progress=done / total, **clock.read(), **numbers, lr=lr)
            if checkpoints.due(done):
                checkpoints.save(state_after(done))
            if stop.asked:
                break
    checkpoints.save(state_after(done))
    return done == total


def _restored(net: CandidateNet, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> int:
    try:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise BadInput(f"--resume: the checkpoint must be of the same recipe; it does not fit: {error}") from None
    return int(state["steps_done"])


def _step(
    net: CandidateNet, optimizer: torch.optim.Optimizer, batch: Batch, made: Mapping[str, Any], *, step: int, lr: float, seed: int
) -> dict[str, float]:
    changes: Changes = made["changes"]
    numbers = changes.draw(Draws(seed, step, 0, len(batch.y_B), "detect"))
    x = made["preparation"].patch(changes.apply(batch, numbers, made["boxes"].patch_vox))
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast(x.device, made["learning"].precision):
        loss = F.binary_cross_entropy_with_logits(net(x.contiguous(memory_format=torch.channels_last_3d)), batch.y_B)
    told = check_finite({"loss/classes": loss}, step=step, scans=batch.case_ids)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), made["learning"].clip)
    told |= check_finite({"grad_norm": norm}, step=step, scans=batch.case_ids)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return told


def validate(
    out: Path,
    net: CandidateNet,
    held_out: Sequence[Case],
    *,
    places: Mapping[str, Places],
    findings: Mapping[str, Findings],
    made: Mapping[str, Any],
) -> Outcome:
    """Score the held-out scans' candidates: candidates.csv as the challenge takes it, FROC, CPM and AUC in summary.json."""
    rows, failures, judged, protocol = [], [], [], Luna16()
    for case in track(held_out, total=len(held_out), label="validate"):
        of = places[case.case_id]
        try:
            probability = scores(net, case, of.at_N3, made=made)
        except BadInput as error:
            # Its nodules count as missed: a scan that cannot be read never improves the figures.
            failures.append({"case": case.case_id, "reason": unplaced(str(error), case)})
            of, probability = Places(np.zeros((0, 3)), np.zeros(0, np.uint8)), np.zeros(0)
        rows += rows_of(case, of.at_N3, probability)
        scan = Scan(
            case.case_id, Candidates(of.at_N3, probability.astype(np.float64), of.classes_N), findings.get(case.case_id, Findings())
        )
        judged.append(protocol.judge_scan(scan))
    write_csv(out / "validation" / "candidates.csv", rows, COLUMNS)
    if failures:
        write_csv(out / "failures.csv", failures, ("case", "reason"))
    summary = write_judged(out / "validation", judged, protocol, "luna16")
    auc = summary["metrics"]["nodule"]["auc"]["mean"]
    told = "no AUC, as one class is absent" if auc is None or math.isnan(auc) else f"AUC {auc:.4f}"
    return Outcome(out, failed=len(failures), message=f"{headline(summary)}, {told} over {len(rows)} candidates of {len(held_out)} scans")
