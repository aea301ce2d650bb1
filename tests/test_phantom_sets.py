"""The phantom data sets: names and values of the public data, and the awkward cases that they promise."""

import csv

import numpy as np
import pytest

from volssl.archive import read_image, read_label
from volssl.files import BadInput
from volssl.phantom_luna import LPS, write_luna16, write_mhd
from volssl.phantom_sets import BRATS_YEARS, LITS_NAMINGS, write_brats, write_lits
from volssl.volume import Grid


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    return write_luna16(tmp_path_factory.mktemp("luna") / "data")


def values(path):
    return set(np.unique(read_label(path).array_CXYZ).tolist())


def rows(path):
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize("year", BRATS_YEARS)
def test_brats_holds_its_values_and_a_case_without_enhancing_tumour(tmp_path, year):
    root = write_brats(tmp_path / "data", year=year, patients=3, size_vox=32)
    labels = sorted(path for path in root.rglob("*.nii*") if "seg" in path.name.lower())
    found = [values(path) for path in labels]
    et = 3 if year == 2023 else 4
    assert {0, 1, 2, et} in found and {0, 1, 2} in found
    assert len(labels) == (4 if year in (2018, 2019, 2023) else 3)
    images = [path for path in root.rglob("*.nii*") if path not in labels]
    assert len(images) == 4 * len(labels)
    one = read_image(images[0])
    assert (one.array_CXYZ == 0).any() and one.array_CXYZ.max() > 300  # skull-stripped


def test_the_contrasts_show_the_tumour_as_mr_does(tmp_path):
    root = write_brats(tmp_path / "data", patients=2)
    case = root / "BraTS2021_00000"
    label = read_label(case / "BraTS2021_00000_seg.nii.gz").array_CXYZ[0]

    def mean(contrast, value):
        return read_image(case / f"BraTS2021_00000_{contrast}.nii.gz").array_CXYZ[0][label == value].mean()

    assert mean("t1ce", 4) > 1.5 * mean("t1", 4)  # it takes up contrast medium
    assert mean("flair", 2) > 1.5 * mean("flair", 1)  # oedema is bright
    assert mean("t1ce", 1) < 0.5 * mean("t1ce", 4)


@pytest.mark.parametrize("naming", LITS_NAMINGS)
def test_lits_holds_liver_and_tumour_and_a_liver_without(tmp_path, naming):
    root = write_lits(tmp_path / "data", naming=naming, cases=3, size_vox=40)
    labels = sorted(path for path in root.rglob("*.nii*") if "segmentation" in path.name or "labelsTr" in path.parts)
    assert [values(path) for path in labels] == [{0, 1, 2}, {0, 1}, {0, 1, 2}]


def test_luna_annotations_lie_in_their_masks(luna):
    annotations = rows(luna / "annotations.csv")
    masks = {path.name.removesuffix(".nii.gz"): read_label(path) for path in (luna / "nodule_masks").iterdir()}
    assert sorted(int(mask.array_CXYZ.max()) for mask in masks.values()) == [0, 1, 1, 1]
    assert len(annotations) == 4
    for row in annotations:
        mask = masks[row["seriesuid"]]
        at = mask.grid.voxels(LPS * np.array([[float(row[f"coord{axis}"]) for axis in "XYZ"]]))[0]
        assert mask.array_CXYZ[0][tuple(np.rint(at).astype(int))] == 1
        image = next(luna.glob(f"subset*/{row['seriesuid']}.mhd"))
        assert read_image(image).grid.almost_equal(mask.grid)
    (excluded,) = rows(luna / "evaluationScript" / "annotations" / "annotations_excluded.csv")
    assert excluded["diameter_mm"] == "-1"


def test_candidates_hold_every_nodule_and_more_of_the_rest(luna):
    candidates = rows(luna / "candidates_V2.csv")
    places = {tuple(row[f"coord{axis}"] for axis in "XYZ") for row in candidates if row["class"] == "1"}
    assert places == {tuple(row[f"coord{axis}"] for axis in "XYZ") for row in rows(luna / "annotations.csv")}
    assert sum(row["class"] == "0" for row in candidates) == 4 * 12 + 1
    # The place within a voxel tells nothing of the class.
    others = np.array([float(row["coordX"]) for row in candidates if row["class"] == "0"])
    assert len(np.unique(np.round(others % 2.5, 3))) > 20


@pytest.mark.parametrize("packed", [False, True])
def test_metaimage_round_trip_of_flipped_axes(tmp_path, packed):
    affine = np.diag([0.7, -0.7, 1.25, 1.0])
    affine[:3, 3] = (-20, 31, -44)
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    write_mhd(tmp_path / "a.mhd", array, Grid((2, 3, 4), affine), packed=packed)
    back = read_image(tmp_path / "a.mhd")
    assert np.array_equal(back.array_CXYZ[0], array)
    assert back.grid.almost_equal(Grid((2, 3, 4), affine), tolerance_mm=1e-4)


def test_what_cannot_be_made_is_refused(tmp_path):
    for call in (
        lambda out: write_brats(out, year=2017),
        lambda out: write_lits(out, naming="other"),
        lambda out: write_luna16(out, scans=1),
    ):
        with pytest.raises(BadInput, match="phantom"):
            call(tmp_path / "out")
    assert not (tmp_path / "out").exists()
