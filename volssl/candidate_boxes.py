"""Candidates of nodules as boxes: read from a table, cut around their places, drawn with both classes equally often and changed alike.

Nothing but the voxels may tell the class: box, shift, turn and change of intensity of a sample are functions of (seed, step, place in the
batch), never of its class; both classes are cut around the table's own places by one rule, and lie in the batch in random order.
"""

# N candidates; B samples of a batch; positions in world mm, LPS as in LUNA16's tables

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from volssl.archive import read_image
from volssl.augment.intensity import Blur, Contrast, Gamma, Noise
from volssl.augment.spatial import Affine, Box, take
from volssl.candidates import LPS, PLACE
from volssl.cases import cut
from volssl.datasets import Case
from volssl.draws import Draws, generator
from volssl.files import BadInput, track
from volssl.froc import Findings
from volssl.segment import Preparation
from volssl.volume import Volume


@dataclass(frozen=True)
class Boxes:
    """Which boxes are read.

    Attributes:
        candidates: the table (seriesuid, coordX, coordY, coordZ, class), beside the data unless absolute. patch_vox: sides, multiples of
            the network's stride. batch_size: an even number, one half of each class. negatives: of one scan that are learnt from,
            drawn once; all positives are. margin: share of a side that is kept around the patch for shifts and turns. memory_gb: boxes
            beyond this lie in a temporary file.
    """

    candidates: str = "candidates_V2.csv"
    patch_vox: tuple[int, int, int] = (48, 48, 48)
    batch_size: int = 16
    negatives: int = 50
    margin: float = 0.2
    memory_gb: float = 8.0

    def __post_init__(self) -> None:
        if min(self.patch_vox) < 1 or self.batch_size < 2 or self.batch_size % 2 or self.negatives < 1 or self.margin < 0:
            raise BadInput(
                "patch_vox and negatives >= 1, batch_size even and >= 2, and margin >= 0 must hold; "
                f"found {self.patch_vox}, {self.negatives}, {self.batch_size}, {self.margin}"
            )

    @property
    def kept_vox(self) -> tuple[int, int, int]:
        """Sides of the boxes that are kept: the patch and its margin."""
        x, y, z = (side + 2 * math.ceil(self.margin * side) for side in self.patch_vox)
        return x, y, z


@dataclass(frozen=True)
class Changes:
    """Random changes of a batch of boxes, the same for both classes; null leaves one out. shift_mm: largest, along each axis."""

    shift_mm: float = 3.0
    affine: Affine | None = field(default_factory=lambda: Affine(flip_share=(0.5, 0.5, 0.5), scale=0.1, degrees=20.0))
    blur: Blur | None = None
    contrast: Contrast | None = field(default_factory=lambda: Contrast(contrast=0.1, brightness=0.05, share=0.5))
    gamma: Gamma | None = None
    noise: Noise | None = field(default_factory=lambda: Noise(sd_max=0.03, share=0.3))

    def draw(self, draws: Draws) -> dict[str, Any]:
        """All the numbers that decide how a batch is changed: functions of `draws` alone."""
        numbers: dict[str, Any] = {"shift_mm": draws.fork("shift").uniform(-self.shift_mm, self.shift_mm, 3)}
        for name in ("affine", "blur", "contrast", "gamma", "noise"):
            if (change := getattr(self, name)) is not None:
                numbers[name] = change.sample(draws.fork(name))
        return numbers

    def apply(self, batch: Batch, numbers: Mapping[str, Any], patch_vox: tuple[int, int, int]) -> Tensor:
        """Boxes with their margin -> patches (B, 1, X, Y, Z)."""
        shift_vox = numbers["shift_mm"] / torch.tensor(batch.spacing_mm)
        x = cropped(batch, patch_vox, shift_vox_B3=shift_vox, matrix_B33=numbers.get("affine"))
        for name in ("blur", "contrast", "gamma", "noise"):
            if (change := getattr(self, name)) is not None:
                x = change.apply(x, numbers[name])
        return x


@dataclass(frozen=True)
class Batch:
    """Boxes with their margin on the device; fraction: of a voxel by which a candidate lies off its box's middle; y: 1 nodule, 0 not."""

    x_B1XYZ: Tensor
    fraction_B3: Tensor
    y_B: Tensor
    case_ids: list[str]
    spacing_mm: tuple[float, float, float]


