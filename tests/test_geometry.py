"""One oblique body in every format goes through index and prepare to one volume: left stays left, landmarks stay where they are."""

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_grid

from volssl import archive, index, prepare
from volssl.dicom import LPS_TO_RAS
from volssl.dicom_write import write_dicom_series, write_enhanced_ct
from volssl.store import Store
from volssl.volume import Grid

TAGS = {"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
SHAPE, SPACING = (60, 56, 40), (1.0, 1.0, 1.5)
# Offsets from the body's centre in mm (right, anterior, superior), and HU above the tissue around.
LANDMARKS = {"left": (-15.0, 3.0, 2.0), "right": (14.0, -4.0, -6.0), "front": (2.0, 15.0, 5.0), "top": (-3.0, -2.0, 16.0)}


def body(grid):
    """HU: air, an ellipsoid of tissue, and in it four smooth balls of bone."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_vox], indexing="ij"), -1).reshape(-1, 3)
    centre = grid.world(np.array([[(n - 1) / 2 for n in grid.shape_vox]]))[0]
    away = grid.world(at) - centre
    values = np.where((away**2).sum(1) < 25**2, 40.0, -1000.0)
    for place in LANDMARKS.values():
        values += 900 * np.exp(-((away - place) ** 2).sum(1) / (2 * 2.5**2))
    return np.rint(values).astype(np.int16).reshape(grid.shape_vox), centre


def itk(path, array_XYZ, grid):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_XYZ.T))
    affine = LPS_TO_RAS @ grid.affine
    image.SetSpacing(grid.spacing_mm)
    image.SetDirection((affine[:3, :3] / np.array(grid.spacing_mm)).ravel())
    image.SetOrigin(affine[:3, 3])
    sitk.WriteImage(image, str(path), True)


WRITERS = {
    "dicom": lambda folder, array, grid: write_dicom_series(folder / "series", array, grid, tags=TAGS),
    "enhanced": lambda folder, array, grid: write_enhanced_ct(folder / "file", array[None], grid, tags=TAGS),
    "nifti": lambda folder, array, grid: archive.write_nifti(folder / "x.nii.gz", array, grid, np.float32),
    "mha": lambda folder, array, grid: itk(folder / "x.mha", array, grid),
    "nrrd": lambda folder, array, grid: itk(folder / "x.nrrd", array, grid),
}


def prepared(folder, write, array, grid):
    (folder / "archive").mkdir(parents=True)
    write(folder / "archive", array, grid)
    index.build([folder / "archive"], out=folder / "index", gates=index.Gates(thumbnails=False))
    prepare.run(folder / "index", out=folder / "store")
    store = Store.open(folder / "store")
    (entry,) = store.rows
    array = store.read_box(entry.scan_id, (0, 0, 0), entry.shape_vox)[0]
    return array.astype(float), Grid(entry.shape_vox, np.array(entry.affine).reshape(4, 4))


def landmarks(array, grid, centre):
    """World places in mm of the balls, by their centres of mass above the tissue."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_vox], indexing="ij"), -1).reshape(-1, 3)
    world = grid.world(at)
    found = {}
    for name, place in LANDMARKS.items():
        near = ((world - centre - place) ** 2).sum(1) < 6.5**2
        mass = np.clip(array.reshape(-1)[near] - 40, 0, None)
        found[name] = (world[near] * mass[:, None]).sum(0) / mass.sum() - centre
    return found


@pytest.mark.slow
def test_every_format_prepares_to_the_same_volume(tmp_path):
    grid = oblique_grid(SHAPE, SPACING)
    array, centre = body(grid)
    made = {name: prepared(tmp_path / name, write, array, grid) for name, write in WRITERS.items()}
    first, its_grid = made["dicom"]
    assert its_grid.orientation == "RAS"
    for name, (other, grid_of_other) in made.items():
        assert grid_of_other.almost_equal(its_grid, tolerance_mm=0.01), name
        assert np.abs(other - first).max() <= 1, name
        for mark, place in landmarks(other, grid_of_other, centre).items():
            assert np.linalg.norm(place - LANDMARKS[mark]) < 0.1, (name, mark, place)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [12, -18])
def test_landmarks_of_a_tilted_series_are_where_they_were(tmp_path, degrees):
    grid = oblique_grid(SHAPE, SPACING)
    sheared = np.array(grid.affine)
    lean = np.tan(np.deg2rad(degrees)) * SPACING[2] * sheared[:3, 1] / SPACING[1]
    sheared[:3, 2] += lean
    sheared[:3, 3] -= lean * (SHAPE[2] - 1) / 2
    array, centre = body(Grid(SHAPE, sheared))
    made, its_grid = prepared(tmp_path, WRITERS["dicom"], array, Grid(SHAPE, sheared))
    for mark, place in landmarks(made, its_grid, centre).items():
        assert np.linalg.norm(place - LANDMARKS[mark]) < 0.1, (mark, place)
