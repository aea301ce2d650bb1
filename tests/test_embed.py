"""Features of scans: what the encoder gives by hand, under pseudonyms alone, the same to the bit, a bad scan named and the rest done."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from export.test_bundle import card
from test_pretrain import make_store

from volssl import embed
from volssl.__main__ import run_verb
from volssl.archive import write_nifti
from volssl.augment.intensity import zscore
from volssl.dicom_write import uid, write_dicom_series
from volssl.export import bundle
from volssl.export.bundle import load_encoder
from volssl.features import read_table
from volssl.files import BadInput, read_csv
from volssl.nets.unet import UNet
from volssl.store import Store
from volssl.volume import Grid

FP32 = {"precision": "fp32", "batch": 3}
NAMED = "Doe_Jane_1950"
PATCHES = {"scan_id", "patient_id", "split", "start_vox", "size_vox", "centre_mm", "body_share", "patches"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    net = UNet(width=4, depth=3)
    return bundle.write(tmp_path_factory.mktemp("weights") / "bundle", net.encoder, card(net, patch_vox=(16, 16, 16)))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("embed") / "store", scans=4, side=40)


def go(weights, given, out, *, overwrite=False, page=False, **settings):
    given = given if isinstance(given, list) else [given]
    return embed.run(weights, given, out=out, settings=embed.Settings(**FP32 | settings), overwrite=overwrite, page=page)


def by_hand(weights, store, scan_id, start, level=-1, size=(16, 16, 16)):
    """Read, window, z-score, encode, mean: one patch at a time, written anew."""
    encoder, _ = load_encoder(weights)
    box = Store.open(store).read_box(scan_id, start, size).astype(np.float32)
    x = torch.from_numpy(np.clip((box + 1000) / 2000, 0, 1))[None]
    x = (x - x.mean()) / x.std(correction=0).clamp(min=1e-6)
    with torch.no_grad():
        return encoder(x)[level][0].numpy()


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_patch_has_the_feature_that_the_encoder_gives_by_hand(weights, store, tmp_path, suffix):
    out = tmp_path / f"features{suffix}"
    assert go(weights, store, out, per="patch").failed == 0
    found = read_table(out)
    assert found.columns.keys() == PATCHES
    assert len(found) > 40 and found.features_ND.shape[1] == 32
    rows = list(zip(found.columns["scan_id"], found.columns["start_vox"].tolist(), found.features_ND, strict=True))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    for scan_id, start, feature in rows[:: len(rows) // 7]:
        np.testing.assert_allclose(feature, by_hand(weights, store, str(scan_id), start).mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert found.metadata["bundle_sha256"] == json.loads((weights / "card.json").read_text())["sha256"]
    assert (found.metadata["level"], found.metadata["level_stride_vox"], found.metadata["volssl_version"]) == (2, [4, 4, 4], "0.1.0")
    assert sorted(tmp_path.iterdir()) == [out]


def test_both_kinds_of_file_hold_the_same(weights, store, tmp_path):
    one, other = (tmp_path / f"f{suffix}" for suffix in (".parquet", ".npz"))
    go(weights, store, one, per="patch", patches=3)
    go(weights, store, other, per="patch", patches=3)
    first, second = read_table(one), read_table(other)
    assert first.metadata == second.metadata
    np.testing.assert_array_equal(first.features_ND, second.features_ND)
    for key in PATCHES:
        np.testing.assert_array_equal(first.columns[key], second.columns[key])
    with np.load(other) as plain:  # without volssl
        assert plain["features"].dtype == np.float32 and plain["start_vox"].shape == (12, 3)
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(one).column("features").type.list_size == 32


def test_a_volume_is_the_mean_of_its_patches(weights, store, tmp_path):
    go(weights, store, tmp_path / "p.npz", per="patch", level="0")
    go(weights, store, tmp_path / "v.npz", per="volume", level="finest")
    patches, volumes = read_table(tmp_path / "p.npz"), read_table(tmp_path / "v.npz")
    assert volumes.columns["scan_id"].tolist() == ["S0", "S1", "S2", "S3"]
    assert volumes.columns["patient_id"].tolist() == ["P0", "P1", "P2", "P3"]
    assert volumes.columns["split"].tolist() == ["val", "train", "train", "train"]
    assert volumes.features_ND.shape == (4, 8)
    for number, scan_id in enumerate(volumes.columns["scan_id"]):
        own = patches.columns["scan_id"] == scan_id
        np.testing.assert_allclose(volumes.features_ND[number], patches.features_ND[own].mean(0), rtol=1e-5)
        assert volumes.columns["patches"][number] == own.sum()
    assert (patches.columns["body_share"] >= 0.2).all()


def test_normalised_features_have_length_1_and_the_same_direction(weights, store, tmp_path):
    go(weights, store, tmp_path / "raw.npz")
    go(weights, store, tmp_path / "unit.npz", normalise=True)
    raw, unit = (read_table(tmp_path / name).features_ND for name in ("raw.npz", "unit.npz"))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(raw, axis=1, keepdims=True), raw, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_again_is_the_same_to_the_bit_and_a_seed_is_another_draw(weights, store, tmp_path, suffix):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        go(weights, store, tmp_path / f"{name}{suffix}", per="patch", patches=4, seed=seed)
    first, again, other = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "abc")
    assert first == again and first != other
    drawn = read_table(tmp_path / f"a{suffix}").columns["start_vox"]
    assert drawn.min() >= 0 and (drawn + 16).max() <= 40
    assert len(np.unique(drawn, axis=0)) == 16  # each scan and number draws for itself


def test_bf16_is_near(weights, store, tmp_path):
    """Eight bits of mantissa through six convolutions: within a few percent of the feature's length, and as a direction nearer."""
    go(weights, store, tmp_path / "a.npz")
    go(weights, store, tmp_path / "b.npz", precision="bf16")
    exact, rounded = (read_table(tmp_path / name).features_ND for name in ("a.npz", "b.npz"))
    apart = np.linalg.norm(exact - rounded, axis=1) / np.linalg.norm(exact, axis=1)
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert 0 < apart.max() < 0.03 and cosine.min() > 0.999
    assert read_table(tmp_path / "b.npz").metadata["precision"] == "bf16"


