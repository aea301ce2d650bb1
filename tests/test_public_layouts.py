"""The phantom data sets through finetune: two folds, and what a run records of its cases."""

import pytest

from volssl.archive import read_label
from volssl.datasets import open_dataset
from volssl.files import BadInput, read_json
from volssl.finetune import Options, run
from volssl.phantom_luna import write_luna16
from volssl.phantom_sets import write_brats, write_lits

RECIPE = """
verb: finetune
data: {DATA}
labels: null
net: {name: unet, width: 4, depth: 2, norm: instance}
preparation: {spacing_mm: null, normalisation: NORMALISATION, window: [-1000, 1000]}
folds: {count: 2, seed: 0}
sampling: {patch_vox: [16, 16, 16], batch_size: 2, foreground: 0.5, margin: 0.0}
optimisation: {steps: 2, lr: 1.0e-2, precision: fp32, average: 0.9}
saving: {log_every: 1, checkpoint_every: 3}
"""


def recipe(folder, data, normalisation="window"):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", data).replace("NORMALISATION", normalisation))
    return path


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    return write_luna16(tmp_path_factory.mktemp("luna") / "data", size_vox=48)


@pytest.mark.parametrize("fold", [0, 1])
def test_brats_in_two_folds(tmp_path, fold):
    data = write_brats(tmp_path / "data", year=2023, patients=3, size_vox=24)
    run(recipe(tmp_path, "", "zscore"), data=data, out=tmp_path / "run", options=Options(fold=fold))
    splits = read_json(tmp_path / "run" / "splits.json")
    visits = [{name[:15] for name in side} for side in (splits["train"], splits["validation"])]
    assert not visits[0] & visits[1]  # both visits of a patient lie on one side
    assert splits["notes"] == {"BraTS-GLI-00002-000": ["label holds no enhancing"]}
    for name in splits["validation"]:
        image = data / name / f"{name}-t1n.nii.gz"
        assert read_label(tmp_path / "run" / "validation" / f"{name}.nii.gz").grid.almost_equal(read_label(image).grid)


@pytest.mark.parametrize("naming", ["flat", "msd"])
def test_lits_in_both_its_forms(tmp_path, naming):
    data = write_lits(tmp_path / "data", naming=naming, cases=2, size_vox=24)
    run(recipe(tmp_path, "layout: lits"), data=data, out=tmp_path / "run")
    tumourless = "liver_1" if naming == "msd" else "volume-1"
    assert read_json(tmp_path / "run" / "splits.json")["notes"] == {tumourless: ["label holds no tumour"]}


def test_luna16_by_its_own_folds_and_with_drawn_masks(tmp_path, luna):
    data = "split: official, nodules: {source: contours, where: LIDC-XML-only}"
    run(recipe(tmp_path, data), data=luna, out=tmp_path / "run", options=Options(fold=1))
    splits = read_json(tmp_path / "run" / "splits.json")
    assert splits["split"] == "official"
    assert set(splits["validation"]) == {path.stem for path in (luna / "subset1").glob("*.mhd")}
    assert list(splits["notes"].values()) == [["label is empty"]]


def test_a_split_file_rules_and_where_it_lay_is_not_told(tmp_path, luna):
    names = sorted(case.stem for case in luna.glob("subset*/*.mhd"))
    given = tmp_path / "lists" / "split.csv"
    given.parent.mkdir()
    given.write_text(f"case,fold\n{names[0]},train\n{names[1]},train\n{names[2]},valid\n")
    written = recipe(tmp_path, f"split: {given}, nodules: {{source: files, where: {luna / 'nodule_masks'}}}")
    run(written, data=luna, out=tmp_path / "run")
    splits = read_json(tmp_path / "run" / "splits.json")
    assert splits["train"] == names[:2] and splits["validation"] == names[2:3] and splits["left_out"] == names[3:]
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml", ".csv", ".jsonl"):
            assert str(tmp_path) not in path.read_text() and str(luna) not in path.read_text()
    run(written, data=luna, out=tmp_path / "run", options=Options(resume=True))  # the same run, though its recipe.yaml tells no folder
    other = tmp_path / "other.csv"
    other.write_text(f"case,fold\n{names[3]},train\n{names[2]},valid\n")
    run(written, data=luna, out=tmp_path / "second", options=Options(split=other))
    assert read_json(tmp_path / "second" / "splits.json")["train"] == [names[3]]


def test_a_layout_that_has_masks_takes_no_source_of_them(tmp_path):
    data = write_lits(tmp_path / "data", cases=2, size_vox=24)
    with pytest.raises(BadInput, match="data.nodules: is for a layout"):
        run(recipe(tmp_path, "nodules: {source: spheres}"), data=data, out=tmp_path / "run")
    assert open_dataset(data).cases and not (tmp_path / "run").exists()


def test_bad_cases_are_named_all_at_once_before_out_is_touched(tmp_path):
    data = write_lits(tmp_path / "data", cases=4, size_vox=24)
    (data / "segmentation-0.nii").unlink()
    volume, label = data / "volume-2.nii", data / "segmentation-2.nii"
    volume.rename(data / "swap")
    label.rename(volume)
    (data / "swap").rename(label)
    with pytest.raises(BadInput, match=r"(?s)2 of 4 cases.*volume-0: must have a label map.*volume-2: .*swapped"):
        run(recipe(tmp_path, ""), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(recipe(tmp_path, "leave_out: [volume-0, volume-2]"), data=data, out=tmp_path / "run")
    assert read_json(tmp_path / "run" / "splits.json")["left_out"] == ["volume-0", "volume-2"]
