"""Pseudonyms: keyed hashes of identities; the key stays in INDEX/private/."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from volssl.files import BadInput, write_text


def claim_key(out: Path, given_file: Path | None) -> bytes:
    """The key of the index in `out`: that in `given_file`, else the one that is there, else a new one. Raises: BadInput."""
    private = out / "private"
    private.mkdir(mode=0o700, exist_ok=True)
    private.chmod(0o700)
    file = private / "key"
    if given_file is not None:
        given = Path(given_file).read_text(encoding="utf-8").strip()
        if len(given) < 32:
            raise BadInput(f"key {given_file}: must hold at least 32 characters; found {len(given)}")
        if file.exists() and file.read_text().strip() != given:
            raise BadInput(f"key {given_file}: must be the key of the index in {out}; found another; use a new --out")
        write_text(file, given + "\n")
    elif not file.exists():
        write_text(file, secrets.token_hex(32) + "\n")
    file.chmod(0o600)
    return file.read_text().strip().encode()


def pseudonym(key: bytes, letter: str, *identity: str) -> str:
    """Keyed hash of an identity (HMAC-SHA-256, 64 bits): the same for the same key, and nobody without the key can try names."""
    return letter + hmac.new(key, "\0".join((letter, *identity)).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:16]
