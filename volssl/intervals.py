"""Bootstrap intervals over cases: percentiles of 2000 resamplings with a fixed seed, so that the same scores give the same interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from volssl.draws import generator

RESAMPLINGS = 2000
LEVEL = (0.025, 0.975)


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, `sd` (of the sample), `ci95` of the mean, `n`. Args: values: one per case, at least one."""
    array = np.array(values, dtype=np.float64)
    low, high = np.quantile(array[_drawn(len(array))].mean(axis=1), LEVEL)
    return {
        "mean": float(array.mean()),
        "sd": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "ci95": [float(low), float(high)],
        "n": len(array),
    }


def pooled_intervals(statistic: Callable[[np.ndarray], Mapping[str, float]], cases: int) -> dict[str, dict[str, Any]]:
    """The same for figures that are made of all cases at once, such as a recall; they have no `sd`. Undefined ones are left out.

    Args: statistic: weights (cases,), how often each case counts, -> figures, NaN where these cases leave one undefined; such resamplings
    are left out of the interval. cases: how many there are.
    """
    values = {name: value for name, value in (statistic(np.ones(cases)) if cases else {}).items() if not np.isnan(value)}
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for indices in _drawn(cases) if values else ():
        figures = statistic(np.bincount(indices, minlength=cases).astype(np.float64))
        for name, of in drawn.items():
            of += [figures[name]] if not np.isnan(figures[name]) else []
    found = {}
    for name, value in values.items():
        low, high = np.quantile(drawn[name] or [value], LEVEL)
        found[name] = {"mean": float(value), "sd": None, "ci95": [float(low), float(high)], "n": cases}
    return found


def ratio(above: float, below: float) -> float:
    """above / below, NaN for below = 0: a share of nothing is undefined."""
    return float(above / below) if below else float("nan")


def _drawn(count: int) -> np.ndarray:
    return generator(0, "bootstrap").integers(count, size=(RESAMPLINGS, count))
