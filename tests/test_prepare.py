"""Landmarks stay where they are, fine texture does not alias, a killed run loses nothing, and failures are named."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from volssl import archive, index, prepare
from volssl.dicom_write import write_dicom_series
from volssl.files import BadInput, read_csv
from volssl.pools import Means
from volssl.store import Store
from volssl.volume import Grid

SMALL = ("spacing_mm=[2,2,2]", "body.margin_mm=2")


@pytest.fixture
def made_index(tmp_path, phantom):
    """Six CT scans, one MR, one that breaks after it was indexed."""
    root = tmp_path / "archive"
    for number in range(7):
        shifted = phantom[0] + np.int16(number)
        archive.write_nifti(root / f"ct{number}.nii.gz", shifted, phantom[1], np.int16)
    archive.write_nifti(root / "mr.nii.gz", phantom[0] + 1010, phantom[1], np.int16)
    (tmp_path / "key").write_text("k" * 40)
    index.build([root], out=tmp_path / "index", gates=index.Gates(key=tmp_path / "key"))
    (root / "ct6.nii.gz").write_bytes((root / "ct6.nii.gz").read_bytes()[:900])
    return tmp_path / "index"


def write_itk(path, array_XYZ, grid):
    lps = np.diag([-1.0, -1.0, 1.0])
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_XYZ.T))
    image.SetSpacing(grid.spacing_mm)
    image.SetDirection((lps @ grid.affine[:3, :3] / np.array(grid.spacing_mm)).ravel())
    image.SetOrigin(lps @ grid.affine[:3, 3])
    path.parent.mkdir()
    sitk.WriteImage(image, str(path))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_store_holds_the_scan_where_it_was(tmp_path, phantom, made_index):
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    store = Store.open(tmp_path / "store")
    assert (store.spacing_mm, store.window, store.about.orientation) == ((2, 2, 2), (-1000, 1000), "RAS")
    grid = phantom[1]
    middle_mm = grid.world(np.array([[7, 7, 4]]))  # of the bright block
    for row in store.rows:
        stored = store.read_box(row.scan_id, (0, 0, 0), row.shape_vox)
        placed = Grid(row.shape_vox, np.array(row.affine).reshape(4, 4))
        assert placed.orientation == "RAS"
        there = np.rint(placed.voxels(middle_mm)[0]).astype(int)
        assert stored[0][tuple(there)] > 500
        assert row.original_shape == grid.shape_vox
        np.testing.assert_allclose(np.array(row.original_affine).reshape(4, 4), grid.affine, atol=1e-4)
        inside = stored[(slice(None), *(slice(a, b) for a, b in zip(row.body_start, row.body_stop, strict=True)))]
        assert (inside > -500).mean() > (stored > -500).mean() * 0.99
        assert (row.modality, row.channels, row.scaling) == ("CT", 1, (1.0, 0.0))


@pytest.mark.parametrize("kind", ["dicom", "nii.gz", "mha", "nrrd"])
def test_every_format_prepares_to_the_same_voxels(tmp_path, phantom, kind):
    if kind == "dicom":
        tags = {"PatientID": "1", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2"}
        write_dicom_series(tmp_path / "a", *phantom, tags=tags)
    elif kind == "nii.gz":
        archive.write_nifti(tmp_path / "a/scan.nii.gz", *phantom, np.int16)
    else:
        write_itk(tmp_path / f"a/scan.{kind}", *phantom)
    archive.write_nifti(tmp_path / "b/scan.nii", *phantom, np.int16)
    stored = []
    for name in "ab":
        index.build([tmp_path / name], out=tmp_path / f"index_{name}")
        prepare.run(tmp_path / f"index_{name}", out=tmp_path / f"store_{name}", overrides=SMALL)
        store = Store.open(tmp_path / f"store_{name}")
        stored.append((store.read_box(store.rows[0].scan_id, (0, 0, 0), store.rows[0].shape_vox), store.rows[0]))
    (one, row_one), (two, row_two) = stored
    assert np.abs(one.astype(int) - two).max() <= 1
    np.testing.assert_allclose(row_one.affine, row_two.affine, atol=1e-3)


def test_failures_are_named_by_pseudonym_and_reason(tmp_path, made_index):
    outcome = prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    assert outcome.failed == 2
    loaded = index.load(made_index)
    names = {row["scan_id"]: row["reason"] for row in read_csv(tmp_path / "store/failures.csv")}
    assert {loaded.sources[scan_id].files[0].name: reason for scan_id, reason in names.items()} == {
        "ct6.nii.gz": "truncated",
        "mr.nii.gz": "other_modality",
    }
    assert len(Store.open(tmp_path / "store").rows) == 6
    texts = [re.sub(rb"base64,[^\"]+", b"", data) for data in tree(tmp_path / "store").values()]
    assert not any(b"nii" in text or b"archive" in text for text in texts)


def test_mr_is_scaled_by_its_own_percentiles(tmp_path, made_index):
    assert prepare.run(made_index, out=tmp_path / "store", recipe="prepare_mr", overrides=SMALL).failed == 7
    store = Store.open(tmp_path / "store")
    (row,) = store.rows
    stored = store.read_box(row.scan_id, (0, 0, 0), row.shape_vox)
    assert store.window == (0, 1000)
    assert stored.min() == 0
    assert abs(stored.max() - (1650 * row.scaling[0] + row.scaling[1])) < 40  # the bright block: 40 + 600 + 1010
    assert 900 <= stored.max() <= 1100


def test_resume_does_only_what_is_missing_and_mends_damage(tmp_path, made_index, monkeypatch):
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    before = tree(tmp_path / "store")
    volumes = sorted((tmp_path / "store/volumes").iterdir())
    volumes[0].unlink()
    volumes[1].write_bytes(volumes[1].read_bytes()[:100])
    done = []
    once = prepare.prepare_one
    monkeypatch.setattr(prepare, "prepare_one", lambda *job: (done.append(job[2].scan_id), once(*job))[1])
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL, resume=True)
    assert tree(tmp_path / "store") == before
    assert {volumes[0].stem, volumes[1].stem} < set(done)
    assert len(done) == 3  # and the one that cannot be read


def test_out_in_use_other_recipe_and_unknown_key_are_refused(tmp_path, made_index):
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    with pytest.raises(BadInput, match="must be new or empty"):
        prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    with pytest.raises(BadInput, match="same recipe"):
        prepare.run(made_index, out=tmp_path / "store", resume=True)
    with pytest.raises(BadInput, match=r"colour(.|\n)*spacing_mm"):
        prepare.run(made_index, out=tmp_path / "new", overrides=["colour=red"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("override", ["spacing_mm=[0,1,1]", "intensity.clip=[5,1]", "intensity.clip=[-99999,1]", "intensity.window=[3,3]"])
def test_impossible_settings_are_refused(tmp_path, made_index, override):
    with pytest.raises(BadInput):
        prepare.run(made_index, out=tmp_path / "store", overrides=[override])


def test_nothing_to_prepare_is_refused(tmp_path, made_index):
    for file in (tmp_path / "archive").iterdir():
        file.unlink()
    with pytest.raises(BadInput, match="no scan could be prepared; found missing, other_modality"):
        prepare.run(made_index, out=tmp_path / "store")


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_one_clear_error_and_room_mends_it(tmp_path, phantom, tiny_disk):
    rng = np.random.default_rng(0)
    for number in range(8):
        noise = np.where(phantom[0] > -500, rng.integers(-400, 1000, phantom[0].shape), -1000)
        archive.write_nifti(tmp_path / f"archive/{number}.nii.gz", noise, phantom[1], np.int16)
    index.build([tmp_path / "archive"], out=tmp_path / "index")
    with pytest.raises(BadInput, match=f"--out {tiny_disk}/store: the disk is full"):
        prepare.run(tmp_path / "index", out=tiny_disk / "store", overrides=["spacing_mm=[0.6,0.6,0.6]"], means=Means(ignore_space=True))
    assert not list(tiny_disk.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=16m", tiny_disk], check=True)
    prepare.run(tmp_path / "index", out=tiny_disk / "store", overrides=["spacing_mm=[0.6,0.6,0.6]"], resume=True)
    assert len(Store.open(tiny_disk / "store").rows) == 8


def test_full_disk_by_a_write_that_fails(tmp_path, made_index, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadInput, match="the disk is full"):
        prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    assert not list((tmp_path / "store").rglob(".tmp-*"))


@pytest.mark.slow
def test_workers_give_the_same_store(tmp_path, made_index):
    for workers in (0, 2):
        prepare.run(made_index, out=tmp_path / f"by{workers}", means=Means(workers=workers), overrides=SMALL)
    assert tree(tmp_path / "by0") == tree(tmp_path / "by2")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(tmp_path, made_index, workers):
    prepare.run(made_index, out=tmp_path / "undisturbed", overrides=SMALL)
    out = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; from volssl import prepare; from volssl.pools import Means\n"
        "if __name__ == '__main__':\n"
        f"    prepare.run(Path(sys.argv[1]), out=Path(sys.argv[2]), overrides={SMALL!r}, resume=True, means=Means(workers={workers}))\n"
    )
    (tmp_path / "go.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(prepare.__file__).parents[1])}
    for kill in range(2 if workers else 4):
        process = subprocess.Popen(
            [sys.executable, tmp_path / "go.py", made_index, out], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # Wait for the kill-th volume (or a part of one), then strike.
        while process.poll() is None and len(list(out.glob("volumes/*"))) <= kill:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    prepare.run(made_index, out=out, overrides=SMALL, resume=True)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_real_scans_prepare_with_anatomy_upright(real_data, tmp_path):
    """In RAS+ the spine lies behind (low y), and the larger dome of the liver on the right (high x)."""
    index.build([real_data / "abdomen_ct/KiTS-00072_dicom"], out=tmp_path / "index")
    prepare.run(tmp_path / "index", out=tmp_path / "store", overrides=["spacing_mm=[3,3,3]"])
    store = Store.open(tmp_path / "store")
    (row,) = store.rows
    array = store.read_box(row.scan_id, row.body_start, [b - a for a, b in zip(row.body_start, row.body_stop, strict=True)])[0]
    x, y = array.shape[0] // 2, array.shape[1] // 2
    bone, tissue = array > 250, (array > 0) & (array < 250)
    assert bone[:, :y].sum() > 2 * bone[:, y:].sum()
    assert tissue[x:].sum() > tissue[:x].sum()
