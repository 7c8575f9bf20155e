"""What a question reads from the features of a place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.ragged import side_by_side
from everysat.types import Features


class Reader(nn.Module):
    """From features and question vectors to scores of answers. ``nothing`` stands for what a place without observation (or a hidden one) shows."""

    def __init__(self, dim: int, vector: int, width: int, heads: int, answers: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.cell = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.place = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.word = nn.Sequential(nn.LayerNorm(vector), nn.Linear(vector, width), nn.GELU(), nn.Linear(width, width))
        self.film = nn.Linear(width, 4 * width)
        self.mixed = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Sequential(
            nn.LayerNorm(4 * width), nn.Dropout(dropout), nn.Linear(4 * width, 2 * width), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(2 * width, answers),
        )  # fmt: skip

    def forward(self, features: Features | None, vector: Tensor, row: Tensor) -> Tensor:
        """Scores [question, answer]; without features, of the questions alone."""
        q = self.word(vector)
        seen = self.nothing.expand(len(q), -1)
        if features is not None and len(q):
            seen = torch.where(observed(features)[row, None], self._seen(features, q, row), seen)
        return self.out(torch.cat([q, seen], -1))

    def _seen(self, features: Features, q: Tensor, row: Tensor) -> Tensor:
        x, there, _ = side_by_side(self.cell(features.mean), features.coords.row, len(features.places))
        scale, shift, place_scale, place_shift = self.film(q).chunk(4, -1)
        place = F.gelu((1 + place_scale) * self.place(features.summary)[row] + place_shift)
        if not x.shape[1]:  # no cell anywhere: the places are known by other means, or not at all
            return torch.cat([place.new_zeros(len(q), 2 * place.shape[1]), place], -1)
        h, keep = self.mixed((1 + scale)[:, None] * x[row] + shift[:, None]), there[row]
        mean = (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
        split = (*h.shape[:2], self.heads, -1)
        score = torch.einsum("qthd,qhd->qth", self.key(h).view(split), self.query(q).view(len(q), self.heads, -1))
        score = score / split_size(h, self.heads) ** 0.5
        weight = score.masked_fill(~keep[..., None], torch.finfo(score.dtype).min).softmax(1) * keep[..., None]
        picked = torch.einsum("qth,qthd->qhd", weight, self.value(h).view(split)).flatten(1)
        return torch.cat([mean, picked, place], -1)


def split_size(x: Tensor, heads: int) -> int:
    """Width of one head."""
    return x.shape[-1] // heads


def observed(features: Features) -> Tensor:
    """Which places anything is known of, bool [row]: those with a cell, and those whose summary is surer than the prior N(0, 1)."""
    seen = torch.zeros(len(features.places), dtype=torch.bool, device=features.summary.device)
    seen[features.coords.row] = True
    return seen if features.summary_var is None else seen | (features.summary_var < 1 - 1e-4).any(-1)
