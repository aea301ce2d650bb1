"""The rules for labelled cases: what is refused and how it is named, what is taken and what is noted."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from volssl.archive import write_nifti
from volssl.datasets import Case, CaseTable
from volssl.files import BadInput
from volssl.formats import read_file
from volssl.intake import read_case, take_case
from volssl.volume import Grid

GRID = Grid((12, 10, 8), np.diag([-1.0, -1.0, 2.0, 1.0]))
LABELS = {"liver": 1, "tumour": 2}


def image(seed=0):
    return np.random.default_rng(seed).normal(0, 100, GRID.shape_vox).astype(np.int16)


def label(values=(1, 2)):
    array = np.zeros(GRID.shape_vox, np.int16)
    for place, value in enumerate(values):
        array[2 + 3 * place : 4 + 3 * place, 3:6, 2:5] = value
    return array


def case(folder: Path, *, images=None, labels=None, grid=GRID, dtype=np.int16) -> Case:
    paths = []
    for number, array in enumerate(images or [image()]):
        paths.append(folder / f"image_{number}.nii.gz")
        write_nifti(paths[-1], array, GRID, np.int16)
    write_nifti(folder / "label.nii.gz", label() if labels is None else labels, grid, dtype)
    return Case("case_7", "p", tuple(paths), folder / "label.nii.gz")


def table(channels=1, **more):
    return CaseTable((), LABELS, tuple(f"c{i}" for i in range(channels)), **more)


def refused(one, of=None):
    with pytest.raises(BadInput) as error:
        take_case(one, of or table())
    assert str(error.value).startswith("case_7: ")
    return str(error.value)


def test_a_sound_case_is_taken_without_a_note(tmp_path):
    taken = take_case(case(tmp_path), table())
    assert taken.notes == ()
    assert np.array_equal(taken.image.array_CXYZ[0], image()) and np.array_equal(taken.label.array_CXYZ[0], label())
    assert [len(volume.array_CXYZ) for volume in read_case(case(tmp_path), table())] == [1, 1]


@pytest.mark.parametrize(("values", "note"), [((), "label is empty"), ((1,), "label holds no tumour"), ((2,), "label holds no liver")])
def test_absent_structures_are_taken_and_noted(tmp_path, values, note):
    assert take_case(case(tmp_path, labels=label(values)), table()).notes == (note,)


def test_whole_numbers_in_floats_are_taken_and_noted(tmp_path):
    taken = take_case(case(tmp_path, dtype=np.float32), table())
    assert taken.notes == ("label was stored as floating-point whole numbers",)
    assert taken.label.array_CXYZ.dtype.kind == "i" and np.array_equal(taken.label.array_CXYZ[0], label())


def test_fractions_are_refused(tmp_path):
    assert "found fractions" in refused(case(tmp_path, labels=label() * 0.5, dtype=np.float32))


def test_0_and_255_are_refused_unless_the_recipe_says_what_255_is(tmp_path):
    one = case(tmp_path, labels=label((255, 255)))
    assert "data.label_values={255: 1}" in refused(one)
    taken = take_case(one, table(label_values={255: 1}))
    assert taken.notes == ("label values replaced: 255 by 1", "label holds no tumour")
    assert set(np.unique(taken.label.array_CXYZ)) == {0, 1}


def test_replaced_values_do_not_run_into_each_other(tmp_path):
    taken = take_case(case(tmp_path), table(label_values={1: 2, 2: 1}))
    assert np.array_equal(taken.label.array_CXYZ[0], label((2, 1)))


def test_unknown_values_are_named(tmp_path):
    text = refused(case(tmp_path, labels=label((1, 7))))
    assert "found [7]" in text and "data.label_values" in text


@pytest.mark.parametrize("step", [0.5, -0.5, 1.0])
def test_a_shifted_label_is_refused_with_its_shift(tmp_path, step):
    affine = GRID.affine.copy()
    affine[:3, 3] = GRID.world(np.array([[step, 0, 0]]))[0]
    assert f"shifted by ({step}, 0.0, 0.0) voxels" in refused(case(tmp_path, grid=Grid(GRID.shape_vox, affine)))


def test_rounded_headers_are_no_shift(tmp_path):
    affine = GRID.affine.copy()
    affine[0, 3] += 0.04
    assert take_case(case(tmp_path, grid=Grid(GRID.shape_vox, affine)), table()).notes == ()


def test_another_shape_is_refused(tmp_path):
    small = Grid((11, 10, 8), GRID.affine)
    assert "found 11x10x8" in refused(case(tmp_path, labels=label()[:-1], grid=small))


def write_4d(path, arrays):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.stack(arrays, -1).astype(np.int16), GRID.affine), path)


def test_a_4d_label_is_refused_and_a_trailing_axis_of_one_is_not(tmp_path):
    one = case(tmp_path)
    write_4d(one.label, [label(), label()])
    assert "label must have one channel; found 2" in refused(one)
    write_4d(one.label, [label()])
    assert take_case(one, table()).notes == ()


def test_swapped_files_are_told(tmp_path):
    one = case(tmp_path)
    swapped = replace(one, images=(one.label,), label=one.images[0])
    text = refused(swapped)
    assert "c0 looks like a label map" in text and "it looks like an image" in text and text.endswith("are the two files swapped?")


def test_modalities_on_other_grids_and_constant_ones_are_named_together(tmp_path):
    one = case(tmp_path, images=[image(), image(1), np.full(GRID.shape_vox, 3)])
    affine = GRID.affine.copy()
    affine[2, 3] += 1.0
    write_nifti(one.images[1], image(1), Grid(GRID.shape_vox, affine), np.int16)
    text = refused(one, table(3))
    assert "c1 must lie on the image's grid" in text and "c2 must hold an image; found the one value 3" in text


def test_a_wrong_number_of_channels(tmp_path):
    assert "must have 2 channel(s) (c0, c1); found 1" in refused(case(tmp_path), table(2))


def test_no_label_and_unreadable_files(tmp_path):
    one = case(tmp_path)
    assert "must have a label map; found none" in refused(replace(one, label=None))
    data = one.images[0].read_bytes()
    one.images[0].write_bytes(data[: len(data) // 2])
    text = refused(one)
    assert "image_0.nii.gz" in text and str(tmp_path) not in text


@dataclass(frozen=True)
class Ball:
    fits: bool = True

    def draw(self, grid):
        if not self.fits:
            raise BadInput("a nodule's centre must lie in the image")
        return (label((1,)) > 0).astype(np.uint8)


def test_a_label_may_be_drawn(tmp_path):
    one = case(tmp_path)
    taken = take_case(replace(one, label=Ball()), table())
    assert taken.label.grid.almost_equal(read_file(one.images[0]).grid)
    assert "label: a nodule's centre must lie" in refused(replace(one, label=Ball(False)))
