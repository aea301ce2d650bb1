"""The bundle: encoder.safetensors, card.json and a model card; loaded by name, all or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from volssl.files import BadInput, atomic, read_json, sha256, write_json, write_text
from volssl.recipe import arguments, find

SCHEMA = 1


@dataclass(frozen=True)
class Bundle:
    """An encoder's weights by name, and the card that says what they are and how voxels must be prepared for them."""

    state: dict[str, Tensor]
    card: dict[str, Any]


@dataclass(frozen=True)
class Card:
    """What a bundle says about itself; holds no identifier, path or date of a scan.

    Attributes:
        architecture: {"name", "arguments"} of `volssl.nets`. spacing_mm, orientation: of the voxels the encoder saw.
        intensity: {"modality", "clip", "window", "normalisation"}: stored values, those that map to [0, 1], and what follows.
    """

    architecture: dict[str, Any]
    in_channels: int
    spacing_mm: tuple[float, float, float]
    orientation: str
    intensity: dict[str, Any]
    method: str
    recipe: dict[str, Any]
    steps: int
    data: dict[str, int]
    volssl_version: str
    citations: tuple[str, ...]
    licence: str = "The weights carry the terms of the data they were trained on; volssl itself is Apache-2.0."


def write(folder: Path, encoder: nn.Module, card: Card) -> Path:
    """Write a bundle into `folder` and prove that it loads. The card goes last, so a folder without one is no bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    state = encoder.state_dict()
    weights = folder / "encoder.safetensors"
    (folder / "card.json").unlink(missing_ok=True)
    save_tensors(weights, state)
    content = {"schema": SCHEMA, **dataclasses.asdict(card), "sha256": sha256(weights)}
    write_text(folder / "README.md", _model_card(content))
    write_json(folder / "card.json", content)
    loaded, _ = load_encoder(folder)
    for name, tensor in loaded.state_dict().items():
        if not torch.equal(tensor, state[name].cpu()):
            raise AssertionError(f"bundle tensor {name} was not read back as written")
    return folder


def prove(encoder: nn.Module, card: Card) -> None:
    """Write the bundle of an untrained encoder to a temporary folder and load it: a week's run must not end in weights nobody can load."""
    with tempfile.TemporaryDirectory(prefix="volssl-") as folder:
        write(Path(folder) / "bundle", encoder, card)


def load_bundle(folder: Path | str) -> Bundle:
    """Read and check a bundle; nothing in it is executed.

    Raises: BadInput: not a bundle, a newer schema, a damaged or changed weights file.
    """
    folder = Path(folder)
    if (folder / "bundle" / "card.json").exists():
        folder = folder / "bundle"
    if not (folder / "card.json").exists():
        raise BadInput(
            f"weights {folder}: must be a bundle (a folder with card.json and encoder.safetensors) or a run that wrote one; found neither"
        )
    card = read_json(folder / "card.json")
    if not isinstance(card, dict) or not isinstance(card.get("schema"), int):
        raise BadInput(f"{folder}/card.json: must be a mapping with an integer `schema`")
    if card["schema"] > SCHEMA:
        raise BadInput(f"{folder}/card.json: schema must be at most {SCHEMA}; found {card['schema']}; update volssl")
    weights = folder / "encoder.safetensors"
    if not weights.exists():
        raise BadInput(f"{weights}: must exist beside card.json; found nothing there")
    if sha256(weights) != card.get("sha256"):
        raise BadInput(
            f"{weights}: must be the file its card was written for (sha256 {card.get('sha256')}); found another; export it again"
        )
    return Bundle(load_tensors(weights), card)


def save_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name as a safetensors file, atomically."""
    # By way of memory: the plain write answers a full disk with the system's own word.
    packed = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    with atomic(path) as temporary:
        temporary.write_bytes(packed)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises: BadInput: if it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: must be a safetensors file; {error}") from None


def load_encoder(folder: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The torch module of a bundle and its card: `encoder(x_BCXYZ)` gives the list of feature maps, finest first."""
    bundle = load_bundle(folder)
    architecture = bundle.card["architecture"]
    net_class = find("nets", architecture["name"])
    net = net_class(**arguments(net_class, architecture["arguments"], "card.json architecture"))
    into(net.encoder, bundle)
    return net.encoder.eval(), bundle.card


def export(source: Path, out: Path) -> None:
    """Copy the bundle that lies in or at `source` into the empty folder `out`; both are proven to load."""
    load_encoder(source)
    folder = source / "bundle" if (source / "bundle" / "card.json").exists() else source
    for name in ("encoder.safetensors", "README.md", "card.json"):
        with atomic(out / name) as temporary:
            shutil.copyfile(folder / name, temporary)
    load_encoder(out)


def into(encoder: nn.Module, bundle: Bundle) -> None:
    """Load the bundle's tensors into `encoder` by name, all or nothing.

    The first convolution is adapted to more input channels: its kernel is repeated and divided
    by their number, so that an input with equal channels gives the same activations.

    Raises: BadInput: with the full list of missing, left-over and misshapen tensors; the encoder is then unchanged.
    """
    target = encoder.state_dict()
    given = _widened(bundle.state, target)
    faults = [f"missing in the bundle: {name} {tuple(target[name].shape)}" for name in target if name not in given]
    faults += [f"left over in the bundle: {name} {tuple(given[name].shape)}" for name in given if name not in target]
    faults += [
        f"misshapen: {name}, bundle {tuple(given[name].shape)}, network {tuple(target[name].shape)}"
        for name in target
        if name in given and given[name].shape != target[name].shape
    ]
    if faults:
        raise BadInput(
            f"the bundle (architecture {json.dumps(bundle.card.get('architecture'))}) does not fit this encoder: {len(faults)} of "
            f"{len(target)} tensors; choose the same net in the recipe:\n  " + "\n  ".join(faults)
        )
    encoder.load_state_dict(given, strict=True)


def _widened(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    # The first convolution in the network's own order is the one that reads the input (a folded one reads 8 channels per input channel,
    # those of one input channel together, so that repeating the whole kernel is right for it too).
    first = next((name for name, tensor in target.items() if tensor.ndim == 5), None)
    if first is None or first not in state:
        return state
    tensor, wanted = state[first], target[first]
    same_otherwise = tensor.ndim == 5 and tensor.shape[0] == wanted.shape[0] and tensor.shape[2:] == wanted.shape[2:]
    if not same_otherwise or wanted.shape[1] % tensor.shape[1]:
        return state
    times = wanted.shape[1] // tensor.shape[1]
    return state | {first: tensor.repeat(1, times, 1, 1, 1) / times}


def _model_card(card: dict[str, Any]) -> str:
    sides = " x ".join(f"{s:g}" for s in card["spacing_mm"])
    return f"""---
library_name: volssl
tags: [medical-imaging, self-supervised, 3d, {card["intensity"]["modality"].lower()}]
---
# Encoder pretrained with {card["method"]}

- Architecture: `{json.dumps(card["architecture"])}`, {card["in_channels"]} input channel(s)
- Voxels: {card["orientation"]}, {sides} mm; intensity `{json.dumps(card["intensity"])}`
- Training: {card["steps"]} steps on {card["data"].get("train_scans", 0)} scans of {card["data"].get("train_patients", 0)} patients
- Weights: sha256 `{card["sha256"]}`, volssl {card["volssl_version"]}

```python
from volssl import load_encoder
encoder, card = load_encoder("bundle")
features = encoder(x_BCXYZ)  # list of feature maps, finest first
```

Cite: {"; ".join(card["citations"])}

{card["licence"]}
"""
