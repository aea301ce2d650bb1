"""Protocol `lits2017`: liver and tumours as the Liver Tumor Segmentation challenge scored them.

Source: Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), 2023, and the challenge's scoring code
(PatrickChrist/lits-challenge-scoring). Deviations, each for a reason, are listed in docs/evaluate.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from volssl.files import BadInput
from volssl.intervals import pooled_intervals, ratio
from volssl.lesions import components, detect_by_overlap
from volssl.protocols.protocol import AbstractProtocol, Judged, Pair, Score, overlap
from volssl.surface import bounding_box, surfaces
from volssl.targets import targets_of

RECIPE_NAME = "Lits2017"
WORST = 9001.0  # the challenge's value of a distance, a volume difference or a burden that does not exist
LEAST = {"0": 0.0, "50": 0.5}  # overlaps (intersection over union) at which lesions are counted: any, and more than half
SHAPE = {"voe": 1.0, "rvd": WORST, "assd": WORST, "rmsd": WORST, "mssd": WORST}


@dataclass(frozen=True)
class Evidence:
    """What the figures over all cases need of one.

    Attributes: dice: region -> voxels in common, and the sum of both. counts: overlap -> lesions found, predicted, in the reference.
        lesions: per lesion found at more than half, its metrics. burden_error: share of tumour in the liver, predicted minus true.
    """

    dice: Mapping[str, tuple[int, int]]
    counts: Mapping[str, tuple[int, int, int]]
    lesions: tuple[Mapping[str, float], ...]
    burden_error: float


@dataclass(frozen=True)
class Lits2017(AbstractProtocol):
    """Two targets: the liver with its tumours, and the tumours."""

    worst: ClassVar[Mapping[str, float]] = {"dice": 0.0, **SHAPE, "burden_error": WORST}

    def targets(self, labels: Mapping[str, int], regions: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The given regions, or of two labels the liver made of both values and the tumour of the larger one."""
        if not regions and len(labels) == 2:
            liver, tumour = sorted(labels, key=lambda name: labels[name])
            regions = {liver: (labels[liver], labels[tumour]), tumour: (labels[tumour],)}
        found = targets_of(labels, regions)
        sets = [set(values) for values in found.values()]
        if len(sets) != 2 or not sets[1] < sets[0]:
            raise BadInput(
                f"labels: lits2017 scores a liver and the tumours in it, as labels {{liver: 1, tumour: 2}}; found {dict(labels)}; "
                "name `labels` (and `regions`) in the recipe"
            )
        return found

    def judge(self, pair: Pair) -> Judged:
        """Dice of both, shape metrics of the liver, counts of lesions, and the error of the tumour burden."""
        organ, lesion = pair.targets
        liver, tumour = pair.masks(organ), pair.masks(lesion)
        # As in the challenge a liver is predicted where a voxel of its own label is: tumour alone is no liver.
        has_liver = bool((liver[0] & ~tumour[0]).any())
        if not has_liver:
            liver = (np.zeros_like(liver[0]), liver[1])
        shape, note = shape_metrics(*liver, spacing_mm=pair.spacing_mm)
        burden, burden_note = _burden_error(liver, tumour)
        counts, lesions = _detections(*tumour, spacing_mm=pair.spacing_mm)
        rows = [
            *(Score(pair.case, organ, metric, value, note) for metric, value in shape.items()),
            Score(pair.case, lesion, "dice", *overlap(*tumour)),
            *(Score(pair.case, lesion, metric, float(count)) for metric, count in _named(counts).items()),
            Score(pair.case, lesion, "burden_error", burden, burden_note),
        ]
        voxels = {
            name: (int((mask[0] & mask[1]).sum()), int(mask[0].sum() + mask[1].sum())) for name, mask in ((organ, liver), (lesion, tumour))
        }
        return Judged(tuple(rows), Evidence(voxels, counts, tuple(lesions), burden))

    def pooled(self, judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
        """Dice over all cases' voxels, precision and recall of lesions, shape of the lesions found, and the tumour burden's errors."""
        seen: list[Evidence] = [one.evidence for one in judged if one.evidence is not None]
        if not seen:
            return {}
        organ, lesion = seen[0].dice
        of_lesion = (_dice_global(seen, lesion), _counted(seen), _lesion_means(seen), _burdens(seen))
        return {
            organ: pooled_intervals(_dice_global(seen, organ), len(seen)),
            lesion: pooled_intervals(lambda weights: {k: v for figure in of_lesion for k, v in figure(weights).items()}, len(seen)),
        }


def shape_metrics(predicted: np.ndarray, reference: np.ndarray, *, spacing_mm: Sequence[float]) -> tuple[dict[str, float], str]:
    """Dice, VOE = 1 - |P and R| / |P or R|, RVD = (|P| - |R|) / |R|, ASSD, RMSD and MSSD in mm, and a note on an empty mask.

    Absent from both maps: Dice 1 and all others 0; from one of them: Dice 0, VOE 1 and the others 9001, the challenge's value.
    """
    dice, note = overlap(predicted, reference)
    if not predicted.any() and not reference.any():
        return {"dice": dice} | dict.fromkeys(SHAPE, 0.0), "absent from reference and prediction: Dice 1 and all others 0 by rule"
    if note:
        return {"dice": dice, **SHAPE}, f"{note}: 9001 stands for what is undefined"
    box = bounding_box(predicted, reference)
    between = surfaces(predicted[box], reference[box], spacing_mm)
    return {
        "dice": dice,
        "voe": 1 - dice / (2 - dice),
        "rvd": float(predicted.sum()) / float(reference.sum()) - 1,
        "assd": between.average(),
        "rmsd": between.root_mean_square(),
        "mssd": between.maximum(),
    }, ""


def _burden_error(liver: tuple[np.ndarray, np.ndarray], tumour: tuple[np.ndarray, np.ndarray]) -> tuple[float, str]:
    """Share of the liver's voxels that are tumour: predicted minus true."""
    absent = [which for which, mask in zip(("prediction", "reference"), liver, strict=True) if not mask.any()]
    if len(absent) == 2:
        return 0.0, "no liver in reference and prediction: 0 by rule"
    if absent:
        return WORST, f"no liver in the {absent[0]}: 9001 by rule"
    predicted, true = (ratio(lesion.sum(), organ.sum()) for lesion, organ in zip(tumour, liver, strict=True))
    return predicted - true, ""


def _detections(
    predicted: np.ndarray, reference: np.ndarray, *, spacing_mm: Sequence[float]
) -> tuple[dict[str, tuple[int, int, int]], list[dict[str, float]]]:
    box = bounding_box(predicted, reference)
    parts, _ = components(predicted[box], 6)
    lesions, _ = components(reference[box], 6)
    detected = {name: detect_by_overlap(parts, lesions, least=least) for name, least in LEAST.items()}
    counts = {name: (found.found, found.predicted, found.reference) for name, found in detected.items()}
    shapes = [
        shape_metrics(np.isin(parts, members), np.isin(lesions, of), spacing_mm=spacing_mm)[0] for members, of in detected["50"].groups
    ]
    return counts, shapes


def _named(counts: Mapping[str, tuple[int, int, int]]) -> dict[str, int]:
    _, predicted, reference = counts["0"]
    return {
        "lesions": reference,
        "lesions_predicted": predicted,
        **{f"lesions_found_{name}": found for name, (found, _, _) in counts.items()},
    }


Figures = Callable[[np.ndarray], dict[str, float]]


def _dice_global(seen: Sequence[Evidence], name: str) -> Figures:
    common, total = np.array([one.dice[name] for one in seen], dtype=np.float64).T
    return lambda weights: {"dice_global": ratio(2 * weights @ common, weights @ total)}


def _counted(seen: Sequence[Evidence]) -> Figures:
    counts = np.array([[one.counts[name] for name in LEAST] for one in seen], dtype=np.float64)  # cases, overlaps, 3

    def figures(weights: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (hits, predicted, reference) in zip(LEAST, np.tensordot(weights, counts, 1), strict=True):
            # One predicted component may find several lesions, and a false one can not make up for that.
            found |= {f"precision_{name}": ratio(hits, max(predicted, hits)), f"recall_{name}": ratio(hits, reference)}
        return found

    return figures


def _lesion_means(seen: Sequence[Evidence]) -> Figures:
    number = np.array([len(one.lesions) for one in seen], dtype=np.float64)
    totals = {metric: np.array([sum(lesion[metric] for lesion in one.lesions) for one in seen]) for metric in ("dice", *SHAPE)}
    return lambda weights: {f"lesion_{name}": ratio(float(weights @ total), float(weights @ number)) for name, total in totals.items()}


def _burdens(seen: Sequence[Evidence]) -> Figures:
    error = np.array([one.burden_error for one in seen])
    return lambda weights: {
        "burden_rmse": float(np.sqrt(weights @ error**2 / weights.sum())),
        "burden_max": float(np.abs(error[weights > 0]).max()),
    }
