"""Verb export: a run's encoder in a format that other tools read; one file of this shelf per format."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from volssl.files import BadInput, Outcome, claim_out

# Format -> the function that writes it: `(source, out)`, a run or bundle and an empty folder.
FORMATS = {"bundle": "volssl.export.bundle:export"}


def run(source: Path, *, to: str, out: Path, overwrite: bool = False) -> Outcome:
    """Export the encoder of a run, or of a bundle, as format `to` into the folder `out`.

    Raises: BadInput: unknown format, `out` in use, or a source that holds no sound bundle.
    """
    from volssl.export.bundle import load_bundle

    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise BadInput(f"--to {to}: must be one of {', '.join(FORMATS)}")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise BadInput(f"--out {out} must lie outside the source {source}; choose another folder")
    load_bundle(source)  # before anything in `out` is touched
    module, _, name = FORMATS[to].partition(":")
    getattr(import_module(module), name)(source, claim_out(out, overwrite=overwrite))
    return Outcome(out)
