"""Verb fetch: the series of a PACS that answer a query, over DICOMweb, into a folder that `volssl index` reads.

ARCHIVE/series/<series_id>/<instance_id>.dcm   as the server stores them; written whole or not at all
ARCHIVE/failures.csv                           series that are not complete: series_id, reason
ARCHIVE/private/                               the key of the pseudonyms; series.csv: which series a series_id is
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volssl.dicom import Unreadable, header
from volssl.files import BadInput, Outcome, claim_out, read_csv, track, write_csv
from volssl.pseudonyms import claim_key, pseudonym

if TYPE_CHECKING:
    from volssl.dicomweb import Link, Server

# What a search for series may ask for (PS3.18 tables 10.6.1-3 and 10.6.1-5, and what servers add), and where its answer holds it.
# A server is free to ignore a key that it does not know, and then answers with every series it has: so no other word passes.
KEYS = {
    "StudyDate": "00080020",
    "StudyTime": "00080030",
    "AccessionNumber": "00080050",
    "ModalitiesInStudy": "00080061",
    "ReferringPhysicianName": "00080090",
    "StudyDescription": "00081030",
    "PatientName": "00100010",
    "PatientID": "00100020",
    "PatientBirthDate": "00100030",
    "PatientSex": "00100040",
    "StudyInstanceUID": "0020000D",
    "StudyID": "00200010",
    "SeriesDate": "00080021",
    "Modality": "00080060",
    "Manufacturer": "00080070",
    "SeriesDescription": "0008103E",
    "StationName": "00081010",
    "InstitutionName": "00080080",
    "BodyPartExamined": "00180015",
    "ProtocolName": "00181030",
    "SeriesInstanceUID": "0020000E",
    "SeriesNumber": "00200011",
    "PerformedProcedureStepStartDate": "00400244",
}
STUDY, SERIES, PATIENT, INSTANCE, COUNT = "0020000D", "0020000E", "00100020", "00080018", "00201209"
UID = re.compile(r"[0-9.]{1,64}")  # what may become a part of an address
AHEAD = 4  # series handed to each thread in advance


@dataclass(frozen=True)
class Wanted:
    """One series as the search named it. `count`: of its instances, 0 if the server does not say."""

    series_id: str
    patient: str
    study: str
    series: str
    count: int


@dataclass(frozen=True)
class Way:
    """How to pull. `parallel` series at a time; `ca`, `allow_http`, `retries`, `timeout_s` are those of the connection."""

    parallel: int = 2
    ca: Path | None = None
    allow_http: bool = False
    retries: int = 4
    timeout_s: float = 120.0
    first_wait_s: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.parallel <= 64:
            raise BadInput(f"--parallel: must lie in [1, 64]; found {self.parallel}")

    def link(self) -> Link:
        """The part of it that the connection needs."""
        from volssl.dicomweb import Link

        return Link(**{one.name: getattr(self, one.name) for one in fields(Link)})


def run(*, dicomweb: str, query: Sequence[str], out: Path, resume: bool = False, way: Way = Way()) -> Outcome:
    """Pull every series that answers `query` ("KEY=VALUE", all must hold) from the DICOMweb service at `dicomweb`.

    Args: resume: keep what is there and pull what is missing; the query may be another.
    Returns: `failed` counts the series in failures.csv.
    Raises: BadInput: no query, a key that no server must know or that this one ignores, no connection, wrong credentials, `out` in use.
    """
    asked = _query(query)
    server = _server(dicomweb, way)
    try:
        found = _found(server, asked)
        if not found:
            raise BadInput(f"--query {' '.join(asked)}: must be answered by at least one series; found none on {server.host}")
        claimed = claim_out(out, resume=resume) if Path(out).exists() else _private_folder(Path(out))
        key = claim_key(claimed, None)
        wanted = [Wanted(pseudonym(key, "S", "dicom", *names), *names, count) for names, count in found.items()]
        _remember(claimed, wanted)
        for left in (claimed / "series").glob("*/.tmp-*"):  # what a killed run was about to write
            left.unlink()
        failures = _pull_all(server, wanted, claimed / "series", key, way.parallel)
    finally:
        server.close()
    rows = [{"series_id": series_id, "reason": failures[series_id]} for series_id in sorted(failures)]
    write_csv(claimed / "failures.csv", rows, ["series_id", "reason"])
    return Outcome(claimed, len(failures), f"{len(wanted) - len(failures)} of {len(wanted)} series are complete")


def _server(url: str, way: Way) -> Server:
    try:
        from volssl.dicomweb import Server
    except ModuleNotFoundError as error:
        raise BadInput(f"fetch: needs {error.name}; found no such package; pip install 'volssl[pacs]'") from None
    return Server(url, way.link())


def _private_folder(out: Path) -> Path:
    # An archive as it comes from a PACS is all patients' data.
    out.mkdir(parents=True)
    out.chmod(0o700)
    return out


def _remember(out: Path, wanted: Sequence[Wanted]) -> None:
    table, columns = out / "private" / "series.csv", [one.name for one in fields(Wanted)]
    rows = {row["series_id"]: row for row in (read_csv(table) if table.exists() else [])}
    rows |= {one.series_id: {name: str(getattr(one, name)) for name in columns} for one in wanted}
    write_csv(table, [rows[series_id] for series_id in sorted(rows)], columns)
    table.chmod(0o600)


# ------------------------------------------------------------------------------------------------ what to pull


def _query(given: Sequence[str]) -> dict[str, str]:
    if not given:
        raise BadInput(
            "--query: must be given, or the whole PACS would be pulled; for example --query Modality=CT --query StudyDate=20240101-20240131"
        )
    asked: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise BadInput(f"--query {text}: must be KEY=VALUE")
        if name not in KEYS:
            near = next((known for known in KEYS if known.lower() == name.lower()), None)
            must = near or f"one of {', '.join(KEYS)}"
            raise BadInput(f"--query {name}: must be {must}; any other key a server may ignore, and then it sends all it has")
        if name in asked:
            raise BadInput(f"--query {name}: must be given once; found it twice; several values are written A\\B")
        asked[name] = value.strip()
    return asked


def _found(server: Server, asked: Mapping[str, str]) -> dict[tuple[str, str, str], int]:
    # Patient, study and series -> number of instances, 0 if the server does not say.
    from volssl.dicomweb import Broken, Refused

    found: dict[tuple[str, str, str], int] = {}
    try:
        for answer in server.search("series", asked, returned=[*asked, "NumberOfSeriesRelatedInstances"]):
            _check_filtered(answer, asked, server.host)
            patient, study, series, count = ("".join(_values(answer, tag)[:1]) for tag in (PATIENT, STUDY, SERIES, COUNT))
            if not UID.fullmatch(study) or not UID.fullmatch(series):
                raise Refused("answer_without_uid")
            found[patient, study, series] = int(count) if count.isdigit() else 0
    except Refused as error:
        raise BadInput(_refusal(server.host, str(error.args[0]))) from None
    except Broken as error:
        raise BadInput(f"--dicomweb: {server.host} must answer; found {error.args[0]} after {server.link.retries + 1} tries") from None
    return found


def _values(answer: Mapping[str, Any], tag: str) -> list[str]:
    element = answer.get(tag)
    values = element.get("Value", []) if isinstance(element, dict) else []
    return [str(one.get("Alphabetic", "") if isinstance(one, dict) else one).strip() for one in values if one is not None]


def _check_filtered(answer: Mapping[str, Any], asked: Mapping[str, str], host: str) -> None:
    # A server that ignores a key sends series that do not answer it, or does not send that attribute at all.
    for name, value in asked.items():
        if not any(_agrees(name, one, value) for one in _values(answer, KEYS[name])):
            raise BadInput(f"--query {name}: {host} must filter by it; it sent series that have another value, or none; choose another key")


def _agrees(name: str, found: str, asked: str) -> bool:
    found, asked = found.casefold(), asked.casefold()
    if name.endswith(("Date", "Time")) and "-" in asked:
        low, _, high = asked.partition("-")
        return low <= found and (not high or found[: len(high)] <= high)
    if name.endswith("Name"):  # servers may match a part of a name
        return all(part in found for part in re.split(r"[*?]", asked))
    patterns = [one.strip().replace("[", "[[]") for one in [asked, *re.split(r"[\\,]", asked)]]
    return any(fnmatch.fnmatchcase(found, pattern) for pattern in patterns)


def _refusal(host: str, code: str) -> str:
    if code in ("http_401", "http_403"):
        return (
            f"--dicomweb: {host} refused the credentials ({code}); set VOLSSL_DICOMWEB_USER and VOLSSL_DICOMWEB_PASSWORD, "
            f"or VOLSSL_DICOMWEB_TOKEN, or name {host} in ~/.netrc"
        )
    if code == "certificate":
        return f"--dicomweb: {host} must show a certificate that can be verified; give the file of your authority by --ca"
    return f"--dicomweb: {host} must answer a search for series at this address; found {code}"


# ------------------------------------------------------------------------------------------------ pulling


def _pull_all(server: Server, wanted: Sequence[Wanted], folder: Path, key: bytes, parallel: int) -> dict[str, str]:
    failures = {}
    with ThreadPoolExecutor(parallel, thread_name_prefix="fetch") as pool:
        try:
            jobs = ((one.series_id, partial(_pull, server, one, folder / one.series_id, key)) for one in wanted)
            for series_id, code in track(_answers(pool, jobs, ahead=AHEAD * parallel), total=len(wanted), label="fetch"):
                if code:
                    failures[series_id] = code
        except BaseException:
            server.stop.set()  # so that no thread goes on with a long transfer
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def _answers(pool: Executor, jobs: Iterable[tuple[str, Callable[[], str]]], *, ahead: int) -> Iterator[tuple[str, str]]:
    waiting: dict[Future[str], str] = {}
    for series_id, job in jobs:
        waiting[pool.submit(job)] = series_id
        if len(waiting) >= ahead:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(done), done.result()
    while waiting:
        for done in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(done), done.result()


def _pull(server: Server, one: Wanted, folder: Path, key: bytes) -> str:
    """Pull what is missing of one series. Returns: "" if it is complete now, else the code of why not."""
    from volssl.dicomweb import Broken, Refused

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if one.count and _count(folder) >= one.count:
            return ""
        if not _count(folder) and _pull_whole(server, one, folder, key) and _count(folder) >= max(1, one.count):
            return ""
        return _pull_missing(server, one, folder, key)
    except (Refused, Broken) as error:
        return str(error.args[0])
    except Unreadable as error:
        return error.code


def _count(folder: Path) -> int:
    return sum(1 for entry in os.scandir(folder) if entry.name.endswith(".dcm") and not entry.name.startswith("."))


def _address(one: Wanted) -> str:
    return f"studies/{one.study}/series/{one.series}"


def _pull_whole(server: Server, one: Wanted, folder: Path, key: bytes) -> bool:
    """All of the series in one answer. Returns: whether it came to its end; what came stays in any case."""
    from volssl.dicomweb import Broken

    def act() -> bool:
        try:
            _pull_files(server, _address(one), folder, key)
        except Broken:
            if _count(folder):  # what is missing is asked for by name
                return False
            raise
        return True

    try:
        return server.tried(act)
    except Broken:  # some servers cannot send so much at once
        return False


def _pull_missing(server: Server, one: Wanted, folder: Path, key: bytes) -> str:
    listed = ["".join(_values(answer, INSTANCE)[:1]) for answer in server.search(f"{_address(one)}/instances", {})]
    if not listed or not all(UID.fullmatch(instance) for instance in listed):
        return "no_instances"
    for instance in listed:
        if not (folder / _name(key, instance)).exists():
            server.tried(lambda instance=instance: _pull_files(server, f"{_address(one)}/instances/{instance}", folder, key))
    missing = sum(not (folder / _name(key, instance)).exists() for instance in listed)
    return "other_instances" if missing else ""


def _pull_files(server: Server, path: str, folder: Path, key: bytes) -> None:
    for temporary in server.retrieve(path, folder):
        _keep(temporary, folder, key)


def _keep(temporary: Path, folder: Path, key: bytes) -> None:
    # Named by what the file says it is, so that it is known again whichever answer brought it.
    try:
        instance = header(temporary).instance
        if not instance:
            raise Unreadable("no_instance_uid", "a file of the answer must bear a SOPInstanceUID; found none")
        os.replace(temporary, folder / _name(key, instance))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _name(key: bytes, instance: str) -> str:
    return pseudonym(key, "I", instance) + ".dcm"
