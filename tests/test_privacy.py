"""No string of a patient gets out of INDEX/private: planted in every text tag, name and header, searched for in every byte that is left.

What a user calls his labelled cases is the user's own: these names appear in the runs by contract (RUN/validation/<case>.nii.gz), and
nowhere else.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import blosc2
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import body_phantom, oblique_grid
from labelled import write_recipe
from planting import MARK, UID, needles, plant_dicom, search, word
from pydicom.uid import RLELossless
from test_index import write_series
from test_pretrain import TINY

from volssl.export import FORMATS
from volssl.files import BadInput
from volssl.pools import Means, spread
from volssl.pseudonyms import claim_key, pseudonym

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CASE = "QPWUYR"  # in the names of labelled cases and of images to predict
PLACE = "VKOTHM"  # in the names of the folders that the user gives on the command line
# Several command lines, one after the other in one process, since the libraries take long to import.
LOUD = """
import json, logging, sys, warnings
logging.basicConfig(level=0)
warnings.simplefilter("always")
from volssl.__main__ import main
if __name__ == "__main__":
    for arguments, code in json.loads(sys.argv.pop()):
        sys.argv[1:] = arguments
        try:
            main()
        except SystemExit as ended:
            assert ended.code == code, (arguments[0], ended.code)
"""
# A Dask cluster beside it, which logs all that it can; it ends when its input closes.
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    settings = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None, silence_logs=False)
    with LocalCluster(**settings, local_directory=sys.argv[1]) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
SHAPE, SPACING = (44, 40, 36), (1.0, 1.0, 1.0)


def volssl(place, *calls):
    """Run command lines, each with the exit code that it must have, with all loggers and warnings on; keep what they say."""
    lines = [([str(argument) for argument in call[:-1]], call[-1]) for call in calls]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BLOSC_NTHREADS": "1"}
    (place / "loud.py").write_text(LOUD)
    command = [sys.executable, place / "loud.py", json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    (place / "loud.py").unlink()
    with open(place / "said.txt", "a") as said:
        said.write(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@contextmanager
def dask_cluster(place):
    """The address of a cluster in processes of its own. Left: what it says in cluster.txt, what it writes in the folder cluster."""
    scratch = place / "cluster"
    (scratch / "tmp").mkdir(parents=True)
    environment = os.environ | {"DASK_LOGGING__DISTRIBUTED": "debug", "TMPDIR": str(scratch / "tmp"), "BLOSC_NTHREADS": "1"}
    command = [sys.executable, place / "cluster.py", scratch]
    (place / "cluster.py").write_text(CLUSTER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with open(place / "cluster.txt", "w") as said:
        running = subprocess.Popen(command, stderr=said, env=environment, **pipes)
        assert running.stdout
        yield running.stdout.readline().strip()
        # At the end the workers sweep: what they left so far is kept.
        shutil.copytree(scratch, place / "cluster_at_work", ignore=shutil.ignore_patterns("*.lock", "*.sock"), dirs_exist_ok=True)
        rest, _ = running.communicate(timeout=60)
        said.write(rest)
    (place / "cluster.py").unlink()
    assert running.returncode == 0


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """An archive in which everything that can hold text does."""
    root = tmp_path_factory.mktemp("hospital") / f"{PLACE}_archive"
    grid = oblique_grid(SHAPE, SPACING)
    for patient in range(5):
        folder = root / f"{MARK}^Patient{patient}" / f"{MARK} study"
        write_series(folder, (body_phantom(SHAPE, patient), grid), patient=f"p{patient}", series=patient)
        for number, path in enumerate(sorted(folder.iterdir())):
            assert plant_dicom(path, patient) > 800
            if patient in (1, 2):  # their pixels go through the decoders of other libraries, which like to talk
                data = pydicom.dcmread(path)
                data.compress(RLELossless, generate_instance_uid=False)
                data.save_as(path, enforce_file_format=True)
            path.rename(folder / f"{MARK}_{patient}_{number}")
    plant_faults(root, grid)
    return root


def plant_faults(root, grid):
    """Broken and odd files, each with a planted name and planted text."""
    whole = sorted((root / f"{MARK}^Patient0" / f"{MARK} study").iterdir())
    odd = root / f"{MARK}_odd"
    gap = odd / f"{MARK}_gap"
    gap.mkdir(parents=True)
    for number, path in enumerate(whole):
        if number != 9:
            (gap / f"{MARK}{number}.dcm").write_bytes(path.read_bytes().replace(f"{UID}.2.0".encode(), f"{UID}.2.7".encode()))
    (odd / f"{MARK}_cut.dcm").write_bytes(whole[0].read_bytes()[:-900].replace(f"{UID}.2.0".encode(), f"{UID}.2.8".encode()))
    (odd / f"{MARK}_head.dcm").write_bytes(whole[0].read_bytes()[:3000])
    (odd / f"{MARK}_noise.dcm").write_bytes(bytes(128) + b"DICM" + MARK.encode() * 200)
    (odd / f"{MARK}_noise.nii.gz").write_bytes(b"\x1f\x8b" + MARK.encode() * 50)
    (odd / f"{MARK}_empty.nii").touch()
    (odd / f"{MARK}.txt").write_text(MARK)
    with zipfile.ZipFile(odd / f"{MARK}.zip", "w") as packed:
        packed.write(whole[0], f"{MARK}/{MARK}.dcm")
    locked = odd / f"{MARK}_locked.dcm"
    locked.write_bytes(whole[1].read_bytes())
    locked.chmod(0)
    (odd / f"{MARK}_loop").symlink_to(odd)
    image = odd / f"{MARK}_good.nii.gz"
    write_planted_nifti(image, body_phantom(SHAPE, 9), grid)
    (odd / f"{MARK}_cut.nii.gz").write_bytes(image.read_bytes()[:4000])
    for suffix in (".mha", ".nrrd"):
        write_planted_itk(odd / f"{MARK}_other{suffix}", body_phantom(SHAPE, 10 + len(suffix)))


def write_planted_nifti(path, array, grid):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, grid.affine)
    for number, name in enumerate(("descrip", "aux_file", "db_name", "intent_name")):
        image.header[name] = word(94_000 + number)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", f"comment {word(94_010)}".encode()))
    image.set_qform(grid.affine, 1)
    image.set_sform(grid.affine, 1)
    nibabel.save(image, path)


def write_planted_itk(path, array):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetMetaData("Comment", word(94_020))
    image.SetMetaData("PatientName", word(94_021))
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def left(hospital, tmp_path_factory):
    """Everything that the pipeline leaves from this archive and from a labelled folder."""
    place = tmp_path_factory.mktemp("left")
    labelled = write_labelled(tmp_path_factory.mktemp("labels") / f"{PLACE}_labels")
    recipe = write_recipe(labelled / "tiny.yaml")
    # A net that every format takes, exported by the run itself and by the verb.
    overrides = [
        *(one for one in TINY if not one.startswith("net.")),
        "training.steps=2",
        "saving.pictures_every=2",
        "saving.validate_every=2",
    ]
    overrides += ["net={name: resenc, features: [4, 6, 8], blocks: [1, 1, 1], norm: instance}", "export=nnunet"]
    pretrained, tuned = place / "pretrained", place / "tuned"
    volssl(
        place,
        ("index", hospital, "--out", place / "index", "--vendors", 3),
        ("index", hospital, "--out", place / "again", "--workers", "1", 3),
    )
    spoil_after_index(hospital)
    volssl(
        place,
        ("prepare", place / "index", "--out", place / "store", "--workers", "1", "body.margin_mm=0", 3),
        ("prepare", place / "index", "--out", place / "store_alone", "body.margin_mm=0", 3),
    )
    if importlib.util.find_spec("distributed"):
        with dask_cluster(place) as address:
            volssl(
                place,
                ("prepare", place / "index", "--out", place / "store_dask", "--scheduler", address, "body.margin_mm=0", 3),
                # No scan is ready so soon: every job is lost.
                ("prepare", place / "index", "--out", place / "store_late", "--scheduler", address, "--minutes", "0.0001", 2),
            )
    volssl(
        place,
        ("pretrain", "--recipe", "pcrlv2", "--store", place / "store", "--out", pretrained, *overrides, 0),
        *(("export", pretrained, "--to", kind, "--out", place / "exported" / kind, 0) for kind in FORMATS),
        ("embed", pretrained, place / "store", "--out", place / "embedded.parquet", "--per", "patch", "--patches", "2", "--page", 0),
        ("embed", pretrained, labelled / "imagesTr", "--out", place / "images.npz", 0),
        ("embed", pretrained, hospital, "--out", place / "of_files" / "maps", "--per", "dense", 3),
        ("finetune", "--recipe", recipe, "--data", labelled, "--out", tuned, "optimisation.steps=2", 0),
        ("predict", tuned, labelled / "imagesTr" / f"{CASE}_0.nii.gz", "--out", place / "predicted", 0),
        ("evaluate", place / "predicted", labelled / "labelsTr", "--recipe", recipe, "--out", place / "scores", 3),
        ("report", pretrained, tuned, "--out", place / "report.html", 0),
    )
    return place


def spoil_after_index(hospital):
    """What was sound when it was listed is not so any more: a file cut short, another gone, two slices of noise."""
    image = hospital / f"{MARK}_odd" / f"{MARK}_good.nii.gz"
    image.write_bytes(image.read_bytes()[:3000])
    study = hospital / f"{MARK}^Patient3" / f"{MARK} study"
    sorted(study.iterdir())[7].unlink()
    packed = sorted((hospital / f"{MARK}^Patient1" / f"{MARK} study").iterdir())[7]
    packed.write_bytes(packed.read_bytes()[:-900] + MARK.encode() * 150)
    noisy = sorted((hospital / f"{MARK}^Patient4" / f"{MARK} study").iterdir())[7]
    noisy.write_bytes(noisy.read_bytes()[:200] + MARK.encode() * 500)


def write_labelled(root):
    grid = oblique_grid((20, 18, 16), SPACING)
    pairs = []
    for case in range(4):
        rng = np.random.default_rng(case)
        label = np.zeros(grid.shape_vox, np.uint8)
        label[4:9, 4:9, 4:9], label[11:16, 10:15, 9:14] = 1, 2
        image = (rng.normal(0, 30, grid.shape_vox) + np.choose(label, (0, 400, -400))).astype(np.int16)
        name = f"{CASE}_{case}.nii.gz"
        write_planted_nifti(root / "imagesTr" / name, image, grid)
        write_planted_nifti(root / "labelsTr" / name, label, grid)
        pairs.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    labels = {"0": "background", "1": "bright", "2": "dark"}
    about = {"name": word(95_000), "description": word(95_001), "reference": word(95_002), "modality": {"0": "CT"}}
    (root / "dataset.json").write_text(json.dumps(about | {"labels": labels, "training": pairs}))
    return root


def test_the_archive_was_used(left):
    """Otherwise there would be nothing to find."""
    rows = (left / "index" / "index.csv").read_text()
    assert rows.count(",accept,") >= 6 and "missing_slice" in rows
    assert len(list((left / "store" / "volumes").iterdir())) >= 3
    assert (left / "store" / "failures.csv").read_text().count("\n") == 5  # a title, and what was spoilt after the index
    assert MARK in (left / "index" / "private" / "files.csv").read_text()
    assert list((left / "pretrained").rglob("events.out*")) and list((left / "pretrained" / "pictures").iterdir())


def test_a_cluster_was_used(left):
    """It prepared the same store, lost jobs, and said what it did."""
    pytest.importorskip("distributed")
    for path in sorted((left / "store").rglob("*")):
        assert path.is_dir() or path.read_bytes() == (left / "store_dask" / path.relative_to(left / "store")).read_bytes(), path
    assert {line.partition(",")[2] for line in (left / "store_late" / "failures.csv").read_text().splitlines()[1:]} == {"timeout"}
    said = (left / "cluster.txt").read_text()
    assert said.count("DEBUG") > 100 and "Compute Failed" not in said  # it tells what it was to compute
    assert list((left / "cluster_at_work").rglob("worker-*"))


def test_every_format_was_exported(left):
    assert {path.name for path in (left / "exported").iterdir()} == set(FORMATS)
    assert (left / "exported" / "nnunet" / "checkpoint.pth").stat().st_size > 10_000
    assert (left / "pretrained" / "nnunet" / "checkpoint.pth").exists()


def test_no_planted_string_gets_out(left):
    assert search(left, needles(), leave_out=("private",)) == []


def test_no_folder_that_the_user_gave_is_written_down(left):
    """On the screen it may be named, since the user named it."""
    finds = search(left, [PLACE.lower().encode()], leave_out=("private",))
    assert [find for find in finds if not find.startswith("said.txt")] == []


def test_names_of_labelled_cases_stay_where_the_contract_puts_them(left):
    finds = search(left, [CASE.lower().encode()], leave_out=("private",))
    places = {find.removeprefix("name of ").partition(":")[0].partition(" > ")[0].partition("/")[0] for find in finds}
    assert places <= {"tuned", "predicted", "scores", "report.html", "said.txt"}
    tuned = {find.partition(":")[0].partition(" > ")[0] for find in finds if find.startswith("tuned/")}
    assert {one for one in tuned if not one.startswith("tuned/validation/")} <= {"tuned/splits.json", "tuned/failures.csv"}


def test_no_plain_hash_of_an_identity_stands_for_it(left):
    """Without a key, a hash is undone by hashing all names: none of the usual ones of any identity is found."""
    plain = [f"{MARK}-PAT-{patient}" for patient in range(5)] + [f"{UID}.{kind}.{patient}" for kind in (1, 2) for patient in range(5)]
    hashes = [getattr(hashlib, kind)(text.encode()).hexdigest()[:12].encode() for text in plain for kind in ("md5", "sha1", "sha256")]
    assert search(left, hashes, leave_out=("private",)) == []


def test_every_run_of_the_index_has_a_key_of_its_own(left):
    tables = [(left / name / "index.csv").read_text().splitlines()[1:] for name in ("index", "again")]
    names = [{line.split(",")[0] for line in table} for table in tables]
    assert len(names[0]) == len(names[1]) and not names[0] & names[1]


def test_the_private_part_is_closed(left):
    for path in (left / "index" / "private").iterdir():
        assert path.stat().st_mode & 0o077 == 0
    assert (left / "index" / "private").stat().st_mode & 0o777 == 0o700


def test_failures_of_predict_name_no_file_of_a_folder_but_images(hospital, left, tmp_path):
    """Names of images are the user's own; those of DICOM files and folders are not."""
    folder = tmp_path / "in"
    (folder / f"{MARK} study").mkdir(parents=True)
    for path in sorted((hospital / f"{MARK}_odd").glob("*.dcm")):
        if os.access(path, os.R_OK):
            (folder / f"{MARK} study" / path.name).write_bytes(path.read_bytes())
    (folder / f"a {MARK} b").mkdir()
    (folder / f"a {MARK} b" / f"{CASE}_broken.nii.gz").write_bytes(b"\x1f\x8bnothing")
    write_planted_nifti(folder / f"a {MARK} b" / f"{CASE}.nii.gz", body_phantom(), oblique_grid())
    volssl(tmp_path, ("predict", left / "tuned", folder, "--out", tmp_path / "out", 3))
    assert search(tmp_path / "out", needles()) == []
    assert MARK not in (tmp_path / "said.txt").read_text()


