"""What predictions are judged against: a folder of label maps under the predictions' names, or a data set in a public layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from volssl.archive import read_label
from volssl.datasets import SUFFIXES, Case, Data, layouts, open_dataset, stem
from volssl.files import BadInput, tell
from volssl.intake import read_reference
from volssl.volume import Volume

PUBLISHED = re.compile(r"(?P<case>.+)[_-]seg|segmentation-(?P<number>\d+)")  # label maps of BraTS and LiTS, beside <case> and volume-N


@dataclass(frozen=True)
class Reference:
    """The label map of one case. read: raises BadInput if it cannot. files: what complaints quote, and no artefact may hold."""

    read: Callable[[], Volume]
    files: tuple[Path, ...] = ()

    def if_readable(self) -> Volume | None:
        """The label map, or None."""
        try:
            return self.read()
        except BadInput:
            return None


@dataclass(frozen=True)
class Expected:
    """The references by case. labels, regions: what a data set says its values are; none of a plain folder."""

    references: Mapping[str, Reference]
    labels: dict[str, int] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)


def expected_of(folder: Path, predicted: Collection[str], *, data: Data, held_out: Collection[str] = ()) -> Expected:
    """The references of a folder.

    Of a data set those cases count that were predicted or that are in `held_out`: most of it was learnt from. Of a plain folder all do.
    Args: predicted: names of the predictions. data: how a data set is read.
    Raises: BadInput: no label maps there, none whose name is that of a prediction, or as `open_dataset`.
    """
    if folder.is_dir() and any(module.recognises(folder) for module in layouts().values()):
        table = open_dataset(folder, data=replace(data, leave_out=()))
        if any(case.label is not None for case in table.cases):  # else these are label maps under the names of images
            cases = {case.case_id: case for case in table.cases}
            _meet(predicted, cases)
            chosen = {name: case for name, case in cases.items() if name in predicted or name in held_out}
            if left := len(cases) - len(chosen):
                tell(f"evaluate: {left} of the data set's {len(cases)} cases were not predicted and are left out")
            references = {name: Reference(partial(read_reference, case, table), _files(case)) for name, case in chosen.items()}
            return Expected(references, table.labels, table.regions)
    maps = _as_images(label_maps(folder, "references"), predicted)
    _meet(predicted, maps)
    return Expected({name: Reference(partial(read_label, path), (path,)) for name, path in maps.items()})


def _meet(predicted: Collection[str], expected: Collection[str]) -> None:
    if not set(predicted) & set(expected):
        raise BadInput(
            "predictions and references: a case must bear the same name in both; found none that does, but such as "
            f"{min(predicted)} and {min(expected)}; rename the files"
        )


def _files(case: Case) -> tuple[Path, ...]:
    return (*case.images, *((case.label,) if isinstance(case.label, Path) else ()))


def _as_images(expected: Mapping[str, Path], predicted: Collection[str]) -> dict[str, Path]:
    """References under the names of their images, where those were predicted: a_seg as a, segmentation-3 as volume-3."""
    named = dict(expected)
    for name in expected:
        if match := PUBLISHED.fullmatch(name):
            image = match["case"] or f"volume-{match['number']}"
            if image in predicted and image not in named and name not in predicted:
                named[image] = named.pop(name)
    return named


def label_maps(folder: Path, what: str) -> dict[str, Path]:
    """The label maps in a folder by name. Raises: BadInput: none there, or several of one name."""
    if not folder.is_dir():
        raise BadInput(f"{what} {folder}: must be a folder of label maps; found {'a file' if folder.exists() else 'nothing there'}")
    files = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")]
    if not files:
        raise BadInput(f"{what} {folder}: must hold label maps ({', '.join(SUFFIXES)}); found none")
    twice = sorted({stem(path) for path in files if sum(stem(path) == stem(other) for other in files) > 1})
    if twice:
        raise BadInput(f"{what} {folder}: one label map per case must hold; found several for {', '.join(twice)}")
    return {stem(path): path for path in files}


def all_values(maps: Sequence[Reference]) -> dict[str, int]:
    """Every value of some label maps as a label; one that cannot be read fails its own case, later. Raises: BadInput: nothing but 0."""
    read = (volume for one in maps if (volume := one.if_readable()) is not None)
    values = sorted({int(value) for volume in read for value in np.unique(volume.array_CXYZ)} - {0})
    if not values:
        raise BadInput("references: must hold at least one label; found only 0; or name the labels in the recipe")
    return {str(value): value for value in values}
