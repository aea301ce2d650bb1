"""Verb predict: finetune runs -> one label map per image, on the image's own grid. A bad input is named and the rest goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volssl import deploy
from volssl.archive import write_nifti
from volssl.dicom_seg import Maker, check_installed, check_source, write_dicom_seg
from volssl.files import BadInput, Outcome, check_out, claim_out, place_of, read_json, tell, track, write_csv, write_json
from volssl.heap import keep_freed
from volssl.inputs import Item, gather, reason_of, voxel_hash
from volssl.journal import write_environment
from volssl.segment import Model, read_ensemble
from volssl.shares import ShareFiles
from volssl.volume import Volume

SUFFIX = {"nifti": ".nii.gz", "dicomseg": ".dcm"}


@dataclass(frozen=True)
class Extras:
    """ensemble: runs beside the first whose shares count as much. probabilities: write the shares, too."""

    ensemble: Sequence[Path] = ()
    probabilities: bool = False


ALONE = Extras()


def run(
    run: Path,
    inputs: Sequence[Path],
    *,
    out: Path,
    format: str = "nifti",
    resume: bool = False,
    overwrite: bool = False,
    extras: Extras = ALONE,
) -> Outcome:
    """Segment images with the model of a finetune run, or with those of several.

    Args:
        run: its folder. inputs: image files, folders with images at any depth, DICOM series folders or one file of a series. A model of
            several channels takes 4D files, or one file (of DICOM: one folder) per channel, named as nnU-Net does (`<case>_0000`, ...),
            or as BraTS does, where the model's channels are BraTS's.
        out: label maps under the names of the inputs; a DICOM series gives `series_<hash of its voxels>`. format: nifti (uint8), or
            dicomseg, for DICOM alone, which bears the patient's header.
    Returns: failed counts the inputs that could not be segmented; failures.csv names each with its reason.
    Raises: BadInput: no model, runs that do not go together, no input, an input that is not there, two inputs of one name, an unknown
        format, or not one image that could be segmented; `out` is then untouched.
    """
    runs = [Path(run), *map(Path, extras.ensemble)]
    claim = {"resume": resume, "overwrite": overwrite, "inputs": (*runs, *map(Path, inputs))}
    check_out(Path(out), **claim)
    if format not in SUFFIX:
        raise BadInput(f"--format must be one of {', '.join(SUFFIX)}; found {format!r}")
    if format == "dicomseg":
        check_installed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed()  # every window's maps have the same sizes
    model = read_ensemble(runs, device, read=deploy.read)
    checksums = [deploy.checksum(one) for one in runs]
    settings = {"models": checksums, "format": format, "probabilities": extras.probabilities}
    if resume and Path(out).is_dir() and any(Path(out).iterdir()):
        _same_run(Path(out), settings)
    items, failures = gather([Path(path) for path in inputs], channels=len(model.plan.channels), names=model.plan.channels)
    batch = _Batch(Path(out), model, claim, settings, failures=failures)
    for item in track(items, total=len(items), label="predict"):
        batch.take(item)
    return batch.close()


def _same_run(out: Path, settings: dict[str, Any]) -> None:
    before = read_json(out / "prediction.json") if (out / "prediction.json").exists() else {}
    if changed := sorted(key for key in settings if before.get(key) != settings[key]):
        raise BadInput(f"--resume {out}: must be a prediction begun with the same {', '.join(changed)}; found another; choose a new folder")


@dataclass
class _Batch:
    """Images one after the other: those done, and those that failed."""

    out: Path
    model: Model
    claim: dict[str, Any]
    settings: dict[str, Any]
    failures: list[dict[str, str]] = field(default_factory=list)
    done: list[dict[str, str]] = field(default_factory=list)
    claimed: bool = False

    def take(self, item: Item) -> None:
        """Segment one image, or name it with the reason why not."""
        try:
            name = self._segmented(item)
        except BadInput as error:
            self.failures.append({"input": item.shown, "reason": reason_of(error, item.files)})
        except OSError:
            raise  # of the disk that all others go to as well
        except (MemoryError, torch.OutOfMemoryError):
            self.failures.append({"input": item.shown, "reason": "out_of_memory: segmenting it needs more memory than there is"})
        except Exception as error:  # what nobody foresaw in one image must not end a night's work; its text may quote a header
            self.failures.append({"input": item.shown, "reason": f"unexpected_error: {place_of(error)}"})
        else:
            self.done.append({"input": item.shown, "output": name, "repairs": ";".join(item.repairs)})

    def _segmented(self, item: Item) -> str:
        seg, resume = self.settings["format"] == "dicomseg", self.claim["resume"]
        if seg:
            check_source(item.series[0] if item.series else None)
        if item.repairs:
            tell(f"{item.shown}: mended ({', '.join(item.repairs)})")
        suffix = SUFFIX[self.settings["format"]]
        if resume and item.name and (self.out / f"{item.name}{suffix}").exists():
            return f"{item.name}{suffix}"
        volume = item.read()
        self.model.check(volume)
        name = item.name or f"series_{voxel_hash(volume)}"
        if resume and (self.out / f"{name}{suffix}").exists():
            return f"{name}{suffix}"
        label_XYZ = self._label_map(name, volume)
        self._claim()
        if seg:
            maker = Maker(self.model.plan.labels, self.settings["models"][0][:16])
            write_dicom_seg(self.out / f"{name}{suffix}", label_XYZ, source=item.series[0], maker=maker, more=item.series[1:])
        else:
            write_nifti(self.out / f"{name}{suffix}", label_XYZ, volume.grid, np.uint8)
        return f"{name}{suffix}"

    def _label_map(self, name: str, volume: Volume) -> np.ndarray:
        if not self.settings["probabilities"]:
            return self.model.label_map(volume)
        self._claim()  # shares go to disk while they are made
        with ShareFiles(self.out / "probabilities" / name, volume.grid, self.model.plan.share_channels) as files:
            label_XYZ = self.model.label_map(volume, keep=files.keep)
            files.write()
        return label_XYZ

    def _claim(self) -> None:
        # Nothing is touched before there is something to write.
        if self.claimed:
            return
        claim_out(self.out, **self.claim)
        device = next(self.model.net.parameters()).device
        write_environment(self.out, device=device, precision=self.model.precision, seed=0)
        write_json(self.out / "prediction.json", self.settings)
        self.claimed = True

    def close(self) -> Outcome:
        """Leave the tables. Raises: BadInput: nothing could be segmented."""
        if not self.done:
            if self.claimed:
                shutil.rmtree(self.out / "probabilities", ignore_errors=True)
            told = "\n  ".join(f"{failure['input']}: {failure['reason']}" for failure in self.failures)
            raise BadInput(f"inputs: none of {len(self.failures)} could be segmented:\n  {told}")
        self._claim()
        write_csv(self.out / "predictions.csv", self.done, ("input", "output", "repairs"))
        write_csv(self.out / "failures.csv", self.failures, ("input", "reason"))
        return Outcome(self.out, failed=len(self.failures), message=f"{len(self.done)} label maps")
