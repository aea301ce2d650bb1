"""Boxes inside, across and outside of the border; entries come back; damage and other versions are refused."""

import json
import os
import pickle
from dataclasses import replace

import blosc2
import numpy as np
import pytest
from scipy import ndimage

from volssl.files import BadInput
from volssl.store import PACKINGS, About, Entry, Store, _differences, _is_cached, _sum, read_about

ABOUT = About(
    spacing_mm=(1.0, 1.0, 2.5), modality="CT", window=(-1000.0, 1000.0), clip=(-1024.0, 3071.0), recipe={"spacing_mm": [1, 1, 2.5]}
)


def entry(scan_id, shape, **other) -> Entry:
    values = {
        "scan_id": scan_id, "patient_id": "P1", "modality": "CT", "split": "train", "channels": 1, "shape_vox": shape,
        "body_start": (1, 2, 3), "body_stop": shape, "affine": tuple(np.diag([1, 1, 2.5, 1]).ravel().tolist()),
        "original_shape": (9, 9, 9), "original_affine": tuple((np.eye(4) / 3).ravel().tolist()), "scaling": (1.0, 0.0), "content_hash": "c",
    }  # fmt: skip
    return Entry(**values | other)


@pytest.fixture
def filled(tmp_path):
    store = Store.create(tmp_path / "store", ABOUT)
    array = np.random.default_rng(0).integers(-1000, 1000, (2, 70, 40, 33), dtype=np.int16)
    one = entry("S1", (70, 40, 33), channels=2)
    store.write(array, one)
    store.finish([one])
    return tmp_path / "store", array, one


def test_entries_come_back_exactly(filled):
    path, _, one = filled
    store = Store.open(path)
    assert store.rows == [one]
    assert store.entry("S1") == one
    assert store.entry("S2") is None
    assert store.about == ABOUT
    assert (store.spacing_mm, store.window) == ((1.0, 1.0, 2.5), (-1000.0, 1000.0))


@pytest.mark.parametrize("start", [(0, 0, 0), (60, 10, 5), (-7, 30, 20), (-40, 0, 0), (90, 90, 90)])
def test_boxes_inside_across_and_outside(filled, start):
    path, array, _ = filled
    padded = np.pad(array, [(0, 0)] + [(100, 100)] * 3, constant_values=-1000)
    want = padded[(slice(None), *(slice(s + 100, s + 100 + w) for s, w in zip(start, (16, 10, 12), strict=True)))]
    got = Store.open(path).read_box("S1", start, (16, 10, 12))
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, want)


def test_store_pickles_after_use(filled):
    store = Store.open(filled[0])
    before = store.read_box("S1", (0, 0, 0), (8, 8, 8))
    again = pickle.loads(pickle.dumps(store))
    assert not again._open
    np.testing.assert_array_equal(again.read_box("S1", (0, 0, 0), (8, 8, 8)), before)


def test_same_voxels_same_bytes(filled, tmp_path):
    path, array, one = filled
    other = Store.create(tmp_path / "other", ABOUT)
    other.write(np.asfortranarray(array), one)
    assert (path / "volumes/S1.b2nd").read_bytes() == (tmp_path / "other/volumes/S1.b2nd").read_bytes()


@pytest.mark.parametrize("threads", [None, "2"])
def test_number_of_threads_leaves_no_trace(filled, tmp_path, monkeypatch, threads):
    path, array, one = filled
    monkeypatch.delenv("BLOSC_NTHREADS", raising=False)
    if threads:
        monkeypatch.setenv("BLOSC_NTHREADS", threads)
    Store.create(tmp_path / "other", ABOUT).write(array, one)
    assert (path / "volumes/S1.b2nd").read_bytes() == (tmp_path / "other/volumes/S1.b2nd").read_bytes()
    assert os.environ.get("BLOSC_NTHREADS") == threads


def test_small_packing_gives_the_same_voxels_from_fewer_bytes(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.integers(-2, 3, (1, 64, 64, 96)), axis=3).astype(np.int16)
    sizes = {}
    for packing in PACKINGS:
        store = Store.create(tmp_path / packing, replace(ABOUT, packing=packing))
        store.write(smooth, entry("S1", smooth.shape[1:]))
        sizes[packing] = store.volume_path("S1").stat().st_size
        np.testing.assert_array_equal(store.read_box("S1", (0, 0, 0), smooth.shape[1:]), smooth)
    assert sizes["small"] < 0.9 * sizes["fast"]


def test_another_version_is_refused(filled):
    path = filled[0]
    values = json.loads((path / "store.json").read_text()) | {"version": 99}
    (path / "store.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match=r"version 2 or 3; found 99"):
        Store.open(path)


def test_a_store_of_the_version_before_is_read_but_not_resumed(filled):
    path, array, one = filled
    (path / "volumes/S1.b2nd").unlink()
    packing = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE]}
    old = blosc2.asarray(array, urlpath=str(path / "volumes/S1.b2nd"), chunks=(1, 64, 64, 64), blocks=(1, 32, 32, 32), cparams=packing)
    old.schunk.vlmeta["entry"] = json.dumps(one.row())
    (path / "store.json").write_text(json.dumps(json.loads((path / "store.json").read_text()) | {"version": 2}))
    store = Store.open(path)
    assert store.entry("S1") == one
    np.testing.assert_array_equal(store.read_box("S1", (37, 3, 5), (30, 30, 20)), array[:, 37:67, 3:33, 5:25])
    with pytest.raises(BadInput, match="version 3 to be resumed; found 2"):
        Store.create(path, ABOUT)


