"""What fine-tuning and prediction share: image -> the network's grid and intensities, sliding window, and back to the image's own grid.

A model on disk is `model.safetensors` and `model.json` in a run's folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import volssl
from volssl.compiling import multiplies_bf16
from volssl.components import Cleaning
from volssl.files import BadInput, read_json, sha256, write_json
from volssl.nets.heads import SegmentationNet
from volssl.preparation import Preparation
from volssl.recipe import arguments, find
from volssl.resample import Part as Box
from volssl.resample import streamed
from volssl.sliding import Windows, largest, slab_axis, slabs
from volssl.targets import THRESHOLD, check_regions, targets_of, written
from volssl.tensors import load_tensors, save_tensors
from volssl.volume import Grid, Volume

SCHEMA = 2  # of model.json; 1 had no regions and is read as it was
Run = tuple[int, int, Tensor]  # first plane, plane after the last, shares


def onto_original(runs: Iterable[Run], seen: Grid, original: Grid) -> Iterator[tuple[Box, Tensor]]:
    """Shares on the network's grid, as they come -> shares on the image's own grid turned to RAS+, a part at a time.

    Shares, not finished labels, are interpolated: contours between voxels survive, which moving a finished map by nearest voxel would turn
    into steps. Args: runs: first plane of `sliding.slab_axis`, plane after the last, shares (K, X, Y, Z). seen: the network's grid.
    """
    turned, axis = original.reoriented("RAS"), slab_axis(seen.shape_vox)
    if not seen.almost_equal(turned):
        arrays = ((first, stop, shares_KXYZ.cpu().numpy()) for first, stop, shares_KXYZ in runs)
        moved = streamed(arrays, seen, turned, axis=axis)
        runs = ((first, stop, torch.from_numpy(shares_KXYZ)) for first, stop, shares_KXYZ in moved)
    for first, stop, shares_KXYZ in runs:
        x, y, z = (slice(first, stop) if at == axis else slice(None) for at in range(3))
        yield (x, y, z), shares_KXYZ


@dataclass(frozen=True)
class Inference:
    """Sliding window.

    Attributes:
        overlap: share two neighbours have in common. flips: axes whose mirror images count too. batch: windows at once.
        precision: of the network; auto is bf16 where the device multiplies it, else fp32. Shares are summed in fp32.
        skip_air: with normalisation `window`, windows that lie as a whole at or below the lowest value of it count as background without
            being looked at: the network would see nothing but zeros.
    """

    overlap: float = 0.5
    flips: tuple[bool, bool, bool] = (False, False, False)
    batch: int = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    skip_air: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1 or self.batch < 1:
            raise BadInput(f"overlap in [0, 1) and batch >= 1 must hold; found {self.overlap}, {self.batch}")


@dataclass(frozen=True)
class Plan:
    """All that model.json says: what rebuilds the network, and what stands around it.

    Attributes:
        architecture: {"name", "arguments"} of `volssl.nets`. labels: name -> value. channels: names. patch_vox: the window.
        regions: name -> label values, from the largest to the smallest. Where there are any, the network has one sigmoid channel for each
            and none for background, see `volssl.targets`; else a softmax over background and the labels.
        cleaning: what is done to the finished label map.
    Raises: BadInput: regions that do not go with the labels, or cleaning of what is not there.
    """

    architecture: dict[str, Any]
    labels: dict[str, int]
    channels: tuple[str, ...]
    patch_vox: tuple[int, int, int]
    deep_supervision: bool = False
    preparation: Preparation = field(default_factory=Preparation)
    inference: Inference = field(default_factory=Inference)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cleaning: Cleaning = field(default_factory=Cleaning)

    def __post_init__(self) -> None:
        check_regions(self.labels, self.regions)
        self.cleaning.check(self.targets, self.labels)

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """name -> label values of what is segmented, see `targets_of`."""
        return targets_of(self.labels, self.regions)

    @property
    def values(self) -> list[int]:
        """Label value of each class index; class 0 is background."""
        return [0, *sorted(self.labels.values())]

    @property
    def outputs(self) -> int:
        """Channels of the network's logits: the regions, or background and the labels."""
        return len(self.regions) or len(self.values)

    @property
    def share_channels(self) -> dict[str, int]:
        """Name of each region, or of each label -> its channel of the shares."""
        if self.regions:
            return {name: channel for channel, name in enumerate(self.regions)}
        return {name: self.values.index(value) for name, value in self.labels.items()}

    @property
    def background(self) -> list[float]:
        """The shares of a voxel that is certainly in no label."""
        return [0.0] * len(self.regions) or [1.0, *(0.0 for _ in self.labels)]

    def shares(self, logits_BKXYZ: Tensor) -> Tensor:
        """Logits -> shares in [0, 1], float32: of each region by itself, or of all classes together."""
        logits_BKXYZ = logits_BKXYZ.float().contiguous()
        return logits_BKXYZ.sigmoid() if self.regions else logits_BKXYZ.softmax(1)

    def decide(self, shares_KXYZ: Tensor) -> np.ndarray:
        """Shares -> label values, uint8 (X, Y, Z): region by region where a share is at least a half, or the class of the largest."""
        if self.regions:
            return written((shares_KXYZ >= THRESHOLD).cpu().numpy(), self.regions)
        return np.array(self.values, dtype=np.uint8)[largest(shares_KXYZ).cpu().numpy()]

    def cleaned(self, label_XYZ: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
        """A finished label map after the plan's cleaning."""
        return self.cleaning.apply(label_XYZ, targets=self.targets, labels=self.labels, spacing_mm=spacing_mm)

    def network(self) -> SegmentationNet:
        """The untrained network."""
        net_class = find("nets", self.architecture["name"])
        net = net_class(**arguments(net_class, self.architecture["arguments"], "architecture"), skips=True)
        return SegmentationNet(net, self.outputs, deep_supervision=self.deep_supervision)


@dataclass(frozen=True)
class Model:
    """A trained network and its plan. `others`: networks of the same plan, such as those of other folds; the mean of the shares counts."""

    plan: Plan
    net: SegmentationNet
    others: tuple[SegmentationNet, ...] = ()

    def label_map(self, volume: Volume, *, keep: Callable[[Box, Tensor], None] | None = None) -> np.ndarray:
        """Label values on the volume's own grid, uint8, shape XYZ.

        Args: keep: given the shares (K, X, Y, Z) of each part of the grid turned to RAS+; they are never held all at once.
        Raises: BadInput: another number of channels than the model's.
        """
        label_XYZ = np.zeros(volume.grid.shape_vox, dtype=np.uint8)
        turned_XYZ = Volume(label_XYZ[None], volume.grid).reoriented("RAS").array_CXYZ[0]  # a view
        for box, shares_KXYZ in self.shares(volume, averaged=keep is not None):
            turned_XYZ[box] = self.plan.decide(shares_KXYZ)
            if keep is not None:
                keep(box, shares_KXYZ)
        return self.plan.cleaned(label_XYZ, volume.grid.spacing_mm)

    def shares(self, volume: Volume, *, averaged: bool = True) -> Iterator[tuple[Box, Tensor]]:
        """Shares (classes or regions, X, Y, Z) on the volume's own grid turned to RAS+, a part at a time, each valid until the next:
        sliding window with Gaussian blending, mean over the flips and the networks.

        Args: averaged: False allows multiples of the shares, from which `Plan.decide` makes the same of labels.
        """
        self.check(volume)
        inference, turned = self.plan.inference, volume.grid.reoriented("RAS")
        prepared = self.plan.preparation.image(volume)
        runs = slabs(
            torch.from_numpy(np.ascontiguousarray(prepared.array_CXYZ)),
            self._window,
            Windows(self.plan.patch_vox, inference.overlap, inference.batch, next(self.net.parameters()).device),
            empty_C=self.plan.background,
            air=0.0 if inference.skip_air and self.plan.preparation.normalisation == "window" else None,
            averaged=averaged or bool(self.plan.regions) or not prepared.grid.almost_equal(turned),
        )
        with _evaluating((self.net, *self.others)):
            yield from onto_original(runs, prepared.grid, volume.grid)

    def check(self, volume: Volume) -> None:
        """Raises: BadInput: another number of channels than the model's."""
        if len(volume.array_CXYZ) != len(self.plan.channels):
            raise BadInput(
                f"image must have {len(self.plan.channels)} channel(s): {', '.join(self.plan.channels)}; found {len(volume.array_CXYZ)}"
            )

    @torch.no_grad()
    def _window(self, x_BCXYZ: Tensor) -> Tensor:
        x_BCXYZ = self.plan.preparation.patch(x_BCXYZ).contiguous(memory_format=torch.channels_last_3d)
        choices = [(False, True) if flip else (False,) for flip in self.plan.inference.flips]
        nets = (self.net, *self.others)
        total: Tensor | None = None
        for net, chosen in itertools.product(nets, itertools.product(*choices)):
            axes = [2 + axis for axis, flip in enumerate(chosen) if flip]
            with torch.autocast(x_BCXYZ.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = net(x_BCXYZ.flip(axes))
            shares = self.plan.shares(logits).flip(axes)
            total = shares if total is None else total + shares
        assert total is not None
        return total / (len(nets) * 2 ** sum(self.plan.inference.flips))

    @property
    def precision(self) -> str:
        """What the plan's precision is on this device: fp32 or bf16."""
        asked = self.plan.inference.precision
        return asked if asked != "auto" else "bf16" if multiplies_bf16(next(self.net.parameters()).device.type) else "fp32"


@contextmanager
def _evaluating(nets: Sequence[SegmentationNet]) -> Iterator[None]:
    were_training = [net.training for net in nets]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for net, was in zip(nets, were_training, strict=True):
            net.train(was)


def write_model(run: Path, model: Model) -> None:
    """Write model.safetensors and, last, model.json; the folder then holds a whole model."""
    weights = run / "model.safetensors"
    save_tensors(weights, model.net.state_dict())
    write_json(
        run / "model.json", {"schema": SCHEMA, "volssl_version": volssl.__version__, **asdict(model.plan), "sha256": sha256(weights)}
    )


def read_model(run: Path, device: torch.device | str = "cpu") -> Model:
    """Read the model of a finetune run. Raises: BadInput: none there, a newer schema, a changed or unfitting weights file."""
    if not (run / "model.json").exists():
        raise BadInput(f"run {run}: must be a finished finetune run with model.json; found none; train it, or continue it with --resume")
    values = read_json(run / "model.json")
    schema = values.pop("schema", None)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise BadInput(f"{run}/model.json: schema must be a whole number up to {SCHEMA}; found {schema}; update volssl")
    digest, _ = values.pop("sha256", None), values.pop("volssl_version", None)
    weights = run / "model.safetensors"
    if not weights.exists() or sha256(weights) != digest:
        raise BadInput(
            f"{weights}: must be the file model.json was written for; found {'another' if weights.exists() else 'nothing there'}"
        )
    plan = Plan(**arguments(Plan, values, "model.json"))
    net = plan.network()
    try:
        net.load_state_dict(load_tensors(weights), strict=True)
    except RuntimeError as error:
        raise BadInput(f"{weights}: must fit the network of model.json; {error}") from None
    net.to(device=device, memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    return Model(plan, net.eval())


def read_ensemble(
    runs: Sequence[Path], device: torch.device | str = "cpu", *, read: Callable[[Path, torch.device | str], Model] = read_model
) -> Model:
    """Read the models of several runs as one, whose shares are the mean of theirs. `read`: gives the model of one.

    Raises: BadInput: as `read`; runs that differ in more than their networks.
    """
    first, *others = (read(run, device) for run in runs)
    told = [
        f"{run}: {one.name} must be that of the first run, {getattr(first.plan, one.name)}; found {getattr(other.plan, one.name)}"
        for run, other in zip(runs[1:], others, strict=True)
        for one in fields(Plan)
        if one.name not in ("architecture", "deep_supervision") and getattr(other.plan, one.name) != getattr(first.plan, one.name)
    ]
    if told:
        raise BadInput("--ensemble: runs must have been trained alike, such as the folds of one recipe:\n  " + "\n  ".join(told))
    return replace(first, others=tuple(other.net for other in others))
