"""Folds, labelled shares, patches and the labels that move with them."""

import itertools
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import LABELS, write_msd

from volssl.archive import write_nifti
from volssl.augment.spatial import Affine
from volssl.cases import Augmentation, Batch, Folds, LabelledPatches, Sampling, centres, cut, labelled_share, split
from volssl.datasets import Case, CaseTable, open_dataset
from volssl.draws import Draws
from volssl.files import BadInput
from volssl.intake import read_case, take_case
from volssl.segment import Preparation
from volssl.volume import Grid

SAMPLING = Sampling(patch_vox=(16, 16, 16), batch_size=2, foreground=1.0, margin=0.0)


def table_of(patients: dict[str, str]) -> CaseTable:
    return CaseTable(tuple(Case(case, patient, (Path("x"),), Path("y")) for case, patient in patients.items()), LABELS, ("CT",))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return open_dataset(write_msd(tmp_path_factory.mktemp("data")))


def patches(table, sampling=SAMPLING, seed=0):
    return LabelledPatches(table, train=table.cases[:3], held_out=table.cases[3:], preparation=Preparation(), sampling=sampling, seed=seed)


def test_folds_hold_every_case_once_and_keep_patients_together():
    table = table_of({f"c{i}": f"p{i // 2}" for i in range(20)})
    folds = split(table, Folds(count=5, seed=1))
    assert sorted(case.case_id for fold in folds for case in fold) == sorted(case.case_id for case in table.cases)
    patients = [{case.patient_id for case in fold} for fold in folds]
    assert all(not one & other for i, one in enumerate(patients) for other in patients[:i])
    assert {len(fold) for fold in patients} == {2}


def test_folds_do_not_depend_on_the_order_of_the_files():
    cases = {f"c{i}": f"p{i}" for i in range(10)}
    one, other = (split(table_of(dict(items)), Folds()) for items in (cases.items(), reversed(cases.items())))
    assert [{case.case_id for case in fold} for fold in one] == [{case.case_id for case in fold} for fold in other]
    assert split(table_of(cases), Folds(seed=1)) != split(table_of(cases), Folds(seed=0))


def test_more_folds_than_patients_are_refused():
    with pytest.raises(BadInput, match="3 folds, 2 patient"):
        split(table_of({"a": "p", "b": "p", "c": "q"}), Folds(count=3))


def test_labelled_shares_are_nested_and_by_patient():
    cases = table_of({f"c{i}": f"p{i // 2}" for i in range(40)}).cases
    drawn = [{case.case_id for case in labelled_share(cases, share, 0)} for share in (0.05, 0.1, 0.5, 1.0)]
    assert [len(d) for d in drawn] == [2, 4, 20, 40]
    assert all(small <= large for small, large in itertools.pairwise(drawn))
    assert {case.case_id for case in labelled_share(cases, 2, 0)} == drawn[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 3), st.lists(st.one_of(st.floats(0.001, 1.0), st.integers(1, 60)), min_size=2, max_size=4))
def test_any_two_draws_are_nested_and_at_least_one_patient(patients, seed, wanted):
    cases = table_of({f"c{i}": f"p{i // 2}" for i in range(2 * patients)}).cases
    drawn = [{c.case_id for c in labelled_share(cases, w, seed)} for w in wanted if not isinstance(w, int) or w <= patients]
    assert all(2 <= len(d) <= 2 * patients and len(d) % 2 == 0 for d in drawn)
    assert all(one <= other or other <= one for one, other in itertools.combinations(drawn, 2))
    assert len(labelled_share(cases, 1, seed)) == 2  # a count
    assert len(labelled_share(cases, 1.0, seed)) == 2 * patients  # a share


@pytest.mark.parametrize("labels", [0.0, 1.5, 0, 21])
def test_shares_and_counts_out_of_range_are_refused(labels):
    cases = table_of({f"c{i}": f"p{i}" for i in range(20)}).cases
    with pytest.raises(BadInput, match="--labels"):
        labelled_share(cases, labels, 0)


def test_a_batch_is_a_function_of_seed_and_step(table):
    one, again = patches(table).batch(5), patches(table).batch(5)
    assert torch.equal(one.x_BCXYZ, again.x_BCXYZ)
    assert torch.equal(one.y_B1XYZ, again.y_B1XYZ)
    assert not torch.equal(one.x_BCXYZ, patches(table, seed=1).batch(5).x_BCXYZ)


def test_every_case_comes_once_before_any_comes_again(table):
    drawn = patches(table)
    names = [name for step in range(3) for name in drawn.batch(step).case_ids]
    assert sorted(names) == sorted(2 * [case.case_id for case in table.cases[:3]])


def test_foreground_patches_hold_a_label(table):
    drawn = patches(table, Sampling(patch_vox=(4, 4, 4), batch_size=4, foreground=1.0, margin=0.0))
    for step in range(10):
        assert (drawn.batch(step).y_B1XYZ > 0).flatten(1).any(1).all()


