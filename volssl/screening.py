"""A trained classifier on new candidates: a folder of scans and a table of places -> the probability of each; no labels are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from volssl.candidate_boxes import read_places
from volssl.classifier import COLUMNS, read_classifier, rows_of, scores, unplaced
from volssl.datasets import SUFFIXES, Case, alone, files_below, luna16, stem
from volssl.files import BadInput, Outcome, check_out, claim_out, read_json, tell, track, write_csv
from volssl.journal import write_environment

MAY_DIFFER = ("boxes.candidates", "data.leave_out", "scoring.batch", "scoring.flips", "learning.precision")


def screen(model: Path, *, data: Path, out: Path, overwrite: bool = False, overrides: Sequence[str] = ()) -> Outcome:
    """Score every candidate of the table in or beside the folder `data` with the classifier of the run `model`; leave candidates.csv.

    Args: data: LUNA16's folder, or any folder whose images, four deep, are called <seriesuid>; the table is the recipe's
        `boxes.candidates`, without need of a column `class`. overrides: of MAY_DIFFER.
    Returns: failed counts the scans that could not be scored (no image, one that cannot be read, a candidate outside of it), which
        failures.csv names; candidates.csv holds the others.
    Raises: BadInput: before `out` is touched: no finished run, no table, not one scan that could be scored.
    """
    model, root, out = Path(model), Path(data), Path(out)
    claim = {"overwrite": overwrite, "inputs": (model, root)}
    check_out(out, **claim)
    if odd := sorted({key for key in (given.partition("=")[0] for given in overrides) if key not in MAY_DIFFER}):
        raise BadInput(f"--model: only {', '.join(MAY_DIFFER)} may be set beside a trained model; found {', '.join(odd)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, made = read_classifier(model, overrides, device)
    images = _images(root)
    places = read_places(root / made["boxes"].candidates)
    named = [series for series in places if series not in made["data"].leave_out]
    _tell_what_was_learnt(model, named)
    rows, failures = [], []
    for series in track(named, total=len(named), label="detect"):
        try:
            if series not in images:
                raise BadInput(f"{series}: must have an image of that name in the folder; found none")
            case = Case(series, series, (images[series],), None)
            try:
                rows += rows_of(case, places[series].at_N3, np.asarray(scores(net, case, places[series].at_N3, made=made)))
            except BadInput as error:
                raise BadInput(unplaced(str(error), case)) from None
        except BadInput as error:
            failures.append({"case": series, "reason": str(error)})
    if not rows:
        told = "\n  ".join(failure["reason"] for failure in failures)
        raise BadInput(f"data {root}: not one of {len(named)} scans could be scored:\n  {told}")
    claim_out(out, **claim)
    write_environment(out, device=device, precision=made["learning"].precision, seed=0)
    write_csv(out / "candidates.csv", rows, COLUMNS)
    write_csv(out / "failures.csv", failures, ("case", "reason"))
    return Outcome(out, failed=len(failures), message=f"{len(rows)} candidates of {len(named) - len(failures)} scans")


def _images(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise BadInput(f"data {root}: must be a folder with scans; found {'a file' if root.exists() else 'nothing there'}")
    if luna16.recognises(root):  # its lung masks bear the scans' names
        return {case.case_id: case.images[0] for case in luna16.find_cases(root).cases}
    found: dict[str, list[Path]] = {}
    for path in files_below(root):
        if path.name.lower().endswith(SUFFIXES):
            found.setdefault(stem(path), []).append(path)
    return alone(found, root)


def _tell_what_was_learnt(model: Path, series: Sequence[str]) -> None:
    # Of scans that it has learnt from, a classifier's probabilities say nothing about scans that it has not.
    splits = model / "splits.json"
    if known := set(read_json(splits).get("train", ()) if splits.is_file() else ()) & set(series):
        tell(f"detect: {len(known)} of these {len(series)} scans are some that the model learnt from")