# ------------------------------------------------------------------------------------------------ where


def marked(size=(40, 36, 32)):
    """HU with soft tissue, and a bright block near the patient's one side: at high X, low Y, high Z."""
    hu = np.full(size, 40, np.int16)
    hu[34:38, 2:6, 26:30] = 900
    return hu


def lps(hu, grid):
    """The same scan stored with X and Y reversed."""
    return hu[::-1, ::-1].copy(), Grid(hu.shape, grid.affine @ np.array([[-1, 0, 0, 39], [0, -1, 0, 35], [0, 0, 1, 0], [0, 0, 0, 1.0]]))


@pytest.mark.parametrize("turned", [False, True])
def test_left_and_right_patches_lie_where_they_lie_in_the_patient(weights, tmp_path, turned):
    """Patches with the bright block are told by feature, by voxels and by their place in the world, whatever the file's order."""
    grid = Grid((40, 36, 32), np.array([[1, 0, 0, -70], [0, 1, 0, 12], [0, 0, 1, 200], [0, 0, 0, 1.0]]))
    hu = marked()
    array, of_file = lps(hu, grid) if turned else (hu, grid)
    write_nifti(tmp_path / f"{NAMED}.nii.gz", array, of_file, np.int16)
    hu[34:38, 2:6, 26:30] = 40
    write_nifti(tmp_path / "plain.nii.gz", hu, grid, np.int16)
    assert go(weights, [tmp_path / f"{NAMED}.nii.gz", tmp_path / "plain.nii.gz"], tmp_path / "f.npz", per="patch").failed == 0
    found = read_table(tmp_path / "f.npz")
    first = found.columns["scan_id"] == found.columns["scan_id"][0]
    differs = np.abs(found.features_ND[first] - found.features_ND[~first]).max(1) > 1e-3
    starts = found.columns["start_vox"][first]
    for start, differ, centre in zip(starts, differs, found.columns["centre_mm"][first], strict=True):
        holds = all(a < stop and a + 16 > begin for a, begin, stop in zip(start, (34, 2, 26), (38, 6, 30), strict=True))
        assert differ == holds
        np.testing.assert_allclose(centre, start + 7.5 + [-70, 12, 200], atol=1e-3)
    assert differs.any() and not differs.all()
    assert (found.columns["centre_mm"][first][differs][:, 0] > -50).all()  # world X of the block: -36 to -32


# ------------------------------------------------------------------------------------------------ dense


def test_a_dense_map_of_one_window_is_the_encoder_s(weights, tmp_path):
    small = make_store(tmp_path / "small", scans=2, side=16)
    go(weights, small, tmp_path / "dense", per="dense")
    with np.load(tmp_path / "dense" / "S1.npz") as found:
        np.testing.assert_allclose(found["features"], by_hand(weights, small, "S1", (0, 0, 0)), rtol=1e-4, atol=1e-5)
        assert found["features"].shape == (32, 4, 4, 4)
        assert (str(found["scan_id"]), str(found["patient_id"])) == ("S1", "P1")
        np.testing.assert_array_equal(found["affine"], [[4, 0, 0, 1.5], [0, 4, 0, 1.5], [0, 0, 4, 1.5], [0, 0, 0, 1]])
        told = json.loads(str(found["volssl"]))
    assert told == json.loads((tmp_path / "dense" / "features.json").read_text()) and told["per"] == "dense"


