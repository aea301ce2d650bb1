import numpy as np
import pytest

from volssl.protocols.brats_voxel import BratsVoxel, hd95
from volssl.protocols.protocol import Pair
from volssl.volume import Grid, Volume

GRID = Grid((12, 12, 12), np.diag([1.0, 1.0, 3.0, 1.0]))


def label_map(**boxes: tuple[int, int]) -> Volume:
    array = np.zeros((1, 12, 12, 12), dtype=np.uint8)
    for name, (start, stop) in boxes.items():
        array[0, 2:8, 2:8, start:stop] = int(name[1:])
    return Volume(array, GRID)


def test_regions_overlap_and_each_is_scored_by_itself():
    protocol = BratsVoxel()
    targets = protocol.targets({"NCR": 1, "ED": 2, "ET": 4}, {})
    # Edema 2, necrosis 1, enhancing 4, stacked; the prediction calls all necrosis enhancing.
    reference, predicted = label_map(l2=(2, 6), l1=(6, 8), l4=(8, 10)), label_map(l2=(2, 6), l4=(6, 10))
    rows = {(row.label, row.metric): row.value for row in protocol.judge(Pair("a", predicted, reference, targets)).rows}
    assert rows[("WT", "dice")] == rows[("TC", "dice")] == 1
    assert rows[("ET", "dice")] == pytest.approx(2 * 2 / (4 + 2))
    assert rows[("WT", "hd95")] == rows[("TC", "hd95")] == 0
    assert rows[("ET", "hd95")] == pytest.approx(6.0)  # two slices of 3 mm too many


@pytest.mark.parametrize(
    ("predicted", "reference", "value"), [(False, False, 0.0), (True, False, 373.13), (False, True, 373.13), (True, True, 0.0)]
)
def test_the_rule_for_empty_cases(predicted, reference, value):
    mask = label_map(l1=(2, 6)).array_CXYZ[0] > 0
    found, note = hd95(mask & predicted, mask & reference, spacing_mm=(1, 1, 3), worst_mm=BratsVoxel().worst_mm)
    assert found == pytest.approx(value, abs=0.005)
    assert bool(note) == (not (predicted and reference))


def test_a_missed_region_never_improves_the_mean():
    protocol, reference = BratsVoxel(), label_map(l1=(2, 6))
    found = protocol.judge(Pair("a", reference, reference, {"ET": (1,)})).rows
    missed = protocol.judge(Pair("b", label_map(), reference, {"ET": (1,)})).rows
    assert {row.metric: row.value for row in found} == {"dice": 1, "hd95": 0}
    assert {row.metric: row.value for row in missed} == {"dice": 0, "hd95": protocol.worst_mm}
