"""BraTS 2023: the toy case by hand, and the published rule written once more, lesion by lesion over whole volumes."""

import numpy as np
import pytest
from scipy import ndimage

from volssl.files import BadInput
from volssl.protocols.brats2023 import Brats2023
from volssl.protocols.brats_voxel import brats_regions
from volssl.protocols.protocol import Pair
from volssl.surface import surfaces
from volssl.volume import Grid, Volume

SHAPE = (64, 40, 24)


def pair(predicted: np.ndarray, reference: np.ndarray, spacing_mm=(1.0, 1.0, 1.0)) -> Pair:
    grid = Grid(predicted.shape, np.diag([*spacing_mm, 1.0]))
    maps = [Volume(array[None].astype(np.uint8), grid) for array in (predicted, reference)]
    return Pair("case", *maps, {"ET": (1,)})


def scores(predicted: np.ndarray, reference: np.ndarray, protocol=None, spacing_mm=(1.0, 1.0, 1.0)) -> dict[str, float]:
    return {row.metric: row.value for row in (protocol or Brats2023()).judge(pair(predicted, reference, spacing_mm)).rows}


def toy() -> tuple[np.ndarray, np.ndarray]:
    """One fragmented, one split, one tiny missed lesion and one false positive; voxels of 1 mm.

    fragmented: the reference has 5x5x6 = 150 and 5x5x4 = 100 voxels, 4 voxels apart: 3 rounds of dilation join them to one lesion of 250,
        of which the prediction has the larger fragment: Dice = 2 * 150 / (150 + 250) = 3/4.
    split: the reference has 5x5x5 = 125 voxels; the prediction lacks its middle layer of 25, and so has two pieces of 50, which both
        belong to the lesion: Dice = 2 * 100 / (100 + 125) = 8/9.
    tiny: 3x3x3 = 27 mm^3, not above 50: missed, and not counted.
    false positive: 2x2x2 voxels far from all: counts one lesion of Dice 0.
    (3/4 + 8/9 + 0) / (2 lesions + 1 false positive) = 59/108 = 0.546.
    """
    reference, predicted = np.zeros(SHAPE, dtype=np.uint8), np.zeros(SHAPE, dtype=np.uint8)
    reference[5:10, 5:10, 2:8] = predicted[5:10, 5:10, 2:8] = 1
    reference[5:10, 5:10, 12:16] = 1
    reference[30:35, 5:10, 5:10] = predicted[30:35, 5:10, 5:10] = 1
    predicted[30:35, 5:10, 7] = 0
    reference[5:8, 30:33, 5:8] = 1
    predicted[50:52, 30:32, 5:7] = 1
    return predicted, reference


def test_the_toy_case_scores_0_546():
    found = scores(*toy())
    assert found["lesion_dice"] == pytest.approx(59 / 108)
    assert round(found["lesion_dice"], 3) == 0.546
    assert (found["lesions_tp"], found["lesions_fn"], found["lesions_fp"]) == (2, 0, 1)
    (row,) = [row for row in Brats2023().judge(pair(*toy())).rows if row.metric == "lesion_dice"]
    assert row.note == "false positives: 1; lesions too small to count: 1"
    # Of the whole region: 250 voxels in common, 258 predicted, 402 in the reference.
    assert found["dice"] == pytest.approx(2 * 250 / (258 + 402))


def test_the_distances_of_the_toy_case():
    predicted, reference = toy()
    fragmented = surfaces(predicted[:12, :12] > 0, reference[:12, :12] > 0, (1, 1, 1)).percentile(95)
    split = surfaces(predicted[28:37, :12] > 0, reference[28:37, :12] > 0, (1, 1, 1)).percentile(95)
    # Of the fragment that was not found the far side is 8 mm from the one that was; of the split lesion nothing is further than its gap.
    assert 7 <= fragmented <= 8 and split <= 2.5
    assert scores(predicted, reference)["lesion_hd95"] == pytest.approx((fragmented + split + 374) / 3)


