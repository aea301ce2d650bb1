"""Facts of one series or file; the rest is tried in test_damage.py and test_real_archive.py."""

from pathlib import Path

import numpy as np
import pytest
from conftest import body_phantom

from volssl import archive, dicom, examine
from volssl.dicom_write import write_dicom_series
from volssl.examine import examine_file, examine_series
from volssl.gates import Gates


def test_a_dicom_series_and_its_nifti_twin_have_one_print(tmp_path, phantom):
    array, grid = phantom
    tags = {"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
    write_dicom_series(tmp_path / "series", array, grid, tags=tags)
    archive.write_nifti(tmp_path / "x.nii.gz", array, grid, np.float32)
    (one,) = examine_series(Gates(), [dicom.header(path) for path in sorted((tmp_path / "series").iterdir())])
    (two,) = examine_file(Gates(), tmp_path / "x.nii.gz")
    (print_one,) = one.prints
    print_two = next(found for found in two.prints if found.axis == print_one.axis)
    np.testing.assert_allclose(print_one.means, print_two.means, atol=1e-5)
    assert one.digest != two.digest


@pytest.mark.parametrize("content", ["slices", "none"])
def test_content_none_touches_no_pixels(tmp_path, phantom, monkeypatch, content):
    tags = {"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
    write_dicom_series(tmp_path, *phantom, tags=tags)
    slices = [dicom.header(path) for path in sorted(tmp_path.iterdir())]
    looked: list[Path] = []
    decode = examine.read_slice
    monkeypatch.setattr(examine, "read_slice", lambda one: looked.append(one.path) or decode(one))
    (facts,) = examine_series(Gates(content=content), slices)
    assert len(looked) == (4 if content == "slices" else 0)
    assert bool(facts.prints) == (content == "slices")
    assert facts.reasons == ()


def test_files_of_one_folder_and_grid_share_a_place(tmp_path, phantom):
    _, grid = phantom
    for number, folder in enumerate(["a", "a", "b"]):
        (tmp_path / folder).mkdir(exist_ok=True)
        archive.write_nifti(tmp_path / folder / f"{number}.nii.gz", body_phantom(seed=number), grid, np.int16)
    one, two, three = (examine_file(Gates(), path)[0].place for path in sorted(tmp_path.rglob("*.gz")))
    assert one == two != three


def test_what_nobody_foresaw_costs_one_series_and_tells_no_text(tmp_path, phantom, monkeypatch, caplog):
    tags = {"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
    write_dicom_series(tmp_path, *phantom, tags=tags)

    def odd(*args, **kwargs):
        raise KeyError("Doe^Jane")

    monkeypatch.setattr(examine, "stacks_of", odd)
    (facts,) = examine.examined(Gates(), [dicom.header(path) for path in sorted(tmp_path.iterdir())])
    assert facts.failure == "unexpected_error"
    assert len(facts.source.files) == 12
    assert "KeyError at test_examine.py" in caplog.text
    assert "Doe" not in caplog.text