def test_memory_and_file_hold_the_same(table):
    in_file = patches(table, Sampling(patch_vox=(16, 16, 16), batch_size=2, foreground=1.0, margin=0.0, memory_gb=0.0))
    assert isinstance(in_file.cases[0].x, Path) and isinstance(in_file.cases[0].x_CXYZ, np.memmap)
    assert torch.equal(in_file.batch(3).x_BCXYZ, patches(table).batch(3).x_BCXYZ)


def test_half_the_bytes_hold_nearly_the_same(table):
    exact, halved = patches(table), patches(table, replace(SAMPLING, stored="float16", memory_gb=0.0))
    assert halved.cases[0].x_CXYZ.dtype == np.float16
    one, other = exact.batch(3), halved.batch(3)
    assert other.x_BCXYZ.dtype == torch.float32
    assert 0 < (one.x_BCXYZ - other.x_BCXYZ).abs().max() <= 2**-12  # half a step of float16 in [0.5, 1]
    assert torch.equal(one.y_B1XYZ, other.y_B1XYZ)


def test_more_files_than_a_process_may_hold_open(tmp_path, table):
    many = CaseTable(tuple(replace(table.cases[0], case_id=f"c{i}") for i in range(60)), table.labels, table.channels)
    with limit_of_open_files(96):
        drawn = LabelledPatches(
            many, train=many.cases, held_out=(), preparation=Preparation(), sampling=replace(SAMPLING, memory_gb=0.0), seed=0
        )
        assert {name for step in range(30) for name in drawn.batch(step).case_ids} == {case.case_id for case in many.cases}


