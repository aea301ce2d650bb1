"""What is to be segmented: files, folders and DICOM series -> one item each, read only when its turn comes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from volssl.archive import Found, Source, Unreadable, find, read_image, read_source
from volssl.datasets import SUFFIXES, brats, stem
from volssl.dicom import is_dicom
from volssl.examine import Facts, examined
from volssl.files import BadInput, track
from volssl.gates import Gates
from volssl.reasons import explained
from volssl.volume import Volume

CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")  # nnU-Net's name of one channel's file
MANY = 20  # series from which on it shows how far the look at them has come
GATES = Gates(min_slices=2)  # a scan too thin to learn from can still be segmented


@dataclass(frozen=True)
class Item:
    """One image to segment.

    Attributes: name: of the output; None for DICOM, which is named after its voxels. shown: how tables and messages call it. files: what
        complaints may name it by; none for DICOM. series: of DICOM, one per channel.
    """

    name: str | None
    shown: str
    read: Callable[[], Volume]
    files: tuple[Path, ...] = ()
    series: tuple[Source, ...] = ()

    @property
    def repairs(self) -> list[str]:
        """Codes of what reading mends."""
        return sorted({code for source in self.series for code in source.repairs})


@dataclass
class _Series:
    facts: Facts
    folder: Path
    shown: str


def gather(
    inputs: Sequence[Path], *, channels: int, names: Sequence[str] = (), distinct: bool = True
) -> tuple[list[Item], list[dict[str, str]]]:
    """What is to be segmented, and failures.csv's rows of what should be an image but cannot be read, or is refused by the index's gates.

    Args: channels: of the model; names: theirs. Those of BraTS are also taken by BraTS's file names, whose label maps are passed over.
        distinct: whether each image must have a name of its own, by which an output is called.
    Raises: BadInput: nothing there, or two inputs of one name.
    """
    files: list[Path] = []
    series: list[_Series] = []
    failures: list[dict[str, str]] = []
    if gone := [str(path) for path in inputs if not path.exists()]:
        raise BadInput(f"inputs: every one must exist; found nothing at {', '.join(gone)}")
    for path in inputs:
        if path.is_dir():
            findings = find([path])
            files += [found.files[0] for found in findings.scans if found.kind == "file"]
            series += _examined([found for found in findings.scans if found.kind == "dicom"], begin=len(series) + 1)
            failures += [{"input": _shown(file, number), "reason": code} for number, (file, code) in enumerate(findings.unreadable.items())]
        elif path.name.lower().endswith(SUFFIXES) or not is_dicom(path):
            files.append(path)
        else:
            beside = [file for file in sorted(path.parent.iterdir()) if file.is_file()]
            meant = [found for found in find(beside).scans if path.absolute() in found.files and found.kind == "dicom"]
            series += _examined(meant, begin=len(series) + 1)
            failures += [] if meant else [{"input": "DICOM series of one named file", "reason": "undecodable"}]
    # A folder in nnU-Net's layout bears the channel in every name, also where there is but one.
    by_case = channels > 1 or (bool(files) and all(stem(path).endswith("_0000") for path in files))
    contrasts, files = _contrasts(files) if tuple(names) == brats.CHANNELS else ([], files)
    items = _of_series(series, failures, channels) + contrasts + (_by_case(files) if by_case else [_item(path) for path in files])
    if not items and not failures:
        raise BadInput("inputs: must hold at least one image; found none")
    names = [item.name for item in items if item.name]
    if distinct and (twice := sorted({name for name in names if names.count(name) > 1})):
        raise BadInput(
            f"inputs: every image must have its own name; found several called {', '.join(twice)}; predict them into different folders"
        )
    return items, failures


def _examined(scans: Sequence[Found], *, begin: int) -> list[_Series]:
    # The index's own look at each series: what cannot be trusted is refused, what can be mended will be.
    made: list[_Series] = []
    for found in track(scans, total=len(scans), label="look at series") if len(scans) > MANY else scans:
        for facts in examined(GATES, list(found.slices)):
            made.append(_Series(facts, found.files[0].parent, f"DICOM series {begin + len(made)}"))
    return made


def _of_series(series: Sequence[_Series], failures: list[dict[str, str]], channels: int) -> list[Item]:
    cases: dict[tuple[Path, str], list[_Series]] = {}
    items = []
    for one in series:
        if one.facts.failure or GATES.verdict(one.facts.reasons) == "reject":
            failures.append({"input": one.shown, "reason": _told(one.facts)})
        elif channels > 1 and (match := CHANNEL.match(one.folder.name)):
            cases.setdefault((one.folder.parent, match["case"]), []).append(one)
        else:
            items.append(Item(None, one.shown, partial(read_source, one.facts.source), series=(one.facts.source,)))
    for of_case in cases.values():
        of_case.sort(key=lambda one: one.folder.name)
        sources, names = tuple(one.facts.source for one in of_case), [one.folder.name for one in of_case]
        items.append(Item(None, of_case[0].shown, partial(_stacked, names, [partial(read_source, one) for one in sources]), series=sources))
    return items


def _told(facts: Facts) -> str:
    codes = [facts.failure] if facts.failure else sorted(code for code in facts.reasons if GATES.verdict([code]) == "reject")
    return "; ".join(f"{code}: {explained(code)[0]} {explained(code)[1]}" for code in codes)


def _item(path: Path) -> Item:
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
    for case, paths in cases.items():
        paths = sorted(paths, key=stem)
        reads = partial(_stacked, [stem(path) for path in paths], [partial(read_image, path) for path in paths])
        items.append(Item(case, case, reads, tuple(paths)))
    return items


def _contrasts(files: Sequence[Path]) -> tuple[list[Item], list[Path]]:
    """Files that BraTS's names tell, gathered into cases, and the other files."""
    cases: dict[str, list[tuple[str, Path]]] = {}
    others = []
    for path in files:
        told = brats.contrast_of(path.name)
        if told is None:
            others.append(path)
        elif told[1] in brats.CHANNELS:
            cases.setdefault(told[0], []).append((told[1], path))
    return [_case_of_contrasts(case, found) for case, found in cases.items()], others


