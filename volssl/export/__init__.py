"""Verb export: a run's encoder in a format that other tools read; one file of this shelf per format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from volssl import __version__
from volssl.files import BadInput, Outcome, check_out, claim_out, write_json
from volssl.nets.sides import side_fault, triple

# Format -> its function `(source, options) -> write`: it checks all that can be wrong with a run or bundle; `write(folder)` then fills an
# empty folder and gives a line on what it wrote.
FORMATS = {to: f"volssl.export.{to}:export" for to in ("bundle", "nnunet", "monai", "onnx")}
TRAINED = {to: f"volssl.deploy:{to}" for to in ("monai", "onnx")}  # the same for a finetune run, whose network segments
Writer = Callable[[Path], str]


@dataclass(frozen=True)
class Options:
    """What some formats want to know; each refuses what it does not take.

    Attributes: plans: an nnUNetPlans.json of the data set to fine-tune on. channels: input channels of the network there. patch: sides in
        voxels, X Y Z, of what the network is to take.
    """

    plans: Path | None = None
    channels: int | None = None
    patch: tuple[int, int, int] | None = None

    def refuse(self, to: str, *taken: str) -> None:
        """Raises: BadInput: if one was given that the format `to` does not take."""
        if others := [name for name in ("plans", "channels", "patch") if name not in taken and getattr(self, name) is not None]:
            raise BadInput(f"--{others[0]}: is not for --to {to}; leave it out")


NONE = Options()


def run(source: Path, *, to: str, out: Path, options: Options = NONE, overwrite: bool = False) -> Outcome:
    """Export the encoder of a run, or of a bundle, as format `to` into the folder `out`.

    Raises: BadInput: unknown format, `out` in use, a source that holds no sound bundle or one that the format cannot take.
    """
    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise BadInput(f"--to {to}: must be one of {', '.join(FORMATS)}")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise BadInput(f"--out {out} must lie outside the source {source}; choose another folder")
    inputs = [Path(options.plans)] if options.plans is not None else []
    check_out(out, overwrite=overwrite, inputs=inputs)
    write = writer(to, source, options)  # before anything in `out` is touched
    claim_out(out, overwrite=overwrite, inputs=inputs)
    write_json(out / "export.json", {"format": to, "volssl_version": __version__})  # by which --overwrite knows its own
    return Outcome(out, message=write(out))


def writer(to: str, source: Path, options: Options = NONE) -> Writer:
    """What writes `source` as format `to`; all is checked by then. Raises: BadInput: what does not fit, and what would."""
    trained = (source / "model.json").exists()
    if trained and to not in TRAINED:
        raise BadInput(
            f"--to {to}: takes a pretrained encoder; found a finetune run; for that --to must be one of {', '.join(TRAINED)}, or export "
            "the bundle it began from"
        )
    module, _, name = (TRAINED if trained else FORMATS)[to].partition(":")
    return getattr(import_module(module), name)(source, options)


def checked(formats: str | Sequence[str] | None) -> tuple[str, ...]:
    """The formats that a recipe names under `export`. Raises: BadInput: one that is not known."""
    named = (formats,) if isinstance(formats, str) else tuple(formats or ())
    if unknown := [to for to in named if to not in FORMATS]:
        raise BadInput(f"export: must be among {', '.join(FORMATS)}; found {', '.join(unknown)}")
    return named


def norm_of(architecture: Mapping[str, Any]) -> str:
    """The normalisation of a card's or plan's architecture; the backbones' own default is not written into every one."""
    return architecture["arguments"].get("norm", "batch")


def patch_of(given: Sequence[int] | None, known: Sequence[int] | None, net: Any, norm: str) -> tuple[int, int, int]:
    """Sides in voxels of what a network is exported for: those given, else those known of it.

    Args: net: backbone or encoder; its `stride`, or the last of its `strides`, must divide them. norm: its normalisation.
    Raises: BadInput: neither is there, or the network cannot take them.
    """
    sides = given or known
    if sides is None:
        raise BadInput(
            "--patch X,Y,Z: must be given, since the bundle's card does not say what it was trained on; such as --patch 64,64,64"
        )
    patch_vox = triple(sides)
    stride = net.strides[-1] if hasattr(net, "strides") else net.stride
    if (fault := side_fault(patch_vox, stride, norm=norm, batch=1)) is not None:
        raise BadInput(f"--patch: {fault}")
    return patch_vox


def prove(bundle: Path, formats: Sequence[str]) -> None:
    """Export a bundle in all these formats to a temporary folder; each loads what it wrote as its reader will. Raises: BadInput."""
    for to in formats:
        with tempfile.TemporaryDirectory(prefix="volssl-") as folder:
            writer(to, bundle)(Path(folder))
