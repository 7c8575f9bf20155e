"""Contrastive losses between tokens of the same place in different modalities, and pre-training by them. Negatives come from all
processes."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.contrast import info_nce as info_nce
from everysat.nn.contrast import over_pairs
from everysat.nn.draws import uniform
from everysat.nn.gather import gather_rows, global_mean, row_offset, world
from everysat.nn.ragged import ordinal
from everysat.types import Batch, Encoder, Objective, Tokens

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


class ContrastivePretraining(Objective):
    """Symmetric InfoNCE between the tokens that two modalities have of the same ground, averaged over all pairs of modalities
    that the batch has (CLIP, Radford et al. 2021, between patches in place of images).

    For encoders that give one token per place, modality and cell, such as SimpleSat and OmniSat: tokens are contrasted before they are
    fused, and what fuses them does not learn.

    Args:
        encoder: what is trained; it reads at least two layers.
        cells: drawn from each place, of those that two modalities observed. All cells of a large place would be too many pairs, and
            neighbours are alike.
        tau: temperature at the beginning; it is learned, and stays above 0.01.
    """

    def __init__(self, encoder: Encoder, *, cells: int = 256, tau: float = 0.07) -> None:
        super().__init__()
        if len(encoder.inputs) < 2:
            raise ValueError(
                f"the model reads {', '.join(encoder.inputs) or 'no layer'}: contrast needs two layers or more"
            )
        if cells < 1 or not tau > 0.01:
            raise ValueError(f"cells={cells} must be 1 or more, and tau={tau} above 0.01")
        self.cells = cells
        self.log_scale = nn.Parameter(torch.tensor(-math.log(tau)))

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        tokens = encoder.tokenize(batch)
        slot = self._drawn(encoder, tokens, generator)
        scale = self.log_scale.clamp(max=math.log(100.0)).exp()
        losses, counts = [], []
        for a, b in combinations(
            range(len(encoder.inputs)), 2
        ):  # also those not in this batch: other processes may have them
            both = slot[(slot[:, a] >= 0) & (slot[:, b] >= 0)]
            losses.append(info_nce(tokens.x[both[:, a]], tokens.x[both[:, b]], tau=1.0 / scale))
            counts.append(len(both))
        return {"loss": over_pairs(losses, counts), "tau": (1.0 / scale).detach()}

    def _drawn(self, encoder: Encoder, tokens: Tokens, generator: torch.Generator) -> Tensor:
        """Numbers of the tokens of drawn cells, int64 [cell, modality]; -1 where a modality has none."""
        at, device = tokens.coords.cells(), tokens.x.device
        order = torch.tensor([list(encoder.inputs).index(name) for name in tokens.groups], device=device).long()
        where = torch.stack([tokens.coords.row, at[:, 0], at[:, 1]], 1)
        keys, cell = torch.unique(where, dim=0, return_inverse=True)
        slot = torch.full((len(keys), len(encoder.inputs)), -1, device=device)
        slot = slot.index_put((cell, order[tokens.coords.group]), torch.arange(len(tokens), device=device))
        if int((slot >= 0).sum()) < len(tokens):
            raise ValueError(
                f"{encoder.family} gives several tokens of one layer at a cell; this objective is for one token per place, layer and cell"
            )
        row = keys[:, 0] + row_offset(len(tokens.places), device)
        noise = uniform(generator, row.cpu(), (keys[:, 1] * (1 << 24) + keys[:, 2]).cpu()).to(device)
        noise[(slot >= 0).sum(1) < 2] = 2.0
        first = noise.argsort()
        chosen = first[ordinal(keys[first, 0], len(tokens.places)) < self.cells]
        return slot[chosen[noise[chosen] < 2.0].sort().values]


def build(variant: str = "", *, encoder: Encoder, **options: object) -> ContrastivePretraining:
    """Contrast between the modalities of a cell, for that encoder. It has no variants."""
    if variant:
        raise LookupError(f"objective contrastive has no variant {variant!r}")
    return ContrastivePretraining(encoder, **options)  # type: ignore[arg-type]
