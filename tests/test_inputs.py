"""What predict is given: DICOM goes through the gates of the index, channels are gathered, and tables tell no path."""

import numpy as np
import pydicom
import pytest

from volssl.archive import write_nifti
from volssl.dicom_write import uid, write_dicom_series
from volssl.files import BadInput
from volssl.inputs import gather
from volssl.volume import Grid

GRID = Grid((12, 10, 8), np.diag([-1.0, -1.0, 2.5, 1.0]))


def series(folder, name="one", seed=0, shape=None):
    hu = np.random.default_rng(seed).integers(-900, 900, GRID.shape_vox)
    tags = {"PatientID": "Doe", "StudyInstanceUID": uid("study"), "SeriesInstanceUID": uid(name), "FrameOfReferenceUID": uid("frame")}
    write_dicom_series(folder, hu, GRID, tags=tags)
    return hu


def test_a_sound_series_is_an_item_and_its_file_stands_for_it(tmp_path):
    hu = series(tmp_path / "in")
    for given in (tmp_path / "in", tmp_path / "in" / "IM00003.dcm"):
        (item,), failures = gather([given], channels=1)
        assert not failures
        assert (item.name, item.shown, item.repairs) == (None, "DICOM series 1", [])
        np.testing.assert_array_equal(item.read().array_CXYZ[0], hu)


def test_what_the_index_rejects_is_refused_with_its_reason(tmp_path):
    series(tmp_path / "in" / "gap", "gap")
    (tmp_path / "in" / "gap" / "IM00004.dcm").unlink()
    series(tmp_path / "in" / "Doe_scout", "scout")
    for file in (tmp_path / "in" / "Doe_scout").iterdir():
        data = pydicom.dcmread(file)
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        data.save_as(file)
    series(tmp_path / "in" / "sound", "sound")
    items, failures = gather([tmp_path / "in"], channels=1)
    assert len(items) == 1
    reasons = sorted(row["reason"] for row in failures)
    assert reasons[0].startswith("localiser: A scout view")
    assert reasons[1].startswith("missing_slice: Between two")
    assert "Doe" not in str(failures) and str(tmp_path) not in str(failures)


def test_what_can_be_mended_is_mended_and_said(tmp_path):
    series(tmp_path / "in")
    for file in (tmp_path / "in").iterdir():
        data = pydicom.dcmread(file)
        data.ImagePositionPatient[1] += 0.2 * data.ImagePositionPatient[2]
        data.save_as(file)
    (item,), failures = gather([tmp_path / "in"], channels=1)
    assert not failures
    assert item.repairs == ["unshear"]
    assert item.read().grid.shape_vox[1] > GRID.shape_vox[1]  # the upright box around the leaning stack


def test_channels_in_folders_of_their_own(tmp_path):
    both = [series(tmp_path / "in" / f"case_{channel:04d}", f"c{channel}", seed=channel) for channel in range(2)]
    (item,), failures = gather([tmp_path / "in"], channels=2)
    assert not failures
    np.testing.assert_array_equal(item.read().array_CXYZ, np.stack(both))
    assert len(item.series) == 2
    assert item.series[0].files[0].parent.name == "case_0000"
    items, _ = gather([tmp_path / "in"], channels=1)  # to a model of one channel they are two scans
    assert len(items) == 2


def test_a_file_beside_the_series_is_another_item(tmp_path):
    series(tmp_path / "in")
    write_nifti(tmp_path / "in" / "other.nii.gz", np.zeros(GRID.shape_vox, np.int16), GRID, np.int16)
    items, _ = gather([tmp_path / "in"], channels=1)
    assert [item.name for item in items] == [None, "other"]


def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="found nothing at"):
        gather([tmp_path / "absent"], channels=1)
    (tmp_path / "text").write_text("no image")
    items, _ = gather([tmp_path / "text"], channels=1)
    with pytest.raises(BadInput, match="another kind of file"):
        items[0].read()


NAMINGS = {
    "old": ("_t1", "_t1ce", "_t2", "_flair", "_seg"),
    "new": ("-t1n", "-t1c", "-t2w", "-t2f", "-seg"),
    "nnunet": ("_0000", "_0001", "_0002", "_0003", ""),
}


def contrasts(folder, case, endings):
    for value, ending in enumerate(endings):
        write_nifti(folder / case / f"{case}{ending}.nii.gz", np.full(GRID.shape_vox, value + 1, np.int16), GRID, np.int16)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_brats_case_by_any_of_its_names(tmp_path, naming):
    *images, label = NAMINGS[naming]
    contrasts(tmp_path / "in", "BraTS-GLI-00000-000", [*images, label] if label else images)
    contrasts(tmp_path / "in", "other", images)
    items, failures = gather([tmp_path / "in"], channels=4, names=("t1", "t1ce", "t2", "flair"))
    assert [item.name for item in items] == ["BraTS-GLI-00000-000", "other"] and not failures
    for item in items:
        assert item.read().array_CXYZ[:, 0, 0, 0].tolist() == [1, 2, 3, 4]


def test_a_brats_case_that_is_not_whole_is_named_with_what_was_found(tmp_path):
    contrasts(tmp_path / "in", "lacking", ("_t1", "_t2", "_flair"))
    contrasts(tmp_path / "in", "mixed", ("_t1", "_t1ce", "_t2", "_flair", "-t1n"))
    items, _ = gather([tmp_path / "in"], channels=4, names=("t1", "t1ce", "t2", "flair"))
    for item, found in zip(items, ("t1, t2, flair", "t1, t1, t1ce, t2, flair"), strict=True):
        with pytest.raises(BadInput, match=f"contrasts t1, t1ce, t2, flair, each once; found {found}$"):
            item.read()
    # A model of other channels knows no such names.
    items, _ = gather([tmp_path / "in" / "lacking"], channels=4, names=("a", "b", "c", "d"))
    assert [item.name for item in items] == ["lacking_flair", "lacking_t1", "lacking_t2"]
