"""The nearest in other patients: by the cosine, never of the same patient, on a page that holds pseudonyms alone."""

import base64
import re

import numpy as np
import pytest
from test_embed import NAMED, go, marked, store, weights  # noqa: F401 (fixtures)
from test_pretrain import make_store

from volssl import neighbours, report
from volssl.__main__ import run_verb
from volssl.archive import write_nifti
from volssl.features import read_table
from volssl.files import BadInput
from volssl.volume import Grid


def test_nearest_by_hand():
    features = np.array([[1, 0], [2, 0.1], [0, 1], [1, 1], [-1, 0], [0, 0]], np.float32)
    patients = np.array(["a", "a", "b", "c", "c", "b"])
    (found,) = neighbours.nearest(features, patients, np.array([0]), count=3)
    assert [row for row, _ in found] == [3, 2, 5]  # row 1, the nearest, is of the same patient; of equal ones the first
    assert [cosine for _, cosine in found] == pytest.approx([2**-0.5, 0, 0], abs=1e-6)
    assert len(neighbours.nearest(features, patients, np.array([0]), count=9)[0]) == 4


def test_nearest_over_blocks_is_the_same_as_all_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    features, patients = rng.normal(size=(50, 6)).astype(np.float32), rng.integers(0, 6, 50)
    whole = neighbours.nearest(features, patients, np.array([3, 7]))
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    parts = neighbours.nearest(features, patients, np.array([3, 7]))
    for query, one, other in zip((3, 7), whole, parts, strict=True):
        assert [row for row, _ in one] == [row for row, _ in other]
        cosine = features @ features[query] / np.linalg.norm(features, axis=1) / np.linalg.norm(features[query])
        cosine[patients == patients[query]] = -2
        assert [row for row, _ in one] == np.argsort(-cosine)[:5].tolist()


def test_queries_are_of_as_many_patients_as_there_are():
    patients = np.array(["a"] * 50 + ["b"] * 3 + ["c"])
    drawn = neighbours.queries_of(patients, count=6)
    assert set(patients[drawn[:3]]) == {"a", "b", "c"} and len(set(drawn.tolist())) == 6
    np.testing.assert_array_equal(drawn, neighbours.queries_of(patients, count=6))


@pytest.fixture
def few(monkeypatch):
    """Two queries on a page, which takes its time to draw."""
    monkeypatch.setattr(neighbours, "QUERIES", 2)


@pytest.fixture(scope="module")
def two_of_one(tmp_path_factory):
    """Four scans of three patients: S0 and S3 are of P0, and the same scan to the bit."""
    path = make_store(tmp_path_factory.mktemp("two") / "store", scans=4)
    (path / "volumes" / "S3.b2nd").write_bytes((path / "volumes" / "S0.b2nd").read_bytes())
    table = path / "manifest.csv"
    table.write_text(table.read_text().replace("P3", "P0"))
    return path


def groups_of(page):
    """Per query: the patient asked about, and those found."""
    text = page.read_text()
    parts = [re.findall(r"<br>(S\d) of (P\d)<br>", part) for part in text.split("<h2>")[1:]]
    return [(part[0], part[1:]) for part in parts]


@pytest.mark.parametrize("per", ["patch", "volume"])
def test_the_page_shows_other_patients_alone(weights, two_of_one, tmp_path, few, per):  # noqa: F811
    out = tmp_path / "f.parquet"
    go(weights, two_of_one, out, per=per, page=True)
    text = out.with_suffix(".html").read_text()
    groups = groups_of(out.with_suffix(".html"))
    assert len(groups) == 2
    assert ("body's height" in text) == (per == "patch")  # the middle of a whole volume is no place in the body
    for (_, patient), found in groups:
        assert found and all(other != patient for _, other in found)
        assert len(found) == (5 if per == "patch" else 2 if patient == "P0" else 3)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 2 * sum(1 + len(found) for _, found in groups)
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in pictures)
    assert "<script" not in text and "http" not in re.sub(r"http-equiv", "", text) and str(tmp_path) not in text


def test_what_is_shown_is_what_the_table_holds(weights, two_of_one, tmp_path, few):  # noqa: F811
    out = tmp_path / "f.npz"
    go(weights, two_of_one, out, per="patch", patches=5)
    report.run([out], out=tmp_path / "page.html", store=two_of_one)
    read = read_table(out)
    patients = read.columns["patient_id"]
    queries = neighbours.queries_of(patients, count=2)
    shown = re.findall(r"cosine (-?−?[\d.]+)</strong>", (tmp_path / "page.html").read_text())
    expected = [f"{cosine:.4f}" for found in neighbours.nearest(read.features_ND, patients, queries) for _, cosine in found]
    assert [one.replace("−", "-") for one in shown] == expected
    first = (tmp_path / "page.html").read_bytes()
    report.run([out], out=tmp_path / "page.html", store=two_of_one, overwrite=True)
    assert (tmp_path / "page.html").read_bytes() == first


def test_the_verb_report_asks_for_the_store(weights, two_of_one, tmp_path, few, capsys):  # noqa: F811
    out = tmp_path / "f.npz"
    go(weights, two_of_one, out)
    page = tmp_path / "page.html"
    assert run_verb("report", {"runs": [out], "out": page}) == 2
    assert "give it as --store STORE" in capsys.readouterr().err
    assert run_verb("report", {"runs": [out], "out": page, "store": two_of_one}) == 0
    assert run_verb("report", {"runs": [out, two_of_one], "out": tmp_path / "p", "store": two_of_one}) == 2
    assert "give it alone" in capsys.readouterr().err


def test_tables_that_cannot_be_shown(weights, two_of_one, tmp_path):  # noqa: F811
    write_nifti(tmp_path / f"{NAMED}.nii.gz", marked(), Grid((40, 36, 32), np.eye(4)), np.int16)
    go(weights, tmp_path / f"{NAMED}.nii.gz", tmp_path / "files.npz")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    alone = make_store(tmp_path / "alone", scans=1)
    go(weights, alone, tmp_path / "alone.npz")
    go(weights, two_of_one, tmp_path / "two.npz")
    for name, where, part in [
        ("files.npz", two_of_one, "must be the table of a store"),
        ("broken.parquet", two_of_one, "must be a table that `volssl embed` wrote"),
        ("broken.npz", two_of_one, "must be a table that `volssl embed` wrote"),
        ("foreign.npz", two_of_one, "must be a table that `volssl embed` wrote"),
        ("alone.npz", alone, "at least two patients"),
        ("two.npz", alone, "found 3 missing, such as S1"),
    ]:
        with pytest.raises(BadInput, match=part):
            report.run([tmp_path / name], out=tmp_path / "page.html", store=where)
    with pytest.raises(BadInput, match="at least two patients"):
        go(weights, alone, tmp_path / "paged.npz", page=True)
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "paged.npz").exists()
