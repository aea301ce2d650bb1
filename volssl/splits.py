"""Which scans are for training and which for validation: by patient, and never a scan on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from volssl.rows import Row


def split(rows: Sequence[Row], *, seed: int, share: float, twins: Iterable[tuple[str, str]] = ()) -> list[Row]:
    """Rows with their `split`: about `share` of the patients is val, the rest train; rejected rows have none.

    Patients who hold one and the same scan (equal content hashes, or scan_ids paired in `twins`) are one group and stay together. Groups
    are put in an order that depends on `seed` and their pseudonyms alone.
    """
    usable = {row.scan_id: row for row in rows if row.usable}
    group = {row.patient_id: row.patient_id for row in usable.values()}

    def root(patient: str) -> str:
        while group[patient] != patient:
            group[patient] = patient = group[group[patient]]
        return patient

    def join(one: str, two: str) -> None:
        low, high = sorted((root(one), root(two)))
        group[high] = low

    first: dict[str, str] = {}
    for row in usable.values():
        join(row.patient_id, first.setdefault(row.content_hash, row.patient_id))
    for one, two in twins:
        if one in usable and two in usable:
            join(usable[one].patient_id, usable[two].patient_id)
    groups = sorted({root(patient) for patient in group}, key=lambda name: _order(seed, name))
    held_out = set(groups[: min(int(share * len(groups) + 0.5), len(groups) - 1)])
    side = {patient: "val" if root(patient) in held_out else "train" for patient in group}
    return [replace(row, split=side[row.patient_id] if row.usable else "") for row in rows]


def _order(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()
