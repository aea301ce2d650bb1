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

VERBS = {
    "fetch": "volssl.fetch:run",
    "index": "volssl.index:build",
    "quality": "volssl.quality:run",
    "prepare": "volssl.prepare:run",
    "pretrain": "volssl.pretrain:run",
    "bench": "volssl.bench:run",
    "export": "volssl.export:run",
    "finetune": "volssl.finetune:run",
    "predict": "volssl.predict:run",
    "evaluate": "volssl.evaluate:run",
    "report": "volssl.report:run",
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


def share_or_count(given: str | float) -> int | float:
    """`0.1` is a share of the labelled training cases, `12` a count of them; so `1.0` is all and `1` a single case."""
    text = str(given).strip()  # the default comes as the number it is
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a share such as 0.1 or a count such as 12; found {text!r}") from None


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


def _argument(kind: Any, metavar: str) -> Any:
    return Annotated[kind, typer.Argument(metavar=metavar, show_default=False)]


def _option(kind: Any, help: str, *names: str, **settings: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, **settings)]


Out = _option(Path, "Folder to write; must be new or empty.")
Recipe = _option(str, "A recipe file, or the name of a shipped recipe.")
Workers = _option(int, "Processes that work beside this one; 0: none, this one does it all.", min=0)
Resume = _option(bool, "Go on in --out where an earlier call stopped.", "--resume")
Overwrite = _option(bool, "Replace what an earlier call left in --out.", "--overwrite")
Labels = _option(Any, "Share (0.1) or count (12) of the training patients to use.", parser=share_or_count, metavar="SHARE|COUNT")
Overrides = Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="Replace any key of the recipe.", show_default=False)]
ENDINGS: dict[str, tuple[Any, Any]] = {"resume": (Resume, False), "overwrite": (Overwrite, False)}
OVERRIDES: dict[str, tuple[Any, Any]] = {"overrides": (Overrides, ())}
LOOK: dict[str, tuple[Any, Any]] = {
    "thumbnails": (_option(bool, "Show pictures of a few scans.", "--thumbnails/--no-thumbnails"), True),
    "vendors": (_option(bool, "Count the makers of the scanners.", "--vendors"), False),
}
# Settings of volssl.gates.Gates, whose defaults these are (a test holds it): that module is not imported for a help page.
GATES: dict[str, tuple[Any, Any]] = {
    "modality": (_option(str | None, "What all files other than DICOM are: CT, MR or PT; else their values tell."), None),
    "min_slices": (_option(int, "Fewer slices are too few."), 8),
    "position_mm": (_option(float, "How far a slice may lie off its even place."), 0.1),
    "position_share": (_option(float, "The same as a share of the distance of slices, if that is more."), 0.05),
    "missing_from": (_option(float, "A gap of this many usual distances means that slices are missing."), 1.5),
    "tilt_deg": (_option(float, "Largest lean of a stack that is not mended."), 0.2),
    "max_tilt_deg": (_option(float, "Largest lean of a stack that is mended."), 45.0),
    "direction": (_option(float, "Largest difference of direction cosines within a stack."), 1e-3),
    "derived": (_option(str, "Derived images: auto takes those not computed from others, accept or reject takes all or none."), "auto"),
    "content": (_option(str, "slices: decode four of each series, to find copies and wrong values; none: headers only."), "slices"),
    "duplicate_tolerance": (_option(float, "Largest difference of copies, in standard deviations."), 1e-3),
    "patient_pattern": (
        _option(str, "Regular expression that finds the patient in the path of a file."),
        r"(?:^|/)(sub-[A-Za-z0-9]+)(?=[/_])",
    ),
    "siblings": (_option(int, "Up to so many files of one grid in one subfolder stay on one side of the split."), 8),
    "validation_share": (_option(float, "Share of the patients that is held out."), 0.1),
    "key": (_option(Path | None, "File with the key of the pseudonyms; else one is made."), None),
}
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


