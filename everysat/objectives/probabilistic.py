"""Pre-training of Gaussian representations: what some modalities say of a place must match what the others say, as far as they are sure.

For :mod:`everysat.models.prommrs`. The training of ProMM-RS is not public; this is a reconstruction from published relatives. At each place and
cell, two disjoint random sets of the modalities that are there are fused into Gaussians, and every pair of the batch is told apart by a sigmoid loss on
the expected similarity of ProLIP (Chun et al., ICLR 2025), in which variance costs: a modality that cannot know a dimension does best to say so. From
a sample of one set, what the wrapped encoder said of each withheld modality is reconstructed (its direction). Variances also learn how far the means of
the two sets are apart. A share of inputs is corrupted by noise,
so that variance learns what an unreliable input looks like. All sets of the modalities occur, which is what makes any set usable later.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.corruption import corrupted, standard_normal
from everysat.nn.draws import uniform
from everysat.nn.gather import gather_rows, global_mean, row_offset
from everysat.nn.gaussian import Gaussian, containment, disagreement, divergence, expected_match
from everysat.nn.ragged import ordinal
from everysat.types import Batch, Encoder, Objective

LEVELS = ("cell", "place")


def sigmoid_match(a: Gaussian, b: Gaussian, scale: Tensor, bias: Tensor) -> Tensor:
    """Entry i of ``a`` [n] belongs to entry i of ``b``, to no other one of the global batch: sum over all j of -log sigmoid(+-(scale x
    :func:`expected_match` + bias)), mean over i (ProLIP; the sigmoid loss of Zhai et al. 2023)."""
    with torch.autocast(a.mean.device.type, enabled=False):
        (means, start), (log_vars, _), (observed, _) = map(gather_rows, (b.mean, b.log_var, b.observed))
        logits = scale * expected_match(a, Gaussian(means, log_vars, observed)) + bias
        own = torch.arange(len(logits), device=logits.device)[:, None] + start == torch.arange(
            logits.shape[1], device=logits.device
        )
        return global_mean(F.softplus(torch.where(own, -logits, logits)).sum(1))


def two_sets(there: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Two disjoint sets, neither empty, of the modalities that are ``there`` [n, modality], at least two: bool [n, modality] each. Of k modalities
    the first set has 1 to k - 1, the second 1 to what is left, all equally often. ``noise`` [n, modality + 2], uniform in [0, 1), decides."""
    order = noise[:, 2:].masked_fill(~there, 2.0).argsort(1).argsort(1)
    count = there.sum(1)
    first = 1 + (noise[:, 0] * (count - 1)).long()
    second = 1 + (noise[:, 1] * (count - first)).long()
    return order < first[:, None], (order >= first[:, None]) & (order < (first + second)[:, None])


