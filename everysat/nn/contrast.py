"""The contrast between two lists of vectors that belong together pair by pair. Negatives come from all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everysat.nn.gather import gather_rows, global_mean


def info_nce(a: Tensor, b: Tensor, *, tau: float | Tensor = 0.07) -> Tensor:
    """Symmetric InfoNCE (CLIP): row i of ``a`` [n, dim] belongs to row i of ``b``, all other rows of both are negatives."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        (every_a, start), (every_b, _) = gather_rows(a), gather_rows(b)
        own = start + torch.arange(len(a), device=a.device)
        losses = [F.cross_entropy(q @ k.T / tau, own, reduction="none") for q, k in ((a, every_b), (b, every_a))]
        return global_mean(torch.cat(losses))


def over_pairs(losses: list[Tensor], counts: list[int]) -> Tensor:
    """Mean of the losses of pairs of modalities over those that the global batch has: ``counts`` says how many rows this process has of each."""
    every, _ = gather_rows(torch.tensor([counts], device=losses[0].device))
    there = (every.sum(0) > 0).to(losses[0].dtype)
    return (torch.stack(losses) * there).sum() / there.sum().clamp(min=1)
