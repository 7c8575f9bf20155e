"""L-TAE: a time series of any length to one vector, per pixel or patch (Garnot & Landrieu 2020, as changed in OmniSat)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from everysat.nn.position import sinusoid


class Ltae(nn.Module):
    """Series of observations to one vector each, by attention over dates with learned queries.

    Args:
        inputs: numbers per observation and place of the series (bands, or bands x pixels of a patch).
        widths: of the layers applied to each observation; the last is that of the values.
        out_widths: of the layers applied to the result.
        period: longest wavelength of the date code, days.
        normalise: group-normalise each series over its dates before attention (OmniSat: optical series only).
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
    ) -> None:
        super().__init__()
        dim = widths[-1]
        self.heads, self.key_dim, self.period, self.dim = heads, key_dim, period, out_widths[-1]
        self.attention_dropout = attention_dropout
        self.observation = _mlp(inputs, widths, dropout)
        self.in_norm = nn.GroupNorm(heads, dim) if normalise else None
        self.query = nn.Parameter(torch.randn(heads, key_dim) * math.sqrt(2 / key_dim))
        self.key = nn.Linear(dim, heads * key_dim, bias=False)  # a bias would cancel in the softmax over dates
        nn.init.normal_(self.key.weight, std=math.sqrt(2 / key_dim))
        self.out = _mlp(dim, out_widths, None)
        self.out_dropout, self.out_norm = nn.Dropout(dropout), nn.GroupNorm(heads, out_widths[-1])

    def forward(self, x: Tensor, series: Tensor, day: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Vectors [count, dim] of ``count`` series, and the mean attention over heads that each observation got.

        ``x`` [n, inputs] are the observations of all series in any order, ``series`` int64 [n] says whose, ``day`` [n] when.
        A series without observation gives a vector without meaning: leave it out.
        """
        x = self.observation(x)
        if x.shape[0] == 0:
            return x.new_zeros(count, self.dim), x.new_zeros(0)
        slots, length = _slots(series, count)
        padded = x.shape[0] != count * length
        keep = None
        if padded:
            keep = x.new_zeros(count * length, dtype=torch.bool).index_fill_(0, slots, True).view(count, length)
        values = x.new_zeros(count * length, x.shape[1]).index_copy(0, slots, x).view(count, length, -1)
        if self.in_norm is not None:
            values = _norm_over_dates(self.in_norm, values, keep)
        days = day.new_zeros(count * length).index_copy(0, slots, day).view(count, length)
        values = values + self._date_code(days).to(values.dtype)
        attention = self._attention(values, keep)
        mean_attention = attention.mean(1).reshape(-1)[slots]
        if self.training:
            attention = F.dropout(attention, self.attention_dropout)
        heads = rearrange(values, "n t (h d) -> n h t d", h=self.heads)
        pooled = rearrange(attention[:, :, None] @ heads, "n h 1 d -> n (h d)")
        return self.out_norm(self.out_dropout(self.out(pooled))), mean_attention

    def _date_code(self, days: Tensor) -> Tensor:
        """Sinusoids of dim / heads numbers, once per distinct day, repeated for each head: [n, t, dim]."""
        distinct, where = torch.unique(days, return_inverse=True)
        code = sinusoid(distinct, self.key.in_features // self.heads, self.period)
        return repeat(code, "u d -> u (h d)", h=self.heads)[where]

    def _attention(self, values: Tensor, keep: Tensor | None) -> Tensor:
        """Weights [n, head, t]. The queries are folded into the keys: one product per head instead of ``key_dim``."""
        folded = torch.einsum("hk,hkd->hd", self.query, self.key.weight.view(self.heads, self.key_dim, -1))
        logits = F.linear(values, folded / math.sqrt(self.key_dim)).transpose(1, 2)
        if keep is not None:
            # A finite value rather than -inf: a series with no observation at all must not turn into NaN.
            logits = logits.masked_fill(~keep[:, None], torch.finfo(logits.dtype).min)
        return logits.softmax(-1)


def _slots(series: Tensor, count: int) -> tuple[Tensor, int]:
    """Where each observation stands in a [count x length] array with one row a series, and that length."""
    lengths = torch.bincount(series, minlength=count)
    order = torch.argsort(series, stable=True)
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(series)
    rank[order] = torch.arange(len(series), device=series.device) - starts[series[order]]
    length = int(lengths.max())
    return series * length + rank, length


def _norm_over_dates(norm: nn.GroupNorm, values: Tensor, keep: Tensor | None) -> Tensor:
    """Group normalisation of [n, t, dim] over dates and the channels of a group; dates that are not kept do not count."""
    if keep is None:
        return norm(values.transpose(1, 2)).transpose(1, 2)
    groups = rearrange(values, "n t (g d) -> n t g d", g=norm.num_groups)
    weight = keep[:, :, None, None].to(values.dtype)
    numbers = weight.sum(dim=(1, 3), keepdim=True).clamp(min=1) * groups.shape[-1]
    mean = (groups * weight).sum(dim=(1, 3), keepdim=True) / numbers
    variance = ((groups - mean).square() * weight).sum(dim=(1, 3), keepdim=True) / numbers
    return ((groups - mean) / (variance + norm.eps).sqrt()).flatten(2) * norm.weight + norm.bias


def _mlp(inputs: int, widths: Sequence[int], dropout: float | None) -> nn.Sequential:
    """[Linear, BatchNorm, ReLU, Dropout unless None] for each width; BatchNorm runs over observations of all series and dates."""
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *widths[:-1]], widths, strict=True):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        layers += [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(*layers)
