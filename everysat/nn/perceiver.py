"""Parts of a Perceiver (Jaegle et al. 2021): a few latent vectors read many inputs, and think among themselves.

Blocks are pre-norm. Inputs of several places lie behind each other; places with as many inputs are read in one product, and nothing is
padded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class GatedMlp(nn.Module):
    """x + mlp(norm x), where the first map gives values and gates: value * gelu(gate) (Shazeer 2020)."""

    def __init__(self, dim: int, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.w1, self.w2 = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.w1(self.norm(x)).chunk(2, -1)
        return x + self.w2(value * F.gelu(gate))


class LatentAttention(nn.Module):
    """x + attention of x [place, latent, dim] over itself."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.to_qkv(self.norm(x)), "p n (three h d) -> three p h n d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(*qkv)
        return x + self.to_out(rearrange(out, "p h n d -> p n (h d)"))


class Reading(nn.Module):
    """Cross-attention: queries + what they read. Contexts are normalised by ``context_norm`` and mapped by ``to_kv``, here or elsewhere:
    its methods take keys and values [n, 2 heads head_dim]."""

    def __init__(self, dim: int, context: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(context)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    @property
    def map(self) -> tuple[nn.LayerNorm, Tensor]:
        """What turns contexts into keys and values."""
        return self.context_norm, self.to_kv.weight

    def forward(self, x: Tensor, kv: Tensor, queries: Tensor, count: Tensor) -> Tensor:
        """Queries ``x`` [n, dim] of places behind each other, ``queries`` [place] of each, read the keys and values of their place,
        ``count`` [place] of each. Where there is nothing to read, queries stay as they are."""
        q = self.to_q(self.norm(x))
        starts = [torch.cumsum(n, 0) - n for n in (queries, count)]
        parts, rows = [], []
        for asked, there in torch.unique(torch.stack([queries, count], 1), dim=0).tolist():
            if not (asked and there):
                continue
            places = torch.nonzero((queries == asked) & (count == there)).flatten()
            mine, at = _runs(q, starts[0][places], asked)
            context, _ = _runs(kv, starts[1][places], there)
            k, v = rearrange(context, "p n (two h d) -> two p h n d", two=2, h=self.heads)
            found = F.scaled_dot_product_attention(rearrange(mine, "p n (h d) -> p h n d", h=self.heads), k, v)
            parts.append(rearrange(found, "p h n d -> (p n) (h d)"))
            rows.append(at)
        if not parts:
            return x
        read = self.to_out(torch.cat(parts))
        at = torch.cat(rows)
        return x + read if len(rows) == 1 and len(at) == len(x) else x.index_add(0, at, read.to(x.dtype))

    def streamed(self, x: Tensor, chunks: Iterable[Tensor]) -> Tensor:
        """Queries ``x`` [n, dim] of one place read keys and values that come in parts, [m, 2 heads head_dim] each, and are not kept: the
        softmax is summed up on the way (Milakov & Gimelshein 2018)."""
        q = rearrange(self.to_q(self.norm(x)), "n (h d) -> h n d", h=self.heads)
        q = q.float() * q.shape[-1] ** -0.5
        top, total, read = q.new_full((*q.shape[:2], 1), -torch.inf), q.new_zeros(*q.shape[:2], 1), torch.zeros_like(q)
        for chunk in chunks:
            k, v = rearrange(chunk.float(), "m (two h d) -> two h m d", two=2, h=self.heads)
            logit = q @ k.transpose(-1, -2)
            higher = torch.maximum(top, logit.amax(-1, keepdim=True))
            weight, fade = torch.exp(logit - higher), torch.exp(top - higher)
            total, read, top = total * fade + weight.sum(-1, keepdim=True), read * fade + weight @ v, higher
        return x + self.to_out(rearrange(read / total, "h n d -> n (h d)").to(x.dtype))

    def own(self, x: Tensor, kv: Tensor, query: Tensor) -> Tensor:
        """Each query of ``x`` [n, dim] reads a few contexts of its own: ``kv`` [pair, ...] are of the queries ``query`` [pair]."""
        q = rearrange(self.to_q(self.norm(x)), "n (h d) -> n h d", h=self.heads)
        k, v = rearrange(kv, "n (two h d) -> two n h d", two=2, h=self.heads)
        logit = (q[query] * k).sum(-1).float() * q.shape[-1] ** -0.5
        # The largest logit of a query is a constant of its softmax: it needs no gradient.
        top = logit.new_full((len(x), self.heads), -torch.inf)
        top = top.scatter_reduce(0, query[:, None].expand_as(logit), logit.detach(), "amax")
        weight = torch.exp(logit - top[query])
        total = weight.new_zeros(len(x), self.heads).index_add(0, query, weight)
        share = (weight / total[query])[..., None].to(v.dtype)
        read = v.new_zeros(q.shape).index_add(0, query, share * v)
        return x + self.to_out(read.flatten(1)) * (total[:, :1] > 0)


def _runs(x: Tensor, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The ``size`` rows of x from each start on, [start, size, dim], and their numbers. Without a copy where they lie behind each other."""
    at = (start[:, None] + torch.arange(size, device=x.device)).flatten()
    first = int(start[0])
    together = bool((start[1:] - start[:-1] == size).all())
    rows = x[first : first + len(at)] if together else x[at]
    return rows.view(len(start), size, -1), at


class Pooling(nn.Module):
    """One learned query reads the latents: [place, dim]. ``temperature`` divides the logits beside the usual scale."""

    def __init__(self, dim: int, heads: int, head_dim: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.heads, self.temperature = heads, temperature
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out, self.norm = nn.Linear(heads * head_dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.to_q(self.query), "p n (h d) -> p h n d", h=self.heads).expand(len(x), -1, -1, -1)
        k, v = rearrange(self.to_kv(x), "p n (two h d) -> two p h n d", two=2, h=self.heads)
        scale = q.shape[-1] ** -0.5 / self.temperature
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.norm(self.to_out(rearrange(out, "p h n d -> p n (h d)")))[:, 0]
