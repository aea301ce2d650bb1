"""A tiny labelled folder in the Decathlon's layout: noisy boxes with one bright and one dark blob."""

import json
from pathlib import Path

import numpy as np

from volssl.archive import write_nifti
from volssl.volume import Grid

LABELS = {"bright": 1, "dark": 2}


def blobs(seed: int, shape_vox=(20, 18, 16)) -> tuple[np.ndarray, np.ndarray]:
    """HU and label map of one case."""
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*map(np.arange, shape_vox), indexing="ij"), -1)
    label = np.zeros(shape_vox, dtype=np.uint8)
    for value, low, high in ((1, 5, 7), (2, 12, 14)):
        label[np.linalg.norm(at - rng.uniform(low, high, 3), axis=-1) < 3.5] = value
    image = rng.normal(0, 30, shape_vox) + np.choose(label, (0, 400, -400))
    return image.astype(np.int16), label


def write_msd(root: Path, *, cases: int = 4, grid: Grid | None = None, channels: int = 1) -> Path:
    """Write `cases` cases; every channel is the same image."""
    grid = grid or Grid((20, 18, 16), np.diag([1.0, 1.0, 1.0, 1.0]))
    pairs = []
    for number in range(cases):
        image, label = blobs(number)
        name = f"case_{number}.nii.gz"
        write_nifti(root / "imagesTr" / name, image, grid, np.int16)
        write_nifti(root / "labelsTr" / name, label, grid, np.uint8)
        pairs.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    values = {
        "modality": {str(channel): "CT" for channel in range(channels)},
        "labels": {"0": "background"} | {str(value): name for name, value in LABELS.items()},
        "training": pairs,
    }
    (root / "dataset.json").write_text(json.dumps(values))
    return root


def write_recipe(path: Path) -> Path:
    """A recipe for these cases: a narrow net, few steps."""
    path.write_text(
        """
verb: finetune
labels: {bright: 1, dark: 2}
net: {name: unet, width: 4, depth: 2, norm: instance}
preparation: {spacing_mm: null, normalisation: window, window: [-1000, 1000]}
folds: {count: 2, seed: 0}
sampling: {patch_vox: [16, 16, 16], batch_size: 2, foreground: 0.5, margin: 0.1}
optimisation: {steps: 6, lr: 1.0e-2, precision: fp32, average: 0.9}
saving: {log_every: 1, checkpoint_every: 3}
"""
    )
    return path
