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
from volssl.methods.method import AbstractMethod, Turn, middle
from volssl.nets.heads import ComparisonHead, MidRestorationHead, RestorationHead
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
        resolution at every step, besides the drawn scale. fade: the mid-scale term fades by (1 + cos(pi progress)) / 2.
    """

    views: Literal["first", "both", "none"] = "first"
    head: RestorationHead = "sigmoid"
    final: bool = True
    fade: bool = True


@dataclass(frozen=True)
class Comparison:
    """Siamese terms.

    Attributes: globals: weight of the term of the two globals; locals: of all pairs of a global and a sub-crop; 0 leaves one out.
        reduction: "mean" (the reference code) or "sum" (the paper) over those pairs. scales: "each" pair draws its own decoder scale
        (the reference code), or one scale is "shared" by all terms of a step (the paper).
    """

    globals: float = 1.0
    locals: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    scales: Literal["each", "shared"] = "each"


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
        "official": {"crops": {"tissue": {"rule": "body", "limit": 0.15, "relative_to": "output"}}},
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
        channels, norm = self.net.decoder.channels, self.net.arguments["norm"]
        self.comparison_heads = nn.ModuleList(ComparisonHead(c) for c in channels)
        self.mid_heads = nn.ModuleList(MidRestorationHead(c, kind=restoration.head, norm=norm) for c in channels)
        # Without a full-resolution term the head would never learn, so it is not there.
        self.final_head = nn.Conv3d(channels[-1], 1, 1) if restoration.final else None

    @property
    def encoder(self) -> nn.Module:
        """The backbone's encoder: what a bundle holds."""
        return self.net.encoder

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
        if batch_size < 2:
            faults.append(f"patches.batch_size: batch normalisation in the comparison heads needs at least 2; found {batch_size}")
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
        for i, box in enumerate(boxes[2]):
            stream = draws.fork(f"local{i}")
            crop = self._take(x_BCXYZ, box, self.local_vox, draws=stream, spacing_mm=spacing_mm)
            locals_.append(self.corruption.seen(crop, stream, swap=False))
        # The scales are drawn from the step alone: all samples, and all processes, share them.
        scales = generator(draws.seed, "scales", draws.step).integers(len(self.comparison_heads), size=1 + 2 * len(locals_))
        if self.comparison.scales == "shared":
            scales[:] = scales[0]
        local_views = torch.cat(locals_) if locals_ else x_BCXYZ.new_empty(0)
        return Views(seen[0], seen[1], local_views, (*boxes[:2], *boxes[2]), int(scales[0]), tuple(scales[1:].tolist()))

    def _take(self, x_BCXYZ: Tensor, box: Box, size: Size, *, draws: Draws, spacing_mm: tuple[float, float, float]) -> Tensor:
        return take(x_BCXYZ, box, size, matrix_B33=self.geometry.sample(draws), spacing_mm=spacing_mm, sampler=self.sampler)

    def compile_views(self) -> None:
        """Compile the resampling of the views."""
        self.sampler = compiled_sampler()

    def turns(self, views: Views, progress: float) -> Iterator[Turn]:
        """One turn with all terms; terms that are switched off are absent."""
        maps = [self.net(views.one.seen), self.net(views.other.seen)]
        losses: dict[str, Tensor] = {}
        sides = {"first": (0,), "both": (0, 1), "none": ()}[self.restoration.views]
        if sides:
            fade = cosine(progress) if self.restoration.fade else 1.0
            targets = [(views.one, views.other)[side].target.float() for side in sides]
            if self.restoration.final:
                final = [F.mse_loss(self._restored(maps[side]), target) for side, target in zip(sides, targets, strict=True)]
                losses["restore"] = torch.stack(final).sum()
            mid = [F.mse_loss(self._mid(maps[side], views.scale), target) for side, target in zip(sides, targets, strict=True)]
            losses["restore_mid"] = fade * torch.stack(mid).sum()
        losses |= self._comparisons(maps, views)
        yield "all", losses

    def _restored(self, maps: list[Tensor]) -> Tensor:
        assert self.final_head is not None, "restoration.final is off"
        return torch.sigmoid(self.final_head(maps[-1]).float())

    def _mid(self, maps: list[Tensor], scale: int) -> Tensor:
        return self.mid_heads[scale](maps[scale], self.global_vox)

    def _comparisons(self, maps: list[list[Tensor]], views: Views) -> dict[str, Tensor]:
        number, batch = len(views.local_scales) // 2, len(views.one.seen)
        use_locals = bool(self.comparison.locals) and number > 0
        if use_locals:
            # As in the reference the sub-crops pass the network together, so a head's statistics are those of all of them.
            maps = [*maps, self.net(views.locals)]

        @cache
        def embed(view: int, scale: int) -> tuple[Tensor, Tensor]:
            return self.comparison_heads[scale](maps[view][scale])

        losses = {}
        if self.comparison.globals:
            (z, p), (w, q) = embed(0, views.scale), embed(1, views.scale)
            losses["compare_globals"] = self.comparison.globals * siamese_distance(p, z, q, w)
        if use_locals:
            distances = []
            for pair, scale in enumerate(views.local_scales):
                (z, p), of_locals = embed(pair % 2, scale), embed(2, scale)
                w, q = (t.view(number, batch, -1)[pair // 2] for t in of_locals)
                distances.append(siamese_distance(p, z, q, w))
            stacked = torch.stack(distances)
            losses["compare_locals"] = self.comparison.locals * (stacked.mean() if self.comparison.reduction == "mean" else stacked.sum())
        return losses

    @torch.no_grad()
    def pictures(self, views: Views) -> Mapping[str, Tensor]:
        """Seen (scaled to its own range), target, restoration by the final head."""
        seen = middle(views.one.seen)
        low, high = seen.amin((1, 2, 3), keepdim=True), seen.amax((1, 2, 3), keepdim=True)
        columns = {"input": (seen - low) / (high - low).clamp(min=1e-6), "target": middle(views.one.target)}
        if self.restoration.views != "none":
            maps = self.net(views.one.seen)
            restored = self._restored(maps) if self.restoration.final else self._mid(maps, len(maps) - 1)
            columns["restored"] = middle(restored)
        return columns
