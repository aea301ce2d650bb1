"""LiTS: what is counted and how, by hand."""

import numpy as np
import pytest

from volssl.files import BadInput
from volssl.lesions import components, detect_by_overlap
from volssl.protocols.lits2017 import Lits2017, shape_metrics
from volssl.protocols.protocol import Judged, Pair
from volssl.volume import Grid, Volume

SHAPE = (30, 12, 12)
GRID = Grid(SHAPE, np.diag([1.0, 1.0, 2.0, 1.0]))
PROTOCOL = Lits2017()
TARGETS = PROTOCOL.targets({"liver": 1, "tumour": 2}, {})


def label_map(*tumours: tuple[int, int], liver: bool = True) -> np.ndarray:
    """A liver of 28x10x10 with tumours of 4x4 in their cross section, from `start` up to `stop` along X."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[1:29, 1:11, 1:11] = liver
    for start, stop in tumours:
        array[start:stop, 4:8, 4:8] = 2
    return array


def judge(predicted: np.ndarray, reference: np.ndarray, case: str = "a") -> Judged:
    return PROTOCOL.judge(Pair(case, Volume(predicted[None], GRID), Volume(reference[None], GRID), TARGETS))


def rows(judged: Judged) -> dict[tuple[str, str], float]:
    return {(row.label, row.metric): row.value for row in judged.rows}


def test_the_liver_holds_its_tumours():
    assert TARGETS == {"liver": (1, 2), "tumour": (2,)}
    assert PROTOCOL.targets({"a": 1, "b": 2}, {"organ": [1, 2], "lesion": [2]}) == {"organ": (1, 2), "lesion": (2,)}
    for labels, regions in (({"a": 1}, {}), ({"a": 1, "b": 2, "c": 3}, {}), ({"a": 1, "b": 2}, {"x": [1], "y": [2]})):
        with pytest.raises(BadInput, match="lits2017 scores a liver"):
            PROTOCOL.targets(labels, regions)


def test_shape_metrics_by_hand():
    one, other = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)
    one[2:8, 2:8, 2:8], other[2:8, 2:8, 2:5] = True, True  # twice as much predicted; 3 slices of 2 mm too many
    found, note = shape_metrics(one, other, spacing_mm=GRID.spacing_mm)
    assert note == ""
    assert (found["dice"], found["voe"], found["rvd"], found["mssd"]) == (pytest.approx(2 / 3), pytest.approx(1 / 2), 1.0, 6.0)
    assert 0 < found["assd"] < found["rmsd"] < found["mssd"]


def test_lesions_found_at_both_overlaps_by_hand():
    # Reference: 2-6, 10-14, 20-24. Prediction: 2-6 whole (IoU 1), 13-17 (one of 4+4-1 layers: IoU 1/7), 26-28 on nothing.
    reference, predicted = label_map((2, 6), (10, 14), (20, 24)), label_map((2, 6), (13, 17), (26, 28))
    found = rows(judge(predicted, reference))
    assert found[("tumour", "lesions")] == 3 and found[("tumour", "lesions_predicted")] == 3
    assert found[("tumour", "lesions_found_0")] == 2 and found[("tumour", "lesions_found_50")] == 1
    pooled = PROTOCOL.pooled([judge(predicted, reference), judge(reference, reference, "b")])["tumour"]
    assert pooled["recall_0"]["mean"] == pytest.approx(5 / 6) and pooled["recall_50"]["mean"] == pytest.approx(4 / 6)
    assert pooled["precision_0"]["mean"] == pytest.approx(5 / 6) and pooled["precision_50"]["mean"] == pytest.approx(4 / 6)
    assert pooled["lesion_dice"]["mean"] == 1  # of the four found at more than half
    # 16 voxels a layer: 4 + 1 layers in common of 10 + 12; and 12 of 24.
    assert pooled["dice_global"]["mean"] == pytest.approx(2 * (5 + 12) / (10 + 12 + 24))


def test_a_split_prediction_finds_one_lesion_and_a_joining_one_finds_two():
    def detect(predicted: np.ndarray, reference: np.ndarray, least: float) -> tuple[int, int, int]:
        parts, lesions = (components(array == 2, 6)[0] for array in (predicted, reference))
        found = detect_by_overlap(parts, lesions, least=least)
        return found.found, found.predicted, found.reference

    # 4 + 4 of 9 layers: the two pieces are judged as one, IoU 8/9; the second piece still counts as one prediction too many.
    assert detect(label_map((2, 6), (7, 11)), label_map((2, 11)), 0.5) == (1, 2, 1)
    # One prediction over two lesions: they are judged as one, IoU 8/9, and both are found.
    assert detect(label_map((2, 11)), label_map((2, 6), (7, 11)), 0.5) == (2, 1, 2)
    # Two lesions of 2 and 6 layers under one prediction of 9: IoU 8/9; without joining, the small one would be lost.
    assert detect(label_map((2, 11)), label_map((2, 4), (5, 11)), 0.5) == (2, 1, 2)
    assert detect(label_map(), label_map((2, 4)), 0.0) == (0, 0, 1)
    assert detect(label_map((2, 4)), label_map((4, 6)), 0.0) == (0, 1, 1)  # touching is not overlapping


def test_one_prediction_over_two_lesions_is_no_precision_above_1():
    judged = judge(label_map((2, 11)), label_map((2, 6), (7, 11)))
    pooled = PROTOCOL.pooled([judged, judge(label_map((2, 6), (20, 22)), label_map((2, 6)), "b")])["tumour"]
    assert pooled["recall_50"]["mean"] == 1
    assert pooled["precision_50"]["mean"] == 1  # 3 found by 3 predictions, of which one is false
    assert PROTOCOL.pooled([judged])["tumour"]["precision_50"]["mean"] == 1


def test_the_tumour_burden_by_hand():
    reference, predicted = label_map((2, 6)), label_map((2, 10))
    error = rows(judge(predicted, reference))[("tumour", "burden_error")]
    assert error == pytest.approx((8 - 4) * 16 / 2800)
    pooled = PROTOCOL.pooled([judge(predicted, reference), judge(reference, reference, "b")])["tumour"]
    assert pooled["burden_rmse"]["mean"] == pytest.approx(np.sqrt(error**2 / 2))
    assert pooled["burden_max"]["mean"] == pytest.approx(error)


def test_a_missed_liver_gets_the_challenges_worst_values():
    reference = label_map((2, 6))
    for predicted in (label_map(liver=False), label_map((2, 6), liver=False)):  # tumour alone is no liver
        judged = judge(predicted, reference)
        found = rows(judged)
        assert [found[("liver", metric)] for metric in ("dice", "voe", "rvd", "assd", "rmsd", "mssd")] == [0, 1, *[9001] * 4]
        assert found[("tumour", "burden_error")] == 9001
        assert all(row.note for row in judged.rows if row.value == 9001)


def test_cases_without_tumour():
    none, some = label_map(), label_map((2, 6))
    assert rows(judge(none, none))[("tumour", "dice")] == 1
    assert rows(judge(some, none))[("tumour", "dice")] == rows(judge(none, some))[("tumour", "dice")] == 0
    # With no lesion anywhere, precision and recall are undefined and left out; the others are not.
    pooled = PROTOCOL.pooled([judge(none, none)])["tumour"]
    assert set(pooled) == {"burden_rmse", "burden_max"}
    assert PROTOCOL.pooled([]) == {}


def test_a_missed_lesion_lowers_what_is_pooled():
    some, none = label_map((2, 6), (10, 14)), label_map((2, 6))
    before, after = (PROTOCOL.pooled([judge(some, some), judge(predicted, some, "b")])["tumour"] for predicted in (some, none))
    for metric in ("dice_global", "recall_0", "recall_50"):
        assert after[metric]["mean"] < before[metric]["mean"]