def by_the_book(predicted: np.ndarray, reference: np.ndarray, *, spacing_mm, rounds=3, least=50.0) -> tuple[float, float]:
    """The challenge's steps one after the other on whole volumes, without a thought for speed."""
    near, touching = ndimage.generate_binary_structure(3, 2), np.ones((3, 3, 3))
    parts = ndimage.label(predicted, touching)[0]
    zones = ndimage.label(ndimage.binary_dilation(reference, near, iterations=rounds), touching)[0]
    reached, dices, distances = set(), [], []
    for number in range(1, zones.max() + 1):
        lesion = reference.astype(bool) & (zones == number)
        around = ndimage.binary_dilation(lesion, near, iterations=rounds)
        members = sorted(set(parts[around].tolist()) - {0})
        reached |= set(members)
        if lesion.sum() * np.prod(spacing_mm) <= least:
            continue
        found = np.isin(parts, members)
        dices.append(2 * (found & lesion).sum() / (found.sum() + lesion.sum()))
        distances.append(surfaces(found, lesion, spacing_mm).percentile(95) if members else 374.0)
    false = len(set(range(1, parts.max() + 1)) - reached)
    total = len(dices) + false
    return (sum(dices) / total, (sum(distances) + 374 * false) / total) if total else (1.0, 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_parity_with_the_published_steps(seed):
    rng, spacing_mm = np.random.default_rng(seed), (0.9, 1.1, 2.0)
    noise = ndimage.gaussian_filter(rng.normal(size=(48, 40, 30)), 2.0)
    other = noise + 0.4 * ndimage.gaussian_filter(rng.normal(size=noise.shape), 1.5)
    predicted, reference = other > np.quantile(other, 0.985), noise > np.quantile(noise, 0.98)
    found = scores(predicted, reference, spacing_mm=spacing_mm)
    assert (found["lesion_dice"], found["lesion_hd95"]) == pytest.approx(by_the_book(predicted, reference, spacing_mm=spacing_mm))
    assert found["lesions_tp"] + found["lesions_fn"] + found["lesions_fp"] > 2


def test_a_missed_lesion_and_a_false_positive_cost_0_and_374():
    predicted, reference = np.zeros(SHAPE, dtype=np.uint8), np.zeros(SHAPE, dtype=np.uint8)
    reference[5:10, 5:10, 5:10] = predicted[5:10, 5:10, 5:10] = 1
    perfect = scores(predicted, reference)
    assert (perfect["lesion_dice"], perfect["lesion_hd95"], perfect["lesions_tp"]) == (1, 0, 1)
    reference[40:45, 5:10, 5:10] = 1
    missed = scores(predicted, reference)
    assert (missed["lesion_dice"], missed["lesion_hd95"], missed["lesions_fn"]) == (0.5, 187, 1)
    predicted[20:22, 30:32, 5:7] = 1
    both = scores(predicted, reference)
    assert (both["lesion_dice"], both["lesion_hd95"], both["lesions_fp"]) == (pytest.approx(1 / 3), pytest.approx(2 * 374 / 3), 1)


def test_a_prediction_of_a_tiny_lesion_counts_neither_way():
    predicted, reference = toy()
    predicted[5:8, 30:33, 5:8] = 1
    assert scores(predicted, reference)["lesion_dice"] == pytest.approx(59 / 108)


def test_empty_cases():
    none, some = np.zeros(SHAPE, dtype=np.uint8), toy()[1]
    assert (scores(none, none)["lesion_dice"], scores(none, none)["lesion_hd95"]) == (1, 0)
    assert (scores(none, some)["lesion_dice"], scores(none, some)["lesion_hd95"], scores(none, some)["hd95"]) == (0, 374, 374)
    assert (scores(some, none)["lesion_dice"], scores(some, none)["lesion_hd95"], scores(some, none)["hd95"]) == (0, 374, 374)


def test_the_dilation_and_the_least_volume_are_settings():
    predicted, reference = toy()
    # Not joined, the smaller fragment is a missed lesion of its own: (1 + 0 + 8/9 + 0) / 4; and 27 mm^3 count from 20 on.
    assert scores(predicted, reference, Brats2023(dilation=1))["lesion_dice"] == pytest.approx((1 + 8 / 9) / 4)
    assert scores(predicted, reference, Brats2023(least_mm3=20))["lesion_dice"] == pytest.approx((3 / 4 + 8 / 9) / 4)
    with pytest.raises(BadInput, match="dilation"):
        Brats2023(dilation=-1)


@pytest.mark.parametrize(("values", "et"), [((1, 2, 4), 4), ((1, 2, 3), 3), ((1, 2), 3)])
def test_the_regions_of_both_label_conventions(values, et):
    found = brats_regions({str(value): value for value in values}, {})
    assert found == {"WT": (1, 2, et), "TC": (1, et), "ET": (et,)}


def test_other_labels_are_refused_and_given_regions_kept():
    with pytest.raises(BadInput, match="regions WT, TC and ET"):
        brats_regions({"a": 1, "b": 3, "c": 4}, {})
    assert brats_regions({"a": 1, "b": 7}, {"whole": [1, 7], "core": [7]}) == {"whole": (1, 7), "core": (7,)}
