"""Which scans are for training and which for validation: by patient, and never a scan on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def held_out(names: Iterable[str], joins: Iterable[tuple[int, int]], *, seed: int, share: float) -> np.ndarray:
    """Which patients are for validation, N bools: about `share` of the groups of those joined, and never all.

    Args: names: the pseudonyms of the N patients in ascending order. joins: pairs of places in that order, of patients who stay together.
    Groups are put in an order that depends on `seed` and their least pseudonyms alone. Memory: some 50 bytes a patient.
    """
    drawn = bytearray()
    for name in names:
        drawn += _draw(seed, name)
    draws = np.frombuffer(drawn, dtype=">u8").reshape(-1, 2)
    leader = np.arange(len(draws))

    def root(patient: int) -> int:
        while leader[patient] != patient:
            leader[patient] = patient = int(leader[leader[patient]])
        return patient

    for one, two in joins:
        low, high = sorted((root(one), root(two)))
        leader[high] = low
    while not np.array_equal(leader, nearer := leader[leader]):
        leader = nearer
    groups = np.flatnonzero(leader == np.arange(len(leader)))
    order = np.lexsort((draws[groups, 1], draws[groups, 0]))
    chosen = np.zeros(len(leader), dtype=bool)
    chosen[groups[order[: max(0, min(int(share * len(groups) + 0.5), len(groups) - 1))]]] = True
    return chosen[leader]


def _draw(seed: int, name: str) -> bytes:
    # The first 128 bits put pseudonyms of 64 in as good an order as all.
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16]
