"""Pictures: volumes in three planes, true proportions and contours, for a radiologist's eye; and the curves of a run.

Display is radiological: the patient's right is on the viewer's left; anterior is up in the axial plane, superior in the
others. Arrays are RAS+: index X grows to the patient's right, Y to the front, Z to the head. matplotlib is imported
only when a picture is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volssl.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLANES = ("axial", "coronal", "sagittal")
PLANE_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}
# Letters at the left and right edge of each plane.
EDGES = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}
COLOURS = ("#ffb000", "#35c9ff", "#ff5fa2", "#7dff6b", "#c79bff", "#ff7847", "#fff36b", "#4dffd2")
DARK = "#101214"
DPI = 110
WIDTH_INCH = 11.0

CURVE_NAMES = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "samples_per_second": "samples per second",
    "data_wait_share": "share of time waiting for data",
}
INK, LINE, PALE, VALIDATION = "#3c4550", "#1f5fa8", "#a9c4e4", "#c8501e"
BANDS = ("#1f5fa8", "#c8501e", "#2f7d4f", "#8a4fb0", "#b3861b", "#157f86", "#a8326b")
POINTS = 600  # a longer series is drawn as means over as many equal stretches


@dataclass(frozen=True)
class Overlay:
    """One segmented case to draw: arrays of one shape XYZ in RAS+.

    `targets` maps the names of labels or of overlapping regions, the largest first, to their values; `dice` holds the score per name that
    the legend states (None: undefined); `window` holds the values drawn black and white, by default around those of the labelled tissue.
    """

    image_XYZ: np.ndarray
    reference_XYZ: np.ndarray
    predicted_XYZ: np.ndarray
    spacing_mm: tuple[float, float, float]
    targets: Mapping[str, tuple[int, ...]]
    dice: Mapping[str, float | None] = field(default_factory=dict)
    window: tuple[float, float] | None = None


def plane_of(array_XYZ: np.ndarray, plane: str, position: int) -> np.ndarray:
    """The slice `position` of a RAS+ array as a picture (rows, columns) in radiological display."""
    return np.take(array_XYZ, position, axis=PLANE_AXIS[plane])[::-1, ::-1].T


def plane_spacing(spacing_mm: Sequence[float], plane: str) -> tuple[float, float]:
    """Size in mm of one picture element (row height, column width) of `plane`."""
    columns, rows = [spacing_mm[axis] for axis in range(3) if axis != PLANE_AXIS[plane]]
    return float(rows), float(columns)


def telling_slice(labels_XYZ: np.ndarray, plane: str) -> int:
    """The slice of `plane` with the most label; without any label the middle.

    Each label is counted as a share of its own volume, so that a small one shows.
    """
    axis = PLANE_AXIS[plane]
    others = tuple(other for other in range(3) if other != axis)
    share = np.zeros(labels_XYZ.shape[axis])
    for value in np.unique(labels_XYZ[labels_XYZ > 0]):
        area = (labels_XYZ == value).sum(axis=others)
        share += area / area.sum()
    return int(share.argmax()) if share.any() else labels_XYZ.shape[axis] // 2


def overlay_png(path: Path, case: Overlay, *, title: str) -> None:
    """Draw the image in three planes with the reference (solid) and predicted (dashed) contours, a colour per target, with its Dice."""
    shapes = {case.image_XYZ.shape, case.reference_XYZ.shape, case.predicted_XYZ.shape}
    assert len(shapes) == 1, f"image, reference and prediction must have one shape; found {shapes}"
    shown = case.reference_XYZ if (case.reference_XYZ > 0).any() else case.predicted_XYZ
    low, high = case.window or window_of(case.image_XYZ, shown > 0)
    figure, panels = _three_planes(case)
    for plane, panel in zip(PLANES, panels, strict=True):
        position = telling_slice(shown, plane)
        row_mm, column_mm = plane_spacing(case.spacing_mm, plane)
        picture = plane_of(case.image_XYZ, plane, position)
        panel.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=row_mm / column_mm, interpolation="bilinear")
        for colour, values in zip(_colours(len(case.targets)), case.targets.values(), strict=True):
            _contour(panel, np.isin(plane_of(case.reference_XYZ, plane, position), values), colour, "solid")
            _contour(panel, np.isin(plane_of(case.predicted_XYZ, plane, position), values), colour, (0, (2.2, 1.4)))
        _letters(panel, plane)
    figure.text(0.012, 0.985, title, color="white", fontsize=11, va="top", ha="left")
    _legend(figure, case)
    _save(figure, path)


def restoration_png(path: Path, columns: Mapping[str, np.ndarray], *, window: tuple[float, float], spacing_mm: Sequence[float]) -> None:
    """Draw patches side by side: a row per sample, first the axial then the coronal middle slice of every column.

    Args: columns: title -> array_BXYZ, all of one shape, such as input, target, restored; window: values drawn black
    and white.
    """
    from matplotlib.figure import Figure

    samples = len(next(iter(columns.values())))
    planes = ("axial", "coronal")
    across = len(planes) * len(columns)
    side = WIDTH_INCH / across
    figure = Figure(figsize=(WIDTH_INCH, side * samples + 0.3), dpi=DPI, facecolor=DARK)
    top = 1 - 0.3 / (side * samples + 0.3)
    grid = figure.add_gridspec(samples, across, left=0, right=1, bottom=0, top=top, wspace=0.02, hspace=0.02)
    for column, (plane, title) in enumerate((plane, title) for plane in planes for title in columns):
        row_mm, column_mm = plane_spacing(spacing_mm, plane)
        for row in range(samples):
            panel = figure.add_subplot(grid[row, column])
            array_XYZ = columns[title][row]
            picture = plane_of(array_XYZ, plane, array_XYZ.shape[PLANE_AXIS[plane]] // 2)
            panel.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], aspect=row_mm / column_mm)
            panel.set_axis_off()
            if row == 0:
                panel.set_title(f"{title}, {plane}", color="white", fontsize=9, pad=4)
    _save(figure, path)


def window_of(image_XYZ: np.ndarray, tissue_XYZ: np.ndarray) -> tuple[float, float]:
    """The values to draw black and white: the median of the tissue and seven deviations on either side.

    Never beyond the 0.5 and 99.5 % quantiles of image and tissue, and the image's themselves where no tissue is marked. For a liver in
    CT this comes to about the soft tissue window, whatever lies around it.
    """
    values = image_XYZ.ravel()[:: 8 if image_XYZ.size > 1 << 20 else 1]
    low, high = (float(value) for value in np.quantile(values, (0.005, 0.995)))
    if tissue_XYZ.any():
        tissue = image_XYZ[tissue_XYZ]
        centre = float(np.median(tissue))
        deviation = 1.4826 * float(np.median(np.abs(tissue - centre)))  # of a normal distribution
        reach = 7 * max(deviation, (high - low) / 60)  # a synthetic image may have tissue without any spread
        # A tumour may be less than 0.5 % of the image and the brightest of it: it must not be drawn as one white spot.
        darkest, brightest = (float(value) for value in np.quantile(tissue, (0.005, 0.995)))
        low, high = max(min(low, darkest), centre - reach), min(max(high, brightest), centre + reach)
    return low, max(high, low + 1e-6)


def curves_svg(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """Small multiples of all series of metrics.jsonl over the steps, as an SVG; empty without at least two rows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = dict.fromkeys(key for row in metrics for key in row)
    groups = [n for prefix in ("loss/", "val/", "health/", "grad_norm/") for n in names if n.startswith(prefix)]
    keys = [key for key in groups if not (key.startswith("val/") and f"loss/{key[4:]}" in names)]
    keys += [key for key in CURVE_NAMES if key in names]
    if len(metrics) < 2 or not keys:
        return b""
    rows = -(-len(keys) // 3)
    with rc_context({"svg.hashsalt": "volssl", "font.size": 8.5, "svg.fonttype": "path"}):
        figure = Figure(figsize=(10.4, 2.05 * rows), layout="constrained")
        for place, key in enumerate(keys):
            panel = figure.add_subplot(rows, 3, place + 1)
            _curve(panel, metrics, key)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return image.getvalue()


def bands_svg(curves: Mapping[str, Sequence[tuple[int, float, float, float]]], *, across: str, up: str) -> bytes:
    """Curves with their intervals over a logarithmic axis, as an SVG; the first is drawn in black; empty without a point. With one x in
    all, the points stand side by side under their names.

    Args: curves: name -> points (x, y, low, high) in rising x. across, up: what the axes are.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not any(curves.values()):
        return b""
    with rc_context({"svg.hashsalt": "volssl", "font.size": 9, "svg.fonttype": "path"}):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        panel = figure.add_subplot()
        ticks = sorted({point[0] for points in curves.values() for point in points})
        there = {name: points for name, points in curves.items() if points}
        if len(ticks) == 1:
            _draw_bars(panel, there)
            panel.set(xlabel=f"{across}: {ticks[0]}", ylabel=up)
        else:
            _draw_bands(panel, there)
            panel.set_xscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set(xlabel=across, ylabel=up)
            panel.legend(frameon=False, fontsize=8.5, loc="lower right")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.grid(color="#e3e7ec", linewidth=0.7)
        panel.tick_params(colors=INK, length=2)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return image.getvalue()


def _colour(place: int) -> str:
    return INK if place == 0 else BANDS[(place - 1) % len(BANDS)]


def _draw_bands(panel: Any, curves: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    for place, (name, points) in enumerate(curves.items()):
        x, y, low, high = zip(*points, strict=True)
        panel.fill_between(x, low, high, color=_colour(place), alpha=0.13, linewidth=0)
        panel.plot(x, y, color=_colour(place), marker="o", markersize=4, linewidth=1.6, linestyle="--" if place == 0 else "-", label=name)


def _draw_bars(panel: Any, curves: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    # At a single place of the axis curves would hide each other, and their bands have no width.
    for place, [(_, y, low, high)] in enumerate(curves.values()):
        reach = [[max(0.0, y - low)], [max(0.0, high - y)]]  # an interval need not hold the mean
        panel.errorbar([place], [y], reach, color=_colour(place), marker="o", markersize=5, linewidth=1.6, capsize=4)
    panel.set_xlim(-0.6, len(curves) - 0.4)
    panel.set_xticks(range(len(curves)), list(curves), rotation=20 if len(curves) > 5 else 0)


def _three_planes(case: Overlay) -> tuple[Figure, list[Any]]:
    # One scale in mm for all three planes, so that a structure has one size in each.
    from matplotlib.figure import Figure

    x_mm, y_mm, z_mm = (size * step for size, step in zip(case.image_XYZ.shape, case.spacing_mm, strict=True))
    widths, heights = (x_mm, x_mm, y_mm), (y_mm, z_mm, z_mm)
    gap, head, foot = 0.1, 0.38, 0.24 * (1 + (len(case.targets) - 1) // 4) + 0.34
    inch_per_mm = (WIDTH_INCH - 4 * gap) / sum(widths)
    tallest = max(heights) * inch_per_mm
    height_inch = head + tallest + foot
    figure = Figure(figsize=(WIDTH_INCH, height_inch), dpi=DPI, facecolor=DARK)
    panels, left = [], gap
    for width, height in zip(widths, heights, strict=True):
        bottom = foot + (tallest - height * inch_per_mm) / 2
        box = (
            left / WIDTH_INCH,
            bottom / height_inch,
            width * inch_per_mm / WIDTH_INCH,
            height * inch_per_mm / height_inch,
        )
        panels.append(figure.add_axes(box))
        panels[-1].set_axis_off()
        left += width * inch_per_mm + gap
    return figure, panels


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _contour(panel: Any, mask: np.ndarray, colour: str, style: Any) -> None:
    if mask.any() and min(mask.shape) > 1:
        panel.contour(mask.astype(np.float32), levels=[0.5], colors=[colour], linewidths=1.3, linestyles=[style])


def _letters(panel: Any, plane: str) -> None:
    from matplotlib.patheffects import withStroke

    # White with a dark rim is read on bone and on air alike.
    style = {"transform": panel.transAxes, "color": "white", "fontsize": 9, "path_effects": [withStroke(linewidth=2.4, foreground=DARK)]}
    for letter, x in zip(EDGES[plane], (0.02, 0.98), strict=True):
        panel.text(x, 0.5, letter, ha="left" if x < 0.5 else "right", va="center", **style)
    panel.text(0.02, 0.02, plane, ha="left", va="bottom", **style)


def _score(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _legend(figure: Figure, case: Overlay) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="white", linewidth=1.3, linestyle="solid", label="reference"),
        Line2D([], [], color="white", linewidth=1.3, linestyle=(0, (2.2, 1.4)), label="prediction"),
    ]
    for colour, name in zip(_colours(len(case.targets)), case.targets, strict=True):
        text = name if name not in case.dice else f"{name}: Dice {_score(case.dice[name])}"
        handles.append(Line2D([], [], color=colour, linewidth=3, label=text))
    style = {"frameon": False, "fontsize": 9, "labelcolor": "white", "handlelength": 2.2}
    figure.legend(handles=handles, loc="lower left", ncols=min(len(handles), 6), **style)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=figure.get_facecolor())


def _curve(panel: Any, metrics: Sequence[Mapping[str, Any]], key: str) -> None:
    steps, values = _series(metrics, key)
    # Few points are marked: a line through one of them is nothing to see.
    panel.plot(steps, values, color=LINE, linewidth=1.3, marker="o" if len(values) < 4 else None, markersize=3)
    panel.set_title(CURVE_NAMES.get(key, key), loc="left", color=INK, fontsize=9)
    held_out = f"val/{key[5:]}"
    steps, values = _series(metrics, held_out) if key.startswith("loss/") else ([], [])
    if values:
        marker = "o" if len(values) < 30 else None
        panel.plot(steps, values, color=VALIDATION, linewidth=1.1, marker=marker, markersize=3, label="validation")
        panel.legend(frameon=False, fontsize=7.5, loc="best")
    if key in ("data_wait_share", "samples_per_second"):
        panel.set_ylim(bottom=0)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(axis="y", color="#e3e7ec", linewidth=0.7)
    panel.tick_params(colors=INK, length=2)
    panel.locator_params(axis="x", nbins=5, integer=True)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    stretch = -(-len(points) // POINTS)
    steps, values = [], []
    for start in range(0, len(points), max(1, stretch)):
        part = points[start : start + stretch]
        steps.append(sum(step for step, _ in part) / len(part))
        values.append(sum(value for _, value in part) / len(part))
    return steps, values
