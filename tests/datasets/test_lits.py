"""LiTS in every public naming."""

import gzip

import numpy as np
import pytest

from volssl.archive import read_image, read_label, write_nifti
from volssl.datasets import open_dataset
from volssl.files import BadInput
from volssl.intake import take_case
from volssl.phantom import write_labelled
from volssl.phantom_sets import LITS_NAMINGS, write_lits

LITS = {"labels": {"liver": 1, "tumour": 2}, "regions": {"liver": (1, 2), "tumour": (2,)}}


@pytest.mark.parametrize("naming", LITS_NAMINGS)
def test_every_naming_is_read(tmp_path, naming):
    root = write_lits(tmp_path / "data", naming=naming, cases=2, size_vox=24)
    table = open_dataset(root, "lits" if naming == "msd" else None)
    assert (table.labels, table.regions, table.channels) == (LITS["labels"], LITS["regions"], ("CT",))
    assert [case.case_id for case in table.cases] == (["liver_0", "liver_1"] if naming == "msd" else ["volume-0", "volume-1"])
    assert [take_case(case, table).notes for case in table.cases] == [(), ("label holds no tumour",)]


def test_numbered_files_in_ct_and_seg(tmp_path):
    root = write_lits(tmp_path / "data", naming="ct_seg", cases=2, size_vox=24)
    for path in root.rglob("*.nii"):
        path.rename(path.with_name(path.name.rpartition("-")[2]))
    assert [(case.images[0].parent.name, case.label.parent.name) for case in open_dataset(root).cases] == [("CT", "seg")] * 2


def test_packed_files(tmp_path):
    root = write_lits(tmp_path / "data", cases=2, size_vox=24)
    for path in list(root.glob("*.nii")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    table = open_dataset(root)
    assert [case.case_id for case in table.cases] == ["volume-0", "volume-1"] and take_case(table.cases[0], table).notes == ()


def test_what_is_missing_is_named(tmp_path):
    root = write_lits(tmp_path / "data", cases=3, size_vox=24)
    (root / "volume-1.nii").unlink()
    (root / "test-volume-7.nii").touch()  # the test batch has no labels and does not count
    with pytest.raises(BadInput, match=r"1 fault.*\n.*volume-1: file must exist; volume-1.nii is missing"):
        open_dataset(root)


def test_a_decathlon_folder_of_another_organ_is_refused(tmp_path):
    root = write_labelled(tmp_path / "data", cases=1, size_vox=24)
    text = (root / "dataset.json").read_text().replace("liver", "spleen")
    (root / "dataset.json").write_text(text)
    with pytest.raises(BadInput, match="Task03_Liver"):
        open_dataset(root, "lits")


def test_real_ct_written_out_as_lits(real_data, tmp_path):
    source = real_data / "abdomen_ct" / "TotalSegmentator_example"
    image, seg = read_image(source / "example_ct.nii.gz"), read_label(source / "example_seg_fast_force_split.nii.gz")
    write_nifti(tmp_path / "volume-0.nii", image.array_CXYZ[0], image.grid, np.int16)
    write_nifti(tmp_path / "segmentation-0.nii", seg.array_CXYZ[0] == 5, seg.grid, np.uint8)
    table = open_dataset(tmp_path)
    taken = take_case(table.cases[0], table)
    hu = taken.image.array_CXYZ[0][taken.label.array_CXYZ[0] == 1]
    assert taken.notes == ("label holds no tumour",)
    assert 20 < np.median(hu) < 160  # liver, with or without contrast medium: the label lies on it
