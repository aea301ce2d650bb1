"""PCRLv2's network and losses written plainly from sections 2 and 3 of its description: the yardstick of bench_pretrain.

Nothing of volssl is used; only the names of the weights are the same, so that a state_dict goes over and outputs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Conv(nn.Module):
    def __init__(self, incoming: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(incoming, out, 3, padding=1)
        self.norm = nn.BatchNorm3d(out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class _Up(nn.Module):
    def __init__(self, incoming: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(incoming, incoming, 2, stride=2)
        self.block = _Conv(incoming, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.up(x))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 32, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512)]
        self.levels = nn.ModuleList(nn.Sequential(_Conv(a, b), _Conv(b, c)) for a, b, c in widths)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        for number, level in enumerate(self.levels):
            x = level(self.pool(x) if number else x)
        return x


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_Up(a, a // 2) for a in (512, 256, 128))
        self.seconds = nn.ModuleList(_Conv(a, a) for a in (256, 128, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for step, second in zip(self.steps, self.seconds, strict=True):
            x = second(step(x))
            maps.append(x)
        return maps


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _Encoder(), _Decoder()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.decoder(self.encoder(x))


class _Compare(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projector = nn.BatchNorm1d(channels)
        self.predictor = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.BatchNorm1d(2 * channels), nn.ReLU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(x.mean((2, 3, 4)))
        return z, self.predictor(z)


class _Restore(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(channels, 1, 3, padding=1), nn.BatchNorm3d(1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.layers(x), size=(64, 64, 32), mode="trilinear")


class PlainPCRLv2(nn.Module):
    """The official preset: 17,111,434 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Net()
        self.comparison_heads = nn.ModuleList(_Compare(c) for c in (256, 128, 64))
        self.mid_heads = nn.ModuleList(_Restore(c) for c in (256, 128, 64))
        self.final_head = nn.Conv3d(64, 1, 1)

    def forward(self, one: Tensor, other: Tensor, locals_: Tensor, target: Tensor, *, scales: Sequence[int], progress: float) -> Tensor:
        """L_final + L_glob + beta L_mid + L_loc.

        Args: one, other: (B, 1, 64, 64, 32). locals_: (6 B, 1, 16, 16, 16), first sub-crops first. target: of `one`. scales: s0, then
            those of the 12 pairs (sub-crop 1 with one, with other, sub-crop 2 ...). progress: share of the run.
        """
        maps = [self.net(one), self.net(other), self.net(locals_)]
        batch, drawn = len(one), scales[0]
        final = F.mse_loss(torch.sigmoid(self.final_head(maps[0][-1])), target)
        mid = F.mse_loss(self.mid_heads[drawn](maps[0][drawn]), target)
        needed = {(0, drawn), (1, drawn)} | {(side, s) for pair, s in enumerate(scales[1:]) for side in (pair % 2, 2)}
        embedded = {(view, s): self.comparison_heads[s](maps[view][s]) for view, s in sorted(needed)}
        globals_ = _distance(embedded[0, drawn], embedded[1, drawn])
        pairs = []
        for pair, s in enumerate(scales[1:]):
            z, p = embedded[2, s]
            rows = slice(pair // 2 * batch, (pair // 2 + 1) * batch)
            pairs.append(_distance(embedded[pair % 2, s], (z[rows], p[rows])))
        return final + globals_ + 0.5 * (1 + math.cos(math.pi * progress)) * mid + torch.stack(pairs).mean()


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    (za, pa), (zb, pb) = a, b
    return -(F.cosine_similarity(pa, zb.detach()).mean() + F.cosine_similarity(pb, za.detach()).mean()) / 2
