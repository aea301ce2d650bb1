"""The DICOMweb connection against a server that misbehaves: broken answers, lies, refusals; and its TLS."""

import json
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import body_phantom, oblique_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from volssl import dicomweb, fetch
from volssl.dicom_write import write_dicom_series
from volssl.dicomweb import Broken, Link, Refused, Server
from volssl.files import BadInput, read_csv

QUICK = Link(retries=2, timeout_s=2.0, first_wait_s=0.01)
SERIES = "studies/2.25.7/series/2.25.8"


class Pacs:
    """One series on a server whose answers a test may spoil: `spoil(path, turn)` returns (status, headers, body) or None."""

    def __init__(self, files):
        self.files, self.asked, self.spoil = files, [], lambda path, turn: None

    def answer(self, path, query):
        self.asked.append(path)
        spoilt = self.spoil(path, self.asked.count(path))
        if spoilt:
            return spoilt
        if path == "series":
            return self.found([self.one | {"00080060": {"vr": "CS", "Value": ["CT"]}}], query)
        if path == f"{SERIES}/instances":
            return self.found([{"00080018": {"vr": "UI", "Value": [name]}} for name in self.files], query)
        if path == SERIES:
            return self.related(self.files.values())
        return self.related([self.files[path.rpartition("/")[2]]])

    @property
    def one(self):
        values = {"0020000D": "2.25.7", "0020000E": "2.25.8", "00100020": "Quillfeather", "00201209": len(self.files)}
        return {tag: {"vr": "LO", "Value": [value]} for tag, value in values.items()}

    def found(self, rows, query):
        offset, limit = int(query["offset"][0]), int(query["limit"][0])
        return 200, {"Content-Type": "application/dicom+json"}, json.dumps(rows[offset : offset + limit]).encode()

    @staticmethod
    def related(contents):
        body = b"".join(b"--here\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in contents)
        return 200, {"Content-Type": 'multipart/related; type="application/dicom"; boundary=here'}, body + b"--here--"


@contextmanager
def serving(pacs, context=None):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path)
            status, headers, body = pacs.answer(parts.path.removeprefix("/dicom-web/"), parse_qs(parts.query))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/dicom-web"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in (dicomweb.USER, dicomweb.PASSWORD, dicomweb.TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """SOPInstanceUID -> content of the files of one series of ten slices."""
    import pydicom

    folder = tmp_path_factory.mktemp("series")
    tags = {"PatientID": "Quillfeather", "StudyInstanceUID": "2.25.7", "SeriesInstanceUID": "2.25.8"}
    write_dicom_series(folder, body_phantom((24, 20, 10)), oblique_grid((24, 20, 10)), tags=tags)
    return {str(pydicom.dcmread(path).SOPInstanceUID): path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pacs(files):
    return Pacs(files)


def get(pacs, out, **more):
    with serving(pacs) as address:
        way = fetch.Way(retries=2, timeout_s=2.0, first_wait_s=0.01)
        return fetch.run(dicomweb=address, query=["Modality=CT"], out=out, way=way, **more)


def contents(out):
    return sorted(path.read_bytes() for path in (out / "series").rglob("*.dcm"))


def test_a_whole_series_takes_two_requests(pacs, files, tmp_path, capsys):
    get(pacs, tmp_path / "a")
    assert "fetch: 1/1" in capsys.readouterr().err
    assert pacs.asked == ["series", SERIES]
    assert contents(tmp_path / "a") == sorted(files.values())
    get(pacs, tmp_path / "a", resume=True)
    assert pacs.asked == ["series", SERIES, "series"]


@pytest.mark.parametrize("share", [0.02, 0.35, 0.8, 0.999])
def test_an_answer_that_ends_early_is_completed_file_by_file(pacs, files, tmp_path, share):
    def spoil(path, turn):
        if path == SERIES:
            status, headers, body = Pacs.related(files.values())
            return status, headers, body[: int(share * len(body))]

    pacs.spoil = spoil
    assert get(pacs, tmp_path / "a").failed == 0
    assert contents(tmp_path / "a") == sorted(files.values())
    assert not list((tmp_path / "a").rglob(".tmp-*"))


def test_a_busy_server_is_asked_again_after_the_wait_it_names(pacs, files, tmp_path):
    pacs.spoil = lambda path, turn: (503, {"Retry-After": "1"}, b"") if turn == 1 else None
    begun = time.monotonic()
    assert get(pacs, tmp_path / "a").failed == 0
    assert time.monotonic() - begun >= 2  # the search and the series, a second each
    assert contents(tmp_path / "a") == sorted(files.values())


def test_a_series_that_cannot_be_had_is_named_by_pseudonym_and_reason(pacs, tmp_path):
    pacs.spoil = lambda path, turn: (404, {}, b"gone: Quillfeather") if path != "series" else None
    outcome = get(pacs, tmp_path / "a")
    assert outcome.failed == 1
    (row,) = read_csv(tmp_path / "a" / "failures.csv")
    (known,) = read_csv(tmp_path / "a" / "private" / "series.csv")
    assert row == {"series_id": known["series_id"], "reason": "http_404"}
    pacs.spoil = lambda path, turn: None
    assert get(pacs, tmp_path / "a", resume=True).failed == 0
    assert read_csv(tmp_path / "a" / "failures.csv") == []


@pytest.mark.parametrize(
    "answer, code",
    [
        ((500, {}, b""), "http_500"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "http_302"),
        ((200, {"Content-Type": "text/html"}, b"<p>log in"), "answer_not_dicom"),
        ((200, {"Content-Type": "multipart/related; boundary=here"}, b"--here\r\n\r\nno dicom\r\n--here--"), "undecodable"),
        ((200, {"Content-Type": "multipart/related; boundary=here"}, b"x" * 5_000_000), "answer_not_dicom"),
        ((200, {"Content-Type": "application/dicom"}, b"no length"), "connection"),
    ],
)
def test_every_broken_answer_has_its_code(pacs, tmp_path, answer, code):
    pacs.spoil = lambda path, turn: answer if path != "series" and "instances" not in path.rpartition("/")[2] else None
    assert get(pacs, tmp_path / "a").failed == 1
    assert read_csv(tmp_path / "a" / "failures.csv")[0]["reason"] == code
    assert not list((tmp_path / "a" / "series").rglob("*.dcm")) and not list((tmp_path / "a").rglob(".tmp-*"))


def test_a_server_that_ignores_the_query_is_found_out(pacs, tmp_path):
    def spoil(path, turn):
        return pacs.found([pacs.one | {"00080060": {"vr": "CS", "Value": [modality]}} for modality in ("CT", "MR")], PAGE)

    pacs.spoil = spoil
    with pytest.raises(BadInput, match=r"--query Modality: 127\.0\.0\.1 must filter by it"):
        get(pacs, tmp_path / "a")
    pacs.spoil = lambda path, turn: pacs.found([pacs.one], PAGE)  # does not tell the modality at all
    with pytest.raises(BadInput, match="must filter by it"):
        get(pacs, tmp_path / "a")
    assert not (tmp_path / "a").exists()


PAGE = {"offset": ["0"], "limit": ["500"]}


def test_a_uid_that_is_no_uid_does_not_become_an_address(pacs, tmp_path):
    pacs.spoil = lambda path, turn: pacs.found([pacs.one | {"00080060": {"Value": ["CT"]}, "0020000D": {"Value": ["../../x"]}}], PAGE)
    with pytest.raises(BadInput, match="answer_without_uid"):
        get(pacs, tmp_path / "a")


@pytest.mark.parametrize("count, knows_offset", [(1201, True), (500, True), (500, False)])
def test_a_long_search_comes_page_by_page(pacs, count, knows_offset):
    rows = [{"0020000E": {"Value": [f"2.25.{number}"]}} for number in range(count)]

    def answer(path, query):
        return pacs.found(rows, query if knows_offset else PAGE)

    pacs.answer = answer
    with serving(pacs) as address:
        assert list(Server(address, QUICK).search("series", {})) == rows


@pytest.mark.parametrize("body", [b"<html>", b'{"a": 1}', b"[1]"])
def test_an_answer_that_is_no_list_is_refused(pacs, body):
    pacs.spoil = lambda path, turn: (200, {}, body)
    with serving(pacs) as address, pytest.raises(Refused, match="answer_not_json"):
        list(Server(address, QUICK).search("series", {}))


def test_a_silent_server_and_no_server_are_told(pacs, tmp_path):
    def spoil(path, turn):
        time.sleep(0.5)

    pacs.spoil = spoil
    with serving(pacs) as address, pytest.raises(Broken, match="timeout"):
        list(Server(address, Link(retries=0, timeout_s=0.1)).search("series", {}))
    with pytest.raises(BadInput, match=r"127\.0\.0\.1 must answer; found connection after 3 tries"):
        way = fetch.Way(retries=2, timeout_s=2.0, first_wait_s=0.01)
        fetch.run(dicomweb=address, query=["Modality=CT"], out=tmp_path / "a", way=way)


@pytest.mark.parametrize(
    "url, must",
    [
        ("ftp://pacs.example/", "must begin with https://"),
        ("pacs.example", "must begin with https://"),
        ("http://[::1", "cannot be read"),
        ("https://me:Horse@pacs.example/", "must hold no user, password"),
        ("https://pacs.example/?token=Horse", "must hold no user, password"),
        ("http://pacs.example/", "must be https"),
    ],
)
def test_an_address_that_will_not_do_is_refused_without_quoting_it(url, must):
    with pytest.raises(BadInput, match=must) as told:
        Server(url)
    assert "Horse" not in str(told.value)
    Server("http://pacs.example/", Link(allow_http=True)).close()


def test_credentials_that_contradict_or_lack_a_half_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(dicomweb.USER, "me")
    with pytest.raises(BadInput, match="VOLSSL_DICOMWEB_PASSWORD: must be set"):
        Server("https://pacs.example")
    monkeypatch.setenv(dicomweb.TOKEN, "Horse")
    with pytest.raises(BadInput, match="exclude each other"):
        Server("https://pacs.example")
    monkeypatch.delenv(dicomweb.USER)
    monkeypatch.delenv(dicomweb.TOKEN)
    (tmp_path / "netrc").write_text("machine pacs.example login me passwort Horse\n")
    with pytest.raises(BadInput, match="line 1 cannot be read") as told:
        Server("https://pacs.example")
    assert "Horse" not in str(told.value)


def test_a_token_is_sent(pacs, monkeypatch):
    seen = []
    monkeypatch.setenv(dicomweb.TOKEN, "Horse")
    with serving(pacs) as address:
        server = Server(address, QUICK)
        server._client.event_hooks = {"request": [lambda request: seen.append(request.headers["Authorization"])]}
        list(server.search(f"{SERIES}/instances", {}))
    assert seen == ["Bearer Horse"]


def test_https_is_verified_against_the_given_authority(pacs, files, tmp_path):
    if not (openssl := shutil.which("openssl")):
        pytest.skip("no openssl here")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", certificate, *subject]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(pacs, context) as address:
        ask = {"dicomweb": address, "query": ["Modality=CT"], "out": tmp_path / "a"}
        with pytest.raises(BadInput, match="must show a certificate that can be verified; give the file of your authority by --ca"):
            fetch.run(**ask)
        assert pacs.asked == []
        assert fetch.run(**ask, way=fetch.Way(ca=certificate)).failed == 0
        with pytest.raises(BadInput, match="certificate that can be verified"):  # the right authority, another host
            fetch.run(**ask | {"dicomweb": address.replace("127.0.0.1", "localhost")}, way=fetch.Way(ca=certificate))
    assert contents(tmp_path / "a") == sorted(files.values())
    with pytest.raises(BadInput, match="--ca .*: must be a file of certificates"):
        Server("https://pacs.example", Link(ca=tmp_path / "none.pem"))
    with pytest.raises(BadInput, match="--ca .*: must be a file of certificates"):
        Server("https://pacs.example", Link(ca=tmp_path / "a" / "failures.csv"))


@settings(max_examples=200, deadline=None)
@given(
    contents=st.lists(
        st.binary(max_size=60) | st.sampled_from([b"", b"\r\n", b"\r\n--her", b"--here", b"\r\n--", b"\r\n\r\n"]), max_size=4
    ),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    preamble=st.sampled_from([b"", b"\r\n", b"to be ignored\r\n"]),
)
def test_parts_are_the_same_however_the_bytes_arrive(tmp_path_factory, contents, cuts, preamble):
    folder = tmp_path_factory.mktemp("parts")
    body = preamble + b"".join(b"--here\r\nA: b\r\n\r\n" + one + b"\r\n" for one in contents) + b"--here--\r\n"
    if not contents:
        body = preamble + b"--here--"
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    blocks = [body[one:two] for one, two in pairwise(edges)]
    assert [path.read_bytes() for path in dicomweb.parts(blocks, b"here", folder)] == contents


def test_a_part_is_written_as_it_comes(tmp_path):
    """Memory holds a block, not a file: 256 MiB of one part pass through."""
    import tracemalloc

    def blocks():
        yield b"--here\r\n\r\n"
        for _ in range(256):
            yield bytes(1 << 20)
        yield b"\r\n--here--"

    tracemalloc.start()
    (path,) = dicomweb.parts(blocks(), b"here", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size == 256 << 20
    assert peak < 8 << 20
