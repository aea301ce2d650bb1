"""A bundle's encoder over a scan: features of patches of body, or of every place by a sliding window."""

from __future__ import annotations

import itertools
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from volssl.augment.intensity import zscore
from volssl.compiling import multiplies_bf16
from volssl.draws import generator
from volssl.export.bundle import load_encoder
from volssl.features import write_array, write_member
from volssl.files import BadInput, atomic
from volssl.nets.sides import side_fault
from volssl.patches import to_unit
from volssl.scans import BODY_ABOVE, Scan
from volssl.sliding import importance, starts
from volssl.store import Triple

MIN_BODY = 0.2  # share of body that a patch should hold, as in pretraining
ATTEMPTS = 4  # draws of a patch, of which the first with enough body counts, else the one with most
OVERLAP = 0.5  # of the windows of a map of all places

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder on its device. `level`: which of its maps, 0 for the finest; `patch_vox`: sides of what it is shown at once."""

    net: nn.Module
    card: Mapping[str, Any]
    level: int
    patch_vox: Triple
    device: torch.device
    precision: str
    batch: int

    @property
    def width(self) -> int:
        """Channels of the map."""
        return int(self.net.channels[self.level])  # type: ignore[index]

    @property
    def stride_vox(self) -> Triple:
        """Voxels per place of the map."""
        x, y, z = self.net.strides[self.level]  # type: ignore[index]
        return int(x), int(y), int(z)

    @torch.no_grad()
    def maps(self, boxes: Sequence[np.ndarray], window: tuple[float, float]) -> Tensor:
        """Boxes (C, X, Y, Z) -> the level's maps, float32 (B, D, x, y, z), on the device."""
        x_BCXYZ = to_unit(torch.from_numpy(np.stack(boxes)), window, self.device)
        if self.card["intensity"]["normalisation"] == "zscore":
            x_BCXYZ = zscore(x_BCXYZ)
        x_BCXYZ = x_BCXYZ.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.net(x_BCXYZ)[self.level].float()


