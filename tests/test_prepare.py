"""Landmarks stay where they are, fine texture does not alias, a killed run loses nothing, and failures are named."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import oblique_grid

from volssl import archive, index, prepare
from volssl.dicom_write import write_dicom_series
from volssl.files import BadInput, read_csv
from volssl.pools import Means
from volssl.rows import SourcesFile, write_rows
from volssl.store import Store
from volssl.volume import Grid, Volume

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
def test_killed_at_twenty_random_moments_and_run_again_gives_the_same_bytes(tmp_path, made_index, workers):
    prepare.run(made_index, out=tmp_path / "undisturbed", overrides=SMALL)
    out = tmp_path / "killed"
    # Slowed where a volume is written, so that the moments fall between all the steps of it and not only into the imports.
    code = (
        "import sys, time; from pathlib import Path; from volssl import files, prepare; from volssl.pools import Means\n"
        "sync = files._sync_folder\n"
        "files._sync_folder = lambda folder: (time.sleep(0.05), sync(folder))\n"
        f"prepare.run(Path(sys.argv[1]), out=Path(sys.argv[2]), overrides={SMALL!r}, resume=True, means=Means(workers={workers}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(prepare.__file__).parents[1])}
    rng = np.random.default_rng(workers)
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", code, made_index, out], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        before = set(out.rglob("*"))
        while process.poll() is None and set(out.rglob("*")) == before:
            time.sleep(0.002)  # until it has begun to write
        time.sleep(rng.uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if process.returncode != -signal.SIGKILL:  # it had finished: begin anew
            shutil.rmtree(out)
    assert killed >= 15
    prepare.run(made_index, out=out, overrides=SMALL, resume=True)
    assert tree(out) == tree(tmp_path / "undisturbed")


def kill_children(seconds, rng):
    """SIGKILL one process after another of those that this one has started."""
    end, killed = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        children = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        for task in Path("/proc/self/task").iterdir():
            children += [int(pid) for pid in (task / "children").read_text().split()]
        if children:
            os.kill(int(rng.choice(children)), signal.SIGKILL)
            killed += 1
        time.sleep(0.4)
    return killed


@pytest.mark.slow
def test_killed_workers_cost_only_their_scan_and_a_second_run_heals_all(tmp_path, made_index):
    prepare.run(made_index, out=tmp_path / "undisturbed", overrides=SMALL)
    out = tmp_path / "killed"
    killer = threading.Thread(target=kill_children, args=(4.0, np.random.default_rng(0)))
    killer.start()
    prepare.run(made_index, out=out, overrides=SMALL, means=Means(workers=2))
    killer.join()
    reasons = {row["reason"] for row in read_csv(out / "failures.csv")}
    assert reasons <= {"truncated", "other_modality", "worker_killed"}
    prepare.run(made_index, out=out, overrides=SMALL, resume=True)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.slow
def test_dask_cluster_with_a_killed_worker_gives_the_same_store(tmp_path, made_index):
    distributed = pytest.importorskip("distributed")
    prepare.run(made_index, out=tmp_path / "local", overrides=SMALL, means=Means(workers=2))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None, silence_logs=50
    ) as cluster:
        pids = [worker.process.pid for worker in cluster.workers.values()]

        def kill_one():
            while not list((tmp_path / "cluster").glob("volumes/*.b2nd")):
                time.sleep(0.005)
            os.kill(pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        outcome = prepare.run(made_index, out=tmp_path / "cluster", overrides=SMALL, means=Means(scheduler=cluster.scheduler_address))
        killer.join()
    assert outcome.failed == 2  # those of the local run
    assert tree(tmp_path / "cluster") == tree(tmp_path / "local")


def test_scans_that_take_too_long_are_named(tmp_path, made_index):
    with pytest.raises(BadInput, match="no scan could be prepared; found other_modality, timeout"):
        prepare.run(made_index, out=tmp_path / "store", overrides=SMALL, means=Means(workers=2, minutes=0.0005))
    assert [row["reason"] for row in read_csv(tmp_path / "store/failures.csv")].count("timeout") == 7
    assert not (tmp_path / "store/manifest.csv").exists()


def test_memory_bound_is_named_and_costs_only_its_scan(tmp_path, phantom, monkeypatch):
    monkeypatch.setattr("volssl.pools.LEAST_GIB", 0.1)
    big = np.tile(phantom[0], (16, 16, 16))  # 24 million voxels
    archive.write_nifti(tmp_path / "archive/big.nii", big.astype(np.float32) + 0.25, Grid(big.shape, phantom[1].affine), np.float32)
    archive.write_nifti(tmp_path / "archive/small.nii", *phantom, np.int16)
    index.build([tmp_path / "archive"], out=tmp_path / "index")
    big_id = next(row.scan_id for row in index.load(tmp_path / "index").rows if row.shape_vox == big.shape)
    prepare.run(tmp_path / "index", out=tmp_path / "store", overrides=SMALL, means=Means(workers=1, memory_gib=0.3, minutes=2))
    (failure,) = read_csv(tmp_path / "store/failures.csv")
    assert failure["scan_id"] == big_id
    assert failure["reason"] in ("out_of_memory", "worker_killed", "undecodable")
    assert len(Store.open(tmp_path / "store").rows) == 1


def test_disk_need_is_estimated_before_it_starts(tmp_path, made_index, monkeypatch):
    rows = [row for row in index.load(made_index).rows if row.modality == "CT"]
    # 24 x 20 x 12 voxels of 1.5 x 1.75 x 3 mm at 2 mm, 0.8 bytes each, seven times
    need = 24 * 20 * 12 * 1.5 * 1.75 * 3 / 8 * prepare.BYTES_PER_VOXEL * len(rows)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(need) - 9))
    with pytest.raises(BadInput, match=r"7 scans need about 3\.18e-05 GB .* 3\.17e-05 GB are free.*--ignore-space"):
        prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    assert not list((tmp_path / "store").glob("volumes/*"))
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL, resume=True, means=Means(ignore_space=True))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(need / 7) + 9))
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL, resume=True)  # but one is missing


def test_disk_need_follows_the_volumes_that_are_there(tmp_path, made_index, monkeypatch):
    monkeypatch.setattr(prepare, "ENOUGH_STORED", 6)
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    next((tmp_path / "store/volumes").iterdir()).unlink()
    monkeypatch.setattr(prepare, "ENOUGH_STORED", 5)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    with pytest.raises(BadInput, match="2 scans need .* as in the 5 volumes there"):
        prepare.run(made_index, out=tmp_path / "store", overrides=SMALL, resume=True)


def test_what_nobody_foresaw_costs_its_scan_and_tells_no_header(tmp_path, made_index, monkeypatch, caplog):
    once = prepare.find_body
    seen = []

    def odd(volume, body, **other):
        seen.append(volume)
        if len(seen) == 2:
            raise ZeroDivisionError("DOE^JOHN")
        return once(volume, body, **other)

    monkeypatch.setattr(prepare, "find_body", odd)
    assert prepare.run(made_index, out=tmp_path / "store", overrides=SMALL).failed == 3
    assert "unexpected_error" in {row["reason"] for row in read_csv(tmp_path / "store/failures.csv")}
    assert "ZeroDivisionError at test_prepare.py:" in caplog.text
    assert "DOE" not in caplog.text


def test_manifest_takes_no_memory_that_grows_with_it(tmp_path, made_index):
    prepare.run(made_index, out=tmp_path / "store", overrides=SMALL)
    store = Store.open(tmp_path / "store")
    one = store.rows[0]
    tracemalloc.start()
    store.finish(replace(one, scan_id=f"S{number:08d}") for number in range(8000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "store/manifest.csv").stat().st_size > 4_000_000
    assert peak < 2_000_000  # as for 20,000; what is not yet collected comes and goes
    assert len(Store.open(tmp_path / "store").rows) == 8000


def test_rows_take_no_memory_that_grows_with_them(tmp_path, made_index):
    """Rows of another modality than the recipe's are gone through, counted and named; a row in memory takes a kilobyte."""
    loaded, peaks = index.load(made_index), {}
    for count in (500, 4500):
        folder = tmp_path / f"{count}"
        (folder / "private").mkdir(parents=True)
        others = [replace(loaded.rows[0], scan_id=f"T{number:08}", modality="PT") for number in range(count)]
        write_rows(folder / "index.csv", [*loaded.rows, *others])
        with SourcesFile(folder / "private") as sources:
            for row in [*loaded.rows, *others]:
                sources.add(row.scan_id, loaded.sources.get(row.scan_id, archive.Source("file", (tmp_path / "none.nii",))))
        del others
        tracemalloc.start()
        outcome = prepare.run(folder, out=tmp_path / f"store{count}", overrides=SMALL)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert outcome.failed == count + 2
        assert [row["reason"] for row in read_csv(tmp_path / f"store{count}/failures.csv")].count("other_modality") == count + 1
    assert peaks[4500] - peaks[500] < 150 * 4000, peaks


