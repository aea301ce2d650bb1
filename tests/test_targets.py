"""Overlapping regions: label map -> targets and back, by hand and by every label map there is."""

import numpy as np
import pytest
import torch

from volssl.files import BadInput
from volssl.targets import check_regions, region_masks, region_values, targets_of, written

BRATS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
LABELS = {"necrosis": 1, "oedema": 2, "enhancing": 4}


def test_each_region_writes_the_value_no_later_one_holds():
    assert region_values(BRATS) == (2, 1, 4)
    assert region_values({"liver": (1, 2), "tumour": (2,)}) == (1, 2)


def test_masks_by_hand_and_back():
    label = np.array([0, 1, 2, 4], dtype=np.uint8).reshape(1, 1, 1, 1, 4)
    index = torch.from_numpy(np.searchsorted([0, 1, 2, 4], label))
    masks = region_masks(index, values=[0, 1, 2, 4], regions=BRATS)
    assert masks.dtype == torch.float32
    assert masks[0, :, 0, 0].tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    np.testing.assert_array_equal(written(masks[0].numpy() > 0, BRATS), label[0, 0])


def test_every_sample_and_region_has_its_own_mask():
    index = torch.randint(0, 4, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    masks = region_masks(index, values=[0, 1, 2, 4], regions=BRATS)
    label = np.array([0, 1, 2, 4])[index[:, 0]]
    for r, held in enumerate(BRATS.values()):
        np.testing.assert_array_equal(masks[:, r].numpy(), np.isin(label, held))


def test_a_smaller_region_stands_where_no_larger_one_is():
    inside = np.array([[True, False, False], [True, True, False], [False, True, True]]).reshape(3, 3, 1, 1)
    assert written(inside, BRATS).ravel().tolist() == [1, 4, 4]


def test_targets_are_the_regions_or_each_label():
    assert targets_of(LABELS, BRATS) == BRATS
    assert targets_of({"liver": 1, "tumour": 2}, {}) == {"liver": (1,), "tumour": (2,)}


@pytest.mark.parametrize(
    ("regions", "told"),
    [
        ({"WT": (1, 2, 4), "ET": (4,)}, r"WT \(1, 2, 4\): exactly one value.*found \[1, 2\]"),
        ({"ET": (4,), "TC": (1, 4), "WT": (1, 2, 4)}, r"ET \(4,\).*found none.*largest to the smallest"),
        ({"WT": (1, 2, 3)}, r"those of labels.*found \[3\].*enhancing lies in none"),
        ({"TC": (1, 4), "ET": (4,)}, "oedema lies in none"),
    ],
)
def test_regions_that_cannot_be_written_are_refused(regions, told):
    with pytest.raises(BadInput, match=told):
        check_regions(LABELS, regions)
    check_regions(LABELS, BRATS)
    check_regions(LABELS, {})
