"""Spheres, polygons and readers' consensus, worked out by hand and against matplotlib's own point-in-polygon."""

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from volssl.files import BadInput
from volssl.nodules import Contours, Mark, Nodules, Outline, Spheres, filled, inside_of, read_spheres, read_xml, series_of_xml
from volssl.volume import Grid

GRID = Grid((40, 40, 10), np.diag([-1.0, -1.0, 2.0, 1.0]))


def ring(x, y, side):
    """The outline of a square: its inside is side x side pixels with the low corner (x, y)."""
    edge = [(x - 1 + i, y - 1) for i in range(side + 1)] + [(x + side, y - 1 + i) for i in range(side + 1)]
    back = [(x + side - i, y + side) for i in range(side + 1)] + [(x - 1, y + side - i) for i in range(side + 1)]
    return np.array(edge + back)


def write_xml(path, sessions):
    """`sessions`: per reader a list of nodules, each a list of (z, adds, points)."""
    parts = []
    for nodules in sessions:
        body = ""
        for rois in nodules:
            body += "<unblindedReadNodule><noduleID>x</noduleID>"
            for z, adds, points in rois:
                edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
                body += f"<roi><imageZposition>{z}</imageZposition><inclusion>{str(adds).upper()}</inclusion>{edges}</roi>"
            body += "</unblindedReadNodule>"
        parts.append(f"<readingSession>{body}</readingSession>")
    head = "<ResponseHeader><SeriesInstanceUid>1.2.3</SeriesInstanceUid></ResponseHeader>"
    path.write_text(f'<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov">{head}{"".join(parts)}</LidcReadMessage>')
    return path


def consensus(tmp_path, sessions, **settings):
    return Contours(write_xml(tmp_path / "a.xml", sessions), "1.2.3", **settings).draw(GRID)


@pytest.mark.parametrize("seed", range(5))
def test_inside_of_a_polygon_agrees_with_matplotlib(seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 24))
    radii = rng.uniform(5, 15, 24)
    points = np.rint(np.stack([20 + radii * np.cos(angles), 20 + radii * np.sin(angles)], 1)).astype(int)
    all_XY = np.argwhere(np.ones((40, 40)))
    # Slightly off the pixels in four directions: a pixel counts as inside where all of them are, that is strictly inside.
    oracle = np.all(
        [Polygon(points).contains_points(all_XY + shift) for shift in 1e-6 * np.array([(1, 2), (-2, 1), (-1, -2), (2, -1)])], axis=0
    )
    found = set(map(tuple, inside_of(points).tolist()))
    # A sharp notch slips between the four; its corner is a point of the outline.
    assert found == set(map(tuple, all_XY[oracle].tolist())) - set(map(tuple, points.tolist()))


def test_the_line_itself_is_outside():
    assert sorted(map(tuple, inside_of(ring(10, 20, 3)).tolist())) == [(x, y) for x in (10, 11, 12) for y in (20, 21, 22)]
    assert len(inside_of(np.array([(5, 5)]))) == 0


def test_a_hole_takes_its_line_along():
    outlines = (Outline(4.0, False, ring(13, 13, 2)), Outline(4.0, True, ring(10, 10, 9)))
    assert len(filled(Mark(0, outlines), GRID)) == 81 - 16


def test_contours_go_to_their_slice_or_are_refused():
    assert set(filled(Mark(0, (Outline(4.3, True, ring(5, 5, 2)),)), GRID)[:, 2]) == {2}
    for bad in (Outline(5.0, True, ring(5, 5, 2)), Outline(20.0, True, ring(5, 5, 2)), Outline(4.0, True, ring(39, 5, 2))):
        with pytest.raises(BadInput, match="not a crop"):
            filled(Mark(0, (bad,)), GRID)


def test_half_of_the_readers_are_enough(tmp_path):
    sides = (3, 5, 7, 9)
    mask = consensus(tmp_path, [[[(4.0, True, ring(20 - side // 2, 20 - side // 2, side))]] for side in sides])
    assert mask.sum() == 49  # 2 of 4 readers hold the square of 7
    strict = consensus(tmp_path, [[[(4.0, True, ring(20 - side // 2, 20 - side // 2, side))]] for side in sides], share=0.75)
    assert strict.sum() == 25


def test_a_nodule_of_two_readers_counts_only_if_asked(tmp_path):
    sessions = [[[(4.0, True, ring(20, 20, 4))]], [[(4.0, True, ring(20, 20, 4))]], [[(8.0, True, ring(2, 2, 4))]], []]
    assert consensus(tmp_path, sessions).sum() == 0
    assert consensus(tmp_path, sessions, readers=2).sum() == 16
    assert consensus(tmp_path, sessions, readers=1).sum() == 32  # far apart: two nodules


def test_one_reader_twice_is_one_reader(tmp_path):
    twice = [(4.0, True, ring(20, 20, 4))]
    assert consensus(tmp_path, [[twice, twice, twice]], readers=2).sum() == 0


def test_single_points_are_no_nodules(tmp_path):
    file = write_xml(tmp_path / "a.xml", [[[(4.0, True, [(3, 3)])]]])
    assert read_xml(file) == [] and series_of_xml(file) == "1.2.3"
    (tmp_path / "b.xml").write_text("<a><readingSession></a>")
    with pytest.raises(BadInput, match="LIDC XML"):
        read_xml(tmp_path / "b.xml")
    assert series_of_xml(tmp_path / "b.xml") is None


def test_a_sphere_has_its_volume_and_place():
    grid = Grid((60, 60, 40), np.diag([-0.5, -0.5, 1.0, 1.0]))
    mask = Spheres(((-15.0, -12.0, 20.0),), (8.0,)).draw(grid)
    assert mask.sum() * 0.25 == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.02)
    assert np.allclose(grid.world(np.argwhere(mask).mean(0)[None])[0], (-15, -12, 20), atol=0.05)


def test_a_tiny_sphere_is_one_voxel_and_one_outside_is_refused():
    assert Spheres(((-3.4, -3.4, 4.6),), (0.2,)).draw(GRID).sum() == 1
    with pytest.raises(BadInput, match="must lie in the image"):
        Spheres(((3.0, -3.0, 4.0),), (2.0,)).draw(GRID)


def test_tables_are_lps_and_diameters(tmp_path):
    table = tmp_path / "annotations.csv"
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,10,20,30,5\n1.2,-1,2,3,6\n")
    assert read_spheres(table)["1.2"] == Spheres(((-10.0, -20.0, 30.0), (1.0, -2.0, 3.0)), (2.5, 3.0))
    for bad in ("1.2,10,20,30,-1", "1.2,10,20,x,4", "1.2,10,20"):
        table.write_text(f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{bad}\n")
        with pytest.raises(BadInput, match="line 2"):
            read_spheres(table)


def test_settings_out_of_range():
    with pytest.raises(BadInput, match="readers >= 1"):
        Nodules("contours", "x", readers=0)
