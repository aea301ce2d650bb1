import json

import pytest

from volssl.datasets import open_dataset
from volssl.files import BadInput

DATASET = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz", "numTraining": 2}


@pytest.fixture
def folder(tmp_path):
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    for case in ("x_1", "x_2"):
        (tmp_path / "labelsTr" / f"{case}.nii.gz").touch()
        for channel in ("0000", "0001"):
            (tmp_path / "imagesTr" / f"{case}_{channel}.nii.gz").touch()
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    return tmp_path


def test_one_file_per_channel(folder):
    table = open_dataset(folder)
    assert [case.case_id for case in table.cases] == ["x_1", "x_2"]
    assert [path.name for path in table.cases[1].images] == ["x_2_0000.nii.gz", "x_2_0001.nii.gz"]
    assert table.labels == {"lesion": 1}
    assert table.channels == ("T1", "FLAIR")


def test_a_missing_channel_or_label_is_named(folder):
    (folder / "imagesTr" / "x_1_0001.nii.gz").unlink()
    (folder / "labelsTr" / "x_2.nii.gz").unlink()
    with pytest.raises(BadInput, match=r"(?s)x_1_0001.nii.gz is missing.*x_2.nii.gz is missing"):
        open_dataset(folder)


def test_a_dataset_mapping_replaces_the_scan(folder):
    listed = {"only": {"images": ["imagesTr/x_1_0000.nii.gz", "imagesTr/x_1_0001.nii.gz"], "label": "labelsTr/x_1.nii.gz"}}
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"dataset": listed}))
    assert [case.case_id for case in open_dataset(folder).cases] == ["only"]


def test_overlapping_regions_are_refused(folder):
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"labels": {"background": 0, "whole": [1, 2]}}))
    with pytest.raises(BadInput, match="regions are not supported"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_names": {"1": "CT"}}, "channel_names: must map the channels"),
        ({"dataset": {"only": 3}}, "only must be a mapping"),
        ({"dataset": {"only": {"images": "a.nii.gz", "label": "a.nii.gz"}}}, "`images`, a list of files"),
        ({"dataset": {"only": {"images": ["a.nii.gz"]}}}, "`label`, a file"),
    ],
)
def test_a_faulty_dataset_json_is_refused(folder, change, message):
    (folder / "dataset.json").write_text(json.dumps(DATASET | change))
    with pytest.raises(BadInput, match=message):
        open_dataset(folder)
