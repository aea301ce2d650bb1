"""What a study says it will take."""

from volssl.costs import sentences

LEFT = {"pretraining": 1, "search": 6, "further": 0, "test": 4}


def test_the_estimate_in_words():
    row = {"arm": "one", "pretraining": 1.5, "search": 3.0, "further": 0.0, "test": 0.25, "jobs": LEFT, "trouble": ""}
    broken = row | {"arm": "two", "jobs": dict.fromkeys(LEFT, 0), "trouble": "its pretraining cannot be timed"}
    told = sentences({"hours": 4.75, "hours_with_workers": 2.375, "arms": [row, broken]}, 2)
    assert told.startswith("estimate: 4.75 h of work; 2.38 h with 2 workers")
    assert "one: 1 pretraining(s) 1.5 h, 6 fine-tunings of the search 3 h, 4 test runs 0.25 h" in told
    assert "two: nothing left to do; its pretraining cannot be timed" in told
    assert "workers" not in sentences({"hours": 1, "hours_with_workers": 1, "arms": []}, 0)
