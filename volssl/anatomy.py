"""A torso in numbers: the sizes, organs and densities of a patient, a pure function of (seed, patient), and the shapes they give.

Canonical millimetres: x to the patient's right, y to the front, z to the head, origin in the mid-plane at the height of the right dome
of the diaphragm. A patient is the canonical torso with sizes, organs and Hounsfield units of his own, seen through a smooth bend of space.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from volssl.draws import generator

LIVER, LESION = 1, 2
AIR_HU, FAT_HU, MUSCLE_HU, LUNG_HU = -1000.0, -105.0, 52.0, -865.0
BEND_MM = 5.0  # largest shift by one wave of the bend
TOP_MM, DOME_MM = 185.0, 20.0  # apex of the thoracic cavity; height below which its walls run straight
HALF_WIDTH_MM, HALF_DEPTH_MM, CAGE_POWER = 130.0, 88.0, 2.4

Field = np.ndarray  # a float32 value per voxel


@dataclass(frozen=True)
class Ellipsoid:
    """Centre and radii in canonical mm; `turn_deg` turns it about the y axis (in the coronal plane)."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn_deg: float = 0.0

    def level(self, x: Field, y: Field, z: Field) -> Field:
        """Below 1 inside, 1 on the surface, growing with the square of the distance."""
        x, y, z = x - self.centre[0], y - self.centre[1], z - self.centre[2]
        if self.turn_deg:
            c, s = np.float32(np.cos(np.deg2rad(self.turn_deg))), np.float32(np.sin(np.deg2rad(self.turn_deg)))
            x, z = c * x + s * z, c * z - s * x
        return (x / self.radii[0]) ** 2 + (y / self.radii[1]) ** 2 + (z / self.radii[2]) ** 2

    def shrunk(self, by_mm: float) -> Ellipsoid:
        """The same ellipsoid with every radius smaller by `by_mm`."""
        a, b, c = (radius - by_mm for radius in self.radii)
        return Ellipsoid(self.centre, (a, b, c), self.turn_deg)


@dataclass(frozen=True)
class Patient:
    """All that was drawn for one patient. Lengths in mm, densities in HU."""

    scale: tuple[float, float, float]
    shift_mm: tuple[float, float, float]
    waves_3K5: np.ndarray  # per axis and wave: amplitude, phase, wave vector
    fat_mm: float
    belly: float
    hu: dict[str, float]
    organs: dict[str, Ellipsoid]
    lesions: tuple[Ellipsoid, ...]
    nodules: tuple[Ellipsoid, ...]
    bowel: tuple[tuple[Ellipsoid, float], ...]
    vessels_N4: np.ndarray  # points of the lungs' vessels and the volume in mm^3 that each stands for
    grain_seed: int


@lru_cache(maxsize=4)
def draw_patient(seed: int, patient: int) -> Patient:
    """Draw the patient numbered `patient` of the population `seed`."""
    rng = generator(seed, "patient", patient)
    size = rng.uniform(0.88, 1.1)
    scale = tuple(float(v) for v in size * rng.uniform(0.95, 1.05, 3))
    organs = _draw_organs(rng)
    lesion_count = int(rng.choice(5, p=(0.08, 0.22, 0.28, 0.24, 0.18)))
    return Patient(
        scale=scale,  # pyright: ignore[reportArgumentType]
        shift_mm=(float(rng.normal(0, 6)), float(rng.normal(0, 4)), float(rng.normal(0, 5))),
        waves_3K5=_draw_waves(rng),
        fat_mm=float(rng.uniform(9, 30)),
        belly=float(rng.uniform(0.0, 0.16)),
        hu=_draw_hu(rng),
        organs=organs,
        lesions=_draw_inside(rng, organs, count=lesion_count, radius_mm=(11.0, 30.0), where="liver"),
        nodules=_draw_inside(rng, organs, count=int(rng.integers(0, 4)), radius_mm=(3.5, 9.0), where="lungs"),
        bowel=_draw_bowel(rng),
        vessels_N4=_draw_vessels(rng),
        grain_seed=int(rng.integers(1 << 30)),
    )


# ------------------------------------------------------------------------------------------------ what is drawn


