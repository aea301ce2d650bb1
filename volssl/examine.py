"""One series or file -> facts of each volume in it: what its header says, what its places and values say against it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from volssl import archive
from volssl.archive import Source, Unreadable
from volssl.dicom import VOLUME_MODALITIES, Slice, frames_of
from volssl.files import place_of
from volssl.fingerprint import Print, planes, print_of_stack, prints_of
from volssl.gates import Gates, contradiction, is_label_map, modality_of
from volssl.pixels import quiet, read_slice, same_pixels
from volssl.stacks import Stack, stacks_of
from volssl.volume import Volume

# The text of this tag is free in practice: only known words leave the private folder.
BODY_PARTS = set(
    "ABDOMEN ABDOMENPELVIS ANKLE ARM BRAIN BREAST CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE ELBOW EXTREMITY FOOT HAND HEAD HEADNECK "
    "HEART HIP KIDNEY KNEE LEG LIVER LSPINE LUNG NECK NECKCHEST PANCREAS PELVIS PROSTATE SHOULDER SKULL SPINE TSPINE "
    "WHOLEBODY WRIST".split()
)
# These say that a file could not be read, not that its content is unfit.
FAILURES = {"truncated", "undecodable", "no_permission", "missing", "empty_file", "out_of_memory"}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What the examination of one volume gave. `digest` is of its content, not yet keyed; `identity` tells it from all others.

    `failure` is the code of why it cannot be read, and then all there is. `place` is equal for files of one grid in one folder.
    """

    source: Source
    patient: tuple[str, ...] = ()
    study: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    modality: str = ""
    body_part: str = ""
    shape_vox: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    num_slices: int = 0
    reasons: tuple[str, ...] = ()
    digest: str = ""
    failure: str = ""
    place: str = ""
    prints: tuple[Print, ...] = field(default=(), repr=False)


def examined(gates: Gates, item: list[Slice] | Path) -> list[Facts]:
    """The volumes of one series, by the headers of its files, or of one file other than DICOM.

    What nobody foresaw is a failure of this one: one odd scan in 100,000 must not end the run. Its text may quote a header, so only the
    place in our code is logged.
    """
    try:
        return examine_file(gates, item) if isinstance(item, Path) else examine_series(gates, item)
    except MemoryError:
        code = "out_of_memory"
    except Exception as error:
        logger.error("%s", place_of(error))
        code = "unexpected_error"
    source = Source("file", (item,)) if isinstance(item, Path) else Source("dicom", tuple(one.path for one in item))
    return [Facts(source, failure=code)]


def examine_series(gates: Gates, slices: list[Slice]) -> list[Facts]:
    """The volumes of one DICOM series, by the headers of its files."""
    single = [archive.placed(one) for one in slices if one.frames <= 1]
    stacks = []
    for one in slices:
        if one.frames > 1:
            try:
                stacks += stacks_of(frames_of(one), gates.limits, same=same_pixels)
            except Unreadable as error:
                stacks.append(Stack((one,), None, tuple(sorted({*one.faults, "no_geometry", error.code} - {""}))))
    if single:
        stacks += stacks_of(single, gates.limits, same=same_pixels)
    return [_stack_facts(gates, stack, several=len(stacks) > 1) for stack in stacks]


def _stack_facts(gates: Gates, stack: Stack, *, several: bool) -> Facts:
    first, grid = stack.slices[0], stack.grid
    patient, study, series = first.key
    files = tuple(one.path for one in stack.slices)
    frames = tuple(one.frame for one in stack.slices) if first.frame >= 0 else ()
    instances = sorted(one.instance or str(one.path) for one in stack.slices)
    verdict = gates.verdict(stack.reasons)
    facts = Facts(
        source=Source("dicom", files[:1] if len(set(files)) == 1 else files, frames, stack.repairs, gates.limits),
        patient=("dicom", patient or study or series),
        study=("dicom", patient, study),
        identity=("dicom", patient, study, series, *((instances[0],) if several else ())),
        modality=first.modality if first.modality in VOLUME_MODALITIES else "OTHER",
        body_part=first.body_part if first.body_part in BODY_PARTS else "",
        shape_vox=grid.shape_vox if grid else (),
        spacing_mm=_rounded(grid.spacing_mm) if grid else (),
        orientation=grid.orientation if grid else "",
        num_slices=len(stack.slices),
        reasons=stack.reasons,
        digest=_digest(*instances),
    )
    return facts if verdict == "reject" or gates.content == "none" else _with_content(facts, stack)


