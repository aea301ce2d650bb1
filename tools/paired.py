"""Two ways to do one thing, timed in turn in one run, so that whatever else the machine does falls on both."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of a bench's table.

    Attributes: what: is measured. reference, ours: medians, in `unit`. ratio: median of the rounds' ratios; low, high: their quartiles.
        goal: what the ratio must reach, or None; at_most: the goal is an upper bound.
    """

    what: str
    unit: str
    reference: float
    ours: float
    ratio: float
    low: float
    high: float
    goal: float | None = None
    at_most: bool = False

    def line(self) -> str:
        """The row as a line of text."""
        goal = ""
        if self.goal is not None:
            met = self.ratio <= self.goal if self.at_most else self.ratio >= self.goal
            goal = f"  goal {'<=' if self.at_most else '>='} {self.goal:g}: {'met' if met else 'NOT MET'}"
        numbers = f"{self.reference:9.4g} -> {self.ours:9.4g} {self.unit:<12} ratio {self.ratio:6.3g} [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.what:<58} {numbers}{goal}"


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that `run` takes by `clock`."""
    begun = clock()
    run()
    return clock() - begun


def paired(
    reference: Callable[[], object],
    ours: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, tuple[list[float], list[float]]]:
    """Per name of `ours` the seconds of the reference and its own, round by round; each is run once before, unmeasured.

    With the default clock CPU seconds of this process and its threads are counted, so other processes only disturb caches.
    """
    for run in (reference, *ours.values()):
        run()
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ours}
    for _ in range(rounds):
        of_reference = timed(reference, clock)
        for name, run in ours.items():
            seconds[name][0].append(of_reference)
            seconds[name][1].append(timed(run, clock))
    return seconds


def row(what: str, seconds: tuple[list[float], list[float]], *, per: float = 1, goal: float | None = None) -> Row:
    """Milliseconds and the ratio reference / ours; `per`: samples in a measured call."""
    reference, ours = seconds
    ratios = [a / b for a, b in zip(reference, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    middle = [statistics.median(values) * 1e3 / per for values in (reference, ours)]
    return Row(what, "ms", middle[0], middle[1], statistics.median(ratios), low, high, goal)


def share(what: str, values: tuple[list[float], list[float]], unit: str, goal: float | None) -> Row:
    """A row of the ratio ours / reference, which must be at most the goal; `values`: those of the reference, ours."""
    reference, ours = values
    ratios = [b / a for a, b in zip(reference, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(what, unit, statistics.median(reference), statistics.median(ours), statistics.median(ratios), low, high, goal, at_most=True)


def report(title: str, rows: list[Row], out: Path | None) -> None:
    """Print the rows, and write them to `out` as JSON."""
    print(title)
    for one in rows:
        print(f"  {one.line()}")
    if out is not None:
        out.write_text(json.dumps({"title": title, "rows": [asdict(one) for one in rows]}, indent=1) + "\n", encoding="utf-8")
