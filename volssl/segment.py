"""What fine-tuning and prediction share: image -> the network's grid and intensities, sliding window, and back to the image's own grid.

A model on disk is `model.safetensors` and `model.json` in a run's folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

import volssl
from volssl.augment.intensity import zscore
from volssl.export.bundle import load_tensors, save_tensors
from volssl.files import BadInput, read_json, sha256, write_json
from volssl.nets.heads import SegmentationNet
from volssl.recipe import arguments, find
from volssl.resample import resample
from volssl.targets import THRESHOLD, check_regions, written
from volssl.volume import Grid, Volume

SCHEMA = 2  # of model.json; 1 had no regions and is read as it was
PERCENTILES = (0.5, 99.5)  # robust lowest and highest value, as nnU-Net clips


@dataclass(frozen=True)
class Preparation:
    """How an image is brought to what the network sees. Always RAS+.

    Attributes:
        spacing_mm: of the network's voxels; null keeps each image's own.
        normalisation: window maps `window` (HU) to [0, 1] and clips, for CT; percentile maps the 0.5 and 99.5 % quantiles of the image to
            [0, 1] and clips, for MR; zscore clips to the same quantiles, then subtracts the mean and divides by the standard deviation.
            Each per channel; `nonzero` leaves the voxels at exactly 0 out of the statistics (skull-stripped MR).
        patches: zscore normalises each patch once more, as PCRLv2's encoder was trained.
    """

    spacing_mm: tuple[float, float, float] | None = None
    normalisation: Literal["window", "percentile", "zscore"] = "window"
    window: tuple[float, float] = (-1000.0, 1000.0)
    nonzero: bool = False
    patches: Literal["none", "zscore"] = "none"

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise BadInput(f"spacing_mm must be > 0; found {self.spacing_mm}")
        if self.window[0] >= self.window[1]:
            raise BadInput(f"window must be [low, high] with low < high; found {self.window}")

    def grid(self, original: Grid) -> Grid:
        """The network's grid for an image's grid."""
        turned = original.reoriented("RAS")
        return turned if self.spacing_mm is None else turned.resampled(self.spacing_mm)

    def image(self, volume: Volume) -> Volume:
        """The image as the network sees it, float32."""
        turned = volume.reoriented("RAS")
        moved = self._onto(turned, order="linear", fill=float(turned.array_CXYZ.min()))
        channels = [self._normalised(channel.astype(np.float32)) for channel in moved.array_CXYZ]
        return Volume(np.stack(channels), moved.grid)

    def label(self, volume: Volume) -> Volume:
        """The label map on the network's grid (nearest), uint8."""
        moved = self._onto(volume.reoriented("RAS"), order="nearest", fill=0.0)
        return Volume(np.ascontiguousarray(moved.array_CXYZ, dtype=np.uint8), moved.grid)

    def _onto(self, turned: Volume, *, order: Literal["linear", "nearest"], fill: float) -> Volume:
        grid = self.grid(turned.grid)
        return turned if grid.almost_equal(turned.grid) else resample(turned, grid, order=order, fill=fill)

    def _normalised(self, channel_XYZ: np.ndarray) -> np.ndarray:
        if self.normalisation == "window":
            low, high = self.window
            return ((channel_XYZ - low) / (high - low)).clip(0, 1)
        counted = channel_XYZ[channel_XYZ != 0] if self.nonzero else channel_XYZ.ravel()
        if counted.size == 0:
            return np.zeros_like(channel_XYZ)
        low, high = (float(value) for value in np.percentile(counted, PERCENTILES))
        clipped = channel_XYZ.clip(low, high)
        if self.normalisation == "percentile":
            return (clipped - low) / max(high - low, 1e-6)
        counted = counted.clip(low, high)
        return (clipped - float(counted.mean(dtype=np.float64))) / max(float(counted.std(dtype=np.float64)), 1e-6)

    def patch(self, x_BCXYZ: Tensor) -> Tensor:
        """What happens to a patch right before the network."""
        return zscore(x_BCXYZ) if self.patches == "zscore" else x_BCXYZ


