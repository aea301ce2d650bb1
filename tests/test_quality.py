"""The pages of an index and a store: every series counted, a few shown, nothing from outside, bounded for any archive."""

import base64
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import body_phantom, oblique_grid
from test_index import write_series

from volssl import archive, index, quality, reasons, thumbnails
from volssl.files import BadInput, read_csv, write_csv, write_json
from volssl.glimpse import glimpse
from volssl.prepare import run as prepare
from volssl.preview import write_preview


@pytest.fixture
def made(tmp_path):
    """An index of three CT series, one of them without a slice, a label map and a text file."""
    root = tmp_path / "archive"
    phantom = body_phantom(), oblique_grid()
    for number in (1, 2, 3):
        write_series(root / f"s{number}", (body_phantom(seed=number), phantom[1]), patient=f"p{number}", series=number)
    sorted((root / "s3").iterdir())[5].unlink()
    archive.write_nifti(root / "label.nii.gz", (phantom[0] > 0) + (phantom[0] > 300), phantom[1], np.uint8)
    (root / "notes.txt").write_text("notes")
    index.build([root], out=tmp_path / "index")
    return tmp_path / "index"


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text().split("</style>")[1]))


def pictures_of(page):
    return [base64.b64decode(one) for one in re.findall(r"data:image/png;base64,([^\"]+)", page.read_text())]


def decoded(png):
    """An independent look at a PNG: its chunks and its pixels."""
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        at += 12 + length
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, 1 + 3 * columns)
    return set(chunks), lines[:, 1:].reshape(rows, columns, 3)


def test_the_index_leaves_a_page_with_all_counts(made):
    text = text_of(made / "quality.html")
    assert "4 series of 4 patients" in text
    assert "2 accepted (50.0 %) 0 usable after a repair (0.0 %) 2 refused (50.0 %)" in text
    for code in ("missing_slice", "label_map", "not_an_image"):
        meaning, advice = reasons.REASONS[code]
        assert code in text and meaning in text and advice in text
    assert "CT 2 1 1.75 3 12 36" in text  # modality, accepted, refused, pixel, slice distance, slices, length
    assert "24 × 20 (2)" in text


def test_a_few_of_each_verdict_are_shown(made):
    rows = read_csv(made / "index.csv")
    text = text_of(made / "quality.html")
    assert all(row["scan_id"] in text for row in rows)
    pictures = pictures_of(made / "quality.html")
    assert len(pictures) >= 3  # both accepted and the label map
    for picture in pictures:
        chunks, pixels = decoded(picture)
        assert chunks == {b"IHDR", b"IDAT", b"IEND"}
        assert pixels.max() > 150  # soft tissue


def test_a_missing_slice_shows_as_a_dark_band(tmp_path, made):
    """The refused series is drawn with its slices where they lie: one of them is dark from side to side."""
    row = next(row for row in index.load(made).rows if row.reasons == ("missing_slice",))
    volume = glimpse(index.load(made).sources[row.scan_id])
    slices = volume.reoriented("RAS").array_CXYZ[0]
    assert slices.shape[2] == 12
    assert np.flatnonzero(np.ptp(slices, axis=(0, 1)) == 0).tolist() in ([5], [6])


def test_a_series_in_pieces_is_glimpsed_all_the_same(tmp_path):
    """Slices of two sizes, one cut short, two at one place: the commonest size is drawn, what cannot be read stays dark."""
    write_series(tmp_path / "a", (body_phantom(), oblique_grid()), patient="p1", series=1)
    write_series(tmp_path / "b", (body_phantom((20, 20, 3)), oblique_grid((20, 20, 3))), patient="p1", series=2)
    files = sorted((tmp_path / "a").iterdir())
    files[4].write_bytes(files[4].read_bytes()[:-500])
    again = tmp_path / "again.dcm"
    again.write_bytes(files[7].read_bytes())
    volume = glimpse(archive.Source("dicom", (*files, again, *(tmp_path / "b").iterdir())))
    slices = volume.reoriented("RAS").array_CXYZ[0]
    assert np.flatnonzero(np.ptp(slices, axis=(0, 1)) == 0).tolist() in ([4], [7])
    assert slices.shape[2] == 12
    assert glimpse(archive.Source("file", (again,))) is None


def test_only_known_makers_of_scanners_are_counted_by_name(tmp_path):
    for number, maker in enumerate(("SIEMENS Healthineers", "Siemens", "Dr. Quillfeather's workshop", ""), start=1):
        write_series(
            tmp_path / "in" / str(number),
            (body_phantom(seed=number), oblique_grid()),
            patient=f"p{number}",
            series=number,
            Manufacturer=maker,
        )
    index.build([tmp_path / "in"], out=tmp_path / "index", gates=index.Gates(vendors=True, thumbnails=False))
    text = text_of(tmp_path / "index" / "quality.html")
    assert "Scanners: Siemens (2), another (1), not said (1)." in text
    assert "Quillfeather" not in (tmp_path / "index" / "quality.html").read_text()
    quality.run(tmp_path / "index")
    assert "Scanners:" not in text_of(tmp_path / "index" / "quality.html")


