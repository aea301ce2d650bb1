"""Which cases of a study are for pretraining and label draws, for validation and for testing, and proof that none is on two sides."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volssl.cases import Folds
from volssl.datasets import Case, CaseTable
from volssl.division import divide
from volssl.files import BadInput, read_csv, track
from volssl.fingerprint import Print, prints_of, twins
from volssl.intake import read_case
from volssl.volume import Volume

PARTS = ("pretrain", "validation", "test")
CLOSE = 1e-3  # as `volssl index` tells copies: largest difference of means of blocks, in standard deviations


@dataclass(frozen=True)
class Split:
    """How many patients are for what.

    Attributes: pretrain: unlabelled, and the draws of labelled cases. validation: choose the learning rate. test: scored once. seed: of the
        order. file: which cases are for what in place of numbers, as `division.read_sides` reads it; training cases are for pretraining.
        develop: leave the test share alone, for a study that chooses among settings: the validation share is tested in its place, and as
        many patients of the pretraining share, the last by name, validate; 0: an ordinary study.
    """

    pretrain: int = 0
    validation: int = 0
    test: int = 0
    seed: int = 0
    file: str | None = None
    develop: int = 0

    def __post_init__(self) -> None:
        if self.file is None and min(self.pretrain, self.validation, self.test) < 1:
            raise BadInput(
                "pretrain, validation and test must be >= 1 patients, or `file` be named; "
                f"found {self.pretrain}, {self.validation}, {self.test}"
            )
        if self.develop < 0:
            raise BadInput(f"develop must be a number of patients >= 0; found {self.develop}")


@dataclass(frozen=True)
class Shares:
    """The cases of one fold, each sorted by name."""

    pretrain: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]

    def names(self) -> dict[str, list[str]]:
        """Case names by part."""
        return {part: [case.case_id for case in getattr(self, part)] for part in PARTS}


def divided(table: CaseTable, split: Split, folds: int) -> list[Shares]:
    """The shares of every fold. They depend on the names of the patients and the seed alone; a patient's cases stay together.

    Patients stand in the order of a hash; fold k tests on the k-th run of `split.test` patients, validates on those after it (around the
    end) and leaves the next ones for pretraining; further ones are not used.
    Raises: BadInput: more patients asked for than there are, more folds than that gives, or a table at odds with the data.
    """
    found = [_by_file(table, split.file, fold) for fold in range(folds)] if split.file is not None else _by_order(table, split, folds)
    return [_without_test(shares, split.develop) for shares in found] if split.develop else found


def _by_order(table: CaseTable, split: Split, folds: int) -> list[Shares]:
    patients = sorted({case.patient_id for case in table.cases}, key=lambda name: _order(split.seed, name))
    wanted = split.pretrain + split.validation + split.test
    if wanted > len(patients):
        raise BadInput(
            f"split: pretrain + validation + test must be at most the {len(patients)} patients of the data; found {wanted}; ask for fewer"
        )
    if folds * split.test > len(patients):
        raise BadInput(f"design.folds: folds x split.test must be at most {len(patients)} patients; found {folds} x {split.test}")
    found = []
    for fold in range(folds):
        first = fold * split.test
        turned = patients[first:] + patients[:first]
        ends = np.cumsum([0, split.test, split.validation, split.pretrain])
        test, validation, pretrain = (set(turned[a:b]) for a, b in itertools.pairwise(ends))
        found.append(Shares(*(_of(table, chosen) for chosen in (pretrain, validation, test))))
    return found


def _without_test(shares: Shares, count: int) -> Shares:
    patients = sorted({case.patient_id for case in shares.pretrain})
    if count >= len(patients):
        raise BadInput(f"split.develop: must be below the {len(patients)} patients of the pretraining share; found {count}")
    validating = set(patients[-count:])
    kept = tuple(case for case in shares.pretrain if case.patient_id not in validating)
    return Shares(kept, tuple(case for case in shares.pretrain if case.patient_id in validating), shares.validation)


def _order(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()


def _of(table: CaseTable, patients: set[str]) -> tuple[Case, ...]:
    return tuple(case for case in table.cases if case.patient_id in patients)


def _by_file(table: CaseTable, path: str, fold: int) -> Shares:
    division = divide(table, Folds(), given=path, fold=fold)
    if not (division.train and division.held_out and division.test):
        counts = f"{len(division.train)}, {len(division.held_out)} and {len(division.test)}"
        raise BadInput(f"split.file: must name training, validation and test cases; found {counts}")
    return Shares(division.train, division.held_out, division.test)


@dataclass(frozen=True)
class Seen:
    """What was found of one case's images: voxel size (RAS+), a hash of the values of each channel, and fingerprints of each."""

    spacing_mm: tuple[float, float, float]
    hashes: tuple[str, ...]
    prints: tuple[tuple[Print, ...], ...]


