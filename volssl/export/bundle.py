"""The bundle: encoder.safetensors, decoder.safetensors, card.json and a model card; loaded by name, all or nothing.

The decoder's file is optional: a bundle without one is an encoder alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from volssl.files import BadInput, atomic, read_json, sha256, write_json, write_text
from volssl.recipe import arguments, find

SCHEMA = 1
ENCODER, DECODER = "encoder.safetensors", "decoder.safetensors"
NetPart = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Bundle:
    """Weights by name, and the card that says what they are and how voxels must be prepared for them.

    Attributes: state: of the encoder. decoder: of the decoder, or None if the bundle holds none.
    """

    state: dict[str, Tensor]
    card: dict[str, Any]
    decoder: dict[str, Tensor] | None = None


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


def write(folder: Path, encoder: nn.Module, card: Card, *, decoder: nn.Module | None = None) -> Path:
    """Write a bundle into `folder` and prove that it loads. The card goes last, so a folder without one is no bundle.

    Args: decoder: a backbone's decoder, with the attribute `skips`; None leaves it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").unlink(missing_ok=True)
    (folder / DECODER).unlink(missing_ok=True)
    save_tensors(folder / ENCODER, encoder.state_dict())
    content = {"schema": SCHEMA, **dataclasses.asdict(card), "sha256": sha256(folder / ENCODER)}
    if decoder is not None:
        save_tensors(folder / DECODER, decoder.state_dict())
        content["decoder"] = {"skips": bool(decoder.skips), "sha256": sha256(folder / DECODER)}
    write_text(folder / "README.md", _model_card(content))
    write_json(folder / "card.json", content)
    _read_back(load_encoder(folder)[0], encoder)
    if decoder is not None:
        _read_back(load_decoder(folder)[0], decoder)
    return folder


def _read_back(loaded: nn.Module, written: nn.Module) -> None:
    state = written.state_dict()
    for name, tensor in loaded.state_dict().items():
        if not torch.equal(tensor, state[name].cpu()):
            raise AssertionError(f"bundle tensor {name} was not read back as written")


def prove(encoder: nn.Module, card: Card, *, decoder: nn.Module | None = None) -> None:
    """Write the bundle of an untrained net to a temporary folder and load it: a week's run must not end in weights nobody can load."""
    with tempfile.TemporaryDirectory(prefix="volssl-") as folder:
        write(Path(folder) / "bundle", encoder, card, decoder=decoder)


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
    about = card.get("decoder")
    if about is None and (folder / DECODER).exists():
        raise BadInput(f"{folder / DECODER}: card.json must name its sha256 under `decoder`; found no such entry; export it again")
    if about is not None and not (isinstance(about, dict) and {"skips", "sha256"} <= about.keys()):
        raise BadInput(f"{folder}/card.json: `decoder` must hold `skips` and `sha256`; found {about!r}; export it again")
    decoder = _vouched(folder / DECODER, about["sha256"]) if about is not None else None
    return Bundle(_vouched(folder / ENCODER, card.get("sha256")), card, decoder)


def _vouched(weights: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors of the file that the card vouches for."""
    if not weights.exists():
        raise BadInput(f"{weights}: must exist beside card.json; found nothing there")
    if sha256(weights) != digest:
        raise BadInput(f"{weights}: must be the file its card was written for (sha256 {digest}); found another; export it again")
    return load_tensors(weights)


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
    encoder = _net(bundle).encoder
    into(encoder, bundle)
    return encoder.eval(), bundle.card


def load_decoder(folder: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The decoder of a bundle and its card: `decoder(encoder(x_BCXYZ))` gives the decoded maps, coarsest first.

    Raises: BadInput: as `load_bundle`, and a bundle without a decoder.
    """
    bundle = load_bundle(folder)
    skips = bundle.card["decoder"]["skips"] if bundle.decoder is not None else False
    decoder = _net(bundle, skips=skips).decoder
    into(decoder, bundle, part="decoder")
    return decoder.eval(), bundle.card


def _net(bundle: Bundle, **extra: Any) -> Any:
    architecture = bundle.card["architecture"]
    net_class = find("nets", architecture["name"])
    return net_class(**arguments(net_class, architecture["arguments"], "card.json architecture"), **extra)


def export(source: Path, out: Path) -> None:
    """Copy the bundle that lies in or at `source` into the empty folder `out`; both are proven to load."""
    loads = [load_encoder] if load_bundle(source).decoder is None else [load_encoder, load_decoder]
    for load in loads:
        load(source)
    folder = source / "bundle" if (source / "bundle" / "card.json").exists() else source
    for name in (ENCODER, *([DECODER] if load_decoder in loads else []), "README.md", "card.json"):
        with atomic(out / name) as temporary:
            shutil.copyfile(folder / name, temporary)
    for load in loads:
        load(out)


def into(module: nn.Module, bundle: Bundle, *, part: NetPart = "encoder") -> None:
    """Load the bundle's encoder, or its decoder, into `module` by name, all or nothing.

    An encoder's first convolution is adapted to more input channels: its kernel is repeated and divided
    by their number, so that an input with equal channels gives the same activations.

    Raises: BadInput: with the full list of missing, left-over and misshapen tensors; the module is then unchanged.
    """
    state = bundle.state if part == "encoder" else bundle.decoder
    if state is None:
        raise BadInput("the bundle must hold decoder.safetensors for its decoder to be loaded; found an encoder alone")
    target = module.state_dict()
    given = _widened(state, target) if part == "encoder" else state
    faults = [f"missing in the bundle: {name} {tuple(target[name].shape)}" for name in target if name not in given]
    faults += [f"left over in the bundle: {name} {tuple(given[name].shape)}" for name in given if name not in target]
    faults += [
        f"misshapen: {name}, bundle {tuple(given[name].shape)}, network {tuple(target[name].shape)}"
        for name in target
        if name in given and given[name].shape != target[name].shape
    ]
    if faults:
        raise BadInput(
            f"the bundle (architecture {json.dumps(bundle.card.get('architecture'))}) does not fit this {part}: {len(faults)} of "
            f"{len(target)} tensors; choose the same net in the recipe:\n  " + "\n  ".join(faults)
        )
    module.load_state_dict(given, strict=True)


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
    wide = tensor.repeat(1, times, 1, 1, 1) / times
    # One weight may stand under several names, as in nnU-Net's blocks.
    return state | {name: wide for name in target if name in state and target[name].data_ptr() == wanted.data_ptr()}


def _model_card(card: dict[str, Any]) -> str:
    sides = " x ".join(f"{s:g}" for s in card["spacing_mm"])
    decoder = ""
    if "decoder" in card:
        decoder = f"\nThe decoder, with{'' if card['decoder']['skips'] else 'out'} skips, is loaded by `volssl.load_decoder`.\n"
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
{decoder}
Cite: {"; ".join(card["citations"])}

{card["licence"]}
"""
