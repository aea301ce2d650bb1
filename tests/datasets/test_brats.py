"""BraTS in every public naming, and what is wrong with a folder."""

import shutil

import pytest

from volssl.archive import read_image
from volssl.datasets import Data, open_dataset
from volssl.datasets.brats import patient_of
from volssl.files import BadInput
from volssl.intake import take_case
from volssl.phantom_sets import BRATS_YEARS, write_brats


@pytest.mark.parametrize("year", BRATS_YEARS)
def test_every_year_is_recognised_and_read(tmp_path, year):
    table = open_dataset(write_brats(tmp_path / "data", year=year, patients=3, size_vox=24))
    et = 3 if year == 2023 else 4
    assert table.channels == ("t1", "t1ce", "t2", "flair")
    assert table.labels == {"necrosis": 1, "oedema": 2, "enhancing": et}
    assert table.regions == {"WT": (1, 2, et), "TC": (1, et), "ET": (et,)}
    assert len(table.cases) == (4 if year in (2018, 2019, 2023) else 3)
    assert len({case.patient_id for case in table.cases}) == 3
    for case in table.cases:
        taken = take_case(case, table)
        assert taken.image.array_CXYZ.shape[0] == 4
        wanted = "".join(("t1", "t1ce", "t2", "flair")) if year < 2023 else "t1nt1ct2wt2f"
        assert "".join(path.name.split(".")[0].replace("-", "_").rpartition("_")[2] for path in case.images) == wanted


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS-GLI-00000-000", "00000"),
        ("BraTS-GLI-00000-001", "00000"),
        ("BraTS2021_00000", "00000"),
        ("Brats18_TCIA01_147_1", "TCIA01_147"),
        ("BraTS19_TCIA01_147_1", "TCIA01_147"),  # the same patient, published again
        ("Brats18_2013_10_1", "2013_10"),
        ("BraTS19_CBICA_AAB_1", "CBICA_AAB"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
    ],
)
def test_patients_are_told_from_names(case, patient):
    assert patient_of(case) == patient


def test_the_odd_label_of_2020_goes_to_its_case(tmp_path):
    table = open_dataset(write_brats(tmp_path / "data", year=2020, patients=2, size_vox=24))
    odd = next(case for case in table.cases if case.case_id == "BraTS20_Training_355")
    assert odd.label.name == "W39_1998.09.19_Segm.nii"
    assert all(case.label is not None for case in table.cases)


def test_a_flat_folder_is_read(tmp_path):
    root = write_brats(tmp_path / "data", patients=2, size_vox=24)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in root.rglob("*.nii.gz"):
        shutil.move(path, flat)
    assert [case.case_id for case in open_dataset(flat).cases] == ["BraTS2021_00000", "BraTS2021_00002"]


def test_missing_contrasts_are_all_named_and_never_guessed(tmp_path):
    root = write_brats(tmp_path / "data", patients=2, size_vox=24)
    for case, what in (("BraTS2021_00000", "t2"), ("BraTS2021_00002", "flair")):
        (root / case / f"{case}_{what}.nii.gz").unlink()
    with pytest.raises(BadInput, match=r"(?s)2 fault.*00000_t2.nii.gz is missing.*00002_flair.nii.gz is missing"):
        open_dataset(root)
    table = open_dataset(write_brats(tmp_path / "three", patients=3, size_vox=24), data=Data(leave_out=("BraTS2021_00000",)))
    assert [case.case_id for case in table.cases] == ["BraTS2021_00002", "BraTS2021_00003"]


def test_a_case_without_label_is_named(tmp_path):
    root = write_brats(tmp_path / "data", patients=2, size_vox=24)
    (root / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    table = open_dataset(root)
    with pytest.raises(BadInput, match="BraTS2021_00002: must have a label map"):
        take_case(table.cases[1], table)


def test_two_namings_or_a_file_twice_are_refused(tmp_path):
    root = write_brats(tmp_path / "data", patients=2, size_vox=24)
    shutil.copytree(root / "BraTS2021_00000", root / "copy")
    with pytest.raises(BadInput, match=r"(?s)5 file\(s\) are there more than once.*copy/BraTS2021_00000_t1ce"):
        open_dataset(root)
    shutil.rmtree(root / "copy")
    write_brats(root / "new", year=2023, patients=2, size_vox=24)
    with pytest.raises(BadInput, match="must be of one naming"):
        open_dataset(root)


def test_real_glioma_in_brats_naming(real_data, tmp_path):
    source = real_data / "brain_mr_tumour" / "TCGA-DU-7294" / "brats_space"
    case = tmp_path / "LGG" / "Brats18_TCIA10_999_1"
    case.mkdir(parents=True)
    names = {
        "t1": "TCGA-DU-7294_t1",
        "t1ce": "TCGA-DU-7294_t1c",
        "t2": "TCGA-DU-7294_t2",
        "flair": "TCGA-DU-7294_fla",
        "seg": "seg_auto_fusion_mav",
    }
    for what, name in names.items():
        shutil.copy(source / f"{name}.nii.gz", case / f"{case.name}_{what}.nii.gz")
    table = open_dataset(tmp_path)
    taken = take_case(table.cases[0], table)
    assert taken.notes == ("label holds no enhancing",)
    assert taken.image.array_CXYZ.shape == (4, 240, 240, 155)
    flair = read_image(source / "TCGA-DU-7294_fla.nii.gz").array_CXYZ[0]
    oedema = taken.label.array_CXYZ[0] == 2
    assert (taken.image.array_CXYZ[3] == flair).all()
    assert flair[oedema].mean() > 1.3 * flair[flair > 0].mean()  # the fourth channel is FLAIR, and the label lies on the tumour


def test_four_real_modalities_in_the_newer_naming(real_data, tmp_path):
    source = real_data / "brain_mr" / "open_ms_data" / "patient19"
    names = {"t1n": "T1", "t1c": "T1POST", "t2w": "T2", "t2f": "FLAIR", "seg": "lesion_gt"}
    for what, name in names.items():
        shutil.copy(source / f"{name}.nii.gz", tmp_path / f"BraTS-MET-00019-000-{what}.nii.gz")
    table = open_dataset(tmp_path)
    taken = take_case(table.cases[0], table)
    assert taken.image.array_CXYZ.shape == (4, 182, 218, 182)
    assert taken.notes[-1] == "label holds no oedema, no enhancing"
