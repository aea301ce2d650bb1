"""PCRLv2: restoration on a feature pyramid and Siamese comparison of two global views and their sub-crops.

Source: Zhou, Lu, Chen, Yang, Yu, "A Unified Visual Information Preservation Framework for Self-supervised Pre-training in Medical Image
Analysis", TPAMI 2023 (arXiv 2301.00772). This is the 3D method of the authors' code with its data faults mended: sub-crops lie inside the
box of the two globals, the tissue rule is capped and looks at each view's own size, and the fading of the mid-scale restoration is tied to
the run's length. The presets `official` and `paper` set what differs between code and paper (section 3 of the specification).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volssl.augment.corrupt import PatchSwap
from volssl.augment.crops import PairCrops
from volssl.augment.intensity import Blur, Gamma, Noise, zscore
from volssl.augment.spatial import Affine, Box, Sampler, compiled_sampler, take
from volssl.draws import Draws, generator
from volssl.files import BadInput
from volssl.losses import siamese_distance
from volssl.methods.method import AbstractMethod, Glance, Turn, middle
from volssl.methods.momentum import MomentumTarget
from volssl.nets.blocks import Norm
from volssl.nets.composed import shared_kernels
from volssl.nets.heads import ComparisonHead, MidRestorationHead, RestorationHead, precise
from volssl.nets.sides import side_fault
from volssl.schedule import cosine

RECIPE_NAME = "PCRLv2"
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Corruption:
    """What restoration has to undo; the reference's ranges. Sub-crops are not swapped."""

    blur: Blur = Blur()
    noise: Noise = Noise()
    gamma: Gamma = Gamma()
    swap: PatchSwap = PatchSwap()

    def seen(self, crop: Tensor, draws: Draws, *, swap: bool) -> Tensor:
        """What the network sees of clean crops (B, 1, X, Y, Z): corrupted, for globals with the swap, and z-scored."""
        chain = {"blur": self.blur, "noise": self.noise, "gamma": self.gamma}
        if swap:
            chain["swap"] = self.swap
        for name, transform in chain.items():
            crop = transform.apply(crop, transform.sample(draws.fork(name)))
        return zscore(crop)


@dataclass(frozen=True)
class Restoration:
    """Which views are restored and how.

    Attributes: views: "first" (the reference code), "both" (the paper) or "none". head: see `MidRestorationHead`. final: restore at full
        resolution at every step, besides the drawn scale. fade: beta, the weight of the drawn scale's term, falls from 1 to 0 over the run
        by (1 + cos(pi progress)) / 2; otherwise it stays 1. norm: in the heads of the scales; by default the net's.
    """

    views: Literal["first", "both", "none"] = "first"
    head: RestorationHead = "sigmoid"
    final: bool = True
    fade: bool = True
    norm: Norm | None = None


@dataclass(frozen=True)
class Comparison:
    """Siamese terms.

    Attributes: globals: weight of the term of the two globals; locals: of all pairs of a global and a sub-crop; 0 leaves one out.
        reduction: "mean" (the reference code) or "sum" (the paper) over those pairs. scales: "each" pair draws its own decoder scale
        (the reference code), or one scale is "shared" by all terms of a step (the paper). decoder_scales: the decoder's maps that are
        drawn from, here and for the restoration, counted from the coarsest, 0; none named means all. norm: in the heads: "batch" over the
        samples of the step, of which there must be two; "group" over groups of a sample's channels and "instance" over all of them
        (a pooled vector has no voxels to normalise over), both of which can take a batch of one. target: what is predicted: projections
        of the trained network under a "stop_gradient" (the reference code, SimSiam), or of a copy that follows it by "momentum" (BYOL).
        momentum: of that copy at the start, in [0, 1]; it rises to 1 over the run by a cosine, see `momentum_at`.
    """

    globals: float = 1.0
    locals: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    scales: Literal["each", "shared"] = "each"
    decoder_scales: tuple[int, ...] = ()
    norm: Norm = "batch"
    target: Literal["stop_gradient", "momentum"] = "stop_gradient"
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise BadInput(f"momentum must lie in [0, 1]; found {self.momentum}")


