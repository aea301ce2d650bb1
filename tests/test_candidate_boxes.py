"""Boxes of candidates: they hold the right place, both classes come equally often, and nothing but voxels tells the class."""

import itertools

import numpy as np
import pytest
import torch

from volssl.archive import write_nifti
from volssl.augment.intensity import Blur, Gamma
from volssl.candidate_boxes import Batch, Boxes, CandidateBoxes, Changes, Places, cropped, learnt, read_places
from volssl.datasets import Case
from volssl.draws import Draws
from volssl.files import BadInput
from volssl.froc import Findings
from volssl.segment import Preparation
from volssl.volume import Grid

GRID = Grid((30, 28, 26), np.array([[-2.0, 0, 0, 20], [0, -2.0, 0, 30], [0, 0, 2.0, -40], [0, 0, 0, 1]]))
SETTINGS = Boxes(patch_vox=(6, 6, 6), batch_size=4, negatives=5, margin=0.3)
HU = Preparation(window=(0.0, 1000.0))
LPS = np.array([-1.0, -1.0, 1.0])


def lps(voxels_N3):
    return GRID.world(np.array(voxels_N3, dtype=float)) * LPS


@pytest.fixture
def scans(tmp_path):
    """Two scans whose voxel value tells its place, with a nodule and eight other candidates each."""
    x, y, z = np.meshgrid(*map(np.arange, GRID.shape_vox), indexing="ij")
    write_nifti(tmp_path / "a.nii.gz", x + 30 * y + 0 * z, GRID, np.int16)
    cases = [Case(name, name, (tmp_path / "a.nii.gz",), None) for name in ("s1", "s2")]
    rng = np.random.default_rng(0)
    places = {case.case_id: Places(lps(rng.uniform(3, 22, (9, 3))), np.array([1] + 8 * [0], np.uint8)) for case in cases}
    return cases, places


def boxes_of(scans, settings=SETTINGS, seed=0):
    cases, places = scans
    return CandidateBoxes(cases, places, {}, preparation=HU, boxes=settings, seed=seed)


def test_the_patch_lies_about_the_candidate(scans):
    cases, _ = scans
    voxel = np.array([[12.0, 11.0, 9.0], [12.5, 11.0, 9.0], [12.5, 11.5, 9.5]])
    places = {"s1": Places(lps(voxel), np.array([1, 0, 0], np.uint8))}
    boxes = CandidateBoxes(cases[:1], places, {}, preparation=HU, boxes=SETTINGS, seed=0)
    chosen = np.arange(3)
    x = torch.from_numpy(boxes.boxes[chosen][:, None].astype(np.float32))
    batch = Batch(x, torch.from_numpy(boxes.fraction_N3[chosen]), torch.zeros(3), [], boxes.spacing_mm)
    # In RAS the first two axes are reversed; the mean of a patch about a place is the value of the plane there.
    middle = cropped(batch, (6, 6, 6)).mean((1, 2, 3, 4)).numpy() * 1000
    assert middle == pytest.approx([12 + 330, 12.5 + 330, 12.5 + 345], abs=0.3)


def test_both_classes_come_equally_often_and_in_random_order(scans):
    boxes = boxes_of(scans)
    drawn = np.stack([boxes.classes_N[boxes.indices(step)] for step in range(200)])
    assert (drawn.reshape(200, 2, 2).sum(2) == 1).all()  # one of each in every pair
    assert abs(drawn[:, 0].mean() - 0.5) < 0.12
    assert np.array_equal(boxes.indices(7), boxes_of(scans).indices(7))
    assert not all(np.array_equal(boxes.indices(step), boxes_of(scans, seed=1).indices(step)) for step in range(5))