def onto_original(shares: Volume, original: Grid, *, decide: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Shares on the network's grid -> label map on the image's own grid, uint8, shape XYZ.

    Shares are interpolated before labels are decided: contours between voxels survive, which moving a finished map by nearest voxel
    would turn into steps. Args: decide: shares (K, X, Y, Z) -> labels (X, Y, Z), such as `Plan.decide`.
    """
    turned = original.reoriented("RAS")
    if not shares.grid.almost_equal(turned):
        shares = resample(shares, turned, order="linear", fill=0.0)
    label = Volume(decide(shares.array_CXYZ)[None], turned)
    return np.ascontiguousarray(label.reoriented(original.orientation).array_CXYZ[0])


@dataclass(frozen=True)
class Inference:
    """Sliding window. overlap: share two neighbours have in common. flips: axes whose mirror images count too. batch: windows at once."""

    overlap: float = 0.5
    flips: tuple[bool, bool, bool] = (False, False, False)
    batch: int = 2

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
    Raises: BadInput: regions that do not go with the labels.
    """

    architecture: dict[str, Any]
    labels: dict[str, int]
    channels: tuple[str, ...]
    patch_vox: tuple[int, int, int]
    deep_supervision: bool = False
    preparation: Preparation = field(default_factory=Preparation)
    inference: Inference = field(default_factory=Inference)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_regions(self.labels, self.regions)

    @property
    def values(self) -> list[int]:
        """Label value of each class index; class 0 is background."""
        return [0, *sorted(self.labels.values())]

    @property
    def outputs(self) -> int:
        """Channels of the network's logits: the regions, or background and the labels."""
        return len(self.regions) or len(self.values)

    def shares(self, logits_BKXYZ: Tensor) -> Tensor:
        """Logits -> shares in [0, 1], float32: of each region by itself, or of all classes together."""
        return logits_BKXYZ.float().sigmoid() if self.regions else logits_BKXYZ.float().softmax(1)

    def decide(self, shares_KXYZ: np.ndarray) -> np.ndarray:
        """Shares -> label values, uint8 (X, Y, Z): region by region where a share is at least a half, or the class of the largest."""
        if self.regions:
            return written(shares_KXYZ >= THRESHOLD, self.regions)
        return np.array(self.values, dtype=np.uint8)[shares_KXYZ.argmax(0)]

    def network(self) -> SegmentationNet:
        """The untrained network."""
        net_class = find("nets", self.architecture["name"])
        net = net_class(**arguments(net_class, self.architecture["arguments"], "architecture"), skips=True)
        return SegmentationNet(net, self.outputs, deep_supervision=self.deep_supervision)


@dataclass(frozen=True)
class Model:
    """A trained network and its plan."""

    plan: Plan
    net: SegmentationNet

    def label_map(self, volume: Volume) -> np.ndarray:
        """Label values on the volume's own grid, uint8, shape XYZ. Raises: BadInput: another number of channels than the model's."""
        if len(volume.array_CXYZ) != len(self.plan.channels):
            raise BadInput(
                f"image must have {len(self.plan.channels)} channel(s): {', '.join(self.plan.channels)}; found {len(volume.array_CXYZ)}"
            )
        prepared = self.plan.preparation.image(volume)
        shares = Volume(self.shares(prepared.array_CXYZ), prepared.grid)
        return onto_original(shares, volume.grid, decide=self.plan.decide)

    @torch.no_grad()
    def shares(self, array_CXYZ: np.ndarray) -> np.ndarray:
        """Shares (classes or regions, X, Y, Z) of a prepared image: sliding window with Gaussian blending, mean over the flips."""
        device = next(self.net.parameters()).device
        x_BCXYZ = torch.from_numpy(np.ascontiguousarray(array_CXYZ))[None].to(device)
        was_training = self.net.training
        self.net.eval()
        result = sliding_window_inference(
            x_BCXYZ,
            roi_size=self.plan.patch_vox,
            sw_batch_size=self.plan.inference.batch,
            predictor=self._window,
            overlap=self.plan.inference.overlap,
            mode="gaussian",
        )
        self.net.train(was_training)
        assert isinstance(result, Tensor)
        return result[0].float().cpu().numpy()

    def _window(self, x_BCXYZ: Tensor) -> Tensor:
        x_BCXYZ = self.plan.preparation.patch(x_BCXYZ).contiguous(memory_format=torch.channels_last_3d)
        choices = [(False, True) if flip else (False,) for flip in self.plan.inference.flips]
        total: Tensor | None = None
        for chosen in itertools.product(*choices):
            axes = [2 + axis for axis, flip in enumerate(chosen) if flip]
            shares = self.plan.shares(self.net(x_BCXYZ.flip(axes))).flip(axes)
            total = shares if total is None else total + shares
        assert total is not None
        return total / len(list(itertools.product(*choices)))


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
