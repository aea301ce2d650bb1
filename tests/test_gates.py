"""Verdicts by codes and by values."""

import numpy as np
import pytest

from volssl import archive
from volssl.files import BadInput
from volssl.gates import Gates, contradiction, is_label_map, modality_of


def noisy(low, high):
    return np.random.default_rng(0).integers(low, high, (1, 12, 12, 12))


def test_modality_is_told_from_values():
    assert modality_of(noisy(-1024, 1500)) == "CT"
    assert modality_of(noisy(-3024, 1500)) == "CT"
    assert modality_of(noisy(0, 1_700_000)) == "MR"
    assert modality_of(noisy(-40, 800)) == "MR"
    assert modality_of(noisy(-600, 30_000)) == ""
    assert modality_of(noisy(-32768, 1500)) == ""


def test_label_maps_are_told_from_images_of_few_grey_levels():
    blocks = np.kron(np.random.default_rng(0).integers(0, 5, (3, 3, 3)), np.ones((4, 4, 4), dtype=int))
    assert is_label_map(blocks)
    assert is_label_map(blocks.astype(np.float32))
    assert not is_label_map(blocks * 0.5)
    assert not is_label_map(blocks - 1)
    assert not is_label_map(noisy(0, 100)[0])


def test_real_hippocampus_images_are_no_label_maps(real_data, tmp_path):
    images = sorted((real_data / "brain_mr/Task04_Hippocampus/imagesTr").iterdir())[:40]
    labels = sorted((real_data / "brain_mr/Task04_Hippocampus/labelsTr").iterdir())[:40]
    assert not [path.name for path in images if is_label_map(archive.read_image(path).array_CXYZ[0])]
    assert all(is_label_map(archive.read_image(path).array_CXYZ[0]) for path in labels)


def test_verdict_is_that_of_the_worst_code():
    gates = Gates()
    assert gates.verdict([]) == "accept"
    assert gates.verdict(["derived"]) == "accept"
    assert gates.verdict(["gantry_tilt", "derived"]) == "repair"
    assert gates.verdict(["gantry_tilt", "missing_slice"]) == "reject"
    assert gates.verdict(["a_code_nobody_knows"]) == "reject"


def test_derived_images_are_a_setting():
    assert [Gates(derived=how).verdict(["derived"]) for how in ("auto", "accept", "reject")] == ["accept", "accept", "reject"]
    assert [Gates(derived=how).verdict(["secondary"]) for how in ("auto", "accept", "reject")] == ["reject", "accept", "reject"]
    with pytest.raises(BadInput, match="derived: must be one of"):
        Gates(derived="maybe")


@pytest.mark.parametrize(
    "bad", [{"min_slices": 0}, {"position_mm": -1.0}, {"validation_share": 1.0}, {"content": "x"}, {"patient_pattern": "("}]
)
def test_settings_are_checked(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        Gates(**bad)


def test_values_that_contradict_the_modality():
    assert contradiction("CT", noisy(0, 4000)) == "modality_mismatch"
    assert contradiction("CT", noisy(-1024, 1500)) == ""
    assert contradiction("MR", noisy(-1024, 1500)) == "modality_mismatch"
    assert contradiction("MR", noisy(-30, 1500)) == ""
    assert contradiction("PT", np.full((3, 4, 4), 7)) == "constant"


def test_patients_of_files_by_their_path(tmp_path):
    assert Gates().patient_of(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz") == "sub-01"
    assert Gates().patient_of(tmp_path / "a.nii.gz") == str(tmp_path / "a.nii.gz")
    assert Gates(patient_pattern=r"(patient\d+)/").patient_of(tmp_path / "patient19/T1.nii.gz") == "patient19"
    assert Gates(patient_pattern="").patient_of(tmp_path / "sub-01_T1w.nii.gz").endswith("T1w.nii.gz")
