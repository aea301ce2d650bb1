"""A classifier of candidates: an encoder and a linear head on its pooled maps, its settings, and the probabilities that it gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import volssl
from volssl import recipe as recipes
from volssl.candidate_boxes import Batch, Boxes, Changes, cropped, cut_boxes
from volssl.candidates import PLACE
from volssl.cases import Folds, cut
from volssl.compiling import multiplies_bf16
from volssl.datasets import Case, Data
from volssl.export import bundle
from volssl.files import BadInput, read_json, sha256, write_json
from volssl.fitting import Saving
from volssl.nets.sides import side_fault
from volssl.recipe import Part
from volssl.segment import Preparation
from volssl.starting import fits_card
from volssl.tensors import load_tensors, save_tensors

SCHEMA = 1
COLUMNS = ("seriesuid", *PLACE, "probability")


@dataclass(frozen=True)
class Learning:
    """How long and how fast; nothing is frozen. Linear warm-up over the share `warmup`, then cosine to 0; AdamW.

    Attributes: precision: auto is bf16 where the device multiplies it. accept_mismatch: take a bundle although the recipe prepares voxels
        otherwise than its card says.
    """

    steps: int = 10_000
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 1e-2
    clip: float = 5.0
    precision: str = "auto"
    accept_mismatch: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or not 0 <= self.warmup <= 1 or self.clip <= 0 or self.precision not in ("auto", "fp32", "bf16"):
            raise BadInput("steps >= 1, lr > 0, warmup in [0, 1], clip > 0 and precision auto, fp32 or bf16 must hold")


@dataclass(frozen=True)
class Scoring:
    """Boxes scored at once, and whether the mean over mirror images along each axis is taken (eight times the work)."""

    batch: int = 32
    flips: bool = False


PARTS = {
    "data": Data,
    "net": "nets",
    "preparation": Preparation,
    "folds": Folds,
    "boxes": Boxes,
    "changes": Changes,
    "learning": Learning,
    "scoring": Scoring,
    "saving": Saving,
}


class CandidateNet(nn.Module):
    """An encoder, the mean of its coarsest map, and a linear layer to one logit."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(self.encoder.channels[-1], 1)

    def forward(self, x_B1XYZ: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> logits (B,), float32: above 0 a nodule."""
        pooled_BC = self.encoder(x_B1XYZ)[-1].float().mean((2, 3, 4))
        return self.head(pooled_BC)[:, 0]


def first_net(made: Mapping[str, Any], given: bundle.Bundle | None, *, seed: int) -> CandidateNet:
    """The untrained network, its encoder from the bundle if one is given. Raises: BadInput: patch, bundle or recipe that do not fit."""
    part: Part = made["net"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = part.build(**({"in_channels": 1} if "in_channels" not in part.arguments else {}))
        made_net = CandidateNet(net.encoder)
    boxes: Boxes = made["boxes"]
    if (fault := side_fault(boxes.patch_vox, net.stride, norm=net.arguments["norm"], batch=boxes.batch_size)) is not None:
        raise BadInput(f"boxes.patch_vox: {fault}")
    if given is not None:
        preparation: Preparation = made["preparation"]
        if preparation.spacing_mm is None and not made["learning"].accept_mismatch:
            raise BadInput(f"preparation.spacing_mm must be the bundle's, {tuple(given.card['spacing_mm'])}; found null")
        fits_card(preparation, given.card, accept=made["learning"].accept_mismatch)
        bundle.into(made_net.encoder, given)
    return made_net


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Forward passes as `Learning.precision` says."""
    bf16 = precision == "bf16" or (precision == "auto" and multiplies_bf16(device.type))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def scores(net: CandidateNet, case: Case, at_N3: np.ndarray, *, made: Mapping[str, Any]) -> np.ndarray:
    """Probability (N,) of each of a scan's candidates. Raises: BadInput: a scan that cannot be read, a candidate outside of it."""
    patch, scoring = made["boxes"].patch_vox, made["scoring"]
    sides = tuple(side + 2 for side in patch)  # a voxel on each side, for the place between voxels
    prepared, corners, fractions = cut_boxes(case, at_N3, preparation=made["preparation"], sides_vox=sides)  # pyright: ignore[reportArgumentType]
    device, found = next(net.parameters()).device, []
    net.eval()
    for first in range(0, len(corners), scoring.batch):
        some = slice(first, first + scoring.batch)
        x = np.stack([cut(prepared.array_CXYZ, corner, np.array(sides)) for corner in corners[some]])
        x = torch.from_numpy(np.ascontiguousarray(x)).to(device)
        batch = Batch(x, torch.from_numpy(fractions[some]).float(), torch.zeros(len(x)), [], prepared.grid.spacing_mm)
        patches = made["preparation"].patch(cropped(batch, patch)).contiguous(memory_format=torch.channels_last_3d)
        turns = [[axis for axis in (2, 3, 4) if number >> (axis - 2) & 1] for number in range(8 if scoring.flips else 1)]
        with autocast(device, made["learning"].precision):
            found.append(torch.stack([net(patches.flip(axes)).sigmoid() for axes in turns]).mean(0).float().cpu().numpy())
    return np.concatenate(found or [np.zeros(0, np.float32)])


def rows_of(case: Case, at_N3: np.ndarray, probability_N: np.ndarray) -> list[dict[str, str]]:
    """Rows of a table of candidates, as the challenge takes it: COLUMNS."""
    return [
        dict(zip(COLUMNS, (case.case_id, *(f"{mm:.6f}" for mm in place), f"{value:.6f}"), strict=True))
        for place, value in zip(at_N3, probability_N, strict=True)
    ]


def unplaced(text: str, case: Case) -> str:
    """A complaint about a scan that does not say where its image lies."""
    return text.replace(f"{case.images[0].parent}/", "")


def write_classifier(out: Path, net: CandidateNet, made: Mapping[str, Any]) -> None:
    """Write model.safetensors and, last, model.json."""
    weights = out / "model.safetensors"
    save_tensors(weights, net.state_dict())
    head = {"schema": SCHEMA, "task": "candidates", "volssl_version": volssl.__version__}
    write_json(out / "model.json", {**head, **_told(made), "sha256": sha256(weights)})


def read_classifier(run: Path, overrides: Sequence[str] = (), device: torch.device | str = "cpu") -> tuple[CandidateNet, dict[str, Any]]:
    """The classifier of a finished run of detect, and its recipe as parsed by PARTS. Args: overrides: of the recipe's `boxes.candidates`,
    `scoring`, `data.leave_out` and `learning.precision`; nothing else may differ from what was trained.

    Raises: BadInput: no such run, another verb's, a newer schema, a changed weights file, a recipe at odds with the model.
    """
    told_in, weights = run / "model.json", run / "model.safetensors"
    if not told_in.is_file() or not weights.is_file():
        raise BadInput(f"--model {run}: must be a finished run of detect; found no model.json and model.safetensors in it")
    told = read_json(told_in)
    if told.get("task") != "candidates":
        raise BadInput(f"--model {run}: must be a run of detect; found one of another verb; predict takes those of finetune")
    if not isinstance(told.get("schema"), int) or told["schema"] > SCHEMA:
        raise BadInput(f"{told_in}: schema must be a whole number up to {SCHEMA}; found {told.get('schema')}; update volssl")
    if sha256(weights) != told.get("sha256"):
        raise BadInput(f"{weights}: must be the file model.json was written for; found another")
    made = recipes.parse(recipes.load(run / "recipe.yaml", overrides, verb="detect"), PARTS, f"{run}/recipe.yaml")
    own = _told(made)
    if odd := [key for key in own if own[key] != told.get(key)]:
        raise BadInput(f"{run}/recipe.yaml and overrides: must be what the model was trained with; found another {', '.join(odd)}")
    net = first_net(made, None, seed=0)
    try:
        net.load_state_dict(load_tensors(weights), strict=True)
    except RuntimeError as error:
        raise BadInput(f"{weights}: must fit the network of model.json; {error}") from None
    net.to(device, memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    return net.eval(), made


def _told(made: Mapping[str, Any]) -> dict[str, Any]:
    """What model.json says of the network and of what it sees, as JSON gives it back."""
    part: Part = made["net"]
    said = {
        "architecture": {"name": part.name, "arguments": part.arguments},
        "preparation": asdict(made["preparation"]),
        "patch_vox": made["boxes"].patch_vox,
    }
    return json.loads(json.dumps(said))
