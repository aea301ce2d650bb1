"""Planes in radiological display, and pictures that are written whole."""

import numpy as np

from volssl.finetune import overlay_of
from volssl.pictures import (
    COLOURS,
    LINE,
    Overlay,
    bands_svg,
    curves_svg,
    overlay_png,
    plane_of,
    plane_spacing,
    restoration_png,
    telling_slice,
    window_of,
)
from volssl.protocols.protocol import Pair, Score
from volssl.volume import Grid, Volume


def test_the_patients_right_is_on_the_viewers_left_and_front_and_head_are_up():
    array_XYZ = np.zeros((3, 4, 5))
    array_XYZ[2, 3, 4] = 1  # right, front, head
    for plane, position in (("axial", 4), ("coronal", 3), ("sagittal", 2)):
        picture = plane_of(array_XYZ, plane, position)
        assert picture[0, 0] == 1, plane
        assert picture.sum() == 1
    assert plane_of(array_XYZ, "axial", 0).shape == (4, 3)
    assert plane_of(array_XYZ, "coronal", 0).shape == (5, 3)
    assert plane_of(array_XYZ, "sagittal", 0).shape == (5, 4)


def test_spacing_of_a_plane_is_row_height_then_column_width():
    assert plane_spacing((1, 2, 3), "axial") == (2, 1)
    assert plane_spacing((1, 2, 3), "coronal") == (3, 1)
    assert plane_spacing((1, 2, 3), "sagittal") == (3, 2)


def test_telling_slice_weighs_a_small_label_like_a_large_one():
    labels_XYZ = np.zeros((10, 10, 10), np.uint8)
    labels_XYZ[:, :, :5] = 1
    labels_XYZ[4, 4, 3] = 2
    assert telling_slice(labels_XYZ, "axial") == 3
    assert telling_slice(np.zeros((4, 6, 8)), "axial") == 4


