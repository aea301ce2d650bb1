"""Verb embed: an encoder over scans -> features per volume, per patch or of every place, for search, clustering and probes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import volssl
from volssl.encode import Encoder, Patch, Precision, features_of, open_encoder, patches_of, write_dense
from volssl.features import METADATA, Writer, check_table_name, table
from volssl.files import BadInput, Outcome, check_out, claim_out, place_of, track, write_csv, write_json
from volssl.neighbours import write_page
from volssl.scans import Given, Scan, is_store, of_files, of_store

FAILURES = ("input", "reason")


@dataclass(frozen=True)
class Settings:
    """What a feature is.

    Attributes:
        per: a row per volume (the mean of its patches), a row per patch, or dense: the map of all places, a file per scan. level: of the
            encoder's maps: coarsest, finest, or a number from 0, the finest. patches: how many are drawn in each volume; 0 for a grid.
        patch: sides in voxels; None for the largest view of the pretraining. normalise: divide each feature by its length. seed: of what
            is drawn. precision: auto is bf16 where the device multiplies it. batch: patches at once. names: write the names of image files.
    """

    per: Literal["volume", "patch", "dense"] = "volume"
    level: str = "coarsest"
    patches: int = 0
    patch: tuple[int, int, int] | None = None
    normalise: bool = False
    seed: int = 0
    precision: Precision = "auto"
    batch: int = 4
    names: bool = False

    def __post_init__(self) -> None:
        faults = []
        if self.per not in ("volume", "patch", "dense"):
            faults.append(f"--per must be volume, patch or dense; found {self.per!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            faults.append(f"--precision must be auto, fp32 or bf16; found {self.precision!r}")
        if self.patches < 0 or self.batch < 1:
            faults.append(f"--patches >= 0 and --batch >= 1 must hold; found {self.patches}, {self.batch}")
        if self.per == "dense" and self.patches:
            faults.append("--patches is not for --per dense, which goes over all places; leave it out")
        if faults:
            raise BadInput("; ".join(faults))


PLAIN = Settings()


def run(
    bundle: Path,
    inputs: Sequence[Path],
    *,
    out: Path,
    settings: Settings = PLAIN,
    page: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Embed the scans of a store, or images.

    Args:
        bundle: of a pretraining, or its run. inputs: one store alone; or image files, folders with images, DICOM series folders.
        out: a table (.parquet or .npz), or for `dense` a folder. page: also write the page of nearest neighbours, beside a store's table.
    Returns: failed counts the scans that could not be embedded; failures.csv beside the table (in the folder) names each with its reason.
    Raises: BadInput: `out` in use or of another kind, no sound bundle, a store of other voxels, no input, or not one scan that could be
        embedded; `out` is then untouched.
    """
    out, paths = Path(out), [Path(path) for path in inputs]
    stored = _check(out, paths, settings, page=page, overwrite=overwrite)
    encoder = open_encoder(Path(bundle), level=settings.level, patch_vox=settings.patch, precision=settings.precision, batch=settings.batch)
    if stored:
        given, failures = of_store(paths[0], encoder.card), []
    else:
        given, failures = of_files(paths, encoder.card, names=settings.names)
    if page and len({one.patient_id for one in given}) < 2:
        raise BadInput(f"--page: needs a store of at least two patients; found one in {paths[0]}; leave it out")
    batch = _Batch(encoder, settings, failures, stored=stored)
    if settings.per == "dense":
        return batch.fill(out, given, overwrite=overwrite, inputs=[Path(bundle), *paths])
    outcome = batch.write(out, given)
    if page:
        write_page(out, out.with_suffix(".html"), store=paths[0])
    return outcome


def _check(out: Path, paths: Sequence[Path], settings: Settings, *, page: bool, overwrite: bool) -> bool:
    """Whether the input is a store. Raises: BadInput: what can be told before anything is read."""
    stores = [path for path in paths if is_store(path)]
    if stores and len(paths) > 1:
        raise BadInput(f"inputs: a store must be given alone; found {len(paths)} inputs; embed each into a table of its own")
    if stores and out.resolve().is_relative_to(stores[0].resolve()):
        raise BadInput(f"--out {out}: must lie outside of the store; choose another place")
    if page and (not stores or settings.per == "dense"):
        raise BadInput("--page: needs a store, whose scans it draws, and --per patch or volume; leave it out")
    if settings.names and stores:
        raise BadInput("--names: is for image files; a store knows pseudonyms alone; leave it out")
    if settings.per == "dense":
        if out.suffix in (".parquet", ".npz"):
            raise BadInput(f"--out {out}: must be a folder with --per dense, for one .npz per scan; found a file's name")
        check_out(out, overwrite=overwrite, inputs=paths)
        return bool(stores)
    check_table_name(out)
    for path in (out, out.parent / "failures.csv", *([out.with_suffix(".html")] if page else [])):
        if path.is_dir() or (path.exists() and not overwrite):
            raise BadInput(f"--out {out}: {path.name} beside it must be new; found one; choose another place, or --overwrite for a file")
    return bool(stores)


