"""What several verbs are asked for on the command line: options, their help and their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def share_or_count(given: str | float) -> int | float:
    """`0.1` is a share of the labelled training cases, `12` a count of them; so `1.0` is all and `1` a single case."""
    text = str(given).strip()  # the default comes as the number it is
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a share such as 0.1 or a count such as 12; found {text!r}") from None


def three_sides(given: str) -> tuple[int, int, int]:
    """`64,64,32` as sides in voxels, X Y Z."""
    sides = given.replace("x", ",").split(",")
    if len(sides) != 3 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise typer.BadParameter(f"must be three whole numbers above 0, such as 64,64,32; found {given!r}")
    return int(sides[0]), int(sides[1]), int(sides[2])


def argument(kind: Any, metavar: str) -> Any:
    """The annotation of an argument that the user must give."""
    return Annotated[kind, typer.Argument(metavar=metavar, show_default=False)]


def option(kind: Any, help: str, *names: str, **settings: Any) -> Any:
    """The annotation of an option."""
    return Annotated[kind, typer.Option(*names, help=help, **settings)]


Out = option(Path, "Folder to write; must be new or empty.")
Recipe = option(str, "A recipe file, or the name of a shipped recipe.")
Workers = option(int, "Processes that work beside this one; 0: none, this one does it all.", min=0)
Resume = option(bool, "Go on in --out where an earlier call stopped.", "--resume")
Overwrite = option(bool, "Replace what an earlier call left in --out.", "--overwrite")
Labels = option(Any, "Share (0.1) or count (12) of the training patients to use.", parser=share_or_count, metavar="SHARE|COUNT")
Overrides = Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="Replace any key of the recipe.", show_default=False)]
ENDINGS: dict[str, tuple[Any, Any]] = {"resume": (Resume, False), "overwrite": (Overwrite, False)}
OVERRIDES: dict[str, tuple[Any, Any]] = {"overrides": (Overrides, ())}
POOL: dict[str, tuple[Any, Any]] = {
    "workers": (Workers, 0),
    "scheduler": (option(str | None, "Dask scheduler whose workers do it: tcp://HOST:PORT."), None),
    "memory_gib": (option(float, "Memory of a process beside this one; 0: an equal share of this machine."), 0.0),
}
LOOK: dict[str, tuple[Any, Any]] = {
    "thumbnails": (option(bool, "Show pictures of a few scans.", "--thumbnails/--no-thumbnails"), True),
    "vendors": (option(bool, "Count the makers of the scanners.", "--vendors"), False),
}
# Settings of volssl.gates.Gates, whose defaults these are (a test holds it): that module is not imported for a help page.
GATES: dict[str, tuple[Any, Any]] = {
    "modality": (option(str | None, "What all files other than DICOM are: CT, MR or PT; else their values tell."), None),
    "min_slices": (option(int, "Fewer slices are too few."), 8),
    "position_mm": (option(float, "How far a slice may lie off its even place."), 0.1),
    "position_share": (option(float, "The same as a share of the distance of slices, if that is more."), 0.05),
    "missing_from": (option(float, "A gap of this many usual distances means that slices are missing."), 1.5),
    "tilt_deg": (option(float, "Largest lean of a stack that is not mended."), 0.2),
    "max_tilt_deg": (option(float, "Largest lean of a stack that is mended."), 45.0),
    "direction": (option(float, "Largest difference of direction cosines within a stack."), 1e-3),
    "derived": (option(str, "Derived images: auto takes those not computed from others, accept or reject takes all or none."), "auto"),
    "content": (option(str, "slices: decode four of each series, to find copies and wrong values; none: headers only."), "slices"),
    "duplicate_tolerance": (option(float, "Largest difference of copies, in standard deviations."), 1e-3),
    "patient_pattern": (
        option(str, "Regular expression that finds the patient in the path of a file."),
        r"(?:^|/)(sub-[A-Za-z0-9]+)(?=[/_])",
    ),
    "siblings": (option(int, "Up to so many files of one grid in one subfolder stay on one side of the split."), 8),
    "validation_share": (option(float, "Share of the patients that is held out."), 0.1),
    "key": (option(Path | None, "File with the key of the pseudonyms; else one is made."), None),
}
