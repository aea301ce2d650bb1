"""Prediction: names, grids, and a bad input that does not stop the rest. The model is untrained: only what surrounds it counts."""

import subprocess
import sys
from dataclasses import replace

import highdicom
import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from volssl.__main__ import run_verb
from volssl.archive import read_image, write_nifti
from volssl.dicom_write import uid, write_dicom_series
from volssl.files import BadInput, read_csv
from volssl.predict import Extras, run
from volssl.segment import Model, Plan, read_model, write_model
from volssl.volume import Grid, Volume

GRID = Grid((12, 10, 8), np.diag([-1.0, 1.0, 2.5, 1.0]))


def write_run(folder, channels=("CT",), patch_vox=(8, 8, 8)):
    net = {"name": "unet", "arguments": {"in_channels": len(channels), "width": 2, "depth": 2, "norm": "instance"}}
    plan = Plan(net, {"liver": 1}, channels, patch_vox)
    write_model(folder, Model(plan, plan.network()))
    return folder


def image(seed=0):
    return np.random.default_rng(seed).integers(-500, 500, GRID.shape_vox).astype(np.int16)


@pytest.fixture
def folder(tmp_path):
    write_nifti(tmp_path / "in" / "one.nii.gz", image(1), GRID, np.int16)
    write_nifti(tmp_path / "in" / "deeper" / "two.nii", image(2), GRID, np.int16)
    return tmp_path / "in"


def outputs(out):
    return sorted(path.name for path in out.glob("*.nii.gz"))