@contextmanager
def limit_of_open_files(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_room_is_told_after_the_first_cases(tmp_path, table, capsys, monkeypatch):
    many = CaseTable(tuple(replace(table.cases[i % 3], case_id=f"c{i:02d}") for i in range(30)), table.labels, table.channels)
    read = []
    monkeypatch.setattr("volssl.cases.take_case", lambda case, table: read.append(case.case_id) or take_case(case, table))
    given = {"train": many.cases, "held_out": (), "preparation": Preparation(), "seed": 0}
    gb = 30 * 20 * 18 * 16 * 5 / 1e9
    drawn = LabelledPatches(many, **given, sampling=replace(SAMPLING, memory_gb=0.25 * gb))
    assert "30 prepared cases take about 0.0 GB, of which" in capsys.readouterr().err
    assert [case.case_id for case in drawn.cases] == [case.case_id for case in many.cases]
    read.clear()
    monkeypatch.setattr("volssl.cases.shutil.disk_usage", lambda path: SimpleNamespace(free=0.5 * gb * 1e9))
    with pytest.raises(BadInput, match=r"sampling\.memory_gb: 30 prepared cases.*stored=float16"):
        LabelledPatches(many, **given, sampling=replace(SAMPLING, memory_gb=0.25 * gb))
    assert read == ["c00", "c10", "c20"]  # from all over, and no more


def lesions():
    """One lesion of 1000 voxels, one of 27 and one of 1."""
    mask = np.zeros((40, 20, 20), dtype=bool)
    mask[2:12, 2:12, 2:12] = mask[20:23, 5:8, 5:8] = mask[35, 10, 10] = True
    return mask


@pytest.mark.parametrize(("power", "shares"), [(1, (1000 / 1028, 27 / 1028, 1 / 1028)), (0, (1 / 3,) * 3), (-1, (0.001, 0.0357, 0.9634))])
def test_lesions_are_drawn_by_volume_or_against_it(power, shares):
    voxels = np.concatenate([centres(lesions(), power=power, source=np.random.default_rng(i)) for i in range(4)])
    assert lesions()[tuple(voxels.T)].all()
    drawn = [np.mean(voxels[:, 0] < 15), np.mean((voxels[:, 0] > 15) & (voxels[:, 0] < 30)), np.mean(voxels[:, 0] > 30)]
    np.testing.assert_allclose(drawn, shares, atol=0.02)


def test_a_small_lesion_is_seen_as_often_as_a_large_one(tmp_path):
    """End to end: patches of a case with a large and a tiny lesion hold the tiny one in about half of the samples."""
    grid = Grid((40, 20, 20), np.eye(4))
    (tmp_path / "in").mkdir()
    label = np.where(np.arange(40)[:, None, None] < 30, lesions(), False)
    label[20:23], label[25, 10, 10] = False, True
    write_nifti(tmp_path / "x.nii.gz", np.random.default_rng(0).normal(0, 30, grid.shape_vox), grid, np.int16)
    write_nifti(tmp_path / "y.nii.gz", label, grid, np.uint8)
    case = Case("a", "a", (tmp_path / "x.nii.gz",), tmp_path / "y.nii.gz")
    table = CaseTable((case,), {"lesion": 1}, ("CT",))

    def share(power):
        sampling = Sampling(patch_vox=(8, 8, 8), batch_size=20, foreground=1.0, lesion_power=power, margin=0.0)
        drawn = LabelledPatches(table, train=[case], held_out=[], preparation=Preparation(), sampling=sampling, seed=0)
        sums = torch.cat([drawn.batch(step).y_B1XYZ.flatten(1).long().sum(1) for step in range(10)])
        return (sums == 1).float().mean().item()

    assert share(1.0) < 0.05
    assert 0.35 < share(0.0) < 0.65


def test_beyond_the_brain_nothing_is_kept(tmp_path):
    grid = Grid((30, 20, 16), np.eye(4))
    image = np.zeros(grid.shape_vox)
    image[5:20, 4:12, 3:9] = np.random.default_rng(0).normal(500, 40, (15, 8, 6))
    label = np.zeros(grid.shape_vox)
    label[18:22, 6, 6] = 1  # reaches out of the brain, and is kept
    write_nifti(tmp_path / "x.nii.gz", image, grid, np.int16)
    write_nifti(tmp_path / "y.nii.gz", label, grid, np.uint8)
    case = Case("a", "a", (tmp_path / "x.nii.gz",), tmp_path / "y.nii.gz")
    table = CaseTable((case,), {"lesion": 1}, ("T1",))
    preparation = Preparation(normalisation="zscore", nonzero=True)
    drawn = LabelledPatches(table, train=[case], held_out=[], preparation=preparation, sampling=SAMPLING, seed=0)
    prepared = drawn.cases[0]
    assert prepared.y_XYZ.shape == (17, 8, 6) and prepared.y_XYZ.sum() == 4
    whole = preparation.image(read_case(case, table)[0]).array_CXYZ
    assert (whole[0][image == 0] == 0).all()
    assert whole[0][image != 0].mean() == pytest.approx(0, abs=1e-5)
    np.testing.assert_array_equal(prepared.x_CXYZ, whole[:, 5:22, 4:12, 3:9])


def test_cut_fills_outside_with_0():
    array = np.arange(1, 9).reshape(2, 2, 2)
    box = cut(array, np.array([-1, 0, 1]), np.array([3, 2, 2]))
    assert box.shape == (3, 2, 2)
    assert box[0].sum() == 0
    np.testing.assert_array_equal(box[1:, :, 0], array[:, :, 1])


def test_labels_move_with_the_image():
    x = torch.zeros(3, 1, 16, 16, 16)
    x[:, :, 3:9, 5:12, 4:7] = 1
    batch = Batch(x, x.to(torch.uint8), list("abc"), (1.0, 1.0, 2.0))
    change = Augmentation(Affine(flip_share=(1, 1, 1), scale=0.2, degrees=20), None, None, None, None)
    moved, labels = change.apply(batch, Draws(0, 0, 0, 3), patch_vox=(16, 16, 16), classes=2)
    assert torch.equal(labels, (moved > 0.5).long())
    assert labels.sum() > 0


def test_without_changes_the_margin_is_cut_off():
    x = torch.randn(2, 1, 20, 20, 20)
    batch = Batch(x, (x > 0).to(torch.uint8), list("ab"), (1.0, 1.0, 1.0))
    same, labels = Augmentation(None, None, None, None, None).apply(batch, Draws(0, 0, 0, 2), patch_vox=(16, 16, 16), classes=2)
    assert torch.equal(same, x[:, :, 2:18, 2:18, 2:18])
    assert torch.equal(labels, (same > 0).long())


def test_all_complaints_come_at_once(tmp_path):
    table = open_dataset(write_msd(tmp_path))
    shifted = np.eye(4)
    shifted[:3, 3] = 0.5
    empty = np.zeros((20, 18, 16))
    write_nifti(tmp_path / "labelsTr" / "case_0.nii.gz", empty, Grid(empty.shape, shifted), np.uint8)
    write_nifti(tmp_path / "labelsTr" / "case_1.nii.gz", empty + 9, Grid(empty.shape, np.eye(4)), np.uint8)
    holed = empty.copy()
    holed[3] = np.nan
    write_nifti(tmp_path / "imagesTr" / "case_3.nii.gz", holed, Grid(empty.shape, np.eye(4)), np.float32)
    with pytest.raises(BadInput, match=r"(?s)3 of 4 cases.*case_0.*image's grid.*case_1.*found \[9\].*case_3.*NaN"):
        patches(table)


def test_channels_are_counted(tmp_path):
    table = open_dataset(write_msd(tmp_path, channels=2))
    with pytest.raises(BadInput, match="must have 2 channel"):
        read_case(table.cases[0], table)


def test_no_room_for_prepared_cases_names_the_setting(table, monkeypatch):
    def full(path, array):
        raise OSError("5760 requested and 3968 written")

    monkeypatch.setattr("volssl.cases.np.save", full)
    with pytest.raises(BadInput, match=r"sampling\.memory_gb.*3968 written.*TMPDIR"):
        patches(table, Sampling(patch_vox=(16, 16, 16), batch_size=2, memory_gb=0.0))
