"""Tables of findings and candidates: what is read, and what is refused with all complaints at once."""

import numpy as np
import pytest

from volssl.candidates import candidates_of, findings_of, is_findings, read_candidates, read_references
from volssl.files import BadInput
from volssl.volume import Grid, Volume

ANNOTATIONS = "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,10,20,30,8\n1.2,-5,0,1,6.5\n1.3,1,2,3,4\n"
CANDIDATES = "seriesuid,coordX,coordY,coordZ,probability\n1.2,11,20,30,0.9\n1.4,0,0,0,0.1\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "annotations.csv").write_text(ANNOTATIONS)
    (tmp_path / "annotations_excluded.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.4,1,1,1,-1\n")
    (tmp_path / "seriesuids.csv").write_text("1.2\n1.3\n1.4\n1.5\n")
    (tmp_path / "candidates.csv").write_text(CANDIDATES)
    return tmp_path


def test_findings_irrelevant_ones_and_all_scans(folder):
    found = read_references(folder)
    assert found.series == ("1.2", "1.3", "1.4", "1.5") and found.known
    assert found.findings["1.2"].at_N3.tolist() == [[10, 20, 30], [-5, 0, 1]]
    assert found.findings["1.2"].radius_mm.tolist() == [4, 3.25]
    assert found.findings["1.4"].counts.tolist() == [False] and found.findings["1.4"].radius_mm.tolist() == [5]  # 10 mm by rule
    candidates = read_candidates(folder / "candidates.csv", found)
    assert candidates["1.2"].probability.tolist() == [0.9] and candidates["1.2"].classes is None


def test_of_the_data_sets_own_folder_the_challenges_tables_are_read(folder):
    kit = folder / "data" / "evaluationScript" / "annotations"
    kit.mkdir(parents=True)
    (folder / "data" / "annotations.csv").write_text(ANNOTATIONS.replace("1.3,", "9.9,"))
    for name in ("annotations.csv", "annotations_excluded.csv", "seriesuids.csv"):
        (folder / name).rename(kit / name)
    assert is_findings(folder / "data") and not is_findings(folder)
    found = read_references(folder / "data")
    assert found.known and found.series == ("1.2", "1.3", "1.4", "1.5") and "9.9" not in found.findings


def test_without_the_other_tables(folder):
    for name in ("annotations_excluded.csv", "seriesuids.csv"):
        (folder / name).unlink()
    found = read_references(folder / "annotations.csv")
    assert found.series == ("1.2", "1.3") and not found.known


def test_a_table_of_irrelevant_findings_may_have_no_rows(folder):
    excluded = folder / "annotations_excluded.csv"
    excluded.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    found = read_references(folder)
    assert set(found.findings) == {"1.2", "1.3"} and all(of.counts.all() for of in found.findings.values())
    for text in ("", "seriesuid,coordX,coordY\n"):  # the columns must be there
        excluded.write_text(text)
        with pytest.raises(BadInput, match=r"annotations_excluded\.csv: must have rows with the columns"):
            read_references(folder)
    (folder / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    with pytest.raises(BadInput, match=r"annotations\.csv: .*found no rows"):
        read_references(folder)


def test_classes_are_read(folder):
    table = "seriesuid,coordX,coordY,coordZ,class,probability\n1.2,1,1,1,1,0.5\n1.2,2,1,1,0,0.4\n"
    (folder / "candidates.csv").write_text(table)
    assert read_candidates(folder / "candidates.csv", read_references(folder))["1.2"].classes.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("seriesuid,coordX,coordY,coordZ\n1.2,1,2,3\n", ["probability", "found the columns seriesuid, coordX, coordY, coordZ"]),
        ("seriesuid,coordX,coordY,coordZ,probability\n", ["found no rows"]),
        (CANDIDATES + "1.2,1,2,3,nan\n1.2,x,2,3,0.5\n", ["line 4, probability: 'nan'", "line 5, coordX: 'x'"]),
        (CANDIDATES + "1.2,1,2,3,\n", ["line 4, probability: ''"]),
        (CANDIDATES + "1.2,1,2,3\n", ["line 4, probability"]),
        (CANDIDATES + "1.2,11,20,30,0.4\n9.9,1,1,1,0.5\n", ["found twice 1.2 at (11.0, 20.0, 30.0)", "found 9.9"]),
        ("seriesuid,coordX,coordY,coordZ,probability,class\n1.2,1,2,3,0.5,2\n", ["class must be 0 or 1"]),
        ("seriesuid,coordX,coordY,coordZ,probability,class\n1.2,1,2,3,0.5,1\n1.2,1,2,4,0.5,\n", ["class must be 0 or 1"]),
    ],
)
def test_a_bad_table_of_candidates_is_refused(folder, table, words):
    (folder / "candidates.csv").write_text(table)
    with pytest.raises(BadInput) as caught:
        read_candidates(folder / "candidates.csv", read_references(folder))
    for word in words:
        assert word in str(caught.value)
    assert str(folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("annotations.csv", ANNOTATIONS.replace("diameter_mm", "size"), "diameter_mm"),
        ("annotations.csv", ANNOTATIONS.replace("6.5", "-1"), "diameter_mm must be > 0"),
        ("annotations.csv", ANNOTATIONS.replace("6.5", "inf"), "finite"),
        ("seriesuids.csv", "1.2\n1.2\n", "found twice 1.2"),
        ("seriesuids.csv", "\n", "found none"),
    ],
)
def test_bad_references_are_refused(folder, name, text, word):
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=word):
        read_references(folder)


def test_label_maps_as_findings_and_candidates():
    # Voxels of 1x1x2 mm whose axes run to the left, to the back and up, as in most CTs: LPS world positions grow with them.
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[:3, 3] = (100, 50, -20)
    array = np.zeros((1, 20, 20, 10), dtype=np.uint8)
    array[0, 2:5, 2:5, 2:4] = 1  # 18 voxels of 2 mm^3, centre (3, 3, 2.5)
    array[0, 10, 10, 5] = 1
    volume = Volume(array, Grid((20, 20, 10), affine))
    findings = findings_of(volume)
    np.testing.assert_allclose(findings.at_N3, [[-97, -47, -15], [-90, -40, -10]])
    assert findings.radius_mm[0] == pytest.approx((36 * 3 / (4 * np.pi)) ** (1 / 3))
    assert candidates_of(volume).probability.tolist() == [1, 1]
    empty = Volume(np.zeros_like(array), volume.grid)
    assert len(findings_of(empty).at_N3) == len(candidates_of(empty).at_N3) == 0


def test_what_is_no_table_is_refused(folder):
    (folder / "candidates.csv").write_bytes(b"\x1f\x8b\xff\x00" * 9)
    with pytest.raises(BadInput, match="must be a table"):
        read_candidates(folder / "candidates.csv", read_references(folder))