def test_the_page_asks_nothing_of_anybody(made):
    page = (made / "quality.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert str(made.parent) not in page


def test_pictures_can_be_left_out(made, tmp_path):
    quality.run(made, look=quality.Look(thumbnails=False))
    assert pictures_of(made / "quality.html") == []
    assert "Written without pictures" in text_of(made / "quality.html")
    index.build([tmp_path / "archive"], out=tmp_path / "bare", gates=index.Gates(thumbnails=False))
    assert pictures_of(tmp_path / "bare" / "quality.html") == []


@pytest.mark.parametrize("code", ["burned_in_annotation", "secondary_capture", "rgb"])
def test_a_scan_that_may_have_a_name_in_its_pixels_is_never_drawn(made, code):
    """Whatever its verdict: the row of an accepted scan is made to say so."""
    rows = read_csv(made / "index.csv")
    chosen = next(row for row in rows if row["verdict"] == "accept")
    chosen["reasons"] = code
    write_csv(made / "index.csv", rows, list(rows[0]))
    before = len(pictures_of(made / "quality.html"))
    quality.run(made)
    assert chosen["scan_id"] not in text_of(made / "quality.html")
    assert len(pictures_of(made / "quality.html")) == before - 1
    assert code in text_of(made / "quality.html")


def test_without_the_private_part_the_counts_stay(made):
    for path in (made / "private").iterdir():
        path.unlink()
    quality.run(made)
    assert pictures_of(made / "quality.html") == []
    assert "4 series of 4 patients" in text_of(made / "quality.html")


def test_the_page_does_not_grow_with_the_archive(tmp_path):
    sizes = {}
    for count in (1000, 20_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_csv(folder / "index.csv", rows_of(count), list(next(rows_of(1))))
        write_json(folder / "summary.json", {"patients": count})
        quality.run(folder)
        sizes[count] = (folder / "quality.html").stat().st_size
    assert sizes[20_000] < 1.1 * sizes[1000] < 60_000
    assert "20,000 series of 20,000 patients" in text_of(tmp_path / "20000" / "quality.html")


def rows_of(count):
    rng = np.random.default_rng(0)
    for number in range(count):
        reason = rng.choice(["", "missing_slice", "gantry_tilt;missing_slice"])
        yield {
            "scan_id": f"S{number:016x}",
            "patient_id": f"P{number:016x}",
            "study_id": "T",
            "modality": rng.choice(["CT", "MR"]),
            "body_part": rng.choice(["CHEST", "HEAD", ""]),
            "shape_vox": "512 512 99",
            "spacing_mm": f"{0.5 + rng.random():.4f} 0.7 2.5",
            "orientation": "LPS",
            "num_slices": 99,
            "verdict": "reject" if reason else "accept",
            "reasons": reason,
            "content_hash": "C",
            "split": "" if reason else "train",
            "repairs": "",
        }


def test_samples_take_every_kind_before_a_second_of_one():
    sample = quality.Sample(3, lambda row: row[1])
    for number, kind in enumerate("aaaaaabbc"):
        sample.add(Named(f"S{9 - number}", kind))
    assert [(row.scan_id, row[1]) for row in sample.rows()] == [
        *[("S4", "a"), ("S2", "b"), ("S1", "c")],
        *[("S5", "a"), ("S3", "b")],
        ("S6", "a"),
    ]


class Named(tuple):
    def __new__(cls, scan_id, kind):
        return super().__new__(cls, (scan_id, kind))

    scan_id = property(lambda self: self[0])


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(BadInput, match="must be an index or a store"):
        quality.run(tmp_path)


# ------------------------------------------------------------------------------------------------ reasons


def test_every_code_that_is_given_is_explained():
    """Codes as the sources write them: of Unreadable, of sets of reasons, of headers' faults, of prepare's answers."""
    from pathlib import Path

    folder = Path(reasons.__file__).parent
    patterns = [r'Unreadable\(\s*"(\w+)"', r'(?:reasons|codes)\.add\("(\w+)"', r'^\s+yield "(\w+)"$', r'^\s+return "([a-z]+_[a-z_]+)"$']
    found = set()
    for name in ("archive", "dicom", "index", "prepare", "stacks", "pixels", "formats", "headers", "examine", "gates", "pools"):
        if (folder / f"{name}.py").exists():
            text = (folder / f"{name}.py").read_text()
            found |= {code for pattern in patterns for code in re.findall(pattern, text, re.MULTILINE)}
    assert {"missing_slice", "truncated", "no_body", "rgb"} <= found
    assert not found - set(reasons.REASONS)


def test_an_unknown_code_is_said_to_be_unknown():
    assert reasons.explained("of_tomorrow") == reasons.UNKNOWN


# ------------------------------------------------------------------------------------------------ thumbnails


def test_planes_keep_their_proportions_and_lie_as_a_radiologist_expects():
    """A volume of 100 x 50 x 40 mm in voxels of 1 x 2 x 4 mm; one bright voxel at right, front, head."""
    array = np.zeros((100, 25, 10), np.int16)
    array[95:, 22:, 9] = 1000
    planes = thumbnails.middle_planes(array, (97, 23, 9))
    _, pixels = decoded(thumbnails.planes_png(planes, (1.0, 2.0, 4.0), window=(0, 1000)))
    assert pixels.shape[1] == pytest.approx(thumbnails.WIDE, abs=3)
    per_mm = (thumbnails.WIDE - 2 * thumbnails.GAP) / (100 + 100 + 50)
    assert pixels.shape[0] == pytest.approx(50 * per_mm, abs=2)  # the axial plane is the tallest
    bright = np.argwhere(pixels[..., 0] > 200)
    axial = bright[bright[:, 1] < 100 * per_mm]
    assert axial.min(axis=0) == pytest.approx([0, 0], abs=2)  # front is up, the patient's right is left
    assert np.ptp(axial, axis=0) == pytest.approx([6 * per_mm, 5 * per_mm], abs=4)
    sagittal = bright[bright[:, 1] > 2 * (100 * per_mm + thumbnails.GAP)]
    assert sagittal[:, 0].min() == pytest.approx((50 - 40) / 2 * per_mm, abs=2)  # the head is up
    assert sagittal[:, 1].min() == pytest.approx(2 * (100 * per_mm + thumbnails.GAP), abs=2)  # the front is left


def test_a_box_is_drawn_around_its_voxels():
    array = np.zeros((40, 40, 40), np.int16)
    planes = thumbnails.middle_planes(array)
    box = thumbnails.Box((10, 0, 0), (20, 40, 40))
    _, pixels = decoded(thumbnails.planes_png(planes, (1.0, 1.0, 1.0), window=(0, 1), box=box))
    per_vox = (thumbnails.WIDE - 2 * thumbnails.GAP) / 120
    line = pixels[len(pixels) // 2, : int(40 * per_vox)]
    columns = np.flatnonzero((line == thumbnails.BOX).all(axis=1))
    assert columns == pytest.approx([20 * per_vox, 30 * per_vox - 1], abs=1)  # x runs to the left in the picture


@pytest.mark.parametrize("before, after", [(10, 10), (7, 30), (300, 11), (1, 5), (5, 1)])
def test_rescaling_keeps_a_constant_and_the_mean(before, after):
    weights = thumbnails._weights(before, after)
    assert weights.sum(axis=1) == pytest.approx(np.ones(after))
    if before > after:  # every sample counts
        assert (weights.sum(axis=0) > 0).all()


# ------------------------------------------------------------------------------------------------ the store


def test_prepare_leaves_a_page_of_its_volumes(made, tmp_path):
    outcome = prepare(made, out=tmp_path / "store")
    page = outcome.out / "preview.html"
    text = text_of(page)
    assert "2 prepared volumes of 2 patients" in text
    assert "1 for training (50.0 %)" in text or "2 for training (100.0 %)" in text
    assert "1 × 1 × 1 mm, RAS" in text and "-1000 to 1000" in text
    assert len(pictures_of(page)) == 2
    for picture in pictures_of(page):
        _, pixels = decoded(picture)
        assert (pixels == thumbnails.BOX).all(axis=2).any()
    first = page.read_bytes()
    write_preview(outcome.out)
    assert page.read_bytes() == first


def test_a_store_of_many_volumes_is_counted_row_by_row(made, tmp_path):
    """The manifest is lengthened by copies of one row under other names: 20,000 volumes, of which the first few are drawn."""
    store = prepare(made, out=tmp_path / "store").out
    rows = read_csv(store / "manifest.csv")
    more = [
        rows[-1] | {"scan_id": f"T{n:05d}", "patient_id": f"P{n % 500}", "split": "val", "shape_vox": f"{n % 7 + 40} 60 80"}
        for n in range(20_000)
    ]
    before = (store / "preview.html").stat().st_size
    write_csv(store / "manifest.csv", rows + more, list(rows[0]))
    tracemalloc.start()
    write_preview(store, thumbnails=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = text_of(store / "preview.html")
    assert "20,002 prepared volumes of" in text and re.search(r"2[,0-9]* held out \(val\)|20,00\d held out", text)
    assert re.search(r"left to right 43 \(\d+ to 46\)", text)
    assert (store / "preview.html").stat().st_size < before
    assert peak < 8 << 20


def test_what_could_not_be_prepared_is_explained(made, tmp_path):
    store = prepare(made, out=tmp_path / "store").out
    write_csv(store / "failures.csv", [{"scan_id": "S1", "reason": "no_body"}], ["scan_id", "reason"])
    quality.run(store, look=quality.Look(thumbnails=False))
    text = text_of(store / "preview.html")
    assert "no_body" in text and reasons.REASONS["no_body"][0] in text
    assert pictures_of(store / "preview.html") == []
