import numpy as np
import pytest

from volssl.intervals import mean_interval, pooled_intervals, ratio


def test_the_mean_and_its_interval():
    found = mean_interval([1.0, 0.5])
    assert found == {"mean": 0.75, "sd": pytest.approx(np.std([1, 0.5], ddof=1)), "ci95": [0.5, 1.0], "n": 2}
    assert mean_interval([0.3])["sd"] == 0.0


def test_a_pooled_mean_has_the_interval_of_the_mean():
    values = np.random.default_rng(0).random(15)
    pooled = pooled_intervals(lambda weights: {"mean": ratio(weights @ values, weights.sum())}, len(values))["mean"]
    plain = mean_interval(list(values))
    assert pooled["mean"] == pytest.approx(plain["mean"]) and pooled["ci95"] == pytest.approx(plain["ci95"])
    assert pooled["sd"] is None and pooled["n"] == 15


def test_what_is_undefined_is_left_out():
    here = np.array([0.0, 2.0, 0.0])
    found = pooled_intervals(lambda w: {"never": float("nan"), "at times": ratio(w @ here, w @ (here > 0))}, 3)
    assert set(found) == {"at times"} and found["at times"]["ci95"] == [2.0, 2.0]
    assert pooled_intervals(lambda w: {"any": 1.0}, 0) == {}
