"""A table of features -> one page: a few patches and, for each, the nearest in other patients, by the cosine of their features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from volssl.draws import generator
from volssl.features import Table, read_table
from volssl.files import BadInput, write_text
from volssl.page import embedded, render
from volssl.pictures import PLANE_AXIS, PLANES, plane_of
from volssl.store import Entry, Store
from volssl.thumbnails import Box, planes_png

QUERIES, NEAREST = 6, 5
BLOCK = 1 << 16  # rows compared at once


def nearest(features_ND: np.ndarray, patient_N: np.ndarray, queries: np.ndarray, *, count: int = NEAREST) -> list[list[tuple[int, float]]]:
    """For each query (a row's number) the rows of other patients with the largest cosine, and it; of equal ones the first row.

    A feature of length 0 is like nothing (0). Fewer than `count` where the others have fewer rows.
    """
    asked_QD = _unit(features_ND[queries])
    cosine_QN = np.empty((len(queries), len(features_ND)), np.float32)
    for begin in range(0, len(features_ND), BLOCK):
        cosine_QN[:, begin : begin + BLOCK] = asked_QD @ _unit(features_ND[begin : begin + BLOCK]).T
    found = []
    for query, cosine_N in zip(queries, cosine_QN, strict=True):
        others = np.flatnonzero(patient_N != patient_N[query])
        order = others[np.argsort(-cosine_N[others], kind="stable")[:count]]
        found.append([(int(row), float(cosine_N[row])) for row in order])
    return found


def _unit(features_ND: np.ndarray) -> np.ndarray:
    return features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)


def queries_of(patient_N: np.ndarray, *, count: int) -> np.ndarray:
    """Rows drawn by lot, each of another patient as long as there are any: the same for the same table."""
    order = generator(0, "neighbours").permutation(len(patient_N))
    _, firsts = np.unique(patient_N[order], return_index=True)
    firsts = np.sort(firsts)
    return np.concatenate([order[firsts], np.delete(order, firsts)])[:count]


def write_page(path: Path, out: Path, *, store: Path | None) -> Path:
    """Write the page of a table that `volssl embed` made of a store. The same table gives the same page.

    Args: store: whose scans are drawn. Returns: `out`.
    Raises: BadInput: no table, none of a store, another store's, or fewer than two patients.
    """
    read = read_table(path)
    if read.metadata.get("source") != "store":
        raise BadInput(f"{path}: must be the table of a store, which knows who is who; found one of files")
    if store is None:
        raise BadInput(f"{path}: needs the store that it was made of, whose scans are drawn; give it as --store STORE")
    opened = Store.open(Path(store))
    rows = {row.scan_id: row for row in opened.rows}
    if gone := sorted(set(read.columns["scan_id"].tolist()) - rows.keys()):
        raise BadInput(f"--store {store}: must hold the scans of {path.name}; found {len(gone)} missing, such as {gone[0]}")
    patient_N = read.columns["patient_id"]
    patients = len(set(patient_N.tolist()))
    if patients < 2:
        raise BadInput(f"{path}: must hold at least two patients, one to ask about and one to find; found {patients}")
    queries = queries_of(patient_N, count=QUERIES)
    answers = nearest(read.features_ND, patient_N, queries)
    groups = []
    for query, found in zip(queries.tolist(), answers, strict=True):
        cards = [_card(opened, rows, read, row, cosine) for row, cosine in [(query, None), *found]]
        groups.append({"query": cards[0], "found": cards[1:]})
    about = {**read.metadata, "rows": len(read), "patients": patients, "scans": len(set(read.columns["scan_id"].tolist()))}
    about["width"] = read.features_ND.shape[1]
    write_text(out, render("neighbours.html", about=about, groups=groups, apart=_apart(groups)))
    return out


def _apart(groups: list[dict[str, Any]]) -> float:
    # How far along the body what was found lies from what was asked, as a share of the body: a figure for the eye, no measure.
    return float(np.median([abs(one["height"] - group["query"]["height"]) for group in groups for one in group["found"]]))


def _card(store: Store, rows: dict[str, Entry], read: Table, row: int, cosine: float | None) -> dict[str, Any]:
    entry = rows[str(read.columns["scan_id"][row])]
    start, size = read.columns["start_vox"][row], read.columns["size_vox"][row]
    middle = np.clip(start + size // 2, 0, np.array(entry.shape_vox) - 1)
    body = [(middle[axis] - entry.body_start[axis]) / max(1, entry.body_stop[axis] - entry.body_start[axis]) for axis in range(3)]
    inside = _planes(store, entry.scan_id, start, size, middle)
    whole = _planes(store, entry.scan_id, np.zeros(3, int), np.array(entry.shape_vox), middle)
    x, y, z = (int(n) for n in start)
    box = Box((x, y, z), (x + int(size[0]), y + int(size[1]), z + int(size[2])))
    return {
        "scan_id": entry.scan_id,
        "patient_id": entry.patient_id,
        "cosine": cosine,
        "start": ", ".join(map(str, (x, y, z))),
        "centre": ", ".join(f"{mm:.0f}" for mm in read.columns["centre_mm"][row]),
        "height": float(body[2]),
        "inside": embedded(planes_png(inside, store.spacing_mm, window=store.window), "png"),
        "whole": embedded(planes_png(whole, store.spacing_mm, window=store.window, box=box), "png"),
    }


def _planes(store: Store, scan_id: str, start: np.ndarray, size: np.ndarray, middle: np.ndarray) -> list[np.ndarray]:
    # Each slice is read by itself.
    planes = []
    for plane in PLANES:
        axis = PLANE_AXIS[plane]
        first, sides = start.tolist(), size.tolist()
        first[axis], sides[axis] = int(middle[axis]), 1
        planes.append(plane_of(store.read_box(scan_id, first, sides)[0], plane, 0))
    return planes
