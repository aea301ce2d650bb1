"""The table of an index comes back as it was, and how each scan is read is looked up on disk."""

from pathlib import Path

import pytest

from volssl.archive import Source
from volssl.files import BadInput
from volssl.rows import Row, Rows, Sources, SourcesFile, load, write_rows
from volssl.stacks import Limits

ROW = Row("S1", "P1", "T1", "CT", "CHEST", (5, 6, 7), (0.5, 0.5, 2.0), "LPS", 7, "repair", ("gantry_tilt",), "C1", "val", ("unshear",))
SOURCE = Source("dicom", (Path("/a/Größe"), Path("/a/\udcff")), (), ("unshear",), Limits(position_mm=0.5))


def written(folder):
    (folder / "private").mkdir()
    write_rows(folder / "index.csv", [ROW])
    with SourcesFile(folder / "private") as sources:
        sources.add("S0", Source("file", (Path("x.nii"),), (3,)))
        sources.add("S1", SOURCE)
    return folder


def test_round_trip(tmp_path):
    loaded = load(written(tmp_path))
    assert loaded.rows == [ROW]
    assert loaded.sources["S1"] == SOURCE
    assert loaded.sources["S0"].part == (3,)
    assert list(loaded.sources) == ["S0", "S1"] and len(loaded.sources) == 2
    with pytest.raises(KeyError):
        loaded.sources["S2"]


def test_columns_keep_their_order(tmp_path):
    header = (written(tmp_path) / "index.csv").read_text().splitlines()[0]
    assert header == (
        "scan_id,patient_id,study_id,modality,body_part,shape_vox,spacing_mm,orientation,num_slices,verdict,reasons,content_hash,split,repairs"
    )


def test_a_failed_run_leaves_no_sources(tmp_path):
    with pytest.raises(RuntimeError), SourcesFile(tmp_path) as sources:
        sources.add("S1", SOURCE)
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_rows_without_source_are_refused(tmp_path):
    written(tmp_path)
    write_rows(tmp_path / "index.csv", [ROW, Row(**ROW.__dict__ | {"scan_id": "S9"})])
    with pytest.raises(BadInput, match="found none for 1"):
        load(tmp_path)


def test_sources_are_not_kept_in_memory(tmp_path):
    names = [f"S{number * 7919 % 2000:04}" for number in range(2000)]
    with SourcesFile(tmp_path) as file:
        for number, name in enumerate([*names, "S0007"]):
            file.add(name, Source("file", (Path(f"/{number}"),)))
    sources = Sources(tmp_path / "sources.jsonl")
    assert sum(one.nbytes for one in vars(sources).values() if hasattr(one, "nbytes")) == 16 * 2001
    assert all(sources[name].files == (Path(f"/{number}"),) for number, name in enumerate(names) if name != "S0007")
    assert sources["S0007"].files == (Path("/2000"),)  # the last of one name
    assert list(sources)[:2000] == names and "S0007" in sources and "S2000" not in sources


def test_a_table_that_changes_between_two_looks_is_refused(tmp_path):
    rows = Rows(written(tmp_path) / "index.csv")
    assert list(rows) == list(rows) == [ROW]
    write_rows(tmp_path / "index.csv", [ROW, ROW])
    with pytest.raises(BadInput, match="must stay as it is"):
        list(rows)
