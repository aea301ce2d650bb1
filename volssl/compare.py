"""Arms of a study against scratch: paired differences with intervals over seeds and cases, and labels saved at an equal score.

Scores lie in arrays (seeds, cases); a seed whose run failed is a row of NaN. Every interval is a percentile bootstrap of the crossed
design: seeds are drawn again, and so are cases within their fold, and both sides of a difference share the draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from volssl.draws import generator

RESAMPLINGS = 2000
YES, NO, OPEN, FAILED = "yes", "no", "undecided", "failed"


def resampled(scores_SC: np.ndarray, folds_C: np.ndarray) -> np.ndarray:
    """Means of `scores_SC` over bootstrap draws of its seeds and, within each fold, of its cases: (RESAMPLINGS,).

    The draws depend on the shape alone, so that arrays of one shape are drawn alike.
    """
    seeds, cases = scores_SC.shape
    source = generator(0, "study", seeds, cases)
    weight_RS = source.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLINGS) / seeds
    weight_RC = np.zeros((RESAMPLINGS, cases))
    for fold in np.unique(folds_C):
        inside = np.flatnonzero(folds_C == fold)
        count = len(inside)
        weight_RC[:, inside] = source.multinomial(count, np.full(count, 1 / count), size=RESAMPLINGS) / cases
    return ((weight_RS @ scores_SC) * weight_RC).sum(1)


def interval(values_R: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 % quantiles; values drawn, not interpolated, so that infinity is allowed."""
    low, high = np.quantile(values_R, (0.025, 0.975), method="inverted_cdf")
    return [float(low), float(high)]


def mean_of(scores_SC: np.ndarray, folds_C: np.ndarray) -> dict[str, Any]:
    """Mean, 95 % interval and counts of one arm at one number of labels; {} where no seed has a score."""
    present_SC = scores_SC[np.isfinite(scores_SC).all(1)]
    if not len(present_SC):
        return {}
    numbers = {"mean": float(present_SC.mean()), "ci95": interval(resampled(present_SC, folds_C))}
    return numbers | {"seeds": len(present_SC), "cases": present_SC.shape[1]}


def difference(arm_SC: np.ndarray, scratch_SC: np.ndarray, folds_C: np.ndarray) -> dict[str, Any]:
    """`mean_of` the arm less scratch, seed by seed and case by case; only seeds that both have count."""
    return mean_of(arm_SC - scratch_SC, folds_C)


def verdict(gain: Mapping[str, Any], worth: float) -> str:
    """Whether it pays: yes if the whole interval lies above 0; no if it ends below `worth`, so that a gain worth having is ruled out."""
    if not gain:
        return FAILED
    low, high = gain["ci95"]
    return YES if low > 0 else NO if high < worth else OPEN


def equal_labels(target: float, counts: Sequence[int], curve: Sequence[float]) -> float:
    """How many labels a curve needs to reach `target`: linear between its points over the logarithm of the labels.

    Args: counts: rising. curve: score at each; where it falls, the best so far stands.
    Returns: the first count if it is there already (or fewer would do), infinity if it is never reached.
    """
    best = np.maximum.accumulate(np.asarray(curve, dtype=float))
    if target <= best[0]:
        return float(counts[0])
    if target > best[-1]:
        return math.inf
    at = int(np.argmax(best >= target))
    share = (target - best[at - 1]) / (best[at] - best[at - 1])
    low, high = math.log(counts[at - 1]), math.log(counts[at])
    return float(counts[at]) if share == 1 else math.exp(low + share * (high - low))


def saved(arm_SC: np.ndarray, scratch: Mapping[int, np.ndarray], folds_C: np.ndarray) -> dict[str, Any]:
    """The labels that scratch needs for the arm's score, `reached`, with its interval; None stands for "not reached".

    Args: scratch: its scores at every number of labels. Returns: {} where the arm, or scratch at some number, has no seed in common.
    """
    counts = sorted(scratch)
    together = np.stack([arm_SC, *(scratch[count] for count in counts)])
    together = together[:, np.isfinite(together).all((0, 2))]
    if not together.shape[1]:
        return {}
    reached = equal_labels(float(together[0].mean()), counts, [float(of_count.mean()) for of_count in together[1:]])
    drawn = np.stack([resampled(scores_SC, folds_C) for scores_SC in together])
    spread_R = np.array([equal_labels(column[0], counts, column[1:]) for column in drawn.T])
    return {"reached": _finite(reached), "ci95": [_finite(end) for end in interval(spread_R)], "least": counts[0], "most": counts[-1]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def chosen_lr(validation: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate with the best mean over its validation scores; the lower one of equals; None where none has scores."""
    means = {lr: float(np.mean(scores)) for lr, scores in sorted(validation.items()) if len(scores)}
    return max(means, key=lambda lr: means[lr]) if means else None
