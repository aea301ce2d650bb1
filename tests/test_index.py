"""Every file is accounted for, nobody is named, and a patient stands on one side of the split."""

import importlib
import json
import shutil
import stat
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields

import numpy as np
import pytest
from conftest import body_phantom

from volssl import archive, index
from volssl.__main__ import run_verb
from volssl.dicom_write import write_dicom_series
from volssl.files import BadInput, read_csv
from volssl.volume import Grid, Volume

# The planted body part is no valid code on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
PLANTED = ["Doe^Jane", "Janes_head", "20240131", "SecretClinic"]


def write_series(folder, phantom, *, patient, series, **tags):
    tags = {"PatientID": patient, "StudyInstanceUID": f"2.25.{patient[-1]}9", "SeriesInstanceUID": f"2.25.{series}"} | tags
    write_dicom_series(folder, *phantom, tags=tags)


@pytest.fixture
def hospital(tmp_path, phantom):
    """Three patients in DICOM (one with a broken series), a NIfTI CT twice, an MR, a label map, a truncated file, a text."""
    array, grid = phantom
    root = tmp_path / "SecretClinic"
    tags = {"PatientName": PLANTED[0], "StudyDate": PLANTED[2], "BodyPartExamined": PLANTED[1], "InstitutionName": PLANTED[3]}
    for number in (1, 2, 3):
        write_series(root / f"Doe^Jane{number}", (body_phantom(seed=number), grid), patient=f"Doe^Jane{number}", series=number, **tags)
    write_series(root / "broken", phantom, patient="Doe^Jane1", series=11, **tags)
    sorted((root / "broken").iterdir())[4].unlink()
    other = array[::-1].copy()
    archive.write_nifti(root / "Janes_head.nii.gz", other, grid, np.int16)
    turned = Volume(other[None], grid).reoriented("PIR")
    archive.write_nifti(root / "again.nii.gz", turned.array_CXYZ[0], turned.grid, np.float32)
    archive.write_nifti(root / "mr.nii.gz", body_phantom(seed=9) + 1010, grid, np.int16)
    archive.write_nifti(root / "label.nii.gz", (array > 0) + (array > 300), grid, np.uint8)
    whole = (root / "mr.nii.gz").read_bytes()
    (root / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text(PLANTED[0])
    return root


def test_every_series_has_a_row_and_every_file_is_counted(hospital, tmp_path):
    outcome = index.build([hospital], out=tmp_path / "index")
    assert outcome.failed == 1
    rows = index.load(tmp_path / "index").rows
    assert len(rows) == 8
    assert sorted((row.modality, row.verdict, row.reasons) for row in rows) == [
        ("", "reject", ("label_map",)),
        *[("CT", "accept", ())] * 5,
        ("CT", "reject", ("missing_slice",)),
        ("MR", "accept", ()),
    ]
    summary = json.loads((tmp_path / "index/summary.json").read_text())
    assert summary["verdicts"] == {"accept": 6, "reject": 2}
    assert summary["reasons"] == {"label_map": 1, "missing_slice": 1}
    assert summary["files_unreadable"] == {"truncated": 1}
    assert summary["files_ignored"] == {"not_an_image": 1}
    failures = read_csv(tmp_path / "index/failures.csv")
    assert [row["reason"] for row in failures] == ["truncated"]
    assert failures[0]["file_id"].startswith("F")


def test_nobody_is_named_outside_of_private(hospital, tmp_path, capfd, caplog):
    out = tmp_path / "index"
    index.build([hospital], out=out)
    said = capfd.readouterr()
    assert not caplog.records
    texts = [said.out, said.err] + [file.read_text() for file in out.iterdir() if file.is_file()]
    for word in [*PLANTED, "2.25.", "nii.gz", str(tmp_path)]:
        assert not any(word in text for text in texts), word
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (out / "private").iterdir()} == {0o600}
    assert PLANTED[0] in (out / "private/sources.jsonl").read_text()


def test_facts_of_a_row(hospital, tmp_path, phantom):
    index.build([hospital], out=tmp_path / "index")
    loaded = index.load(tmp_path / "index")
    row = next(row for row in loaded.rows if len(loaded.sources[row.scan_id].files) == 12)
    assert (row.shape_vox, row.spacing_mm, row.orientation, row.num_slices) == ((24, 20, 12), (1.5, 1.75, 3.0), "LPS", 12)
    assert row.body_part == ""  # what the tag said is no known word
    first = next(row for row in loaded.rows if loaded.sources[row.scan_id].files[0].name == "mr.nii.gz")
    assert loaded.sources[first.scan_id].files == (hospital / "mr.nii.gz",)


