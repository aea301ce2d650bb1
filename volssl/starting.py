"""What a fine-tuning starts from: the plan of a recipe on a data set, voxels as a bundle's card says, and the first weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from volssl.cases import Prepared
from volssl.datasets import CaseTable
from volssl.export import bundle
from volssl.files import BadInput
from volssl.nets.heads import SegmentationNet
from volssl.nets.sides import side_fault
from volssl.recipe import Part
from volssl.segment import Plan, Preparation


@dataclass(frozen=True)
class Weights:
    """What is taken from a bundle, where one is given.

    Attributes:
        preparation: recipe: the recipe's, which must agree with the card; card: spacing, window and normalisation of the card in place of
            the recipe's, which then holds from scratch alone.
        across_modalities: let an encoder of CT start a network for MR, or the reverse: the recipe's spacing and normalisation stand, only
            what happens to each patch follows the card.
        channels: how an encoder of fewer input channels takes the data's, see `bundle.into`.
        decoder: take the bundle's decoder too, as far as its shapes fit.
    """

    preparation: Literal["recipe", "card"] = "recipe"
    across_modalities: bool = False
    channels: bundle.Channels = "repeat"
    decoder: bool = False


def told_by_hand(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe's values; where an override names `preparation`, the card does not replace it: it is checked, and a mismatch refused."""
    if any(override.split("=")[0].split(".")[0] == "preparation" for override in overrides) and isinstance(values.get("weights"), dict):
        return values | {"weights": values["weights"] | {"preparation": "recipe"}}
    return values


def plan_of(made: dict[str, Any], table: CaseTable, given: bundle.Bundle | None = None) -> Plan:
    """The plan of a parsed recipe on a data set, for the bundle it starts from if any.

    Raises: BadInput: channels or a patch that the network cannot take, or a bundle of another modality.
    """
    part: Part = made["net"]
    channels = part.arguments.get("in_channels", len(table.channels))
    if channels != len(table.channels):
        raise BadInput(f"net.in_channels must be the data set's {len(table.channels)} ({', '.join(table.channels)}); found {channels}")
    skips = {"skips": True} if "skips" not in part.arguments else {}
    net = part.build(**({"in_channels": len(table.channels)} if "in_channels" not in part.arguments else {}), **skips)
    patch_vox = made["sampling"].patch_vox
    if (fault := side_fault(patch_vox, net.stride, norm=net.arguments["norm"], batch=made["sampling"].batch_size)) is not None:
        raise BadInput(f"sampling.patch_vox: {fault}")
    return Plan(
        architecture={"name": part.name, "arguments": net.arguments},
        labels=table.labels,
        channels=table.channels,
        patch_vox=patch_vox,
        deep_supervision=made["optimisation"].deep_supervision,
        preparation=made["preparation"] if given is None else _preparation(made, given.card),
        inference=made["inference"],
        regions=table.regions,
        cleaning=made["cleaning"],
    )


def _preparation(made: dict[str, Any], card: Mapping[str, Any]) -> Preparation:
    weights: Weights = made["weights"]
    preparation: Preparation = made["preparation"]
    if weights.preparation == "recipe":
        return preparation
    of_card = bundle.preparation_of(card)
    if (of_card["normalisation"] == "window") != (preparation.normalisation == "window"):
        if not weights.across_modalities:
            raise BadInput(
                f"the bundle must be of the data's modality; found one of {card['intensity']['modality']} and preparation.normalisation="
                f"{preparation.normalisation} in the recipe (or set weights.across_modalities=true)"
            )
        return replace(preparation, patches=of_card["patches"])
    if _same_to_patches(preparation, of_card):
        of_card.pop("normalisation")
    return replace(preparation, **of_card)


def _same_to_patches(preparation: Preparation, of_card: Mapping[str, Any]) -> bool:
    # Both clip to the same quantiles and scale linearly: once each patch is z-scored, the network cannot tell one from the other.
    linear = ("percentile", "zscore")
    return of_card["patches"] == "zscore" and of_card["normalisation"] in linear and preparation.normalisation in linear


