"""Verb evaluate: predictions against references by a named protocol: one row per case, region and metric, and a summary with intervals.

Predictions are label maps, or for protocol `luna16` a table of candidates. No case leaves a mean: one that cannot be scored is failed and
gets the protocol's worst values. The protocols are on the shelf `protocols`; docs/evaluate.md has their rules.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from volssl import recipe as recipes
from volssl.archive import read_label
from volssl.candidates import References, candidates_of, is_findings, read_candidates, read_references
from volssl.datasets import Data, whole_numbers
from volssl.files import BadInput, Outcome, check_out, claim_out, read_json, tell, track, write_csv, write_json
from volssl.froc import Candidates, Findings, Scan
from volssl.intervals import mean_interval
from volssl.protocols.dice import Dice
from volssl.protocols.protocol import AbstractProtocol, Judged, Pair, Score, Targets, metric_of
from volssl.references import Reference, all_values, expected_of, label_maps
from volssl.targets import targets_of
from volssl.volume import Volume, describe

COLUMNS = ("case", "label", "metric", "value", "note")
MEAN = "mean"  # region of the summary: each case's mean over the regions
UNSCORED = "not scored, the worst value by rule: see failures.csv"


@dataclass(frozen=True)
class Evaluation:
    """What a recipe says of its evaluation. protocol: a name of the shelf `protocols`. settings: its arguments, by default its own."""

    protocol: str = "dice"
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> AbstractProtocol:
        """The protocol. Raises: BadInput: an unknown name or setting."""
        target = recipes.find("protocols", self.protocol)
        return target(**recipes.arguments(target, self.settings, "evaluation.settings"))


def score_case(case: str, predicted: Volume, reference: Volume, labels: Mapping[str, int]) -> list[Score]:
    """Dice of one case, a row per label. Args: labels: name -> value. Raises: BadInput: as `judge_case`."""
    return list(judge_case(Pair(case, predicted, reference, targets_of(labels, {})), Dice()).rows)


def judge_case(pair: Pair, protocol: AbstractProtocol) -> Judged:
    """What a protocol makes of one case. Raises: BadInput: grids that differ, or a value that no target has."""
    check_pair(pair)
    return protocol.judge(pair)


def check_pair(pair: Pair) -> None:
    """Raises: BadInput: grids that differ, or a value that no target has."""
    if not pair.predicted.grid.almost_equal(pair.reference.grid):
        raise BadInput(
            f"{pair.case}: prediction and reference must lie on one grid; found {describe(pair.predicted)} and {describe(pair.reference)}; "
            "predict on the image's own grid"
        )
    values = {value for of in pair.targets.values() for value in of}
    faults = [
        f"{which} holds the values {unknown}"
        for which, volume in (("prediction", pair.predicted), ("reference", pair.reference))
        if (unknown := unknown_values(volume.array_CXYZ, values))
    ]
    if faults:
        raise BadInput(f"{pair.case}: every value must be 0 or one of {dict(pair.targets)}; {', '.join(faults)}")


def unscored(case: str, targets: Targets, protocol: AbstractProtocol, reference: Volume | None = None) -> Judged:
    """What a case scores whose prediction is missing or cannot be read: worst values, and all that the reference holds is missed."""
    if reference is None:
        return Judged(tuple(Score(case, name, metric, value, UNSCORED) for name in targets for metric, value in protocol.worst.items()))
    judged = protocol.judge(Pair(case, reference, reference, targets).unpredicted())
    return replace(judged, rows=tuple(_worst(row, protocol) for row in judged.rows))


def _worst(row: Score, protocol: AbstractProtocol) -> Score:
    return replace(row, value=protocol.worst[row.metric], note=UNSCORED) if row.metric in protocol.worst else row


def unknown_values(array: np.ndarray, labels: Mapping[str, int] | set[int]) -> list[int]:
    """Values of a label map that are neither 0 nor a label's."""
    known = labels if isinstance(labels, set) else set(labels.values())
    return sorted({int(value) for value in np.unique(array)} - {0, *known})


# ------------------------------------------------------------------------------------------------ the summary