def test_the_same_scan_twice_is_found_and_stands_on_one_side(hospital, tmp_path):
    for seed in range(12):
        index.build([hospital], out=tmp_path / f"index{seed}", seed=seed, gates=index.Gates(validation_share=0.5))
        loaded = index.load(tmp_path / f"index{seed}")
        name = {loaded.sources[row.scan_id].files[0].name: row for row in loaded.rows}
        one, two = name["Janes_head.nii.gz"], name["again.nii.gz"]
        assert one.content_hash == two.content_hash
        assert one.scan_id != two.scan_id
        assert one.split == two.split
        by_patient = {}
        for row in loaded.rows:
            if row.verdict == "accept":
                assert by_patient.setdefault(row.patient_id, row.split) == row.split
            else:
                assert row.split == ""
        assert sorted(by_patient.values()).count("val") in (3, 4)  # 3 of 5 groups, one of them of two patients


def test_key_makes_the_index_reproducible_and_resume_keeps_it(hospital, tmp_path):
    (tmp_path / "key").write_text("k" * 40)
    gates = index.Gates(key=tmp_path / "key")
    for out in ("one", "two"):
        index.build([hospital], out=tmp_path / out, gates=gates)
    one, two = ((tmp_path / out / "index.csv").read_bytes() for out in ("one", "two"))
    assert one == two
    index.build([hospital], out=tmp_path / "three")
    three = (tmp_path / "three/index.csv").read_bytes()
    assert three != one
    index.build([hospital], out=tmp_path / "three", resume=True)
    assert (tmp_path / "three/index.csv").read_bytes() == three
    with pytest.raises(BadInput, match="found another"):
        index.build([hospital], out=tmp_path / "three", resume=True, gates=gates)


@pytest.mark.slow
def test_workers_give_the_same_index(hospital, tmp_path):
    (tmp_path / "key").write_text("k" * 40)
    for workers in (0, 2):
        index.build([hospital], out=tmp_path / f"by{workers}", workers=workers, gates=index.Gates(key=tmp_path / "key"))
    for name in ("index.csv", "summary.json", "failures.csv", "private/sources.jsonl", "private/files.csv", "quality.html"):
        assert (tmp_path / "by0" / name).read_bytes() == (tmp_path / "by2" / name).read_bytes(), name


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_opened_and_pictures_drawn_by_the_workers_alone(hospital, tmp_path, monkeypatch, workers):
    """What stays in the gathering process is a tail that no worker shortens."""
    busy = []
    for module, name in (("volssl.archive", "is_dicom"), ("volssl.dicom", "_slice"), ("volssl.quality", "planes_png")):
        kept = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(f"{module}.{name}", lambda *args, kept=kept, name=name, **named: busy.append(name) or kept(*args, **named))
    index.build([hospital], out=tmp_path / "index", workers=workers)
    assert set(busy) == (set() if workers else {"is_dicom", "_slice", "planes_png"})
    assert "data:image/png" in (tmp_path / "index" / "quality.html").read_text()


