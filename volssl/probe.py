"""A probe that needs no labels: where in the body a patch lies, told from frozen features by ridge regression.

Features that carry anatomy know liver from lung and so about where they are. Patches of one scan resemble each other, so the regression is
always judged on scans that it was not fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from volssl.patches import Patches
from volssl.store import Entry

AXES = ("x", "y", "z")
PENALTIES = tuple(10.0**power for power in range(-3, 5))  # per sample, on standardised features
ALONE = 1.0  # the penalty where one scan leaves nothing to choose it on
FOLDS = 5


@dataclass(frozen=True)
class Sample:
    """Patches: features_ND, position_N3 (0 to 1 from end to end of the body) and the number of each one's scan, scan_N."""

    features_ND: np.ndarray
    position_N3: np.ndarray
    scan_N: np.ndarray

    def part(self, chosen_N: np.ndarray) -> Sample:
        """The chosen patches."""
        return Sample(self.features_ND[chosen_N], self.position_N3[chosen_N], self.scan_N[chosen_N])


def positions(patches: Patches, rows: dict[str, Entry]) -> np.ndarray:
    """Centres of the boxes as shares of their body's extent along X, Y, Z: (B, 3)."""
    size = np.array(patches.boxes_BCXYZ.shape[2:])
    start, stop = (np.array([getattr(rows[scan], end) for scan in patches.scan_ids]) for end in ("body_start", "body_stop"))
    return (patches.corners_B3.numpy() + size / 2 - start) / np.maximum(stop - start, 1)


def position_r2(fitted: Sample, held_out: Sample | None) -> dict[str, float]:
    """R2 of the position per axis and their mean, on scans that the regression has not seen.

    Args: fitted: patches of the training scans. held_out: of other scans; without them every scan is predicted from the others.
    Returns: probe_r2_x, probe_r2_y, probe_r2_z, probe_r2_mean; nan for an axis along which all patches lie alike; nothing if there is only
        one scan altogether, from which nothing can be learnt about others.
    """
    if held_out is not None:
        found, true = _predict(fitted, held_out.features_ND, _penalty(fitted)), held_out.position_N3
    elif len(np.unique(fitted.scan_N)) > 1:
        found, true = np.empty_like(fitted.position_N3), fitted.position_N3
        for out_N in _folds(fitted.scan_N):
            rest = fitted.part(~out_N)
            found[out_N] = _predict(rest, fitted.features_ND[out_N], _penalty(rest))
    else:
        return {}
    r2_3 = r2(true, found)
    mean = float(np.nanmean(r2_3)) if np.isfinite(r2_3).any() else float("nan")
    return {f"probe_r2_{axis}": float(value) for axis, value in zip(AXES, r2_3, strict=True)} | {"probe_r2_mean": mean}


def ridge(x_ND: np.ndarray, y_NK: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, K) and intercept (K,) that minimise the mean squared error plus penalty times the squared weights."""
    mean_D, mean_K = x_ND.mean(0), y_NK.mean(0)
    x, y = x_ND - mean_D, y_NK - mean_K
    number, dimensions = x.shape
    if number < dimensions:  # the same solution, by the smaller system
        weights_DK = x.T @ np.linalg.solve(x @ x.T + number * penalty * np.eye(number), y)
    else:
        weights_DK = np.linalg.solve(x.T @ x + number * penalty * np.eye(dimensions), x.T @ y)
    return weights_DK, mean_K - mean_D @ weights_DK


def r2(true_NK: np.ndarray, found_NK: np.ndarray) -> np.ndarray:
    """1 - squared error / variance, per column; 0 for the mean of the column, negative if worse, nan for a constant column."""
    variance = ((true_NK - true_NK.mean(0)) ** 2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 1e-9, 1 - ((true_NK - found_NK) ** 2).sum(0) / variance, np.nan)


def _predict(fitted: Sample, features_ND: np.ndarray, penalty: float) -> np.ndarray:
    mean_D, sd_D = fitted.features_ND.mean(0), fitted.features_ND.std(0)
    sd_D = np.where(sd_D > 1e-9, sd_D, np.inf)  # a constant feature says nothing, also where it is not constant on other scans
    weights_DK, shift_K = ridge((fitted.features_ND - mean_D) / sd_D, fitted.position_N3, penalty)
    return (features_ND - mean_D) / sd_D @ weights_DK + shift_K


def _penalty(sample: Sample) -> float:
    """The penalty whose predictions on left-out scans have the smallest squared error."""
    if len(np.unique(sample.scan_N)) < 2:
        return ALONE
    errors = np.zeros(len(PENALTIES))
    for out_N in _folds(sample.scan_N):
        rest, out = sample.part(~out_N), sample.part(out_N)
        for i, penalty in enumerate(PENALTIES):
            errors[i] += ((_predict(rest, out.features_ND, penalty) - out.position_N3) ** 2).sum()
    return PENALTIES[int(errors.argmin())]


def _folds(scan_N: np.ndarray) -> list[np.ndarray]:
    """Masks of the patches left out: whole scans at a time."""
    scans = np.unique(scan_N)
    return [np.isin(scan_N, scans[fold :: min(FOLDS, len(scans))]) for fold in range(min(FOLDS, len(scans)))]
