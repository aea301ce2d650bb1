"""A trained classifier on candidates without labels: the same probabilities as in training's validation, and what it refuses."""

import pytest
from test_detect import RECIPE

from volssl.__main__ import run_verb
from volssl.archive import read_image, write_nifti
from volssl.detect import Options, run
from volssl.files import BadInput, read_csv, write_csv
from volssl.phantom_luna import write_luna16

PLACE = ("seriesuid", "coordX", "coordY", "coordZ")


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    return write_luna16(tmp_path_factory.mktemp("luna") / "data", scans=4, subsets=2)


@pytest.fixture(scope="module")
def trained(luna, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "detect.yaml").write_text(RECIPE)
    run(folder / "detect.yaml", data=luna, out=folder / "run", options=Options(overrides=("learning.steps=4",)))
    return folder / "run"


@pytest.fixture
def clinic(luna, tmp_path):
    """The scans of subset 0 as a clinic has them: NIfTI in a folder, one folder deep, and their candidates without classes."""
    names = sorted(path.stem for path in (luna / "subset0").glob("*.mhd"))
    for name in names:
        volume = read_image(luna / "subset0" / f"{name}.mhd")
        write_nifti(tmp_path / "clinic" / "scans" / f"{name}.nii.gz", volume.array_CXYZ[0], volume.grid, "int16")
    rows = [row for row in read_csv(luna / "candidates_V2.csv") if row["seriesuid"] in names]
    write_csv(tmp_path / "clinic" / "candidates.csv", [{name: row[name] for name in PLACE} for row in rows], PLACE)
    return tmp_path / "clinic"


MINE = ("boxes.candidates=candidates.csv",)


def test_new_candidates_get_what_the_validation_gave_them(trained, clinic, tmp_path, capsys):
    options = {"recipe": None, "model": trained, "data": clinic, "out": tmp_path / "out", "overrides": MINE}
    assert run_verb("detect", options) == 0
    rows, validated = (read_csv(path / "candidates.csv") for path in (tmp_path / "out", trained / "validation"))
    assert rows and list(rows[0]) == [*PLACE, "probability"] and rows == validated
    assert "learnt from" not in capsys.readouterr().err and not (tmp_path / "out" / "model.json").exists()
    for path in (tmp_path / "out").iterdir():
        assert str(clinic) not in path.read_text()


def test_luna16s_own_folder_and_scans_that_were_learnt_from(trained, luna, tmp_path, capsys):
    assert run(model=trained, data=luna, out=tmp_path / "out").failed == 0
    assert len(read_csv(tmp_path / "out" / "candidates.csv")) == len(read_csv(luna / "candidates_V2.csv"))
    assert "2 of these 4 scans are some that the model learnt from" in capsys.readouterr().err


def test_a_scan_that_cannot_be_scored_is_named_and_the_rest_goes_on(trained, clinic, tmp_path):
    rows = read_csv(clinic / "candidates.csv")
    first, second = dict.fromkeys(row["seriesuid"] for row in rows)
    far = {"seriesuid": first, "coordX": "9999", "coordY": "0", "coordZ": "0"}
    absent = {"seriesuid": "1.2.3", "coordX": "0", "coordY": "0", "coordZ": "0"}
    write_csv(clinic / "candidates.csv", [*rows, far, absent], PLACE)
    assert run_verb("detect", {"model": trained, "data": clinic, "out": tmp_path / "out", "overrides": MINE}) == 3
    failures = {row["case"]: row["reason"] for row in read_csv(tmp_path / "out" / "failures.csv")}
    assert "9999" in failures[first] and "found none" in failures["1.2.3"] and len(failures) == 2
    assert {row["seriesuid"] for row in read_csv(tmp_path / "out" / "candidates.csv")} == {second}
    (clinic / "scans" / f"{second}.nii.gz").write_bytes(b"no image")
    assert run_verb("detect", {"model": trained, "data": clinic, "out": tmp_path / "none", "overrides": MINE}) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "found neither"),
        ({"recipe": "luna_detection"}, "found both"),
        ({"options": Options(overrides=MINE, fold=1, resume=True)}, "no --fold, --resume"),
        ({"options": Options(overrides=(*MINE, "learning.steps=3"))}, "found learning.steps"),
        ({"options": Options(overrides=("boxes.candidates=absent.csv",))}, "found no absent.csv"),
        ({"options": Options(overrides=("boxes.candidates=text.csv",))}, "coordX, coordY, coordZ missing"),
        ({"options": Options(overrides=("boxes.candidates=bytes.csv",))}, "must be a table of text"),
        ({"options": Options(overrides=("boxes.candidates=words.csv",))}, "places must be finite numbers; 1 row"),
        ({"options": Options(overrides=("boxes.candidates=empty.csv",))}, "must have rows"),
    ],
)
def test_refused_before_out_is_touched(trained, clinic, tmp_path, given, message):
    tables = {"text": b"seriesuid,x\n1,2\n", "bytes": b"\xff\xfe\x00", "words": b"seriesuid,coordX,coordY,coordZ\n1,2,nan,3\n"}
    for name, content in (tables | {"empty": b"seriesuid,coordX,coordY,coordZ\n"}).items():
        (clinic / f"{name}.csv").write_bytes(content)
    options = {"model": trained, "options": Options(overrides=MINE)} | given
    with pytest.raises(BadInput, match=message):
        run(data=clinic, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