def test_overlay_and_restoration_are_png_files(tmp_path):
    rng = np.random.default_rng(0)
    image_XYZ = rng.normal(size=(12, 10, 8)).astype(np.float32)
    reference_XYZ = np.zeros(image_XYZ.shape, np.uint8)
    reference_XYZ[3:8, 3:8, 3:6] = 1
    for name, predicted_XYZ in (("some", np.roll(reference_XYZ, 1, 0)), ("none", np.zeros_like(reference_XYZ))):
        case = Overlay(image_XYZ, reference_XYZ, predicted_XYZ, (1.0, 2.0, 3.0), {"liver": (1,)}, {"liver": None})
        overlay_png(tmp_path / f"{name}.png", case, title="case")
    patches = image_XYZ[None]
    restoration_png(tmp_path / "r.png", {"input": patches, "target": patches}, window=(0, 1), spacing_mm=(1, 1, 2))
    for name in ("some", "none", "r"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_each_target_has_its_dice_and_its_contours(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    told, drawn = [], []
    monkeypatch.setattr(Figure, "text", lambda figure, x, y, text, **_: told.append(text))
    monkeypatch.setattr(Figure, "legend", lambda figure, handles, **_: told.extend(handle.get_label() for handle in handles))
    monkeypatch.setattr(Axes, "contour", lambda panel, mask, **style: drawn.append((int(mask.sum()), style["colors"][0])))
    label_XYZ = np.zeros((8, 8, 8), np.uint8)
    label_XYZ[1:6, 1:6, 1:6] = 2
    label_XYZ[2:4, 2:4, 2:4] = 1  # a core inside of its oedema: the region holds both
    empty_XYZ = np.zeros_like(label_XYZ)
    targets = {"WT": (1, 2), "TC": (1,)}
    overlay_png(
        tmp_path / "a.png",
        Overlay(label_XYZ * 1.0, label_XYZ, empty_XYZ, (1.0, 1.0, 1.0), targets, {"WT": 0.5, "TC": None}),
        title="case 0",
    )
    assert told == ["case 0", "reference", "prediction", "WT: Dice 0.500", "TC: Dice undefined"]
    assert drawn == [(25, COLOURS[0]), (4, COLOURS[1])] * 3  # one slice of each plane; nothing was predicted


def test_a_segmented_case_is_drawn_on_its_last_channel_in_ras():
    label_XYZ = np.zeros((4, 3, 2), np.uint8)
    label_XYZ[0, 0, 0] = 1
    grid = Grid((4, 3, 2), np.diag([-1.0, -2.0, 3.0, 1.0]))  # LPS
    image = Volume(np.stack([label_XYZ * 0.0, label_XYZ * 5.0]), grid)
    pair = Pair("a", Volume(label_XYZ[None], grid), Volume(label_XYZ[None], grid), {"WT": (1, 2)})
    drawn = overlay_of(image, pair, scores=[Score("a", "WT", "dice", 1.0), Score("a", "WT", "hd95", 0.0)])
    for array_XYZ in (drawn.image_XYZ, drawn.reference_XYZ, drawn.predicted_XYZ):
        assert array_XYZ[3, 2, 0] == array_XYZ.max() > 0
    assert drawn.targets == pair.targets and drawn.dice == {"WT": 1.0} and drawn.spacing_mm == (1, 2, 3)


def test_the_window_lies_around_the_labelled_tissue():
    rng = np.random.default_rng(0)
    image_XYZ = np.full((20, 20, 20), -1000.0)
    image_XYZ[:, 10:] = 1500
    tissue_XYZ = np.zeros(image_XYZ.shape, bool)
    tissue_XYZ[5:15, 5:15, 5:15] = True
    image_XYZ[tissue_XYZ] = 60 + 30 * rng.normal(size=1000)
    low, high = window_of(image_XYZ, tissue_XYZ)
    assert -300 < low < -100
    assert 200 < high < 400
    assert window_of(image_XYZ, np.zeros_like(tissue_XYZ)) == (-1000, 1500)


def test_a_small_bright_finding_is_not_drawn_as_one_white_spot():
    image_XYZ = np.zeros((20, 20, 20))
    tissue_XYZ = np.zeros(image_XYZ.shape, bool)
    tissue_XYZ[:3, :3, :3] = True  # 27 of 8000 voxels: beyond the 99.5 % quantile of the image
    image_XYZ[tissue_XYZ] = np.linspace(400, 800, 27)
    low, high = window_of(image_XYZ, tissue_XYZ)
    assert low == 0 and 780 < high <= 800


def test_a_series_of_one_point_is_seen():
    rows = [{"step": step, "loss/a": 1 / step} for step in range(1, 9)]
    filled = f"fill: {LINE}".encode()  # a line has no filled area, a marker has
    assert filled not in curves_svg(rows)
    assert filled in curves_svg([*rows, {"step": 9, "health/b": 0.3}])


def test_arms_at_one_number_of_labels_stand_side_by_side_with_their_intervals():
    curves = {"scratch": [(5, 0.8, 0.7, 0.9)], "one": [(5, 0.82, 0.83, 0.9)], "none": []}  # an interval need not hold the mean
    one, two = (
        bands_svg(curves, across="cases", up="Dice"),
        bands_svg({"scratch": [(5, 0.8, 0.7, 0.9), (9, 0.8, 0.7, 0.9)]}, across="x", up="y"),
    )
    assert one.count(b'id="LineCollection_') == 2 and b'id="LineCollection_' not in two  # bars and their absence
    assert b'id="legend_1"' in two and b'id="legend_1"' not in one and bands_svg({"none": []}, across="x", up="y") == b""


def test_the_gradient_norm_is_drawn():
    rows = [{"step": step, "lr": 0.1, "grad_norm": 2.0 / step} for step in (1, 2, 3, 4)]
    assert len(curves_svg(rows)) > len(curves_svg([{"step": row["step"], "lr": 0.1} for row in rows])) + 1000
