"""Paint a patient of `anatomy.py` on any grid as CT: Hounsfield units without scanner noise, and the label map of the liver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from volssl.anatomy import LESION, LIVER, Ellipsoid, Field, Patient, cage_depth, diaphragm, liver, lungs
from volssl.volume import Grid

AIR_HU, FAT_HU, MUSCLE_HU, LUNG_HU, SPONGY_HU, COMPACT_HU = -1000.0, -104.0, 54.0, -868.0, 190.0, 640.0
ORGANS = {"kidney": 3, "gallbladder": 4}
MARGIN_MM = 14.0  # how far the bend of space can carry a structure out of its straight box

Triple = tuple[float, float, float]
Where = tuple[slice, slice, slice]


def paint(patient: Patient, grid: Grid, *, organs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Hounsfield units (float32, XYZ) and the label map (uint8, XYZ: 1 liver, 2 lesion, and with `organs` those of ORGANS) on `grid`."""
    canvas = Canvas(patient, grid, ORGANS if organs else {})
    _paint_shell(canvas)
    _paint_lungs(canvas)
    _paint_abdomen(canvas)
    _paint_liver(canvas)
    _paint_vessels(canvas)
    _paint_ribs(canvas)
    _paint_spine(canvas)
    return canvas.hu, canvas.labels


class Canvas:
    """The voxels of one grid: their canonical coordinates, and what has been painted on them so far."""

    def __init__(self, patient: Patient, grid: Grid, marks: Mapping[str, int]) -> None:
        self.patient = patient
        self.marks = marks
        self.grid = grid
        self.scale = np.array(patient.scale)
        self.straight = np.diag([*(1 / self.scale), 1.0]) @ _moved(patient.shift_mm) @ grid.affine
        self.x, self.y, self.z = self._coordinates()
        self.depth = cage_depth(self.x, self.y, self.z)
        self.dome = diaphragm(self.x, self.y)
        self.hu = np.full(grid.shape_vox, AIR_HU, np.float32)
        self.labels = np.zeros(grid.shape_vox, np.uint8)
        self._rng = np.random.default_rng(patient.grain_seed)
        self.coarse = self._grain(14.0)
        self.fine = self._grain(5.0)

    def _coordinates(self) -> list[Field]:
        rows = self.straight[:3]
        steps = [np.arange(n, dtype=np.float32) for n in self.grid.shape_vox]

        def linear(weights: np.ndarray, offset: float) -> Field:
            i, j, k = (np.float32(w) * step for w, step in zip(weights, steps, strict=True))
            return (i + np.float32(offset))[:, None, None] + j[None, :, None] + k[None, None, :]

        fields = []
        for axis in range(3):
            field = linear(rows[axis, :3], rows[axis, 3])
            for amplitude, phase, *vector in self.patient.waves_3K5[axis]:
                field += np.float32(amplitude) * np.sin(linear(vector @ rows[:, :3], phase + vector @ rows[:, 3]))
            fields.append(field)
        return fields

    def _grain(self, size_mm: float) -> Field:
        # Smooth random texture with mean 0 and deviation 1, about `size_mm` from hill to hill.
        zooms = np.maximum(np.array(self.grid.spacing_mm) / size_mm, 0.02)
        small = np.maximum(np.ceil(np.array(self.grid.shape_vox) * np.minimum(zooms, 1)).astype(int) + 1, 2)
        field = self._rng.standard_normal(tuple(small), dtype=np.float32)
        factor = [n / m for n, m in zip(self.grid.shape_vox, small, strict=True)]
        field = np.asarray(ndimage.zoom(field, factor, order=1))
        return field / field.std()

    def voxels(self, canonical_N3: np.ndarray) -> np.ndarray:
        """Voxel positions (N, 3) of canonical points; the bend is undone to first order."""
        points = np.array(canonical_N3, dtype=np.float64)
        bent = points.copy()
        for axis in range(3):
            for amplitude, phase, *vector in self.patient.waves_3K5[axis]:
                bent[:, axis] -= amplitude * np.sin(points @ np.array(vector) + phase)
        inverse = np.linalg.inv(self.straight)
        return bent @ inverse[:3, :3].T + inverse[:3, 3]

    def box(self, low: ArrayLike, high: ArrayLike) -> Where:
        """The voxels that hold the canonical box from `low` to `high`, with the margin for the bend."""
        corners = np.array(np.meshgrid(*np.stack([np.asarray(low), np.asarray(high)], axis=1))).reshape(3, -1).T
        sides = np.sign(corners - corners.mean(0)) * MARGIN_MM
        inverse = np.linalg.inv(self.straight)
        voxels = (corners + sides) @ inverse[:3, :3].T + inverse[:3, 3]
        start = np.clip(np.floor(voxels.min(0)), 0, self.grid.shape_vox).astype(int)
        stop = np.clip(np.ceil(voxels.max(0)) + 1, 0, self.grid.shape_vox).astype(int)
        return slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2])

    def at(self, where: Where) -> tuple[Field, Field, Field]:
        """The canonical coordinates of a box of voxels."""
        return self.x[where], self.y[where], self.z[where]

    def ball(self, shape: Ellipsoid, hu: float | Field, *, only: Callable[[Where], Field] | None = None, mark: str = "") -> None:
        """Fill an ellipsoid, restricted to where `only` of its box is true, and mark it in the label map if that is asked for."""
        reach = np.array([max(shape.radii[0], shape.radii[2]), shape.radii[1], max(shape.radii[0], shape.radii[2])])
        where = self.box(np.array(shape.centre) - reach, np.array(shape.centre) + reach)
        inside = shape.level(*self.at(where)) < 1
        if only is not None:
            inside &= only(where)
        self.hu[where][inside] = hu[where][inside] if isinstance(hu, np.ndarray) else hu
        if mark in self.marks:
            self.labels[where][inside] = self.marks[mark]

    def tube(self, path: Sequence[Triple], radius: float, hu: float, *, only: Callable[[Where], Field] | None = None) -> None:
        """Fill the tube of `radius` mm around a chain of points, restricted to where `only` of each box is true."""
        for a, b in zip(np.array(path[:-1]), np.array(path[1:]), strict=True):
            where = self.box(np.minimum(a, b) - radius, np.maximum(a, b) + radius)
            x, y, z = (field - np.float32(start) for field, start in zip(self.at(where), a, strict=True))
            along = (b - a).astype(np.float32)
            share = np.clip((x * along[0] + y * along[1] + z * along[2]) / (along @ along), 0, 1)
            far = (x - share * along[0]) ** 2 + (y - share * along[1]) ** 2 + (z - share * along[2]) ** 2
            inside = far < radius**2
            if only is not None:
                inside &= only(where)
            self.hu[where][inside] = hu


