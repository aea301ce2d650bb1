"""Verb demo: the whole pipeline on phantoms, from DICOM to a report, on two CPU cores in under six minutes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from volssl import evaluate, finetune, index, phantom, predict, prepare, pretrain, report
from volssl.evaluate import MEAN
from volssl.files import BadInput, Outcome, claim_out, read_json, write_csv, write_json, write_text

PATIENTS, CASES, TESTS, SIZE_VOX = 12, 12, 2, 96
RUNS = ("with_weights", "from_scratch")


class Stages:
    """Runs one stage after the other and keeps their seconds in demo.json, from the first moment on."""

    def __init__(self, out: Path, seed: int) -> None:
        self.path = out / "demo.json"
        self.failures: list[dict[str, str]] = []
        self.failed = 0
        self.told: dict[str, Any] = {"seed": seed, "finished": False, "seconds": {}, "dice": {}}
        write_json(self.path, self.told)

    def do(self, name: str, stage: Callable[[], Outcome | Path]) -> None:
        """Run `stage`, time it, and count its failed cases."""
        begun = time.monotonic()
        outcome = stage()
        self.told["seconds"][name] = round(time.monotonic() - begun, 1)
        if isinstance(outcome, Outcome) and outcome.failed:
            self.failed += outcome.failed
            where = f"{outcome.out.name}/failures.csv"
            self.failures.append({"stage": name, "reason": f"{outcome.failed} failed; see {where}"})
        write_json(self.path, self.told)

    def finish(self) -> float:
        """Write the total and, if any, failures.csv; returns the total in seconds."""
        total = round(sum(self.told["seconds"].values()), 1)
        self.told |= {"finished": True, "total_seconds": total}
        write_json(self.path, self.told)
        if self.failures:
            write_csv(self.path.with_name("failures.csv"), self.failures, ("stage", "reason"))
        return total


def run(*, out: Path, overwrite: bool = False, seed: int = 0) -> Outcome:
    """Make phantoms, then index, prepare, pretrain, fine-tune with and without the weights, predict, evaluate and report.

    Leaves in `out`: report.html, demo.json (seconds per stage, Dice), archive/, labelled/, index/, store/, pretrain/, with_weights/,
    from_scratch/, and per fine-tuned run predictions/ and evaluation/ of two further cases.
    Raises: BadInput: if `out` is in use, or seed < 0.
    """
    if seed < 0:
        raise BadInput(f"demo: --seed must be >= 0; found {seed}")
    out = claim_out(Path(out), overwrite=overwrite)
    stages = Stages(out, seed)
    archive, labelled, store = out / "archive", out / "labelled", out / "store"
    stages.do("phantoms, DICOM", lambda: phantom.write_archive(archive, patients=PATIENTS, seed=seed, size_vox=SIZE_VOX))
    stages.do(
        "phantoms, labelled",
        lambda: phantom.write_labelled(labelled, cases=CASES, tests=TESTS, seed=seed, size_vox=SIZE_VOX),
    )
    # A real index makes a secret key of its own; phantoms have nothing to hide, and a fixed key makes the demo repeatable.
    write_text(out / "demo_key", hashlib.sha256(f"volssl demo {seed}".encode()).hexdigest())
    stages.do("index", lambda: index.build([archive], out=out / "index", seed=seed, gates=index.Gates(key=out / "demo_key")))
    stages.do("prepare", lambda: prepare.run(out / "index", out=store, recipe="demo_prepare"))
    seeded = [f"training.seed={seed}"]
    stages.do("pretrain", lambda: pretrain.run("demo_pretrain", store=store, out=out / "pretrain", overrides=seeded))
    for name in RUNS:
        weights = out / "pretrain" / "bundle" if name == "with_weights" else None
        _finetune(stages, out, name, options=finetune.Options(weights=weights, seed=seed))
    runs = [out / "pretrain", *(out / name for name in RUNS)]
    stages.do("report", lambda: report.run(runs, out=out / "report.html"))
    total = stages.finish()
    dice = stages.told["dice"]
    told = ", ".join(f"{name.replace('_', ' ')} {dice[name]['validation'][MEAN]:.3f}" for name in RUNS)
    return Outcome(out, stages.failed, f"{total:.0f} s; mean Dice in validation: {told}; open {out / 'report.html'}")


def _finetune(stages: Stages, out: Path, name: str, *, options: finetune.Options) -> None:
    """Fine-tune one run, segment the cases kept out of everything, and score them."""
    labelled, run = out / "labelled", out / name
    predictions, evaluation = out / "predictions" / name, out / "evaluation" / name
    stages.do(f"finetune, {name}", lambda: finetune.run("demo_finetune", data=labelled, out=run, options=options))
    stages.do(f"predict, {name}", lambda: predict.run(run, [labelled / "imagesTs"], out=predictions))
    stages.do(
        f"evaluate, {name}",
        lambda: evaluate.run(predictions, labelled / "labelsTs", recipe="demo_finetune", out=evaluation),
    )
    stages.told["dice"][name] = {"validation": _dice(run / "validation"), "held-out": _dice(evaluation)}


def _dice(folder: Path) -> dict[str, float]:
    metrics = read_json(folder / "summary.json")["metrics"]
    return {label: round(of_label["dice"]["mean"], 4) for label, of_label in metrics.items()}
