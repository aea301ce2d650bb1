"""Mutated headers and containers: an answer or `Unreadable`, never another error, a hang, or memory without bound.

10,000 cases: VOLSSL_FUZZ_CASES=10000 python -m pytest tests/test_hostile.py -n 0
"""

import gzip
import os
import resource
import time
from contextlib import suppress

import hostile
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from volssl import archive, headers, index
from volssl.dicom import frames_of, header
from volssl.examine import examine_file, examine_series
from volssl.files import BadInput
from volssl.gates import Gates
from volssl.pixels import read_slice

CASES = int(os.environ.get("VOLSSL_FUZZ_CASES", "400"))
SECONDS = 10.0
MOST_BYTES = 300 << 20
DICOM = ["explicit.dcm", "bare.dcm", "rle.dcm", "enhanced.dcm", "implicit.dcm"]
FILES = ["x.nii", "x.nii.gz", "two.nii", "x.mha", "z.mha", "x.nrrd", "z.nrrd"]
fuzzed = settings(max_examples=CASES // 2, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return hostile.seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def bounded():
    """The memory that the process grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def test_mutated_dicom(good, place, bounded):
    @fuzzed
    @given(hostile.mutations(DICOM))
    def holds(case):
        name, steps = case
        path = place / "case.dcm"
        path.write_bytes(hostile.mutated(good[name], steps))
        begun = time.monotonic()
        try:
            one = header(path)
            for facts in examine_series(Gates(min_slices=1), [one]):
                archive.read_source(facts.source)
            read_slice(frames_of(one)[0] if one.frames > 1 else one)
        except archive.Unreadable:
            pass
        assert time.monotonic() - begun < SECONDS

    holds()


def test_mutated_files(good, place, bounded):
    @fuzzed
    @given(hostile.mutations(FILES))
    def holds(case):
        name, steps = case
        path = place / f"case{name[name.index('.') :]}"
        path.write_bytes(hostile.mutated(good[name], steps, packed=name.endswith(".gz")))
        begun = time.monotonic()
        for facts in examine_file(Gates(), path):
            if not facts.failure:
                with suppress(archive.Unreadable):
                    archive.read_source(facts.source)
        assert time.monotonic() - begun < SECONDS

    holds()


def test_an_archive_of_mutated_files_is_indexed_to_its_end(good, tmp_path):
    (tmp_path / "archive").mkdir()
    for number, name in enumerate([*DICOM, *FILES] * 4):
        steps = [("int", 131 + 97 * number, number), ("number", 311 + 53 * number, number), ("byte", 7 * number, number)]
        made = hostile.mutated(good[name], steps, packed=name.endswith(".gz"))
        (tmp_path / "archive" / f"{number}{name}").write_bytes(made)
    outcome = index.build([tmp_path / "archive"], out=tmp_path / "index")
    loaded = index.load(tmp_path / "index")
    known = sum(len(loaded.sources[row.scan_id].files) for row in loaded.rows) + outcome.failed
    assert known >= 12


def test_deep_sequences_end(tmp_path):
    """10,000 sequences inside each other."""
    deep = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 10_000
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    (tmp_path / "deep").write_bytes(bytes(128) + b"DICM" + meta + deep)
    with pytest.raises(headers.Odd):
        headers.scan(tmp_path / "deep")
    with pytest.raises(BadInput):
        header(tmp_path / "deep")


def test_a_bomb_in_every_container(tmp_path, bounded):
    """A gigabyte of zeros where a few kilobytes are declared is not unpacked."""
    head = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 10 10 10\nspace: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: gzip\n\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + gzip.compress(bytes(1 << 28), 9))
    assert archive.read_image(tmp_path / "x.nrrd").grid.shape_vox == (10, 10, 10)
    meta = "NDims = 3\nDimSize = 10 10 10\nElementType = MET_UCHAR\nCompressedData = True\nElementDataFile = LOCAL\n"
    (tmp_path / "x.mha").write_bytes(meta.encode() + hostile.bomb(1 << 28))
    assert archive.read_image(tmp_path / "x.mha").grid.shape_vox == (10, 10, 10)