def content_hash(volume: Volume) -> str:
    """Hash of a volume of one channel by its values and shape in RAS+ alone: the same for any name, file format and number type."""
    turned = np.ascontiguousarray(volume.reoriented("RAS").array_CXYZ[0], dtype="<f8")
    return hashlib.sha256(repr(turned.shape).encode() + turned.tobytes()).hexdigest()


def seen_of(table: CaseTable, cases: Sequence[Case]) -> tuple[dict[str, Seen], list[str]]:
    """Read and check all cases: what their images hold, by case name, and the complaints about those that cannot be used."""
    seen: dict[str, Seen] = {}
    complaints = []
    for case in track(cases, total=len(cases), label="look at cases"):
        try:
            image, _ = read_case(case, table)
        except BadInput as error:
            complaints.append(str(error))
            continue
        channels = [Volume(channel[None], image.grid) for channel in image.array_CXYZ]
        spacing_mm = image.grid.reoriented("RAS").spacing_mm
        seen[case.case_id] = Seen(spacing_mm, tuple(map(content_hash, channels)), tuple(tuple(prints_of(one)) for one in channels))
    return seen, complaints


def overlaps(shares: Shares, seen: Mapping[str, Seen]) -> list[str]:
    """Complaints about images that lie in two parts: equal values, or a copy to within rounding in other units."""
    part_of = {name: part for part, names in shares.names().items() for name in names if name in seen}
    pairs: dict[tuple[str, str], str] = {}
    owner: dict[str, str] = {}
    for name in sorted(part_of):
        for digest in seen[name].hashes:
            pairs[owner.setdefault(digest, name), name] = "the same values"
    entries = [(name, prints) for name in sorted(part_of) for prints in seen[name].prints]
    for one, other in twins([name for name, _ in entries], [prints for _, prints in entries], tolerance=CLOSE):
        low, high = sorted((one, other))
        pairs.setdefault((low, high), "the same values to within rounding")
    return [
        f"{one} ({part_of[one]}) and {other} ({part_of[other]}) hold {how}; name them as one patient in patients.csv, or leave one out"
        for (one, other), how in sorted(pairs.items())
        if part_of[one] != part_of[other]
    ]


def known_images(bundle: Path, given: Path | None) -> set[str] | None:
    """Content hashes of the images that a bundle was pretrained on: from `given`, or images.csv in its folder or beside it; None: unknown.

    Raises: BadInput: no such table, or one without a column content_hash.
    """
    beside = [bundle / "images.csv", bundle / "bundle" / "images.csv", bundle.parent / "images.csv"]
    path = given or next((path for path in beside if path.is_file()), None)
    if path is None:
        return None
    rows = read_csv(path)
    if not rows or "content_hash" not in rows[0]:
        raise BadInput(f"images {path}: must be a table with the column content_hash; found none")
    return {row["content_hash"] for row in rows}


def foreign_overlaps(shares: Shares, seen: Mapping[str, Seen], known: set[str], arm: str) -> list[str]:
    """Complaints about validation and test cases that a bundle was pretrained on."""
    sides = {"validation": shares.validation, "test": shares.test}
    return [
        f"arms.{arm}: its bundle must not have been pretrained on {part} cases; found {case.case_id} in its list of images"
        for part, cases in sides.items()
        for case in cases
        if case.case_id in seen and known & set(seen[case.case_id].hashes)
    ]