def cropped(
    batch: Batch, patch_vox: tuple[int, int, int], *, shift_vox_B3: Tensor | None = None, matrix_B33: Tensor | None = None
) -> Tensor:
    """The patches whose middle is the candidate's very place, off by `shift_vox_B3` and turned by `matrix_B33` if given."""
    kept, size = torch.tensor(batch.x_B1XYZ.shape[2:]), torch.tensor(patch_vox)
    start_B3 = (kept - size) / 2 + batch.fraction_B3 + (0 if shift_vox_B3 is None else shift_vox_B3)
    box = Box(start_B3, size.expand(len(start_B3), 3))
    return take(batch.x_B1XYZ, box, patch_vox, matrix_B33=matrix_B33, spacing_mm=batch.spacing_mm)


@dataclass(frozen=True, eq=False)
class Places:
    """The candidates of one scan: positions (N, 3) and classes (N,)."""

    at_N3: np.ndarray
    classes_N: np.ndarray


def read_places(path: Path, series: Sequence[str] | None = None) -> dict[str, Places]:
    """The candidates of each of `series`, in the order of the table. Without `series` those of all that the table names, which then needs
    no column `class`: nothing is learnt from it.

    Raises: BadInput: no such table, other columns, or faulty rows.
    """
    if not path.is_file():
        raise BadInput(f"boxes.candidates: must be a table beside the data; found no {path.name}")
    found: dict[str, tuple[list[list[float]], list[int]]] = {name: ([], []) for name in series or ()}
    columns, faults = ("seriesuid", *PLACE, *(("class",) if series is not None else ())), []
    header, rows = _table(path)
    if lacking := [name for name in columns if name not in header]:
        raise BadInput(f"{path.name}: must have the columns {', '.join(columns)}; {', '.join(lacking)} missing")
    at = [header.index(name) for name in columns]
    for number, row in enumerate(rows, 2):
        try:
            name, place = row[at[0]], [float(row[column]) for column in at[1:4]]
            kind = int(row[at[4]]) if series is not None else 0
        except (IndexError, ValueError):
            faults.append(f"line {number}: {row}")
            continue
        if kind not in (0, 1) or not np.isfinite(place).all() or not name:
            faults.append(f"line {number}: {row}")
        elif series is None or name in found:
            places, kinds = found.setdefault(name, ([], []))
            places.append(place)
            kinds.append(kind)
    if faults:
        must = "class must be 0 or 1 and places finite numbers" if series is not None else "places must be finite numbers"
        raise BadInput(f"{path.name}: {must}; {len(faults)} row(s) are not: " + "; ".join(faults[:8]))
    if not found:
        raise BadInput(f"{path.name}: must have rows; found none")
    return {name: Places(np.array(places).reshape(-1, 3), np.array(kinds, dtype=np.uint8)) for name, (places, kinds) in found.items()}


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:  # spreadsheets put a mark before the first name
            header, *rows = list(csv.reader(lines)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path.name}: must be a table of text (CSV); {error}") from None
    return header, [row for row in rows if row]


def learnt(series: str, places: Places, findings: Findings, *, negatives: int) -> np.ndarray:
    """Indices of a scan's candidates to learn from: all positives, and a fixed draw of the negatives that lie on no irrelevant finding
    (three readers did not agree there, so it is no example of either class)."""
    irrelevant = Findings(findings.at_N3[~findings.counts], findings.radius_mm[~findings.counts])
    near = np.linalg.norm(places.at_N3[:, None] - irrelevant.at_N3[None], axis=2) < irrelevant.radius_mm
    others = np.flatnonzero((places.classes_N == 0) & ~near.any(1))
    chosen = others[generator(0, f"negatives/{series}").permutation(len(others))[:negatives]]
    return np.sort(np.concatenate([np.flatnonzero(places.classes_N == 1), chosen]))


def cut_boxes(
    case: Case, at_N3: np.ndarray, *, preparation: Preparation, sides_vox: tuple[int, int, int]
) -> tuple[Volume, np.ndarray, np.ndarray]:
    """The prepared scan, the corner (N, 3) of each candidate's box in it, and by how much the candidate lies off the box's middle.

    Raises: BadInput: an image of several channels, or a candidate that lies outside of it.
    """
    image = read_image(case.images[0])
    if len(image.array_CXYZ) != 1:
        raise BadInput(f"{case.case_id}: must have one channel; found {len(image.array_CXYZ)}")
    prepared = preparation.image(image)
    voxels_N3 = prepared.grid.voxels(at_N3 * LPS)
    outside = ((voxels_N3 < -0.5) | (voxels_N3 > np.array(prepared.grid.shape_vox) - 0.5)).any(1)
    if outside.any():
        raise BadInput(
            f"{case.case_id}: candidates must lie in the image; {int(outside.sum())} do not, such as {at_N3[outside][0].tolist()}"
        )
    middle = (np.array(sides_vox) - 1) / 2
    corner_N3 = np.rint(voxels_N3 - middle).astype(int)
    return prepared, corner_N3, voxels_N3 - middle - corner_N3