def _moved(shift_mm: Triple) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = -np.array(shift_mm)
    return matrix


def _paint_shell(canvas: Canvas) -> None:
    # Table, skin, fat, the muscular wall, and the fat that fills the cavity.
    x, y, z, fat = canvas.x, canvas.y, canvas.z, canvas.patient.fat_mm
    low = np.clip(-z / 90, 0, 1)  # 1 in the belly
    high = np.clip((z - 90) / 90, 0, 1)  # 1 at the shoulders
    width = 158 + fat + 8 * high - 8 * low
    depth = (110 + 0.8 * fat) * (1 + canvas.patient.belly * low * (y > -8)) - 8 * high
    level = np.abs(x / width) ** 2.5 + np.abs((y + 8) / depth) ** 2.5
    below = np.sqrt(x**2 + (y + 8) ** 2) * (np.maximum(level, 1e-4) ** -0.4 - 1)
    _paint_table(canvas, back_mm=-8 - (110 + 0.8 * fat))
    body = below > 0
    canvas.hu[body] = (FAT_HU + 5 * canvas.fine)[body]
    canvas.hu[body & (below < 2.2)] = 10.0
    thick = 14 + 7 * np.clip(z / 40, 0, 1) + 70 * high + 34 * np.clip(-(y + 50) / 40, 0, 1) + 2 * canvas.coarse
    wall = (below > 4) & (canvas.depth < 0) & (canvas.depth > -thick)
    muscle = MUSCLE_HU + 4 * canvas.fine
    plane = np.abs(canvas.depth + 18 + canvas.coarse) < 1.2  # fat between the muscles
    canvas.hu[wall] = np.where(plane, FAT_HU + 60, muscle)[wall]
    lining = (canvas.depth >= 0) & (canvas.depth < 4.5) & body
    canvas.hu[lining] = muscle[lining]


