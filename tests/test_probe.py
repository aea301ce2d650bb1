"""The position probe: ridge regression against its definition, whole scans left out, positions by hand, few scans."""

import numpy as np
import pytest
import torch

from volssl import probe
from volssl.patches import Patches
from volssl.store import Entry


@pytest.mark.parametrize("shape", [(30, 5), (6, 20)])
def test_ridge_minimises_what_it_says(shape):
    rng = np.random.default_rng(0)
    x, y, penalty = rng.normal(size=shape), rng.normal(size=(shape[0], 2)), 0.3
    weights, shift = probe.ridge(x, y, penalty)
    # The same by torch's autograd: the gradient of the objective is zero there.
    w, b = torch.tensor(weights, requires_grad=True), torch.tensor(shift, requires_grad=True)
    ((torch.tensor(x) @ w + b - torch.tensor(y)).square().sum(1).mean() + penalty * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-10 and b.grad.abs().max() < 1e-10


def test_r2_by_hand():
    true = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 7.0]])
    found = np.array([[0.0, 1.0, 6.0], [1.0, 1.0, 6.0]])
    r2 = probe.r2(true, found)
    assert r2[0] == pytest.approx(0.5) and np.isnan(r2[1]) and r2[2] == pytest.approx(0.0)


def entry(scan, start, stop):
    eye = tuple(np.eye(4).ravel().tolist())
    return Entry(scan, "P", "CT", "train", 1, (40, 40, 40), start, stop, eye, (40, 40, 40), eye, (1.0, 0.0), "c")


def test_positions_are_shares_of_the_body_by_hand():
    rows = {"a": entry("a", (10, 0, 0), (30, 40, 20)), "b": entry("b", (0, 0, 0), (40, 40, 40))}
    patches = Patches(torch.zeros(2, 1, 8, 8, 4, dtype=torch.int16), ["a", "b"], torch.tensor([[16, 16, 18], [0, 36, -2]]))
    np.testing.assert_allclose(probe.positions(patches, rows), [[0.5, 0.5, 1.0], [0.1, 1.0, 0.0]])


def samples(scans, each=20, noise=0.01, seed=0, offset=0):
    rng = np.random.default_rng(seed)
    position = rng.random((scans * each, 3))
    features = np.concatenate([position @ rng.normal(size=(3, 6)), rng.normal(size=(scans * each, 4))], 1)
    return probe.Sample(features + noise * rng.normal(size=features.shape), position, offset + np.repeat(np.arange(scans), each))


def test_features_that_hold_the_position_are_found_and_noise_is_not():
    whole = samples(6)
    told = probe.position_r2(whole.part(whole.scan_N < 4), whole.part(whole.scan_N >= 4))
    assert set(told) == {"probe_r2_x", "probe_r2_y", "probe_r2_z", "probe_r2_mean"}
    assert min(told.values()) > 0.98
    assert told["probe_r2_mean"] == pytest.approx(np.mean([told[f"probe_r2_{axis}"] for axis in "xyz"]))
    assert probe.position_r2(whole, None)["probe_r2_mean"] > 0.98
    noise = probe.Sample(np.random.default_rng(1).normal(size=(120, 10)), whole.position_N3, whole.scan_N)
    assert probe.position_r2(noise, None)["probe_r2_mean"] < 0.1


def test_patches_of_the_scan_asked_about_are_never_fitted():
    # Features that only name the scan, positions that only depend on it: fitted on the scan itself R2 would be 1.
    scan = np.repeat(np.arange(5), 10)
    position = np.random.default_rng(0).random((5, 3))[scan]
    named = probe.Sample(np.eye(5)[scan], position, scan)
    assert probe.position_r2(named, None)["probe_r2_mean"] < 0.05
    assert all(len(np.unique(scan[out])) == 1 for out in probe._folds(scan))
    assert np.sum(probe._folds(scan), axis=0).tolist() == [1] * 50


def test_few_scans():
    one, other = samples(1), samples(1, seed=0, offset=1)
    assert probe.position_r2(one, None) == {}
    assert probe.position_r2(one, other)["probe_r2_mean"] > 0.5, "one scan to learn from, another to be asked about"
    flat = probe.Sample(other.features_ND, np.where([True, False, False], 0.5, other.position_N3), other.scan_N)
    told = probe.position_r2(one, flat)
    assert np.isnan(told["probe_r2_x"]) and told["probe_r2_mean"] == pytest.approx((told["probe_r2_y"] + told["probe_r2_z"]) / 2)


def test_a_feature_constant_on_the_fitted_scans_does_not_break_the_answer():
    fitted, asked = samples(3), samples(2, seed=1, offset=3)
    fitted.features_ND[:, -1], asked.features_ND[:, -1] = 1.0, 1e6
    assert np.isfinite(list(probe.position_r2(fitted, asked).values())).all()