_command(
    "fetch",
    "Pull series from a PACS over DICOMweb into a folder.",
    {
        "dicomweb": (_option(str, "Address of the service, as https://pacs.example/dicom-web.", metavar="URL"), ASKED),
        "query": (
            _option(list[str], "Which series, as Modality=CT; if given again, all must hold.", metavar="KEY=VALUE"),
            ASKED,
        ),
        "out": (_option(Path, "Folder to write, for patients' data; must be new or empty."), ASKED),
        "parallel": (_option(int, "Series pulled at a time."), 2),
        "retries": (_option(int, "Further tries of a request that breaks, after growing waits.", min=0), 4),
        "timeout_s": (_option(float, "Longest silence of the server, in seconds."), 120.0),
        "ca": (_option(Path | None, "File of the authority to trust (PEM) in place of the system's."), None),
        "allow_http": (_option(bool, "Let patients' data cross the network in the clear.", "--allow-http"), False),
        "resume": ENDINGS["resume"],
    },
)
_command(
    "index",
    "Find every scan: one row each with facts, verdict and split.",
    {
        "archives": (_argument(list[Path], "ARCHIVE"), ASKED),
        "out": (Out, ASKED),
        "workers": (Workers, 0),
        "seed": (_option(int, "Seed of the patient-wise split."), 0),
        **GATES,
        **LOOK,
        **ENDINGS,
    },
)
_command(
    "quality",
    "Write anew the page that shows what an index or a store holds.",
    {"folder": (_argument(Path, "INDEX|STORE"), ASKED), **LOOK},
)
_command(
    "prepare",
    "Bring scans to one orientation, spacing and type.",
    {
        "index": (_argument(Path, "INDEX"), ASKED),
        "out": (Out, ASKED),
        "recipe": (Recipe, "prepare_ct"),
        "workers": (Workers, 0),
        "scheduler": (_option(str | None, "Dask scheduler whose workers do it: tcp://HOST:PORT."), None),
        "minutes": (_option(float, "Longest time for one scan, in a process of its own."), 30.0),
        "memory_gib": (_option(float, "Memory of such a process; 0: an equal share of this machine."), 0.0),
        "renew": (_option(int, "Scans after which such a process is renewed.", min=1), 100),
        "ignore_space": (_option(bool, "Begin though the disk seems too small.", "--ignore-space"), False),
        **ENDINGS,
        **OVERRIDES,
    },
)
_command(
    "pretrain",
    "Train an encoder on a store, without labels.",
    {
        "recipe": (Recipe, ASKED),
        "store": (_option(Path, "Folder that prepare left."), ASKED),
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
        "store": (_option(Path | None, "Folder that prepare left; without it a small synthetic one is made."), None),
        "out": (_option(Path | None, "Folder for bench.json; must be new or empty. Without it the figures are only told."), None),
        "steps": (_option(int, "Steps to measure, after a few that are not.", min=1), 10),
        "overwrite": ENDINGS["overwrite"],
        **OVERRIDES,
    },
)
_command(
    "export",
    "Copy the encoder of a run in a format others read.",
    {
        "source": (_argument(Path, "RUN_OR_BUNDLE"), ASKED),
        "to": (_option(str, "Format: bundle."), ASKED),
        "out": (Out, ASKED),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "finetune",
    "Train a segmentation network from a bundle or from scratch.",
    {
        "recipe": (Recipe, ASKED),
        "data": (
            _option(Path, "Labelled cases, laid out as the Decathlon or nnU-Net v2 does."),
            ASKED,
        ),
        "weights": (_option(Path | None, "Bundle to start from; without it the network starts from scratch."), None),
        "out": (Out, ASKED),
        "fold": (_option(int, "Which fold is held out.", min=0), 0),
        "labels": (Labels, 1.0),
        "seed": (_option(int, "Seed of the first weights and of the draws."), 0),
        **ENDINGS,
        **OVERRIDES,
    },
)
_command(
    "predict",
    "Segment images: one label map each, on the image's grid.",
    {
        "run": (_argument(Path, "RUN"), ASKED),
        "inputs": (_argument(list[Path], "INPUT"), ASKED),
        "out": (Out, ASKED),
        "format": (_option(str, "Format: nifti."), "nifti"),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "evaluate",
    "Score label maps: one row per case and label.",
    {
        "predictions": (_argument(Path, "PREDICTIONS"), ASKED),
        "references": (_argument(Path, "REFERENCES"), ASKED),
        "recipe": (Recipe, ASKED),
        "out": (Out, ASKED),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "report",
    "Put runs on one self-contained HTML page.",
    {
        "runs": (_argument(list[Path], "RUN"), ASKED),
        "out": (_option(Path, "HTML file to write."), ASKED),
        "overwrite": ENDINGS["overwrite"],
    },
)
_command(
    "demo",
    "Run the whole pipeline on synthetic scans, to a report.",
    {"out": (Out, ASKED), "seed": (_option(int, "Seed of phantoms, weights and draws.", min=0), 0), "overwrite": ENDINGS["overwrite"]},
)

if __name__ == "__main__":
    main()
