"""Formulas against facts worked out by hand; gradients are tested with the methods that use them."""

import pytest
import torch

from volssl.losses import siamese_distance


def test_siamese_distance_by_hand():
    p, w = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    q, z = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    # cos(p, w) = (0.7071, 1), cos(q, z) = (1, -1)
    expected = -((2**-0.5 + 1) / 2 + 0.0) / 2
    assert float(siamese_distance(p, z, q, w)) == pytest.approx(expected, abs=1e-6)
    assert float(siamese_distance(z, z, w, w)) >= -1
