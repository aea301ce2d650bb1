"""Paths and headers go to disk and come back, a series at a time, and nothing of them stays."""

from contextlib import closing
from pathlib import Path

from volssl.dicom import header
from volssl.dicom_write import write_dicom_series
from volssl.spool import Spool, packed, unpacked


def test_series_come_back_together(tmp_path, phantom):
    for series in ("2.25.5", "2.25.4"):
        write_dicom_series(tmp_path / series, *phantom, tags={"PatientID": "J", "StudyInstanceUID": "2.25.1", "SeriesInstanceUID": series})
    slices = [header(path) for path in sorted(tmp_path.rglob("*.dcm"))]
    with closing(Spool(tmp_path)) as spool:
        spool.add_slices(map(packed, slices[::2]))
        spool.add_slices(map(packed, slices[1::2]))
        assert spool.count_series() == 2
        got = list(map(unpacked, spool.series()))
        assert [len(group) for group in got] == [12, 12]
        assert sorted((one for group in got for one in group), key=lambda one: one.path) == slices
        assert {one.series for one in got[0]} == {"2.25.4"}
    assert not list(tmp_path.glob(".spool*"))


def test_files_by_kind_with_any_name(tmp_path):
    names = [Path("/a/Größe"), Path("/a/\udcff"), Path("/b")]
    with closing(Spool(tmp_path)) as spool:
        spool.add_files(zip(names, ["dicom", "dicom", "empty_file"], strict=True))
        assert list(spool.files("dicom")) == names[:2]
        assert spool.count("dicom") == 2
        assert list(spool.others(("dicom", "file"))) == [(names[2], "empty_file")]
        assert [spool.is_new(1, 2), spool.is_new(1, 2), spool.is_new(2, 1)] == [True, False, True]