@dataclass(frozen=True)
class View:
    """A crop as the network sees it and, for a global, the same crop before it was corrupted: (B, 1, X, Y, Z)."""

    seen: Tensor
    target: Tensor


@dataclass(frozen=True)
class Views:
    """The views of one step and the numbers that were drawn for them.

    Attributes: one, other: the globals. locals: sub-crops, sample-minor (view 0 of all samples first), (L B, 1, x, y, z). boxes: of the
        two globals and the sub-crops in the parent. scale: decoder scale of the global comparison and the mid restoration; local_scales:
        of each pair of sub-crop and global, 2 L numbers.
    """

    one: View
    other: View
    locals: Tensor
    boxes: tuple[Box, ...]
    scale: int
    local_scales: tuple[int, ...]


class PCRLv2(AbstractMethod):
    """See the module. Loss: L_final + L_glob + beta L_mid + L_loc, section 3 of the specification.

    Args: net: a backbone with encoder and decoder, without skips. crops: the boxes. global_vox, local_vox: size the crops are resampled
        to. geometry: flip and affine. corruption, restoration, comparison: see there.
    """

    citation = (
        "Zhou et al., A Unified Visual Information Preservation Framework for Self-supervised Pre-training in Medical Image Analysis, "
        "TPAMI 2023"
    )
    normalisation = "zscore"
    # Named sets of arguments; a recipe's own keys are laid over them.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # room: of a chest CT of 350 x 350 x 300 mm, what the reference's borders leave for 112 x 112 x 96 voxels (209 x 209 x 266).
        "official": {"crops": {"room": (1.87, 1.87, 2.77), "tissue": {"rule": "body", "limit": 0.15, "relative_to": "output"}}},
        "paper": {
            "restoration": {"views": "both", "head": "conv", "final": False, "fade": False},
            "comparison": {"reduction": "sum", "scales": "shared"},
        },
    }

    def __init__(
        self,
        net: nn.Module,
        *,
        crops: PairCrops = PairCrops(),
        out_vox: tuple[Size, Size] = ((64, 64, 32), (16, 16, 16)),
        geometry: Affine = Affine(),
        corruption: Corruption = Corruption(),
        restoration: Restoration = Restoration(),
        comparison: Comparison = Comparison(),
    ) -> None:
        super().__init__()
        self.net = net
        self.crops, self.geometry, self.corruption = crops, geometry, corruption
        self.restoration, self.comparison = restoration, comparison
        self.global_vox, self.local_vox = out_vox
        self.sampler: Sampler | None = None
        self.view_vox = self.global_vox
        channels, norm = self.net.decoder.channels, restoration.norm or self.net.arguments["norm"]
        self.scales = _scales(comparison.decoder_scales, len(channels))
        # A head whose term is switched off would never learn, so it is not there.
        compared = self.scales if comparison.globals or comparison.locals else ()
        restored = self.scales if restoration.views != "none" else ()
        self.comparison_heads = nn.ModuleDict({str(s): ComparisonHead(channels[s], norm=comparison.norm) for s in compared})
        self.mid_heads = nn.ModuleDict({str(s): MidRestorationHead(channels[s], kind=restoration.head, norm=norm) for s in restored})
        self.final_head = nn.Conv3d(channels[-1], 1, 1) if restored and restoration.final else None
        follows = comparison.target == "momentum" and len(compared) > 0
        self.target = MomentumTarget(self.net, self._projectors(), start=comparison.momentum) if follows else None

    @property
    def encoder(self) -> nn.Module:
        """The backbone's encoder: what a bundle holds."""
        return self.net.encoder

    def _projectors(self) -> dict[str, nn.Module]:
        heads: dict[str, Any] = dict(self.comparison_heads.items())
        return {scale: head.projector for scale, head in heads.items()}

    def check(self, box_vox: Size, batch_size: int) -> None:
        """Raises: BadInput: sizes that do not fit or divide, a batch that batch normalisation cannot take, nothing to learn from."""
        faults = []
        try:
            self.crops.check(box_vox)
        except BadInput as error:
            faults.append(f"method.crops: {error}")
        for name, size in (("global", self.global_vox), ("sub-crop", self.local_vox)):
            if (fault := side_fault(size, self.net.stride, norm=self.net.arguments["norm"])) is not None:
                faults.append(f"method.out_vox: {name}: {fault}")
        if batch_size < 2 and self.comparison_heads and self.comparison.norm == "batch":
            faults.append(
                "patches.batch_size: batch normalisation in the comparison heads needs at least 2 samples over all processes; found "
                f"{batch_size}; raise it, or set method.comparison.norm to group"
            )
        if self.restoration.views == "none" and not (self.comparison.globals or self.comparison.locals):
            faults.append("method: restoration or comparison must be on; found both off")
        if faults:
            raise BadInput("\n".join(faults))

    def views(self, x_BCXYZ: Tensor, draws: Draws, *, spacing_mm: tuple[float, float, float]) -> Views:
        """Two corrupted globals with their clean targets, and the sub-crops."""
        boxes = self.crops.sample(draws.fork("boxes"), x_BCXYZ, self.global_vox)
        seen = []
        for name, box in zip(("one", "other"), boxes[:2], strict=True):
            stream = draws.fork(name)
            target = self._take(x_BCXYZ, box, self.global_vox, draws=stream, spacing_mm=spacing_mm)
            seen.append(View(self.corruption.seen(target, stream, swap=True), target))
        locals_ = []
        for i, box in enumerate(boxes[2] if self.comparison.locals else []):
            stream = draws.fork(f"local{i}")
            crop = self._take(x_BCXYZ, box, self.local_vox, draws=stream, spacing_mm=spacing_mm)
            locals_.append(self.corruption.seen(crop, stream, swap=False))
        # The scales are drawn from the step alone: all samples, and all processes, share them.
        places = generator(draws.seed, "scales", draws.step).integers(len(self.scales), size=1 + 2 * len(locals_))
        if self.comparison.scales == "shared":
            places[:] = places[0]
        scale, *local_scales = (self.scales[place] for place in places)
        local_views = torch.cat(locals_) if locals_ else x_BCXYZ.new_empty(0)
        return Views(seen[0], seen[1], local_views, (*boxes[:2], *boxes[2]), scale, tuple(local_scales))

    def _take(self, x_BCXYZ: Tensor, box: Box, size: Size, *, draws: Draws, spacing_mm: tuple[float, float, float]) -> Tensor:
        return take(x_BCXYZ, box, size, matrix_B33=self.geometry.sample(draws), spacing_mm=spacing_mm, sampler=self.sampler)

    def compile_views(self) -> None:
        """Compile the resampling of the views."""
        self.sampler = compiled_sampler()

    def turns(self, views: Views, progress: float) -> Iterator[Turn]:
        """One turn with all terms; terms that are switched off are absent."""
        both = len(self.comparison_heads) > 0 or self.restoration.views == "both"
        with shared_kernels():
            maps = [self.net(view.seen) for view in ((views.one, views.other) if both else (views.one,))]
            losses = self._restorations(maps, views, progress) | self._comparisons(maps, views)
        yield "all", losses

    def _restorations(self, maps: list[list[Tensor]], views: Views, progress: float) -> dict[str, Tensor]:
        """L_final and beta L_mid, over the views that are restored."""
        losses = {}
        sides = {"first": 1, "both": 2, "none": 0}[self.restoration.views]
        pairs = [(of_view, precise(view.target)) for of_view, view in zip(maps, (views.one, views.other), strict=False)][:sides]
        if pairs and self.restoration.final:
            losses["restore"] = torch.stack([F.mse_loss(self._final(of_view), target) for of_view, target in pairs]).sum()
        if pairs:
            beta = cosine(progress) if self.restoration.fade else 1.0
            mid = [F.mse_loss(self._mid(of_view, views.scale), target) for of_view, target in pairs]
            losses["restore_mid"] = beta * torch.stack(mid).sum()
        return losses

    def _final(self, maps: list[Tensor]) -> Tensor:
        assert self.final_head is not None, "restoration.final is off"
        return torch.sigmoid(precise(self.final_head(maps[-1])))

    def _mid(self, maps: list[Tensor], scale: int) -> Tensor:
        return self.mid_heads[str(scale)](maps[scale], self.global_vox)

    def _comparisons(self, maps: list[list[Tensor]], views: Views) -> dict[str, Tensor]:
        """L_glob and L_loc: every sub-crop with both globals, never with another sub-crop."""
        number, batch = len(views.local_scales) // 2, len(views.one.seen)
        if self.comparison.locals and number:
            maps = [*maps, self.net(views.locals)]
        seen = (views.one.seen, views.other.seen, views.locals)
        followed = [self.target(x_BCXYZ) for x_BCXYZ, _ in zip(seen, maps, strict=False)] if self.target is not None else []

        @cache
        def embed(view: int, scale: int) -> tuple[Tensor, Tensor]:
            z, p = self.comparison_heads[str(scale)](maps[view][scale])
            return (z if self.target is None else self.target.project(followed[view][scale], str(scale))), p

        losses = {}
        if self.comparison.globals:
            (z, p), (w, q) = embed(0, views.scale), embed(1, views.scale)
            losses["compare_globals"] = self.comparison.globals * siamese_distance(p, z, q, w)
        if self.comparison.locals and number:
            distances = []
            for pair, scale in enumerate(views.local_scales):
                (z, p), of_locals = embed(pair % 2, scale), embed(2, scale)
                w, q = (t.view(number, batch, -1)[pair // 2] for t in of_locals)
                distances.append(siamese_distance(p, z, q, w))
            stacked = torch.stack(distances)
            losses["compare_locals"] = self.comparison.locals * (stacked.mean() if self.comparison.reduction == "mean" else stacked.sum())
        return losses

    def after_step(self, progress: float) -> None:
        """The momentum target, where there is one, follows the weights that the step left."""
        if self.target is not None:
            self.target.follow(self.net, self._projectors(), progress)

    @torch.no_grad()
    def pictures(self, views: Views) -> Mapping[str, Tensor]:
        """Seen (scaled to its own range), target, restoration by the final head."""
        seen = middle(views.one.seen)
        low, high = seen.amin((1, 2, 3), keepdim=True), seen.amax((1, 2, 3), keepdim=True)
        columns = {"input": (seen - low) / (high - low).clamp(min=1e-6), "target": middle(views.one.target)}
        restored = self._best(self.net(views.one.seen))
        return columns if restored is None else columns | {"restored": middle(restored)}

    def _best(self, maps: list[Tensor]) -> Tensor | None:
        """The restoration at the finest scale that is trained, or None."""
        if self.restoration.views == "none":
            return None
        return self._final(maps) if self.restoration.final else self._mid(maps, max(self.scales))

    def glance(self, views: Views) -> Glance:
        """The globals' vectors at every scale in front of their heads, and the first global's restoration."""
        features = [self.encoder(view.seen) for view in (views.one, views.other)]
        maps = [self.net.decoder(of_view) for of_view in features]
        pooled = {f"scale{s}": (maps[0][s].float().mean((2, 3, 4)), maps[1][s].float().mean((2, 3, 4))) for s in self.scales}
        return Glance(pooled, len(self.comparison_heads) > 0, features[0][-1], self._best(maps[0]), views.one.target)

    def features(self, x_BCXYZ: Tensor) -> Tensor:
        """Mean of the encoder's deepest map, (B, D)."""
        return self.encoder(zscore(x_BCXYZ))[-1].float().mean((2, 3, 4))


def _scales(asked: tuple[int, ...], number: int) -> tuple[int, ...]:
    if len(set(asked)) < len(asked) or not all(0 <= scale < number for scale in asked):
        raise BadInput(
            f"method.comparison.decoder_scales: must be different numbers of the decoder's {number} maps, 0 (coarsest) to {number - 1}; "
            f"found {asked}"
        )
    return tuple(sorted(asked)) or tuple(range(number))
