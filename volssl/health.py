"""What tells a sound representation from a collapsed one while it trains: formulas, the ranges they should keep, and what to do if not.

All are measured on fixed patches, without labels. Embeddings are the pooled maps in front of the comparison's batch normalisation, which
would stretch a collapsed dimension to unit variance and so hide it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from volssl import processes
from volssl.methods.method import Glance

# N patches, D dimensions of an embedding, C channels of the encoder's deepest map


def spread(x_ND: Tensor) -> float:
    """Standard deviation per dimension of the L2-normalised embeddings, times sqrt(D), mean over the dimensions.

    1 if they point in all directions alike, 0 if all are one point. Source: Chen and He 2021 (SimSiam), section 4.1 and figure 2.
    """
    return float(F.normalize(x_ND, dim=1).std(0, correction=0).mean()) * math.sqrt(x_ND.shape[1])


def effective_rank(x_ND: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values' shares; from 1 to min(N, D).

    Source: Garrido, Balestriero, Najman, LeCun, ICML 2023, equation 1, with its epsilon of 1e-7. Its figures are for 25,600 samples; with
    fewer the rank is bounded by their number, so compare values of one run, or of runs with as many patches.
    """
    singular = torch.linalg.svdvals(x_ND.double())
    share = singular / singular.sum().clamp(min=1e-300) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(one_ND: Tensor, other_ND: Tensor) -> float:
    """Mean cosine of the two views of a patch: 1 if they are the same, 0 if they have no more in common than two patches.

    Source: Wang and Isola 2020 measure the squared distance 2 - 2 cos of the same pairs.
    """
    return float(F.cosine_similarity(one_ND, other_ND, dim=1).mean())


def standardised(x_ND: Tensor) -> Tensor:
    """Each dimension with mean 0 and variance 1 over all patches; a constant one becomes 0. What the comparison's heads do per batch."""
    centred = x_ND - x_ND.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp(min=1e-6)


def dead_share(lowest_C: Tensor, highest_C: Tensor) -> float:
    """Share of channels that have one value everywhere, on all patches: a ReLU that never fires, or a filter that ignores its input."""
    return float((highest_C - lowest_C <= 1e-6).double().mean())


def psnr_db(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB on the [0, 1] scale; infinite for no error."""
    return -10 * math.log10(squared_error) if squared_error > 0 else math.inf


@dataclass(frozen=True)
class Evidence:
    """What is kept of batches. Rows can be put one under another, from batch to batch and from process to process.

    Attributes: pooled: two views' embeddings by name, (N, 2, D). lowest, highest: of each channel, (batches, C). restored: number of
        voxels, sums of the squared error, the target and its square, (batches, 4), float64; no rows where nothing is restored.
        compared: whether the method pulls the views together.
    """

    pooled: dict[str, Tensor]
    lowest: Tensor
    highest: Tensor
    restored: Tensor
    compared: bool


def evidence_of(glance: Glance) -> Evidence:
    """Reduce what a method shows of a batch."""
    channels = glance.deepest_BCXYZ.float().transpose(0, 1).flatten(1)
    restored = torch.empty(0, 4, dtype=torch.float64, device=channels.device)
    if glance.restored is not None and glance.target is not None:
        target = glance.target.double()
        error = (glance.restored.double() - target).square().sum()
        restored = torch.stack([error.new_tensor(target.numel()), error, target.sum(), target.square().sum()])[None]
    pooled = {name: torch.stack(views, 1).float() for name, views in glance.pooled.items()}
    return Evidence(pooled, channels.amin(1)[None], channels.amax(1)[None], restored, glance.compared)


def gathered(parts: Sequence[Evidence]) -> Evidence:
    """The batches of all processes together."""
    pooled = {name: processes.gather(torch.cat([part.pooled[name] for part in parts])) for name in parts[0].pooled}
    lowest, highest, restored = (
        processes.gather(torch.cat([getattr(part, name) for part in parts])) for name in ("lowest", "highest", "restored")
    )
    return Evidence(pooled, lowest, highest, restored, parts[0].compared)


def measure(evidence: Evidence) -> dict[str, float]:
    """The numbers of metrics.jsonl, without their prefix `health/`."""
    numbers = {}
    for name, views_N2D in evidence.pooled.items():
        one, other = (standardised(view) for view in views_N2D.unbind(1))
        numbers[f"std_{name}"] = spread(views_N2D[:, 0])
        numbers[f"rank_{name}"] = effective_rank(one)
        numbers[f"rank_share_{name}"] = numbers[f"rank_{name}"] / min(one.shape)
        numbers[f"alignment_{name}"] = alignment(one, other)
    numbers["dead_channels"] = dead_share(evidence.lowest.amin(0), evidence.highest.amax(0))
    if len(evidence.restored):
        count, error, total, squares = evidence.restored.sum(0).tolist()
        # The mean predictor answers every voxel of every patch with the mean of all targets: what a network can do that ignores its input.
        trivial = psnr_db(squares / count - (total / count) ** 2)
        numbers["psnr_db"] = psnr_db(error / count)
        numbers["psnr_over_mean_db"] = numbers["psnr_db"] - trivial
    return numbers


@dataclass(frozen=True)
class Range:
    """Where a number should lie. Attributes: kind: names that begin with it. low, high: bounds. after: share of the training before
    which nothing is said, since an untrained net may well lie outside. advice: what to do."""

    kind: str
    advice: str
    low: float = -math.inf
    high: float = math.inf
    after: float = 0.0


# Bounds with a source are the source's; the others were chosen by this project, well outside of what its own runs on phantoms showed
# (docs/pretrain.md lists them). The rank is judged as a share of the most it could be, min(N, D).
STD_LOW = 0.02
RANK_SHARE_LOW = 0.1
ALIGNMENT_LOW = 0.05
DEAD_HIGH = 0.5
GAIN_LOW_DB = 0.0
RANGES = (
    Range(
        "std",
        "all patches get nearly the same embedding; lower training.lr, raise patches.batch_size, or weigh the comparison less",
        low=STD_LOW,
    ),
    Range(
        "rank_share",
        "patches differ along a few directions only; raise patches.batch_size, or weigh the comparison less against the restoration",
        low=RANK_SHARE_LOW,
        after=0.1,
    ),
    Range(
        "alignment",
        "two views of a patch are no more alike than two patches; train longer, raise patches.batch_size, or soften the corruption",
        low=ALIGNMENT_LOW,
        after=0.2,
    ),
    Range("dead_channels", "most channels of the encoder say nothing; lower training.lr or lengthen training.warmup", high=DEAD_HIGH),
    Range(
        "psnr_over_mean_db",
        "the restoration is no better than one grey value; raise training.lr, train longer, or weigh the comparison less",
        low=GAIN_LOW_DB,
        after=0.2,
    ),
)


def complaints(numbers: Mapping[str, float], *, progress: float, compared: bool) -> dict[str, str]:
    """What is out of its range, one sentence with advice per kind. `compared`: whether the views' alignment is asked of the method."""
    told = {}
    for one in RANGES:
        if progress < one.after or (one.kind == "alignment" and not compared):
            continue
        outside = {name: v for name, v in numbers.items() if name.startswith(one.kind) and not one.low <= v <= one.high}
        if outside:
            bound = f"at least {one.low:g}" if one.high == math.inf else f"at most {one.high:g}"
            found = ", ".join(f"{name} = {value:.3g}" for name, value in outside.items())
            told[one.kind] = f"health: {one.kind} should be {bound}; found {found}: {one.advice}"
    return told
