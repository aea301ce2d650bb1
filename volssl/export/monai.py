"""A MONAI bundle: a folder that MONAI verifies offline and runs without volssl; the network's own code lies in its `scripts/`.

Layout and keys: docs.monai.io, "MONAI Bundle Specification". The code is a copy of the files of `volssl.nets` that the network needs, so
that whoever opens the bundle in years gets the layers that the weights were trained in.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import volssl
from volssl.export import Options, Writer, norm_of, patch_of
from volssl.export.bundle import load_encoder
from volssl.export.monai_schema import SCHEMA, SCHEMA_URL
from volssl.files import BadInput, atomic, write_json, write_text
from volssl.nets.standalone import EncoderNetwork

ENTRY = "volssl.nets.standalone"
IMPORT = re.compile(r"^from (volssl\.[\w.]+) import", re.MULTILINE)
# What stands in for files of volssl that a network needs a word of.
STAND_INS = {
    "files": '"""Errors of the network."""\n\n\nclass BadInput(ValueError):\n    """Input that the network cannot take."""\n',
    "processes": '"""Normalisation layers of one process."""\n\nfrom torch.nn import BatchNorm1d, BatchNorm3d  # noqa: F401\n',
}
PACKAGES = {"resenc": ("dynamic-network-architectures",), "swinunetr": ("einops",)}  # that a backbone needs beside MONAI's own
LARGEST_DIFFERENCE = 1e-5  # between the network here and the one in the bundle, on noise
SECONDS = 600  # that the check may take


@dataclass(frozen=True)
class Contents:
    """What a bundle is about.

    Attributes: network: to be exported; a module of `nets.standalone`. definition: what builds it, without the place of its class.
        inference: further keys of inference.json. task, description: of metadata.json. image, pred: of its network_data_format.
        about: further keys of metadata.json. text: of the README, after its head.
    """

    network: nn.Module
    definition: dict[str, Any]
    inference: dict[str, Any]
    task: str
    description: str
    image: dict[str, Any]
    pred: dict[str, Any]
    about: dict[str, Any]
    text: str


def export(source: Path, options: Options) -> Writer:
    """Check that a bundle's encoder can become a MONAI bundle. Raises: BadInput: no patch size, or sides that do not fit."""
    options.refuse("monai", "patch", "channels")
    loaded, card = load_encoder(source, in_channels=options.channels)
    encoder: Any = loaded
    patch_vox = patch_of(options.patch, card.get("patch_vox"), encoder, norm_of(card["architecture"]))
    intensity, channels = card["intensity"], options.channels or card["in_channels"]
    built = card["architecture"]["arguments"] | {"in_channels": channels}
    definition = {"name": card["architecture"]["name"], "arguments": built, "zscore": intensity["normalisation"] == "zscore"}
    network = EncoderNetwork(**definition)
    network.encoder.load_state_dict(encoder.state_dict(), strict=True)
    how = {"how": "window", "window": list(intensity["window"])} if intensity["modality"] == "CT" else {"how": "percentile"}
    image = image_format(intensity["modality"], [f"channel {number}" for number in range(channels)], patch_vox)
    pred = {"type": "feature", "format": "features", "num_channels": encoder.channels[-1], "spatial_shape": ["*", "*", "*"]}
    contents = Contents(
        network=network,
        definition={"_target_": "scripts.standalone.EncoderNetwork", **definition},
        inference=preparing(how, tuple(card["spacing_mm"]))
        | windows(patch_vox, overlap=0.0, batch=1)
        | {
            "channels": channels,
            "finish": "$standalone.save_features(@output_dir)",
            "run": ["$standalone.run(@items, @network, prepare=@prepare, inferer=@inferer, finish=@finish, key='features')"],
        },
        task=f"Encoder pretrained without labels by {card['method']}",
        description="Feature maps of 3D patches, to fine-tune from or to describe volumes with; `network.encoder(x)` gives all of them.",
        image=image,
        pred=pred | {"dtype": "float32", "value_range": []},
        about={"volssl_card": card, "references": list(card["citations"])},
        text=_finetuning(definition) + f"Cite: {'; '.join(card['citations'])}\n\n{card['licence']}\n",
    )
    return lambda out: write(out, contents, patch_vox)