def summarise(scores: Sequence[Score], *, protocol: str = "dice", pooled: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """The summary of contract.md; `sd` is the sample's, `ci95` a percentile bootstrap over cases with a fixed seed.

    Args: pooled: figures over all cases, which go beside the means. A metric's mean is over the cases for which it is defined; the
    region `mean` holds only metrics that every region has for every case.
    """
    by_region: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        if score.value is not None:
            by_region.setdefault(score.label, {}).setdefault(score.metric, {})[score.case] = score.value
    cases = sorted({score.case for score in scores})
    per_case: dict[str, dict[str, float]] = {}
    for metric in sorted({score.metric for score in scores if metric_of(score.metric).better != "none"}):
        columns = [values.get(metric, {}) for values in by_region.values()]
        if all(len(column) == len(cases) for column in columns):
            per_case[metric] = {case: statistics.fmean(column[case] for column in columns) for case in cases}
    metrics: dict[str, dict[str, Any]] = {
        region: {metric: mean_interval([values[case] for case in sorted(values)]) for metric, values in of_region.items()}
        for region, of_region in (by_region | ({MEAN: per_case} if per_case else {})).items()
    }
    for region, figures in (pooled or {}).items():
        metrics.setdefault(region, {}).update(figures)
    return {"protocol": protocol, "n_cases": len(cases), "metrics": metrics}


def write_scores(
    out: Path, scores: Sequence[Score], *, protocol: str = "dice", pooled: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Write cases.csv and summary.json into `out` and return the summary."""
    rows = [vars(score) | {"value": "" if score.value is None else f"{score.value:.6f}"} for score in scores]
    write_csv(out / "cases.csv", rows, COLUMNS)
    summary = summarise(scores, protocol=protocol, pooled=pooled)
    write_json(out / "summary.json", summary)
    return summary


def write_judged(out: Path, judged: Sequence[Judged], protocol: AbstractProtocol, name: str) -> dict[str, Any]:
    """The same for judged cases, with the protocol's figures over all of them. Args: name: of the protocol."""
    return write_scores(out, [row for one in judged for row in one.rows], protocol=name, pooled=protocol.pooled(judged))


def headline(summary: Mapping[str, Any]) -> str:
    """The figure that stands for all: lesion-wise Dice, else Dice, as means over the regions, else the CPM."""
    metrics: Mapping[str, Any] = summary["metrics"]
    for metric, words in (("lesion_dice", "mean lesion-wise Dice"), ("dice", "mean Dice")):
        if metric in metrics.get(MEAN, {}):
            return f"{words} {metrics[MEAN][metric]['mean']:.4f}"
    cpm = [of["cpm"]["mean"] for of in metrics.values() if "cpm" in of]
    return f"CPM {cpm[0]:.4f}" if cpm else "no mean over all regions"


# ------------------------------------------------------------------------------------------------ the verb


def run(
    predictions: Path,
    references: Path,
    *,
    out: Path,
    recipe: str | Path | None = None,
    protocol: str | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Score a folder of label maps against a folder of references with the same file names (the format may differ), or a data set.

    For protocol luna16 the references may be a folder with annotations.csv, and the predictions a table of candidates or label maps.

    Args: recipe: of finetune, or a run's folder; its `labels` and `regions` name the values, its `evaluation` the protocol. What they leave
        null is that of the model beside them; without one every value is a label (`AbstractProtocol.both_sides`). protocol: in place of
        the recipe's; without either `dice`.
    Returns: failed counts the cases that could not be scored: a missing prediction or reference, another grid, an unknown value.
    Raises: BadInput: a folder without label maps, two without a common name, a recipe that is none of finetune's, an unknown protocol, a
        table with missing columns, scores that are no numbers or unknown scans.
    """
    predictions, references, out = Path(predictions), Path(references), Path(out)
    values = _named(recipe) if recipe is not None else {}
    chosen = _evaluation(values, protocol)
    built = chosen.build()
    check_out(out, overwrite=overwrite, inputs=(predictions, references))
    masks = chosen.protocol != "luna16" and _data(values).nodules is not None  # LUNA16's folder also as one of label maps
    if predictions.suffix.lower() == ".csv" or (is_findings(references) and not masks):
        jobs = _scan_jobs(predictions, references, built)
    else:
        jobs = _pair_jobs(predictions, references, values, built, held_out=_held_out(recipe))
    claim_out(out, overwrite=overwrite, inputs=(predictions, references))
    judged: list[Judged] = []
    failures: list[dict[str, str]] = []
    for case, job in track(jobs.items(), total=len(jobs), label="evaluate"):
        found, reason = job()
        judged += [found] if found else []
        failures += [{"case": case, "reason": reason}] if reason else []
    write_csv(out / "failures.csv", failures, ("case", "reason"))
    summary = write_judged(out, judged, built, chosen.protocol)
    return Outcome(out, failed=len(failures), message=f"{headline(summary)} over {summary['n_cases']} cases, protocol {chosen.protocol}")


def _named(recipe: str | Path) -> dict[str, Any]:
    """A recipe; what it leaves null of labels and regions is that of the model which a finished run left beside it."""
    path = Path(recipe) / "recipe.yaml" if Path(recipe).is_dir() else Path(recipe)
    values, model = recipes.load(path, verb="finetune"), path.parent / "model.json"
    known = read_json(model) if path.is_file() and model.exists() else {}
    return values | {key: known[key] for key in ("labels", "regions") if values.get(key) is None and key in known}


Job = Callable[[], tuple[Judged | None, str]]  # a case's scores, if any, and why it failed, if it did


def _evaluation(values: Mapping[str, Any], protocol: str | None) -> Evaluation:
    made = recipes.parse({key: of for key, of in values.items() if key == "evaluation"}, {"evaluation": Evaluation}, "evaluation")
    given: Evaluation = made["evaluation"]
    return given if protocol in (None, given.protocol) else Evaluation(protocol)  # settings are those of the recipe's protocol


def _pair_jobs(
    predictions: Path, references: Path, values: Mapping[str, Any], protocol: AbstractProtocol, *, held_out: Collection[str]
) -> dict[str, Job]:
    predicted = {name: Reference(partial(read_label, path), (path,)) for name, path in label_maps(predictions, "predictions").items()}
    expected = expected_of(references, predicted, data=_data(values), held_out=held_out)
    labels, regions = _labels_of(values), values.get("regions")
    if labels is None:
        labels = expected.labels or all_values([*expected.references.values(), *(predicted.values() if protocol.both_sides else ())])
    targets = protocol.targets(labels, (expected.regions if regions is None else regions) or {})
    return {
        case: partial(_judged, case, predicted.get(case), expected.references.get(case), targets=targets, protocol=protocol)
        for case in sorted({*predicted, *expected.references})
    }


def _judged(
    case: str, predicted: Reference | None, expected: Reference | None, *, targets: Targets, protocol: AbstractProtocol
) -> tuple[Judged | None, str]:
    reference = None
    try:
        if predicted is None or expected is None:
            missing = "prediction" if predicted is None else "reference"
            raise BadInput(f"{case}: must have a prediction and a reference; the {missing} is missing")
        reference = expected.read()
        return judge_case(Pair(case, predicted.read(), reference, targets), protocol), ""
    except BadInput as error:
        reason = _without_paths(str(error), [path for one in (predicted, expected) if one for path in one.files])
    if expected is None:
        return None, reason
    return unscored(case, targets, protocol, reference or expected.if_readable()), reason


def _data(values: Mapping[str, Any]) -> Data:
    return recipes.parse({key: of for key, of in values.items() if key == "data"}, {"data": Data}, "data")["data"]


def _held_out(recipe: str | Path | None) -> list[str]:
    """The cases that a run held out, where the recipe is a run's."""
    path = Path(recipe or "")
    splits = (path if path.is_dir() else path.parent) / "splits.json"
    return read_json(splits).get("validation", []) if recipe is not None and path.exists() and splits.is_file() else []


def _scan_jobs(predictions: Path, references: Path, protocol: AbstractProtocol) -> dict[str, Job]:
    if not is_findings(references):
        raise BadInput(f"references {references}: for a table of candidates must be annotations.csv, or a folder with it; found neither")
    expected = read_references(references)
    if predictions.suffix.lower() == ".csv":
        table = read_candidates(predictions, expected)
        series, files = _all_scans(expected, table), {}
    else:
        table, files = {}, label_maps(predictions, "predictions")
        series = _all_scans(expected, files)
        if not files.keys() & set(series):
            raise BadInput(f"predictions {predictions}: a label map must be named after its scan; found such as {min(files)}; rename them")
    protocol.judge_scan(Scan("", Candidates(), Findings()))  # a protocol that scores no candidates says so before anything is read

    def job(case: str) -> tuple[Judged | None, str]:
        reason, candidates = "", table.get(case, Candidates())
        if files and case not in series:
            return None, f"{case}: must be one of seriesuids.csv; found another"
        try:
            if files and case not in files:
                raise BadInput(f"{case}: must have a prediction; it is missing")
            candidates = candidates_of(read_label(files[case])) if files else candidates
        except BadInput as error:
            reason = _without_paths(str(error), list(files.values()))
        return protocol.judge_scan(Scan(case, candidates, expected.findings.get(case, Findings()))), reason

    return {case: (lambda case=case: job(case)) for case in sorted({*series, *files})}


def _all_scans(expected: References, predicted: Mapping[str, Any]) -> tuple[str, ...]:
    if expected.known:
        if left := len(set(expected.findings) - set(expected.series)):
            tell(f"evaluate: {left} scans with findings are not in seriesuids.csv and left out, as the challenge does")
        return expected.series
    tell("evaluate: no seriesuids.csv beside the findings: scans with neither finding nor candidate are not in the denominator")
    return tuple(sorted({*expected.series, *predicted}))


def _labels_of(values: Mapping[str, Any]) -> dict[str, int] | None:
    labels = values.get("labels")
    if labels is not None and not isinstance(labels, dict):
        raise BadInput(f"recipe: labels must be a mapping of names to values, or null; found {labels!r}")
    if labels is None:
        return None
    numbers = whole_numbers(labels, "recipe: labels")
    if not numbers or len(set(numbers.values())) != len(numbers):
        raise BadInput(f"recipe: labels must be names with values of their own above 0; found {labels}")
    return numbers


def _without_paths(text: str, files: Sequence[Path]) -> str:
    # An artefact holds case names, never where files lie.
    for path in files:
        text = text.replace(str(path), path.name)
    return text
