"""References that lie in a data set: every layout, matched by the case's name, by the rules of labelled cases."""

import json
import shutil

import numpy as np
import pytest
from labelled import write_msd

from volssl.archive import read_image, read_label, write_nifti
from volssl.datasets import Data, Nodules, open_dataset
from volssl.evaluate import run
from volssl.files import BadInput, read_csv
from volssl.intake import read_case
from volssl.phantom_luna import write_luna16
from volssl.phantom_sets import write_brats, write_lits

SPHERES = Data(nodules=Nodules(source="spheres"))


def write_nnunet(out):
    """The Decathlon's folder of the tests as nnU-Net v2's."""
    write_msd(out / "msd", cases=2)
    (out / "imagesTr").mkdir()
    shutil.move(out / "msd" / "labelsTr", out / "labelsTr")
    for image in (out / "msd" / "imagesTr").iterdir():
        shutil.move(image, out / "imagesTr" / image.name.replace(".nii.gz", "_0000.nii.gz"))
    shutil.rmtree(out / "msd")
    values = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "bright": 1, "dark": 2}, "file_ending": ".nii.gz", "numTraining": 2}
    (out / "dataset.json").write_text(json.dumps(values))
    return out


# layout -> how it is written, what the recipe says, the regions that are then known
LAYOUTS = {
    "brats 2021": (lambda out: write_brats(out, patients=2, size_vox=24), "", {"WT", "TC", "ET"}),
    "brats 2023": (lambda out: write_brats(out, patients=2, year=2023, size_vox=24), "", {"WT", "TC", "ET"}),
    "lits flat": (lambda out: write_lits(out, cases=2, size_vox=24), "", {"liver", "tumour"}),
    "lits ct_seg": (lambda out: write_lits(out, cases=2, naming="ct_seg", size_vox=24), "", {"liver", "tumour"}),
    "lits msd": (lambda out: write_lits(out, cases=2, naming="msd", size_vox=24), "data: {layout: lits}", {"liver", "tumour"}),
    "msd": (lambda out: write_msd(out, cases=2), "", {"bright", "dark"}),
    "nnunet": (write_nnunet, "", {"bright", "dark"}),
    "luna16": (lambda out: write_luna16(out, scans=2, size_vox=48), "data: {nodules: {source: spheres}}", {"nodule"}),
}


def predicted(data, out, how=Data()):
    """The labels of a data set as predictions under the cases' names, as predict writes them; the table."""
    table = open_dataset(data, data=how)
    for case in table.cases:
        image, label = read_case(case, table)
        write_nifti(out / f"{case.case_id}.nii.gz", label.array_CXYZ[0], image.grid, np.uint8)
    return table


def dice_of(out):
    return {(row["case"], row["label"]): float(row["value"]) for row in read_csv(out / "cases.csv") if row["metric"] == "dice"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_by_the_names_of_its_cases(layout, tmp_path):
    write, lines, regions = LAYOUTS[layout]
    data, recipe = write(tmp_path / "data"), tmp_path / "recipe.yaml"
    recipe.write_text(f"verb: finetune\n{lines}\n")
    table = predicted(data, tmp_path / "p", SPHERES if layout == "luna16" else Data(layout="lits" if layout == "lits msd" else None))
    first, *others = (case.case_id for case in table.cases if (read_label(tmp_path / "p" / f"{case.case_id}.nii.gz").array_CXYZ > 0).any())
    right = read_label(tmp_path / "p" / f"{first}.nii.gz")
    shifted = np.roll(right.array_CXYZ[0], 2, axis=0)
    write_nifti(tmp_path / "p" / f"{first}.nii.gz", shifted, right.grid, np.uint8)
    assert run(tmp_path / "p", data, recipe=recipe, protocol="dice", out=tmp_path / "out").failed == 0
    found = dice_of(tmp_path / "out")
    assert {region for _, region in found} == regions
    assert {case for case, _ in found} == {case.case_id for case in table.cases}
    for region, values in (table.regions or {name: (value,) for name, value in table.labels.items()}).items():
        a, b = np.isin(shifted, values), np.isin(right.array_CXYZ[0], values)
        assert found[first, region] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()) if b.any() else 1, abs=1e-6)
        assert all(found[other, region] == 1 for other in others)


