"""nnU-Net: one checkpoint.pth that stock `nnUNetv2_train -pretrained_weights` takes and that newer nnU-Net reads by its adaptation plan.

Arrays of nnU-Net run Z Y X and those of volssl X Y Z: the last three axes of every kernel are turned, so that the network there gives for a
turned image the turned features. nnU-Net asks for every tensor but the segmentation layers', the decoder's too, by all its names: one of
the encoder stands under four, since the decoder holds the encoder and a block of layers each of its layers once more. What the
pretraining's decoder does not have is initialised as nnU-Net does, and said so.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volssl.export import Options, Writer
from volssl.export.bundle import Bundle, into, load_bundle
from volssl.export.nnunet_plans import adaptation_plan, channels_of, layers_of, plans_for, read_plans, stages_of
from volssl.files import BadInput, atomic, write_json, write_text
from volssl.nets.resenc import ResEncUNet, stock
from volssl.recipe import arguments

SEGMENTATION = ".seg_layers."  # the names that nnU-Net leaves out when it loads
MOST_CLASSES = 2  # of the network that is built here; its segmentation layers are not exported
FEWEST_STAGES = 3


@dataclass(frozen=True)
class Weights:
    """What nnU-Net loads by name, and which layers of the decoder are not from the pretraining."""

    tensors: dict[str, Tensor]
    fresh: tuple[str, ...]
    kept: tuple[str, ...]


def export(source: Path, options: Options) -> Writer:
    """Check that a bundle fits nnU-Net. Raises: BadInput: with all that does not fit, and what would."""
    options.refuse("nnunet", "plans", "channels")
    bundle = load_bundle(source)
    base = None if options.plans is None else read_plans(options.plans)
    channels = channels_of(bundle.card, base, options.channels)
    layers = _layers(bundle, channels)
    made = weights_of(bundle, layers, channels)
    checkpoint = {
        "network_weights": made.tensors,
        "nnssl_adaptation_plan": adaptation_plan(bundle.card, layers, channels),
        "citations": citations_of(bundle.card),
    }
    plans = plans_for(bundle.card, layers, base, channels=channels)

    def write(out: Path) -> str:
        packed = io.BytesIO()  # named after no file
        torch.save(checkpoint, packed)
        with atomic(out / "checkpoint.pth") as temporary:
            temporary.write_bytes(packed.getbuffer())
        write_json(out / "nnUNetPlans.json", plans)
        write_text(out / "README.md", _readme(bundle.card, made, plans, own=base is not None))
        check(out / "checkpoint.pth", layers, channels)
        return _told(made)

    return write


def _layers(bundle: Bundle, channels: int) -> dict[str, Any]:
    """The layers as nnU-Net's plans tell them, Z Y X. Raises: BadInput: a net that is not nnU-Net's."""
    architecture = bundle.card["architecture"]
    if architecture["name"] != "resenc":
        raise BadInput(
            f"--to nnunet: the net must be resenc, the residual encoder U-Net that nnU-Net builds; found {architecture['name']}; "
            "pretrain with net.name=resenc net.norm=instance"
        )
    with torch.device("meta"):
        known = ResEncUNet(**arguments(ResEncUNet, architecture["arguments"], "card.json architecture")).arguments
    faults, stages = [], len(known["features"])
    if known["norm"] != "instance":
        faults.append(f"net.norm must be instance, as nnU-Net's; found {known['norm']}")
    if stages < FEWEST_STAGES:
        faults.append(
            f"net.features must have at least {FEWEST_STAGES} stages, since nnU-Net's loss leaves out the coarsest decoder level; "
            f"found {stages} stages, {stages - 1} decoder level"
        )
    if channels % bundle.card["in_channels"]:
        faults.append(f"--channels must be a multiple of the encoder's {bundle.card['in_channels']}; found {channels}")
    if faults:
        raise BadInput("--to nnunet: " + "; ".join(faults) + "; pretrain such a net")
    return layers_of(known)


def weights_of(bundle: Bundle, layers: Mapping[str, Any], channels: int) -> Weights:
    """The bundle's tensors in nnU-Net's own network. Raises: BadInput: an encoder of another architecture than its card says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is fresh is the same in every export
        net = stock(channels, MOST_CLASSES, layers)
    into(net.encoder, dataclasses.replace(bundle, state=turned(bundle.state)))
    given = turned(bundle.decoder or {})
    fresh, kept = [], []
    for kind in ("transpconvs", "stages"):
        for number, layer in enumerate(getattr(net.decoder, kind)):
            name = f"{kind}.{number}"
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in given.items() if key.startswith(f"{name}.")}
            target = layer.state_dict()
            fits = own.keys() == target.keys() and all(own[key].shape == target[key].shape for key in own)
            (kept if fits else fresh).append(f"decoder.{name}")
            if fits:
                layer.load_state_dict(own)
    tensors = {name: tensor for name, tensor in net.state_dict().items() if SEGMENTATION not in name}
    return Weights(tensors, tuple(fresh), tuple(kept))


