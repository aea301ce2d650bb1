"""The bundle: encoder.safetensors, decoder.safetensors, card.json and a model card; loaded by name, all or nothing.

The decoder's file is optional: a bundle without one is an encoder alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from volssl.card import SCHEMA, Card, bundle_folder, model_card, read_card
from volssl.card import preparation_of as preparation_of  # what fine-tuning asks a bundle for
from volssl.export import Options, Writer
from volssl.export import prove as prove_formats
from volssl.files import BadInput, atomic, scratch, sha256, write_json, write_text
from volssl.recipe import arguments, find
from volssl.tensors import load_tensors, save_tensors

ENCODER, DECODER = "encoder.safetensors", "decoder.safetensors"
NetPart = Literal["encoder", "decoder"]
Channels = Literal["repeat", "first", "random"]
WIDEST = 2**14  # of any number among a card's architecture arguments


@dataclass(frozen=True)
class Bundle:
    """Weights by name, and the card that says what they are and how voxels must be prepared for them.

    Attributes: state: of the encoder. decoder: of the decoder, or None if the bundle holds none.
    """

    state: dict[str, Tensor]
    card: dict[str, Any]
    decoder: dict[str, Tensor] | None = None


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
    write_text(folder / "README.md", model_card(content))
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


def prove(encoder: nn.Module, card: Card, *, decoder: nn.Module | None = None, formats: Sequence[str] = ()) -> None:
    """Write the bundle of an untrained net to a temporary folder and load it, and export it in `formats`, each as its reader loads it.

    A week's run must not end in weights nobody can load. Raises: BadInput: what does not fit a format, and what would.
    """
    with scratch() as folder:
        prove_formats(write(folder / "bundle", encoder, card, decoder=decoder), formats)


def load_bundle(folder: Path | str) -> Bundle:
    """Read and check a bundle; nothing in it is executed.

    Raises: BadInput: not a bundle, a newer schema, a damaged or changed weights file.
    """
    folder, card = bundle_folder(folder), read_card(folder)
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


def load_encoder(folder: Path | str, *, in_channels: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The torch module of a bundle and its card: `encoder(x_BCXYZ)` gives the list of feature maps, finest first.

    Args: in_channels: of the module, a multiple of the card's; its first kernel is then repeated and divided, see `into`.
    Raises: BadInput: as `load_bundle` and `into`.
    """
    bundle = load_bundle(folder)
    encoder = _net(bundle, **({} if in_channels is None else {"in_channels": in_channels})).encoder
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
    given = arguments(net_class, architecture["arguments"] | extra, "card.json architecture")
    known = arguments(net_class, architecture["arguments"], "card.json architecture")
    if fault := _too_large(known, bundle):
        raise BadInput(f"card.json architecture: {fault}; it is not the card of these weights")
    with torch.device("meta"), _NumbersAreReal():  # takes no memory
        needed = sum(t.numel() for t in net_class(**known).encoder.state_dict().values())
    there = sum(t.numel() for t in bundle.state.values())
    if needed != there:
        raise BadInput(
            f"card.json architecture {json.dumps(architecture)}: must be that of the encoder's weights; it needs {needed} numbers, and "
            f"{ENCODER} holds {there}; take the card that was written with them"
        )
    return net_class(**given)


class _NumbersAreReal(TorchFunctionMode):
    # MONAI's Swin transformer reads its rates off a tensor while it is built, which one without memory cannot answer.
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({} if kwargs is None else kwargs) | ({"device": "cpu"} if func is torch.linspace else {}))


def _too_large(known: Mapping[str, Any], bundle: Bundle) -> str | None:
    # A card is data of strangers: what it asks for must stay in proportion to the weights that came with it.
    numbers = list(_numbers(known))
    if max(numbers, default=0) > WIDEST:
        return f"no number may be above {WIDEST}; found {max(numbers)}"
    layers = sum(sum(_numbers(known.get(name, 0))) for name in ("depth", "depths", "blocks"))
    lists = max((len(value) for value in known.values() if isinstance(value, tuple)), default=0)
    if max(layers, lists) > len(bundle.state):
        return f"{max(layers, lists)} layers cannot have weights among {len(bundle.state)} tensors"
    return None


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _numbers(inner)


def export(source: Path, options: Options) -> Writer:
    """Prove that the bundle in or at `source` loads; what is given back copies it, and proves the copy."""
    options.refuse("bundle")
    loads = [load_encoder] if load_bundle(source).decoder is None else [load_encoder, load_decoder]
    for load in loads:
        load(source)

    def write(out: Path) -> str:
        for name in (ENCODER, *([DECODER] if load_decoder in loads else []), "README.md", "card.json"):
            with atomic(out / name) as temporary:
                shutil.copyfile(bundle_folder(source) / name, temporary)
        for load in loads:
            load(out)
        return ""

    return write


