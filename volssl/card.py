"""The card of a bundle: what the weights are and how voxels must be prepared for them. Read without torch, so that `prepare` can."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volssl import recipe as recipes
from volssl.files import BadInput, read_json

SCHEMA = 1
# What every card holds, besides the keys that are looked at one by one.
KINDS: dict[str, type] = {
    **dict.fromkeys(("orientation", "method", "volssl_version", "licence", "sha256"), str),
    **dict.fromkeys(("in_channels", "steps"), int),
    **dict.fromkeys(("recipe", "data"), dict),
    "citations": list,
}
LARGEST_CARD = 2**20  # bytes; a card is a few kilobytes


@dataclass(frozen=True)
class Card:
    """What a bundle says about itself; holds no identifier, path or date of a scan.

    Attributes:
        architecture: {"name", "arguments"} of `volssl.nets`. spacing_mm, orientation: of the voxels the encoder saw.
        intensity: {"modality", "clip", "window", "percentiles", "normalisation"}: stored values, those that map to [0, 1], which of the
            body's percentiles became them (None: the values are the scanner's), and what follows.
        patch_vox: X, Y, Z of the largest view it was trained on, or None where that is not known.
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
    patch_vox: tuple[int, int, int] | None = None


def bundle_folder(folder: Path | str) -> Path:
    """The bundle that `folder` is, or holds as a run does. Raises: BadInput: neither."""
    folder = Path(folder)
    if (folder / "bundle" / "card.json").exists():
        folder = folder / "bundle"
    if not (folder / "card.json").exists():
        raise BadInput(
            f"weights {folder}: must be a bundle (a folder with card.json and encoder.safetensors) or a run that wrote one; found neither"
        )
    return folder


def read_card(folder: Path | str) -> dict[str, Any]:
    """The checked card of the bundle that `folder` is, or holds. Raises: BadInput: no bundle, a newer schema, a card that is none."""
    path = bundle_folder(folder) / "card.json"
    if path.stat().st_size > LARGEST_CARD:
        raise BadInput(f"{path}: must be at most {LARGEST_CARD} bytes; found {path.stat().st_size}; that is no card of volssl")
    card = read_json(path)
    if not isinstance(card, dict) or not isinstance(card.get("schema"), int):
        raise BadInput(f"{path}: must be a mapping with an integer `schema`")
    if card["schema"] > SCHEMA:
        raise BadInput(f"{path}: schema must be at most {SCHEMA}; found {card['schema']}; update volssl")
    if faults := _faults(card):
        raise BadInput(f"{path}: " + "; ".join(faults) + "; export the bundle again")
    return card


def _faults(card: Mapping[str, Any]) -> list[str]:
    faults = [
        f"`{key}` must be of type {kind.__name__}; found {card.get(key)!r}"
        for key, kind in KINDS.items()
        if not isinstance(card.get(key), kind) or isinstance(card.get(key), bool)
    ]
    architecture = card.get("architecture")
    if not (
        isinstance(architecture, dict) and isinstance(architecture.get("name"), str) and isinstance(architecture.get("arguments"), dict)
    ):
        faults.append(f"`architecture` must hold a name and arguments; found {architecture!r}")
    spacing = card.get("spacing_mm")
    if not (isinstance(spacing, list) and len(spacing) == 3 and all(_positive(step) for step in spacing)):
        faults.append(f"`spacing_mm` must be three numbers above 0; found {spacing!r}")
    intensity = card.get("intensity")
    if not (isinstance(intensity, dict) and {"modality", "clip", "window", "normalisation"} <= intensity.keys()):
        faults.append(f"`intensity` must hold modality, clip, window and normalisation; found {intensity!r}")
    return faults


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def preparation_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of finetune's `preparation:` that show a network the card's voxels: spacing_mm, normalisation, patches, and CT's window.

    CT keeps its window in Hounsfield units; in MR the window follows each image's percentiles.
    """
    intensity = card["intensity"]
    kept: dict[str, Any] = {"spacing_mm": tuple(card["spacing_mm"]), "patches": intensity["normalisation"]}
    if intensity["modality"] != "CT":
        return kept | {"normalisation": "percentile"}
    return kept | {"normalisation": "window", "window": tuple(intensity["window"])}


def stored_as(card: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe of prepare, dotted, that give a store of such voxels."""
    intensity = card["intensity"]
    values = {
        "modality": intensity["modality"],
        "spacing_mm": list(card["spacing_mm"]),
        "intensity.clip": list(intensity["clip"]),
        "intensity.window": list(intensity["window"]),
    }
    if "percentiles" in intensity:  # cards of volssl 0.1 before this key: the recipe's
        values["intensity.percentiles"] = intensity["percentiles"]
    return values