def turned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels with their axes X Y Z in the order Z Y X; all else as it is."""
    return {name: tensor.permute(0, 1, 4, 3, 2).contiguous() if tensor.ndim == 5 else tensor for name, tensor in state.items()}


def citations_of(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As newer nnU-Net prints them."""
    return [{"type": "Pretraining method", "name": card["method"], "apa_citations": list(card["citations"])}]


def check(checkpoint: Path, layers: Mapping[str, Any], channels: int) -> None:
    """Load a written checkpoint as nnU-Net does: nothing but tensors and plain values, every name it will ask for, exact shapes.

    Raises: BadInput: what does not fit.
    """
    found = torch.load(checkpoint, map_location="cpu", weights_only=True)["network_weights"]
    with torch.device("meta"):
        wanted = {name: t for name, t in stock(channels, MOST_CLASSES, layers).state_dict().items() if SEGMENTATION not in name}
    faults = [f"missing: {name}" for name in wanted if name not in found] + [f"left over: {name}" for name in found if name not in wanted]
    faults += [
        f"misshapen: {name}, {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    faults += [f"not on the CPU: {name}" for name, tensor in found.items() if tensor.device.type != "cpu"]
    if faults:
        raise BadInput("--to nnunet: nnU-Net could not load what was written:\n  " + "\n  ".join(faults))


def _told(made: Weights) -> str:
    if not made.fresh:
        return "encoder and decoder come from the pretraining"
    source = "encoder" if not made.kept else f"encoder and {', '.join(made.kept)}"
    return f"{source} come{'' if made.kept else 's'} from the pretraining; freshly initialised: {', '.join(made.fresh)}"


def _readme(card: Mapping[str, Any], made: Weights, plans: Mapping[str, Any], *, own: bool) -> str:
    name, dataset = plans["plans_name"], plans["dataset_name"] if own else "DatasetXXX_NAME"
    number = dataset[7:10]
    filled = (
        ""
        if own
        else "\n`nnUNetPlans.json` was written without plans of your data set. Better export again with `--plans`; or put the name of\n"
        'your data set under `"dataset_name"`.\n'
    )
    configuration = plans["configurations"]["3d_fullres"]
    return f"""# Weights for nnU-Net

{_told(made)[0].upper()}{_told(made)[1:]}.
Segmentation layers are always nnU-Net's own. {channels_line(card, plans)}

- `checkpoint.pth`: for `nnUNetv2_train -pretrained_weights`, and for the adaptation plan of newer nnU-Net (its key `nnssl_adaptation_plan`)
- `nnUNetPlans.json`: plans `{name}` that pin the architecture, voxels of {configuration["spacing"]} mm (Z, Y, X), patches of
  {configuration["patch_size"]} and intensities as the encoder saw them
{filled}
```bash
cp nnUNetPlans.json "$nnUNet_preprocessed/{dataset}/{name}.json"
nnUNetv2_preprocess -d {number} -plans_name {name} -c 3d_fullres -np 4
nnUNetv2_train {number} 3d_fullres 0 -p {name} -pretrained_weights checkpoint.pth
nnUNetv2_predict -i IMAGES -o OUT -d {number} -c 3d_fullres -f 0 -p {name}
```

Stages: {stages_of(plans)}. Weights of the encoder: sha256 `{card["sha256"]}`, volssl {card["volssl_version"]}.

Cite: {"; ".join(card["citations"])}

{card["licence"]}
"""


def channels_line(card: Mapping[str, Any], plans: Mapping[str, Any]) -> str:
    """How the input channels of the network came about, in a sentence."""
    channels = len(plans["configurations"]["3d_fullres"]["normalization_schemes"])
    if channels == card["in_channels"]:
        return f"Input channels: {channels}."
    return f"Input channels: {channels}; the kernel of the encoder's {card['in_channels']} is repeated and divided."
