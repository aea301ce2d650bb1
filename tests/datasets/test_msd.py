import json
from pathlib import Path

import pytest

from volssl.datasets import open_dataset
from volssl.files import BadInput

DATASET = {
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "tumour"},
    "training": [
        {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
        {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
    ],
}


def folder(root: Path, values: dict) -> Path:
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
        for case in ("a", "b"):
            (root / name / f"{case}.nii.gz").touch()
    (root / "dataset.json").write_text(json.dumps(values))
    return root


def test_cases_sorted_by_name_with_labels_and_channels(tmp_path):
    table = open_dataset(folder(tmp_path, DATASET))
    assert [case.case_id for case in table.cases] == ["a", "b"]
    assert table.labels == {"liver": 1, "tumour": 2}
    assert table.channels == ("CT",)
    assert table.cases[0].label == tmp_path / "labelsTr" / "a.nii.gz"


def test_every_missing_file_is_named_at_once(tmp_path):
    folder(tmp_path, DATASET)
    (tmp_path / "imagesTr" / "a.nii.gz").unlink()
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(BadInput, match=r"(?s)2 fault.*b: file must exist.*a: file must exist"):
        open_dataset(tmp_path)


def test_patients_come_from_patients_csv(tmp_path):
    folder(tmp_path, DATASET)
    (tmp_path / "patients.csv").write_text("case,patient\na,p\nb,p\n")
    assert {case.patient_id for case in open_dataset(tmp_path).cases} == {"p"}
    (tmp_path / "patients.csv").write_text("case,patient\na,p\n")
    with pytest.raises(BadInput, match="found none for b"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": [DATASET["training"][0]] * 2}, "unique"),
        ({"training": []}, "at least one case"),
        ({"training": [7]}, r"training\[0\]"),
        ({"training": [{"image": "imagesTr/a.nii.gz", "label": 5}]}, r"training\[0\]\.label must be a file name; found 5"),
        ({"modality": ["CT"]}, r"modality: must map the channels.*found \['CT'\]"),
        ({"modality": {"a": "CT"}}, "modality: must map the channels"),
        ({"labels": {"0": "background"}}, "labels must be names"),
        ({"labels": {"x": "liver"}}, "whole number"),
    ],
)
def test_a_faulty_dataset_json_is_refused(tmp_path, change, message):
    with pytest.raises(BadInput, match=message):
        open_dataset(folder(tmp_path, DATASET | change))


def test_an_unknown_folder_names_the_layouts(tmp_path):
    with pytest.raises(BadInput, match="msd, nnunet"):
        open_dataset(tmp_path)
    with pytest.raises(BadInput, match="must be a folder"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(BadInput, match="layout: must be one of"):
        open_dataset(tmp_path, "acdc")


def test_hippocampus_is_read(real_data):
    table = open_dataset(real_data / "brain_mr" / "Task04_Hippocampus")
    assert len(table.cases) == 200
    assert table.labels == {"Anterior": 1, "Posterior": 2}