def _paint_table(canvas: Canvas, *, back_mm: float) -> None:
    # The table is straight whatever the patient's bend: it is painted from the unbent coordinates.
    rows = canvas.straight[:3] * canvas.scale[:, None]
    i, j, k = np.ogrid[tuple(slice(n) for n in canvas.grid.shape_vox)]
    x, y = (np.float32(r[3]) + np.float32(r[0]) * i + np.float32(r[1]) * j + np.float32(r[2]) * k for r in rows[:2])
    top = back_mm * canvas.scale[1] - 7 + x**2 / 900
    depth = top - y
    inside = (np.abs(x) < 205) & (depth > 0) & (depth < 34 - x**2 / 1500)
    core = inside & (np.abs(x) < 200) & (depth > 3) & (depth < 31 - x**2 / 1500)
    canvas.hu[np.broadcast_to(inside, canvas.hu.shape)] = -180.0
    canvas.hu[np.broadcast_to(core, canvas.hu.shape)] = -925.0


def _paint_lungs(canvas: Canvas) -> None:
    patient, hu = canvas.patient, canvas.patient.hu
    mediastinum = (canvas.depth > 4.5) & (canvas.z > canvas.dome)
    canvas.hu[mediastinum] = np.where(canvas.coarse > 0.4, 30.0, FAT_HU + 20)[mediastinum]
    for name, value in (("heart", hu["heart"]), ("left_ventricle", hu["blood"]), ("right_ventricle", hu["blood"])):
        canvas.ball(patient.organs[name], value, only=lambda where: canvas.depth[where] > 5)
    _paint_great_vessels(canvas)
    air = np.clip(lungs(patient.organs, canvas.x, canvas.y, canvas.z) / 2 + 0.5, 0, 1)  # 1 inside, with a soft edge
    gravity = np.clip(-canvas.y / 90, -1, 1)  # blood sinks to the back of a lying patient
    texture = LUNG_HU + 28 * gravity + 16 * canvas.fine + 14 * canvas.coarse
    share = np.clip(_occupied(canvas), 0, 1)
    texture += share * (MUSCLE_HU + 20 - texture)
    canvas.hu += air * (texture - canvas.hu)
    for nodule in patient.nodules:
        canvas.ball(nodule, 38.0)


def _occupied(canvas: Canvas) -> Field:
    # Share of each voxel that lung vessels fill: every point of the tree brings its volume to the voxel it falls in.
    points = canvas.patient.vessels_N4
    voxels = np.rint(canvas.voxels(points[:, :3])).astype(int)
    shape = canvas.grid.shape_vox
    valid = ((voxels >= 0) & (voxels < np.array(shape))).all(1)
    flat = np.ravel_multi_index(tuple(voxels[valid].T), shape)
    share = np.bincount(flat, points[valid, 3], minlength=int(np.prod(shape))).reshape(shape)
    share *= np.prod(canvas.scale) / np.prod(canvas.grid.spacing_mm)
    return ndimage.gaussian_filter(share.astype(np.float32), 0.45)


def _paint_great_vessels(canvas: Canvas) -> None:
    blood = canvas.patient.hu["blood"]
    inside = lambda where: canvas.depth[where] > 3  # noqa: E731
    canvas.tube([(-22, -54, 30), (-24, -50, 100), (-16, -26, 124), (6, 2, 120), (12, 14, 100), (4, 16, 60)], 14, blood)
    for x, y in ((8, -4), (-6, -10), (-18, -22)):
        canvas.tube([(x, y, 122), (1.8 * x + 4, y - 4, 230)], 5, blood, only=inside)
    canvas.tube([(28, 4, 170), (26, 4, 90), (22, 4, 50)], 9, blood)
    canvas.tube([(-18, 34, 66), (-14, 10, 86), (4, -6, 80), (38, -10, 66)], 12, blood)
    canvas.tube([(-14, 10, 86), (-40, -14, 74)], 11, blood)
    canvas.tube([(-6, -38, 230), (-8, -40, 60), (-16, -34, 0), (-30, -10, -24)], 7, 40.0)
    trunk, fork = [(2, -14, 240), (2, -20, 96)], (2, -20, 96)
    for radius, hu in ((10.5, 30.0), (8.5, AIR_HU)):
        canvas.tube(trunk, radius, hu)
        for tip in ((34, -18, 66), (-40, -20, 62)):
            canvas.tube([fork, tip], radius - 2.5, hu)


