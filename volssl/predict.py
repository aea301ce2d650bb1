"""Verb predict: a finetune run -> one label map per image, on the image's own grid. A bad input is named and the rest goes on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volssl.archive import Unreadable, find, read, read_image, write_nifti
from volssl.datasets import SUFFIXES, stem
from volssl.files import BadInput, Outcome, check_out, claim_out, track, write_csv
from volssl.journal import write_environment
from volssl.reasons import explained
from volssl.segment import read_model
from volssl.volume import Volume

CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")  # nnU-Net's name of one channel's file


@dataclass(frozen=True)
class Item:
    """One image to segment. `name`: of the output; None for DICOM, which is named after its voxels. `shown`: how failures.csv calls it.

    `files`: what complaints may name it by; none for DICOM.
    """

    name: str | None
    shown: str
    read: Callable[[], Volume]
    files: tuple[Path, ...] = ()


def run(run: Path, inputs: Sequence[Path], *, out: Path, format: str = "nifti", overwrite: bool = False) -> Outcome:
    """Segment images with the model of a finetune run.

    Args:
        run: its folder. inputs: image files, folders with images at any depth, DICOM series folders or one file of a series. A model of
            several channels takes 4D files, or one file per channel named as nnU-Net does (`<case>_0000.nii.gz` ...).
        out: label maps (uint8 NIfTI) under the names of the inputs; a DICOM series gives `series_<hash of its voxels>.nii.gz`.
    Returns: failed counts the inputs that could not be segmented; failures.csv names each with its reason.
    Raises: BadInput: no model, no input, an input that is not there, two inputs of one name, an unknown format, or not one image that
        could be segmented; `out` is then untouched.
    """
    out, inputs = Path(out), [Path(path) for path in inputs]
    claim: dict[str, Any] = {"overwrite": overwrite, "inputs": (run, *inputs)}
    check_out(out, **claim)
    if format != "nifti":
        raise BadInput(f"--format must be nifti; found {format!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_model(Path(run), device)
    items, failures = _items(inputs, channels=len(model.plan.channels))
    written = 0
    for item in track(items, total=len(items), label="predict"):
        try:
            volume = item.read()
            label_map = model.label_map(volume)
        except BadInput as error:
            failures.append({"input": item.shown, "reason": _reason(error, item.files)})
            continue
        if not written:
            claim_out(out, **claim)
            write_environment(out, device=device, precision="32-true", seed=0)
        name = item.name or f"series_{_voxel_hash(volume)}"
        write_nifti(out / f"{name}.nii.gz", label_map, volume.grid, np.uint8)
        written += 1
    if not written:
        told = "\n  ".join(f"{failure['input']}: {failure['reason']}" for failure in failures)
        raise BadInput(f"inputs: none of {len(failures)} could be segmented:\n  {told}")
    write_csv(out / "failures.csv", failures, ("input", "reason"))
    return Outcome(out, failed=len(failures), message=f"{written} label maps")


def _voxel_hash(volume: Volume) -> str:
    # The same series gives the same name on every machine, and the name tells nothing about it.
    return hashlib.blake2b(np.ascontiguousarray(volume.array_CXYZ).tobytes(), digest_size=6).hexdigest()


def _items(inputs: Sequence[Path], *, channels: int) -> tuple[list[Item], list[dict[str, str]]]:
    """What is to be segmented, and what in the given folders should be an image but cannot be read."""
    files: list[Path] = []
    items: list[Item] = []
    failures: list[dict[str, str]] = []
    if gone := [str(path) for path in inputs if not path.exists()]:
        raise BadInput(f"inputs: every one must exist; found nothing at {', '.join(gone)}")
    for path in inputs:
        if not path.is_dir():
            files.append(path)
            continue
        findings = find([path])
        files += [found.files[0] for found in findings.scans if found.kind == "file"]
        series = [found for found in findings.scans if found.kind == "dicom"]
        items += [Item(None, f"DICOM series {len(items) + number}", partial(read, found)) for number, found in enumerate(series)]
        failures += [{"input": _shown(file, number), "reason": code} for number, (file, code) in enumerate(findings.unreadable.items())]
    # A folder in nnU-Net's layout bears the channel in every name, also where there is but one.
    by_case = channels > 1 or (bool(files) and all(stem(path).endswith("_0000") for path in files))
    items += _by_case(files) if by_case else [_item(path) for path in files]
    if not items and not failures:
        raise BadInput("inputs: must hold at least one image; found none")
    names = [item.name for item in items if item.name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(
            f"inputs: every image must have its own name; found several called {', '.join(twice)}; predict them into different folders"
        )
    return items, failures


def _item(path: Path) -> Item:
    if path.is_file() and not path.name.lower().endswith(SUFFIXES):
        return Item(None, "DICOM series of one named file", partial(read_image, path))
    return Item(stem(path), stem(path), partial(read_image, path), (path,))


def _shown(path: Path, number: int) -> str:
    # Names of DICOM files often hold identifiers; names of image files are the user's own.
    return stem(path) if path.name.lower().endswith(SUFFIXES) else f"unreadable file {number}"


def _by_case(files: Sequence[Path]) -> list[Item]:
    """Files of one channel each, named as nnU-Net does, gathered into cases; other files hold all channels."""
    cases: dict[str, list[Path]] = {}
    items = []
    for path in files:
        if match := CHANNEL.match(stem(path)):
            cases.setdefault(match["case"], []).append(path)
        else:
            items.append(_item(path))
    return items + [Item(case, case, partial(_stacked, sorted(paths, key=stem)), tuple(paths)) for case, paths in cases.items()]


def _stacked(paths: Sequence[Path]) -> Volume:
    found = [stem(path)[-4:] for path in paths]
    if found != [f"{channel:04d}" for channel in range(len(paths))]:
        raise BadInput(f"the channels of a case must be numbered 0000, 0001, ..., each once; found {', '.join(found)}")
    volumes = [read_image(path) for path in paths]
    grid = volumes[0].grid
    if not all(volume.grid.almost_equal(grid, tolerance_mm=0.1 * min(grid.spacing_mm)) for volume in volumes):
        raise BadInput("the channels of a case must lie on one grid; found different ones; resample them onto the first")
    return Volume(np.concatenate([volume.array_CXYZ for volume in volumes]), grid)


def _reason(error: BadInput, files: Sequence[Path]) -> str:
    # A complaint begins with the path, whose folders may be called after patients; in a DICOM folder files may be, too.
    if isinstance(error, Unreadable) and not files:
        return f"{error.code}: {explained(error.code)[0]}"
    text = str(error)
    for file in files:
        text = text.replace(str(file), "the file")
    return text
