"""A skull-stripped head in numbers, painted as four MR contrasts with its tumour: what the phantoms of the BraTS layouts are made of.

World millimetres with the centre of the brain as origin. Every voxel is a pure function of (seed, patient, visit) and the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from volssl.draws import generator
from volssl.volume import Grid

NECROSIS, OEDEMA, ENHANCING = 1, 2, 3
CONTRASTS = ("t1", "t1ce", "t2", "flair")
RADII_MM = (66.0, 84.0, 62.0)
# Brightness of each tissue in each contrast: arbitrary units, in the order that T1, T1 after contrast medium, T2 and FLAIR show them.
TISSUES = {
    "white": (700, 710, 350, 420),
    "grey": (520, 530, 500, 520),
    "fluid": (220, 220, 950, 150),
    "oedema": (450, 460, 800, 950),
    "necrosis": (260, 270, 880, 430),
    "enhancing": (470, 1150, 640, 700),
}


@dataclass(frozen=True)
class Tumour:
    """Centre and outer radius in mm, the share of that radius that the core and the necrosis have, and whether its rim enhances."""

    centre_mm: tuple[float, float, float]
    radius_mm: float
    core: float = 0.66
    necrosis: float = 0.45
    enhances: bool = True


def draw_tumour(seed: int, patient: int, visit: int = 0, *, enhances: bool = True) -> Tumour:
    """The tumour of a patient, which grows by a sixth from visit to visit."""
    rng = generator(seed, "tumour", patient)
    x, y, z = rng.uniform(-0.4, 0.4, 3) * np.array(RADII_MM)
    return Tumour((float(x), float(y), float(z)), float(rng.uniform(26, 34)) * (1 + visit / 6), enhances=enhances)


def paint_brain(seed: int, patient: int, visit: int, *, tumour: Tumour, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The four contrasts (4, X, Y, Z) as int16, 0 outside of the brain, and the label map (X, Y, Z) as uint8.

    Labels: 1 necrotic core, 2 oedema, 3 enhancing rim; a tumour that does not enhance has a core of 1 alone.
    """
    rng = generator(seed, "brain", patient)
    axes = [np.arange(n, dtype=np.float64) for n in grid.shape_vox]
    at_3XYZ = np.moveaxis(grid.world(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)).reshape(*grid.shape_vox, 3), -1, 0)
    radii = np.array(RADII_MM) * rng.uniform(0.92, 1.06, 3)
    grain = _grain(rng, grid, 9.0)
    depth = _level(at_3XYZ, (0, 0, 0), radii)
    brain = depth + 0.02 * grain < 1
    tissue = np.where(depth + 0.07 * grain > 0.84, list(TISSUES).index("grey"), list(TISSUES).index("white"))
    for side in (-1, 1):
        ventricle = _level(at_3XYZ, (side * 11, 0, 0), (8, 30, 13))
        tissue[ventricle < 1] = list(TISSUES).index("fluid")
    labels = _tumour_map(tumour, at_3XYZ, _grain(rng, grid, 16.0), brain)
    for value, name in ((OEDEMA, "oedema"), (NECROSIS, "necrosis"), (ENHANCING, "enhancing")):
        tissue[labels == value] = list(TISSUES).index(name)
    noise = generator(seed, "brain noise", patient, visit)
    return _shown(tissue, brain, noise), labels


def _level(at_3XYZ: np.ndarray, centre_mm: ArrayLike, radii_mm: ArrayLike) -> np.ndarray:
    # Distance from the centre of an ellipsoid as a share of its radius: below 1 inside.
    scaled = (at_3XYZ - np.reshape(centre_mm, (3, 1, 1, 1))) / np.reshape(radii_mm, (3, 1, 1, 1))
    return np.sqrt(np.square(scaled).sum(0))


def _grain(rng: np.random.Generator, grid: Grid, size_mm: float) -> np.ndarray:
    # Smooth noise of deviation 1; drawn on 32^3 points so that it is the same field on any grid that covers the head.
    field = ndimage.gaussian_filter(rng.standard_normal((32, 32, 32)), size_mm / 6)
    zoomed = np.asarray(ndimage.zoom(field, [n / 32 for n in grid.shape_vox], order=1))
    return zoomed / zoomed.std()


def _tumour_map(tumour: Tumour, at_3XYZ: np.ndarray, grain_XYZ: np.ndarray, brain: np.ndarray) -> np.ndarray:
    far = _level(at_3XYZ, tumour.centre_mm, 3 * (tumour.radius_mm,))
    ragged = far + 0.08 * grain_XYZ
    labels = np.zeros(brain.shape, np.uint8)
    labels[ragged < 1] = OEDEMA
    labels[ragged < tumour.core] = ENHANCING if tumour.enhances else NECROSIS
    labels[ragged < tumour.necrosis] = NECROSIS
    labels[~brain] = 0
    return labels


def _shown(tissue: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shading = 1 + 0.1 * np.linspace(-1, 1, brain.shape[0])[:, None, None]
    images = []
    for contrast in range(len(CONTRASTS)):
        levels = np.array([TISSUES[name][contrast] for name in TISSUES], dtype=np.float64)
        image = ndimage.gaussian_filter(levels[tissue], 0.4) * shading + rng.normal(0, 30, brain.shape)
        images.append(np.where(brain, np.clip(np.rint(image), 1, 4000), 0).astype(np.int16))
    return np.stack(images)
