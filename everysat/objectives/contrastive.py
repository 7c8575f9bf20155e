"""Contrastive losses between tokens of the same place in different modalities. Negatives come from all processes."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everysat.nn.gather import gather_rows, global_mean, world

Negatives = Literal["all", "other_modalities", "everything", "other_images"]


def mil_nce(
    x: Tensor,
    group: Tensor,
    row: Tensor,
    cell: Tensor,
    *,
    tau: float = 0.1,
    negatives: Negatives = "all",
    centred: bool = False,
) -> Tensor:
    """Multiple-instance InfoNCE of tokens ``x`` [token, dim] (OmniSat, section 3.2).

    Positives of a token are the tokens of the same place (``row``) and patch (``cell``) in other modalities (``group``); the
    loss is log sum exp(s / tau) over the denominator less that over the positives, averaged over the tokens that have any,
    with s the cosine similarity. The denominator of a token holds, by ``negatives``:

    - ``all``: everything but the same modality of the same place, as published;
    - ``other_modalities``: no token of the same modality at all;
    - ``everything``: all but the token itself;
    - ``other_images``: the positives and all tokens of other places.

    ``centred`` first takes the mean of its modality from each token, so that tokens that differ little from each other do not
    all count as similar (not in the papers; small models get stuck there).
    """
    with torch.autocast(x.device.type, enabled=False):
        row = row + world()[0] * (1 << 32)
        everyone, _ = gather_rows(x.float())
        (groups, _), (rows, _), (cells, _) = gather_rows(group), gather_rows(row), gather_rows(cell)
        x = x.float()
        if centred and len(groups):
            count = torch.bincount(groups)
            mean = everyone.new_zeros(len(count), everyone.shape[1]).index_add(0, groups, everyone)
            mean = mean / count.clamp(min=1)[:, None]
            x, everyone = x - mean[group], everyone - mean[groups]
        x, everyone = F.normalize(x, dim=1, eps=1e-8), F.normalize(everyone, dim=1, eps=1e-8)
        similarity = x @ everyone.T / tau
        same_group, same_row = group[:, None] == groups, row[:, None] == rows
        positive = ~same_group & same_row & (cell[:, None] == cells)
        excluded = {
            "all": same_group & same_row,
            "other_modalities": same_group,
            "everything": same_group & same_row & (cell[:, None] == cells),
            "other_images": same_row & ~positive,
        }[negatives]
        paired = positive.any(1)
        similarity, positive, excluded = similarity[paired], positive[paired], excluded[paired]
        lowest = torch.finfo(similarity.dtype).min
        denominator = similarity.masked_fill(excluded, lowest).logsumexp(1)
        numerator = similarity.masked_fill(~positive, lowest).logsumexp(1)
        return global_mean(denominator - numerator)


def info_nce(a: Tensor, b: Tensor, *, tau: float | Tensor = 0.07) -> Tensor:
    """Symmetric InfoNCE (CLIP): row i of ``a`` [n, dim] belongs to row i of ``b``, all other rows of both are negatives."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        (every_a, start), (every_b, _) = gather_rows(a), gather_rows(b)
        own = start + torch.arange(len(a), device=a.device)
        losses = [F.cross_entropy(q @ k.T / tau, own, reduction="none") for q, k in ((a, every_b), (b, every_a))]
        return global_mean(torch.cat(losses))
