"""The slices of one DICOM series -> its volumes, each an even upright stack or one with codes of what is wrong with it.

Common readers turn a broken series into wrong anatomy without a word: a missing slice becomes a larger spacing, a tilted gantry an
upright box. So order, affine and verdict come from our own reading of the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from volssl.dicom import LPS_TO_RAS, Slice
from volssl.files import BadInput
from volssl.volume import Grid

# What reading can mend, and how.
REPAIRS = {
    "gantry_tilt": "unshear",
    "uneven_gap": "resample_positions",
    "shifted_slice": "resample_positions",
    "duplicate_position": "drop_duplicates",
    "multi_frame": "read_frames",
    "several_volumes": "split",
    "mixed_orientation": "split",
    "mixed_size": "split",
    "mixed_spacing": "split",
    "mixed_kernel": "split",
    "mixed_modality": "split",
}
GEOMETRY = {"duplicate_position", "missing_slice", "uneven_gap", "shifted_slice"}
SAME_MM = 1e-2  # two slices this close to each other claim one place


@dataclass(frozen=True)
class Limits:
    """What a series must keep to be taken as one even, upright stack of slices."""

    min_slices: int = 8
    position_mm: float = 0.1  # a slice may lie this far off its even place: positions are often written with one decimal
    position_share: float = 0.05  # or this share of the slice step, if that is more
    missing_from: float = 1.5  # a gap of this many usual steps or more means that slices are missing
    tilt_deg: float = 0.2  # between the stack's direction and the normal of the slices
    max_tilt_deg: float = 45.0  # no gantry tilts further: positions are wrong
    direction: float = 1e-3  # largest difference between direction cosines of one stack

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise BadInput(f"{one.name}: must be > 0; found {getattr(self, one.name)}")


@dataclass(frozen=True)
class Stack:
    """Slices in order along their normal, their grid as it will be read, and reason codes, sorted."""

    slices: tuple[Slice, ...]
    grid: Grid | None
    reasons: tuple[str, ...]

    @property
    def repairs(self) -> tuple[str, ...]:
        """Codes of what reading has to mend."""
        return tuple(sorted({REPAIRS[code] for code in self.reasons if code in REPAIRS}))


def stacks_of(slices: Sequence[Slice], limits: Limits = Limits(), *, same: Callable[[Slice, Slice], bool]) -> list[Stack]:
    """The volumes of one series: apart by size, spacing, orientation, kernel and, where places are claimed twice, by acquisition,
    time point, echo, b-value or type.

    Args: same: whether two slices at one place hold equal pixels; such a second one goes, others stay as a fault.
    """
    parts: list[tuple[list[Slice], set[str]]] = []
    for modality_part, codes in _apart(slices, lambda one: (one.modality, "not_an_image" in one.faults), "mixed_modality"):
        placed = [one for one in modality_part if _placed(one)]
        if len(placed) < len(modality_part):
            parts.append(([one for one in modality_part if not _placed(one)], codes | {"no_geometry"}))
        for part, more in _by_geometry(placed, limits):
            parts += [(few, codes | more | last) for few, last in _by_kind(part, limits)]
    return [_resolved(part, codes, limits, same) for part, codes in parts if part]


def _apart(slices: Sequence[Slice], what: Callable[[Slice], object], code: str) -> list[tuple[list[Slice], set[str]]]:
    groups: dict[object, list[Slice]] = {}
    for one in slices:
        groups.setdefault(what(one), []).append(one)
    return [(group, {code} if len(groups) > 1 else set()) for group in groups.values()]


def _placed(one: Slice) -> bool:
    if len(one.position) != 3 or len(one.axes) != 6 or len(one.spacing) != 2 or min(one.spacing) < 1e-3 or min(one.shape) < 1:
        return False
    row, column = np.array(one.axes[:3]), np.array(one.axes[3:])
    return bool(abs(row @ column) < 1e-3 and abs(row @ row - 1) < 2e-3 and abs(column @ column - 1) < 2e-3)


def _by_geometry(slices: Sequence[Slice], limits: Limits) -> list[tuple[list[Slice], set[str]]]:
    parts = []
    for sized, size in _apart(slices, lambda one: one.shape, "mixed_size"):
        for turned, turn in _close(sized, lambda one: one.axes, limits.direction, "mixed_orientation"):
            for spaced, space in _close(turned, lambda one: tuple(np.log(one.spacing)), 1e-3, "mixed_spacing"):
                parts.append((spaced, size | turn | space))
    return parts


def _close(
    slices: Sequence[Slice], what: Callable[[Slice], tuple[float, ...]], limit: float, code: str
) -> list[tuple[list[Slice], set[str]]]:
    # Groups of slices whose numbers differ from those of the group's first by no more than `limit`.
    groups: list[tuple[np.ndarray, list[Slice]]] = []
    seen: dict[tuple[float, ...], int] = {}
    for one in slices:
        numbers = what(one)
        if numbers not in seen:
            near = (n for n, (first, _) in enumerate(groups) if np.abs(first - numbers).max() <= limit)
            seen[numbers] = next(near, len(groups))
            if seen[numbers] == len(groups):
                groups.append((np.array(numbers), []))
        groups[seen[numbers]][1].append(one)
    return [(group, {code} if len(groups) > 1 else set()) for _, group in groups]


def _by_kind(slices: Sequence[Slice], limits: Limits) -> list[tuple[list[Slice], set[str]]]:
    # By kernel always; by anything else only if that heals the whole: parts of one volume may well differ in their acquisition number.
    parts = []
    for part, codes in _apart(slices, lambda one: dict(one.kind).get("kernel"), "mixed_kernel"):
        if not _faulty(part, limits):
            parts.append((part, codes))
            continue
        names = sorted({name for one in part for name, _ in one.kind})
        for chosen in [[name] for name in names] + [names]:
            groups = _apart(part, lambda one, chosen=chosen: tuple(dict(one.kind).get(name) for name in chosen), "several_volumes")
            if len(groups) > 1 and not any(_faulty(group, limits) for group, _ in groups):
                parts += [(group, codes | split) for group, split in groups]
                break
        else:
            parts.append((part, codes))
    return parts


def _faulty(slices: Sequence[Slice], limits: Limits) -> bool:
    return bool(GEOMETRY & set(measure(slices, limits)[2]))


def _resolved(slices: Sequence[Slice], codes: Iterable[str], limits: Limits, same: Callable[[Slice, Slice], bool]) -> Stack:
    # One part of a series as a stack: without second slices of equal pixels, and with its verdict.
    reasons = set(codes) | {code for one in slices for code in one.faults}
    if any(one.frame >= 0 for one in slices):
        reasons.add("multi_frame")
    if "no_geometry" in reasons or "not_an_image" in reasons:
        return Stack(tuple(slices), None, tuple(sorted(reasons)))
    kept: list[Slice] = []
    for one in in_order(slices):
        twin = bool(kept) and np.abs(np.subtract(kept[-1].position, one.position)).max() <= SAME_MM
        if not twin:
            kept.append(one)
            continue
        reasons.add("duplicate_position")
        if not same(kept[-1], one):
            return Stack(tuple(in_order(slices)), None, tuple(sorted(reasons | {"duplicates_differ"})))
    order, grid, found = measure(kept, limits)
    return Stack(tuple(order), grid, tuple(sorted(reasons | set(found))))


def in_order(slices: Sequence[Slice]) -> list[Slice]:
    """Sorted along the normal of the first; at one place by number and file."""
    axes = slices[0].axes
    normal = np.cross(axes[:3], axes[3:])
    return sorted(slices, key=lambda one: (round(float(np.dot(one.position, normal)), 4), one.number, one.instance, str(one.path)))


def measure(slices: Sequence[Slice], limits: Limits = Limits()) -> tuple[list[Slice], Grid | None, list[str]]:
    """Sort slices of one orientation and size, and hold their places against `limits`.

    Returns: the slices in order; their grid, upright if they have to be mended (None if there is none); reason codes, sorted.
    """
    order = in_order(slices)
    reasons = {"too_few_slices"} if len(order) < limits.min_slices else set()
    positions_N3 = np.array([one.position for one in order])
    normal = np.cross(order[0].axes[:3], order[0].axes[3:])
    gaps = np.diff(positions_N3 @ normal)
    usual = float(np.median(gaps[gaps > SAME_MM])) if (gaps > SAME_MM).any() else 0.0
    if usual == 0.0:
        return order, None, sorted(reasons | ({"duplicate_position"} if len(gaps) else {"too_few_slices"}))
    reasons |= _gaps(positions_N3, gaps, usual, limits)
    reasons |= _direction(positions_N3, normal, usual, limits)
    if reasons & {"gantry_tilt", "uneven_gap", "shifted_slice"}:
        return order, upright_grid(order), sorted(reasons)
    step = (positions_N3[-1] - positions_N3[0]) / (len(order) - 1)
    return order, _grid(order[0], order[0].position, step, (order[0].shape[1], order[0].shape[0], len(order))), sorted(reasons)


def _gaps(positions_N3: np.ndarray, gaps: np.ndarray, usual: float, limits: Limits) -> set[str]:
    reasons = set()
    if (gaps <= SAME_MM).any():
        reasons.add("duplicate_position")
    if (gaps >= limits.missing_from * usual).any():
        reasons.add("missing_slice")
    return reasons


def _direction(positions_N3: np.ndarray, normal: np.ndarray, usual: float, limits: Limits) -> set[str]:
    # How the places lie about the straight even line that fits them, and how that leans.
    numbers_N = (positions_N3 - positions_N3[0]) @ normal / usual
    reasons = set()
    count = len(positions_N3)
    step = (positions_N3[-1] - positions_N3[0]) / (count - 1)
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    if tilt > limits.tilt_deg:
        reasons.add("gantry_tilt" if tilt <= limits.max_tilt_deg else "no_geometry")
    if (np.diff(numbers_N) <= SAME_MM / usual).any() or (np.diff(numbers_N) >= limits.missing_from).any():
        return reasons
    off_N3 = positions_N3 - (positions_N3[0] + np.arange(count)[:, None] * step)
    allowed = max(limits.position_mm, limits.position_share * usual)
    along = off_N3 @ normal
    if np.abs(along).max() > allowed:
        reasons.add("uneven_gap")
    if np.linalg.norm(off_N3 - along[:, None] * normal, axis=1).max() > allowed:
        reasons.add("shifted_slice")
    return reasons


def upright_grid(order: Sequence[Slice]) -> Grid:
    """The even box, along the slices' own axes, that holds all of them: as many planes, first and last where they are."""
    first = order[0]
    axes_33 = np.array([first.axes[:3], first.axes[3:], np.cross(first.axes[:3], first.axes[3:])])
    places_N3 = np.array([one.position for one in order]) @ axes_33.T
    low, high = places_N3.min(axis=0), places_N3.max(axis=0)
    wider = [max(0, int(np.ceil((high[axis] - low[axis]) / first.spacing[1 - axis] - 0.1))) for axis in (0, 1)]
    step = axes_33[2] * (high[2] - low[2]) / (len(order) - 1)
    return _grid(first, low @ axes_33, step, (first.shape[1] + wider[0], first.shape[0] + wider[1], len(order)))


def _grid(first: Slice, corner: Sequence[float] | np.ndarray, step: np.ndarray, shape: tuple[int, int, int]) -> Grid:
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.axes[:3]) * first.spacing[1]  # x runs along a row: from column to column
    affine[:3, 1] = np.array(first.axes[3:]) * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = corner
    return Grid(shape, LPS_TO_RAS @ affine)
