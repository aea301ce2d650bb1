"""What a scan must be to be learnt from: settings of the index, and verdicts by codes and by values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from volssl.dicom import AIR_HU, VOLUME_MODALITIES
from volssl.files import BadInput
from volssl.stacks import REPAIRS, Limits

NOTES = {"derived"}  # worth saying, but no fault
CONTENT = ("slices", "none")
DERIVED = ("auto", "accept", "reject")


@dataclass(frozen=True)
class Gates:
    """Settings of the index. Lengths in mm.

    Args: modality: that of all files other than DICOM; without it their values tell. min_slices to direction: as in `stacks.Limits`.
        derived: "auto" takes images that say DERIVED unless they are computed from others (projections, maps, secondary CT); "accept" takes
        those too, "reject" takes none. content: "slices" decodes four slices of each series to find copies and wrong values. key: a file
        that holds the key of the pseudonyms. patient_pattern: searched in the path of files other than DICOM; its first group, or all of
        it, is the patient; without a match every file is a patient of its own. siblings: so many files, or fewer, of one grid in one folder
        below those given are taken for one patient's and stay on one side of the split. duplicate_tolerance: largest difference of block
        means between copies, in standard deviations. thumbnails, vendors: what quality.html shows.
    """

    modality: str | None = None
    min_slices: int = Limits.min_slices
    position_mm: float = Limits.position_mm
    position_share: float = Limits.position_share
    missing_from: float = Limits.missing_from
    tilt_deg: float = Limits.tilt_deg
    max_tilt_deg: float = Limits.max_tilt_deg
    direction: float = Limits.direction
    derived: str = "auto"
    content: str = "slices"
    duplicate_tolerance: float = 1e-3
    patient_pattern: str = r"(?:^|/)(sub-[A-Za-z0-9]+)(?=[/_])"
    siblings: int = 8
    validation_share: float = 0.1
    key: Path | None = None
    thumbnails: bool = True
    vendors: bool = False

    def __post_init__(self) -> None:
        if self.modality is not None and self.modality not in VOLUME_MODALITIES:
            raise BadInput(f"modality: must be one of {', '.join(VOLUME_MODALITIES)}; found {self.modality!r}")
        if not 0 <= self.validation_share < 1:
            raise BadInput(f"validation_share: must lie in [0, 1); found {self.validation_share}")
        for name, allowed in (("derived", DERIVED), ("content", CONTENT)):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name}: must be one of {', '.join(allowed)}; found {getattr(self, name)!r}")
        try:
            re.compile(self.patient_pattern)
        except re.error as error:
            raise BadInput(f"patient_pattern: must be a regular expression; {error}") from None
        assert self.limits

    @property
    def limits(self) -> Limits:
        """What stacks of slices are held to."""
        return Limits(**{one.name: getattr(self, one.name) for one in fields(Limits)})

    def verdict(self, reasons: Iterable[str]) -> str:
        """accept, repair or reject."""
        notes = {"auto": NOTES, "accept": NOTES | {"secondary", "computed"}, "reject": set()}[self.derived]
        left = set(reasons) - notes
        if left - set(REPAIRS):
            return "reject"
        return "repair" if left else "accept"

    def patient_of(self, path: Path) -> str:
        """Who a file other than DICOM belongs to: what the pattern finds in its path, else the path itself."""
        found = re.search(self.patient_pattern, path.as_posix()) if self.patient_pattern else None
        return (found[1] if found.re.groups else found[0]) if found else str(path)


def contradiction(modality: str, values: np.ndarray) -> str:
    """The code of what some values of a scan say against its modality, or ""."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return "constant"
    if (modality == "CT" and low >= 0) or (modality in ("MR", "PT") and low <= AIR_HU and modality_of(values) == "CT"):
        return "modality_mismatch"
    return ""


def modality_of(array: np.ndarray) -> str:
    """Modality by the values, for files whose header has none.

    CT if the least value lies in [-5000, -200] (air is -1000 HU, padding -2000 or -3024) and 99.9 % are below 5000; MR if no value is
    below -200; else unknown, "".
    """
    low = float(array.min())
    if low > -200:
        return "MR"
    sample = array.ravel(order="K")[:: max(1, array.size // 1_000_000)]
    return "CT" if low >= -5000 and float(np.percentile(sample, 99.9)) < 5000 else ""


def is_label_map(array_XYZ: np.ndarray) -> bool:
    """Whether the values look like labels: whole, none below 0, at most 256 kinds, and three of four neighbours inside are equal.

    Inside means that neither of the two is 0. Images of few grey levels have noise, so their neighbours differ.
    """
    if array_XYZ.min() < 0 or (array_XYZ.dtype.kind == "f" and not np.array_equal(array_XYZ, np.rint(array_XYZ))):
        return False
    if len(np.unique(array_XYZ)) > 256:
        return False
    inside = equal = 0
    for axis in range(3):
        one, two = np.moveaxis(array_XYZ, axis, 0)[:-1], np.moveaxis(array_XYZ, axis, 0)[1:]
        both = (one != 0) & (two != 0)
        inside += int(both.sum())
        equal += int(((one == two) & both).sum())
    return inside == 0 or equal >= 0.75 * inside
