"""Labelled cases for fine-tuning: folds by patient, checked and prepared cases in memory, and patches drawn from (seed, step, sample)."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from volssl.augment.intensity import Blur, Contrast, Gamma, Noise
from volssl.augment.spatial import Affine, Box, take
from volssl.augment.transform import AbstractTransform
from volssl.components import bounding_box, parts_of
from volssl.datasets import Case, CaseTable
from volssl.draws import Draws, generator
from volssl.files import BadInput, tell, track
from volssl.intake import take_case
from volssl.segment import Preparation
from volssl.volume import Volume

KEPT_VOXELS = 4096  # foreground voxels per case and label that patches may be centred on
LOOKED_AT = 3  # prepared cases from which the room that all will need is told


@dataclass(frozen=True)
class Folds:
    """How cases are divided: `count` folds by patient. `seed` draws them and the labelled share; the run's own seed changes neither."""

    count: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """Which patches are read.

    Attributes:
        patch_vox: sides, each a multiple of the network's stride. batch_size: samples per step. foreground: share of the samples whose
            patch holds a voxel of a label, all labels equally often. lesion_power: which voxel: one of a connected part with the chance
            volume ** lesion_power, so 1 takes all voxels alike, 0 all lesions alike however small, -1 small ones more often. margin: share
            of a side that is read around the patch, so that a turned patch holds image and not padding in its corners. memory_gb: prepared
            cases beyond this lie in temporary files. stored: type of the prepared images; float16 takes half the room (its step is 1/2048
            of a CT window's width, or of one standard deviation of a z-scored image).
    """

    patch_vox: tuple[int, int, int] = (96, 96, 96)
    batch_size: int = 2
    foreground: float = 0.5
    lesion_power: float = 1.0
    margin: float = 0.1
    memory_gb: float = 8.0
    stored: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if min(self.patch_vox) < 1 or self.batch_size < 1 or not 0 <= self.foreground <= 1 or self.margin < 0:
            raise BadInput(
                "patch_vox and batch_size >= 1, foreground in [0, 1] and margin >= 0 must hold; "
                f"found {self.patch_vox}, {self.batch_size}, {self.foreground}, {self.margin}"
            )


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a batch, on its device; null leaves one out.

    The label map moves with the image: its one-hot channels are interpolated linearly and the largest is taken, which keeps the contours
    of several labels smooth where nearest voxels would fray them.
    """

    affine: Affine | None = field(default_factory=lambda: Affine(flip_share=(0.5, 0.0, 0.0), scale=0.15, degrees=15.0))
    blur: Blur | None = field(default_factory=lambda: Blur(sigma_max=1.0, share=0.2))
    contrast: Contrast | None = field(default_factory=lambda: Contrast(contrast=0.25, brightness=0.1, share=0.5))
    gamma: Gamma | None = field(default_factory=lambda: Gamma(log_max=0.3, share=0.5, rescale=True))
    noise: Noise | None = field(default_factory=lambda: Noise(sd_max=0.1, share=0.3))

    def apply(self, batch: Batch, draws: Draws, *, patch_vox: tuple[int, int, int], classes: int) -> tuple[Tensor, Tensor]:
        """Boxes with their margin -> patches x (B, C, X, Y, Z) and class indices (B, 1, X, Y, Z)."""
        x, y = batch.x_BCXYZ, batch.y_B1XYZ
        sides = torch.tensor(x.shape[2:]).expand(len(x), 3)
        size = torch.tensor(patch_vox).expand(len(x), 3)
        box = Box((sides - size) // 2, size)
        if self.affine is None:
            margin = [(n - p) // 2 for n, p in zip(x.shape[2:], patch_vox, strict=True)]
            inside = (..., *(slice(m, m + p) for m, p in zip(margin, patch_vox, strict=True)))
            x, y = x[inside], y[inside]
        else:
            matrix = self.affine.sample(draws.fork("affine"))
            place = {"matrix_B33": matrix, "spacing_mm": batch.spacing_mm}
            x = take(x, box, patch_vox, **place)
            one_hot = F.one_hot(y[:, 0].long(), classes).movedim(-1, 1)[:, 1:].to(x.dtype)
            moved = take(one_hot, box, patch_vox, **place)
            y = torch.cat([1 - moved.sum(1, keepdim=True), moved], 1).argmax(1, keepdim=True)
        contrast = self.contrast and replace(self.contrast, channels=x.shape[1])
        changes: dict[str, AbstractTransform | None] = {"blur": self.blur, "contrast": contrast, "gamma": self.gamma, "noise": self.noise}
        for name, change in changes.items():
            if change is not None:
                x = change.apply(x, change.sample(draws.fork(name)))
        return x, y.long()


@dataclass(frozen=True)
class Batch:
    """Boxes with their margin on the device. y: class index per voxel, uint8. case_ids: whose they are. spacing_mm: mean of the batch."""

    x_BCXYZ: Tensor
    y_B1XYZ: Tensor
    case_ids: list[str]
    spacing_mm: tuple[float, float, float]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        moved = [tensor.to(device, non_blocking=True) for tensor in (self.x_BCXYZ, self.y_B1XYZ)]
        return Batch(moved[0], moved[1], self.case_ids, self.spacing_mm)


@dataclass(frozen=True)
class Prepared:
    """A case as the network sees it. x: the image (C, X, Y, Z), y: class indices (X, Y, Z), or the files that hold them. foreground: per
    label present, voxel indices (N, 3)."""

    case_id: str
    x: np.ndarray | Path
    y: np.ndarray | Path
    spacing_mm: tuple[float, float, float]
    foreground: tuple[np.ndarray, ...]

    @property
    def x_CXYZ(self) -> np.ndarray:
        """The image; a file is mapped for this one look, since a mapped file stays open and a system allows some thousand of them."""
        return np.load(self.x, mmap_mode="r") if isinstance(self.x, Path) else self.x

    @property
    def y_XYZ(self) -> np.ndarray:
        """The class indices, likewise."""
        return np.load(self.y, mmap_mode="r") if isinstance(self.y, Path) else self.y


def split(table: CaseTable, folds: Folds) -> list[list[Case]]:
    """The folds: all cases of a patient lie in one. Depends on patients and seed alone. Raises: BadInput: too few patients."""
    patients = sorted({case.patient_id for case in table.cases})
    if not 2 <= folds.count <= len(patients):
        raise BadInput(f"folds.count must lie between 2 and the number of patients; found {folds.count} folds, {len(patients)} patient(s)")
    order = generator(folds.seed, "folds").permutation(len(patients))
    fold_of = {patients[index]: place % folds.count for place, index in enumerate(order)}
    return [[case for case in table.cases if fold_of[case.patient_id] == fold] for fold in range(folds.count)]


def labelled_share(cases: Sequence[Case], labels: float, seed: int) -> list[Case]:
    """The first patients of a fixed random order: a share (float) or a count (int) of them, so that a smaller draw lies inside a larger.

    Raises: BadInput: a share outside (0, 1], a count outside 1 ... patients.
    """
    patients = sorted({case.patient_id for case in cases})
    if isinstance(labels, int):
        count = labels
    else:
        count = max(1, round(labels * len(patients))) if 0 < labels <= 1 else 0
    if not 1 <= count <= len(patients):
        raise BadInput(f"--labels must be a share in (0, 1] or a count from 1 to {len(patients)} patients; found {labels}")
    chosen = {patients[index] for index in generator(seed, "labels").permutation(len(patients))[:count]}
    return [case for case in cases if case.patient_id in chosen]


class LabelledPatches:
    """The prepared training cases and the batches drawn from them.

    Args: table, train: cases to prepare. held_out: cases that are only checked. preparation, sampling. seed: of the draws.
    Raises: BadInput: with the complaints about all cases at once.
    """

    def __init__(
        self, table: CaseTable, *, train: Sequence[Case], held_out: Sequence[Case], preparation: Preparation, sampling: Sampling, seed: int
    ) -> None:
        self.sampling, self.seed = sampling, seed
        self._folder = tempfile.TemporaryDirectory(prefix="volssl-cases-")
        self._used_bytes = 0
        self.notes: dict[str, list[str]] = {}  # case -> what rules settled about it
        made: dict[str, Prepared] = {}
        complaints = []
        checked = {case.case_id for case in held_out}
        everything = [*_spread(train), *held_out]
        for case in track(everything, total=len(everything), label="read cases"):
            try:
                taken = take_case(case, table)
            except BadInput as error:
                complaints.append(str(error))
                continue
            if taken.notes:
                self.notes[case.case_id] = list(taken.notes)
            if case.case_id not in checked:
                made[case.case_id] = self._prepare(case, table, taken.image, taken.label, preparation=preparation)
                if len(made) == LOOKED_AT and not complaints:
                    self._check_room(len(train))
        if complaints:
            raise BadInput(
                f"{len(complaints)} of {len(everything)} cases cannot be used; mend or remove them:\n  " + "\n  ".join(complaints)
            )

        self.cases = [made[case.case_id] for case in train]

    def _check_room(self, cases: int) -> None:
        """After the first cases: say how much the temporary files will need. Raises: BadInput: if there is clearly not as much room."""
        need = self._used_bytes / 1e9 * cases / LOOKED_AT
        beyond = need - self.sampling.memory_gb
        if beyond <= 0:
            return
        free = shutil.disk_usage(self._folder.name).free / 1e9
        told = f"{cases} prepared cases take about {need:.1f} GB, of which {beyond:.1f} GB lie in temporary files"
        if beyond > free:
            raise BadInput(
                f"sampling.memory_gb: {told}; {Path(self._folder.name).parent} has {free:.1f} GB; raise memory_gb, set TMPDIR to a folder "
                "with more room, or take sampling.stored=float16"
            )
        tell(f"{told} ({free:.1f} GB are free there)")

    def _prepare(self, case: Case, table: CaseTable, image: Volume, label: Volume, *, preparation: Preparation) -> Prepared:
        x, y = preparation.image(image), preparation.label(label)
        if preparation.nonzero and (box := bounding_box(x.array_CXYZ.any(0) | (y.array_CXYZ[0] > 0))) is not None:
            # Beyond the brain all is 0, as it is beyond the array: nothing is lost with it but room.
            x, y = (volume.cropped([side.start for side in box], [side.stop for side in box]) for volume in (x, y))
        classes = np.zeros(256, dtype=np.uint8)
        classes[sorted(table.labels.values())] = np.arange(1, len(table.labels) + 1)
        y_XYZ = classes[y.array_CXYZ[0]]
        foreground = []
        for index in range(1, len(table.labels) + 1):
            voxels_N3 = centres(y_XYZ == index, power=self.sampling.lesion_power, source=generator(0, "foreground", index))
            if len(voxels_N3):
                foreground.append(voxels_N3.astype(np.int32))
        x_CXYZ = x.array_CXYZ.astype(self.sampling.stored, copy=False)
        return Prepared(case.case_id, self._kept(x_CXYZ), self._kept(y_XYZ), x.grid.spacing_mm, tuple(foreground))

    def _kept(self, array: np.ndarray) -> np.ndarray | Path:
        self._used_bytes += array.nbytes
        if self._used_bytes <= self.sampling.memory_gb * 1e9:
            return np.ascontiguousarray(array)
        path = Path(self._folder.name) / f"{self._used_bytes}.npy"
        try:
            np.save(path, array)
        except OSError as error:  # numpy tells a full disk in its own words
            raise BadInput(
                f"sampling.memory_gb: prepared cases beyond {self.sampling.memory_gb:g} GB need room in the temporary folder "
                f"({path.parent.parent}); it cannot be written: {error}; raise memory_gb, or set TMPDIR to a folder with more room"
            ) from None
        return path

    def batch(self, step: int) -> Batch:
        """The boxes of a step, each sample a function of (seed, step, sample) alone: every case once before any comes again."""
        size = self.sampling.batch_size
        drawn = [self._box(step * size + b) for b in range(size)]
        x = torch.from_numpy(np.stack([x for _, x, _ in drawn]).astype(np.float32, copy=False))
        y = torch.from_numpy(np.stack([y for _, _, y in drawn])[:, None])
        spacing = np.mean([case.spacing_mm for case, _, _ in drawn], axis=0)
        return Batch(x, y, [case.case_id for case, _, _ in drawn], (float(spacing[0]), float(spacing[1]), float(spacing[2])))

    def _box(self, sample: int) -> tuple[Prepared, np.ndarray, np.ndarray]:
        round_, place = divmod(sample, len(self.cases))
        case = self.cases[int(generator(self.seed, "order", round_).permutation(len(self.cases))[place])]
        source = generator(self.seed, "box", sample)
        x_CXYZ, y_XYZ = case.x_CXYZ, case.y_XYZ
        patch, shape = np.array(self.sampling.patch_vox), np.array(y_XYZ.shape)
        # Where the patch is larger than the volume, the volume lies anywhere inside it.
        low, high = np.minimum(0, shape - patch), np.maximum(0, shape - patch)
        wants_label = source.random() < self.sampling.foreground
        if wants_label and case.foreground:
            of_label = case.foreground[int(source.integers(len(case.foreground)))]
            voxel = of_label[int(source.integers(len(of_label)))]
            low, high = np.maximum(low, np.minimum(voxel - patch + 1, high)), np.minimum(high, np.maximum(voxel, low))
        start = source.integers(low, high + 1)
        margin = np.array([math.ceil(self.sampling.margin * side) for side in patch])
        start, size = start - margin, patch + 2 * margin
        return case, cut(x_CXYZ, start, size), cut(y_XYZ, start, size)


def _spread(cases: Sequence[Case]) -> list[Case]:
    # The first cases read tell what all will need, so they are taken from all over: cases that follow each other are often of one scanner.
    first = [cases[len(cases) * i // LOOKED_AT] for i in range(LOOKED_AT)] if len(cases) > LOOKED_AT else []
    return [*first, *(case for case in cases if case not in first)]


def centres(mask_XYZ: np.ndarray, *, power: float, source: np.random.Generator) -> np.ndarray:
    """Up to KEPT_VOXELS voxels (N, 3) of a mask, from each connected part in proportion to its volume ** power."""
    voxels_N3 = np.argwhere(mask_XYZ)
    if power == 1 or not len(voxels_N3):  # all voxels alike: no part need be known
        kept = source.choice(len(voxels_N3), KEPT_VOXELS, replace=False) if len(voxels_N3) > KEPT_VOXELS else slice(None)
        return voxels_N3[kept]
    parts = parts_of(mask_XYZ)
    assert parts is not None
    inside_N3 = voxels_N3 - [side.start for side in parts.box]
    of_part_N = parts.sizes_vox[parts.number_XYZ[tuple(inside_N3.T)] - 1].astype(np.float64)
    chance_N = of_part_N ** (power - 1)
    return voxels_N3[source.choice(len(voxels_N3), KEPT_VOXELS, p=chance_N / chance_N.sum())]


def cut(array: np.ndarray, start_3: np.ndarray, size_3: np.ndarray) -> np.ndarray:
    """A box of the last three axes; what lies outside of the array is 0."""
    shape = np.array(array.shape[-3:])
    low, high = np.clip(start_3, 0, shape), np.clip(start_3 + size_3, 0, shape)
    box = np.zeros((*array.shape[:-3], *size_3), dtype=array.dtype)
    into = (..., *(slice(int(a), int(b)) for a, b in zip(low - start_3, high - start_3, strict=True)))
    box[into] = array[(..., *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))]
    return box