def _paint_abdomen(canvas: Canvas) -> None:
    patient, hu = canvas.patient, canvas.patient.hu
    organs = patient.organs
    under = (canvas.depth > 5.5) & (canvas.z < canvas.dome - 4)
    cavity = (canvas.depth > 4.5) & (canvas.z < canvas.dome - 3)
    canvas.hu[cavity] = (FAT_HU + 6 * canvas.fine)[cavity]
    canvas.hu[(canvas.depth > 4) & (np.abs(canvas.z - canvas.dome + 2) < 2.4)] = MUSCLE_HU  # the diaphragm itself

    def only(where: Where) -> Field:
        return under[where]

    for loop, content in patient.bowel:
        canvas.ball(loop, content, only=only)
    for x, gas in ((98.0, -700.0), (-100.0, -200.0)):
        path = [(x, -18.0, -118.0), (1.02 * x, -6.0, -160.0), (0.98 * x, 4.0, -250.0)]
        canvas.tube(path, 19, 38.0, only=only)
        canvas.tube(path, 16, gas, only=lambda where: under[where] & (canvas.y[where] > -4))
    canvas.ball(organs["spleen"], hu["spleen"] + 4 * canvas.fine, only=only)
    canvas.ball(organs["stomach"], 44.0, only=only)
    inner = organs["stomach"].shrunk(5)
    canvas.ball(inner, 18 + 7 * canvas.fine, only=only)
    canvas.ball(inner, -960.0, only=lambda where: under[where] & (canvas.y[where] > inner.centre[1] + 12))
    canvas.ball(organs["pancreas"], (hu["medulla"] + 8) + 12 * canvas.fine, only=only)
    canvas.ball(organs["gallbladder"], 8.0, only=only, mark="gallbladder")
    for side, name in ((1, "kidney_right"), (-1, "kidney_left")):
        _paint_kidney(canvas, organs[name], side)
    for sign in (1, -1):  # psoas and the crura of the diaphragm
        canvas.tube([(sign * 26, -62, -90), (sign * 40, -52, -250)], 17, MUSCLE_HU + 4)
        canvas.tube([(sign * 16, -48, -8), (sign * 18, -52, -110)], 6, MUSCLE_HU)
    canvas.tube([(-22, -54, 34), (-16, -44, -30), (-14, -42, -250)], 11, hu["blood"])
    canvas.tube([(14, -26, 20), (18, -28, -20), (22, -38, -90), (20, -40, -250)], 12, hu["blood"] - 4)


def _paint_kidney(canvas: Canvas, kidney: Ellipsoid, side: int) -> None:
    x, y, z = kidney.centre
    a, b, c = kidney.radii
    hu = canvas.patient.hu
    canvas.ball(kidney, hu["cortex"], mark="kidney")
    medulla = Ellipsoid((x - side * 3, y, z), (0.68 * a, 0.68 * b, 0.76 * c), kidney.turn_deg)
    canvas.ball(medulla, hu["medulla"] + 5 * canvas.fine)
    sinus = Ellipsoid((x - side * 0.62 * a, y + 0.2 * b, z), (0.62 * a, 0.42 * b, 0.42 * c), kidney.turn_deg)
    canvas.ball(sinus, -70.0)


def _paint_liver(canvas: Canvas) -> None:
    hu, lesions = canvas.patient.hu, canvas.patient.lesions
    where = canvas.box((-110, -110, -190), (145, 110, 30))
    inside = liver(canvas.patient.organs, *canvas.at(where)) < 1
    canvas.hu[where][inside] = (hu["liver"] + 4 * canvas.fine + 2 * canvas.coarse)[where][inside]
    canvas.labels[where][inside] = LIVER

    def only(box: Where) -> Field:
        return canvas.labels[box] == LIVER

    for tip in ((86, -4, -60), (44, 44, -48), (-24, 46, -34), (74, -44, -78)):  # hepatic veins
        bend = tuple(0.5 * (a + b) for a, b in zip(tip, (18, -14, -6), strict=True))
        canvas.tube([(18, -24, -8), (bend[0], bend[1], bend[2] + 6), tip], 4.2, hu["liver_vessels"], only=only)
    for tip in ((84, 2, -92), (60, -34, -104), (10, 46, -58)):  # branches of the portal vein
        canvas.tube([(22, -4, -84), tip], 5.0, hu["liver_vessels"] + 4, only=only)
    canvas.tube([(22, -4, -84), (2, -8, -110)], 7.0, hu["liver_vessels"] + 4)
    for lesion in lesions:
        canvas.ball(lesion, hu["lesion"] + 4 * canvas.fine, only=only)
        box = canvas.box(np.array(lesion.centre) - 40, np.array(lesion.centre) + 40)
        struck = (lesion.level(*canvas.at(box)) < 1) & np.isin(canvas.labels[box], (LIVER, LESION))
        canvas.labels[box][struck] = LESION


