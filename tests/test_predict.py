"""Prediction: names, grids, and a bad input that does not stop the rest. The model is untrained: only what surrounds it counts."""

import nibabel
import numpy as np
import pytest

from volssl.__main__ import run_verb
from volssl.archive import read_image, write_nifti
from volssl.files import BadInput, read_csv
from volssl.predict import run
from volssl.segment import Model, Plan, write_model
from volssl.volume import Grid

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
    with pytest.raises(BadInput, match="must be nifti"):
        run(made, [folder], out=tmp_path / "out", format="dicomseg")
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
    model, out = write_run(tmp_path / "run"), small_disk("8k") / "out"  # room for the environment and one label map
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
