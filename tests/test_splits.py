"""By patient, copies together, never a scan on both sides."""

import pytest

from volssl.rows import Row
from volssl.splits import split


def row(scan, patient, content, verdict="accept"):
    return Row(scan, patient, "T", "CT", "", (9, 9, 9), (1.0, 1.0, 1.0), "RAS", 9, verdict, (), content, "")


@pytest.mark.parametrize("seed", range(20))
def test_patients_with_a_common_scan_stay_together_whatever_joins_them(seed):
    rows = [row(f"S{n}", f"P{n // 2}", f"C{n}") for n in range(20)]
    rows += [row("S20", "P0", "same"), row("S21", "P7", "same", "repair")]
    done = {one.scan_id: one.split for one in split(rows, seed=seed, share=0.5, twins=[("S2", "S18"), ("S3", "S9")])}
    assert done["S20"] == done["S21"] == done["S0"] == done["S14"]
    assert done["S2"] == done["S18"] == done["S9"] == done["S8"]
    assert set(done.values()) == {"train", "val"}


def test_rejected_scans_have_no_side_and_join_nobody():
    rows = [row("S0", "P0", "C"), row("S1", "P1", "C", "reject"), row("S2", "P2", "D")]
    done = split(rows, seed=0, share=0.5, twins=[("S1", "S2")])
    assert done[1].split == ""
    assert {done[0].split, done[2].split} == {"train", "val"}