def test_cases_that_were_not_predicted_are_left_out_unless_the_run_held_them_out(tmp_path, capsys):
    data = write_msd(tmp_path / "data")
    predicted(data, tmp_path / "p")
    (tmp_path / "p" / "case_0.nii.gz").unlink()
    (tmp_path / "p" / "case_1.nii.gz").unlink()
    assert run(tmp_path / "p", data, out=tmp_path / "out").failed == 0
    assert {case for case, _ in dice_of(tmp_path / "out")} == {"case_2", "case_3"}
    assert "2 of the data set's 4 cases were not predicted and are left out" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("verb: finetune\n")
    (tmp_path / "run" / "splits.json").write_text('{"validation": ["case_0", "case_2", "case_99"]}')
    assert run(tmp_path / "p", data, recipe=tmp_path / "run", out=tmp_path / "held_out").failed == 1
    assert dice_of(tmp_path / "held_out")["case_0", "bright"] == 0 and ("case_1", "bright") not in dice_of(tmp_path / "held_out")


def test_no_common_name_is_one_error(tmp_path):
    data = write_lits(tmp_path / "data", cases=2, size_vox=24)
    grid = read_image(data / "volume-0.nii").grid
    write_nifti(tmp_path / "p" / "liver_7.nii.gz", np.zeros(grid.shape_vox), grid, np.uint8)
    with pytest.raises(BadInput, match="found none that does, but such as liver_7 and volume-0"):
        run(tmp_path / "p", data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rules_of_labelled_cases_hold_for_references(tmp_path):
    data, recipe = write_msd(tmp_path / "data", cases=3), tmp_path / "recipe.yaml"
    predicted(data, tmp_path / "p")
    label = read_label(data / "labelsTr" / "case_0.nii.gz")
    write_nifti(data / "labelsTr" / "case_0.nii.gz", label.array_CXYZ[0].astype(np.int16) * 100, label.grid, np.int16)
    write_nifti(data / "labelsTr" / "case_1.nii.gz", label.array_CXYZ[0] + 0.5, label.grid, np.float32)
    recipe.write_text("verb: finetune\ndata: {label_values: {100: 1, 200: 2}, leave_out: [case_9]}\n")
    assert run(tmp_path / "p", data, recipe=recipe, out=tmp_path / "out").failed == 1
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    assert failure["case"] == "case_1" and "looks like an image" in failure["reason"] and str(tmp_path) not in failure["reason"]
    found = dice_of(tmp_path / "out")
    assert found["case_0", "dark"] == 1 and found["case_1", "dark"] == 0


def test_luna16s_folder_is_findings_to_its_own_protocol_and_masks_to_others(tmp_path):
    data, recipe = write_luna16(tmp_path / "data", scans=2, size_vox=48), tmp_path / "recipe.yaml"
    predicted(data, tmp_path / "p", SPHERES)
    recipe.write_text("verb: finetune\ndata: {nodules: {source: spheres}}\nevaluation: {protocol: luna16}\n")
    run(tmp_path / "p", data, recipe=recipe, out=tmp_path / "marks")
    metrics = json.loads((tmp_path / "marks" / "summary.json").read_text())["metrics"]["nodule"]
    assert metrics["cpm"]["mean"] == 1 and "dice" not in metrics
    recipe.write_text("verb: finetune\n")
    with pytest.raises(BadInput, match="luna16"):
        run(tmp_path / "p", data, recipe=recipe, protocol="dice", out=tmp_path / "out")


def test_label_maps_under_the_names_of_images_are_no_data_set(tmp_path):
    data = write_lits(tmp_path / "data", cases=2, size_vox=24)
    predicted(data, tmp_path / "p")
    shutil.copytree(tmp_path / "p", tmp_path / "references")  # volume-0.nii.gz ... hold labels here
    assert run(tmp_path / "p", tmp_path / "references", out=tmp_path / "out").failed == 0
    assert set(dice_of(tmp_path / "out").values()) == {1.0}
