import numpy as np
import pytest

from volssl.normalise import normalise


def test_a_window_maps_to_zero_and_one_and_clips():
    x = np.array([[[-2000.0, -1000.0, 0.0, 500.0, 1000.0, 3000.0]]], dtype=np.float32)
    normalise(x, "window", window=(-1000, 1000), nonzero=False)
    assert x.ravel().tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_scores_have_mean_0_and_deviation_1_within_the_quantiles():
    x = np.random.default_rng(0).normal(50, 9, (20, 20, 20)).astype(np.float32)
    normalise(x, "zscore", window=(0, 1), nonzero=False)
    assert x.mean() == pytest.approx(0, abs=1e-5) and x.std() == pytest.approx(1, abs=1e-5)
    assert x.max() < 3  # the 99.5 % quantile of a normal distribution is at 2.58


def test_voxels_at_zero_stay_out_and_stay_zero():
    x = np.zeros((4, 4, 4), dtype=np.float32)
    x[:2] = np.linspace(100, 200, 32).reshape(2, 4, 4)
    normalise(x, "percentile", window=(0, 1), nonzero=True)
    assert not x[2:].any() and x[:2].min() == 0 and x[:2].max() == 1 and x[:2].mean() == pytest.approx(0.5, abs=0.01)
    empty = np.zeros((2, 2, 2), dtype=np.float32)
    normalise(empty, "zscore", window=(0, 1), nonzero=True)
    assert not empty.any()
