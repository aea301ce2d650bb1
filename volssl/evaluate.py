"""Verb evaluate: label maps against references, one row per case and label, and a summary with bootstrap intervals.

Dice = 2 |P and R| / (|P| + |R|), per case and label, on the reference's own voxels. Rule for empty cases (protocol `dice`): a label absent
from both maps scores 1, from one 0, both noted. No case leaves the mean: a case without a prediction scores 0 on every label and is failed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volssl import recipe as recipes
from volssl.archive import read_label
from volssl.datasets import SUFFIXES, stem, whole_numbers
from volssl.draws import generator
from volssl.files import BadInput, Outcome, claim_out, track, write_csv, write_json
from volssl.volume import Volume

PROTOCOL = "dice"
COLUMNS = ("case", "label", "metric", "value", "note")
MEAN = "mean"  # region of the summary: each case's mean over the labels
RESAMPLINGS = 2000


@dataclass(frozen=True)
class Score:
    """One row of cases.csv."""

    case: str
    label: str
    metric: str
    value: float
    note: str = ""


def dice(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, str]:
    """Dice of two boolean masks of one shape, in [0, 1], and a note on how an empty one was scored."""
    predicted_vox, reference_vox = int(predicted.sum()), int(reference.sum())
    if predicted_vox + reference_vox == 0:
        return 1.0, "absent from reference and prediction: 1 by rule"
    if predicted_vox == 0:
        return 0.0, "missed: absent from the prediction"
    if reference_vox == 0:
        return 0.0, "absent from the reference, but predicted"
    return 2 * int((predicted & reference).sum()) / (predicted_vox + reference_vox), ""


def score_case(case: str, predicted: Volume, reference: Volume, labels: Mapping[str, int]) -> list[Score]:
    """The scores of one case.

    Args: predicted, reference: label maps of one channel. labels: name -> value.
    Raises: BadInput: grids that differ, or a value that no label has.
    """
    if not predicted.grid.almost_equal(reference.grid):
        raise BadInput(
            f"{case}: prediction and reference must lie on one grid; found {describe(predicted)} and {describe(reference)}; "
            "predict on the image's own grid"
        )
    faults = [
        f"{which} holds the values {unknown}"
        for which, volume in (("prediction", predicted), ("reference", reference))
        if (unknown := unknown_values(volume.array_CXYZ, labels))
    ]
    if faults:
        raise BadInput(f"{case}: every value must be 0 or one of {dict(labels)}; {', '.join(faults)}")
    rows = []
    for name, value in labels.items():
        number, note = dice(predicted.array_CXYZ[0] == value, reference.array_CXYZ[0] == value)
        rows.append(Score(case, name, "dice", number, note))
    return rows


def describe(volume: Volume) -> str:
    """Shape, spacing and origin of a volume, for errors."""
    grid = volume.grid
    sides = "x".join(map(str, grid.shape_vox))
    return f"{sides} at {tuple(round(s, 3) for s in grid.spacing_mm)} mm {grid.orientation} from {np.round(grid.affine[:3, 3], 2).tolist()}"


def unknown_values(array: np.ndarray, labels: Mapping[str, int]) -> list[int]:
    """Values of a label map that are neither 0 nor a label's."""
    return sorted({int(value) for value in np.unique(array)} - {0, *labels.values()})


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """The summary of contract.md; `sd` is the sample's, `ci95` a percentile bootstrap over cases with a fixed seed."""
    by_region: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        by_region.setdefault(score.label, {}).setdefault(score.metric, {})[score.case] = score.value
    cases = sorted({score.case for score in scores})
    per_case = {
        metric: {case: statistics.fmean(values[metric][case] for values in by_region.values()) for case in cases}
        for metric in _metrics(scores)
    }
    by_region[MEAN] = per_case
    metrics = {
        region: {metric: _interval([values[case] for case in sorted(values)]) for metric, values in of_region.items()}
        for region, of_region in by_region.items()
    }
    return {"protocol": PROTOCOL, "n_cases": len(cases), "metrics": metrics}


def _metrics(scores: Sequence[Score]) -> list[str]:
    return sorted({score.metric for score in scores})


def _interval(values: Sequence[float]) -> dict[str, Any]:
    array = np.array(values)
    drawn = generator(0, "bootstrap").integers(len(array), size=(RESAMPLINGS, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), (0.025, 0.975))
    return {
        "mean": float(array.mean()),
        "sd": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "ci95": [float(low), float(high)],
        "n": len(array),
    }


