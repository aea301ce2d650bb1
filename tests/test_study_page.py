"""The page of a study, from a summary alone."""

import pytest

from volssl.files import BadInput, write_json
from volssl.study_page import is_study, write_page
from volssl.tally import telling


def arm(name, at):
    return {"name": name, "start": "nothing", "overlap": "none", "own": "", "pretrain": "", "at": at}


def point(labels, mean, *, low=None, high=None, pays=None, saved=None):
    gain = {"mean": 0.03, "ci95": [low, high], "seeds": 2, "cases": 4} if low is not None else {}
    told = {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]} if mean is not None else {}
    return {"labels": labels, "lr": [0.01], "by_label": {"a": mean}, "gain": gain, "pays": pays, "saved": saved or {}, **told}


@pytest.fixture
def folder(tmp_path):
    reached = {"reached": None, "ci95": [7.5, None], "least": 5, "most": 10}
    summary = {
        "kind": "study",
        "complete": False,
        "cells": {"tested": 5, "planned": 6},
        "design": {
            "labels": [5, 10],
            "seeds": [0, 1],
            "folds": 1,
            "pretraining_seeds": 1,
            "worth": 0.01,
            "lr": [0.01],
            "tuning_seeds": 1,
            "tuned_at": [],
            "cases": {"pretrain": 10, "validation": 2, "test": 4},
            "targets": ["a"],
            "steps": 6,
            "threads": 1,
        },
        "arms": [
            arm("scratch", [point(5, 0.5), point(10, 0.6)]),
            arm(
                "one",
                [point(5, 0.53, low=0.01, high=0.05, pays="yes", saved=reached), point(10, 0.63, low=-0.05, high=0.1, pays="undecided")],
            ),
            arm("two", [point(5, None, pays="failed"), point(10, 0.58, low=-0.04, high=-0.01, pays="no")]),
        ],
        "tuning": [{"arm": "one", "labels": 5, "fold": 0, "tried": [{"lr": 0.01, "dice": None}], "chosen": None, "at_end": False}],
        "failures": [{"job": "two/pretraining-seed_0-fold_0", "reason": "lost <at> /home/me/data/x.nii"}],
        "hours": [{"arm": "one", "pretraining": 1.0, "search": 2.0, "further": 0.5, "test": 0.25}],
        "pictures": [],
    }
    write_json(tmp_path / "summary.json", summary)
    return tmp_path, summary


def test_the_page_answers_and_shows_what_failed(folder):
    path, _ = folder
    page = write_page(path).read_text()
    for told in (
        "Not finished",
        "5 of 6 cells",
        "+0.030",
        "0.010 to 0.050",
        "not reached",
        "7.5 to not reached",
        "3.750",
        "two/pretraining",
    ):
        assert told in page, told
    assert page.count('class="pays failed"') == 2  # its difference and its mean
    assert "/home/me" not in page and "&lt;at&gt;" in page


def test_the_best_answer_of_each_number_stands_on_top(folder):
    path, summary = folder
    page = write_page(path).read_text()
    cards = page.split('class="answers"')[1].split("</header>")[0]
    assert cards.index("answer yes") < cards.index("answer undecided") and "answer no" not in cards
    assert telling(summary) == ["With 5 labelled cases: failed: two; yes: one", "With 10 labelled cases: no: two; undecided: one"]


@pytest.mark.parametrize("quick", [False, True, None])
def test_a_quick_trial_says_first_that_its_answers_mean_nothing(folder, quick):
    path, summary = folder
    if quick is not None:  # studies of before have no such value
        summary["design"]["quick"] = quick
        write_json(path / "summary.json", summary)
    before_answers = write_page(path).read_text().split('class="answers"')[0]
    assert ("A quick trial" in before_answers and "mean nothing" in before_answers) is bool(quick)
    assert ("mean nothing" in telling(summary)[0]) is bool(quick)


@pytest.mark.parametrize("develop", [False, True, None])
def test_a_study_for_choosing_settings_says_so_first(folder, develop):
    path, summary = folder
    if develop is not None:
        summary["design"]["develop"] = develop
        write_json(path / "summary.json", summary)
    before_answers = write_page(path).read_text().split('class="answers"')[0]
    assert ("the test share was left alone" in before_answers) is bool(develop)


def test_only_a_study_has_such_a_page(tmp_path):
    write_json(tmp_path / "summary.json", {"protocol": "dice"})
    assert not is_study(tmp_path)
    with pytest.raises(BadInput, match="volssl study left"):
        write_page(tmp_path)


def test_the_page_tells_a_choice_at_an_end_of_the_grid(folder):
    path, summary = folder
    told = []
    for at_end in (True, False, None):
        row = {key: value for key, value in summary["tuning"][0].items() if key != "at_end"} | {"chosen": 0.01}
        write_json(path / "summary.json", {**summary, "tuning": [row if at_end is None else row | {"at_end": at_end}]})
        told.append("0.01, an end" in write_page(path).read_text())
    assert told == [True, False, False]  # the last as earlier versions wrote it
