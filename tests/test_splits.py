"""By patient, those who belong together on one side, and training never empty."""

import hashlib

import numpy as np
import pytest

from volssl.splits import held_out

NAMES = [f"P{number:02}" for number in range(20)]


@pytest.mark.parametrize("seed", range(20))
def test_joined_patients_stay_together_whatever_joins_them(seed):
    chosen = held_out(NAMES, [(0, 7), (4, 9), (9, 8), (8, 2), (2, 4)], seed=seed, share=0.5)
    assert chosen[0] == chosen[7]
    assert chosen[4] == chosen[9] == chosen[8] == chosen[2]
    assert 0 < chosen.sum() < 20


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_hashes(seed):
    """An independent writing: groups by sets, whole hashes, a list."""
    groups = [{0, 7}, {2, 4, 8, 9}, *({n} for n in (1, 3, 5, 6, *range(10, 20)))]
    groups.sort(key=lambda group: hashlib.sha256(f"{seed}\0{NAMES[min(group)]}".encode()).hexdigest())
    expected = sorted(set().union(*groups[:5]))  # 16 groups, share 0.3
    chosen = held_out(NAMES, [(9, 8), (0, 7), (4, 2), (8, 4)], seed=seed, share=0.3)
    assert np.flatnonzero(chosen).tolist() == expected


@pytest.mark.parametrize(("count", "left"), [(0, 0), (1, 0), (2, 0), (3, 0), (5, 1), (10, 1), (20, 2)])
def test_the_share_is_rounded_and_training_is_never_eaten(count, left):
    assert held_out(NAMES[:count], [], seed=0, share=0.1).sum() == left
    assert held_out(NAMES[:count], [], seed=0, share=0.99).sum() == max(0, count - 1)
