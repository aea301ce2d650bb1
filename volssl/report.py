"""Verb report: run folders -> one self-contained HTML page that opens offline. It names no path, no scan and no case.

Reads what pretrain and finetune leave (docs/report.md lists the files). A part that a run did not leave is said to be missing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volssl import neighbours
from volssl import recipe as recipes
from volssl.evaluate import MEAN
from volssl.features import is_table
from volssl.files import BadInput, Outcome, read_csv, read_json, tell, write_text
from volssl.journal import read_metrics
from volssl.page import embedded, render
from volssl.paired import compare, strips, unmatched
from volssl.pictures import curves_svg
from volssl.protocols.protocol import Score
from volssl.study_page import is_study, write_page

VERBS = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "evaluate": "Evaluation"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read once. Absent parts are empty."""

    name: str
    verb: str
    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    card: dict[str, Any]  # bundle/card.json of a pretraining, model.json of a fine-tuning
    splits: dict[str, Any]  # of a fine-tuning
    summary: dict[str, Any] = field(default_factory=dict)
    findings: list[Score] = field(default_factory=list)

    def number_of(self, case: str) -> str:
        """How the page calls a case: its place among splits.json's validation cases, which is also the number of its picture.

        Of an evaluation, which has no splits.json: its place among the cases of cases.csv.
        """
        order = self.splits.get("validation", []) if self.verb == "finetune" else list(dict.fromkeys(row.case for row in self.findings))
        return f"case {order.index(case)}" if case in order else "a case that splits.json does not hold"


def run(runs: Sequence[Path], *, out: Path, store: Path | None = None, overwrite: bool = False) -> Outcome:
    """Write one HTML page about any mix of pretraining runs, fine-tuning runs and folders that evaluate left; or about one study, or the
    nearest neighbours in one table that embed made of a store.

    Args: runs: run folders, in the order of the page, or a study's folder or a table alone. out: the HTML file. store: of the table.
    Raises: BadInput: no run given; a folder that is not a run; `out` exists and `overwrite` is not set.
    """
    out = Path(out)
    if out.is_dir() or (out.exists() and not overwrite):
        kind = "a folder" if out.is_dir() else "a file"
        raise BadInput(f"--out {out} must be a new file; found {kind}; choose another name, or --overwrite for a file")
    if any(is_table(Path(run)) for run in runs):
        if len(runs) > 1:
            raise BadInput(f"runs: a table of features must have a page of its own; found {len(runs)} inputs; give it alone")
        return Outcome(neighbours.write_page(Path(runs[0]), out, store=store), message="nearest neighbours")
    if store is not None:
        raise BadInput("--store: goes with a table that embed made of it; found other runs; leave it out")
    if any(is_study(Path(run)) for run in runs):
        if len(runs) > 1:
            raise BadInput(f"runs: a study must have a page of its own; found {len(runs)} folders; give it alone")
        return Outcome(write_page(Path(runs[0]), out), message="a study")
    read = _read_all([Path(run) for run in runs])
    page = render(
        "report.html",
        sections=[_section(run) for run in read],
        comparison=_comparison([run for run in read if run.findings]),
    )
    write_text(out, page)
    return Outcome(out, message=f"{len(read)} runs")


# ------------------------------------------------------------------------------------------------ reading


