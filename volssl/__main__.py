"""The command line, `volssl <verb>`: a verb's options are the arguments of its function, imported only when it runs."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from volssl import __version__
from volssl.complaints import complaint, fault, is_withheld
from volssl.files import BadInput, Outcome
from volssl.options import ENDINGS, GATES, LOOK, OVERRIDES, POOL, Labels, Out, Recipe, Workers, argument, option, three_sides

VERBS = {
    "fetch": "volssl.fetch:run",
    "index": "volssl.index:build",
    "quality": "volssl.quality:run",
    "prepare": "volssl.prepare:run",
    "pretrain": "volssl.pretrain:run",
    "bench": "volssl.bench:run",
    "export": "volssl.export:run",
    "finetune": "volssl.finetune:run",
    "detect": "volssl.detect:run",
    "predict": "volssl.predict:run",
    "embed": "volssl.embed:run",
    "evaluate": "volssl.evaluate:run",
    "study": "volssl.study:run",
    "report": "volssl.report:run",
    "phantom": "volssl.phantom:run",
    "demo": "volssl.demo:run",
}

DONE, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130
# Trouble with the user's disk, which no traceback explains better.
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


app = typer.Typer(
    name="volssl",
    help="Self-supervised pretraining on 3D CT and MRI: from a raw archive to weights that other tools accept.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they would print local variables: paths and patients
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script; exits 0 done, 2 bad input or usage, 3 finished but some cases failed."""
    # cuBLAS reads this once, when its first handle is made; without it an exact resume on a GPU is refused by torch.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        app(prog_name="volssl")
    except Exception as error:
        if not is_withheld("".join(sys.argv[1:2])):
            raise
        typer.echo(fault(error), err=True)
        sys.exit(1)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"volssl {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _volssl(version: Version = False) -> None:
    del version  # shown by its callback, before any verb


def run_verb(verb: str, options: Mapping[str, Any]) -> int:
    """Run a verb with its options and answer the exit code; whatever the user can mend becomes one line on stderr."""
    try:
        outcome = call(verb_function(verb), options)
    except (BadInput, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        return _complain(verb, complaint(error, options))
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        return _complain(verb, f"--out {options.get('out')}: {error.strerror}; make room or choose another, then run it again")
    except KeyboardInterrupt:
        _complain(verb, "interrupted")
        return INTERRUPTED
    return _close(verb, outcome)


def verb_function(verb: str) -> Callable[..., Outcome]:
    """The function behind a verb; its module is imported here."""
    module, _, name = VERBS[verb].partition(":")
    return getattr(importlib.import_module(module), name)


def call(function: Callable[..., Outcome], options: Mapping[str, Any]) -> Outcome:
    """Call `function` with `options`; those that it takes grouped in a dataclass are gathered into one."""
    given = dict(options)
    hints = get_type_hints(function)
    for name in inspect.signature(function).parameters:
        group = hints.get(name)
        if name not in given and dataclasses.is_dataclass(group) and isinstance(group, type):
            fields = [field.name for field in dataclasses.fields(group) if field.name in given]
            given[name] = group(**{field: given.pop(field) for field in fields})
    return function(**given)


def _close(verb: str, outcome: Outcome) -> int:
    if outcome.message:
        typer.echo(outcome.message)
    if outcome.failed:
        table = outcome.out / "failures.csv"
        _complain(verb, f"finished, but {outcome.failed} failed; {table} names each with its reason")
        return SOME_FAILED
    where = "" if outcome.out == Path() else f", see {outcome.out}"
    typer.echo(f"volssl {verb}: {'done' if outcome.finished else 'stopped'}{where}")
    return DONE


def _complain(verb: str, message: str) -> int:
    typer.echo(f"volssl {verb}: {message}", err=True)
    return BAD_INPUT


ASKED = inspect.Parameter.empty  # as a default: the user must give it


def _command(verb: str, help: str, options: Mapping[str, tuple[Any, Any]]) -> None:
    """Add a verb whose options, name -> (type, default), are the arguments of its function."""

    def command(**given: Any) -> None:
        raise typer.Exit(run_verb(verb, given))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in options.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: kind for name, (kind, _) in options.items()}
    app.command(verb, help=help)(command)


