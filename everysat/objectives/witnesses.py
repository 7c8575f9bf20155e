"""Alignment of all that is known of a place: what some witnesses say must match what the others say, whichever these are.

For :mod:`everysat.models.georeset`. At each place, two disjoint random sets of its witnesses are fused into Gaussians, and all pairs of the batch are told
apart by a sigmoid loss on the similarity of ProLIP (Chun et al., ICLR 2025; see :mod:`everysat.objectives.probabilistic`), so that every witness meets
every other one and none is the pivot. Places are not all strangers: near ones, and ones of which the same is said, are targets between 0 and 1. Words also
look for their cells in images (after PACL, Mukhoti et al., CVPR 2023): of the cells of an image, those most like the text decide. From a sample of one
set, what is known of each withheld witness is reconstructed; all witnesses together must lie inside what some of them say, and a place inside one
that surrounds it. Sentences of half of the places are weighted by what the other witnesses see (WINCEL), of the others not, as there will
be none beside a query. What the attributes of a polygon say, the cells of its ground match too (``ground``). A share of witnesses is corrupted: noise in images, the sentences, shapes or position of another place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.corruption import corrupted, standard_normal
from everysat.nn.draws import uniform
from everysat.nn.gather import gather_rows, global_mean, row_offset
from everysat.nn.gaussian import Gaussian, containment, divergence, expected_match
from everysat.nn.location import cartesian
from everysat.nn.ragged import ordinal, side_by_side
from everysat.nn.shapes import below, spoken
from everysat.nn.spectral import LABEL
from everysat.objectives.probabilistic import disagreement, two_sets
from everysat.types import Batch, Coords, Encoder, Objective, Place, Raster, Vector

EARTH_M = 6_371_008.8
"""Mean radius of the Earth (IUGG)."""
LIKENESS = 0.1
"""Temperature of the attention of words to cells."""
BARE = "precision_average"
"""How sets are fused whose errors are measured: beside a prior, saying nothing would make means, and so their differences, as small as wanted."""
PAIRS = 256
"""Pairs of places, one inside the other, that the inclusion of a batch is measured at."""


def soft_match(a: Gaussian, b: Gaussian, scale: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Mean over i of the sum over j of the cross-entropy between ``target`` [a, b] in 0 to 1 and sigmoid(scale x :func:`expected_match` + bias). With
    the identity as target it is :func:`everysat.objectives.probabilistic.sigmoid_match`. ``b`` is of the global batch."""
    with torch.autocast(a.mean.device.type, enabled=False):
        logits = scale * expected_match(a, b) + bias
        return global_mean((F.softplus(logits) - target * logits).sum(1))


def on_earth(places: Sequence[Place], device: torch.device | str = "cpu") -> Tensor:
    """Where places lie, m from the centre of the Earth, and half of their diagonal, m: float64 [place, 4]; NaN without ``lonlat``."""
    at = [place.lonlat or (math.nan, math.nan) for place in places]
    half = torch.tensor([math.hypot(place.height_m, place.width_m) / 2 for place in places], dtype=torch.float64)
    lonlat = torch.tensor(at, dtype=torch.float64).view(-1, 2)
    return torch.cat([EARTH_M * cartesian(lonlat), half.view(-1, 1)], 1).to(device)


def distance_m(a: Tensor, b: Tensor) -> Tensor:
    """Great-circle distances [a, b] of :func:`on_earth`; NaN where one does not say where it lies."""
    chord = (a[:, None, :3] - b[None, :, :3]).norm(dim=-1) / (2 * EARTH_M)
    return 2 * EARTH_M * torch.asin(chord.clamp(max=1))


