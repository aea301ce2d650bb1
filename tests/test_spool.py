"""Paths and headers go to disk and come back, a series at a time, and nothing of them stays."""

import errno
from pathlib import Path

import pytest

from volssl.dicom import header
from volssl.dicom_write import write_dicom_series
from volssl.spool import packed, spooled, unpacked


def test_series_come_back_together(tmp_path, phantom):
    for series in ("2.25.5", "2.25.4"):
        write_dicom_series(tmp_path / series, *phantom, tags={"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": series})
    slices = [header(path) for path in sorted(tmp_path.rglob("*.dcm"))]
    with spooled(tmp_path) as spool:
        spool.add_slices(map(packed, slices[::2]))
        spool.add_slices(map(packed, slices[1::2]))
        assert spool.count_series() == 2
        got = list(map(unpacked, spool.series()))
        assert [len(group) for group in got] == [12, 12]
        assert sorted((one for group in got for one in group), key=lambda one: one.path) == slices
        assert {one.series for one in got[0]} == {"2.25.4"}
    assert not list(tmp_path.glob(".spool*"))


def test_nothing_that_names_a_series_is_sorted_outside_of_the_private_folder(tmp_path):
    """SQLite sorts what is large in a temporary file, and that is not in its database's folder."""
    with spooled(tmp_path) as spool:
        spool.add_slices([(b"two", b"x"), (b"one", b"y")])
        said: list[str] = []
        spool.base.set_trace_callback(said.append)
        assert spool.count_series() == 2 and list(spool.series()) == [[b"y"], [b"x"]]
        spool.base.set_trace_callback(None)
        plans = [str(spool.base.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()) for query in said]
        assert len(said) == 2 and all(query.startswith("SELECT") for query in said)
        assert not any("TEMP" in plan for plan in plans)


def test_files_by_kind_with_any_name(tmp_path):
    names = [Path("/a/Größe"), Path("/a/\udcff"), Path("/b")]
    with spooled(tmp_path) as spool:
        spool.add_files(zip(names, ["dicom", "dicom", "file"], strict=True))
        assert list(spool.files("dicom")) == names[:2]
        assert spool.count("dicom") == 2
        assert [spool.is_new(1, 2), spool.is_new(1, 2), spool.is_new(2, 1)] == [True, False, True]


def test_files_set_aside_are_named_and_each_is_one(tmp_path):
    names = [Path(f"/a/{name}") for name in ("c", "\udcff", "b", "a", "d")]
    with spooled(tmp_path) as spool:
        spool.set_aside(zip(names, ["truncated", "text", "empty", "empty", "text"], strict=True), ignored={"text"})
        spool.set_aside([(names[0], "missing"), (names[4], "empty")], ignored={"text"})
        assert spool.count_aside(ignored=False) == {"empty": 3, "missing": 1}
        assert spool.count_aside(ignored=True) == {"text": 1}
        unread = [(f"F{path}", code, path) for path, code in [("/a/c", "missing"), ("/a/b", "empty"), ("/a/a", "empty"), ("/a/d", "empty")]]
        assert list(spool.aside("F{}".format)) == [*unread, ("", "text", "/a/\udcff")]
        assert list(spool.failures()) == sorted((name, code) for name, code, _ in unread)


def test_a_full_disk_is_an_error_of_the_disk_and_nothing_stays(small_disk):
    """At the start, and when more is gathered than is kept in memory."""
    for room, slices in (("4k", 0), ("1m", 40)):
        disk = small_disk(room)
        with pytest.raises(OSError) as caught, spooled(disk) as spool:
            spool.add_slices((b"series", bytes(1_000_000)) for _ in range(slices))
        assert caught.value.errno == errno.ENOSPC
        assert not list(disk.iterdir())


def test_what_a_killed_run_left_does_not_come_back(tmp_path):
    with spooled(tmp_path) as spool:
        spool.add_files([(Path("/a"), "file")])
        spool.base.commit()
        left = spool.file.read_bytes()
    (tmp_path / ".spool.sqlite").write_bytes(left)
    with spooled(tmp_path) as spool:
        assert spool.count("file") == 0
