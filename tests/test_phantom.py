"""Phantoms: anatomy where it belongs, files that other readers understand, and nothing but (seed, patient) in them."""

import json

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from volssl import phantom
from volssl.anatomy import LESION, LIVER, draw_patient
from volssl.archive import read_image, read_label
from volssl.dicom_write import write_dicom_series
from volssl.files import BadInput
from volssl.torso import paint
from volssl.volume import Grid

SIZE = 40


def ras_grid(step_mm: float) -> Grid:
    shape = tuple(round(reach / step_mm) for reach in (400, 320, 330))
    affine = np.diag([step_mm] * 3 + [1.0])
    affine[:3, 3] = (-200, -185, -158)
    return Grid(shape, affine)


@pytest.fixture(scope="module")
def torso():
    grid = ras_grid(6.0)
    return grid, *paint(draw_patient(0, 2), grid)


def test_liver_is_on_the_right_below_the_lungs(torso):
    grid, hu, labels = torso
    mm = {value: grid.world(np.argwhere(labels == value)) for value in (LIVER, LESION)}
    lungs_mm = grid.world(np.argwhere((hu < -750) & (hu > -950)))
    lungs_mm = lungs_mm[lungs_mm[:, 1] > -90]  # without the foam of the table
    assert mm[LIVER][:, 0].mean() > 30
    assert mm[LIVER][:, 2].mean() < -20 < 20 < lungs_mm[:, 2].mean()
    assert abs(lungs_mm[:, 0].mean()) < 20
    litres = len(mm[LIVER]) * 6.0**3 / 1e6
    assert 0.7 < litres < 2.2


def test_densities_are_those_of_tissue(torso):
    _, hu, labels = torso
    liver_hu = hu[labels == LIVER]
    assert 45 < np.median(liver_hu) < 125
    assert (hu == -1000).mean() > 0.2  # air around
    assert (hu > 300).mean() > 0.005  # bone
    assert hu.min() >= -1100
    assert hu.max() < 1200


def test_lesions_are_darker_than_the_liver():
    found = 0
    for patient in range(4):
        hu, labels = paint(draw_patient(0, patient), ras_grid(6.0))
        if (labels == LESION).sum() > 20:
            found += 1
            assert np.median(hu[labels == LESION]) < np.median(hu[labels == LIVER]) - 25
    assert found >= 2


def test_labels_depend_on_the_place_and_not_on_the_grid():
    patient = draw_patient(5, 1)
    _, coarse = paint(patient, ras_grid(10.0))
    _, fine = paint(patient, ras_grid(5.0))
    assert (fine[::2, ::2, ::2] == coarse).all()


def test_patients_are_a_function_of_seed_and_number():
    grid = ras_grid(10.0)
    one, again, other = (paint(draw_patient(*key), grid)[0] for key in ((0, 1), (0, 1), (0, 2)))
    assert (one == again).all()
    assert np.abs(one - other).mean() > 20


def test_archive_holds_each_kind_of_series_and_reads_back(tmp_path):
    phantom.write_archive(tmp_path / "a", patients=5, seed=3, size_vox=SIZE)
    folders = sorted(path for path in (tmp_path / "a").glob("*/*"))
    assert len(folders) == 6  # patient 2 has two series
    codes = set()
    for index, (patient, number) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]):
        series = phantom._series_of(3, patient, SIZE)[number]
        hu, _ = phantom.scan(3, patient, number, series)
        volume = read_image(folders[index]).reoriented("RAS")
        grid = series.grid.reoriented("RAS")
        assert volume.grid.almost_equal(grid, tolerance_mm=1e-3)
        axes = [(old, sign) for old, sign in series.grid.turn("RAS")]
        wanted = hu.transpose([old for old, _ in axes])[tuple(slice(None, None, sign) for _, sign in axes)]
        assert (volume.array_CXYZ[0] == wanted).all()
        codes.add(series.grid.orientation)
    assert len(codes) == 3


def test_dicom_reads_with_another_reader(tmp_path):
    rng = np.random.default_rng(0)
    array_XYZ = rng.integers(-1024, 3072, (5, 7, 4)).astype(np.int16)
    affine = np.array([[-2.0, 0, 0, 30], [0, -3.0, 0, 20], [0, 0, 4.0, -10], [0, 0, 0, 1]])
    tags = {"PatientID": "X", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2", "PatientName": "MADE^UP"}
    write_dicom_series(tmp_path / "s", array_XYZ, Grid((5, 7, 4), affine), tags=tags)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    assert image.GetSpacing() == (2.0, 3.0, 4.0)
    assert image.GetOrigin() == (-30.0, -20.0, -10.0)  # LPS
    assert (sitk.GetArrayFromImage(image).transpose(2, 1, 0) == array_XYZ).all()
    first = pydicom.dcmread(tmp_path / "s" / "IM00001.dcm")
    assert first.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert list(first.PixelSpacing) == [3.0, 2.0]
    assert (first.pixel_array.T + float(first.RescaleIntercept) == array_XYZ[:, :, 0]).all()


def test_dicom_without_its_identifiers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="StudyInstanceUID"):
        write_dicom_series(tmp_path, np.zeros((2, 2, 2)), Grid((2, 2, 2), np.eye(4)), tags={"PatientID": "X"})


@pytest.mark.parametrize("layout", ["msd", "nnunet"])
def test_labelled_cases_lie_in_the_named_layout(tmp_path, layout):
    out = phantom.write_labelled(tmp_path / "d", cases=2, seed=0, layout=layout, size_vox=SIZE, tests=1)
    told = json.loads((out / "dataset.json").read_text())
    assert told["numTraining"] == 2
    suffix = "_0000" if layout == "nnunet" else ""
    for part, number in (("Tr", 1), ("Tr", 2), ("Ts", 3)):
        image = read_image(out / f"images{part}" / f"phantom_{number:03d}{suffix}.nii.gz")
        label = read_label(out / f"labels{part}" / f"phantom_{number:03d}.nii.gz")
        assert image.grid.almost_equal(label.grid)
        assert set(np.unique(label.array_CXYZ)) <= {0, LIVER, LESION}
        assert (label.array_CXYZ == LIVER).any()
    header = nibabel.load(out / "labelsTr" / "phantom_001.nii.gz").header
    assert bytes(header["descrip"]).strip(b"\0") == b""


def test_wrong_arguments_are_answered(tmp_path):
    with pytest.raises(BadInput, match="layout"):
        phantom.write_labelled(tmp_path / "d", cases=1, layout="bids")
    with pytest.raises(BadInput, match="patients must be >= 1"):
        phantom.write_archive(tmp_path / "a", patients=0)


def test_organs_are_marked_beside_the_liver_and_change_nothing_else():
    series = phantom._series_of(0, phantom.FIRST_LABELLED, 48)[0]
    plain_hu, plain = phantom.scan(0, phantom.FIRST_LABELLED, 0, series)
    hu, labels = phantom.scan(0, phantom.FIRST_LABELLED, 0, series, organs=True)
    assert (hu == plain_hu).all() and (plain[labels < 3] == labels[labels < 3]).all() and (plain[labels > 2] == 0).all()
    litres = {value: (labels == value).sum() * np.prod(series.grid.spacing_mm) / 1e6 for value in (1, 3, 4)}
    assert 0.7 < litres[1] < 2 and 0.1 < litres[3] < 0.5 and 0.005 < litres[4] < 0.06
    assert abs(np.median(hu[labels == 4]) - 8) < 25  # bile