def image_format(modality: str, channels: Sequence[str], patch_vox: Sequence[int]) -> dict[str, Any]:
    """What metadata.json says of the input."""
    return {
        "type": "image",
        "format": "hounsfield" if modality == "CT" else "magnitude",
        "modality": modality,
        "num_channels": len(channels),
        "spatial_shape": list(patch_vox),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(number): name for number, name in enumerate(channels)},
    }


def preparing(how: Mapping[str, Any], spacing_mm: Sequence[float] | None) -> dict[str, Any]:
    """MONAI's transforms from a file to what the network sees, as keys of inference.json."""
    turning = [
        {"_target_": "LoadImaged", "keys": "image", "image_only": True, "ensure_channel_first": True},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    ]
    if spacing_mm is not None:
        turning.append({"_target_": "Spacingd", "keys": "image", "pixdim": list(spacing_mm), "mode": "bilinear", "align_corners": False})
    scaling = {"_target_": "scripts.standalone.Normalise", **how}
    return {
        "items": "$standalone.cases(@dataset_dir, @channels)",
        "turn": {"_target_": "Compose", "transforms": turning},
        "normalise": {"_target_": "Lambdad", "keys": "image", "func": scaling, "track_meta": False},
        "prepare": {"_target_": "Compose", "transforms": ["@turn", "@normalise"]},
    }


def windows(patch_vox: Sequence[int], *, overlap: float, batch: int) -> dict[str, Any]:
    """MONAI's sliding window, as a key of inference.json."""
    sizes = {"roi_size": list(patch_vox), "overlap": overlap, "sw_batch_size": batch}
    return {"inferer": {"_target_": "SlidingWindowInferer", **sizes, "mode": "gaussian" if overlap else "constant"}}


def write(out: Path, contents: Contents, patch_vox: Sequence[int]) -> str:
    """Write the bundle's folder, and prove in another process that MONAI verifies it and that its network computes the same.

    Raises: BadInput: what that process says.
    """
    modules = copied()
    for name, text in modules.items():
        write_text(out / "scripts" / f"{name}.py", text)
    packed = io.BytesIO()  # named after no file
    torch.save({name: tensor.cpu().contiguous() for name, tensor in contents.network.state_dict().items()}, packed)
    (out / "models").mkdir(parents=True)
    with atomic(out / "models" / "model.pt") as temporary:
        temporary.write_bytes(packed.getbuffer())
    write_json(out / "configs" / "inference.json", _inference(contents))
    write_json(out / "configs" / "schema.json", SCHEMA)
    write_json(out / "configs" / "metadata.json", _metadata(contents))
    write_text(out / "docs" / "README.md", _readme(contents))
    write_text(out / "LICENSE", licence())
    prove(out, contents.network, (2, contents.image["num_channels"], *patch_vox))
    verified = "verified offline" if find_spec("jsonschema") else "its metadata not verified, for which MONAI needs jsonschema"
    return f"MONAI bundle, patches of {'x'.join(map(str, patch_vox))}; {verified}; its network loaded without volssl"