def _paint_vessels(canvas: Canvas) -> None:
    # Vessels of the belly that make its fat look alive: mesenteric branches from the aorta, renal veins.
    hu = canvas.patient.hu
    fatty = lambda where: canvas.hu[where] < -60  # noqa: E731
    for tip in ((40, 30, -150), (-40, 34, -150), (10, 52, -160), (-66, 10, -130), (60, 20, -170), (-20, 60, -190)):
        canvas.tube([(-10, -24, -104), (tip[0] / 2, tip[1] / 2, tip[2] + 12), tip], 3.0, hu["blood"], only=fatty)
    for side, name in ((1, "kidney_right"), (-1, "kidney_left")):
        x, y, z = canvas.patient.organs[name].centre
        canvas.tube([(x - side * 14, y + 4, z), (side * 8, -36, z + 6)], 4.5, hu["blood"])


def _paint_ribs(canvas: Canvas) -> None:
    # Twelve hoops in the wall of the cage that fall from the spine to the front; cartilage ahead of them; the sternum.
    x, y, z, bone = canvas.x, canvas.y, canvas.z, canvas.patient.hu["bone"]
    shell = (canvas.depth < -1.5) & (canvas.depth > -15) & (z < 190)
    voxels = np.nonzero(shell)
    x, y, z, depth = x[voxels], y[voxels], z[voxels], canvas.depth[voxels]
    round_ = np.arctan2(np.abs(x), -(y + 6))  # 0 behind, pi in front
    source = z + 92 * (round_ / np.pi) ** 1.2  # height at which this hoop leaves the spine
    number = np.round(source / 27)
    level = ((depth + 7.5) / 4.6) ** 2 + ((source - 27 * number) / 7.2) ** 2
    long = np.where(number < -2, 1.5, 2.3)
    hoop = (level < 1) & (number > -4.5) & (number < 8.5) & (round_ > 0.3)
    values = canvas.hu[voxels]
    cartilage = hoop & (round_ >= long) & (number > -1.5)
    rib = hoop & (round_ < long)
    values[cartilage] = 95.0
    values[rib] = np.where(level > 0.45, COMPACT_HU, SPONGY_HU)[rib] * bone
    plate = (np.abs(x) < 17) & (y > 0) & (z > 8) & (z < 168) & (np.abs(depth + 7.5) < 5.5)
    core = plate & (np.abs(x) < 14) & (np.abs(depth + 7.5) < 3.2)
    values[plate] = 380.0 * bone
    values[core] = 130.0 * bone
    canvas.hu[voxels] = values
    for side in (1, -1):
        canvas.ball(Ellipsoid((side * 96.0, -104.0, 112.0), (40.0, 5.5, 62.0), side * 14.0), 420.0 * bone)
        canvas.tube([(side * 14, 62, 168), (side * 60, 50, 190), (side * 120, 10, 200)], 7, 430.0 * bone)


def _paint_spine(canvas: Canvas) -> None:
    # Vertebrae every 27 mm: body with a compact rim, disc, canal, arch, spinous and transverse processes.
    bone = canvas.patient.hu["bone"]
    where = canvas.box((-46, -130, -300), (46, -40, 300))
    x, y, z = canvas.at(where)
    y = y + 5 * np.cos(z / 75)  # the curve of the back
    number = np.round(z / 27)
    height = np.abs(z - 27 * number)
    body = np.sqrt((x / 21) ** 2 + ((y + 66) / 16) ** 2)
    canal = np.sqrt(x**2 + ((y + 92) / 0.9) ** 2)
    values = canvas.hu[where]
    values[(body < 1) & (height >= 10.5)] = 82.0
    vertebra = (body < np.where(height > 8, 1.0, 0.94)) & (height < 10.5)
    rim = vertebra & ((body > 0.82) | (height > 8.6))
    spongy = SPONGY_HU + 22 * canvas.fine[where]
    values[vertebra] = spongy[vertebra] * bone
    values[rim] = 400.0 * bone
    arch = (canal < 15) & (y < -84) & (height < 9.5)
    pedicle = (np.abs(np.abs(x) - 13) < 4.5) & (y < -78) & (y > -92) & (height < 6)
    spinous = (np.abs(x) < 3.4) & (y < -100) & (y > -124 + 0.4 * height) & (np.abs(z - 27 * number + 5) < 7)
    across = (np.abs(x) < 36) & (np.abs(y + 95 + 0.12 * np.abs(x)) < 4.6) & (height < 5.5)
    posterior = arch | pedicle | spinous | across
    values[posterior] = 430.0 * bone
    values[canal < 8.5] = 14.0
    values[canal < 5.2] = 40.0
