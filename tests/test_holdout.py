"""Who is in which share of a study, and copies that must not lie in two."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from labelled import write_msd

from volssl.archive import read_image, write_nifti
from volssl.datasets import Case, CaseTable, open_dataset
from volssl.files import BadInput, write_csv
from volssl.holdout import Shares, Split, content_hash, divided, foreign_overlaps, known_images, overlaps, seen_of
from volssl.volume import Grid, Volume

SPLIT = Split(pretrain=5, validation=2, test=3, seed=0)


def table_of(names, patients=None):
    cases = [Case(name, (patients or {}).get(name, name), (Path(name),), Path(name)) for name in names]
    return CaseTable(tuple(sorted(cases, key=lambda case: case.case_id)), {"a": 1}, ("x",))


NAMES = [f"c{i:02d}" for i in range(12)]


def test_shares_depend_on_names_alone_and_are_apart():
    (first,), (again,) = divided(table_of(NAMES), SPLIT, 1), divided(table_of(NAMES[::-1]), SPLIT, 1)
    assert first == again
    names = first.names()
    assert [len(names[part]) for part in ("pretrain", "validation", "test")] == [5, 2, 3]
    assert len({name for part in names.values() for name in part}) == 10
    assert divided(table_of(NAMES), replace(SPLIT, seed=1), 1)[0].names() != names


def test_a_patient_is_on_one_side_and_folds_test_others():
    table = table_of([f"{name}{side}" for name in NAMES for side in "ab"], {f"{name}{side}": name for name in NAMES for side in "ab"})
    folds = divided(table, SPLIT, 4)
    tests = [{case.patient_id for case in fold.test} for fold in folds]
    assert all(len(test) == 3 for test in tests) and len(set.union(*tests)) == 12
    for fold in folds:
        sides = [{case.patient_id for case in getattr(fold, part)} for part in ("pretrain", "validation", "test")]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 10
        assert len(fold.pretrain) == 10


def test_development_leaves_the_test_share_alone():
    table = table_of([f"{name}{side}" for name in NAMES for side in "ab"], {f"{name}{side}": name for name in NAMES for side in "ab"})
    whole, parts = divided(table, SPLIT, 2), divided(table, replace(SPLIT, develop=2), 2)
    for before, now in zip(whole, parts, strict=True):
        assert now.test == before.validation and len(now.validation) == 4 and len(now.pretrain) == 6
        assert {*now.pretrain, *now.validation} == set(before.pretrain)
        assert max(case.patient_id for case in now.pretrain) < min(case.patient_id for case in now.validation)
    with pytest.raises(BadInput, match=r"split.develop: must be below the 5 patients"):
        divided(table, replace(SPLIT, develop=5), 1)
    with pytest.raises(BadInput, match="develop must be"):
        replace(SPLIT, develop=-1)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(BadInput, match="at most the 12 patients of the data; found 13"):
        divided(table_of(NAMES), replace(SPLIT, pretrain=8), 1)
    with pytest.raises(BadInput, match="folds x split.test"):
        divided(table_of(NAMES), SPLIT, 5)
    with pytest.raises(BadInput, match=">= 1 patients"):
        Split(pretrain=0, validation=1, test=1)


def test_a_table_may_name_the_parts(tmp_path):
    parts = dict(zip(NAMES, ["train"] * 6 + ["valid"] * 2 + ["test"] * 3, strict=False))
    write_csv(tmp_path / "s.csv", [{"case": case, "fold": part} for case, part in parts.items()], ("case", "fold"))
    (shares,) = divided(table_of(NAMES), Split(file=str(tmp_path / "s.csv")), 1)
    assert shares.names() == {"pretrain": NAMES[:6], "validation": NAMES[6:8], "test": NAMES[8:11]}
    write_csv(tmp_path / "s.csv", [{"case": "c00", "fold": "train"}, {"case": "c01", "fold": "valid"}], ("case", "fold"))
    with pytest.raises(BadInput, match="found 1, 1 and 0"):
        divided(table_of(NAMES), Split(file=str(tmp_path / "s.csv")), 1)


@pytest.fixture
def with_copy(tmp_path):
    """A folder whose last case holds the image of the first, in another file format and type."""
    root = write_msd(tmp_path / "data", cases=4)
    table = open_dataset(root)
    source = table.cases[0]
    seen, _ = seen_of(table, [source])

    def place(factor):
        image = read_image(source.images[0])
        array = (image.array_CXYZ[0].astype(np.float64) * factor)[::-1]
        affine = image.grid.affine @ np.diag([-1.0, 1, 1, 1])
        affine[:3, 3] = image.grid.affine[:3, 3] + image.grid.affine[:3, 0] * (image.grid.shape_vox[0] - 1)
        target = table.cases[3]
        flipped = Grid(image.grid.shape_vox, affine)
        write_nifti(root / "imagesTr" / "other.nii", array, flipped, np.float32)
        write_nifti(target.label, np.ones(flipped.shape_vox), flipped, np.uint8)
        values = json.loads((root / "dataset.json").read_text())
        values["training"][3]["image"] = "imagesTr/other.nii"
        (root / "dataset.json").write_text(json.dumps(values))
        return root, source.case_id, target.case_id

    return place, seen


@pytest.mark.parametrize("factor, how", [(1.0, "the same values;"), (2.5, "to within rounding")])
def test_a_copy_under_another_name_type_and_orientation_is_found(with_copy, factor, how):
    place, seen_before = with_copy
    root, original, _ = place(factor)
    table = open_dataset(root)
    seen, complaints = seen_of(table, table.cases)
    assert not complaints
    assert (seen["other"].hashes == seen_before[original].hashes) == (factor == 1.0)
    by_name = {case.case_id: case for case in table.cases}
    apart = Shares((by_name[original],), (by_name["case_1"],), (by_name["other"], by_name["case_2"]))
    (told,) = overlaps(apart, seen)
    assert how in told and original in told and "other" in told
    assert not overlaps(Shares((by_name[original], by_name["other"]), (by_name["case_1"],), (by_name["case_2"],)), seen)


def test_a_bundle_that_saw_a_test_case_is_told(tmp_path):
    table = open_dataset(write_msd(tmp_path / "data", cases=3))
    seen, _ = seen_of(table, table.cases)
    shares = Shares(table.cases[:1], table.cases[1:2], table.cases[2:])
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    assert known_images(tmp_path / "run", None) is None
    write_csv(tmp_path / "run" / "bundle" / "images.csv", [{"content_hash": seen["case_2"].hashes[0]}], ["content_hash"])
    known = known_images(tmp_path / "run", None)
    assert known is not None and known_images(tmp_path / "run" / "bundle", None) == known
    (told,) = foreign_overlaps(shares, seen, known, "given")
    assert "test" in told and "case_2" in told
    write_csv(tmp_path / "odd.csv", [{"a": 1}], ["a"])
    with pytest.raises(BadInput, match="content_hash"):
        known_images(tmp_path / "run", tmp_path / "odd.csv")


def test_one_voxel_changes_the_hash():
    grid = Grid((3, 4, 5), np.eye(4))
    array = np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5)
    other = array.copy()
    other[0, 2, 3, 4] += 1
    assert content_hash(Volume(array, grid)) == content_hash(Volume(array.astype(np.float32), grid)) != content_hash(Volume(other, grid))
