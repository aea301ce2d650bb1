"""The page of a study: STUDY/summary.json and its pictures -> one self-contained HTML page that names no path, scan or case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volssl.compare import FAILED, NO, OPEN, YES
from volssl.files import BadInput, read_json, write_text
from volssl.page import embedded, render
from volssl.pictures import bands_svg

ANSWERS = {YES: "Yes", NO: "No", OPEN: "Undecided", FAILED: "Failed or not done"}


def is_study(folder: Path) -> bool:
    """Whether a folder is a study that came to its page."""
    path = Path(folder) / "summary.json"
    values = read_json(path) if path.is_file() else {}
    return isinstance(values, dict) and values.get("kind") == "study"


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a study to `out`, by default its report.html. Raises: BadInput: not a study."""
    folder = Path(folder)
    if not is_study(folder):
        raise BadInput(f"{folder}: must be a folder that volssl study left; found no summary.json of a study in it")
    summary = read_json(folder / "summary.json")
    out = folder / "report.html" if out is None else out
    write_text(out, render("study.html", **_values(folder, summary)))
    return out


def _values(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    scratch, *others = summary["arms"]
    return {
        "study": summary,
        "design": summary["design"],
        "scratch": scratch,
        "others": others,
        "answers": [_answer(others, place, labels) for place, labels in enumerate(summary["design"]["labels"])],
        "words": ANSWERS,
        "plot": embedded(bands_svg(_curves([scratch, *others]), across="labelled cases", up="mean Dice on the test cases"), "svg+xml"),
        "pictures": [_picture(folder, told) for told in summary["pictures"]],
        "saved": {arm["name"]: [_saved(at) for at in arm["at"]] for arm in others},
        "hours": [row | {"total": sum(value for key, value in row.items() if key != "arm")} for row in summary["hours"]],
    }


def _answer(others: list[dict[str, Any]], place: int, labels: int) -> dict[str, Any]:
    """The best answer at one number of labels, and the arms by their answers."""
    by_answer: dict[str, list[str]] = {}
    for arm in others:
        by_answer.setdefault(arm["at"][place]["pays"], []).append(arm["name"])
    best = next(answer for answer in (YES, OPEN, NO, FAILED) if answer in by_answer)
    return {"labels": labels, "best": best, "arms": by_answer[best], "all": by_answer}


def _curves(arms: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, float, float]]]:
    return {arm["name"]: [(at["labels"], at["mean"], *at["ci95"]) for at in arm["at"] if "mean" in at] for arm in arms}


def _saved(at: Mapping[str, Any]) -> tuple[str, str]:
    """Labels that scratch needs for an arm's score, and the interval, in words."""
    saved = at["saved"]
    if not saved:
        return "not known", ""
    low, high = (_labels(end, saved) for end in saved["ci95"])
    return _labels(saved["reached"], saved), low if low == high else f"{low} to {high}"


def _labels(value: float | None, saved: Mapping[str, Any]) -> str:
    if value is None:
        return "not reached"
    return f"≤ {saved['least']}" if value <= saved["least"] else f"{value:.3g}"


def _picture(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    images = {arm: embedded((folder / name).read_bytes(), "png") for arm, name in told["files"].items() if (folder / name).is_file()}
    return {**told, "images": images}