def _draw_waves(rng: np.random.Generator) -> np.ndarray:
    waves = np.zeros((3, 4, 5))
    lengths_mm = np.array([260.0, 180.0, 110.0, 70.0])
    waves[..., 0] = rng.uniform(-1, 1, (3, 4)) * np.array([1.0, 0.8, 0.5, 0.28]) * BEND_MM
    waves[..., 1] = rng.uniform(0, 2 * np.pi, (3, 4))
    direction = rng.normal(size=(3, 4, 3))
    waves[..., 2:] = 2 * np.pi * direction / np.linalg.norm(direction, axis=-1, keepdims=True) / lengths_mm[:, None]
    return waves


def _draw_hu(rng: np.random.Generator) -> dict[str, float]:
    contrast = float(rng.choice([0.0, 0.35, 1.0]))  # without, late, portal-venous contrast medium
    liver = rng.uniform(52, 66) + 48 * contrast
    return {
        "liver": liver,
        "lesion": rng.uniform(8, 26),
        "liver_vessels": (40 if contrast == 0 else liver + 32) + rng.uniform(-3, 3),
        "spleen": rng.uniform(44, 54) + 62 * contrast,
        "cortex": rng.uniform(30, 38) + 135 * contrast,
        "medulla": rng.uniform(28, 34) + 95 * contrast,
        "blood": rng.uniform(38, 46) + 105 * contrast,
        "heart": rng.uniform(40, 48) + 62 * contrast,
        "bone": rng.uniform(0.85, 1.15),
    }


def _draw_organs(rng: np.random.Generator) -> dict[str, Ellipsoid]:
    def near(centre: tuple[float, float, float], radii: tuple[float, float, float], turn: float = 0.0, loose: float = 5.0) -> Ellipsoid:
        x, y, z = (float(c + rng.normal(0, loose)) for c in centre)
        a, b, c = (float(r * rng.uniform(0.9, 1.1)) for r in radii)
        return Ellipsoid((x, y, z), (a, b, c), turn + float(rng.normal(0, 3)))

    return {
        "liver_right": near((62, 0, -62), (74, 78, 84), 14),
        "liver_left": near((0, 42, -38), (84, 34, 36), 10),
        "spleen": near((-90, -46, -42), (27, 44, 48), -12),
        "stomach": near((-58, 30, -44), (44, 42, 44), -24),
        "kidney_right": near((60, -52, -128), (27, 25, 54), -10),
        "kidney_left": near((-60, -54, -112), (27, 25, 54), 10),
        "gallbladder": near((42, 42, -108), (13, 20, 26), 12, 3),
        "pancreas": near((-8, 2, -92), (58, 13, 15), -16, 3),
        "heart": near((-26, 22, 36), (56, 46, 50), -34),
        "left_ventricle": near((-44, 18, 28), (22, 24, 30), -34, 2),
        "right_ventricle": near((-4, 34, 30), (26, 20, 28), -20, 2),
    }


def _draw_inside(
    rng: np.random.Generator, organs: dict[str, Ellipsoid], *, count: int, radius_mm: tuple[float, float], where: str
) -> tuple[Ellipsoid, ...]:
    # Rejection: points of a box, kept where the organ is, so that it depends on the patient alone and not on a grid.
    points = rng.uniform((-125, -80, -120), (135, 80, 160), (4000, 3))
    x, y, z = points.T
    inside = liver(organs, x, y, z) < 0.62 if where == "liver" else lungs(organs, x, y, z) > 9
    found = []
    for centre in points[inside]:
        if len(found) == count:
            break
        radius = np.exp(rng.uniform(*np.log(radius_mm)))
        if any(np.linalg.norm(centre - other.centre) < 1.3 * (radius + max(other.radii)) for other in found):
            continue
        a, b, c = (float(v) for v in radius * rng.uniform(0.8, 1.2, 3))
        found.append(Ellipsoid(tuple(float(v) for v in centre), (a, b, c), float(rng.uniform(-45, 45))))  # pyright: ignore[reportArgumentType]
    return tuple(found)


def _draw_bowel(rng: np.random.Generator) -> tuple[tuple[Ellipsoid, float], ...]:
    # Loops: chains of overlapping balls on a random walk in the lower abdomen; each with its content in HU.
    loops = []
    for _ in range(9):
        at = rng.uniform((-85, -10, -190), (85, 72, -112))
        step = rng.normal(size=3)
        radius, content = rng.uniform(9, 15), rng.uniform(5, 40)
        for _ in range(12):
            step = 0.72 * step + 0.5 * rng.normal(size=3)
            at = np.clip(at + 9 * step / np.linalg.norm(step), (-100, -20, -240), (100, 80, -108))
            radii = (radius, radius, radius)
            loops.append((Ellipsoid(tuple(float(v) for v in at), radii), float(content)))  # pyright: ignore[reportArgumentType]
    return tuple(loops)


