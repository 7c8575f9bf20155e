"""L-TAE: a time series of any length to one vector, per pixel or patch (Garnot & Landrieu 2020, as changed in OmniSat)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from everysat.nn.batchnorm import RowNorm
from everysat.nn.frozen import freezing
from everysat.nn.gather import world
from everysat.nn.position import sinusoid


class Ltae(nn.Module):
    """Series of observations to one vector each, by attention over dates with learned queries.

    Args:
        inputs: numbers per observation and place of the series (bands, or bands x pixels of a patch).
        widths: of the layers applied to each observation; the last is that of the values.
        out_widths: of the layers applied to the result.
        period: longest wavelength of the date code, days.
        normalise: group-normalise each series over its dates before attention (OmniSat: optical series only).
        norm: of the layers: ``batch``, over observations (OmniSat), or ``group``, four groups of channels of each (AnySat).
        normalise_out: group-normalise the result (not in RAMEN).
        linear: ``widths`` is one linear map alone, and the series is normalised before it instead of behind (U-TAE, Garnot & Landrieu
            2021).
        windows: each head begins with a part of the series' span of its own, the first head with its first dates, the last with its last: a learned
            Gaussian window is added to the logits. Not in the papers; without it, heads of a fresh encoder all see about the mean of the series.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int] = (32, 128, 256),
        out_widths: Sequence[int] = (512, 256),
        *,
        heads: int = 16,
        key_dim: int = 8,
        period: float = 367.0,
        normalise: bool = True,
        dropout: float = 0.2,
        attention_dropout: float = 0.1,
        norm: Literal["batch", "group"] = "batch",
        normalise_out: bool = True,
        linear: bool = False,
        windows: bool = False,
    ) -> None:
        super().__init__()
        dim = widths[-1]
        self.heads, self.key_dim, self.period, self.dim = heads, key_dim, period, out_widths[-1]
        self.attention_dropout = attention_dropout
        if linear and len(widths) != 1:
            raise ValueError(f"linear=True makes one map, widths={tuple(widths)} lists {len(widths)}")
        self.observation = nn.Sequential(nn.Linear(inputs, dim)) if linear else _mlp(inputs, widths, norm, dropout)
        self.first_norm = nn.GroupNorm(heads, inputs) if normalise and linear else None
        self.in_norm = nn.GroupNorm(heads, dim) if normalise and not linear else None
        self.query = nn.Parameter(torch.randn(heads, key_dim) * math.sqrt(2 / key_dim))
        self.key = nn.Linear(dim, heads * key_dim, bias=False)  # a bias would cancel in the softmax over dates
        nn.init.normal_(self.key.weight, std=math.sqrt(2 / key_dim))
        self.centre = nn.Parameter(torch.linspace(0, 1, heads)) if windows else None
        self.log_width = nn.Parameter(torch.full((heads,), -math.log(2 * heads))) if windows else None
        self.out = _mlp(dim, out_widths, norm, None)
        self.out_dropout = nn.Dropout(dropout)
        self.out_norm = nn.GroupNorm(heads, out_widths[-1]) if normalise_out else nn.Identity()

    def forward(self, x: Tensor, series: Tensor, day: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Vectors [count, dim] of ``count`` series, and the mean attention over heads that each observation got.

        ``x`` [n, inputs] are the observations of all series in any order, ``series`` int64 [n] says whose, ``day`` [n] when.
        A series without observation gives a vector without meaning: leave it out.
        """
        return self._pooled(self._observed(x, series, count), series, day, count)

    def by_head(self, x: Tensor, series: Tensor, day: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, with the attention of each head [n, head] as it was used: in training, after dropout."""
        return self._pooled(self._observed(x, series, count), series, day, count, by_head=True)

    def pooled(self, x: Tensor, series: Tensor, day: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, of observations ``x`` [n, widths[-1]] that went through the layers for single ones."""
        return self._pooled(x, series, day, count)

    def _observed(self, x: Tensor, series: Tensor, count: int) -> Tensor:
        if self.first_norm is not None:
            x = _norm_over_dates(self.first_norm, x, series, count)
        return self.observation(x)

    def _pooled(
        self, x: Tensor, series: Tensor, day: Tensor, count: int, *, by_head: bool = False
    ) -> tuple[Tensor, Tensor]:
        if x.shape[0] == 0:
            nothing = x.new_zeros(0, self.heads) if by_head else x.new_zeros(0)
            if world()[1] > 1:  # statistics over processes need all of them, here and in the backward pass
                return self.out_norm(self.out(x.new_zeros(count, x.shape[1]) + x.sum(0))), nothing
            return x.new_zeros(count, self.dim), nothing
        lengths = torch.bincount(series, minlength=count)
        pool = self._pool_equal if int(lengths.min()) == int(lengths.max()) else self._pool_ragged
        pooled, attention = pool(x, series, day, count, by_head)
        return self.out_norm(self.out_dropout(self.out(pooled))), attention

    def _pool_equal(self, x: Tensor, series: Tensor, day: Tensor, count: int, by_head: bool) -> tuple[Tensor, Tensor]:
        """Series of one length: a rectangle [series, date, dim]."""
        order = torch.argsort(series, stable=True)
        values = x[order].view(count, -1, x.shape[1])
        if self.in_norm is not None:
            values = self.in_norm(values.transpose(1, 2)).transpose(1, 2)
        values = values + self._date_code(day[order], values.dtype).view_as(values)
        logits = F.linear(values, self._folded())
        if self.centre is not None:
            logits = logits + self._window(day, series, count)[order].view_as(logits)
        attention = logits.transpose(1, 2).softmax(-1)
        mean = attention.mean(1)
        attention = F.dropout(attention, self.attention_dropout, self.training).transpose(1, 2)
        # A product and a sum: many products of one row each are slower, and take more memory in reduced precision.
        heads = values.view(*values.shape[:2], self.heads, -1)
        told = attention.flatten(0, 1) if by_head else mean.flatten()
        told = torch.zeros_like(told).index_copy(0, order, told)
        return (heads * attention[..., None]).sum(1).flatten(1), told

    def _pool_ragged(self, x: Tensor, series: Tensor, day: Tensor, count: int, by_head: bool) -> tuple[Tensor, Tensor]:
        """Series of different lengths: sums over the observations of each, without padding."""
        if self.in_norm is not None:
            x = _norm_over_dates(self.in_norm, x, series, count)
        x = x + self._date_code(day, x.dtype)
        logits = F.linear(x, self._folded())
        if self.centre is not None:
            logits = logits + self._window(day, series, count)
        at = series[:, None].expand_as(logits)
        lowest = torch.finfo(logits.dtype).min
        peak = logits.new_full((count, self.heads), lowest).scatter_reduce(0, at, logits.detach(), "amax")
        weight = (logits - peak[series]).exp()
        attention = weight / weight.new_zeros(count, self.heads).index_add(0, series, weight)[series]
        mean = attention.mean(1)
        attention = F.dropout(attention, self.attention_dropout, self.training)
        weighted = (rearrange(x, "n (h d) -> n h d", h=self.heads) * attention[..., None]).flatten(1)
        return weighted.new_zeros(count, x.shape[1]).index_add(0, series, weighted), attention if by_head else mean

    def _date_code(self, day: Tensor, dtype: torch.dtype) -> Tensor:
        """Sinusoids of dim / heads numbers, once per distinct day, repeated for each head: [n, dim]."""
        if freezing.get():  # which days are alike must not become part of a graph
            distinct, where = day, slice(None)
        else:
            distinct, where = torch.unique(day, return_inverse=True)
        code = sinusoid(distinct, self.key.in_features // self.heads, self.period).to(dtype)
        return repeat(code, "u d -> u (h d)", h=self.heads)[where]

    def _window(self, day: Tensor, series: Tensor, count: int) -> Tensor:
        """What the windows add to the logits of each observation and head, [n, head]."""
        assert self.centre is not None
        assert self.log_width is not None
        first = day.new_zeros(count).scatter_reduce(0, series, day, "amin", include_self=False)
        span = day.new_zeros(count).scatter_reduce(0, series, day, "amax", include_self=False) - first
        share = ((day - first[series]) / span.clamp(min=1)[series]).to(self.centre.dtype)
        return -0.5 * ((share[:, None] - self.centre) / self.log_width.exp()).square()

    def _folded(self) -> Tensor:
        """Queries folded into the keys, [head, dim]: one product per head and observation instead of ``key_dim``."""
        weight = self.key.weight.view(self.heads, self.key_dim, -1)
        return torch.einsum("hk,hkd->hd", self.query, weight) / math.sqrt(self.key_dim)


def _norm_over_dates(norm: nn.GroupNorm, x: Tensor, series: Tensor, count: int) -> Tensor:
    """Group normalisation of observations [n, dim] over those of each series and the channels of a group."""
    groups = rearrange(x, "n (g d) -> n g d", g=norm.num_groups)
    numbers = (torch.bincount(series, minlength=count).clamp(min=1) * groups.shape[-1])[:, None].to(x.dtype)
    empty = x.new_zeros(count, norm.num_groups)
    mean = empty.index_add(0, series, groups.sum(-1)) / numbers
    centred = groups - mean[series][..., None]
    variance = empty.index_add(0, series, centred.square().sum(-1)) / numbers
    return (centred * (variance + norm.eps).rsqrt()[series][..., None]).flatten(1) * norm.weight + norm.bias


def _mlp(inputs: int, widths: Sequence[int], norm: str, dropout: float | None) -> nn.Sequential:
    """[Linear, norm, ReLU, Dropout unless None] for each width; BatchNorm runs over observations of all series and dates."""
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *widths[:-1]], widths, strict=True):
        layers += [nn.Linear(before, after), RowNorm(after) if norm == "batch" else nn.GroupNorm(4, after)]
        layers += [nn.ReLU()]
        layers += [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(*layers)