class ProbabilisticPretraining(Objective):
    """See the module's text, and :func:`build` for the options."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        levels: tuple[str, ...] | list[str] = LEVELS,
        cells: int = 64,
        scale: float = 10.0,
        bias: float = -10.0,
        reconstruction: float = 1.0,
        prior: float = 1e-4,
        inclusion: float = 0.1,
        agreement: float = 1.0,
        corruption: float = 0.1,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "witnesses"):
            raise ValueError(
                f"objective probabilistic is for Gaussian representations, {encoder.family} gives none: set model.probabilistic to true"
            )
        for level in levels:
            if level not in LEVELS:
                raise LookupError(f"no level is called {level!r}. {suggest(level, LEVELS)}")
        if not levels or cells < 1 or not scale > 0 or not 0 <= corruption < 1:
            raise ValueError(
                f"levels={levels}, cells={cells}, scale={scale} must be some, and corruption={corruption} a share below 1"
            )
        self.levels, self.cells, self.corruption = tuple(levels), cells, corruption
        self.weights = {
            "reconstruction": reconstruction,
            "prior": prior,
            "inclusion": inclusion,
            "agreement": agreement,
        }
        inner: Any = encoder
        kinds = list(inner.cell_heads)
        if kinds != ["shared"] and len(kinds) < 2:
            raise ValueError(f"the model has the modality {kinds[0]} alone: matching needs two or more")
        width = inner.backbone.dim
        self.decoders = nn.ModuleDict(
            {level: nn.ModuleDict({kind: nn.Linear(encoder.dim, width) for kind in kinds}) for level in levels}
            if reconstruction
            else {}
        )
        self.log_scale = nn.ParameterDict({level: nn.Parameter(torch.tensor(math.log(scale))) for level in levels})
        self.bias = nn.ParameterDict({level: nn.Parameter(torch.tensor(float(bias))) for level in levels})

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        inner: Any = encoder
        tokens = encoder.tokenize(corrupted(encoder.known(batch), encoder.inputs, self.corruption, generator))
        coords, cells, places = inner.witnesses(tokens)
        at = coords.cells()
        said = {"cell": (cells, at[:, 0] * (1 << 24) + at[:, 1]), "place": (places, torch.zeros_like(places.row))}
        terms: dict[str, Tensor] = {}
        for level in self.levels:
            found = self._terms(level, *said[level], inner.fusion, len(batch), generator)
            terms |= {f"{level}_{name}": value for name, value in found.items()}
        weights = [self.weights.get(name.partition("_")[2], 1.0) for name in terms]
        loss = torch.stack([w * term for w, term in zip(weights, terms.values(), strict=True)]).sum()
        scales = {f"{level}_scale": self.log_scale[level].exp().detach() for level in self.levels}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, **scales}

    def _terms(
        self, level: str, said: Any, where: Tensor, fusion: str, rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        row = said.row + row_offset(rows, said.row.device)
        chosen = self._drawn(said.there, row, where, generator)
        x, log_var, there, mean = (part[chosen] for part in (said.x, said.log_var, said.there, said.mean))
        names, picked = said.names, replace(said, x=x, log_var=log_var, there=there, mean=mean, row=said.row[chosen])
        seat = where[chosen][:, None] * 64 + torch.arange(there.shape[1] + 2, device=where.device)
        noise = uniform(generator, row[chosen].cpu()[:, None], seat.cpu()).to(x.device)
        first, second = two_sets(there, noise)
        a, b, every = picked.fused(fusion, first), picked.fused(fusion, second), picked.fused(fusion)
        scale = self.log_scale[level].clamp(max=math.log(100.0)).exp()
        terms = {
            "match": (sigmoid_match(a, b, scale, self.bias[level]) + sigmoid_match(b, a, scale, self.bias[level])) / 2
        }
        alone = Gaussian(mean, log_var, there)
        terms["prior"] = global_mean(divergence(alone)[there])
        still = replace(picked, mean=mean.detach())
        terms["agreement"] = global_mean(disagreement(still.fused(fusion, first), still.fused(fusion, second)))
        terms["inclusion"] = global_mean(F.softplus(-containment(every, a)))
        if self.decoders:
            z = a.sample(
                standard_normal(generator, picked.row.cpu(), a.mean.shape[1], row_offset(rows), rows).to(a.mean)
            )
            withheld = there & ~first
            decoders: Any = self.decoders[level]
            costs = []
            for i, name in enumerate(names):
                decoder = decoders[name] if name in decoders else decoders["shared"]
                cosine = F.cosine_similarity(
                    decoder(z[withheld[:, i]]).float(), x[withheld[:, i], i].detach().float(), dim=-1
                )
                costs.append(1 - cosine)
            terms["reconstruction"] = global_mean(torch.cat(costs) if costs else z.sum(1)[:0])
        return terms

    def _drawn(self, there: Tensor, row: Tensor, where: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers of at most ``cells`` cells of each place, of those that two modalities or more observed, drawn at random."""
        noise = uniform(generator, row.cpu(), where.cpu()).to(there.device)
        noise = noise.masked_fill(there.sum(1) < 2, 2.0)
        first = noise.argsort()
        local = row[first] - (row.min() if len(row) else 0)
        chosen = first[ordinal(local, int(local.max()) + 1 if len(local) else 0) < self.cells]
        return chosen[noise[chosen] < 2.0].sort().values


def build(variant: str = "", *, encoder: Encoder, **options: Any) -> ProbabilisticPretraining:
    """Gaussian pre-training of a probabilistic encoder. It has no variants.

    Args:
        levels: which Gaussians are matched, of a ``cell`` or of a ``place``. cells: of each place and step, drawn at random.
        scale, bias: of the logits at the beginning; both are learned. A bias that is too high for the many pairs that do not belong together is made up
            for by variance, which then says little.
        reconstruction, prior, inclusion, agreement: weights of the terms beside the match: of withheld modalities; of the divergence of each modality
            from N(0, 1); of the fused Gaussian of all lying inside that of some; of :func:`disagreement` between the two sets, which variances alone
            learn from. Without it variances have an order but no size: on made data squared errors were some 70 times as large as they said.
        corruption: share of places whose layer is corrupted, of each layer.

    Raises:
        ValueError: the encoder is not probabilistic, or has one modality.
    """
    if variant:
        raise LookupError(f"objective probabilistic has no variant {variant!r}")
    return ProbabilisticPretraining(encoder, **options)