@dataclass
class _Batch:
    """Scans one after the other: those done, and those that failed."""

    encoder: Encoder
    settings: Settings
    failures: list[dict[str, str]]
    done: int = 0
    rows: int = 0
    claimed: bool = False
    stored: bool = field(kw_only=True)

    def metadata(self) -> dict[str, Any]:
        """What holds for all features."""
        card, settings = self.encoder.card, self.settings
        return {
            "schema": 1,
            "volssl_version": volssl.__version__,
            "bundle_sha256": card["sha256"],
            "method": card["method"],
            "level": self.encoder.level,
            "level_stride_vox": list(self.encoder.stride_vox),
            "per": settings.per,
            "patches": settings.patches or "grid",
            "patch_vox": list(self.encoder.patch_vox),
            "seed": settings.seed,
            "normalised": settings.normalise,
            "precision": self.encoder.precision,
            "modality": card["intensity"]["modality"],
            "spacing_mm": list(card["spacing_mm"]),
            "source": "store" if self.stored else "files",
        }

    def write(self, out: Path, given: Sequence[Given]) -> Outcome:
        """A table of all scans. Raises: BadInput: not one could be embedded."""
        settings = self.settings
        with table(out, width=self.encoder.width, names=settings.names, metadata=self.metadata()) as writer:
            self._each(given, lambda scan: self._embed(scan, writer))
        failures = out.parent / "failures.csv"
        if self.failures or failures.exists():
            write_csv(failures, self.failures, FAILURES)
        message = f"{self.rows} features of {self.done} scans, {self.encoder.width} numbers each"
        return Outcome(out.parent if self.failures else out, failed=len(self.failures), message=message)

    def fill(self, out: Path, given: Sequence[Given], *, overwrite: bool, inputs: Sequence[Path]) -> Outcome:
        """A folder of maps. Raises: BadInput: not one scan could be embedded."""

        def dense(scan: Scan) -> None:
            told = {
                key: np.array(getattr(scan, key)) for key in ("scan_id", "patient_id", "split", *(["name"] if self.settings.names else []))
            }
            told[METADATA] = np.array(json.dumps(self.metadata(), sort_keys=True))
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as place:
                made = Path(place) / f"{scan.scan_id}.npz"
                write_dense(made, self.encoder, scan, unit=self.settings.normalise, told=told)
                if not self.claimed:  # nothing is touched before there is something to keep
                    claim_out(out, overwrite=overwrite, inputs=inputs)
                    write_json(out / "features.json", self.metadata())
                    self.claimed = True
                os.replace(made, out / made.name)

        self._each(given, dense)
        write_csv(out / "failures.csv", self.failures, FAILURES)
        return Outcome(out, failed=len(self.failures), message=f"maps of {self.done} scans, {self.encoder.width} numbers at each place")

    def _each(self, given: Sequence[Given], embed: Callable[[Scan], None]) -> None:
        for one in track(given, total=len(given), label="embed"):
            try:
                embed(one.open())
            except BadInput as error:
                self._failed(one, one.told(error))
            except OSError:
                raise  # of the disk that all others go to as well
            except (MemoryError, torch.OutOfMemoryError):
                self._failed(one, "out_of_memory: embedding it needs more memory than there is; lower --batch or --patch")
            except Exception as error:  # what nobody foresaw in one scan must not end a night's work; its text may quote a header
                self._failed(one, f"unexpected_error: {place_of(error)}")
            else:
                self.done += 1
        if not self.done:
            told = "\n  ".join(f"{failure['input']}: {failure['reason']}" for failure in self.failures)
            raise BadInput(f"inputs: none of {len(self.failures)} could be embedded:\n  {told}")

    def _failed(self, one: Given, reason: str) -> None:
        self.failures.append({"input": one.shown, "reason": reason})

    def _embed(self, scan: Scan, writer: Writer) -> None:
        # Nothing of a scan is written before all of it went well.
        settings, encoder = self.settings, self.encoder
        patches = patches_of(scan, encoder.patch_vox, drawn=settings.patches, seed=settings.seed)
        batches = features_of(encoder, scan, patches)
        rows = _volume_row(scan, batches, encoder.width) if settings.per == "volume" else _patch_rows(scan, batches, encoder.patch_vox)
        if settings.normalise:
            length_N1 = np.linalg.norm(rows["features"], axis=1, keepdims=True)
            rows["features"] = rows["features"] / np.maximum(length_N1, 1e-12)
        writer.add(rows if settings.names else {key: values for key, values in rows.items() if key != "name"})
        self.rows += len(rows["features"])


Batches = Iterator[tuple[list[Patch], np.ndarray]]


def _volume_row(scan: Scan, batches: Batches, width: int) -> dict[str, np.ndarray]:
    count, shares, total_D = 0, 0.0, np.zeros(width)
    for patches, features_BD in batches:
        count += len(patches)
        shares += sum(patch.body_share for patch in patches)
        total_D += features_BD.sum(0, dtype=np.float64)
    size = np.subtract(scan.stop, scan.start)
    facts = {"body_share": [shares / count], "patches": [count], "features": (total_D / count).astype(np.float32)[None]}
    return _rows(scan, np.array([scan.start]), size[None], facts)


def _patch_rows(scan: Scan, batches: Batches, patch_vox: Sequence[int]) -> dict[str, np.ndarray]:
    corners, shares, features = [], [], []
    for patches, features_BD in batches:
        corners += [patch.corner for patch in patches]
        shares += [patch.body_share for patch in patches]
        features.append(features_BD)
    facts = {"body_share": shares, "patches": [1] * len(corners), "features": np.concatenate(features)}
    return _rows(scan, np.array(corners), np.tile(patch_vox, (len(corners), 1)), facts)


def _rows(scan: Scan, start_N3: np.ndarray, size_N3: np.ndarray, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    who = {key: np.full(len(start_N3), getattr(scan, key)) for key in ("scan_id", "patient_id", "split", "name")}
    centre_N3 = scan.grid.world(start_N3 + (size_N3 - 1) / 2)
    return {**who, "start_vox": start_N3, "size_vox": size_N3, "centre_mm": centre_N3, **{key: np.asarray(v) for key, v in facts.items()}}
