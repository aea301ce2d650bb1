"""Schedules: values worked out by hand, and the paper's formula at its own constant."""

import math

import pytest

from volssl.schedule import cosine, rate, warmup_cosine


def test_cosine_is_the_papers_at_any_length():
    for epoch in (0, 60, 120, 240):
        assert cosine(epoch / 240) == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch / 240)))
    for outside in (-0.01, 1.01):
        with pytest.raises(ValueError, match="progress must lie in"):
            cosine(outside)


def test_warmup_then_decay():
    assert warmup_cosine(0.05, warmup=0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, warmup=0.1) == pytest.approx(1.0)
    assert warmup_cosine(0.55, warmup=0.1) == pytest.approx(0.5)
    assert warmup_cosine(1.0, warmup=0.1, floor=0.02) == pytest.approx(0.02)
    assert warmup_cosine(0.0, warmup=0.0) == 1.0


def test_poly_and_sawtooth_by_hand():
    assert rate("poly", 0.05, warmup=0.1) == pytest.approx(0.5)
    assert rate("poly", 0.55, warmup=0.1) == pytest.approx(0.5**0.9)
    assert rate("poly", 1.0, warmup=1.0) == 0
    assert [rate("sawtooth", p, warmup=0.2) for p in (0.1, 0.2, 0.3, 0.4, 0.7, 1.0)] == pytest.approx([0.5, 0.0, 0.5, 1.0, 0.5**0.9, 0.0])
    assert rate("cosine", 0.3, warmup=0.1) == warmup_cosine(0.3, warmup=0.1)
    with pytest.raises(ValueError, match="progress"):
        rate("poly", 1.5, warmup=0.1)
