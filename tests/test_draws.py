"""Draws depend on (seed, stream, step, sample) and on nothing else."""

import pytest
import torch

from volssl.draws import Draws, generator


def test_a_sample_draws_the_same_in_any_batch():
    whole = Draws(3, 7, 0, 6).fork("x")
    for first in range(6):
        alone = Draws(3, 7, first, 1).fork("x")
        for draw in (lambda d: d.uniform(0, 1, 3), lambda d: d.normal(4), lambda d: d.integers(0, 99, 2), lambda d: d.bernoulli(0.5, 8)):
            assert torch.equal(draw(whole)[first], draw(alone)[0])
    x = torch.zeros(6, 1, 3, 3, 3)
    assert torch.equal(whole.noise_like(x)[4], Draws(3, 7, 4, 1).fork("x").noise_like(x[:1])[0])


@pytest.mark.parametrize("other", [Draws(4, 7, 0, 2, stream="/x"), Draws(3, 8, 0, 2, stream="/x"), Draws(3, 7, 0, 2, stream="/y")])
def test_every_coordinate_changes_the_numbers(other):
    assert not torch.equal(Draws(3, 7, 0, 2).fork("x").uniform(0, 1, 8), other.uniform(0, 1, 8))


def test_distributions():
    draws = Draws(0, 0, 0, 20_000)
    uniform = draws.fork("u").uniform(-1, 3, 2)
    assert uniform.min() >= -1 and uniform.max() < 3
    torch.testing.assert_close(uniform.mean(0), torch.tensor([1.0, 1.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(uniform.std(0), torch.full((2,), 4 / 12**0.5), atol=0.03, rtol=0)
    normal = draws.fork("n").normal(2)
    torch.testing.assert_close(normal.T.cov(), torch.eye(2), atol=0.04, rtol=0)
    counts = draws.fork("i").integers(2, 7).bincount(minlength=7)
    assert counts[:2].sum() == 0 and (counts[2:] - 4000).abs().max() < 300
    assert abs(float(draws.fork("b").bernoulli(0.3).float().mean()) - 0.3) < 0.02


def test_host_generator_is_a_function_of_its_arguments():
    assert generator(1, "a", 2, 3).random() == generator(1, "a", 2, 3).random()
    assert generator(1, "a", 23).random() != generator(1, "a", 2, 3).random()
