"""Fetch against a real Orthanc server: what lies there arrives byte for byte, once, and nobody's name or password is told."""

import base64
import hashlib
import stat
import subprocess
import sys

import orthanc
import pydicom
import pytest
from conftest import body_phantom, oblique_grid

from volssl import fetch, index
from volssl.__main__ import run_verb
from volssl.dicom_write import write_dicom_series
from volssl.files import BadInput, read_csv

QUICK = {"retries": 2, "timeout_s": 20.0, "first_wait_s": 0.01}
SLICES = 12


def write_patient(root, number, **tags):
    tags = {
        "PatientID": f"Quillfeather-{number}",
        "PatientName": f"Quillfeather^Nr{number}",
        "StudyDate": f"2024010{number + 1}",
        "StudyInstanceUID": f"2.25.77{number}",
        "SeriesInstanceUID": f"2.25.88{number}",
        "BodyPartExamined": "CHEST",
    } | tags
    write_dicom_series(root / f"s{number}", body_phantom(seed=number), oblique_grid(), tags=tags)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three CT series of three patients."""
    root = tmp_path_factory.mktemp("source")
    for number in range(3):
        write_patient(root, number)
    return root


@pytest.fixture(scope="module")
def pacs(source, tmp_path_factory):
    """The address of a server that holds them."""
    with orthanc.serving(tmp_path_factory.mktemp("pacs")) as address:
        orthanc.fill(address, source)
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("VOLSSL_DICOMWEB_TOKEN", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("VOLSSL_DICOMWEB_USER", orthanc.USER)
    monkeypatch.setenv("VOLSSL_DICOMWEB_PASSWORD", orthanc.PASSWORD)


def pulled(out):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "series").rglob("*.dcm"))}


def get(pacs, out, *query, **more):
    return fetch.run(dicomweb=pacs, query=query or ["Modality=CT"], out=out, way=fetch.Way(**QUICK), **more)


def test_what_lies_there_arrives_and_is_indexed(pacs, source, tmp_path):
    outcome = get(pacs, tmp_path / "archive")
    assert (outcome.failed, outcome.message) == (0, "3 of 3 series are complete")
    # Orthanc writes itself into the file meta; the data set is the source's.
    sent = {pydicom.dcmread(path).SOPInstanceUID: pydicom.dcmread(path) for path in source.rglob("*.dcm")}
    got = {pydicom.dcmread(path).SOPInstanceUID: pydicom.dcmread(path) for path in pulled(tmp_path / "archive")}
    assert len(got) == 3 * SLICES
    assert got == sent
    index.build([tmp_path / "archive"], out=tmp_path / "index")
    rows = index.load(tmp_path / "index").rows
    assert [(row.verdict, row.num_slices) for row in rows] == [("accept", SLICES)] * 3


def test_the_key_of_the_archive_gives_the_index_the_same_names(pacs, tmp_path):
    out = get(pacs, tmp_path / "archive").out
    index.build([out], out=tmp_path / "index", gates=index.Gates(key=out / "private" / "key"))
    names = sorted(path.name for path in (out / "series").iterdir())
    assert [row.scan_id for row in index.load(tmp_path / "index").rows] == names


def test_the_archive_is_closed_to_others_and_named_by_pseudonyms(pacs, tmp_path):
    out = get(pacs, tmp_path / "archive", "PatientID=Quillfeather-1").out
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    (row,) = read_csv(out / "private" / "series.csv")
    assert (row["patient"], row["study"], row["series"], row["count"]) == ("Quillfeather-1", "2.25.771", "2.25.881", str(SLICES))
    assert [path.name for path in (out / "series").iterdir()] == [row["series_id"]]
    names = " ".join(str(path.relative_to(out)) for path in out.rglob("*"))
    assert "Quillfeather" not in names and "2.25." not in names


@pytest.mark.parametrize(
    "query, count",
    [
        (["PatientID=Quillfeather-2"], 1),
        (["PatientID=Quillfeather-*"], 3),
        (["PatientName=Quillfeather^Nr0"], 1),
        (["StudyDate=20240102-20240103"], 2),
        (["StudyDate=-20240101"], 1),
        (["Modality=CT", "StudyInstanceUID=2.25.770"], 1),
        (["BodyPartExamined=CHEST"], 3),
    ],
)
def test_a_query_brings_what_answers_it(pacs, tmp_path, query, count):
    assert get(pacs, tmp_path / "archive", *query).message == f"{count} of {count} series are complete"


def test_nothing_that_is_there_is_pulled_again(pacs, tmp_path):
    out = get(pacs, tmp_path / "archive").out
    before = pulled(out)
    stamps = {path: path.stat().st_mtime_ns for path in before}
    lost = list(before)[5]
    lost.unlink()
    (lost.parent / ".tmp-left.dcm").write_bytes(b"half")
    get(pacs, out, resume=True)
    assert pulled(out) == before
    assert [path for path in before if path.stat().st_mtime_ns != stamps[path]] == [lost]
    assert not list(out.rglob(".tmp-*"))


def test_a_killed_run_is_taken_up_again(pacs, tmp_path):
    whole = get(pacs, tmp_path / "whole").out
    command = [sys.executable, "-m", "volssl", "fetch", "--dicomweb", pacs, "--query", "Modality=CT", "--out", str(tmp_path / "cut")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(tmp_path.glob("cut/series/*/[!.]*.dcm"))) < 4:
            pass
        process.kill()
    left = list(tmp_path.glob("cut/series/*/[!.]*.dcm"))
    assert len(left) >= 4
    assert all(pydicom.dcmread(path).PixelData for path in left)
    get(pacs, tmp_path / "cut", resume=True)
    assert sorted(pulled(tmp_path / "cut").values()) == sorted(pulled(whole).values())


def test_a_key_that_the_server_ignores_is_refused_before_anything_is_pulled(pacs, tmp_path):
    # Orthanc answers a search by a key that it does not know with every series that it has.
    with pytest.raises(BadInput, match="--query Patientid: must be PatientID;"):
        get(pacs, tmp_path / "a", "Patientid=Quillfeather-1")
    with pytest.raises(BadInput, match="--query Nonsense: must be one of StudyDate, "):
        get(pacs, tmp_path / "a", "Nonsense=1")
    assert not (tmp_path / "a").exists()


def test_nothing_found_is_told(pacs, tmp_path):
    with pytest.raises(BadInput, match=r"answered by at least one series; found none on 127\.0\.0\.1"):
        get(pacs, tmp_path / "a", "PatientID=nobody")


@pytest.mark.parametrize("user", ["reader", None])
def test_wrong_or_no_credentials_are_refused_and_not_repeated(pacs, tmp_path, monkeypatch, capfd, user):
    if user:
        monkeypatch.setenv("VOLSSL_DICOMWEB_PASSWORD", "Wrong-Horse-1")
    else:
        monkeypatch.delenv("VOLSSL_DICOMWEB_USER")
    code = run_verb("fetch", {"dicomweb": pacs, "query": ["Modality=CT"], "out": tmp_path / "a"})
    told = capfd.readouterr()
    assert code == 2
    assert "refused the credentials (http_401); set VOLSSL_DICOMWEB_USER" in told.err
    assert "Horse" not in told.out + told.err


def test_credentials_come_from_netrc_too(pacs, tmp_path, monkeypatch):
    monkeypatch.delenv("VOLSSL_DICOMWEB_USER")
    monkeypatch.delenv("VOLSSL_DICOMWEB_PASSWORD")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\nlogin {orthanc.USER}\npassword {orthanc.PASSWORD}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert get(pacs, tmp_path / "a", "PatientID=Quillfeather-1").failed == 0


def test_no_password_and_no_patient_is_told_or_written(pacs, tmp_path):
    """The whole verb in a process of its own, its loggers as loud as they go."""
    code = "import logging, sys; logging.basicConfig(level=0); from volssl.__main__ import main; sys.argv[0] = 'volssl'; main()"
    command = [sys.executable, "-c", code, "fetch", "--dicomweb", pacs, "--query", "Modality=CT", "--out", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    token = base64.b64encode(f"{orthanc.USER}:{orthanc.PASSWORD}".encode()).decode()
    for secret in (orthanc.PASSWORD, token, "Quillfeather", "2.25."):
        assert secret not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert orthanc.PASSWORD.encode() not in content and token.encode() not in content
            outside = "private" not in path.parts and path.suffix != ".dcm"
            assert not (outside and b"Quillfeather" in content), path
    assert "fetch: 3/3" in done.stderr


def test_without_its_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "volssl.dicomweb", raising=False)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(BadInput, match=r"needs httpx; found no such package; pip install 'volssl\[pacs\]'"):
        get("https://pacs.example", tmp_path / "a")