def _read_all(folders: Sequence[Path]) -> list[Run]:
    if not folders:
        raise BadInput("report: must be given at least one run folder; found none")
    wrong = [f"{folder}: {fault}" for folder in folders if (fault := _fault(folder))]
    if wrong:
        raise BadInput("runs: every one must be a folder that volssl pretrain, finetune or evaluate left; found:\n  " + "\n  ".join(wrong))
    names: list[str] = []
    for folder in folders:
        name = folder.resolve().name
        names.append(f"{name} ({names.count(name) + 1})" if name in names else name)
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _fault(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if not (folder / "recipe.yaml").is_file():
        return "" if _is_evaluation(folder) else "no recipe.yaml in it, nor cases.csv and summary.json"
    verb = _verb_of(folder)
    return "" if verb in VERBS else f"its recipe.yaml is not of pretrain or finetune but of {verb or 'no verb'}"


def _is_evaluation(folder: Path) -> bool:
    return (folder / "cases.csv").is_file() and (folder / "summary.json").is_file() and not (folder / "recipe.yaml").is_file()


def _verb_of(folder: Path) -> str:
    if _is_evaluation(folder):
        return "evaluate"
    found = re.search(r"^verb:\s*(\w+)", (folder / "recipe.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def _read(folder: Path, name: str) -> Run:
    verb = _verb_of(folder)
    scored = folder if verb == "evaluate" else folder / "validation"
    recipe = folder / "recipe.yaml"
    return Run(
        name=name,
        verb=verb,
        folder=folder,
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        recipe=recipes.load(recipe, verb=verb) if recipe.exists() else {},
        metrics=read_metrics(folder),
        environment=_optional_json(folder / "environment.json"),
        card=_optional_json(folder / ("bundle/card.json" if verb == "pretrain" else "model.json")),
        splits=_optional_json(folder / "splits.json"),
        summary=_optional_json(scored / "summary.json"),
        findings=_findings(scored / "cases.csv"),
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _findings(path: Path) -> list[Score]:
    rows = read_csv(path) if path.exists() else []
    faults: list[str] = []
    found: list[Score] = []
    for line, row in enumerate(rows, start=2):
        try:
            value = float(row["value"]) if row["value"] else None
            found.append(Score(row["case"], row["label"], row["metric"], value, row["note"] or ""))
        except (KeyError, TypeError, ValueError) as error:
            faults.append(f"line {line} lacks its columns or a number ({error})")
    keys = Counter((score.case, score.label, score.metric) for score in found)
    faults += [f"{', '.join(key)} stands {count} times" for key, count in keys.items() if count > 1]
    bad = [score for score in found if score.value is not None and not math.isfinite(score.value)]
    faults += [f"{score.case}, {score.label}, {score.metric} is {score.value}" for score in bad]
    if faults:
        told = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise BadInput(f"{path}: must hold one finite or empty value per case, label and metric, as volssl writes it; {told}; score anew")
    return found


# ------------------------------------------------------------------------------------------------ one run


def _section(run: Run) -> dict[str, Any]:
    pictures = sorted((run.folder / "pictures").glob("restoration_*.png"))
    return {
        "anchor": re.sub(r"\W+", "-", run.name).strip("-").lower() or "run",
        "name": run.name,
        "verb": VERBS[run.verb],
        "is_scored": run.verb != "pretrain",
        "is_trained": run.verb != "evaluate",
        "facts": _facts(run),
        "curves": embedded(curves_svg(run.metrics), "svg+xml"),
        "restorations": [(_step_of(path), _png(path)) for path in dict.fromkeys([*pictures[-1:], *pictures[:1]])],
        "overlays": _overlays(run) if run.splits else [],
        "labels": _label_rows(run.summary),
        "case_labels": list(dict.fromkeys(finding.label for finding in run.findings if finding.metric == "dice")),
        "cases": [(run.number_of(case), *rest) for case, *rest in _case_rows(run.findings)],
        "notes": _notes(run),
        "recipe": run.recipe_text,
        "environment": _flat(run.environment),
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """What ran, as pairs of a name and a value; nothing is shown that the run did not write down."""
    if run.verb == "evaluate":
        return [("Protocol", str(run.summary.get("protocol"))), ("Cases", str(run.summary.get("n_cases")))]
    pretraining = run.verb == "pretrain"
    training = run.recipe.get("training" if pretraining else "optimisation", {})
    patches = run.recipe.get("patches" if pretraining else "sampling", {})
    last = run.metrics[-1] if run.metrics else {}
    seconds = [row["seconds"] for row in run.metrics if "seconds" in row]
    data, splits = run.card.get("data", {}), run.splits
    spacing = run.card.get("spacing_mm") or run.card.get("preparation", {}).get("spacing_mm")
    facts: list[tuple[str, Any]] = [
        ("Method", _named(run.recipe.get("method"), brief=True)),
        ("Network", _named(run.card.get("architecture")) or _named(run.recipe.get("net"))),
        ("Initial weights", _weights(run) if splits else None),
        ("Steps", _steps(last.get("step"), training.get("steps"))),
        ("Patches per step", patches.get("batch_size")),
        ("Patch", _times(patches.get("box_vox") or patches.get("patch_vox"), "voxels")),
        ("Voxels", _times(spacing, "mm")),
        ("Training data", ", ".join(f"{n} {name.removeprefix('train_')}" for name, n in data.items()) or None),
        ("Training cases", len(splits["train"]) if splits else None),
        ("Validation cases", f"{len(splits['validation'])} (fold {splits['fold']})" if splits else None),
        ("Protocol", run.summary.get("protocol")),
        ("Training time", _clock(seconds[-1]) if seconds else None),
        ("Device", run.environment.get("device")),
        ("Precision", run.environment.get("precision")),
        ("Seed", run.environment.get("seed")),
        ("volssl", run.environment.get("volssl")),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _steps(done: int | None, asked: int | None) -> str | None:
    if done is None:
        return "none logged"
    return f"{done:,}" if asked is None or done == asked else f"{done:,} of {asked:,}: not finished"


def _weights(run: Run) -> str:
    return "pretrained" if run.splits.get("weights_sha256") else "random (from scratch)"


def _named(part: Any, *, brief: bool = False) -> str | None:
    if not isinstance(part, dict) or "name" not in part:
        return None
    arguments = part.get("arguments", {key: value for key, value in part.items() if key != "name"})
    told = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return f"{part['name']} ({told})" if told and not brief else str(part["name"])


def _times(values: Any, unit: str) -> str | None:
    return " × ".join(f"{value:g}" for value in values) + f" {unit}" if values else None


def _notes(run: Run) -> list[tuple[str, str, str]]:
    """Label, note, and the cases it was made of."""
    cases: dict[tuple[str, str], list[str]] = {}
    for finding in run.findings:
        if finding.note:
            cases.setdefault((finding.label, finding.note), []).append(run.number_of(finding.case))
    return [(label, note, ", ".join(of_note)) for (label, note), of_note in cases.items()]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _overlays(run: Run) -> list[tuple[str, str, float, str]]:
    """Best, median and worst case by the mean over labels: role, case, mean, picture ("" where none was written)."""
    means = _case_means(run.findings)
    ranked = sorted(means, key=lambda case: (-means[case], case))
    roles: dict[str, str] = {}
    for role, index in (("best", 0), ("median", len(ranked) // 2), ("worst", len(ranked) - 1)):
        if ranked:
            case = ranked[index]
            roles[case] = f"{roles[case]} and {role}" if case in roles else role
    order = run.splits.get("validation", [])
    found = []
    for case, role in roles.items():
        # Pictures are numbered in the order of the validation cases.
        path = run.folder / "pictures" / f"overlay_{order.index(case) if case in order else -1:04d}.png"
        found.append((role, run.number_of(case), means[case], _png(path) if path.exists() else ""))
    return found


def _case_means(findings: Sequence[Score]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for finding in findings:
        if finding.metric == "dice" and finding.value is not None:
            values.setdefault(finding.case, []).append(finding.value)
    return {case: sum(of_case) / len(of_case) for case, of_case in values.items()}


def _label_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    regions = summary.get("metrics", {})
    names = [name for name in regions if name != MEAN] + [name for name in regions if name == MEAN]
    return [("mean over labels" if name == MEAN else name, metric, numbers) for name in names for metric, numbers in regions[name].items()]


def _case_rows(findings: Sequence[Score]) -> list[tuple[str, dict[str, float | None], float]]:
    means = _case_means(findings)
    rows: dict[str, dict[str, float | None]] = {}
    for finding in findings:
        if finding.metric == "dice":
            rows.setdefault(finding.case, {})[finding.label] = finding.value
    ordered = sorted(means, key=lambda case: (-means[case], case))
    return [(case, rows[case], means[case]) for case in ordered]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return rows


# ------------------------------------------------------------------------------------------------ several runs


def _comparison(runs: Sequence[Run]) -> dict[str, Any] | None:
    """All runs with scores side by side, and each against the reference run: paired differences over the cases of both."""
    if len(runs) < 2:
        return None
    reference = next((run for run in runs if run.splits and not run.splits.get("weights_sha256")), runs[0])
    rows = [{"name": run.name, "weights": _weights(run) if run.splits else None, "labels": _label_rows(run.summary)} for run in runs]
    pairs = [_pair(run, reference) for run in runs if run is not reference]
    return {"reference": reference.name, "rows": rows, "pairs": pairs}


def _pair(run: Run, reference: Run) -> dict[str, Any]:
    found = compare(run.findings, reference.findings)
    alone = [(one, unmatched(one.findings, other.findings)) for one, other in ((run, reference), (reference, run))]
    for one, cases in alone:
        if cases:  # the page, which is passed on, tells their numbers; their names are for the user alone
            tell(f"report: cases of {one.name} alone, left out of the comparison: {', '.join(cases)}")
    return {
        "name": run.name,
        "protocols": [one.summary.get("protocol", "unknown") for one in (run, reference)],
        "cases": len({score.case for score in run.findings}) - len(alone[0][1]),
        "alone": [(one.name, [one.number_of(case) for case in cases]) for one, cases in alone if cases],
        "rows": found,
        "strips": strips(found),
    }


# ------------------------------------------------------------------------------------------------ pictures


def _png(path: Path) -> str:
    return embedded(path.read_bytes(), "png")
