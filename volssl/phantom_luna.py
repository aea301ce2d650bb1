"""A small synthetic data set in LUNA16's exact public layout: chest CT, nodules, candidates, excluded findings, lungs, readers' contours.

Source of the layout: luna16.grand-challenge.org; of the readers' XML: the LIDC-IDRI collection of The Cancer Imaging Archive.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from scipy import ndimage

from volssl.anatomy import Ellipsoid, Patient, draw_patient, lungs
from volssl.archive import write_nifti
from volssl.dicom_write import uid
from volssl.draws import generator
from volssl.files import BadInput, atomic, claim_out, write_csv, write_text
from volssl.torso import Canvas, paint
from volssl.volume import Grid

FIRST_CHEST = 300_000
LUNG_MM = (150.0, 150.0, 120.0)
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ")
SIZES = (0.9, 1.0, 1.0, 1.1)  # what four readers make of a nodule's radius: half of them, or more, mark exactly the true one
LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Mark:
    """A nodule as drawn: its ellipsoid, and how many of the four readers marked it (LUNA16 counts those of three or four)."""

    shape: Ellipsoid
    readers: int


def write_luna16(out: Path, *, scans: int = 4, subsets: int = 2, seed: int = 0, size_vox: int = 60) -> Path:
    """Write LUNA16: subset0 ... with <uid>.mhd and .raw or .zraw, annotations.csv, candidates.csv, candidates_V2.csv, seg-lungs-LUNA16
    and evaluationScript/annotations with the excluded findings and the list of scans; beside them nodule_masks/<uid>.nii.gz and the
    readers' contours in LIDC-XML-only/.

    Each scan shows one lung. Scan 0 has two nodules and one mark of two readers (excluded), scan 1 no nodule at all, the others one.

    Args: out: new folder. scans: at least 2. subsets: at most 10, and as many as scans. size_vox: voxels across 150 mm.
    """
    if scans < 2 or not 1 <= subsets <= min(10, scans):
        raise BadInput(f"phantom: scans >= 2 and subsets from 1 to 10 and to scans must hold; found {scans}, {subsets}")
    claim_out(out)
    tables: dict[str, list[dict[str, Any]]] = {"annotations": [], "excluded": [], "candidates": []}
    for number in range(scans):
        series = uid("volssl", "luna16", seed, number)
        grid, patient = _grid(size_vox), draw_patient(seed, FIRST_CHEST + number)
        canvas = Canvas(patient, grid, {})
        marks = _marks(seed, number, patient, canvas)
        hu, _ = paint(replace(patient, nodules=tuple(mark.shape for mark in marks)), grid)
        hu += generator(seed, "chest noise", number).normal(0, 20, hu.shape)
        array = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
        write_mhd(out / f"subset{number % subsets}" / f"{series}.mhd", array, grid, packed=number % 2 == 1)
        lung = lungs(patient.organs, canvas.x, canvas.y, canvas.z) > 0
        write_mhd(out / "seg-lungs-LUNA16" / f"{series}.mhd", np.where(lung, 3, 0).astype(np.int8), grid, packed=True)
        counted = np.zeros(grid.shape_vox, np.uint8)
        for mark in marks:
            mask = _mask(mark.shape, canvas)
            counted |= mask & (mark.readers >= 3)
            _note(tables, series, mark, mask, grid)
        write_nifti(out / "nodule_masks" / f"{series}.nii.gz", counted, grid, np.uint8)
        write_text(out / "LIDC-XML-only" / f"{number:03d}.xml", _readings(series, marks, canvas))
        tables["candidates"] += _others(generator(seed, "candidates", number), series, array, grid=grid, free=lung & (counted == 0))
    _write_tables(out, tables)
    return out


def _grid(size_vox: int) -> Grid:
    step = LUNG_MM[0] / size_vox
    affine = np.diag([-step, -step, step, 1.0])  # RAS; the file says the same in LPS
    shape = (size_vox, size_vox, round(LUNG_MM[2] / step))
    affine[:3, 3] = np.array([75.0, -5.0, 60.0]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def _marks(seed: int, number: int, patient: Patient, canvas: Canvas) -> list[Mark]:
    wanted = {0: (4, 3, 2), 1: ()}.get(number, (4,))
    rng = generator(seed, "nodules", number)
    points = rng.uniform((25, -70, 10), (125, 60, 110), (4000, 3))
    points = points[lungs(patient.organs, *points.T) > 14]
    voxels = canvas.voxels(points)
    sides = np.array(canvas.grid.shape_vox)
    points = points[((voxels > 5) & (voxels < sides - 6)).all(1)]
    marks: list[Mark] = []
    for centre in points:
        if len(marks) == len(wanted):
            break
        if all(np.linalg.norm(centre - mark.shape.centre) > 32 for mark in marks):
            a, b, c = (float(v) for v in rng.uniform(7.0, 11.0, 3))
            marks.append(Mark(Ellipsoid((float(centre[0]), float(centre[1]), float(centre[2])), (a, b, c)), wanted[len(marks)]))
    return marks


def _mask(shape: Ellipsoid, canvas: Canvas, size: float = 1.0) -> np.ndarray:
    return (shape.level(canvas.x, canvas.y, canvas.z) < size**2).astype(np.uint8)


def _note(tables: dict[str, list[dict[str, Any]]], series: str, mark: Mark, mask: np.ndarray, grid: Grid) -> None:
    # Centre of mass and diameter of the ball of the same volume: what LUNA16's annotations hold, in world mm (LPS).
    centre = _lps(grid, np.argwhere(mask).mean(0))
    diameter = 2 * (3 * mask.sum() * np.prod(grid.spacing_mm) / (4 * np.pi)) ** (1 / 3)
    row = {"seriesuid": series, **centre}
    if mark.readers >= 3:
        tables["annotations"].append(row | {"diameter_mm": f"{diameter:.6f}"})
        tables["candidates"].append(row | {"class": 1})
    else:
        tables["excluded"].append(row | {"diameter_mm": -1})
        tables["candidates"].append(row | {"class": 0})


def _lps(grid: Grid, voxel_3: np.ndarray) -> dict[str, Any]:
    return {name: f"{mm:.6f}" for name, mm in zip(COLUMNS[1:], LPS * grid.world(voxel_3[None])[0], strict=True)}


def _others(rng: np.random.Generator, series: str, hu: np.ndarray, *, grid: Grid, free: np.ndarray) -> list[dict[str, Any]]:
    # Candidates that are no nodules, well away from any: half of them bright (vessels, as a detector finds them), half plain lung.
    away = np.asarray(ndimage.binary_erosion(free, iterations=3), dtype=bool)
    rows: list[dict[str, Any]] = []
    for bright in (True, False):
        voxels_N3 = np.argwhere(away & ((hu > -600) == bright))
        chosen = voxels_N3[rng.permutation(len(voxels_N3))[:6]]
        # Between the voxels, as a nodule's centre of mass is: the place within a voxel must not tell the two apart.
        rows += [{"seriesuid": series, **_lps(grid, voxel + rng.uniform(-0.5, 0.5, 3)), "class": 0} for voxel in chosen]
    return rows


def _write_tables(out: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    with_size, with_class = (*COLUMNS, "diameter_mm"), (*COLUMNS, "class")
    write_csv(out / "annotations.csv", tables["annotations"], with_size)
    kit = out / "evaluationScript" / "annotations"
    write_csv(kit / "annotations.csv", tables["annotations"], with_size)
    write_csv(kit / "annotations_excluded.csv", tables["excluded"], with_size)
    write_text(kit / "seriesuids.csv", "".join(f"{name}\n" for name in dict.fromkeys(row["seriesuid"] for row in tables["candidates"])))
    write_csv(out / "candidates_V2.csv", tables["candidates"], with_class)
    # The first version found fewer of the nodules.
    write_csv(out / "candidates.csv", [row for row in tables["candidates"] if row["class"] == 0] + tables["candidates"][:1], with_class)


def write_mhd(path: Path, array_XYZ: np.ndarray, grid: Grid, *, packed: bool) -> None:
    """Write int16 or int8 voxels as LUNA16 does: a header <name>.mhd and its pixels in <name>.zraw (`packed`) or <name>.raw."""
    pixels = path.with_name(path.name.removesuffix(".mhd") + (".zraw" if packed else ".raw"))
    data = np.asfortranarray(array_XYZ).tobytes(order="F")
    data = zlib.compress(data) if packed else data
    turn = np.diag(LPS) @ grid.affine[:3, :3] / np.array(grid.spacing_mm)
    lines = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": packed,
        **({"CompressedDataSize": len(data)} if packed else {}),
        "TransformMatrix": _numbers(turn.T.ravel()),
        "Offset": _numbers(LPS * grid.affine[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": _numbers(np.array(grid.spacing_mm)),
        "DimSize": " ".join(map(str, grid.shape_vox)),
        "ElementType": {"int16": "MET_SHORT", "int8": "MET_CHAR"}[array_XYZ.dtype.name],
        "ElementDataFile": pixels.name,
    }
    with atomic(pixels) as temporary:
        temporary.write_bytes(data)
    write_text(path, "".join(f"{key} = {value}\n" for key, value in lines.items()))


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value + 0.0:.9g}" for value in values)


def _readings(series: str, marks: list[Mark], canvas: Canvas) -> str:
    # One reading session per reader. Contours are the first voxels outside of the nodule, as the LIDC readers drew them.
    sessions = []
    for reader, size in enumerate(SIZES):
        nodules = []
        for number, mark in enumerate(marks):
            if reader < mark.readers:
                rois = _rois(_mask(mark.shape, canvas, size), canvas.grid)
                nodules.append(f"<unblindedReadNodule><noduleID>Nodule {number:03d}</noduleID>{rois}</unblindedReadNodule>")
        sessions.append(f"<readingSession><annotationVersion>3.12</annotationVersion>{''.join(nodules)}</readingSession>\n")
    head = f"<ResponseHeader><SeriesInstanceUid>{escape(series)}</SeriesInstanceUid></ResponseHeader>\n"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage xmlns="http://www.nih.gov">\n{head}{"".join(sessions)}</LidcReadMessage>\n'


def _rois(mask: np.ndarray, grid: Grid) -> str:
    parts = []
    for k in np.flatnonzero(mask.any((0, 1))):
        slice_XY: np.ndarray = mask[..., k] > 0
        ring = np.argwhere(np.asarray(ndimage.binary_dilation(slice_XY)) & ~slice_XY)
        around = ring - np.argwhere(slice_XY).mean(0)
        ring = ring[np.argsort(np.arctan2(around[:, 1], around[:, 0]))]
        edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in [*ring, ring[0]])
        z = grid.world(np.array([[0, 0, k]]))[0, 2]
        parts.append(f"<roi><imageZposition>{z:.6f}</imageZposition><inclusion>TRUE</inclusion>{edges}</roi>")
    return "".join(parts)