def swapped(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """The batch where a ``share`` of places have each other's texts, and so for each layer that is no raster and for positions: drawn independently."""
    rows, offset = len(batch), row_offset(len(batch))

    def partner(purpose: int) -> Tensor:
        drawn = uniform(generator, torch.arange(rows) + offset, torch.tensor(purpose)) < share
        chosen = drawn.nonzero()[:, 0]
        return torch.arange(rows).index_copy(0, chosen, chosen.roll(1))

    layers = dict(batch.layers)
    for number, name in enumerate(sorted(batch.layers)):
        layer, other = batch.layers[name], partner(number)
        if not isinstance(layer, Raster):
            layers[name] = replace(layer, row=other.to(layer.row.device)[layer.row])
    other = partner(len(layers))
    places = [replace(p, lonlat=batch.places[int(other[i])].lonlat) for i, p in enumerate(batch.places)]
    return replace(batch, places=tuple(places), layers=layers)


class WitnessAlignment(Objective):
    """See the module's text, and :func:`build` for the options."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        scale: float = 10.0,
        bias: float = -10.0,
        cells: float = 0.5,
        ground: float = 0.0,
        most_cells: int = 64,
        reconstruction: float = 1.0,
        prior: float = 1e-4,
        inclusion: float = 0.1,
        agreement: float = 1.0,
        near_m: float = 0.0,
        same: float = 0.98,
        singles: float = 0.3,
        dropout: float = 0.0,
        corruption: float = 0.1,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "said_by"):
            raise ValueError(
                f"objective witnesses is for models of several witnesses such as georeset, {encoder.family} is none"
            )
        inner: Any = encoder
        shares = {"singles": singles, "dropout": dropout, "corruption": corruption}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be a share, 0 to 1")
        if not scale > 0 or most_cells < 1 or near_m < 0:
            raise ValueError(
                f"scale={scale} must be above 0, most_cells={most_cells} at least 1, near_m={near_m} not below 0 (metres)"
            )
        own, images = inner.own, bool(inner.config["backbone"])
        widths = dict.fromkeys(
            [*inner.members, *(["shared"] if images and own.heads == "shared" else [])], inner.backbone.dim
        )
        widths |= {"text": own.text.vector} if own.text else {}
        widths |= {"shapes": own.shapes.words.vector} if own.shapes else {}
        widths |= {"location": 3} if own.location else {}
        if len(widths) < 2 and "shared" not in widths:
            raise ValueError(f"the model has the witness {', '.join(widths)} alone: matching needs two or more")
        decoders = {name: nn.Linear(encoder.dim, n) for name, n in widths.items()} if reconstruction else {}
        self.decoders = nn.ModuleDict(decoders)
        self.near_m, self.same, self.shares, self.most_cells = near_m, same, shares, most_cells
        self.weights = {
            "cells": cells if own.text and images else 0.0,
            "ground": ground if own.text and images else 0.0,
            "reconstruction": reconstruction,
            "prior": prior,
            "inclusion": inclusion,
            "agreement": agreement,
        }
        self.log_scale, self.bias = nn.Parameter(torch.tensor(math.log(scale))), nn.Parameter(torch.tensor(float(bias)))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=math.log(100.0)).exp()

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        inner: Any = encoder
        rows, offset, known = len(batch), row_offset(len(batch)), encoder.known(batch)
        spoilt = swapped(
            corrupted(known, encoder.inputs, self.shares["corruption"], generator), self.shares["corruption"], generator
        )
        tokens = encoder.tokenize(spoilt)
        draw = uniform(generator, (torch.arange(rows) + offset)[:, None], torch.arange(2 * 64 + 4)).to(self.bias.device)
        said = inner.said_by(tokens, draw[:, 0] < 0.5)
        terms = self._terms(inner, said, batch, draw[:, 1:], generator)
        if self.weights["cells"]:
            terms["cells"] = self._cells(inner, said, batch, generator)
        if self.weights["ground"]:
            terms["ground"] = self._ground(inner, said, batch, generator)
        loss = torch.stack([self.weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, "scale": self.scale.detach()}

    def _terms(
        self, inner: Any, said: Any, batch: Batch, draw: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        places, fusion = said.places, inner.fusion
        chosen = (places.there.sum(1) > 1).nonzero()[:, 0]
        first, second = self._sets(places.there[chosen], draw[chosen])
        mine = replace(
            places, mean=places.mean[chosen], log_var=places.log_var[chosen], there=places.there[chosen], row=chosen
        )
        a, b, every = mine.fused(fusion, first), mine.fused(fusion, second), mine.fused(fusion)
        target, sides = self._targets(said, batch, chosen), []
        for x, y in ((a, b), (b, a)):
            means, log_vars, observed = (gather_rows(part)[0] for part in (y.mean, y.log_var, y.observed))
            sides.append(soft_match(x, Gaussian(means, log_vars, observed), self.scale, self.bias, target))
        still = replace(mine, mean=mine.mean.detach())
        terms = {
            "match": (sides[0] + sides[1]) / 2,
            "prior": global_mean(divergence(Gaussian(mine.mean, mine.log_var, mine.there))[mine.there]),
            "agreement": global_mean(disagreement(still.fused(BARE, first), still.fused(BARE, second))),
            "inclusion": global_mean(F.softplus(-containment(every, a))) + self._nested(every, batch, chosen),
        }
        if self.decoders:
            noise = standard_normal(generator, chosen.cpu(), a.mean.shape[1], row_offset(len(batch)), len(batch)).to(
                a.mean
            )
            withheld, z, costs = mine.there & ~first, a.sample(noise), [a.mean.sum(1)[:0]]
            for i, name in enumerate(places.names):
                decoder: Any = self.decoders[name if name in self.decoders else "shared"]
                truth = said.known[name][chosen][withheld[:, i]]
                costs.append(1 - F.cosine_similarity(decoder(z[withheld[:, i]]).float(), truth.float(), dim=-1))
            terms["reconstruction"] = global_mean(torch.cat(costs))
        return terms

    def _sets(self, there: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Two disjoint sets of the witnesses that are there. Each is left out with probability ``dropout``, of which two stay; in a share ``singles`` of
        places both sets are one witness."""
        count = there.shape[1]
        left, order = draw[:, 1 : 1 + count], draw[:, 1 + count : 3 + 2 * count]
        rank = left.masked_fill(~there, -1.0).argsort(1, descending=True).argsort(1)
        few = there & ((left >= self.shares["dropout"]) | (rank < 2))
        first, second = two_sets(few, order)
        place = order[:, 2:].masked_fill(~few, 2.0)
        one = draw[:, :1] < self.shares["singles"]

        def least(chosen: Tensor) -> Tensor:
            lowest = place.masked_fill(~chosen, 3.0).argmin(1, keepdim=True)
            return torch.zeros_like(chosen).scatter(1, lowest, True)

        return (first & ~one) | (least(first) & one), (second & ~one) | (least(second) & one)

    def _targets(self, said: Any, batch: Batch, chosen: Tensor) -> Tensor:
        """How far places ``chosen`` and all of the global batch are one, 0 to 1: 1 for itself and where sentences are alike, exp(-d^2 / 2 near_m^2) at a
        distance of d."""
        device, rows = chosen.device, len(chosen)
        own = torch.arange(rows, device=device) + row_offset(rows, device)
        target = (own[:, None] == torch.arange(gather_rows(own[:, None])[0].shape[0], device=device)).float()
        if "text" in said.known and self.same < 1:
            text = F.normalize(said.known["text"][chosen], dim=-1)
            target = torch.maximum(target, (text @ gather_rows(text)[0].T > self.same).float())
        if self.near_m:
            at = on_earth(batch.places, device)[chosen]
            near = torch.exp(-distance_m(at, gather_rows(at)[0]).square() / (2 * self.near_m**2))
            target = torch.maximum(target, near.nan_to_num(0.0).float())
        return target

    def _nested(self, every: Gaussian, batch: Batch, chosen: Tensor) -> Tensor:
        """That a place says more than one that it lies in, of up to :data:`PAIRS` such pairs of this process."""
        at = on_earth(batch.places, chosen.device)[chosen]
        inside = distance_m(at, at) + at[:, 3:] < at[:, 3]
        small, large = inside.nonzero()[:PAIRS].unbind(1)
        return global_mean(F.softplus(-containment(every[small], every[large])))

    def _cells(self, inner: Any, said: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """Cross-entropy of images, by their cells, and texts: the likeness of both is the mean over cells, in shares of their likeness."""
        places, cells = said.places, said.cells.fused(inner.fusion)
        word = places.names.index("text")
        texts = places.there[:, word].nonzero()[:, 0]
        alone = torch.zeros_like(places.there)
        alone[:, word] = places.there[:, word]
        text = places.fused(inner.fusion, alone)[texts]
        row = said.cells.row
        drawn = self._drawn(said.coords, len(batch), generator)
        likeness = expected_match(cells[drawn], text)  # [cell, text]
        beside, there, _ = side_by_side(likeness, row[drawn], len(batch))
        share = (beside.detach() / LIKENESS).masked_fill(~there[..., None], -math.inf).softmax(1).nan_to_num(0.0)
        seen = there.any(1)[texts]  # images of places that have text as well
        pooled = (share * beside).sum(1)[texts][seen]
        logits = self.scale * pooled + self.bias
        target = (texts[seen][:, None] == texts).float()
        if self.same < 1:
            vectors = F.normalize(said.known["text"], dim=-1)
            target = torch.maximum(target, (vectors[texts[seen]] @ vectors[texts].T > self.same).float())
        return global_mean((F.softplus(logits) - target * logits).sum(1))

    def _ground(self, inner: Any, said: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """Cross-entropy of cells and what polygons around their centres say, each attribute with and without its key; other ground is unknown, and left out."""
        layers = [x for name, x in sorted(batch.layers.items()) if isinstance(x, Vector) and name != LABEL]
        every = {string: 0 for layer in layers for told in layer.attributes for string in spoken(told)}
        number = {string: n for n, string in enumerate(every)}
        target = said.cells.mean.new_zeros(len(said.coords), len(number))
        for layer in layers:
            says = torch.tensor([[string in spoken(told) for string in number] for told in layer.attributes]).to(target)
            cell, shape = (index.to(target.device) for index in below(layer, said.coords.row, said.coords.at_m))
            target = target.index_add(0, cell, says[shape]).clamp(max=1)
        drawn = self._drawn(said.coords, len(batch), generator)
        drawn = drawn[target[drawn].any(1)]
        if not len(drawn):
            return global_mean(said.cells.mean.sum((1, 2))[:0])
        logits = (
            self.scale * expected_match(said.cells.fused(inner.fusion)[drawn], inner.reading(list(number))) + self.bias
        )
        return global_mean((F.softplus(logits) - target[drawn] * logits).sum(1))

    def _drawn(self, coords: Coords, rows: int, generator: torch.Generator) -> Tensor:
        """Up to ``most_cells`` cells of each place, drawn by number of the place and position of the cell alone."""
        row, at = coords.row, coords.cells().cpu()
        own = (row + row_offset(rows, row.device)).cpu()
        order = uniform(generator, own, at[:, 0] * (1 << 24) + at[:, 1]).to(row.device).argsort()
        return order[ordinal(row[order], rows) < self.most_cells]

    @torch.no_grad()
    def after_step(self, encoder: Encoder, step: int, steps: int) -> None:
        """The model gets scale and bias of its :meth:`match`."""
        inner: Any = encoder
        inner.scale.copy_(self.scale)
        inner.bias.copy_(self.bias)


def build(variant: str = "", *, encoder: Encoder, **options: Any) -> WitnessAlignment:
    """Alignment of the witnesses of a :class:`everysat.models.georeset.GeoReset`. It has no variants.

    Args:
        scale, bias: of the logits at the beginning; both are learned, and the model keeps them. About -log of the number of places in a batch, and
            lower, is a fitting bias.
        cells, ground, reconstruction, prior, inclusion, agreement: weights of the terms beside the match: of words with cells; of cells with what polygons around
            them say; of withheld witnesses; of the divergence of each witness from N(0, 1); of inclusions; of :func:`everysat.objectives.probabilistic.disagreement`.
        most_cells: of an image, drawn at random.
        near_m: places at this distance are one by exp(-1/2); 0 for places that are all strangers.
        same: cosine of the vectors of what is said of two places above which they are taken to be one; 1 for never.
        singles: share of places of which one witness is matched with one. dropout: chance of each witness to be left out, of which two stay.
        corruption: share of places whose witness is corrupted, of each.

    Raises:
        ValueError: a model without witnesses, with one alone, or options out of range.
    """
    if variant:
        raise LookupError(f"objective witnesses has no variant {variant!r}")
    return WitnessAlignment(encoder, **options)