def _with_content(facts: Facts, stack: Stack) -> Facts:
    # Four slices are decoded: what they show may speak against the header, and copies of the scan are found by them.
    assert stack.grid is not None
    try:
        with quiet():
            images = [read_slice(stack.slices[at]).T for at in planes(len(stack.slices))]
    except Unreadable as error:
        return replace(facts, reasons=tuple(sorted({*facts.reasons, error.code})))
    found = contradiction(facts.modality, np.stack(images))
    reasons = tuple(sorted({*facts.reasons, *([found] if found else [])}))
    return replace(facts, reasons=reasons, prints=tuple(print_of_stack(stack.grid, images)))


def examine_file(gates: Gates, path: Path) -> list[Facts]:
    """The volumes of one image file: several if it has a fourth axis."""
    source = Source("file", (path,))
    who = ("file", gates.patient_of(path))
    facts = Facts(source, patient=who, study=("file", str(path)), identity=("file", str(path)))
    try:
        volume = archive.read_files([path])
    except MemoryError:
        return [replace(facts, failure="out_of_memory")]
    except Unreadable as error:
        if error.code in FAILURES:
            return [replace(facts, failure=error.code)]
        return [replace(facts, reasons=(error.code,), digest=_digest(str(path)))]
    count = len(volume.array_CXYZ)
    if count == 1:
        return [_volume_facts(gates, facts, volume)]
    return [
        _volume_facts(
            gates,
            replace(facts, source=replace(source, part=(number,), repairs=("split",)), identity=(*facts.identity, str(number))),
            Volume(volume.array_CXYZ[number : number + 1], volume.grid),
        )
        for number in range(count)
    ]


def _volume_facts(gates: Gates, facts: Facts, volume: Volume) -> Facts:
    array, grid = volume.array_CXYZ, volume.grid
    modality = gates.modality or modality_of(array)
    reasons = ["several_volumes"] if facts.source.part else []
    if array.min() == array.max():
        reasons.append("constant")
    elif is_label_map(array[0]):
        reasons.append("label_map")
        modality = ""
    elif not modality:
        reasons.append("unknown_modality")
    elif gates.modality and (found := contradiction(modality, array)):
        reasons.append(found)
    if min(grid.shape_vox) < gates.min_slices:
        reasons.append("too_few_slices")
    return replace(
        facts,
        modality=modality,
        shape_vox=grid.shape_vox,
        spacing_mm=_rounded(grid.spacing_mm),
        orientation=grid.orientation,
        num_slices=grid.shape_vox[max(range(3), key=lambda axis: (grid.spacing_mm[axis], axis))],
        reasons=tuple(sorted(reasons)),
        digest=_content(volume),
        place=_digest(str(facts.source.files[0].parent), str(grid.shape_vox), str(grid.affine.round(2).tolist())),
        prints=tuple(prints_of(volume)),
    )


def _content(volume: Volume) -> str:
    # Hash of the values as float32 in RAS+, plane by plane, so that no copy of the volume is needed.
    array = volume.reoriented("RAS").array_CXYZ
    digest = hashlib.sha256(repr(array.shape).encode())
    for plane in array[0]:
        digest.update(np.ascontiguousarray(plane, dtype=np.float32).data)
    return digest.hexdigest()


def _rounded(spacing_mm: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(mm, 4) for mm in spacing_mm)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