@dataclass(frozen=True)
class Match:
    """How a bundle's tensors and those of a module go together, by name.

    Attributes: matched: names on both sides with one shape. missing: name -> shape the module has and the bundle lacks. left_over: the
        other way round. misshapen: name -> shapes in the bundle and in the module.
    """

    matched: tuple[str, ...]
    missing: dict[str, tuple[int, ...]]
    left_over: dict[str, tuple[int, ...]]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def fits(self) -> bool:
        """Whether every tensor is matched."""
        return not (self.missing or self.left_over or self.misshapen)

    def lines(self) -> list[str]:
        """What does not fit, a line each."""
        told = [f"missing in the bundle: {name} {shape}" for name, shape in self.missing.items()]
        told += [f"left over in the bundle: {name} {shape}" for name, shape in self.left_over.items()]
        return told + [f"misshapen: {name}, bundle {one}, network {other}" for name, (one, other) in self.misshapen.items()]


def match_weights(module: nn.Module, bundle: Bundle, *, part: NetPart = "encoder") -> Match:
    """Which tensors of the bundle's encoder or decoder fit `module`, which are missing, left over or misshapen; loads nothing.

    More input channels count as a fit where `into` can adapt the first convolution to them. Raises: BadInput: a bundle without a decoder.
    """
    target = module.state_dict()
    given = _given(bundle, part, target)
    both = [name for name in target if name in given]
    return Match(
        matched=tuple(name for name in both if given[name].shape == target[name].shape),
        missing={name: tuple(tensor.shape) for name, tensor in target.items() if name not in given},
        left_over={name: tuple(tensor.shape) for name, tensor in given.items() if name not in target},
        misshapen={name: (tuple(given[name].shape), tuple(target[name].shape)) for name in both if given[name].shape != target[name].shape},
    )


def into(module: nn.Module, bundle: Bundle, *, part: NetPart = "encoder", channels: Channels = "repeat") -> Match:
    """Load the bundle's encoder, or its decoder, into `module` by name, all or nothing.

    Args: channels: how an encoder's first convolution takes more input channels. repeat: its kernel is repeated and divided by their
        number, so that an input with equal channels gives the same activations; first: the kernel reads the first of them, and the others
        count nothing until they are trained; random: that convolution stays as it is in `module`.
    Raises: BadInput: with the full list of missing, left-over and misshapen tensors; the module is then unchanged.
    """
    found = match_weights(module, bundle, part=part)
    target = module.state_dict()
    if not found.fits:
        told = found.lines()
        raise BadInput(
            f"the bundle (architecture {json.dumps(bundle.card.get('architecture'))}) does not fit this {part}: {len(told)} of "
            f"{len(target)} tensors; choose the same net in the recipe:\n  " + "\n  ".join(told)
        )
    module.load_state_dict(_given(bundle, part, target, channels), strict=True)
    return found


def unfit(decoder: nn.Module, bundle: Bundle) -> list[str]:
    """The decoder's tensors that the bundle's decoder can give in part alone: without skips its convolutions read fewer channels.

    Raises: BadInput: no decoder in the bundle, or one that differs in more than the channels that skips bring.
    """
    found, brings = match_weights(decoder, bundle, part="decoder"), bool(decoder.skips) and not bundle.card["decoder"]["skips"]
    odd = [name for name, (one, other) in found.misshapen.items() if not brings or one[:1] + one[2:] != other[:1] + other[2:]]
    if found.missing or found.left_over or odd or not found.matched:
        raise BadInput("weights.decoder: the bundle's decoder must fit but for the channels of the skips:\n  " + "\n  ".join(found.lines()))
    return sorted(found.misshapen)


def into_decoder(decoder: nn.Module, bundle: Bundle) -> None:
    """Load the bundle's decoder by name; where skips bring more channels (see `unfit`), the kernels that read them stay as they are.

    The skips' channels come after those from below in every decoder of `volssl.nets`, so the bundle's kernels read what they read before.
    """
    own, given = decoder.state_dict(), dict(bundle.decoder or {})
    for name in unfit(decoder, bundle):
        kernel = own[name].clone()
        kernel[:, : given[name].shape[1]] = given[name]
        given[name] = kernel
    decoder.load_state_dict(given, strict=True)


def _given(bundle: Bundle, part: NetPart, target: dict[str, Tensor], channels: Channels = "repeat") -> dict[str, Tensor]:
    state = bundle.state if part == "encoder" else bundle.decoder
    if state is None:
        raise BadInput("the bundle must hold decoder.safetensors for its decoder to be loaded; found an encoder alone")
    return _widened(state, target, channels) if part == "encoder" else state


def _widened(state: dict[str, Tensor], target: dict[str, Tensor], channels: Channels) -> dict[str, Tensor]:
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
    if times == 1:
        return state
    wide = tensor.repeat(1, times, 1, 1, 1) / times
    if channels == "first":
        wide = torch.cat([tensor, torch.zeros_like(wide[:, tensor.shape[1] :])], 1)
    elif channels == "random":
        wide = wanted
    # One weight may stand under several names, as in nnU-Net's blocks.
    return state | {name: wide for name in target if name in state and target[name].data_ptr() == wanted.data_ptr()}
