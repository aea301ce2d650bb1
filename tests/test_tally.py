"""Scores of cells as arrays over seeds and cases."""

import numpy as np

from volssl.cells import mean_dice
from volssl.rounds import Study
from volssl.tally import _at_end, folds_of, scores, telling


class Fold:
    """As many test cases as asked for."""

    def __init__(self, count):
        self.test = tuple(range(count))


class Plan:
    """Two seeds."""

    class design:
        """Of the study."""

        seeds = (0, 1)


def rows(*values):
    return [
        {"case": case, "label": name, "metric": "dice", "value": v, "note": ""} for case, of in enumerate(values) for name, v in of.items()
    ]


def test_folds_stand_side_by_side_and_a_missing_one_is_nan(tmp_path):
    study = Study(tmp_path, Plan(), None, (Fold(2), Fold(1)), {})
    tested = {
        ("x", 5, 0, 0): (None, rows({"a": 0.2, "b": 0.4}, {"a": 0.6, "b": 0.8})),
        ("x", 5, 1, 0): (None, rows({"a": 1.0, "b": 0.0})),
        ("x", 5, 0, 1): (None, rows({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0})),
    }
    np.testing.assert_allclose(scores(study, tested, "x", 5), [[0.3, 0.7, 0.5], [0.0, 0.5, np.nan]])
    np.testing.assert_allclose(scores(study, tested, "x", 5, label="b"), [[0.4, 0.8, 0.0], [0.0, 1.0, np.nan]])
    assert np.isnan(scores(study, tested, "y", 5)).all() and folds_of(study).tolist() == [0, 0, 1]


def test_other_metrics_do_not_enter_the_mean():
    told = [*rows({"a": 0.5}), {"case": 0, "label": "a", "metric": "hd95", "value": 40.0, "note": ""}]
    assert mean_dice(told) == [0.5]


def test_a_choice_at_an_end_of_the_grid_is_told():
    grid = (0.001, 0.002, 0.004)
    assert [_at_end(lr, grid) for lr in (*grid, None)] == [True, False, True, False]
    assert not _at_end(0.001, (0.001, 0.002)) and not _at_end(0.001, (0.001,))
    arms = [{"name": name, "at": [{"pays": "no"}]} for name in ("scratch", "one")]
    search = [{"arm": "scratch", "at_end": True}, {"arm": "one", "at_end": False}]
    told = telling({"design": {"labels": [5]}, "arms": arms, "tuning": search})
    assert told[-1].startswith("tuning.lr may be too narrow: scratch chose") and len(told) == 2
    assert len(telling({"design": {"labels": [5]}, "arms": arms, "tuning": search[1:]})) == 1
