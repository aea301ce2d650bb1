"""Connected parts and the cleaning of label maps by their size, by hand."""

import numpy as np
import pytest

from volssl.components import Cleaning, Replacement, bounding_box, parts_of
from volssl.files import BadInput

LITS, LIVER = {"liver": (1, 2), "tumour": (2,)}, {"liver": 1, "tumour": 2}
BRATS, TUMOUR = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}, {"necrosis": 1, "oedema": 2, "enhancing": 4}


def cleaned(cleaning, label, *, targets=LITS, labels=LIVER, spacing_mm=(1.0, 1.0, 1.0)):
    return cleaning.apply(label, targets=targets, labels=labels, spacing_mm=spacing_mm)


def belly():
    """A liver of 6x6x6 with a tumour in it, touching its rim; a smaller island of liver with tumour; a lone tumour."""
    label = np.zeros((20, 12, 12), dtype=np.uint8)
    label[1:7, 1:7, 1:7] = 1
    label[6:8, 2:4, 2:4] = 2
    label[12:15, 1:4, 1:4] = 1
    label[13, 2, 2] = 2
    label[18, 10, 10] = 2
    return label


def test_parts_touch_by_faces_edges_and_corners():
    mask = np.zeros((6, 6, 6), dtype=bool)
    mask[1, 1, 1] = mask[2, 2, 2] = mask[4, 2, 2] = True
    parts = parts_of(mask)
    assert parts is not None
    assert parts.box == (slice(1, 5), slice(1, 3), slice(1, 3)) == bounding_box(mask)
    assert sorted(parts.sizes_vox.tolist()) == [1, 2]
    assert parts_of(np.zeros((3, 3, 3), dtype=bool)) is None


def test_the_largest_liver_keeps_its_tumour_and_the_islands_go():
    label = cleaned(Cleaning(largest=("liver",)), belly())
    expected = belly()
    expected[10:] = 0
    np.testing.assert_array_equal(label, expected)
    assert (label == 2).sum() == 8  # also the half of the tumour that stands out of the liver's rim


def test_background_is_never_kept():
    """The rule of a public fork kept the largest part of any value, which is the air."""
    label = belly()
    assert (cleaned(Cleaning(largest=("liver",)), label) == 0).sum() > (label == 0).sum()
    empty = np.zeros((5, 5, 5), dtype=np.uint8)
    np.testing.assert_array_equal(cleaned(Cleaning(largest=("liver", "tumour"), smallest_mm3={"tumour": 9.0}), empty), empty)
    full = np.ones((5, 5, 5), dtype=np.uint8)
    np.testing.assert_array_equal(cleaned(Cleaning(largest=("liver",)), full), full)


def test_small_lesions_become_what_is_around_them():
    label = np.zeros((8, 8, 8), dtype=np.uint8)
    label[1:7, 1:7, 1:7] = 1
    label[2, 2, 2], label[4:6, 4:6, 4:6] = 2, 2
    out = cleaned(Cleaning(smallest_mm3={"tumour": 5.0}), label)
    assert out[2, 2, 2] == 1 and (out == 2).sum() == 8
    assert (cleaned(Cleaning(smallest_mm3={"tumour": 5.0}), label, spacing_mm=(1, 2, 3)) == 2).sum() == 9  # one voxel has 6 mm3
    assert (cleaned(Cleaning(smallest_mm3={"tumour": 8.0}), label) == 2).sum() == 8  # below, not at
    alone = np.where(label == 2, 1, 0).astype(np.uint8)
    assert (cleaned(Cleaning(smallest_mm3={"nodule": 5.0}), alone, targets={"nodule": (1,)}, labels={"nodule": 1}) == 1).sum() == 8


def test_a_small_core_becomes_oedema_and_too_little_enhancing_becomes_necrosis():
    label = np.zeros((9, 9, 9), dtype=np.uint8)
    label[1:8, 1:8, 1:8] = 2
    label[2:4, 2:4, 2:4] = 1
    label[2, 2, 2] = label[6, 6, 6] = 4
    small = cleaned(Cleaning(smallest_mm3={"TC": 4.0}), label, targets=BRATS, labels=TUMOUR)
    assert small[6, 6, 6] == 2 and small[2, 2, 2] == 4
    rule = Cleaning(replaced={"ET": Replacement(3.0, "necrosis")})
    out = cleaned(rule, label, targets=BRATS, labels=TUMOUR)
    assert out[2, 2, 2] == out[6, 6, 6] == 1
    np.testing.assert_array_equal(cleaned(rule, label, targets=BRATS, labels=TUMOUR, spacing_mm=(1, 1, 1.5)), label)  # 3 mm3 are enough


def test_what_is_given_is_not_changed():
    label = belly()
    cleaned(Cleaning(largest=("liver",), smallest_mm3={"tumour": 100.0}), label)
    np.testing.assert_array_equal(label, belly())


@pytest.mark.parametrize(
    ("cleaning", "told"),
    [
        (Cleaning(largest=("lung",)), "lung: must be one of liver, tumour"),
        (Cleaning(smallest_mm3={"tumour": 0.0}), "above 0 mm3; found 0"),
        (Cleaning(replaced={"tumour": Replacement(1.0, "air")}), "must be one of liver, tumour; found air"),
    ],
)
def test_rules_for_what_is_not_there_are_refused(cleaning, told):
    with pytest.raises(BadInput, match=told):
        cleaning.check(LITS, LIVER)
    Cleaning(("liver",), {"tumour": 1.0}, {"tumour": Replacement(1.0, "liver")}).check(LITS, LIVER)