def test_a_refusal_names_only_what_the_user_named(hospital, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in (f"{MARK}_noise.nii.gz", f"{MARK}_empty.nii"):
        (bad / name).write_bytes((hospital / f"{MARK}_odd" / name).read_bytes())
    volssl(
        tmp_path,
        ("index", bad, "--out", tmp_path / "index", 2),
        ("prepare", bad, "--out", tmp_path / "store", 2),
        ("pretrain", "--recipe", "pcrlv2", "--store", bad, "--out", tmp_path / "run", 2),
        ("finetune", "--recipe", "segment", "--data", bad, "--out", tmp_path / "run", 2),
    )
    assert MARK not in (tmp_path / "said.txt").read_text()
    for folder in ("index", "store", "run"):
        assert search(tmp_path / folder, needles(), leave_out=("private",)) == []


# ------------------------------------------------------------------------------------------------ the search, searched


def test_the_search_finds_what_is_packed(tmp_path):
    """Each way in which a string could hide, tried alone."""
    secret = f"of {MARK}77".encode()
    png = __import__("matplotlib.image").image
    places = {
        "name": lambda path: path.with_name(f"{MARK}.txt").write_text("nothing"),
        "gzip": lambda path: path.write_bytes(gzip.compress(secret)),
        "zip": lambda path: zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED).writestr("a", secret * 9),
        "base64": lambda path: path.write_bytes(b"data:image/png;base64," + __import__("base64").b64encode(bytes(50) + secret + bytes(50))),
        "json": lambda path: path.write_text(json.dumps({"a": secret.decode()})),
        "utf-16": lambda path: path.write_bytes(secret.decode().encode("utf-16-le")),
        "png": lambda path: png.imsave(path, np.zeros((4, 4)), format="png", metadata={"Comment": secret.decode() * 20}),
        "date": lambda path: path.write_text("seen 1927-06-13"),
    }
    for number, (kind, write) in enumerate(places.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder / "file")
        assert search(folder, needles()), kind
    (tmp_path / "store").mkdir()
    array = blosc2.asarray(np.zeros((4, 4), np.int16))
    array.schunk.vlmeta["entry"] = secret.decode() * 50
    (tmp_path / "store" / "file").write_bytes(array.to_cframe())
    assert search(tmp_path / "store", needles())


