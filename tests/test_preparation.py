"""Intensities as the network sees them, by hand."""

import numpy as np
import pytest

from volssl.preparation import Preparation
from volssl.volume import Grid, Volume


def test_normalisations_by_hand():
    array = np.array([-2000, -1000, 0, 1000, 3000], dtype=np.int16).reshape(1, 5, 1, 1)
    volume = Volume(array, Grid((5, 1, 1), np.eye(4)))
    np.testing.assert_allclose(Preparation().image(volume).array_CXYZ.ravel(), [0, 0, 0.5, 1, 1])
    scaled = Preparation(normalisation="percentile").image(volume).array_CXYZ
    assert scaled.min() == 0
    assert scaled.max() == 1
    normal = Preparation(normalisation="zscore").image(volume).array_CXYZ
    assert normal.mean() == pytest.approx(0, abs=1e-6)
    assert normal.std() == pytest.approx(1, abs=1e-5)
    masked = np.array([0, 0, 0, 4, 8], dtype=np.float32).reshape(1, 5, 1, 1)
    inside = Preparation(normalisation="zscore", nonzero=True).image(Volume(masked, volume.grid)).array_CXYZ.ravel()
    assert inside[3] == pytest.approx(-1, abs=1e-3)
    assert inside[4] == pytest.approx(1, abs=1e-3)


def test_a_constant_image_stays_finite():
    volume = Volume(np.full((1, 4, 4, 4), 3.0), Grid((4, 4, 4), np.eye(4)))
    for normalisation in ("window", "percentile", "zscore"):
        assert np.isfinite(Preparation(normalisation=normalisation).image(volume).array_CXYZ).all()
