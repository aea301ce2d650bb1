"""How trouble is told on the screen: what the user named may be named, what was found in an archive may not."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Verbs that read what patients' names may stand in, and so may the texts of unexpected errors.
READS_ARCHIVES = {"fetch", "index", "quality", "prepare", "predict", "embed"}
WHOLE_TRACEBACK = "VOLSSL_WHOLE_TRACEBACK"


def is_withheld(verb: str) -> bool:
    """Whether the text of an unexpected error of this verb is kept back."""
    return verb in READS_ARCHIVES and not os.environ.get(WHOLE_TRACEBACK)


def fault(error: Exception) -> str:
    """An unexpected error by its place and type: texts of errors quote what was read, such as header values and names of files."""
    place = "".join(traceback.format_tb(error.__traceback__))
    told = f"its text may quote patients' data and is withheld; set {WHOLE_TRACEBACK}=1 to see it"
    return f"A fault of volssl, please report it. It came up here:\n{place}{type(error).__name__}: {told}"


def complaint(error: Exception, options: Mapping[str, Any]) -> str:
    """What the user can mend, in one line. Args: options: of the verb; files in its `archives` or `inputs` are not named."""
    if isinstance(error, OSError) and error.strerror:
        return f"{_shown(Path(error.filename), options)}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _shown(file: Path, options: Mapping[str, Any]) -> str:
    folders = [Path(given) for name in ("archives", "inputs") for given in options.get(name, ())]
    return next((f"a file in {folder}" for folder in folders if folder in file.parents), str(file))
