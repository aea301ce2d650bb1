"""Pages: self-contained, and without a path of the machine."""

import base64
import re

import pytest

from volssl import page
from volssl.page import _number


@pytest.mark.parametrize(
    "text, shown",
    [
        ("at /home/jane/scans/a.nii", "at [path]"),
        (r"C:\Users\jane\x", "[path]"),
        ("~/data/x and https://github.com/a/b", "[path] and https://github.com/a/b"),
        ("3 mm/voxel, 1/2", "3 mm/voxel, 1/2"),
    ],
)
def test_paths_are_cut_out(text, shown):
    assert page.without_paths(text) == shown


def test_an_image_becomes_an_address():
    assert page.embedded(b"", "png") == ""
    kind, _, content = page.embedded(b"abc", "png").partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == b"abc"


def test_what_is_filled_in_is_escaped_and_nothing_is_loaded():
    pair = {"name": "<script>", "protocols": ["dice", "dice"], "rows": []}
    text = page.render("report.html", sections=[], comparison={"rows": [], "pairs": [pair], "reference": "x"})
    assert "&lt;script&gt;" in text and "<script" not in text
    assert "default-src 'none'" in text and not re.search(r"(src|href)=\"(?!data:|#)", text)


def test_a_number_that_rounds_to_zero_bears_no_sign():
    assert [_number(value) for value in (-0.0004, 0.0004, -0.0006, None)] == ["0.000", "0.000", "−0.001", "–"]
