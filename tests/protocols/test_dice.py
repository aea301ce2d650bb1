import numpy as np

from volssl.protocols.dice import Dice
from volssl.protocols.protocol import METRICS, Pair, metric_of
from volssl.volume import Grid, Volume


def test_labels_and_overlapping_regions():
    grid = Grid((4, 1, 1), np.eye(4))
    predicted, reference = (Volume(np.array(of, dtype=np.uint8).reshape(1, 4, 1, 1), grid) for of in ([1, 1, 2, 0], [1, 2, 2, 0]))
    targets = {"organ": (1, 2), "lesion": (2,), "other": (3,)}
    rows = {row.label: (row.value, bool(row.note)) for row in Dice().judge(Pair("a", predicted, reference, targets)).rows}
    assert rows == {"organ": (1.0, False), "lesion": (2 / 3, False), "other": (1.0, True)}


def test_every_figure_says_which_way_is_better():
    assert METRICS["hd95"].better == "lower" and metric_of("lesion_assd") == METRICS["assd"]
    assert metric_of("sensitivity_0.125").better == metric_of("recall_50").better == "higher"
    assert metric_of("lesions_fp").better == "none"