def test_a_table_in_another_order_gives_the_same_store(tmp_path, made_index):
    prepare.run(made_index, out=tmp_path / "one", overrides=SMALL)
    write_rows(made_index / "index.csv", index.load(made_index).rows[::-1])
    prepare.run(made_index, out=tmp_path / "two", overrides=SMALL)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("code", ["LPS", "RAS", "SAL", "IPR"])
def test_landmarks_come_back_through_the_whole_of_prepare(tmp_path, code):
    """Bright balls at known places: stored voxel -> world -> voxel of the file, to a tenth of a millimetre."""
    grid = oblique_grid((60, 54, 40), (1.4, 1.6, 2.2))
    landmarks_mm = grid.world(np.array([[20.3, 18.7, 12.2], [40.1, 30.4, 25.6], [24.8, 36.3, 28.9]]))
    at = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_vox], indexing="ij"), -1)
    mm = grid.world(at.reshape(-1, 3)).reshape(*grid.shape_vox, 3)
    hu = np.where((((at - 0.5 * np.array(grid.shape_vox)) / (0.4 * np.array(grid.shape_vox))) ** 2).sum(-1) < 1, 0.0, -1000.0)
    for centre in landmarks_mm:
        hu += 1500 * np.exp(-0.5 * ((mm - centre) ** 2).sum(-1) / 4.0**2)
    volume = Volume(hu[None], grid).reoriented(code)
    archive.write_nifti(tmp_path / "archive/scan.nii", np.rint(volume.array_CXYZ[0]), volume.grid, np.int16)
    index.build([tmp_path / "archive"], out=tmp_path / "index", gates=index.Gates(modality="CT"))
    prepare.run(tmp_path / "index", out=tmp_path / "store", overrides=["spacing_mm=[1.5,1.5,2]"])
    store = Store.open(tmp_path / "store")
    (row,) = store.rows
    stored = store.read_box(row.scan_id, (0, 0, 0), row.shape_vox)[0].astype(float)
    placed = Grid(row.shape_vox, np.array(row.affine).reshape(4, 4))
    original = Grid(row.original_shape, np.array(row.original_affine).reshape(4, 4))
    assert placed.orientation == "RAS"
    for centre in landmarks_mm:
        around = np.rint(placed.voxels(centre[None])[0]).astype(int)
        box = tuple(slice(a - 4, a + 5) for a in around)
        weight = np.clip(stored[box] - 300, 0, None)
        inside = np.stack(np.meshgrid(*[np.arange(a - 4, a + 5) for a in around], indexing="ij"), -1)
        found = (inside * weight[..., None]).sum((0, 1, 2)) / weight.sum()
        np.testing.assert_allclose(placed.world(found[None])[0], centre, atol=0.1)
        in_file_mm = original.world(original.voxels(placed.world(found[None])))
        np.testing.assert_allclose(in_file_mm[0], centre, atol=0.1)
    assert original.almost_equal(volume.grid)


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
