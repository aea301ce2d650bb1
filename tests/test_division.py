"""Who is trained on and who is held out, when a file or the data say so."""

import json
from pathlib import Path

import pytest

from volssl.cases import Folds, split
from volssl.datasets import Case, CaseTable, stem
from volssl.division import divide, read_sides
from volssl.files import BadInput

PATIENTS = {"Brats18_a_1": "a", "Brats18_a_2": "a", "Brats18_b_1": "b", "Brats18_c_1": "c", "Brats18_d_1": "d"}


def table(folds=None):
    cases = tuple(Case(name, patient, (Path("x"),), Path("y")) for name, patient in PATIENTS.items())
    return CaseTable(cases, {"t": 1}, ("CT",), folds=folds or {})


def names(cases):
    return [case.case_id for case in cases]


def given(path, fold=0, of=None):
    return divide(of or table(), Folds(), given=path, fold=fold)


def texts(folder, **sides):
    for side, lines in sides.items():
        (folder / f"brats_{side}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_without_a_file_folds_are_drawn():
    drawn = split(table(), Folds(count=2))
    one = divide(table(), Folds(count=2), given=None, fold=1)
    assert names(one.held_out) == names(drawn[1]) and names(one.train) == names(drawn[0]) and one.source == "drawn"
    assert [names(fold) for fold in one.folds] == [names(fold) for fold in drawn] and not one.left_out and not one.test
    with pytest.raises(BadInput, match="--fold must lie between 0 and 1"):
        divide(table(), Folds(count=2), given=None, fold=2)


def test_text_files_of_the_reference_repository(tmp_path):
    texts(tmp_path, train=["HGG/Brats18_a_1", "HGG/Brats18_a_2"], valid=["LGG/Brats18_b_1"], test=["HGG/Brats18_c_1"])
    (tmp_path / "luna_train.txt").write_text("other\n")
    one = given(tmp_path / "brats_train.txt")
    assert names(one.train) == ["Brats18_a_1", "Brats18_a_2"] and names(one.held_out) == ["Brats18_b_1"]
    assert names(one.test) == ["Brats18_c_1"] and names(one.left_out) == ["Brats18_d_1"]
    assert one.source.startswith("sha256:") and names(one.folds[0]) == ["Brats18_b_1"]
    with pytest.raises(BadInput, match="one file of names for train"):
        given(tmp_path)  # brats and luna lie in it
    (tmp_path / "luna_train.txt").unlink()
    assert names(given(tmp_path).train) == names(one.train)


def test_nnunets_json(tmp_path):
    path = tmp_path / "splits_final.json"
    folds = [
        {"train": ["Brats18_b_1", "Brats18_c_1"], "val": ["Brats18_a_1", "Brats18_a_2"]},
        {"train": ["Brats18_a_1"], "val": ["Brats18_b_1"]},
    ]
    path.write_text(json.dumps(folds))
    assert names(given(path).held_out) == ["Brats18_a_1", "Brats18_a_2"]
    assert names(given(path, fold=1).train) == ["Brats18_a_1"]
    assert names(given(path, fold=1).left_out) == ["Brats18_a_2", "Brats18_c_1", "Brats18_d_1"]
    with pytest.raises(BadInput, match="between 0 and 1"):
        given(path, fold=2)


def test_a_runs_own_splits_json(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(
        json.dumps({"fold": 0, "train": ["Brats18_a_1", "Brats18_a_2"], "validation": ["Brats18_b_1"], "test": [], "folds": [[]]})
    )
    assert names(given(path).held_out) == ["Brats18_b_1"]


def test_csv_of_numbers_or_words(tmp_path):
    path = tmp_path / "folds.csv"
    path.write_text("case,fold\n" + "".join(f"{name}.nii.gz,{ord(patient) % 3}\n" for name, patient in PATIENTS.items()))
    assert [names(fold) for fold in given(path).folds] == [["Brats18_c_1"], ["Brats18_a_1", "Brats18_a_2", "Brats18_d_1"], ["Brats18_b_1"]]
    assert names(given(path, fold=1).train) == ["Brats18_b_1", "Brats18_c_1"]
    path.write_text("case,fold\nBrats18_a_1,train\nBrats18_b_1,valid\nBrats18_c_1,test\n")
    assert names(given(path).test) == ["Brats18_c_1"]
    path.write_text("case,fold\nBrats18_a_1,0\nBrats18_b_1,valid\n")
    with pytest.raises(BadInput, match="numbered folds, or train, valid and test"):
        read_sides(path)
    path.write_text("name,fold\n")
    with pytest.raises(BadInput, match="columns case, fold"):
        read_sides(path)


def test_everything_wrong_is_named_at_once(tmp_path):
    texts(tmp_path, train=["Brats18_a_1", "Brats18_b_1", "nobody"], valid=["Brats18_a_2", "Brats18_b_1"])
    with pytest.raises(BadInput) as error:
        given(tmp_path)
    text = str(error.value)
    assert "nobody: must be a case of the data" in text
    assert "Brats18_b_1: must stand once; found it in train and validation" in text
    assert "patient a: all cases must lie on one side; found Brats18_a_1, Brats18_a_2 on train and validation" in text


def test_a_case_twice_on_one_side_is_named(tmp_path):
    texts(tmp_path, train=["Brats18_a_1", "HGG/Brats18_a_1"], valid=["Brats18_b_1"])
    with pytest.raises(BadInput, match="found it in train and train"):
        given(tmp_path)


def test_official_folds():
    folds = {"Brats18_a_1": 3, "Brats18_a_2": 3, "Brats18_b_1": 7, "Brats18_c_1": 7, "Brats18_d_1": 9}
    one = given("official", fold=1, of=table(folds))
    assert names(one.held_out) == ["Brats18_b_1", "Brats18_c_1"] and len(one.folds) == 3 and one.source == "official"
    with pytest.raises(BadInput, match="patient a"):
        given("official", of=table(folds | {"Brats18_a_2": 7}))
    with pytest.raises(BadInput, match="no folds of its own"):
        given("official")
    with pytest.raises(BadInput, match="at least two"):
        given("official", of=table(dict.fromkeys(folds, 3)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", "names for train"),
        ("a.json", "[]", "at least one fold"),
        ("a.json", '{"train": ["x"]}', "found train"),
        ("a.yaml", "", "must be .json"),
    ],
)
def test_files_that_are_no_split(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        read_sides(tmp_path / name)
    with pytest.raises(BadInput, match="found nothing there"):
        read_sides(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("case_1.nii.gz", "case_1"),
        ("Case.v2.NRRD", "Case.v2"),
        ("1.3.6.1.4.1.14519.5.2.1", "1.3.6.1.4.1.14519.5.2.1"),
        ("1.3.6.1.4.1.14519.5.2.1.mhd", "1.3.6.1.4.1.14519.5.2.1"),
        ("old.hdr", "old"),
        ("scan.gipl", "scan.gipl"),
    ],
)
def test_only_known_endings_are_cut_from_a_name(name, wanted):
    assert stem(Path("folder.nii") / name) == wanted