def test_a_dense_map_of_many_windows_is_their_weighted_mean(weights, store, tmp_path):
    """Written anew, place by place, for one scan of 40 voxels: windows at 0, 8, 16 and 24."""
    go(weights, store, tmp_path / "dense", per="dense", level="1")
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == [
        *("S0.npz", "S1.npz", "S2.npz", "S3.npz"),
        "failures.csv",
        "features.json",
    ]
    along = np.exp(-0.5 * ((np.arange(8) - 3.5) / 1.0) ** 2)
    weight = np.maximum(along[:, None, None] * along[:, None] * along, max((along[0] ** 3), 1e-3))
    total, weights_sum = np.zeros((16, 20, 20, 20)), np.zeros((20, 20, 20))
    for corner in np.ndindex(4, 4, 4):
        x, y, z = (slice(4 * n, 4 * n + 8) for n in corner)
        total[:, x, y, z] += by_hand(weights, store, "S2", 8 * np.array(corner), level=1) * weight
        weights_sum[x, y, z] += weight
    with np.load(tmp_path / "dense" / "S2.npz") as found:
        np.testing.assert_allclose(found["features"], total / weights_sum, rtol=1e-3, atol=1e-4)
    go(weights, store, tmp_path / "unit", per="dense", level="1", normalise=True)
    with np.load(tmp_path / "unit" / "S2.npz") as found:
        np.testing.assert_allclose(np.linalg.norm(found["features"], axis=0), 1, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ files


def test_an_image_gives_what_the_store_of_it_gives(weights, store, tmp_path):
    """1 mm CT as int16: preparing it as the card says is reading it; patches by the same rule, but for the body's box."""
    voxels = Store.open(store).read_box("S1", (0, 0, 0), (40, 40, 40))[0]
    write_nifti(tmp_path / f"{NAMED}.nii.gz", voxels, Grid((40, 40, 40), np.eye(4)), np.int16)
    go(weights, tmp_path / f"{NAMED}.nii.gz", tmp_path / "f.npz", per="patch")
    go(weights, store, tmp_path / "s.npz", per="patch")
    of_file, of_store = read_table(tmp_path / "f.npz"), read_table(tmp_path / "s.npz")
    for start, feature in zip(of_file.columns["start_vox"].tolist(), of_file.features_ND, strict=True):
        np.testing.assert_allclose(feature, by_hand(weights, store, "S1", start).mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    assert of_file.metadata["source"] == "files" and of_store.metadata["source"] == "store"


def write_series(folder, seed):
    hu = (np.random.default_rng(seed).normal(0, 30, (24, 24, 20)) + 40).astype(np.int16)
    tags = {"PatientID": NAMED, "StudyInstanceUID": uid("s"), "SeriesInstanceUID": uid(str(seed)), "FrameOfReferenceUID": uid("f")}
    write_dicom_series(folder, hu, Grid((24, 24, 20), np.diag([1.0, 1, 1, 1])), tags=tags)


def test_files_bear_numbers_and_a_bad_one_is_named(weights, tmp_path, capsys):
    given = tmp_path / f"in_{NAMED}"
    write_series(given / NAMED, 1)
    write_series(given / f"{NAMED}_gap", 2)
    (given / f"{NAMED}_gap" / "IM00008.dcm").unlink()
    for place in ("a", "b"):  # two of one name
        (given / place).mkdir()
        write_nifti(given / place / f"{NAMED}.nii.gz", marked(), Grid((40, 36, 32), np.eye(4)), np.int16)
    (given / f"{NAMED}_broken.nii.gz").write_bytes(b"\x1f\x8bnothing")
    write_nifti(given / f"{NAMED}_air.nii.gz", np.full((20, 20, 20), -1000, np.int16), Grid((20, 20, 20), np.eye(4)), np.int16)
    out = tmp_path / "out" / "f.parquet"
    options = {"bundle": weights, "inputs": [given], "out": out, "per": "patch", "patches": 2}
    assert run_verb("embed", options) == 3
    said = capsys.readouterr()
    found = read_table(out)
    names = list(dict.fromkeys(found.columns["scan_id"].tolist()))
    assert len(names) == 3 and len(found) == 6
    assert [name.split("_")[0] for name in names] == sorted(name.split("_")[0] for name in names)
    assert len({name.split("_")[1] for name in names}) == 2  # the copy has the same hash
    assert set(found.columns["patient_id"]) == {""} and "name" not in found.columns
    failed = read_csv(out.parent / "failures.csv")
    assert len(failed) == 3 and all(row["input"].split()[0] in ("input", "unreadable") for row in failed)
    assert {"missing_slice", "no_body"} <= {row["reason"].partition(":")[0] for row in failed}
    for text in (out.read_bytes(), (out.parent / "failures.csv").read_bytes(), said.out.encode(), said.err.encode()):
        assert NAMED.encode() not in text
    assert run_verb("embed", options | {"names": True, "overwrite": True}) == 3
    assert {NAMED, "DICOM series 1"} == set(read_table(out).columns["name"].tolist())


def test_a_damaged_volume_is_named_and_the_rest_is_done(weights, tmp_path):
    path = make_store(tmp_path / "store", scans=3)
    volume = path / "volumes" / "S1.b2nd"
    volume.write_bytes(volume.read_bytes()[:2000])
    outcome = go(weights, path, tmp_path / "out" / "f.npz")
    assert outcome.failed == 1
    (row,) = read_csv(tmp_path / "out" / "failures.csv")
    assert row["input"] == "S1" and "the store" in row["reason"] and str(tmp_path) not in row["reason"]
    assert read_table(tmp_path / "out" / "f.npz").columns["scan_id"].tolist() == ["S0", "S2"]
    for file in (path / "volumes").iterdir():
        file.write_bytes(b"nothing")
    for out, settings in ((tmp_path / "none" / "f.npz", {}), (tmp_path / "none2", {"per": "dense"})):
        with pytest.raises(BadInput, match="none of 3 could be embedded"):
            go(weights, path, out, **settings)
        assert not out.exists()
    assert {one.name for one in tmp_path.iterdir()} == {"store", "out", "none"} and list((tmp_path / "none").iterdir()) == []


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"spacing_mm": (2.0, 2.0, 2.0)}, r"spacing_mm must be \[2.0, 2.0, 2.0\]; found \[1.0, 1.0, 1.0\]"),
        ({"intensity": {"modality": "MR", "clip": [0, 9], "window": [0, 5], "normalisation": "none"}}, "(?s)modality must be MR.*window"),
        ({"in_channels": 1, "orientation": "LPS"}, "orientation must be LPS; found RAS"),
    ],
)
def test_a_store_of_other_voxels_is_refused(store, tmp_path, changes, part):
    net = UNet(width=4, depth=3)
    other = bundle.write(tmp_path / "bundle", net.encoder, card(net, patch_vox=(16, 16, 16), **changes))
    with pytest.raises(BadInput, match=part):
        go(other, store, tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()


def test_what_cannot_be_is_one_error_and_leaves_nothing(weights, store, tmp_path):
    wrong = [
        (tmp_path / "f.csv", {}, "must end in .parquet or .npz; found .csv"),
        (tmp_path / "f", {}, "found no suffix; for a folder set --per dense"),
        (tmp_path / "f.npz", {"per": "dense"}, "must be a folder with --per dense"),
        (tmp_path / "f.npz", {"level": "deep"}, "--level must be coarsest, finest or a number from 0"),
        (tmp_path / "f.npz", {"level": "3"}, r"\(the finest\) to 2; found '3'"),
        (tmp_path / "f.npz", {"patch": (18, 16, 16)}, "--patch 18,16,16: every side must be a multiple"),
        (tmp_path / "f.npz", {"names": True}, "--names: is for image files"),
        (store / "f.npz", {}, "must lie outside of the store"),
    ]
    for out, settings, part in wrong:
        with pytest.raises(BadInput, match=part):
            go(weights, store, out, **settings)
    with pytest.raises(BadInput, match="(?s)--per must be.*--precision must be"):
        embed.Settings(per="slice", precision="fp8")
    with pytest.raises(BadInput, match="a store must be given alone"):
        go(weights, [store, tmp_path], tmp_path / "f.npz")
    with pytest.raises(BadInput, match="--page: needs a store"):
        go(weights, tmp_path, tmp_path / "f.npz", page=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_unless_overwritten(weights, store, tmp_path):
    out = tmp_path / "f.npz"
    out.write_bytes(b"mine")
    with pytest.raises(BadInput, match="--overwrite"):
        go(weights, store, out)
    assert out.read_bytes() == b"mine"
    go(weights, store, out, overwrite=True)
    assert len(read_table(out)) == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "failures.csv").write_text("of something else")
    with pytest.raises(BadInput, match="failures.csv beside it must be new"):
        go(weights, store, tmp_path / "other" / "f.npz")


def test_a_store_is_embedded_without_the_libraries_of_archives(weights, store, tmp_path):
    code = (
        "import sys; from pathlib import Path; from volssl import embed; "
        f"embed.run(Path({str(weights)!r}), [Path({str(store)!r})], out=Path({str(tmp_path / 'f.npz')!r})); "
        "bad = {'nibabel', 'SimpleITK', 'pydicom', 'monai', 'torchio', 'torchvision', 'scipy', 'pyarrow'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


def test_zscore_by_hand_is_the_house_s():
    """Else `by_hand` above would compare with something else."""
    x = torch.rand(1, 1, 4, 4, 4)
    torch.testing.assert_close(zscore(x), (x - x.mean()) / x.std(correction=0))
