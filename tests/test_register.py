"""Rows come back in order, copies with one content hash, patients with one side; and none of it stays in memory."""

import sqlite3
import tracemalloc
from contextlib import closing

import numpy as np
import pytest

from volssl.fingerprint import Print
from volssl.register import Register
from volssl.rows import Row

RNG = np.random.default_rng(0)
MEANS = RNG.standard_normal((200, 64)).astype(np.float32)


def row(scan, patient, content, verdict="accept"):
    return Row(scan, patient, "T", "CT", "", (9, 9, 9), (1.0, 1.0, 1.0), "RAS", 9, verdict, ("uneven_gap",), content, "", ("unshear",))


def shown(means, *, shape=(9, 9, 9), axis=2):
    return [Print(shape, axis, means)]


def divided(rows, *, prints=None, places=None, siblings=8, share=0.5, seed=0):
    """scan_id -> row, and the summary."""
    with closing(sqlite3.connect(":memory:")) as base:
        register = Register(base)
        for number, one in enumerate(rows):
            register.add(one, prints=(prints or {}).get(number, ()), place=(places or {}).get(number, ""))
        register.divide(tolerance=1e-3, siblings=siblings, seed=seed, share=share)
        return {one.scan_id: one for one in register.rows()}, register.summary()


@pytest.mark.parametrize("seed", range(8))
def test_patients_with_a_common_scan_stay_together_whatever_joins_them(seed):
    rows = [row(f"S{n}", f"P{n // 2}", f"C{n:02}") for n in range(20)]
    rows += [row("S20", "P0", "same"), row("S21", "P7", "same", "repair")]
    prints = {2: shown(MEANS[0]), 18: shown(MEANS[0] + 9e-4), 5: shown(MEANS[0] + 2e-3), 6: shown(MEANS[0], axis=1)}
    done, _ = divided(rows, prints=prints, places={3: "a", 9: "a", 12: "b", 15: "b", 17: "b"}, siblings=2, seed=seed)
    assert done["S20"].split == done["S21"].split == done["S0"].split == done["S14"].split
    assert done["S2"].split == done["S18"].split == done["S9"].split == done["S8"].split == done["S3"].split
    assert {one.split for one in done.values()} == {"train", "val"}


def test_copies_get_the_least_hash_of_all_that_hang_together():
    rows = [row(f"S{n}", f"P{n}", f"C{9 - n}") for n in range(8)] + [row("S8", "P8", "C7", "reject")]
    prints = {0: shown(MEANS[0]), 1: shown(MEANS[0] + 8e-4), 2: shown(MEANS[0] + 1.6e-3), 3: shown(MEANS[1]), 4: shown(MEANS[1])}
    prints |= {6: shown(MEANS[1], shape=(9, 9, 8)), 7: [*shown(MEANS[1]), *shown(MEANS[2], axis=0)], 5: shown(MEANS[2], axis=0)}
    done, summary = divided(rows, prints=prints)
    assert [done[f"S{n}"].content_hash for n in range(9)] == ["C7", "C7", "C7", "C2", "C2", "C2", "C3", "C2", "C7"]
    assert summary["duplicates"] == 5
    assert len({done[name].split for name in ("S3", "S4", "S5", "S7")}) == 1


def test_rejected_rows_have_no_side_and_join_nobody():
    rows = [row("S0", "P0", "C"), row("S1", "P1", "C", "reject"), row("S2", "P1", "D"), row("S3", "P2", "D", "reject")]
    prints, places = {1: shown(MEANS[0]), 0: shown(MEANS[0])}, {0: "a", 3: "a", 1: "b", 2: "b"}
    for seed in range(8):
        done, summary = divided(rows, prints=prints, places=places, seed=seed)
        assert done["S1"].split == done["S3"].split == ""
        assert {done["S0"].split, done["S2"].split} == {"train", "val"}
    assert summary["accepted_splits"] == {"train": 1, "val": 1}


def test_rows_come_in_the_order_of_their_names_and_are_counted():
    rows = [row(f"S{n}", f"P{n % 3}", f"C{n}", ["accept", "repair", "reject"][n % 3]) for n in (4, 1, 3, 10, 0, 2)]
    done, summary = divided(rows, share=0.0)
    assert list(done) == sorted(one.scan_id for one in rows)
    assert [done[one.scan_id].repairs for one in rows] == [("unshear",)] * 6
    assert summary == {
        "series": 6,
        "patients": 3,
        "verdicts": {"accept": 2, "reject": 1, "repair": 3},
        "reasons": {"uneven_gap": 6},
        "repairs": {"unshear": 6},
        "accepted_modalities": {"CT": 5},
        "accepted_splits": {"train": 5},
        "duplicates": 0,
    }


def test_memory_holds_numbers_alone(tmp_path):
    """Python's memory, prints of one shape as the worst case. A row takes a kilobyte, a print another half."""
    peaks = {}
    for count in (2500, 7500):  # Python keeps 2000 tuples of each size anyway
        with closing(sqlite3.connect(tmp_path / f"{count}")) as base:
            tracemalloc.start()
            register = Register(base)
            for number in range(count):
                name = f"{number * 7919 % count:016x}"
                means = np.roll(MEANS[number % 200], number // 200).astype(np.float32)
                register.add(row("S" + name, "P" + name, "C" + name), prints=shown(means), place=f"{number // 3}")
            register.divide(tolerance=1e-3, siblings=8, seed=0, share=0.1)
            assert sum(1 for _ in register.rows()) == register.summary()["series"] == count
            peaks[count] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peaks[7500] - peaks[2500] < 100 * 5000, peaks
