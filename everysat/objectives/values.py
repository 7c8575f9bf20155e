"""Pre-training of Atomizer without labels: say hidden values, from the band, place and date that they are asked for.

Of each place a share of the tokens is hidden: single values, all values in some cells, some bands, or some dates. The encoder reads the
others. A query, made of the codes of a hidden token without its value, reads the latents, adds the summary of the place and the feature
of the cell that it lies in, and says the normalised value. So all that features are made of is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everysat.nn.atoms import kept_at_random
from everysat.nn.draws import uniform
from everysat.nn.gather import global_mean, row_offset
from everysat.nn.perceiver import GatedMlp, Reading
from everysat.nn.ragged import ordinal
from everysat.types import Batch, Encoder, Features, Objective, Tokens

Unit = Literal["value", "cell", "band", "date"]
UNITS: tuple[Unit, ...] = ("value", "cell", "band", "date")


class HiddenValues(Objective):
    """Mean squared error of hidden values, in standard deviations of their band.

    Args:
        encoder: an Atomizer.
        hide: share of the tokens that is hidden, or of the cells, bands or dates of a place.
        units: what is hidden together; each place draws one of them.
        queries: of the hidden values of a place, at most so many are asked for.
        token_m: sides of the cells that a step draws from; the encoder's own by default.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        hide: float = 0.75,
        units: Sequence[Unit] = ("value", "cell", "band"),
        queries: int = 1024,
        token_m: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if encoder.family != "atomizer":
            raise ValueError(f"objective values is for models of family atomizer, not {encoder.family!r}")
        if not 0 < hide < 1:
            raise ValueError(f"hide={hide} must be between 0 and 1: something has to stay, something has to go")
        if not units or any(unit not in UNITS for unit in units):
            raise ValueError(f"units={list(units)} must name some of {', '.join(UNITS)}")
        if queries < 1:
            raise ValueError(f"queries={queries} must be at least 1")
        if any(not side > 0 for side in token_m):
            raise ValueError(f"token_m={list(token_m)} must be positive (metres)")
        self.hide, self.units, self.queries, self.token_m = hide, tuple(units), queries, tuple(token_m)
        settings: Any = encoder.settings
        context = settings.band_dim + 2 * settings.place_code.dim + settings.date_dim
        self.embed = nn.Linear(context, settings.dim)
        self.latents = Reading(settings.dim, settings.dim, settings.heads, settings.head_dim)
        self.place = nn.Linear(settings.dim, settings.dim)
        self.cell = nn.Linear(settings.dim, settings.dim) if settings.dense else None
        self.feed, self.norm = GatedMlp(settings.dim), nn.LayerNorm(settings.dim)
        self.value = nn.Linear(settings.dim, 1)

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        if self.token_m:
            encoder = encoder.at(token_m=self.token_m[int(torch.randint(len(self.token_m), (1,), generator=generator))])
        tokens = encoder.tokenize(batch)
        first = row_offset(len(batch), tokens.x.device)
        hidden = self.hidden(tokens, encoder, generator, first)
        asked = self._asked(tokens, hidden, generator, first)
        features, latents = encoder.encoded(tokens, hidden=hidden, generator=generator)  # type: ignore[operator]
        predicted = self.predict(encoder, asked, features, latents)
        wanted = asked.x[:, 0].float()
        loss = global_mean((predicted.float() - wanted).square())
        spread = global_mean((wanted - wanted.mean()).square()) if len(wanted) else loss.detach() * 0 + 1
        # Of the variance of the values, the share that the predictions explain.
        return {"loss": loss, "explained": 1 - loss.detach() / spread.clamp(min=1e-6)}

    def hidden(self, tokens: Tokens, encoder: Encoder, generator: torch.Generator, first: int = 0) -> Tensor:
        """Which tokens are hidden, bool [token]. ``first``: number of the first place in the global batch."""
        row = tokens.coords.row.cpu()
        which = uniform(generator, torch.arange(len(tokens.places)) + first, torch.zeros(1))
        unit = (which * len(self.units)).long()[row]
        token_m = float(encoder.settings.token_m)  # type: ignore[union-attr, arg-type]
        out = torch.zeros(len(row), dtype=torch.bool)
        for number, name in enumerate(self.units):
            luck = uniform(generator, row + first, _member(name, tokens, token_m))
            out = torch.where(unit == number, luck < self.hide, out)
        return out.to(tokens.x.device)

    def _asked(self, tokens: Tokens, hidden: Tensor, generator: torch.Generator, first: int) -> Tokens:
        gone = tokens[hidden]
        count = torch.bincount(gone.coords.row, minlength=len(tokens.places)).clamp(max=self.queries)
        return gone[kept_at_random(gone.coords.row, count, generator, first)]

    def predict(self, encoder: Encoder, asked: Tokens, features: Features, latents: Tensor) -> Tensor:
        """Values [asked] of tokens whose own ``x`` has no effect."""
        atoms: Any = encoder.atoms(asked)  # type: ignore[operator]
        queries = torch.bincount(asked.coords.row, minlength=len(asked.places))
        kv = self.latents.to_kv(self.latents.context_norm(latents)).flatten(0, 1)
        count = torch.full_like(queries, latents.shape[1])
        x = self.latents(self.embed(replace(atoms, code=None).written()), kv, queries, count)
        x = x + self.place(features.summary)[asked.coords.row]
        if self.cell is not None and len(asked):
            own, there = _feature_of(asked, features, float(encoder.settings.token_m))  # type: ignore[union-attr, arg-type]
            x = x + self.cell(features.mean[own]) * there[:, None]
        return self.value(self.norm(self.feed(x)))[:, 0]


def _member(unit: Unit, tokens: Tokens, token_m: float) -> Tensor:
    """A number for each token that those hidden together share, int64 [token]."""
    coords = tokens.coords
    if unit == "value":
        return ordinal(coords.row, len(tokens.places)).cpu()
    if unit == "band":
        kinds = torch.tensor([c.kind for c in tokens.memo["channels"]], dtype=torch.long)
        return kinds[coords.group.cpu()]
    if unit == "date":
        return coords.time_s.mean(1).nan_to_num(0.0).long().cpu()
    cell = torch.floor(coords.at_m / token_m).long().cpu()
    return cell[:, 0] * (1 << 20) + cell[:, 1]


def _feature_of(asked: Tokens, features: Features, token_m: float) -> tuple[Tensor, Tensor]:
    """Number of the feature of the cell that holds the middle of each token's pixel, and whether there is one."""
    most = 1 << 20
    cells, wanted = (torch.floor(c.at_m / token_m + 1e-4).long() for c in (features.coords, asked.coords))
    have = (features.coords.row * most + cells[:, 0]) * most + cells[:, 1]
    want = (asked.coords.row * most + wanted[:, 0]) * most + wanted[:, 1]
    order = torch.argsort(have)
    found = torch.searchsorted(have[order], want).clamp(max=max(0, len(have) - 1))
    number = order[found]
    return number, have[number] == want


def build(variant: str = "", *, encoder: Encoder, **options: Any) -> HiddenValues:
    """Reconstruction of hidden values for that encoder; no variants."""
    if variant:
        raise LookupError(f"objective values has no variants; got {variant!r}")
    return HiddenValues(encoder, **options)