class CandidateBoxes:
    """The boxes that are learnt from, and the batches drawn from them.

    Args: cases: scans. places, findings: by case. preparation, boxes. seed: of the draws.
    Raises: BadInput: with the complaints about all scans at once, or without a candidate of either class.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        places: Mapping[str, Places],
        findings: Mapping[str, Findings],
        *,
        preparation: Preparation,
        boxes: Boxes,
        seed: int,
    ) -> None:
        self.settings, self.seed = boxes, seed
        chosen = {
            case.case_id: learnt(case.case_id, places[case.case_id], findings.get(case.case_id, Findings()), negatives=boxes.negatives)
            for case in cases
        }
        total = sum(len(indices) for indices in chosen.values())
        self.classes_N = np.concatenate([places[name].classes_N[indices] for name, indices in chosen.items()] or [np.zeros(0, np.uint8)])
        self.of_class = [np.flatnonzero(self.classes_N == kind) for kind in (0, 1)]
        if not all(len(of) for of in self.of_class):
            raise BadInput(f"boxes.candidates: the training scans must have both classes; found {len(self.of_class[1])} nodules of {total}")
        self.case_ids = [name for name, indices in chosen.items() for _ in indices]
        self._folder = tempfile.TemporaryDirectory(prefix="volssl-boxes-")
        self.boxes, self.fraction_N3 = self._room(total), np.zeros((total, 3), np.float32)
        self.spacing_mm = self._fill(cases, places, chosen, preparation=preparation)

    def _room(self, total: int) -> np.ndarray:
        shape = (total, *self.settings.kept_vox)
        if total * math.prod(self.settings.kept_vox) * 2 <= self.settings.memory_gb * 1e9:
            return np.empty(shape, np.float16)
        try:
            return np.lib.format.open_memmap(Path(self._folder.name) / "boxes.npy", mode="w+", dtype=np.float16, shape=shape)
        except OSError as error:
            raise BadInput(
                f"boxes.memory_gb: boxes beyond {self.settings.memory_gb:g} GB need room in the temporary folder, which cannot be written: "
                f"{error}; raise memory_gb, lower negatives, or set TMPDIR to a folder with more room"
            ) from None

    def _fill(
        self, cases: Sequence[Case], places: Mapping[str, Places], chosen: Mapping[str, np.ndarray], *, preparation: Preparation
    ) -> tuple[float, float, float]:
        complaints, at, spacings = [], 0, []
        for case in track(cases, total=len(cases), label="read scans"):
            indices = chosen[case.case_id]
            try:
                prepared, corners, fraction = cut_boxes(
                    case, places[case.case_id].at_N3[indices], preparation=preparation, sides_vox=self.settings.kept_vox
                )
            except BadInput as error:
                complaints.append(str(error))
                continue
            for number, corner in enumerate(corners):
                self.boxes[at + number] = cut(prepared.array_CXYZ[0], corner, np.array(self.settings.kept_vox))
            self.fraction_N3[at : at + len(indices)] = fraction
            at += len(indices)
            spacings.append(prepared.grid.spacing_mm)
        if complaints:
            raise BadInput(f"{len(complaints)} of {len(cases)} scans cannot be used; mend or remove them:\n  " + "\n  ".join(complaints))
        x, y, z = np.mean(spacings, axis=0)
        return float(x), float(y), float(z)

    def indices(self, step: int) -> np.ndarray:
        """Which boxes a step reads: of each pair one of each class in random order; every box of a class once before any comes again."""
        drawn = []
        for pair in range(step * self.settings.batch_size // 2, (step + 1) * self.settings.batch_size // 2):
            two = [self._next(kind, pair) for kind in (0, 1)]
            drawn += two if generator(self.seed, "order of pair", pair).random() < 0.5 else two[::-1]
        return np.array(drawn)

    def _next(self, kind: int, pair: int) -> int:
        of = self.of_class[kind]
        round_, place = divmod(pair, len(of))
        return int(of[generator(self.seed, "order", kind, round_).permutation(len(of))[place]])

    def batch(self, step: int, device: torch.device | str = "cpu") -> Batch:
        """The boxes of a step: a function of (seed, step) alone."""
        chosen = self.indices(step)
        x = torch.from_numpy(np.stack([self.boxes[index] for index in chosen])[:, None]).to(device, torch.float32)
        y = torch.from_numpy(self.classes_N[chosen].astype(np.float32)).to(device)
        return Batch(x, torch.from_numpy(self.fraction_N3[chosen]), y, [self.case_ids[index] for index in chosen], self.spacing_mm)