def test_label_maps_lie_on_the_inputs_grid_under_its_name(folder, tmp_path):
    outcome = run(write_run(tmp_path / "run"), [folder], out=tmp_path / "out")
    assert outcome.failed == 0
    assert outputs(tmp_path / "out") == ["one.nii.gz", "two.nii.gz"]
    written = nibabel.load(tmp_path / "out" / "one.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert read_image(tmp_path / "out" / "one.nii.gz").grid.almost_equal(GRID)


def test_a_bad_input_is_named_and_the_rest_goes_on(folder, tmp_path):
    whole = (folder / "one.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii.gz").touch()
    outcome = run(write_run(tmp_path / "run"), [folder], out=tmp_path / "out")
    assert outcome.failed == 2
    assert {row["input"] for row in read_csv(tmp_path / "out" / "failures.csv")} == {"cut", "empty"}
    assert str(tmp_path) not in (tmp_path / "out" / "failures.csv").read_text()
    assert outputs(tmp_path / "out") == ["one.nii.gz", "two.nii.gz"]


def test_nothing_is_left_where_not_one_image_could_be_segmented(folder, tmp_path):
    (tmp_path / "cut.nii.gz").write_bytes((folder / "one.nii.gz").read_bytes()[:200])
    nan = image(1).astype(np.float32)
    nan[0, 0, 0] = np.nan
    write_nifti(tmp_path / "nan.nii.gz", nan, GRID, np.float32)
    with pytest.raises(BadInput, match=r"(?s)none of 2 .*cut: .*cannot be decoded.*nan: .*1 of 960 voxels NaN"):
        run(write_run(tmp_path / "run"), [tmp_path / "cut.nii.gz", tmp_path / "nan.nii.gz"], out=tmp_path / "out")
    with pytest.raises(BadInput, match=r"found nothing at .*absent\.nii\.gz"):
        run(tmp_path / "run", [folder, tmp_path / "absent.nii.gz"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_channel_as_nnunet_names_it(tmp_path):
    for case in ("a", "b_0001"):
        write_nifti(tmp_path / "in" / f"{case}_0000.nii.gz", image(), GRID, np.int16)
    made = write_run(tmp_path / "run")
    run(made, [tmp_path / "in"], out=tmp_path / "out")
    assert outputs(tmp_path / "out") == ["a.nii.gz", "b_0001.nii.gz"]
    write_nifti(tmp_path / "in" / "c_0001.nii.gz", image(), GRID, np.int16)  # these names are not of that layout
    run(made, [tmp_path / "in"], out=tmp_path / "out2")
    assert outputs(tmp_path / "out2") == ["a_0000.nii.gz", "b_0001_0000.nii.gz", "c_0001.nii.gz"]


@pytest.mark.parametrize("names", [["a_0001", "a_0002"], ["one/a_0000", "two/a_0000"]])
def test_channels_must_be_numbered_each_once(tmp_path, names):
    for name in names:
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", image(), GRID, np.int16)
    with pytest.raises(BadInput, match="each once"):
        run(write_run(tmp_path / "run", ("T1", "T2")), [tmp_path / "in"], out=tmp_path / "out")


def test_channels_in_files_of_their_own(tmp_path):
    for case in ("a", "b"):
        for channel in range(2):
            write_nifti(tmp_path / "in" / f"{case}_{channel:04d}.nii.gz", image(channel), GRID, np.int16)
    (tmp_path / "in" / "b_0001.nii.gz").unlink()
    both = np.stack([image(0), image(1)], -1)
    nibabel.save(nibabel.Nifti1Image(both, GRID.affine), tmp_path / "in" / "c.nii.gz")
    outcome = run(write_run(tmp_path / "run", ("T1", "T2")), [tmp_path / "in"], out=tmp_path / "out")
    assert outputs(tmp_path / "out") == ["a.nii.gz", "c.nii.gz"]
    assert outcome.failed == 1
    same = [read_image(tmp_path / "out" / f"{case}.nii.gz").array_CXYZ for case in "ac"]
    np.testing.assert_array_equal(*same)


def test_refusals(folder, tmp_path):
    made = write_run(tmp_path / "run")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BadInput, match="must be one of nifti, dicomseg"):
        run(made, [folder], out=tmp_path / "out", format="png")
    with pytest.raises(BadInput, match="at least one image"):
        run(made, [tmp_path / "nothing"], out=tmp_path / "out")
    with pytest.raises(BadInput, match="several called one"):
        run(made, [folder, folder / "one.nii.gz"], out=tmp_path / "out")
    with pytest.raises(BadInput, match=r"model\.json"):
        run(folder, [folder], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_an_earlier_prediction(folder, tmp_path):
    made = write_run(tmp_path / "run")
    run(made, [folder], out=tmp_path / "out")
    with pytest.raises(BadInput, match="new or empty"):
        run(made, [folder], out=tmp_path / "out")
    run(made, [folder / "one.nii.gz"], out=tmp_path / "out", overwrite=True)
    assert outputs(tmp_path / "out") == ["one.nii.gz"]


def test_a_dicom_series_gets_a_name_that_tells_nothing(real_data, tmp_path):
    series = real_data / "abdomen_ct" / "KiTS-00072_dicom"
    one_file = next(path for path in sorted(series.rglob("*")) if path.is_file())
    outcome = run(write_run(tmp_path / "run", patch_vox=(256, 256, 8)), [one_file], out=tmp_path / "out")
    assert outcome.failed == 0
    (name,) = outputs(tmp_path / "out")
    assert name.startswith("series_")
    assert one_file.stem not in name
    assert read_image(tmp_path / "out" / name).grid.almost_equal(read_image(one_file).grid)


def test_a_full_disk_keeps_whole_label_maps_only(folder, tmp_path, small_disk, capsys):
    model, out = write_run(tmp_path / "run"), small_disk("12k") / "out"  # room for the two files about the run and one label map
    assert run_verb("predict", {"run": model, "inputs": [folder], "out": out}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert not list(out.rglob(".tmp-*"))
    assert len(outputs(out)) == 1
    assert read_image(out / outputs(out)[0]).grid.almost_equal(GRID)
    small_disk("1m")
    assert run_verb("predict", {"run": model, "inputs": [folder], "out": out, "overwrite": True}) == 0
    assert outputs(out) == ["one.nii.gz", "two.nii.gz"]


@pytest.mark.parametrize("files", range(4))
def test_a_disk_that_fills_up_at_any_file_is_one_clear_error(folder, tmp_path, no_room_after, files, capsys):
    model, out = write_run(tmp_path / "run"), tmp_path / "out"
    no_room_after(files)
    assert run_verb("predict", {"run": model, "inputs": [folder], "out": out}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".tmp-*"))


def test_overwrite_never_deletes_what_it_is_to_read(folder, tmp_path):
    model = write_run(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text("verb: finetune")
    with pytest.raises(BadInput, match="would delete the input"):
        run(model, [folder], out=tmp_path, overwrite=True)
    assert (folder / "one.nii.gz").exists()


def write_other(folder, seed, **changes):
    """Another fold of the same plan: other weights."""
    plan = replace(read_model(write_run(folder)).plan, **changes)
    torch.manual_seed(seed)
    write_model(folder, Model(plan, plan.network()))
    return folder


def shares_of(folder):
    return read_image(folder / "probabilities" / "one" / "liver.nii.gz").array_CXYZ[0]


def test_an_ensemble_is_the_mean_of_the_shares(folder, tmp_path):
    runs = [write_other(tmp_path / f"fold{seed}", seed) for seed in range(3)]
    shares = []
    for seed, run_folder in enumerate(runs):
        run(run_folder, [folder], out=tmp_path / f"out{seed}", extras=Extras(probabilities=True))
        shares.append(shares_of(tmp_path / f"out{seed}"))
    run(runs[0], [folder], out=tmp_path / "all", extras=Extras(ensemble=runs[1:], probabilities=True))
    np.testing.assert_allclose(shares_of(tmp_path / "all"), np.mean(shares, 0), atol=1e-4)
    assert np.abs(shares[0] - shares[1]).max() > 0.01
    label = read_image(tmp_path / "all" / "one.nii.gz").array_CXYZ[0]
    np.testing.assert_array_equal(label == 1, np.mean(shares, 0) > 0.5)


def test_runs_that_do_not_go_together(folder, tmp_path):
    first = write_run(tmp_path / "run")
    other = write_other(tmp_path / "other", 1, labels={"spleen": 1}, patch_vox=(16, 8, 8))
    with pytest.raises(BadInput, match=r"(?s)labels must be that of the first run.*patch_vox must be"):
        run(first, [folder], out=tmp_path / "out", extras=Extras(ensemble=[other]))


def test_shares_are_whole_numbers_on_the_images_grid(folder, tmp_path):
    run(write_run(tmp_path / "run"), [folder], out=tmp_path / "out", extras=Extras(probabilities=True))
    path = tmp_path / "out" / "probabilities" / "one" / "liver.nii.gz"
    written = nibabel.load(path)
    assert written.get_data_dtype() == np.int16
    assert (written.dataobj.slope, written.dataobj.inter) == (pytest.approx(1 / 32767), 0)
    shares = written.get_fdata()
    assert 0 < shares.min() < shares.max() < 1
    assert read_image(path).grid.almost_equal(GRID)
    image = SimpleITK.ReadImage(str(path))  # another reader sees the same
    np.testing.assert_allclose(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), shares, atol=1e-6)
    labels = read_image(tmp_path / "out" / "one.nii.gz").array_CXYZ[0]
    np.testing.assert_array_equal(labels == 1, shares > 0.5)
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_resume_goes_on_where_it_stopped(folder, tmp_path):
    made = write_run(tmp_path / "run")
    series(tmp_path / "series")
    inputs = [folder, tmp_path / "series"]
    run(made, inputs, out=tmp_path / "out")
    (dicom,) = (tmp_path / "out").glob("series_*")
    (tmp_path / "out" / "one.nii.gz").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    run(made, inputs, out=tmp_path / "out", resume=True)
    assert outputs(tmp_path / "out") == ["one.nii.gz", dicom.name, "two.nii.gz"]
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in before.items())
    assert len(read_csv(tmp_path / "out" / "predictions.csv")) == 3
    with pytest.raises(BadInput, match="the same models"):
        run(write_other(tmp_path / "other", 1), inputs, out=tmp_path / "out", resume=True)
    with pytest.raises(BadInput, match="the same probabilities"):
        run(made, inputs, out=tmp_path / "out", resume=True, extras=Extras(probabilities=True))


def test_what_nobody_foresaw_costs_one_image(folder, tmp_path, monkeypatch):
    label_map = Model.label_map

    def odd(self, volume, **options):
        if volume.array_CXYZ[0, 0, 0, 0] == image(1)[0, 0, 0]:
            raise RuntimeError("Doe^Jane")
        return label_map(self, volume, **options)

    monkeypatch.setattr(Model, "label_map", odd)
    assert run(write_run(tmp_path / "run"), [folder], out=tmp_path / "out").failed == 1
    (row,) = read_csv(tmp_path / "out" / "failures.csv")
    assert row["input"] == "one"
    assert row["reason"].startswith("unexpected_error: RuntimeError at test_predict.py:")


def test_used_memory_is_kept_on_a_cpu(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("volssl.predict.keep_freed", lambda: asked.append(True))
    run(write_run(tmp_path / "run"), [folder], out=tmp_path / "out")
    assert asked == ([] if torch.cuda.is_available() else [True])


def test_dicom_seg_by_the_verb(folder, tmp_path, capsys):
    series(tmp_path / "mixed" / "series")
    (tmp_path / "mixed" / "file.nii.gz").write_bytes((folder / "one.nii.gz").read_bytes())
    model = undecided(tmp_path / "run")
    options = {"run": model, "inputs": [tmp_path / "mixed"], "out": tmp_path / "out", "format": "dicomseg"}
    assert run_verb("predict", options) == 3
    (row,) = read_csv(tmp_path / "out" / "failures.csv")
    assert row["input"] == "file" and "ask for --format nifti" in row["reason"]
    (made,) = (tmp_path / "out").glob("series_*.dcm")
    run(model, [tmp_path / "mixed" / "series"], out=tmp_path / "nifti")
    (label,) = (tmp_path / "nifti").glob("*.nii.gz")
    seg = highdicom.seg.segread(made).get_volume(combine_segments=True)
    assert (seg.array == 1).sum() == (read_image(label).array_CXYZ == 1).sum() > 0


def undecided(folder):
    """A model that finds some of its label: the bias between its two classes lies amid what it tells of noise."""
    made = read_model(write_other(folder, 0))
    volume = Volume(image(3)[None], GRID)
    shares = np.concatenate([part.numpy().copy().reshape(2, -1) for _, part in made.shares(volume)], 1)
    with torch.no_grad():
        made.net.heads[0].bias[0] += float(np.median(np.log(shares[1] / shares[0])))
    write_model(folder, made)
    return folder


def series(folder):
    tags = {"PatientID": "Doe", "StudyInstanceUID": uid("study"), "SeriesInstanceUID": uid("one"), "FrameOfReferenceUID": uid("frame")}
    write_dicom_series(folder, image(3), GRID, tags=tags)


PEAK = """
import sys, numpy as np, torch
from pathlib import Path
from volssl.segment import Inference, Model, Plan, Preparation
from volssl.volume import Grid, Volume

class Constant(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.shares = torch.nn.Parameter(torch.arange(float(classes)))
    def forward(self, x):
        return self.shares.view(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[2:])

def kib(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])

def peak(slices, classes):
    labels = {str(value): value for value in range(1, classes)}
    plan = Plan({}, labels, ("CT",), (32, 32, 32), preparation=Preparation(spacing_mm=(1.0, 1.0, 1.0)), inference=Inference(batch=1))
    volume = Volume(np.zeros((1, 64, 64, slices), np.int16), Grid((64, 64, slices), np.diag([1.0, 1, float(sys.argv[3]), 1])))
    return Model(plan, Constant(classes)).label_map(volume)

torch.set_num_threads(1)
peak(40, 2)
before = kib("VmRSS")
assert (peak(int(sys.argv[1]), int(sys.argv[2])) == int(sys.argv[2]) - 1).all()
print(kib("VmHWM") - before)
"""


def peak(slices: int, classes: int, spacing_mm: float) -> int:
    """Bytes beyond those of a small prediction, in a process of its own."""
    numbers = [str(slices), str(classes), str(spacing_mm)]
    return 1024 * int(subprocess.run([sys.executable, "-c", PEAK, *numbers], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("spacing_mm", [1.0, 0.8])  # the network's own grid, and one that shares are moved from
def test_memory_of_a_tall_scan_does_not_grow_with_the_classes(spacing_mm):
    """Shares of all 14 classes would take 14 times 4 bytes per voxel, 176 MB more than those of 3 do."""
    voxels = 64 * 64 * 1000
    few, many = peak(1000, 3, spacing_mm), peak(1000, 14, spacing_mm)
    assert many - few < 0.25 * (14 - 3) * 4 * voxels
    assert many < 14 * 4 * voxels


@pytest.mark.slow
def test_a_slice_more_costs_its_voxels_and_no_shares():
    """With the slices only image (2 bytes a voxel), prepared copy (4) and label map (1) grow; shares of 14 classes would add 56."""
    grown = (peak(1300, 14, 0.8) - peak(300, 14, 0.8)) / (64 * 64 * 1000)
    assert grown < 10
