"""Tables of features on disk, Parquet or NumPy's npz with the same columns, written as they come; and features of every place, as npz.

The only door to pyarrow.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from volssl.files import BadInput, atomic

SUFFIXES = (".parquet", ".npz")
# Name -> type and numbers per row. `name` is there only where it was asked for, `features` are as long as the encoder's map is wide.
COLUMNS: dict[str, tuple[Any, int]] = {
    "scan_id": (str, 1),
    "patient_id": (str, 1),
    "split": (str, 1),
    "name": (str, 1),
    "start_vox": (np.int32, 3),
    "size_vox": (np.int32, 3),
    "centre_mm": (np.float64, 3),
    "body_share": (np.float32, 1),
    "patches": (np.int32, 1),
    "features": (np.float32, 0),
}
GROUP = 8192  # rows that are written at once, so that a reader finds few and large groups
OLD = (1980, 1, 1, 0, 0, 0)  # the time of every member of a zip, so that the same features give the same bytes
METADATA = "volssl"

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Table:
    """A table as it was written: `columns` of N rows (see COLUMNS, without features), features_ND float32, and what holds for all rows."""

    columns: dict[str, np.ndarray]
    features_ND: np.ndarray
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.features_ND)


class Writer(Protocol):
    """What takes the rows of one scan after the other."""

    def add(self, rows: Columns) -> None:
        """Append rows: all columns of the table, each with N entries."""
        ...


def check_table_name(out: Path) -> None:
    """Raises: BadInput: a suffix that is no table's, or Parquet where pyarrow is not installed."""
    if out.suffix not in SUFFIXES:
        found = out.suffix or "no suffix"
        raise BadInput(f"--out {out}: must end in {' or '.join(SUFFIXES)}; found {found}; for a folder set --per dense")
    if out.suffix == ".parquet":
        _pyarrow(out)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: needs pyarrow; found none; pip install 'volssl[parquet]', or name an .npz file") from None
    return pyarrow


@contextmanager
def table(out: Path, *, width: int, names: bool, metadata: Mapping[str, Any]) -> Iterator[Writer]:
    """Write a table atomically: nothing is left where the block ends in an error.

    Args: width: numbers of a feature. names: whether there is a column `name`.
    """
    columns = {key: kind for key, kind in COLUMNS.items() if names or key != "name"} | {"features": (np.float32, width)}
    make = _Parquet if out.suffix == ".parquet" else _Npz
    with atomic(out) as temporary:
        writer = make(temporary, columns, json.dumps(metadata, sort_keys=True))
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.close()


class _Parquet:
    """Row groups as they come; of the features at most one group lies in memory."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[Any, int]], metadata: str) -> None:
        self._pa, self._columns = _pyarrow(path), columns
        fields = [self._pa.field(key, self._type(kind, width)) for key, (kind, width) in columns.items()]
        self._schema = self._pa.schema(fields, metadata={METADATA: metadata})
        self._writer = self._pa.parquet.ParquetWriter(str(path), self._schema)
        self._waiting: list[Columns] = []

    def _type(self, kind: Any, width: int) -> Any:
        single = self._pa.string() if kind is str else self._pa.from_numpy_dtype(np.dtype(kind))
        return single if width == 1 else self._pa.list_(single, width)

    def add(self, rows: Columns) -> None:
        """Append rows."""
        self._waiting.append(rows)
        if sum(len(one["features"]) for one in self._waiting) >= GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        arrays = []
        for key, (kind, width) in self._columns.items():
            values = np.concatenate([rows[key] for rows in self._waiting])
            values = values.tolist() if kind is str else np.ascontiguousarray(values, dtype=kind)
            array = self._pa.array(values if width == 1 else np.ravel(values))
            arrays.append(array if width == 1 else self._pa.FixedSizeListArray.from_arrays(array, width))
        self._writer.write_table(self._pa.table(arrays, schema=self._schema))
        self._waiting = []

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Leave the file as it is."""
        self._writer.close()


class _Npz:
    """Features go to a raw file beside it first, since a zip tells the number of rows before them; the other columns wait in memory."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[Any, int]], metadata: str) -> None:
        self._path, self._columns, self._metadata = path, columns, metadata
        self._raw = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed with the table)
        self._waiting: list[Columns] = []
        self._rows = 0

    def add(self, rows: Columns) -> None:
        """Append rows."""
        self._raw.write(np.ascontiguousarray(rows["features"], dtype=np.float32).data)
        self._rows += len(rows["features"])
        self._waiting.append({key: rows[key] for key in self._columns if key != "features"})

    def close(self) -> None:
        """Pack all into the zip."""
        with zipfile.ZipFile(self._path, "w") as packed:
            for key, (kind, width) in self._columns.items():
                if key == "features":
                    self._raw.seek(0)
                    pieces = iter(lambda: self._raw.read(1 << 20), b"")
                    write_member(packed, key, (self._rows, width), pieces)
                    continue
                values = np.concatenate([rows[key] for rows in self._waiting]) if self._waiting else np.zeros((0, width))
                write_array(packed, key, values.astype(np.str_ if kind is str else kind))
            write_array(packed, METADATA, np.array(self._metadata))
        self._raw.close()

    def abandon(self) -> None:
        """Drop what was gathered."""
        self._raw.close()


def write_member(packed: zipfile.ZipFile, key: str, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]) -> None:
    """Write a float32 array of `shape` into an npz piece by piece: the bytes of its rows in order."""
    with packed.open(zipfile.ZipInfo(f"{key}.npy", OLD), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(piece)


def write_array(packed: zipfile.ZipFile, key: str, array: np.ndarray) -> None:
    """Write a small array into an npz."""
    with packed.open(zipfile.ZipInfo(f"{key}.npy", OLD), "w") as member:
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def is_table(path: Path) -> bool:
    """Whether `path` is a file that by its name is such a table."""
    return path.is_file() and path.suffix in SUFFIXES


def read_table(path: Path) -> Table:
    """Read a table whole: 4 bytes per number. Raises: BadInput: it is none of volssl's."""
    read = _read_parquet if path.suffix == ".parquet" else _read_npz
    try:
        columns, metadata = read(path)
        features_ND = np.asarray(columns.pop("features"), dtype=np.float32)
        missing = COLUMNS.keys() - {"name", "features"} - columns.keys()
        told = json.loads(metadata)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:  # pyarrow's errors are ValueErrors
        raise BadInput(f"{path}: must be a table that `volssl embed` wrote; {type(error).__name__} while reading it") from None
    if missing or features_ND.ndim != 2:
        lacks = ", ".join(sorted(missing)) or "features of rows"
        raise BadInput(f"{path}: must be a table that `volssl embed` wrote per volume or patch; found none of: {lacks}")
    return Table(columns, features_ND, told)


def _read_parquet(path: Path) -> tuple[dict[str, np.ndarray], str]:
    found = _pyarrow(path).parquet.read_table(path)
    columns = {}
    for key in found.column_names:
        column = found[key].combine_chunks()
        width = getattr(column.type, "list_size", 0)
        flat = (column.flatten() if width else column).to_numpy(zero_copy_only=False)
        columns[key] = flat.reshape(-1, width) if width else flat
    return columns, (found.schema.metadata or {})[METADATA.encode()].decode()


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], str]:
    with np.load(path, allow_pickle=False) as found:
        columns = {key: found[key] for key in found.files}
    return columns, str(columns.pop(METADATA))
