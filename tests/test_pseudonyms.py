"""Keyed hashes: the same for the same key, and nobody's without it."""

import hashlib
import hmac
import stat

import pytest

from volssl.files import BadInput
from volssl.pseudonyms import claim_key, pseudonym


def test_a_pseudonym_is_hmac_sha256():
    want = hmac.new(b"key", b"P\0dicom\0Doe^Jane", hashlib.sha256).hexdigest()[:16]
    assert pseudonym(b"key", "P", "dicom", "Doe^Jane") == "P" + want
    assert pseudonym(b"other", "P", "dicom", "Doe^Jane") != "P" + want
    assert pseudonym(b"key", "P", "a", "b") != pseudonym(b"key", "P", "a\0", "b")[:0] + pseudonym(b"key", "P", "ab")


def test_the_key_is_made_once_and_kept_private(tmp_path):
    key = claim_key(tmp_path, None)
    assert claim_key(tmp_path, None) == key and len(key) == 64
    assert stat.S_IMODE((tmp_path / "private/key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


def test_a_given_key_must_be_long_and_the_same(tmp_path):
    (tmp_path / "short").write_text("x" * 31)
    (tmp_path / "long").write_text("x" * 32)
    with pytest.raises(BadInput, match="at least 32"):
        claim_key(tmp_path, tmp_path / "short")
    assert claim_key(tmp_path, tmp_path / "long") == b"x" * 32
    (tmp_path / "long").write_text("y" * 32)
    with pytest.raises(BadInput, match="found another"):
        claim_key(tmp_path, tmp_path / "long")
