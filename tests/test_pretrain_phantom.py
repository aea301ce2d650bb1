"""300 steps on phantoms: what is restored, what does not collapse, what the features know; and what is lost when a part is switched off."""

import math

import numpy as np
import pytest

from volssl import pretrain
from volssl.health import RANK_SHARE_LOW, STD_LOW
from volssl.journal import read_metrics
from volssl.phantom import Series, scan
from volssl.store import About, Entry, Store
from volssl.volume import Grid

SPACING = 5.0
EXTENT_MM = (350, 260, 320)
# Narrow and small, with milder corruption and a lighter comparison than the reference's, so that 300 steps of eight show something.
SETTINGS = [
    "net={name: folded, width: 8, depth: 2, norm: batch}",
    "method.crops={global_sizes_vox: [[20, 20, 20], [24, 24, 24], [16, 16, 16]], local_sizes_vox: [[8, 8, 8], [12, 12, 12]], locals: 2}",
    "method.out_vox=[[16, 16, 16], [8, 8, 8]]",
    "method.corruption={noise: {sd_max: 0.1}, blur: {sigma_max: 1.0}, swap: {patch_vox: [4, 4, 4], swaps: 10}}",
    "patches={box_vox: [32, 32, 32], batch_size: 8, workers: 0}",
    "training={steps: 300, lr: 0.003, optimizer: adamw, warmup: 0.05, precision: fp32}",
    "saving={log_every: 100, pictures_every: 300, validate_every: 300, validation_batches: 1, checkpoint_every: 300, "
    "health_every: 300, health_patches: 64, probe_every: 300, probe_patches: 128}",
]
WITH = ["method.comparison.globals=0.1", "method.comparison.locals=0.1"]
WITHOUT_COMPARISON = ["method.comparison.globals=0", "method.comparison.locals=0"]
# Without restoration there is nothing to measure after any number of steps; a few show that such a run goes through.
WITHOUT_RESTORATION = [*WITH, "method.restoration.views=none", "training.steps=20"]


def make_store(path, scans=10, held_out=2):
    made = Store.create(path, About((SPACING,) * 3, "CT", (-1000.0, 1000.0), (-1024.0, 3071.0), recipe={}))
    shape = tuple(int(n / SPACING) for n in EXTENT_MM)
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = (0, -24, 7) - np.array(EXTENT_MM) / 2 + SPACING / 2
    world = tuple(affine.ravel().tolist())
    entries = []
    for i in range(scans):
        hu, _ = scan(0, i, 0, Series(Grid(shape, affine), 15.0, "torso"))
        split = "val" if i < held_out else "train"
        entries.append(Entry(f"S{i}", f"P{i}", "CT", split, 1, shape, (0, 0, 0), shape, world, shape, world, (1.0, 0.0), "c"))
        made.write(hu[None], entries[-1])
    made.finish(entries)
    return path


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Health of a run by its settings: at step 0 and at the end."""
    folder = tmp_path_factory.mktemp("phantoms")
    store = make_store(folder / "store")
    done = {}

    def of(name, settings):
        if name not in done:
            pretrain.run("pcrlv2", store=store, out=folder / name, overrides=[*SETTINGS, *settings])
            rows = [row for row in read_metrics(folder / name) if any(key.startswith("health/") for key in row)]
            done[name] = [
                {k.removeprefix("health/"): v for row in rows if row["step"] == step for k, v in row.items() if k.startswith("health/")}
                for step in (0, rows[-1]["step"])
            ]
        return done[name]

    return of


def restores(last):
    """By how many dB the restoration beats the mean of all targets; without restoration there is none."""
    return last.get("psnr_over_mean_db", -math.inf)


@pytest.mark.slow
def test_it_learns(figures):
    first, last = figures("with", WITH)
    assert restores(last) > 2.0
    for scale in ("scale0", "scale1"):
        assert last[f"std_{scale}"] > 5 * STD_LOW and last[f"rank_share_{scale}"] > 1.5 * RANK_SHARE_LOW
    assert last["dead_channels"] < 0.1
    assert last["probe_r2_mean"] > first["probe_r2_mean"] + 0.05, "the trained encoder knows better where it is than the untrained one"


@pytest.mark.slow
def test_without_comparison_the_views_of_a_patch_are_less_alike(figures):
    with_it, without = figures("with", WITH)[1], figures("without comparison", WITHOUT_COMPARISON)[1]

    def mean(last):
        return (last["alignment_scale0"] + last["alignment_scale1"]) / 2

    assert mean(with_it) > mean(without) + 0.05


@pytest.mark.slow
def test_without_restoration_nothing_is_restored(figures):
    assert restores(figures("with", WITH)[1]) > restores(figures("without restoration", WITHOUT_RESTORATION)[1]) + 2.0