def test_every_box_of_a_class_comes_once_before_any_comes_again(scans):
    boxes = boxes_of(scans)
    negatives = len(boxes.of_class[0])
    assert negatives == 10 and len(boxes.of_class[1]) == 2
    drawn = [index for step in range(negatives // 2) for index in boxes.indices(step) if boxes.classes_N[index] == 0]
    assert sorted(drawn) == sorted(boxes.of_class[0])


def numbers_of(changes, step, size, seed=0):
    drawn = changes.draw(Draws(seed, step, 0, size, "detect"))
    flat = [drawn["shift_mm"], drawn["affine"].flatten(1), drawn["contrast"][0], drawn["contrast"][1], drawn["noise"][0][:, None]]
    return torch.cat([*flat, drawn["blur"], drawn["gamma"][:, None]], 1).double().numpy()


def area(score, kind):
    order = np.argsort(np.argsort(score)) + 1
    positive = (kind == 1).sum()
    return (order[kind == 1].sum() - positive * (positive + 1) / 2) / (positive * (kind == 0).sum())


def auc_from_numbers(features, kinds):
    """AUC on the second half of a ridge regression, with squares and places in the batch, learnt on the first half."""
    x = np.concatenate([features, features**2, features[:, :3] ** 3], 1)
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-9)
    weights = np.linalg.solve(x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ (kinds[:half] - 0.5))
    return area(x[half:] @ weights, kinds[half:])


CHANGES = Changes(blur=Blur(1.0, share=0.5), gamma=Gamma(0.3, share=0.5))


def test_the_numbers_of_the_augmentation_tell_nothing_of_the_class(scans):
    boxes = boxes_of(scans)
    steps = 1000
    features = np.concatenate([numbers_of(CHANGES, step, SETTINGS.batch_size) for step in range(steps)])
    fractions = np.concatenate([boxes.fraction_N3[boxes.indices(step)] for step in range(steps)])
    kinds = np.concatenate([boxes.classes_N[boxes.indices(step)] for step in range(steps)]).astype(float)
    slots = np.tile(np.eye(SETTINGS.batch_size), (steps, 1))  # the place in the batch
    assert abs(auc_from_numbers(np.concatenate([features, slots], 1), kinds) - 0.5) < 0.05  # four standard errors
    assert np.abs(fractions).max() <= 0.5
    # The same test sees a leak: positives that are shifted less, as when they alone are centred.
    leaky = features.copy()
    leaky[kinds == 1, :3] *= 0.5
    assert auc_from_numbers(np.concatenate([leaky, slots], 1), kinds) > 0.6


def test_a_sample_is_changed_alike_whatever_its_class(scans):
    boxes = boxes_of(scans)
    batch = boxes.batch(3)
    numbers = CHANGES.draw(Draws(0, 3, 0, 4, "detect"))
    one = CHANGES.apply(batch, numbers, (6, 6, 6))
    other = CHANGES.apply(Batch(batch.x_B1XYZ, batch.fraction_B3, 1 - batch.y_B, batch.case_ids, batch.spacing_mm), numbers, (6, 6, 6))
    assert torch.equal(one, other) and one.shape == (4, 1, 6, 6, 6)
    assert not torch.equal(one, CHANGES.apply(batch, CHANGES.draw(Draws(0, 4, 0, 4, "detect")), (6, 6, 6)))


def test_a_shift_moves_the_patch_by_its_millimetres(scans):
    boxes = boxes_of(scans)
    batch = boxes.batch(0)
    plain = cropped(batch, (6, 6, 6))
    moved = Changes(affine=None, contrast=None, noise=None).apply(batch, {"shift_mm": torch.tensor([[2.0, 0.0, 0.0]] * 4)}, (6, 6, 6))
    assert torch.allclose(moved[:, :, :-1], plain[:, :, 1:], atol=1e-5)


def test_marks_on_irrelevant_findings_are_not_learnt_from():
    places = Places(np.array([[0.0, 0, 0], [1, 0, 0], [50, 0, 0], [90, 0, 0]]), np.array([1, 0, 0, 0], np.uint8))
    irrelevant = Findings(np.array([[2.0, 0, 0], [90, 0, 0]]), np.array([5.0, 5.0]), np.array([False, True]))
    assert learnt("s", places, irrelevant, negatives=9).tolist() == [0, 2, 3]
    assert len(learnt("s", places, irrelevant, negatives=1)) == 2


def test_the_draw_of_negatives_is_fixed_and_nested():
    places = Places(np.zeros((30, 3)), np.zeros(30, np.uint8))
    drawn = [set(learnt("s", places, Findings(), negatives=n).tolist()) for n in (3, 10, 40)]
    assert [len(d) for d in drawn] == [3, 10, 30] and all(a <= b for a, b in itertools.pairwise(drawn))
    assert learnt("t", places, Findings(), negatives=3).tolist() != sorted(drawn[0])


def test_boxes_in_a_temporary_file_are_the_same(scans):
    one, other = boxes_of(scans), boxes_of(scans, Boxes(**{**vars(SETTINGS), "memory_gb": 0.0}))
    assert isinstance(other.boxes, np.memmap) and np.array_equal(one.boxes, other.boxes)


def test_tables_are_read_or_refused(tmp_path):
    path = tmp_path / "candidates_V2.csv"
    path.write_text("seriesuid,coordX,coordY,coordZ,class\na,1,2,3,1\nb,4,5,6,0\na,7,8,9,0\n")
    places = read_places(path, ["a", "none"])
    assert places["a"].at_N3.tolist() == [[1, 2, 3], [7, 8, 9]] and places["a"].classes_N.tolist() == [1, 0]
    assert places["none"].at_N3.shape == (0, 3)
    for text, message in [
        ("seriesuid,coordX,coordY,coordZ\na,1,2,3\n", "class missing"),
        ("seriesuid,coordX,coordY,coordZ,class\na,1,2,3,2\nb,x,2,3,1\n", "2 row"),
    ]:
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            read_places(path, ["a"])
    with pytest.raises(BadInput, match="found no absent.csv"):
        read_places(tmp_path / "absent.csv", [])


def test_scans_that_cannot_be_used_are_named_at_once(scans):
    cases, places = scans
    outside = {name: Places(of.at_N3 + 500, of.classes_N) for name, of in places.items()}
    with pytest.raises(BadInput, match=r"(?s)2 of 2 scans.*s1: candidates must lie in the image.*s2"):
        CandidateBoxes(cases, outside, {}, preparation=HU, boxes=SETTINGS, seed=0)
    with pytest.raises(BadInput, match="must have both classes; found 0 nodules"):
        CandidateBoxes(
            cases, {n: Places(of.at_N3, 0 * of.classes_N) for n, of in places.items()}, {}, preparation=HU, boxes=SETTINGS, seed=0
        )
    with pytest.raises(BadInput, match="batch_size even"):
        Boxes(batch_size=3)