def write_scores(out: Path, scores: Sequence[Score]) -> dict[str, Any]:
    """Write cases.csv and summary.json into `out` and return the summary."""
    write_csv(out / "cases.csv", [vars(score) | {"value": f"{score.value:.6f}"} for score in scores], COLUMNS)
    summary = summarise(scores)
    write_json(out / "summary.json", summary)
    return summary


def run(predictions: Path, references: Path, *, recipe: str | Path, out: Path, overwrite: bool = False) -> Outcome:
    """Score a folder of label maps against a folder of references with the same file names (the format may differ).

    Args: recipe: of finetune; its `labels` name the values. Where they are null, every value of the references is a label of its own name.
    Returns: failed counts the cases that could not be scored: a missing prediction or reference, another grid, an unknown value.
    Raises: BadInput: a folder without label maps, two without a common name, or a recipe that is none of finetune's.
    """
    labels = _labels_of(recipe)
    predicted, expected = _maps(Path(predictions), "predictions"), _maps(Path(references), "references")
    if not predicted.keys() & expected.keys():
        raise BadInput(
            "predictions and references: a case must bear the same name in both; found none that does, but such as "
            f"{min(predicted)} and {min(expected)}; rename the files"
        )
    if labels is None:
        labels = _all_values(list(expected.values()))
    out = claim_out(Path(out), overwrite=overwrite, inputs=(predictions, references))
    scores: list[Score] = []
    failures: list[dict[str, str]] = []
    names = sorted(predicted.keys() | expected.keys())
    for case in track(names, total=len(names), label="evaluate"):
        try:
            scores += _score_files(case, predicted.get(case), expected.get(case), labels)
        except BadInput as error:
            failures.append({"case": case, "reason": _without_paths(str(error), predicted, expected)})
            scores += [Score(case, name, "dice", 0.0, "not scored, 0 by rule: see failures.csv") for name in labels if case in expected]
    write_csv(out / "failures.csv", failures, ("case", "reason"))
    summary = write_scores(out, scores) if scores else {"metrics": {}}
    mean = summary["metrics"].get(MEAN, {}).get("dice", {}).get("mean", 0.0)
    return Outcome(out, failed=len(failures), message=f"mean Dice {mean:.4f} over {len(expected)} cases and {len(labels)} labels")


def _labels_of(recipe: str | Path) -> dict[str, int] | None:
    labels = recipes.load(recipe, verb="finetune").get("labels")
    if labels is not None and not isinstance(labels, dict):
        raise BadInput(f"recipe {recipe}: labels must be a mapping of names to values, or null; found {labels!r}")
    if labels is None:
        return None
    values = whole_numbers(labels, f"recipe {recipe}: labels")
    if not values or len(set(values.values())) != len(values):
        raise BadInput(f"recipe {recipe}: labels must be names with values of their own above 0; found {labels}")
    return values


def _score_files(case: str, predicted: Path | None, expected: Path | None, labels: Mapping[str, int]) -> list[Score]:
    if predicted is None or expected is None:
        raise BadInput(f"{case}: must have a prediction and a reference; the {'reference' if predicted else 'prediction'} is missing")
    return score_case(case, read_label(predicted), read_label(expected), labels)


def _maps(folder: Path, what: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise BadInput(f"{what} {folder}: must be a folder of label maps; found {'a file' if folder.exists() else 'nothing there'}")
    files = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")]
    if not files:
        raise BadInput(f"{what} {folder}: must hold label maps ({', '.join(SUFFIXES)}); found none")
    twice = sorted({stem(path) for path in files if sum(stem(path) == stem(other) for other in files) > 1})
    if twice:
        raise BadInput(f"{what} {folder}: one label map per case must hold; found several for {', '.join(twice)}")
    return {stem(path): path for path in files}


def _all_values(references: Sequence[Path]) -> dict[str, int]:
    values = sorted({int(value) for path in references for value in np.unique(read_label(path).array_CXYZ)} - {0})
    if not values:
        raise BadInput("references: must hold at least one label; found only 0; or name the labels in the recipe")
    return {str(value): value for value in values}


def _without_paths(text: str, *tables: Mapping[str, Path]) -> str:
    # An artefact holds case names, never where files lie.
    for path in (path for table in tables for path in table.values()):
        text = text.replace(str(path), path.name)
    return text
