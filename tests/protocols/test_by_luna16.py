"""LUNA16: from tables and label maps to figures; the curve itself is tested in test_froc.py."""

import numpy as np
import pytest

from volssl.files import BadInput
from volssl.froc import RATES, Candidates, Findings, Scan
from volssl.protocols.luna16 import Luna16
from volssl.protocols.protocol import Pair
from volssl.volume import Grid, Volume

GRID = Grid((24, 24, 24), np.diag([-1.0, -1.0, 1.0, 1.0]))


def scan(number: int, probabilities: list[float]) -> Scan:
    """One nodule at 0, and marks: the first on it, the others on nothing."""
    at = np.array([[50.0 * place, 0, 0] for place in range(len(probabilities))]).reshape(-1, 3)
    return Scan(str(number), Candidates(at, np.array(probabilities)), Findings(np.zeros((1, 3)), np.array([4.0]), np.array([True])))


def test_figures_by_hand():
    protocol = Luna16()
    judged = [protocol.judge_scan(of) for of in (scan(0, [0.9, 0.5]), scan(1, [0.4, 0.8]), scan(2, []))]
    found = protocol.pooled(judged)["nodule"]
    # hit 0.9, false 0.8, false 0.5, hit 0.4: 1/3 up to 2/3 false positives per scan, then 2/3.
    expected = [1 / 3 if rate < 2 / 3 else 2 / 3 for rate in RATES]
    assert [found[f"sensitivity_{rate:g}"]["mean"] for rate in RATES] == pytest.approx(expected)
    assert found["cpm"]["mean"] == pytest.approx(np.mean(expected))
    assert found["auc"]["mean"] == 0.5  # 0.9 above both, 0.4 above none
    low, high = found["cpm"]["ci95"]
    assert low <= found["cpm"]["mean"] <= high and low < high
    assert {row.metric: row.value for row in judged[1].rows} == {"findings": 1, "hits": 1, "false_marks": 1, "ignored_marks": 0}


def test_label_maps_give_dice_and_one_threshold():
    def label_map(*corners: int) -> Volume:
        array = np.zeros((1, 24, 24, 24), dtype=np.uint8)
        for at in corners:
            array[0, at : at + 4, at : at + 4, at : at + 4] = 1
        return Volume(array, GRID)

    protocol = Luna16()
    judged = protocol.judge(Pair("a", label_map(2, 16), label_map(3, 9), {"nodule": (1,)}))
    rows = {row.metric: row.value for row in judged.rows}
    assert rows == {"dice": pytest.approx(2 * 27 / 256), "findings": 2, "hits": 1, "false_marks": 1, "ignored_marks": 0}
    found = protocol.pooled([judged])["nodule"]
    assert found["sensitivity_1"]["mean"] == 0.5
    assert "auc" not in found  # a label map tells no probability
    assert protocol.targets({"1": 1}, {}) == {"nodule": (1,)}  # a bare value is the nodule
    assert protocol.targets({"lesion": 1}, {}) == {"lesion": (1,)}


def test_at_least_one_mark_counts():
    with pytest.raises(BadInput, match="most"):
        Luna16(most=0)