def test_the_search_hears_what_a_cluster_says_and_that_is_no_failed_job(tmp_path):
    pytest.importorskip("distributed")
    with dask_cluster(tmp_path) as address:
        with pytest.raises(ValueError, match=MARK):
            list(spread(int, [("a", (MARK,))], Means(scheduler=address)))
        assert search(tmp_path, needles()) == []
        list(spread(print, [("a", (MARK,))], Means(scheduler=address)))
    assert [find.partition(":")[0] for find in search(tmp_path, needles())] == ["cluster.txt"]


def test_a_page_of_nothing_is_clean(tmp_path):
    (tmp_path / "a.txt").write_text("nothing")
    assert search(tmp_path, needles()) == []


# ------------------------------------------------------------------------------------------------ pseudonyms


def test_a_pseudonym_is_an_hmac_of_the_identity(tmp_path):
    import hmac

    key = claim_key(tmp_path, None)
    told = hmac.new(key, b"S\0a\0b", "sha256").hexdigest()[:16]
    assert pseudonym(key, "S", "a", "b") == "S" + told
    assert pseudonym(key, "S", "ab", "") != pseudonym(key, "S", "a", "b")
    assert pseudonym(b"x" * 64, "S", "a", "b") != "S" + told


def test_a_key_is_made_once_kept_closed_and_not_exchanged(tmp_path):
    key = claim_key(tmp_path, None)
    assert len(key) == 64 and claim_key(tmp_path, None) == key
    assert (tmp_path / "private" / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").write_text("y" * 40)
    with pytest.raises(BadInput, match="must be the key of the index"):
        claim_key(tmp_path, tmp_path / "other")
    (tmp_path / "short").write_text("y" * 31)
    with pytest.raises(BadInput, match="at least 32 characters; found 31"):
        claim_key(tmp_path / "new", tmp_path / "short") if (tmp_path / "new").mkdir() is None else None
