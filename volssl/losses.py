"""Formulas with two or more users."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def siamese_distance(p_BD: Tensor, z_BD: Tensor, q_BD: Tensor, w_BD: Tensor) -> Tensor:
    """-1/2 [ <cos(p, sg w)> + <cos(q, sg z)> ] of two views (p, z) and (q, w); in [-1, 1], lower is more alike.

    Args: p_BD, q_BD: predictions; z_BD, w_BD: projections, through which no gradient passes.
    Source: SimSiam (Chen and He 2021) as used by PCRLv2, section 3 of its description.
    """
    one = F.cosine_similarity(p_BD, w_BD.detach(), dim=1).mean()
    other = F.cosine_similarity(q_BD, z_BD.detach(), dim=1).mean()
    return -(one + other) / 2