def _case_of_contrasts(case: str, found: Sequence[tuple[str, Path]]) -> Item:
    ordered = sorted(found, key=lambda one: (brats.CHANNELS.index(one[0]), one[1]))
    paths = tuple(path for _, path in ordered)

    def read() -> Volume:
        if (names := tuple(contrast for contrast, _ in ordered)) != brats.CHANNELS:
            raise BadInput(f"a case must have the contrasts {', '.join(brats.CHANNELS)}, each once; found {', '.join(names)}")
        return _joined([partial(read_image, path) for path in paths])

    return Item(case, case, read, paths)


def _stacked(names: Sequence[str], reads: Sequence[Callable[[], Volume]]) -> Volume:
    found = [name[-4:] for name in names]
    if found != [f"{channel:04d}" for channel in range(len(names))]:
        raise BadInput(f"the channels of a case must be numbered 0000, 0001, ..., each once; found {', '.join(found)}")
    return _joined(reads)


def _joined(reads: Sequence[Callable[[], Volume]]) -> Volume:
    volumes = [read() for read in reads]
    grid = volumes[0].grid
    if not all(volume.grid.almost_equal(grid, tolerance_mm=0.1 * min(grid.spacing_mm)) for volume in volumes):
        raise BadInput("the channels of a case must lie on one grid; found different ones; resample them onto the first")
    return Volume(np.concatenate([volume.array_CXYZ for volume in volumes]), grid)


def reason_of(error: BadInput, files: Sequence[Path]) -> str:
    """A complaint for failures.csv, without the paths of the files it is about."""
    # It begins with the path, whose folders may be called after patients; in a DICOM folder files may be, too.
    if isinstance(error, Unreadable) and not files:
        return f"{error.code}: {explained(error.code)[0]}"
    text = str(error)
    for file in files:
        text = text.replace(str(file), "the file")
    return text


def voxel_hash(volume: Volume) -> str:
    """A hash of the voxels without a key: the same series gives the same name on every machine, and the name tells nothing about it."""
    digest = hashlib.blake2b(digest_size=6)
    for channel_XYZ in volume.array_CXYZ:
        for plane in channel_XYZ:  # the bytes of the whole array in order, without a copy of it
            digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()
