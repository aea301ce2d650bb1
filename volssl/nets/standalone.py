"""Networks by the names of their backbones, and what stands around them, for programs that have torch and MONAI but not volssl.

`export/monai.py` copies this file into a bundle, with those it imports from here; there they lie side by side in `scripts/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volssl.nets.heads import SegmentationNet
from volssl.normalise import Normalisation, normalise
from volssl.targets import THRESHOLD, written

IMAGES = (".nii.gz", ".nii", ".mha", ".nrrd")


def backbone(name: str, arguments: Mapping[str, Any], *, skips: bool) -> Any:
    """The untrained backbone of a file beside this one."""
    module = import_module(f"{__package__}.{name}")
    return getattr(module, module.RECIPE_NAME)(**arguments, skips=skips)


class EncoderNetwork(nn.Module):
    """A pretrained encoder: `net(x)` is its coarsest feature map, `net.encoder(x)` the list of all, finest first.

    Args: name, arguments: of the backbone. zscore: each patch and channel is brought to mean 0 and standard deviation 1 first.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], *, zscore: bool = False) -> None:
        super().__init__()
        self.encoder = backbone(name, arguments, skips=False).encoder
        self.zscore = zscore

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, D, X / s, Y / s, Z / s) at the encoder's last stride s."""
        return self.encoder(_zscore(x_BCXYZ) if self.zscore else x_BCXYZ)[-1]


class SegmentationNetwork(nn.Module):
    """A fine-tuned network: patch -> logits.

    Args: name, arguments: of the backbone. out_channels: classes with background, or regions. deep_supervision: as it was trained.
        zscore: see `EncoderNetwork`.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, Any], *, out_channels: int, deep_supervision: bool = False, zscore: bool = False
    ) -> None:
        super().__init__()
        self.net = SegmentationNet(backbone(name, arguments, skips=True), out_channels, deep_supervision=deep_supervision)
        self.zscore = zscore

    def forward(self, x_BCXYZ: Tensor) -> Tensor | list[Tensor]:
        """(B, C, X, Y, Z) -> logits (B, K, X, Y, Z); with deep supervision in training mode their list, finest first."""
        return self.net(_zscore(x_BCXYZ) if self.zscore else x_BCXYZ)


def _zscore(x_BCXYZ: Tensor) -> Tensor:
    # As volssl.augment.intensity.zscore, which a bundle does not carry; a test holds them together.
    return F.layer_norm(x_BCXYZ.flatten(2), (x_BCXYZ[0, 0].numel(),), eps=1e-8).view(x_BCXYZ.shape)


class Shares(nn.Module):
    """Logits -> shares in [0, 1]: what is averaged over windows and flips, and interpolated onto the image's grid.

    Args: network: patch -> logits. regions: sigmoid of each channel instead of softmax. flips: axes whose mirror images count too.
    """

    def __init__(self, network: nn.Module, *, regions: bool, flips: Sequence[bool] = (False, False, False)) -> None:
        super().__init__()
        self.network, self.regions = network, regions
        axes = [2 + axis for axis, flip in enumerate(flips) if flip]
        self.mirrors = [[axis for bit, axis in enumerate(axes) if number >> bit & 1] for number in range(2 ** len(axes))]

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
        total = torch.zeros(())
        for mirror in self.mirrors:
            logits = self.network(x_BCXYZ.flip(mirror)).float()
            total = total.to(logits.device) + (logits.sigmoid() if self.regions else logits.softmax(1)).flip(mirror)
        return total / len(self.mirrors)


class Normalise:
    """Intensities of an image (C, X, Y, Z), each channel by itself; see `normalise`."""

    def __init__(self, how: Normalisation, *, window: Sequence[float] = (0.0, 1.0), nonzero: bool = False) -> None:
        self.how: Normalisation = how
        self.window, self.nonzero = (float(window[0]), float(window[1])), nonzero

    def __call__(self, x_CXYZ: Tensor) -> Tensor:
        """A normalised copy that keeps what MONAI notes beside the voxels."""
        array_CXYZ = x_CXYZ.cpu().numpy().astype(np.float32)
        for channel_XYZ in array_CXYZ:
            normalise(channel_XYZ, self.how, window=self.window, nonzero=self.nonzero)
        made = x_CXYZ.clone().float()
        made.copy_(torch.from_numpy(array_CXYZ))
        return made


class Decide:
    """Shares (K, X, Y, Z) -> label values (1, X, Y, Z): the largest class, or region by region where a share is at least a half."""

    def __init__(self, *, values: Sequence[int], regions: Mapping[str, Sequence[int]] | None = None) -> None:
        self.values, self.regions = list(values), dict(regions or {})

    def __call__(self, shares_KXYZ: Tensor) -> Tensor:
        """uint8, with what MONAI notes beside the voxels."""
        if self.regions:
            label_XYZ = written((shares_KXYZ >= THRESHOLD).cpu().numpy(), self.regions)
        else:
            label_XYZ = np.array(self.values, dtype=np.uint8)[np.asarray(shares_KXYZ.argmax(0).cpu())]
        made = shares_KXYZ[:1].clone().to(torch.uint8)
        made.copy_(torch.from_numpy(label_XYZ[None]))
        return made


def cases(folder: str, channels: int) -> list[dict[str, Any]]:
    """The images of a folder as MONAI's list of data: files of all channels, or `<case>_0000.nii.gz`, `<case>_0001.nii.gz`, ... ."""
    files = [path for path in sorted(Path(folder).iterdir()) if path.name.endswith(IMAGES)]
    if channels == 1:
        return [{"image": str(path)} for path in files]
    firsts = [path for path in files if "_0000." in path.name]
    return [{"image": [str(path).replace("_0000.", f"_{channel:04d}.") for channel in range(channels)]} for path in firsts]


def weighted(network: nn.Module, path: str) -> nn.Module:
    """The network with the weights of a file, all of them by name."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return network.eval()


@torch.no_grad()
def run(
    items: Sequence[Mapping[str, Any]], network: nn.Module, *, prepare: Any, inferer: Any, finish: Any, key: Literal["pred", "features"]
) -> int:
    """Take each image through preparation, sliding window and what follows; gives how many there were.

    Args: prepare, finish: MONAI's transforms of a dictionary. key: under which `finish` finds the result, without a batch axis.
    """
    device = next(network.parameters()).device
    for item in items:
        data = prepare(dict(item))
        data[key] = inferer(data["image"][None].to(device), network)[0].cpu()
        finish(data)
    return len(items)


def save_features(folder: str) -> Any:
    """What ends a run of an encoder: its coarsest map as `<folder>/<number>.npy`, numbered in the order of the images."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)

    def finish(data: Mapping[str, Any]) -> None:
        np.save(target / f"{len(list(target.glob('*.npy'))):04d}.npy", np.asarray(data["features"]))

    return finish