LABELLED: dict[str, tuple[Any, Any]] = {
    "recipe": (Recipe, ASKED),
    "data": (option(Path, "Labelled cases in a public layout: Decathlon, nnU-Net v2, BraTS, LiTS or LUNA16."), ASKED),
    "weights": (option(Path | None, "Bundle to start from; without it the network starts from scratch."), None),
    "out": (Out, ASKED),
    "fold": (option(int, "Which fold is held out.", min=0), 0),
    "labels": (Labels, 1.0),
    "seed": (option(int, "Seed of the first weights and of the draws."), 0),
    "split": (option(Path | None, "Who is trained on and who held out: a file, or official. Else folds are drawn."), None),
    **ENDINGS,
    **OVERRIDES,
}

_command(
    "fetch",
    "Pull series from a PACS over DICOMweb into a folder.",
    {
        "dicomweb": (option(str, "Address of the service, as https://pacs.example/dicom-web.", metavar="URL"), ASKED),
        "query": (
            option(list[str], "Which series, as Modality=CT; if given again, all must hold.", metavar="KEY=VALUE"),
            ASKED,
        ),
        "out": (option(Path, "Folder to write, for patients' data; must be new or empty."), ASKED),
        "parallel": (option(int, "Series pulled at a time."), 2),
        "retries": (option(int, "Further tries of a request that breaks, after growing waits.", min=0), 4),
        "timeout_s": (option(float, "Longest silence of the server, in seconds."), 120.0),
        "ca": (option(Path | None, "File of the authority to trust (PEM) in place of the system's."), None),
        "allow_http": (option(bool, "Let patients' data cross the network in the clear.", "--allow-http"), False),
        "resume": ENDINGS["resume"],
    },
)
_command(
    "index",
    "Find every scan: one row each with facts, verdict and split.",
    {
        "archives": (argument(list[Path], "ARCHIVE"), ASKED),
        "out": (Out, ASKED),
        "workers": (Workers, 0),
        "seed": (option(int, "Seed of the patient-wise split."), 0),
        **GATES,
        **LOOK,
        **ENDINGS,
    },
)
_command(
    "quality",
    "Write anew the page that shows what an index or a store holds.",
    {"folder": (argument(Path, "INDEX|STORE"), ASKED), **LOOK},
)
_command(
    "prepare",
    "Bring scans to one orientation, spacing and type.",
    {
        "index": (argument(Path, "INDEX"), ASKED),
        "out": (Out, ASKED),
        "recipe": (Recipe, "prepare_ct"),
        **POOL,
        "minutes": (option(float, "Longest time for one scan, in a process of its own."), 30.0),
        "renew": (option(int, "Scans after which such a process is renewed.", min=1), 100),
        "ignore_space": (option(bool, "Begin though the disk seems too small.", "--ignore-space"), False),
        **ENDINGS,
        **OVERRIDES,
    },
)
_command(
    "pretrain",
    "Train an encoder on a store, without labels.",
    {
        "recipe": (Recipe, ASKED),
        "store": (option(Path, "Folder that prepare left."), ASKED),
        "out": (Out, ASKED),
        **ENDINGS,
        **OVERRIDES,
    },
)
_command(
    "bench",
    "Tell what a pretraining recipe would cost on this machine.",
    {
        "recipe": (Recipe, ASKED),
        "store": (option(Path | None, "Folder that prepare left; without it a small synthetic one is made."), None),
        "out": (option(Path | None, "Folder for bench.json; must be new or empty. Without it the figures are only told."), None),
        "steps": (option(int, "Steps to measure, after a few that are not.", min=1), 10),
        "overwrite": ENDINGS["overwrite"],
        **OVERRIDES,
    },
)
_command(
    "export",
    "Hand the network of a run to other tools.",
    {
        "source": (argument(Path, "RUN_OR_BUNDLE"), ASKED),
        "to": (option(str, "Format: bundle, nnunet, monai or onnx; of a finetune run monai or onnx."), ASKED),
        "out": (Out, ASKED),
        "plans": (option(Path | None, "nnunet: nnUNetPlans.json of the data set to fine-tune on."), None),
        "channels": (option(int | None, "Of an encoder: input channels of the network there, if others than its own.", min=1), None),
        "patch": (option(Any, "monai, onnx: sides of the patch in voxels.", parser=three_sides, metavar="X,Y,Z"), None),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command("finetune", "Train a segmentation network from a bundle or from scratch.", LABELLED)
_command(
    "detect",
    "Learn which candidates are nodules, or score new ones by a run that has.",
    {
        "recipe": (option(str | None, "To learn: a recipe file, or the name of a shipped recipe."), None),
        "model": (option(Path | None, "To score: a finished run of detect, in place of a recipe.", metavar="RUN"), None),
        **{name: kind for name, kind in LABELLED.items() if name != "recipe"},
    },
)
_command(
    "predict",
    "Segment images: one label map each, on the image's grid.",
    {
        "run": (argument(Path, "RUN"), ASKED),
        "inputs": (argument(list[Path], "INPUT"), ASKED),
        "out": (Out, ASKED),
        "ensemble": (option(list[Path], "A further run, such as another fold, whose shares count as much; once for each."), ()),
        "format": (option(str, "Format: nifti; or dicomseg, for DICOM alone, which bears the patient's header."), "nifti"),
        "probabilities": (option(bool, "Write the share of each label or region, too.", "--probabilities"), False),
        **ENDINGS,
    },
)
_command(
    "embed",
    "Turn scans into features: per volume, per patch, or of every place.",
    {
        "bundle": (argument(Path, "BUNDLE"), ASKED),
        "inputs": (argument(list[Path], "STORE|INPUT"), ASKED),
        "out": (option(Path, "Table to write, .parquet or .npz; for dense a folder."), ASKED),
        "per": (option(str, "A row per volume (mean of its patches) or patch; or dense: all places, an .npz per scan."), "volume"),
        "level": (option(str, "Which of the encoder's maps: coarsest, finest, or a number from 0, the finest."), "coarsest"),
        "patches": (option(int, "Patches drawn in each volume; 0: a grid over the body.", min=0), 0),
        "patch": (option(Any, "Sides of a patch in voxels; else those of the pretraining.", parser=three_sides, metavar="X,Y,Z"), None),
        "normalise": (option(bool, "Divide each feature by its length.", "--normalise"), False),
        "seed": (option(int, "Seed of the patches that are drawn."), 0),
        "precision": (option(str, "fp32, bf16, or auto: bf16 where the device multiplies it."), "auto"),
        "batch": (option(int, "Patches at once.", min=1), 4),
        "names": (option(bool, "Write the names of image files.", "--names"), False),
        "page": (option(bool, "Write the page of nearest neighbours beside the table of a store.", "--page"), False),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "evaluate",
    "Score label maps or candidates: one row per case, region and metric.",
    {
        "predictions": (argument(Path, "PREDICTIONS"), ASKED),
        "references": (argument(Path, "REFERENCES"), ASKED),
        "recipe": (option(str | None, "A recipe of finetune, or a run's folder: names labels, regions and protocol."), None),
        "protocol": (option(str | None, "dice, brats2023, brats_voxel, lits2017 or luna16; else the recipe's, else dice."), None),
        "out": (Out, ASKED),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "study",
    "Tell whether pretraining pays: arms against scratch.",
    {
        "recipe": (Recipe, ASKED),
        "data": (option(Path, "Labelled cases, laid out as finetune takes them."), ASKED),
        "out": (Out, ASKED),
        **POOL,
        "minutes": (option(float, "Longest time for one job, in a process of its own."), 1440.0),
        "quick": (option(bool, "Shrink the recipe to minutes, to see that it runs.", "--quick"), False),
        "estimate": (option(bool, "Stop after the checks and the estimate of the hours.", "--estimate"), False),
        "hours": (option(float, "Begin no job after so many hours, and leave the rest for --resume; 0: no bound.", min=0.0), 0.0),
        **ENDINGS,
        **OVERRIDES,
    },
)
_command(
    "report",
    "Put runs, a study or nearest neighbours on one self-contained HTML page.",
    {
        "runs": (argument(list[Path], "RUN|STUDY|TABLE"), ASKED),
        "out": (option(Path, "HTML file to write."), ASKED),
        "store": (option(Path | None, "Of a table that embed made of it: the store, whose scans are drawn."), None),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "phantom",
    "Make labelled synthetic CT scans, for studies and trials.",
    {
        "out": (Out, ASKED),
        "cases": (option(int, "How many patients, one scan each.", min=1), ASKED),
        "organs": (option(bool, "Label kidneys and gallbladder besides liver and lesions.", "--organs"), False),
        "size": (option(int, "Rows and columns of a slice.", min=8), 96),
        "seed": (option(int, "Seed of the patients.", min=0), 0),
    },
)
_command(
    "demo",
    "Run the whole pipeline on synthetic scans, to a report.",
    {"out": (Out, ASKED), "seed": (option(int, "Seed of phantoms, weights and draws.", min=0), 0), "overwrite": ENDINGS["overwrite"]},
)

if __name__ == "__main__":
    main()