def test_out_in_use_and_empty_archive_are_refused(hospital, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="must be new or empty"):
        index.build([hospital], out=tmp_path / "used")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="must hold scans; found no file"):
        index.build([tmp_path / "empty"], out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(BadInput, match="must hold scans; found no file"):
        index.build([tmp_path / "empty"], out=tmp_path / "index")
    shutil.copy(hospital / "cut.nii.gz", tmp_path / "empty")
    (tmp_path / "empty/notes.txt").write_text("x")
    with pytest.raises(BadInput, match="found 1 not_an_image, 1 truncated"):
        index.build([tmp_path / "empty"], out=tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("room", ["4k", "16k", "60k"])
def test_a_full_disk_is_one_clear_error_and_room_mends_it(hospital, small_disk, capsys, room):
    """While headers are gathered, while the table is written, while the page is."""
    out = small_disk(room) / "index"
    assert run_verb("index", {"archives": [hospital], "out": out}) == 2
    assert f"--out {out}: No space left on device" in capsys.readouterr().err
    assert list(out.rglob(".*")) == []
    small_disk("2m")
    assert run_verb("index", {"archives": [hospital], "out": out, "resume": True}) == 3  # one file is truncated
    assert len(index.load(out).rows) == 8


def test_an_image_whose_name_is_not_utf8_gets_a_row_or_a_failure(tmp_path, phantom):
    archive.write_nifti(tmp_path / "a/\udcff.nii", *phantom, np.int16)
    (tmp_path / "a/\udcfe.nii").write_bytes(b"123")
    assert index.build([tmp_path / "a"], out=tmp_path / "index").failed == 1
    loaded = index.load(tmp_path / "index")
    assert [row.verdict for row in loaded.rows] == ["accept"]
    assert archive.read_source(loaded.sources[loaded.rows[0].scan_id]).grid.shape_vox == phantom[1].shape_vox


def test_nan_volume_is_rejected_by_name_of_the_reason(tmp_path, phantom):
    array = phantom[0].astype(np.float32)
    array[0, 0, 0] = np.nan
    archive.write_nifti(tmp_path / "nan.nii.gz", array, phantom[1], np.float32)
    index.build([tmp_path / "nan.nii.gz"], out=tmp_path / "index")
    row = index.load(tmp_path / "index").rows[0]
    assert (row.verdict, row.reasons) == ("reject", ("not_finite",))


def noisy(low, high):
    return np.random.default_rng(0).integers(low, high, (1, 12, 12, 12))


def test_modality_can_be_given(tmp_path):
    archive.write_nifti(tmp_path / "x.nii.gz", noisy(0, 3000)[0], Grid((12, 12, 12), np.eye(4)), np.int16)
    index.build([tmp_path / "x.nii.gz"], out=tmp_path / "index", gates=index.Gates(modality="CT"))
    assert index.load(tmp_path / "index").rows[0].modality == "CT"
    with pytest.raises(BadInput, match="must be one of CT, MR, PT"):
        index.Gates(modality="Xray")


@pytest.mark.parametrize("damage", ["no_index", "no_private", "strange"])
def test_load_refuses_what_is_no_index(tmp_path, phantom, damage):
    archive.write_nifti(tmp_path / "x.nii.gz", *phantom, np.int16)
    out = tmp_path / "index"
    index.build([tmp_path / "x.nii.gz"], out=out)
    if damage == "no_index":
        (out / "index.csv").unlink()
    elif damage == "no_private":
        shutil.rmtree(out / "private")
    else:
        (out / "index.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput):
        index.load(out)


def test_real_archives_are_accepted_or_refused_with_a_reason(real_data, tmp_path):
    outcome = index.build([real_data / "chest_ct", real_data / "abdomen_ct"], out=tmp_path / "index")
    assert outcome.failed == 0
    loaded = index.load(tmp_path / "index")
    verdicts = {loaded.sources[row.scan_id].files[0].name: (row.modality, row.verdict, ";".join(row.reasons)) for row in loaded.rows}
    labels = {name for name, verdict in verdicts.items() if verdict == ("", "reject", "label_map")}
    accepted = {name for name, verdict in verdicts.items() if verdict[1] == "accept"}
    assert len(verdicts) == 15
    assert len(labels) == 7
    assert all(any(word in name for word in ("seg", "label", "nodule", "pulmonary_artery")) for name in labels)
    assert accepted | labels == set(verdicts)
    assert {name for name in accepted if verdicts[name][0] == "MR"} == {"example_mr_sm.nii.gz"}


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_series_and_its_nifti_twin_stand_on_one_side(tmp_path, phantom, modality):
    """As a converter writes it: other orientation, other type, and for MR other units."""
    _, grid = phantom
    root = tmp_path / "archive"
    tags = {"Modality": modality, "RescaleIntercept": "-1024" if modality == "CT" else "0"}
    for number in range(1, 7):
        write_series(root / f"{number}", (body_phantom(seed=number), grid), patient=f"Doe^Jane{number}", series=number, **tags)
    body = body_phantom(seed=3) + (0 if modality == "CT" else 1024)
    turned = Volume((body * np.float32(1 if modality == "CT" else 0.25))[None], grid).reoriented("PIR")
    archive.write_nifti(root / "twin.nii.gz", turned.array_CXYZ[0], turned.grid, np.float32)
    sides = set()
    for seed in range(8):
        gates = index.Gates(validation_share=0.5, thumbnails=False)
        index.build([root], out=tmp_path / f"index{seed}", seed=seed, gates=gates)
        loaded = index.load(tmp_path / f"index{seed}")
        by_name = {loaded.sources[row.scan_id].files[0].parent.name: row for row in loaded.rows}
        one, two = by_name["3"], by_name["archive"]
        assert (one.modality, one.verdict, two.modality, two.verdict) == (modality, "accept", modality, "accept")
        assert one.content_hash == two.content_hash
        assert one.patient_id != two.patient_id
        assert one.split == two.split
        assert len({row.content_hash for row in loaded.rows}) == 6
        sides.add(one.split)
    assert sides == {"train", "val"}
    assert json.loads((tmp_path / "index0/summary.json").read_text())["duplicates"] == 1


def test_a_worker_that_dies_is_told_in_words(tmp_path, phantom, monkeypatch):
    archive.write_nifti(tmp_path / "x.nii.gz", *phantom, np.int16)

    def broken(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(index, "_in_order", broken)
    with pytest.raises(BadInput, match="a worker process died"):
        index.build([tmp_path / "x.nii.gz"], out=tmp_path / "index", workers=1)


def test_settings_on_the_command_line_are_those_of_gates():
    from volssl.options import GATES, LOOK

    defaults = {one.name: one.default for one in fields(index.Gates)}
    assert {name: default for name, (_, default) in (GATES | LOOK).items()} == defaults