def _draw_vessels(rng: np.random.Generator) -> np.ndarray:
    # A tree from each hilum: five generations, two or three branches each, turning outwards; sampled as points.
    points = []
    for side in (1, -1):
        tips = [(np.array([side * 30.0, -8.0, 58.0]), np.array([side, d[0], d[1]]), 5.2) for d in rng.normal(0, 1.1, (9, 2))]
        for generation in range(6):
            grown = []
            for at, direction, radius in tips:
                direction = direction / np.linalg.norm(direction)
                length = rng.uniform(0.75, 1.25) * (34, 30, 26, 22, 17, 13)[generation]
                number = int(length * max(2.0, 3.5 * radius))
                along = rng.uniform(0, length, number)
                across = rng.normal(0, radius / 2, (number, 3))
                path = at + along[:, None] * direction + across
                points.append(np.column_stack([path, np.full(number, np.pi * radius**2 * length / number)]))
                for _ in range(2 if rng.uniform() < 0.65 else 3):
                    turned = direction + rng.normal(0, 0.42, 3) + np.array([0.1 * side, 0, 0])
                    grown.append((at + rng.uniform(0.6, 1.0) * length * direction, turned, radius * rng.uniform(0.6, 0.8)))
            tips = grown
    return np.concatenate(points)


# ------------------------------------------------------------------------------------------------ implicit shapes


def cage_depth(x: Field, y: Field, z: Field) -> Field:
    """Depth in mm below the inner wall of the chest and belly: positive inside."""
    height = np.maximum(z - DOME_MM, 0) / (TOP_MM - DOME_MM)
    level = np.abs(x / HALF_WIDTH_MM) ** CAGE_POWER + np.abs((y + 6) / HALF_DEPTH_MM) ** CAGE_POWER + height**2.8
    radius = np.sqrt(x**2 + (y + 6) ** 2 + (height * (TOP_MM - DOME_MM)) ** 2)
    return radius * (np.maximum(level, 1e-4) ** (-1 / CAGE_POWER) - 1)


def diaphragm(x: Field, y: Field) -> Field:
    """Height of the diaphragm: a dome on each side, the right one higher, steep towards the walls."""
    rim = np.abs(x / HALF_WIDTH_MM) ** CAGE_POWER + np.abs((y + 6) / HALF_DEPTH_MM) ** CAGE_POWER
    return 7 * np.tanh((x - 10) / 40) - 7 - 10 * np.exp(-((x / 34) ** 2)) - 90 * np.minimum(rim, 1.2) ** 1.4


def lungs(organs: dict[str, Ellipsoid], x: Field, y: Field, z: Field) -> Field:
    """About the depth in mm below the surface of the lungs: positive inside."""
    mediastinum = 24 + 20 * np.clip((40 - z) / 120, 0, 1) + 10 * np.clip((y - 10) / 40, 0, 1) - 8 * np.clip(y / 80, 0, 1)
    beside = np.abs(x + 4) - mediastinum
    heart = 26 * (np.sqrt(organs["heart"].level(x, y, z)) - 1.1)
    spine = np.sqrt(x**2 + (y + 74) ** 2) - 34
    above = 0.8 * (z - diaphragm(x, y))
    return np.minimum.reduce([cage_depth(x, y, z) - 2, beside, heart, spine, above])


def liver(organs: dict[str, Ellipsoid], x: Field, y: Field, z: Field) -> Field:
    """Below 1 inside: right and left lobe joined, under the diaphragm, cut off obliquely at the hilum."""
    right, left = organs["liver_right"].level(x, y, z), organs["liver_left"].level(x, y, z)
    joined = -np.log(np.exp(-6 * np.minimum(right, 4)) + np.exp(-6 * np.minimum(left, 4))) / 6
    wall = 1 - (cage_depth(x, y, z) - 4) / 12
    dome = 1 - (diaphragm(x, y) - 4 - z) / 12
    hilum = 1 + (-z - 92 - 0.45 * x + 0.3 * y) / 22  # the lower surface rises towards the left
    spine = 1 - (np.sqrt(x**2 + (y + 66) ** 2) - 42) / 12
    return np.maximum.reduce([joined, wall, dome, hilum, spine])
