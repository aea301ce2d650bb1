"""Health: every figure against its formula written again, facts by hand, warnings, and looks that change nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_pretrain import make_store, same, state, train
from torch import nn

from volssl import health
from volssl.augment.crops import PairCrops
from volssl.draws import Draws
from volssl.journal import Journal, read_metrics
from volssl.methods.method import Glance, gathering_statistics, unchanged
from volssl.methods.pcrlv2 import Comparison, PCRLv2, Restoration
from volssl.nets.unet import UNet


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spread_is_one_for_isotropic_embeddings_and_zero_for_a_point():
    x = random(4000, 16)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    assert health.spread(x) == pytest.approx(np.mean(unit.std(0)) * 4, rel=1e-5)
    assert health.spread(x) == pytest.approx(1.0, abs=0.02)
    # The length of an embedding does not count, only its direction.
    assert health.spread(random(50, 1).abs() * torch.ones(1, 16)) == pytest.approx(0.0, abs=1e-6)


def test_effective_rank_is_rankme():
    x = random(40, 12)
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = singular / np.abs(singular).sum() + 1e-7
    assert health.effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert health.effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-4), "seven equal singular values"
    assert health.effective_rank(random(30, 1) @ random(1, 9)) == pytest.approx(1, abs=1e-3), "one direction"
    assert health.effective_rank(torch.zeros(5, 4)) < 1.01


def test_alignment_of_equal_opposite_and_unrelated_views():
    x = random(2000, 32)
    assert health.alignment(x, 3 * x) == pytest.approx(1.0) and health.alignment(x, -x) == pytest.approx(-1.0)
    assert abs(health.alignment(x, random(2000, 32, seed=1))) < 0.02
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert health.alignment(a, b) == pytest.approx(2**-0.5)


def glance(pooled=None, deepest=None, restored=None, target=None):
    pooled = pooled if pooled is not None else random(4, 6)
    return Glance({"scale0": (pooled, pooled)}, True, deepest if deepest is not None else random(4, 5, 2, 2, 2), restored, target)


def test_dead_channels_are_those_constant_over_all_batches():
    first, second = torch.zeros(2, 4, 2, 2, 2), torch.zeros(2, 4, 2, 2, 2)
    first[:, 1] = second[:, 1] = 3.0  # constant, though not zero
    first[0, 2, 1, 1, 1] = 0.5  # fires once
    second[:, 3] = 1.0  # constant within each batch, but not over both
    together = health.gathered([health.evidence_of(glance(deepest=x)) for x in (first, second)])
    assert health.measure(together)["dead_channels"] == 0.5


def test_restoration_is_compared_with_the_mean_of_all_targets():
    target = torch.rand(6, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    restored = target + 0.1
    parts = [health.evidence_of(glance(restored=r, target=t)) for r, t in zip(restored.split(2), target.split(2), strict=True)]
    numbers = health.measure(health.gathered(parts))
    assert numbers["psnr_db"] == pytest.approx(20.0, abs=1e-3), "an error of 0.1 is 20 dB"
    trivial = -10 * np.log10(((target.mean() - target) ** 2).mean().item())
    assert numbers["psnr_over_mean_db"] == pytest.approx(20.0 - trivial, abs=1e-3)
    constant = [health.evidence_of(glance(restored=torch.full_like(target, float(target.mean())), target=target))]
    assert health.measure(constant[0])["psnr_over_mean_db"] == pytest.approx(0.0, abs=1e-4)
    assert "psnr_db" not in health.measure(health.evidence_of(glance())), "nothing restored, nothing reported"


def test_a_collapsed_representation_is_told_from_a_sound_one():
    sound = health.measure(health.evidence_of(glance(random(64, 32).relu())))
    assert health.complaints(sound, progress=1.0, compared=True) == {}
    point = torch.ones(64, 32) + 1e-4 * random(64, 32)
    assert "std" in health.complaints(health.measure(health.evidence_of(glance(point))), progress=1.0, compared=True)
    line = 1 + (random(64, 1) @ random(1, 32, seed=1)).relu()
    told = health.complaints(health.measure(health.evidence_of(glance(line))), progress=1.0, compared=True)
    assert set(told) == {"rank_share"} and "raise patches.batch_size" in told["rank_share"]


def test_advice_waits_for_training_and_asks_only_for_what_is_trained():
    numbers = {"alignment_scale0": 0.0, "psnr_over_mean_db": -1.0, "dead_channels": 0.9}
    assert set(health.complaints(numbers, progress=0.05, compared=True)) == {"dead_channels"}
    assert set(health.complaints(numbers, progress=0.5, compared=True)) == {"alignment", "psnr_over_mean_db", "dead_channels"}
    assert "alignment" not in health.complaints(numbers, progress=0.5, compared=False)


def test_a_warning_is_told_once_also_over_a_resume(tmp_path, capsys):
    with Journal(tmp_path) as journal:
        journal.warn("rank", "too low", step=3, progress=0.3)
        journal.warn("rank", "still too low", step=4, progress=0.4)
    with Journal(tmp_path, steps_done=5) as journal:
        journal.warn("rank", "and again", step=6, progress=0.6)
        journal.warn("std", "also", step=6, progress=0.6)
    assert read_metrics(tmp_path) == [
        {"step": 3, "progress": 0.3, "warning/rank": "too low"},
        {"step": 6, "progress": 0.6, "warning/std": "also"},
    ]
    assert capsys.readouterr().err == "step 3: too low\nstep 6: also\n"
    with Journal(tmp_path, steps_done=2) as journal:  # a resume from before the warning tells it again
        journal.warn("rank", "too low", step=3, progress=0.3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]


# ------------------------------------------------------------------------------------------------ what the method shows

CROPS = PairCrops(global_sizes_vox=((16, 16, 16),), locals=1, local_sizes_vox=((8, 8, 8),))


def method(**settings):
    torch.manual_seed(0)
    return PCRLv2(UNet(width=4, depth=3), crops=CROPS, out_vox=((16, 16, 16), (8, 8, 8)), **settings).train()


def views_of(made, batch=4):
    x = torch.rand(batch, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1))
    return made.views(x, Draws(0, 0, 0, batch), spacing_mm=(1.0, 1.0, 1.0))


def test_glance_shows_what_the_losses_see():
    made = method()
    views = views_of(made)
    with torch.no_grad():
        shown = made.glance(views)
        maps = [made.net(view.seen) for view in (views.one, views.other)]
    assert set(shown.pooled) == {"scale0", "scale1"} and shown.compared and shown.target is views.one.target
    for scale in (0, 1):
        for view in (0, 1):
            torch.testing.assert_close(shown.pooled[f"scale{scale}"][view], maps[view][scale].mean((2, 3, 4)))
    torch.testing.assert_close(shown.restored, torch.sigmoid(made.final_head(maps[0][-1])))
    torch.testing.assert_close(shown.deepest_BCXYZ, made.encoder(views.one.seen)[-1])
    none = method(restoration=Restoration(views="none"))
    assert none.glance(views_of(none)).restored is None
    alone = method(comparison=Comparison(globals=0, locals=0))
    assert not alone.glance(views_of(alone)).compared


def test_statistics_are_the_mean_over_the_batches_and_leave_no_trace():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm3d(2), nn.Dropout(0.5))
    norm(random(3, 2, 2, 2, 2))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    batches = [random(3, 2, 4, 4, 4, seed=s) + s for s in (1, 2)]
    random_state = torch.get_rng_state()
    with unchanged(norm):
        with gathering_statistics(norm) as needed:
            for batch in batches:
                norm(batch)
        assert needed and not norm.training
        means = torch.stack([batch.mean((0, 2, 3, 4)) for batch in batches]).mean(0)
        torch.testing.assert_close(norm[0].running_mean, means)
        assert not torch.equal(torch.get_rng_state(), random_state), "dropout drew from it"
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert norm.training and norm[1].training and norm[0].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), random_state)


# ------------------------------------------------------------------------------------------------ in a run


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_run_with_looks_equals_one_without_to_the_bit(tmp_path, norm):
    store = make_store(tmp_path / "store")
    settings = ["training.steps=4", f"net.norm={norm}", "saving.log_every=4", "saving.validate_every=4"]
    train(store, tmp_path / "with", *settings, "saving.health_every=1", "saving.probe_every=1")
    train(store, tmp_path / "without", *settings, "saving.health_every=0", "saving.probe_every=0")
    one, other = state(tmp_path / "with"), state(tmp_path / "without")
    assert same(one["method"], other["method"]) and same(one["optimizers"], other["optimizers"])
    rows = read_metrics(tmp_path / "with")
    assert [row["step"] for row in rows if "health/std_scale0" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "health/probe_r2_mean" in row] == [0, 1, 2, 3, 4]
    wanted = {"std_scale0", "rank_scale1", "alignment_scale0", "dead_channels", "psnr_db", "psnr_over_mean_db"}
    assert {f"health/{name}" for name in wanted} <= set().union(*rows)
    assert not any(key.startswith("health/") for row in read_metrics(tmp_path / "without") for key in row)


def test_a_store_without_held_out_scans_is_measured_on_training_scans(tmp_path):
    store = make_store(tmp_path / "store")
    text = (store / "manifest.csv").read_text()
    (store / "manifest.csv").write_text(text.replace(",val,", ",train,"))
    train(store, tmp_path / "run", "training.steps=2", "saving.health_every=2", "saving.probe_every=2")
    rows = read_metrics(tmp_path / "run")
    assert any("health/rank_scale0" in row for row in rows) and any("health/probe_r2_mean" in row for row in rows)


def test_one_scan_gives_no_probe_and_says_so(tmp_path, capsys):
    store = make_store(tmp_path / "store", scans=2)
    lines = (store / "manifest.csv").read_text().splitlines()
    (store / "manifest.csv").write_text("\n".join([lines[0], *(line for line in lines if ",train," in line)]) + "\n")
    train(store, tmp_path / "run", "training.steps=2", "saving.probe_every=1")
    rows = read_metrics(tmp_path / "run")
    assert not any("health/probe_r2_mean" in row for row in rows)
    assert [row["step"] for row in rows if "warning/probe" in row] == [0]
    assert capsys.readouterr().err.count("needs at least two scans") == 1
    assert json.dumps(rows)  # texts among the numbers are still plain JSON


def test_ranges_name_figures_that_exist():
    numbers = health.measure(health.evidence_of(glance(restored=torch.zeros(1, 1, 2, 2, 2), target=torch.rand(1, 1, 2, 2, 2))))
    for one in health.RANGES:
        assert any(name.startswith(one.kind) for name in numbers), one.kind
        assert dataclasses.is_dataclass(one) and one.advice
