"""Out folders, atomic files, tables: nothing half-written, nothing lost."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from volssl import files
from volssl.files import BadInput, scratch


def test_out_folder_in_use_is_refused_and_flags_do_what_they_say(tmp_path):
    out = files.claim_out(tmp_path / "run")
    (out / "recipe.yaml").write_text("x")
    with pytest.raises(BadInput, match="or give --resume to continue or --overwrite to replace it$"):
        files.claim_out(out, resume=False, overwrite=False)
    with pytest.raises(BadInput, match="or give --overwrite to replace it$"):
        files.claim_out(out, overwrite=False)
    with pytest.raises(BadInput, match="choose another folder$"):
        files.claim_out(out)
    assert (files.claim_out(out, resume=True) / "recipe.yaml").exists()
    files.claim_out(out, overwrite=True)
    assert not list(out.iterdir())
    with pytest.raises(BadInput, match="exclude each other"):
        files.claim_out(out, resume=True, overwrite=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BadInput, match="must be a folder"):
        files.claim_out(file, overwrite=True)


def test_overwrite_never_empties_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="delete it yourself"):
        files.claim_out(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.nii.gz"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        assert temporary.name.endswith(".nii.gz") and temporary.parent == tmp_path
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    told = []
    sync, rename = os.fsync, os.replace

    def synced(handle):
        told.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name[:5]))
        sync(handle)

    def renamed(one, other):
        told.append(("rename", Path(one).name[:5], Path(other).name))
        rename(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with files.atomic(tmp_path / "out" / "a.csv") as temporary:
        temporary.write_text("a")
    assert told == [("sync", ".tmp-"), ("rename", ".tmp-", "a.csv"), ("sync", "out")]


def test_json_and_csv_round_trip(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert files.read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()
    rows = [{"case": "a,b", "value": 1.5}, {"case": 'q"', "value": ""}]
    files.write_csv(tmp_path / "t.csv", rows, ["case", "value"])
    assert files.read_csv(tmp_path / "t.csv") == [{"case": "a,b", "value": "1.5"}, {"case": 'q"', "value": ""}]


@pytest.mark.parametrize("read", [files.read_json, files.read_csv])
def test_absent_file_is_one_clear_error(tmp_path, read):
    with pytest.raises(BadInput, match="must exist"):
        read(tmp_path / "none")


def test_broken_json(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(BadInput, match="must be JSON"):
        files.read_json(tmp_path / "a.json")


def test_track_passes_everything_on_and_tells_the_end(capsys):
    assert list(files.track(iter("abc"), total=3, label="read")) == list("abc")
    assert "read: 3/3" in capsys.readouterr().err


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf")
    assert json.dumps(files.Outcome(tmp_path).failed) == "0"


def test_overwrite_never_deletes_what_is_to_be_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("x")
    (tmp_path / "data").mkdir()
    for given in (tmp_path / "data", tmp_path, tmp_path / "elsewhere" / ".." / "data"):
        with pytest.raises(BadInput, match="would delete the input"):
            files.claim_out(tmp_path, overwrite=True, inputs=[given])
    assert (tmp_path / "recipe.yaml").exists()
    files.claim_out(tmp_path, overwrite=True, inputs=[tmp_path.parent, tmp_path.parent / "other"])
    assert not list(tmp_path.iterdir())


def test_looking_at_out_touches_nothing(tmp_path):
    files.check_out(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "recipe.yaml").write_text("x")
    files.check_out(tmp_path, overwrite=True)
    assert (tmp_path / "recipe.yaml").exists()
    with pytest.raises(BadInput, match="must be new or empty"):
        files.check_out(tmp_path)


def test_scratch_goes_and_names_tmpdir_when_it_is_full():
    with scratch() as folder:
        (folder / "a").write_text("b")
    assert not folder.exists()
    with pytest.raises(BadInput, match=f"TMPDIR {tempfile.gettempdir()}: must have room"), scratch():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), scratch():
        raise PermissionError(errno.EACCES, "Permission denied")