def as_card_says(values: dict[str, Any], recipe: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a recipe of prepare; where its key `like` names a bundle, that one's card says modality, spacing and intensity.

    A shipped recipe is then only where it starts. What the user asked for, in a recipe of his own or on the command line, must not differ
    from the card, unless `accept_mismatch: true` stands there too: then it stays.

    Args: values: the recipe with the overrides laid over it.
    Raises: BadInput: no bundle there, or a difference.
    """
    values = dict(values)
    folder, accept = values.pop("like", None), values.pop("accept_mismatch", None)
    if folder is None:
        if accept is not None:
            raise BadInput("accept_mismatch: goes with `like`, a bundle whose card is to be followed; found none")
        return values
    wanted = stored_as(read_card(str(folder)))
    asked, start = _flat(values), {}
    if not Path(recipe).is_file():
        given = tuple(override.partition("=")[0] for override in overrides)
        asked = {key: value for key, value in asked.items() if any(key == one or key.startswith(f"{one}.") for one in given)}
        start = _flat(recipes.load("prepare_ct" if wanted["modality"] == "CT" else "prepare_mr", verb="prepare"))
    other = [f"{key} must be {wanted[key]}; found {asked[key]}" for key in wanted if key in asked and asked[key] != wanted[key]]
    if other and accept is not True:
        raise BadInput(
            "like: the store must be as the bundle's card says; leave out, or set accept_mismatch=true:\n  " + "\n  ".join(other)
        )
    return _nested(start | wanted | asked)


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for dotted, value in flat.items():
        *path, last = dotted.split(".")
        place = values
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return values


def model_card(card: Mapping[str, Any]) -> str:
    """README.md of a bundle: Markdown with the front matter that the Hugging Face hub reads."""
    intensity = card["intensity"]
    sides = " x ".join(f"{s:g}" for s in card["spacing_mm"])
    patients = card["data"].get("train_patients", 0)
    decoder = ""
    if "decoder" in card:
        decoder = f"\nThe decoder, with{'' if card['decoder']['skips'] else 'out'} skips, is loaded by `volssl.load_decoder`.\n"
    tags = [
        "medical-imaging",
        "self-supervised-learning",
        "3d",
        intensity["modality"].lower(),
        card["method"],
        card["architecture"]["name"],
    ]
    # JSON is YAML: nothing in a name can break the front matter.
    return f"""---
license: other
license_name: terms-of-the-training-data
library_name: volssl
pipeline_tag: image-feature-extraction
tags: {json.dumps(tags)}
---
# Encoder pretrained with {card["method"]}

- Architecture: `{json.dumps(card["architecture"])}`, {card["in_channels"]} input channel(s)
- Voxels: {card["orientation"]}, {sides} mm; intensity `{json.dumps(intensity)}`
- Training: {card["steps"]} steps on {card["data"].get("train_scans", 0)} scans of {patients} patients
- Weights: sha256 `{card["sha256"]}`, volssl {card["volssl_version"]}

```python
from volssl import load_encoder
encoder, card = load_encoder("bundle")  # in_channels=4 for four channels
features = encoder(x_BCXYZ)  # list of feature maps, finest first
```
{decoder}
`volssl prepare INDEX --out STORE like=BUNDLE` prepares scans as the encoder saw them; `volssl finetune --weights BUNDLE` refuses others.

Cite: {"; ".join(card["citations"])}

{card["licence"]}
"""
