"""A DICOMweb server: find series (QIDO-RS), stream their files to disk (WADO-RS). The only door to httpx.

Nothing of an answer is held in memory but one page of a search and one block of a file. Errors carry codes, never addresses: an
address holds the UIDs of a study.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import random
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from volssl.files import BadInput

T = TypeVar("T")

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # without it a server unpacks what is compressed
AGAIN = {408, 425, 429, 500, 502, 503, 504}
PAGE = 500  # answers asked for at a time
PAGE_BYTES = 256 << 20  # of one page of a search; more is no answer to a question of ours
HEAD_BYTES = 64 << 10  # of the header lines of one part
BLOCK_BYTES = 1 << 20
LONGEST_WAIT_S = 60.0
PLAIN = "*?,:/@!$'()^\\"  # in a value of a search
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
USER, PASSWORD, TOKEN = "VOLSSL_DICOMWEB_USER", "VOLSSL_DICOMWEB_PASSWORD", "VOLSSL_DICOMWEB_TOKEN"

# They log addresses, and at the lowest level the credentials.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class Refused(Exception):
    """An answer that trying again will not change; `args[0]` is a code such as http_404."""


class Broken(Exception):
    """No whole answer, after all tries; `args[0]` is a code such as http_503 or connection."""


@dataclass(frozen=True)
class Link:
    """How to reach the server. `ca`: file with the authority to trust in place of the system's. Waits double from `first_wait_s`."""

    ca: Path | None = None
    allow_http: bool = False
    retries: int = 4
    timeout_s: float = 120.0
    first_wait_s: float = 1.0

    def __post_init__(self) -> None:
        if self.retries < 0 or self.timeout_s <= 0 or self.first_wait_s < 0:
            raise BadInput(f"retries, timeout_s, first_wait_s: must be >= 0, > 0, >= 0; found {self}")


