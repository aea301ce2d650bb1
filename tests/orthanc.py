"""A real PACS for the tests: an Orthanc server with its DICOMweb plug-in on loopback, filled with phantom series."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER, PASSWORD = "reader", "Correct-Horse-7319"


def executable() -> str:
    """Path of the server. Skips without it; in CI it must be there."""
    found = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
    if not found:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail("Orthanc must be there in CI: apt-get install orthanc orthanc-dicomweb")
        pytest.skip("no Orthanc here: apt-get install orthanc orthanc-dicomweb")
    return found


def plugin() -> str:
    """Path of the DICOMweb plug-in."""
    folders = [Path(folder) for folder in ("/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins")]
    return next(str(path) for folder in folders for path in sorted(folder.glob("libOrthancDicomWeb*")))


def free_port() -> int:
    """A port on loopback that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run a server whose data lie in `folder`; yields its DICOMweb address."""
    server, port = executable(), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "Name": "volssl test",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [plugin()],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([server, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        _await(port, process, folder / "log")
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _await(port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"Orthanc did not start:\n{log.read_text(errors='replace')}")


def fill(address: str, folder: Path) -> None:
    """Send every file below `folder` to the server."""
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url, headers = address.replace("/dicom-web", "/instances"), {"Authorization": f"Basic {token}", "Content-Type": "application/dicom"}
    for path in sorted(folder.rglob("*.dcm")):
        with opener.open(urllib.request.Request(url, data=path.read_bytes(), headers=headers), timeout=30) as answer:
            assert answer.status == 200