def test_differences_by_hand_and_back():
    line = np.array([5, 3, 3, 6, -1, 0], np.int16).reshape(1, 6, 1, 1)
    # Every fourth value stays; -2 and the -1 that stays have their bits but the sign flipped: -2 is 0xFFFE, 0x8001 is -32767.
    assert _differences(line, 4).ravel().tolist() == [5, -32767, 0, 3, -32768, 1]
    extremes = np.array([0, -32768, 32767, -32768, -1, 32767], np.int16).reshape(1, 6, 1, 1)
    for values in (line, extremes):
        made = _differences(values, 4)
        _sum(made, 4)
        np.testing.assert_array_equal(made, values)


def test_boxes_anywhere_hold_the_voxels_of_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(-32768, 32768, (2, 75, 40, 33), dtype=np.int16)
    store = Store.create(tmp_path / "store", ABOUT)
    store.write(array, entry("S1", array.shape[1:], channels=2))
    for _ in range(200):
        start = [int(rng.integers(0, n)) for n in array.shape[1:]]
        size = [int(rng.integers(1, n - s + 1)) for n, s in zip(array.shape[1:], start, strict=True)]
        want = array[(slice(None), *(slice(s, s + w) for s, w in zip(start, size, strict=True)))]
        np.testing.assert_array_equal(store.read_box("S1", start, size), want)


def test_noise_of_a_ct_takes_fewer_bytes_than_its_bits(tmp_path):
    # Noise of 20 HU, smoothed as a scanner's kernel does, around fat, muscle and air: 0.2 of float32.
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal((1, 96, 96, 96)), (0, 0.9, 0.9, 0.6))
    hu = np.repeat([-1000, -100, 50, 50], 24)[None, None, None] + 12 * noise / noise.std()
    store = Store.create(tmp_path / "store", ABOUT)
    store.write(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), entry("S1", (96, 96, 96)))
    assert store.volume_path("S1").stat().st_size <= 0.2 * 4 * hu.size


def test_no_store_and_unfinished_store_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no store\.json"):
        Store.open(tmp_path)
    Store.create(tmp_path / "begun", ABOUT)
    with pytest.raises(BadInput, match="--resume"):
        Store.open(tmp_path / "begun")


def test_resuming_with_another_recipe_is_refused(filled):
    Store.create(filled[0], ABOUT)
    with pytest.raises(BadInput, match="same recipe"):
        Store.create(filled[0], About(**{**ABOUT.__dict__, "spacing_mm": (2.0, 2.0, 2.0)}))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_volume_is_refused(filled, damage):
    path = filled[0]
    file = path / "volumes/S1.b2nd"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        for at in range(len(data) // 3, len(data) // 2, 100):
            data[at] ^= 255
    file.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    with pytest.raises(BadInput):
        Store.open(path).read_box("S1", (0, 0, 0), (70, 40, 33))


def test_manifest_that_is_none_is_refused(filled):
    (filled[0] / "manifest.csv").write_text("scan_id,what\nS1,2\n")
    with pytest.raises(BadInput, match="manifest"):
        Store.open(filled[0])


def test_scan_id_is_no_way_out_of_the_folder(filled):
    with pytest.raises(BadInput, match="scan_id"):
        Store.open(filled[0]).read_box("../../etc", (0, 0, 0), (1, 1, 1))


def test_read_about_refuses_strange_keys(filled):
    path = filled[0] / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    with pytest.raises(BadInput, match="as prepare writes it"):
        read_about(filled[0])


def test_hints_name_the_bytes_of_the_chunks_that_a_box_touches(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1000, (2, 130, 70, 200), dtype=np.int16)
    array[:, :64, :64, 64:128] = 0  # such a chunk takes no room
    store = Store.create(tmp_path / "store", ABOUT)
    store.write(array, entry("S1", array.shape[1:], channels=2))
    file = store.volume_path("S1").read_bytes()
    schunk = store._opened("S1").array.schunk
    ends = store._opened("S1").ends
    for number in range(schunk.nchunks):
        content = file[ends[number] : ends[number + 1]]
        assert content == (b"" if number in (1, 25) else schunk.get_chunk(number))
    hinted, cached = [], set()
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, begin, length, advice: hinted.append((begin, length)))
    monkeypatch.setattr("volssl.store._is_cached", lambda handle, place: place in cached)
    box = store.read_box("S1", (60, 3, 130), (10, 20, 62))
    np.testing.assert_array_equal(box, array[:, 60:70, 3:23, 130:192])
    # Chunks are counted along C, X, Y, Z: 2 x 3 x 2 x 4 of them.
    assert hinted == [(ends[n], ends[n + 1] - ends[n]) for n in (2, 10, 26, 34)]
    # Nothing is asked for whose first and last byte are in memory.
    hinted.clear()
    cached |= {ends[2], ends[3] - 1, ends[10], ends[27] - 1}
    store.read_box("S1", (60, 3, 130), (10, 20, 62))
    assert hinted == [(ends[n], ends[n + 1] - ends[n]) for n in (10, 26, 34)]


def test_bytes_in_memory_are_told_from_those_on_the_disk(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100_000))
    handle = os.open(tmp_path / "file", os.O_RDONLY)
    assert _is_cached(handle, 0) and _is_cached(handle, 99_999)
    assert not _is_cached(handle, 100_000)  # behind the end
    os.close(handle)
    assert not _is_cached(handle, 0)  # it says nothing
