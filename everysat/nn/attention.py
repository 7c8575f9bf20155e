"""Attention with contextual relative positions, in memory that does not grow with the square of the sequence.

Transformer blocks here are pre-norm. ``keep`` [batch, key] is false for keys that are not there: they are left out, so what
they hold has no effect.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from everysat.nn.position import BUCKETS, FAR_BUCKET, NEAR, PREFIX_BUCKET, Grid, bucket_of

CHUNK_ELEMENTS = 4_000_000
"""Largest number of attention logits held at once. Small enough for a processor's caches, large enough to fill its cores."""


class RelativeTable(nn.Module):
    """Table [1, head_dim, 8] of the iRPE bias: query i and key j get q_i . table[:, bucket(i, j)], one table for all heads.

    With ``locality`` above 0, each head also has a learned bias per bucket that does not depend on the query, and begins by
    favouring near cells, up to ``locality`` per cell in the last head (as in ALiBi, Press et al. 2022). The published model
    has none; small training sets need it, since a table of zeros looks everywhere alike. With ``first_head``, the bias of the
    first head is that of all (a defect of the published AnySat that its weights were trained with).
    """

    def __init__(self, head_dim: int, heads: int = 1, locality: float = 0.0, *, first_head: bool = False) -> None:
        super().__init__()
        self.first_head = first_head
        self.table = nn.Parameter(torch.zeros(1, head_dim, BUCKETS))
        slope = torch.linspace(0.0, locality, heads)[:, None]
        cells = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.5, 4.0, 0.0])  # by bucket; the prefix is near to all
        self.near = nn.Parameter(-slope * cells) if locality else None

    def forward(self, query: Tensor) -> Tensor:
        """Bias of each query [batch, head, query, head_dim] for each bucket, [batch, head, query, 8]."""
        query = query[:, :1] if self.first_head else query
        # As one product of rows: as a batch of products, the table would be copied for every sample and head.
        bias = (query.reshape(-1, query.shape[-1]) @ self.table[0]).view(*query.shape[:-1], -1)
        return bias if self.near is None else bias + self.near[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    queries: Grid | None = None,
    keys: Grid | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + relative bias) v, all [batch, head, token, head_dim].

    ``bias`` [batch or 1, head, query, 8] is what :class:`RelativeTable` gave for the queries, ``queries`` and ``keys`` how the
    tokens lie. Query rows are done in chunks. Within a row, all far keys share one bias, which cancels in the softmax: only
    the prefix columns and a band of near cells are written, not the full table.
    """
    if bias is None or queries is None or keys is None:
        mask = None if keep is None else keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    relative = bias - bias[..., FAR_BUCKET : FAR_BUCKET + 1]
    batch = max(q.shape[0], k.shape[0])
    grid_rows = max(1, CHUNK_ELEMENTS // (batch * q.shape[1] * len(keys) * queries.width))
    if grid_rows >= queries.height * queries.copies:  # one chunk: the plain formulation is faster
        spans = [(0, len(queries))]
    else:
        spans = [(0, queries.prefix)] if queries.prefix else []
        for copy in range(queries.copies):
            start = queries.prefix + copy * queries.height * queries.width
            for top in range(0, queries.height, grid_rows):
                bottom = min(top + grid_rows, queries.height)
                spans.append((start + top * queries.width, start + bottom * queries.width))
    parts = []
    for begin, end in spans:
        mask = _relative_mask(relative[:, :, begin:end], begin, queries, keys)
        if keep is not None:
            mask = mask.masked_fill(~keep[:, None, None, :], -math.inf)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, begin:end], k, v, attn_mask=mask.to(q.dtype), dropout_p=dropout, scale=scale
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _relative_mask(relative: Tensor, begin: int, queries: Grid, keys: Grid) -> Tensor:
    """Bias [batch, head, query, key] of the queries from ``begin`` on, relative to that of far keys."""
    count = relative.shape[2]
    if count == len(queries):
        table = keys.buckets(queries).to(relative.device)
        return relative.gather(-1, table.expand(*relative.shape[:2], *table.shape))
    mask = relative.new_zeros(*relative.shape[:3], len(keys))
    if begin < queries.prefix:  # the queries of the prefix see every key at the same, unknown distance: a constant
        return mask
    mask[..., : keys.prefix] = relative[..., PREFIX_BUCKET : PREFIX_BUCKET + 1]
    cells = (begin - queries.prefix) % (queries.height * queries.width) + torch.arange(count)
    top = max(int(cells[0]) // queries.width - NEAR, 0)
    bottom = min(int(cells[-1]) // queries.width + NEAR + 1, keys.height)
    near = torch.arange(top * keys.width, bottom * keys.width)
    step = [(cells // queries.width)[:, None] - (near // keys.width)[None]]
    step.append((cells % queries.width)[:, None] - (near % keys.width)[None])
    table = bucket_of(step[0].square() + step[1].square()).to(relative.device)
    band = relative.gather(-1, table.expand(*relative.shape[:2], *table.shape))
    for copy in range(keys.copies):
        start = keys.prefix + copy * keys.height * keys.width
        mask[..., start + top * keys.width : start + bottom * keys.width] = band
    return mask


class DropPath(nn.Module):
    """Leaves out a residual branch for whole samples with probability ``rate`` while training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(1.0 - self.rate)
        return x * kept / (1.0 - self.rate)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class SelfAttention(nn.Module):
    """Multi-head self-attention; with ``relative``, the bias uses the scaled query, as in iRPE.

    ``across_heads``: each token attends over its own heads, and tokens do not mix: what the published AnySat computes when its
    flash attention is on, because it hands over axes in the wrong order.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        relative: bool = False,
        locality: float = 0.0,
        dropout: float = 0.0,
        first_head: bool = False,
        across_heads: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout, self.across_heads = heads, dropout, across_heads
        self.qkv, self.proj, self.dropout = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(dropout)
        self.relative = RelativeTable(dim // heads, heads, locality, first_head=first_head) if relative else None

    def forward(self, x: Tensor, grid: Grid | None, keep: Tensor | None, first: int | None = None) -> Tensor:
        q, k, v = self._qkv(x, first)
        scale, dropout = q.shape[-1] ** -0.5, self.attention_dropout if self.training else 0.0
        if self.across_heads:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2)
        else:
            # A token of the prefix sees all keys at one distance: its bias is constant, and cancels in the softmax.
            bias = None if self.relative is None or first is not None else self.relative(q * scale)
            out = attend(q, k, v, scale=scale, bias=bias, queries=grid, keys=grid, keep=keep, dropout=dropout)
        return self.dropout(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def _qkv(self, x: Tensor, first: int | None) -> list[Tensor]:
        """Queries (of the ``first`` tokens alone), keys and values, each [batch, head, token, head_dim]."""
        if first is None:
            return list(rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads))
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        # Contiguous: of a slice, the product would be one per sample, each with its own copy of the weights.
        q = F.linear(x[:, :first].contiguous(), weight[:dim], bias[:dim])
        k, v = F.linear(x, weight[dim:], bias[dim:]).chunk(2, -1)
        return [rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v)]


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x). ``options`` are those of :class:`SelfAttention`."""

    def __init__(
        self, dim: int, heads: int, *, dropout: float = 0.0, drop_path: float = 0.0, eps: float = 1e-6, **options: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads, dropout=dropout, **options)
        self.mlp, self.drop_path = Mlp(dim, 4 * dim, dropout), DropPath(drop_path)

    def forward(
        self, x: Tensor, grid: Grid | None = None, keep: Tensor | None = None, first: int | None = None
    ) -> Tensor:
        """``first``: compute that many leading tokens alone, which must belong to the prefix of the grid."""
        x = x[:, :first] + self.drop_path(self.attn(self.norm1(x), grid, keep, first))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossAttention(nn.Module):
    """One learned query per output token, the same for every sample, reads all tokens. The bias uses the unscaled query."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        relative: bool = True,
        locality: float = 0.0,
        dropout: float = 0.0,
        first_head: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, dropout
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj, self.dropout = nn.Linear(dim, dim), nn.Dropout(dropout)
        self.relative = RelativeTable(dim // heads, heads, locality, first_head=first_head) if relative else None

    def forward(self, x: Tensor, position: Tensor, queries: Grid, keys: Grid, keep: Tensor | None) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return rearrange(t, "b n (h d) -> b h n d", h=self.heads)

        q = split(self.query + position)
        bias = None if self.relative is None else self.relative(q)
        dropout = self.attention_dropout if self.training else 0.0
        q = q.expand(x.shape[0], -1, -1, -1)
        k, v, scale = split(self.key(x)), split(self.value(x)), q.shape[-1] ** -0.5
        out = attend(q, k, v, scale=scale, bias=bias, queries=queries, keys=keys, keep=keep, dropout=dropout)
        return self.dropout(self.proj(rearrange(out, "b h n d -> b n (h d)")))


class CrossBlock(nn.Module):
    """Cross-attention without a residual (the queries carry no content), then x + mlp(norm x). ``options`` are those of
    :class:`CrossAttention`."""

    def __init__(
        self, dim: int, heads: int, *, dropout: float = 0.0, drop_path: float = 0.0, eps: float = 1e-6, **options: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, heads, dropout=dropout, **options)
        self.mlp, self.drop_path = Mlp(dim, 4 * dim, dropout), DropPath(drop_path)

    def forward(self, x: Tensor, position: Tensor, queries: Grid, keys: Grid, keep: Tensor | None = None) -> Tensor:
        x = self.attn(self.norm1(x), position, queries, keys, keep)
        return x + self.drop_path(self.mlp(self.norm2(x)))