def open_encoder(bundle: Path, *, level: str, patch_vox: Triple | None, precision: Precision, batch: int) -> Encoder:
    """The encoder of a bundle, ready to run; on a GPU where there is one.

    Args: level: coarsest, finest, or a number from 0, the finest. patch_vox: None for the largest view of the pretraining.
    Raises: BadInput: no sound bundle, no such level, a patch that the network cannot take.
    """
    net, card = load_encoder(bundle)
    levels = len(net.channels)  # type: ignore[arg-type]
    named = {"finest": 0, "coarsest": levels - 1} | {str(number): number for number in range(levels)}
    if level not in named:
        raise BadInput(f"--level must be coarsest, finest or a number from 0 (the finest) to {levels - 1}; found {level!r}")
    sides = patch_vox or card.get("patch_vox")
    if sides is None:
        raise BadInput("--patch must be given as X,Y,Z: the bundle's card does not say what the encoder was shown")
    sides = (int(sides[0]), int(sides[1]), int(sides[2]))
    norm = getattr(net, "norm", "") if isinstance(getattr(net, "norm", ""), str) else ""
    if (fault := side_fault(sides, net.strides[-1], norm=norm)) is not None:  # type: ignore[index]
        raise BadInput(f"--patch {','.join(map(str, sides))}: {fault}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device=device, memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    chosen = precision if precision != "auto" else "bf16" if multiplies_bf16(device.type) else "fp32"
    return Encoder(net, card, named[level], sides, device, chosen, batch)


@dataclass(frozen=True)
class Patch:
    """A box of a scan: its first voxel, its voxels, and how much of it is body."""

    corner: tuple[int, ...]
    box_CXYZ: np.ndarray
    body_share: float


def patches_of(scan: Scan, patch_vox: Triple, *, drawn: int, seed: int) -> Iterator[Patch]:
    """Patches within the body's box, one after the other.

    Args: drawn: how many are drawn, from (seed, scan) alone; 0 for a grid without overlap (but for the last of a row, which ends with the
        body), of which those with a fifth of body count, or if none has, the one with most.
    """
    if drawn:
        for number in range(drawn):
            yield _drawn(scan, patch_vox, generator(seed, f"embed/{scan.key}", number))
        return
    most: Patch | None = None
    found = False
    for corner in _grid(scan, patch_vox):
        patch = _patch(scan, corner, patch_vox)
        if patch.body_share >= MIN_BODY:
            found = True
            yield patch
        elif not found and (most is None or patch.body_share > most.body_share):
            most = patch
    if not found and most is not None:
        yield most


def _grid(scan: Scan, patch_vox: Triple) -> Iterator[tuple[int, ...]]:
    spans = zip(scan.start, scan.stop, patch_vox, strict=True)
    yield from itertools.product(*([start + at for at in starts(stop - start, side, 0.0)] for start, stop, side in spans))


def _drawn(scan: Scan, patch_vox: Triple, draws: np.random.Generator) -> Patch:
    tries = []
    for _ in range(ATTEMPTS):
        rooms = [(start, stop - start - side) for start, stop, side in zip(scan.start, scan.stop, patch_vox, strict=True)]
        # A body narrower than the patch lies in its middle.
        corner = tuple(start + (int(draws.integers(room + 1)) if room >= 0 else -((-room) // 2)) for start, room in rooms)
        tries.append(_patch(scan, corner, patch_vox))
        if tries[-1].body_share >= MIN_BODY:
            return tries[-1]
    return max(tries, key=lambda patch: patch.body_share)


def _patch(scan: Scan, corner: tuple[int, ...], patch_vox: Triple) -> Patch:
    box_CXYZ = scan.read(corner, patch_vox)
    low, high = scan.window
    share = np.count_nonzero(box_CXYZ > low + BODY_ABOVE * (high - low)) / box_CXYZ.size
    return Patch(corner, box_CXYZ, share)


def features_of(encoder: Encoder, scan: Scan, patches: Iterator[Patch]) -> Iterator[tuple[list[Patch], np.ndarray]]:
    """Patches in batches, each with the means of their maps over the places: float32 (B, D)."""
    while batch := list(itertools.islice(patches, encoder.batch)):
        maps_BDXYZ = encoder.maps([patch.box_CXYZ for patch in batch], scan.window)
        yield batch, maps_BDXYZ.mean((2, 3, 4)).cpu().numpy()


def write_dense(path: Path, encoder: Encoder, scan: Scan, *, unit: bool, told: Mapping[str, np.ndarray]) -> None:
    """Write the map of all places of the body's box as npz: features (D, X, Y, Z), where they lie, and `told`.

    Windows overlap by half and are averaged with Gaussian weights. Sums lie in a file beside it, so memory is that of some windows.
    Args: unit: divide each place's features by their length.
    """
    step, extent = np.array(encoder.stride_vox), np.subtract(scan.stop, scan.start)
    shape = tuple(int(n) for n in -(-extent // step))
    tile = tuple(int(n) for n in np.array(encoder.patch_vox) // step)
    affine = scan.grid.affine.copy()
    affine[:3, 3] = scan.grid.world(np.array([np.array(scan.start) + (step - 1) / 2]))[0]
    affine[:3, :3] *= step
    with atomic(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as raw:
        sums_DXYZ: np.ndarray = np.memmap(raw, np.float32, "w+", shape=(encoder.width, *shape))
        weight_XYZ = _add_windows(sums_DXYZ, encoder, scan, tile)
        length_XYZ = np.maximum(np.sqrt(sum((one / weight_XYZ) ** 2 for one in sums_DXYZ)), 1e-12) if unit else np.float32(1)
        with zipfile.ZipFile(temporary, "w") as packed:
            pieces = (np.ascontiguousarray(one / weight_XYZ / length_XYZ, dtype=np.float32).data for one in sums_DXYZ)
            write_member(packed, "features", sums_DXYZ.shape, pieces)
            places = {"start_vox": np.array(scan.start, np.int32), "stride_vox": step.astype(np.int32), "affine": affine}
            for key, value in {**places, **told}.items():
                write_array(packed, key, value)


def _add_windows(sums_DXYZ: np.ndarray, encoder: Encoder, scan: Scan, tile: tuple[int, ...]) -> np.ndarray:
    # In places of the map: a window's first voxel is a multiple of the stride from the body's.
    shape = sums_DXYZ.shape[1:]
    weight_XYZ, gauss_XYZ = np.zeros(shape, np.float32), importance(tile).numpy()
    corners = itertools.product(*(starts(n, side, OVERLAP) for n, side in zip(shape, tile, strict=True)))
    while few := list(itertools.islice(corners, encoder.batch)):
        voxels = [np.array(scan.start) + np.array(corner) * encoder.stride_vox for corner in few]
        maps = encoder.maps([scan.read(first.tolist(), encoder.patch_vox) for first in voxels], scan.window).cpu().numpy()
        for corner, map_DXYZ in zip(few, maps, strict=True):
            there = tuple(slice(max(0, a), min(n, a + side)) for a, side, n in zip(corner, tile, shape, strict=True))
            here = tuple(slice(part.start - a, part.stop - a) for part, a in zip(there, corner, strict=True))
            sums_DXYZ[(slice(None), *there)] += map_DXYZ[(slice(None), *here)] * gauss_XYZ[here]
            weight_XYZ[there] += gauss_XYZ[here]
    return weight_XYZ