def copied() -> dict[str, str]:
    """The files of volssl that a bundle carries, as modules beside each other: name -> text.

    All backbones are carried: one is found by its name, and they are small.
    """
    package = Path(volssl.__file__).parent
    waiting = [
        ENTRY,
        *(f"volssl.nets.{path.stem}" for path in sorted((package / "nets").glob("*.py")) if "RECIPE_NAME" in path.read_text()),
    ]
    made = {"__init__": '"""The network of this bundle and what stands around it."""\n\nfrom . import standalone as standalone\n'}
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2]
        if name in made:
            continue
        if name in STAND_INS:
            made[name] = STAND_INS[name]
            continue
        text = (package.parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        waiting += IMPORT.findall(text)
        made[name] = IMPORT.sub(lambda match: f"from .{match[1].rpartition('.')[2]} import", text)
    return made


def _inference(contents: Contents) -> dict[str, Any]:
    return {
        "imports": ["$import torch", "$from scripts import standalone"],
        "bundle_root": ".",
        "dataset_dir": "images",
        "output_dir": "predictions",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": contents.definition,
        "network": "$standalone.weighted(@network_def, @bundle_root + '/models/model.pt').to(@device)",
        **contents.inference,
    }


def _metadata(contents: Contents) -> dict[str, Any]:
    needed = ["nibabel", *PACKAGES.get(contents.definition["name"], ())]
    return {
        "schema": SCHEMA_URL,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by volssl {volssl.__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: _version(name) for name in needed},
        "task": contents.task,
        "description": contents.description,
        "authors": "the owners of the weights",
        "copyright": "of the weights: their owners'; of the code: the volssl authors, Apache-2.0",
        "network_data_format": {"inputs": {"image": contents.image}, "outputs": {"pred": contents.pred}},
        **contents.about,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "any"


def _readme(contents: Contents) -> str:
    needed = " ".join(["nibabel", *PACKAGES.get(contents.definition["name"], ())])
    return f"""# {contents.task}

{contents.description}

Run inside this folder, with `pip install "monai[fire,jsonschema]" {needed}`; volssl is not needed.

```bash
python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath configs/schema.json
python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json --config_file configs/inference.json
python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir OUT
```

```python
from monai.bundle import ConfigParser

parser = ConfigParser()
parser.read_config("configs/inference.json")
network = parser.get_parsed_content("network")  # an nn.Module with the weights; train it on as any other
```

{contents.text}"""


def _finetuning(definition: Mapping[str, Any]) -> str:
    return f"""To fine-tune, give the encoder to a network that segments, here into 3 classes with background:

```python
from scripts.standalone import SegmentationNetwork

whole = SegmentationNetwork({definition["name"]!r}, {definition["arguments"]!r}, out_channels=3, zscore={definition["zscore"]})
whole.net.net.encoder.load_state_dict(network.encoder.state_dict())
```

"""


def licence() -> str:
    """The text for LICENSE: volssl's own, of the code in `scripts/`, and a word on the weights."""
    package = Path(volssl.__file__).parent
    path = next(path for path in (package / "LICENSE", package.parent / "LICENSE") if path.exists())
    return (
        "The weights in models/ carry the terms of the data they were trained on.\nThe code in scripts/ is volssl's:\n\n" + path.read_text()
    )


CHECK = """
import sys
sys.modules["volssl"] = None  # as if it were not installed
sys.path.insert(0, ".")
import torch
from monai.bundle import ConfigParser, verify_net_in_out
given = torch.load(sys.argv[1], weights_only=True)
verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file="configs/inference.json", device="cpu")
parser = ConfigParser()
parser.read_config("configs/inference.json")
parser["device"] = "cpu"
with torch.no_grad():
    found = parser.get_parsed_content("network")(given["x"])
difference = float((found - given["y"]).abs().max() / max(1.0, float(given["y"].abs().max())))
assert difference <= given["allowed"], f"the network differs from the exported one by {difference:g}"
try:
    import jsonschema
except ImportError:
    sys.exit()
from monai.bundle import verify_metadata
verify_metadata(meta_file="configs/metadata.json", filepath="configs/schema.json")
"""


def prove(folder: Path, network: nn.Module, shape: Sequence[int]) -> None:
    """Load the bundle in a process without volssl and compare. Raises: BadInput: what went wrong there."""
    x_BCXYZ: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="volssl-") as apart:
        given = Path(apart) / "given.pt"
        torch.save({"x": x_BCXYZ, "y": network.eval()(x_BCXYZ), "allowed": LARGEST_DIFFERENCE}, given)
        command = [sys.executable, "-B", "-c", CHECK, str(given)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BadInput(f"--to monai: the bundle must load in MONAI without volssl; found: {last}")