def first_weights(plan: Plan, given: bundle.Bundle | None, *, made: dict[str, Any], seed: int) -> SegmentationNet:
    """The untrained network, its encoder (and decoder, if asked for) from the bundle if one is given.

    Raises: BadInput: a bundle whose tensors or voxels do not fit.
    """
    # The first weights depend on the seed alone, whatever ran in this process before; the decoder's are the same with and without a bundle.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = plan.network()
    if given is not None:
        weights: Weights = made["weights"]
        if weights.preparation == "recipe":
            fits_card(plan.preparation, given.card, accept=made["optimisation"].accept_mismatch, across=weights.across_modalities)
        bundle.into(net.net.encoder, given, channels=weights.channels)
        if weights.decoder:
            bundle.into_decoder(net.net.decoder, given)
    return net


def fits_card(preparation: Preparation, card: Mapping[str, Any], *, accept: bool, across: bool = False) -> None:
    """Refuse a recipe that shows the encoder other voxels than its card says; `across`: of another modality, where only patches count."""
    wanted = bundle.preparation_of(card)
    if preparation.spacing_mm is None:  # the images themselves are looked at
        wanted.pop("spacing_mm")
    if across and (wanted["normalisation"] == "window") != (preparation.normalisation == "window"):
        wanted = {"patches": wanted["patches"]}
    elif _same_to_patches(preparation, wanted):
        wanted.pop("normalisation")
    faults = [
        f"preparation.{key} must be {value}; found {getattr(preparation, key)}"
        for key, value in wanted.items()
        if not _same(getattr(preparation, key), value)
    ]
    if faults and not accept:
        raise BadInput(
            "the recipe must prepare voxels as the bundle's card says (or set weights.preparation=card, or optimisation.accept_mismatch="
            "true):\n  " + "\n  ".join(faults)
        )


def same_voxels(cases: Sequence[Prepared], made: dict[str, Any], given: bundle.Bundle) -> None:
    """Where the recipe keeps each image's own spacing, the images themselves must have the bundle's. Raises: BadInput: if they do not."""
    wanted = tuple(given.card["spacing_mm"])
    other = [case for case in cases if not _same(case.spacing_mm, wanted)]
    if other and not (made["optimisation"].accept_mismatch or made["weights"].across_modalities):
        raise BadInput(
            f"preparation.spacing_mm is null, so every image must have the bundle's voxels of {wanted} mm; found others in {len(other)} of "
            f"{len(cases)} training cases, such as {_rounded(other[0].spacing_mm)} mm in {other[0].case_id}; set "
            f"preparation.spacing_mm={list(wanted)} (or optimisation.accept_mismatch=true)"
        )


def _rounded(spacing_mm: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(step, 3) for step in spacing_mm)


def _same(found: Any, wanted: Any) -> bool:
    return bool(np.allclose(found, wanted, rtol=0.02)) if isinstance(wanted, tuple) else found == wanted


def taken(plan: Plan, net: SegmentationNet, given: bundle.Bundle | None, weights: Weights) -> dict[str, Any]:
    """What splits.json says of the weights a run started from; from scratch their checksum is null."""
    if given is None:
        return {"weights_sha256": None}
    said: dict[str, Any] = {
        "modality": given.card["intensity"]["modality"],
        "preparation": weights.preparation,
        "prepared": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(plan.preparation).items()},
        "channels": weights.channels if given.card["in_channels"] != len(plan.channels) else "as the bundle's",
    }
    if weights.decoder:
        partly = bundle.unfit(net.net.decoder, given)
        said["decoder"] = {"loaded": len(net.net.decoder.state_dict()) - len(partly), "untrained_for_skips": partly}
    return {"weights_sha256": given.card["sha256"], "weights": said}