@dataclass
class Server:
    """An open connection to the DICOMweb service at `url`. Threads may share it. `stop` ends waits and transfers."""

    url: str
    link: Link = Link()
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.host = _checked(self.url, self.link)
        self.url = self.url.rstrip("/")
        headers = {"Accept-Encoding": "identity"}
        self._client = httpx.Client(verify=_trust(self.link.ca), timeout=self.link.timeout_s, auth=_credentials(self.host), headers=headers)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def search(self, path: str, query: Mapping[str, str], returned: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
        """All answers to a search below `path` ("series"), page by page: DICOM JSON, tags in hexadecimal. Raises: Refused, Broken."""
        asked = [*query.items(), *(("includefield", name) for name in returned)]
        offset, last = 0, None
        while True:
            page = self.tried(lambda offset=offset: self._page(path, [*asked, ("limit", str(PAGE)), ("offset", str(offset))]))
            if page == last:  # a server that knows no offset answers with the same page again
                return
            yield from page
            offset, last = offset + len(page), page
            if len(page) < PAGE:
                return

    def retrieve(self, path: str, folder: Path) -> Iterator[Path]:
        """Stream the DICOM files below `path` into new temporary files in `folder`, each yielded once it is whole.

        One try. Raises: Refused; Broken: also if the answer ends before its closing mark.
        """
        with self._answer(path, [], AS_STORED) as answer:
            kind = answer.headers.get("content-type", "")
            blocks = self._blocks(answer)
            if kind.split(";")[0].strip().lower() == "application/dicom":
                yield _whole_file(blocks, folder, answer.headers.get("content-length"))
            else:
                yield from parts(blocks, boundary_of(kind), folder)

    def tried(self, act: Callable[[], T]) -> T:
        """`act()`, again after a wait where it breaks, at most `link.retries` times. Raises: Refused; Broken: the last one."""
        for turn in range(self.link.retries + 1):
            try:
                return act()
            except Broken as error:
                if turn == self.link.retries or self.stop.is_set():
                    raise
                asked_s = error.args[1] if len(error.args) > 1 else 0.0
                drawn_s = self.link.first_wait_s * 2**turn * random.uniform(0.5, 1.0)  # so that clients do not return all at once
                self.stop.wait(min(LONGEST_WAIT_S, max(asked_s, drawn_s)))
        raise AssertionError("the loop returns or raises")

    def _page(self, path: str, asked: list[tuple[str, str]]) -> list[dict[str, Any]]:
        with self._answer(path, asked, "application/dicom+json") as answer:
            if answer.status_code == 204:
                return []
            text = bytearray()
            for block in self._blocks(answer):
                text += block
                if len(text) > PAGE_BYTES:
                    raise Refused("answer_too_long")
        try:
            found = json.loads(bytes(text) or b"[]")
        except ValueError:
            raise Refused("answer_not_json") from None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise Refused("answer_not_json")
        return found

    @contextmanager
    def _answer(self, path: str, asked: list[tuple[str, str]], accept: str) -> Iterator[httpx.Response]:
        try:
            with self._client.stream("GET", f"{self.url}/{path}{_written_out(asked)}", headers={"Accept": accept}) as answer:
                if answer.status_code in AGAIN:
                    raise Broken(f"http_{answer.status_code}", _seconds(answer.headers.get("retry-after")))
                if answer.status_code not in (200, 204, 206):
                    raise Refused(f"http_{answer.status_code}")
                yield answer
        except httpx.TimeoutException:
            raise Broken("timeout") from None
        except httpx.TransportError as error:
            if _is_certificate(error):
                raise Refused("certificate") from None
            raise Broken("connection") from None
        except httpx.DecodingError:
            raise Broken("connection") from None

    def _blocks(self, answer: httpx.Response) -> Iterator[bytes]:
        for block in answer.iter_bytes(BLOCK_BYTES):
            if self.stop.is_set():
                raise Broken("stopped")
            yield block


def _written_out(asked: list[tuple[str, str]]) -> str:
    # Marks that an address may hold as they are stay so: Orthanc's DICOMweb plug-in 1.7 does not decode them.
    return "?" * bool(asked) + "&".join(f"{quote(name)}={quote(value, safe=PLAIN)}" for name, value in asked)


def _checked(url: str, link: Link) -> str:
    # The host of the address; never quotes the address, which may hold a password.
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BadInput("--dicomweb: must be an address such as https://pacs.example/dicom-web; found one that cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise BadInput("--dicomweb: must begin with https:// and name a host, as in https://pacs.example/dicom-web")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise BadInput(
            f"--dicomweb: must hold no user, password or parameters; give them by the environment ({USER} and {PASSWORD}, "
            f"or {TOKEN}) or by netrc"
        )
    if parts.scheme == "http" and host not in LOOPBACK and not link.allow_http:
        raise BadInput(
            f"--dicomweb: must be https, since patients' data and the password would cross the network in the clear; found http to {host}; "
            "give --allow-http if you answer for that network"
        )
    return host


def _trust(ca: Path | None) -> ssl.SSLContext:
    if ca is not None and not Path(ca).is_file():
        raise BadInput(f"--ca {ca}: must be a file of certificates (PEM); found nothing there")
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (ssl.SSLError, ValueError):
        raise BadInput(f"--ca {ca}: must be a file of certificates (PEM); found something else") from None


def _credentials(host: str) -> httpx.Auth | None:
    """From the environment, else from netrc (NETRC, ~/.netrc); None if neither names any."""
    token, user, password = (os.environ.get(name) for name in (TOKEN, USER, PASSWORD))
    if token and user:
        raise BadInput(f"{TOKEN} and {USER} exclude each other; found both; unset one")
    if token:
        return _Bearer(token)
    if user:
        if password is None:
            raise BadInput(f"{PASSWORD}: must be set where {USER} is; found nothing")
        return httpx.BasicAuth(user, password)
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(file).authenticators(host) if file.is_file() else None
    except netrc.NetrcParseError as error:  # its text may quote a password
        raise BadInput(f"{file}: must be a netrc file; line {error.lineno} cannot be read") from None
    return httpx.BasicAuth(found[0], found[2] or "") if found else None


class _Bearer(httpx.Auth):
    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# ------------------------------------------------------------------------------------------------ multipart/related, RFC 2387


def boundary_of(content_type: str) -> bytes:
    """The boundary of a multipart answer, from its Content-Type. Raises: Refused: another kind of answer."""
    kind, *parameters = content_type.split(";")
    named = dict(one.strip().split("=", 1) for one in parameters if "=" in one)
    boundary = {name.lower(): value for name, value in named.items()}.get("boundary", "").strip('"')
    if kind.strip().lower() != "multipart/related" or not boundary:
        raise Refused("answer_not_dicom")
    return boundary.encode("latin-1")


def parts(blocks: Iterable[bytes], boundary: bytes, folder: Path) -> Iterator[Path]:
    """Write every part into a temporary file in `folder`, flushed to disk, and yield it. Raises: Broken: no closing mark; Refused."""
    mark = b"\r\n--" + boundary
    source = _Source(blocks)
    source.until(mark, limit=HEAD_BYTES)
    while source.take(2) != b"--":
        # The two bytes end the mark's line; a part without header lines follows with the empty line at once.
        source.put_back(b"\r\n")
        source.until(b"\r\n\r\n", limit=HEAD_BYTES)
        yield _written(folder, lambda write: source.until(mark, write=write))


def _whole_file(blocks: Iterator[bytes], folder: Path, length: str | None) -> Path:
    def copy(write: Callable[[bytes], Any]) -> None:
        count = 0
        for block in blocks:
            count += len(block)
            write(block)
        if length is None or count != int(length):  # nothing else would tell that it ended early
            raise Broken("connection")

    return _written(folder, copy)


def _written(folder: Path, fill: Callable[[Callable[[bytes], Any]], None]) -> Path:
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=".dcm", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            fill(stream.write)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


class _Source:
    """Bytes that come in blocks, read up to a mark; holds no more than a block and a mark."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._held = bytearray(b"\r\n")  # the first mark may stand at the very beginning

    def until(self, mark: bytes, *, write: Callable[[bytes], Any] | None = None, limit: int = 0) -> None:
        passed = 0
        while (at := self._held.find(mark)) < 0:
            self._pass_on(len(self._held) - len(mark) + 1, write)
            passed += len(self._more())
            if limit and passed > limit + BLOCK_BYTES:
                raise Refused("answer_not_dicom")
        self._pass_on(at, write)
        del self._held[: len(mark)]

    def take(self, count: int) -> bytes:
        while len(self._held) < count:
            self._more()
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken

    def put_back(self, taken: bytes) -> None:
        self._held[:0] = taken

    def _pass_on(self, count: int, write: Callable[[bytes], Any] | None) -> None:
        if count > 0:
            if write is not None:
                write(bytes(self._held[:count]))
            del self._held[:count]

    def _more(self) -> bytes:
        block = next(self._blocks, None)
        if block is None:
            raise Broken("truncated")
        self._held += block
        return block
