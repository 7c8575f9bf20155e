"""Attention that knows where things are: each query reads a few inputs near it, and positions enter as offsets from the query.

Of the unpublished later line of Atomizer: cross-attention to inputs of one's own, rotary positions in metres, and self-attention of vectors
with places, weighted by their distance or told it. Vectors without a place ("global") stand behind those that have one.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from everysat.nn.atoms import Fourier


def squashed(x: Tensor) -> Tensor:
    """x / (1 + |x|): far offsets drawn nearer, so that codes tell all of them apart."""
    return x / (1 + x.abs())


def cartesian_code(offset: Tensor, log_size: Tensor, code: Fourier) -> Tensor:
    """Code [..., 3 code.dim] of offsets [..., 2], in units of one's choice, and of the logarithm of a pixel's size [...]."""
    return torch.cat([code(squashed(offset)).flatten(-2), code(log_size)], -1)


def polar_code(offset: Tensor, log_size: Tensor, code: Fourier) -> Tensor:
    """As :func:`cartesian_code`, from distance and direction."""
    direction = torch.atan2(offset[..., 1], offset[..., 0]) / math.pi
    return torch.cat([code(squashed(offset.norm(dim=-1))), code(direction), code(log_size)], -1)


class Rotary(nn.Module):
    """Turns keys by their offset from the query: the first half of each head by the first coordinate, the second half by the second. In
    each half, pairs (j, j + half / 2) turn by offset x scale_j / base^(j / pairs); the scales are learned."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float = 10.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim={head_dim} must be a multiple of 4: pairs of numbers, for two coordinates")
        pairs = head_dim // 4
        self.register_buffer("inv_freq", base ** -(torch.arange(pairs) / pairs))
        self.scale_x, self.scale_y = (nn.Parameter(1 + 0.1 * torch.randn(pairs)) for _ in range(2))

    def forward(self, keys: Tensor, offset: Tensor) -> Tensor:
        """``keys`` [..., head, head_dim] at ``offset`` [..., 2] from the query."""
        scale = torch.stack([self.scale_x, self.scale_y]) * self.inv_freq
        angle = (offset[..., None] * scale)[..., None, :, :]
        pairs = keys.unflatten(-1, (2, 2, -1))
        a, b = pairs.unbind(-2)
        sin, cos = angle.sin(), angle.cos()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3)


class LocalReading(nn.Module):
    """Each query [n, dim] reads the inputs [n, input, context] that are its own."""

    def __init__(
        self, dim: int, context: int, heads: int, head_dim: int, *, out: int | None = None, rotary: bool = False
    ) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, inner, bias=False) for size in (dim, context, context))
        self.to_out = nn.Linear(inner, out or dim)
        self.rope = Rotary(head_dim) if rotary else None

    def forward(self, x: Tensor, context: Tensor, keep: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """What the queries read, [n, out]. ``keep`` bool [n, input]; ``offset`` [n, input, 2] of the inputs from their query. A query that has
        none reads zeros."""
        q = rearrange(self.to_q(x), "n (h d) -> n h 1 d", h=self.heads)
        k, v = (rearrange(t(context), "n m (h d) -> n m h d", h=self.heads) for t in (self.to_k, self.to_v))
        if self.rope is not None:
            assert offset is not None, "rotary positions need offsets"
            k = self.rope(k, offset)
        mask = None if keep is None else keep[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        if keep is not None:
            out = torch.where(keep.any(-1)[:, None, None, None], out, 0.0)
        return self.to_out(out.flatten(1))


class GaussianAttention(nn.Module):
    """Self-attention whose logits fall with the square of the distance: -distance^2 / (2 sigma^2), a learned sigma per head. Pairs with
    a vector without a place have one learned bias instead."""

    def __init__(self, dim: int, heads: int, head_dim: int, sigma: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.log_sigma = nn.Parameter(torch.full((heads,), math.log(sigma)))
        self.global_bias = nn.Parameter(torch.zeros(()))
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """What ``x`` [place, n, dim] reads; ``at`` [place, those with a place, 2]."""
        qkv = rearrange(self.to_qkv(x), "p n (three h d) -> three p h n d", three=3, h=self.heads)
        squared = (at[:, :, None] - at[:, None]).square().sum(-1)
        near = -squared[:, None] / (2 * self.log_sigma.exp().square()[:, None, None])
        without = x.shape[1] - at.shape[1]
        known = F.pad(torch.ones_like(squared[:, None], dtype=torch.bool), (0, without, 0, without))
        bias = torch.where(known, F.pad(near, (0, without, 0, without)), self.global_bias)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        return self.to_out(rearrange(out, "p h n d -> p n (h d)"))


class RelativeAttention(nn.Module):
    """Self-attention whose keys hold a code of their offset from the query. The code's part of the key is applied to the query instead:
    the keys of all pairs are never written."""

    def __init__(self, dim: int, heads: int, head_dim: int, *, code: Fourier, unit: float) -> None:
        super().__init__()
        self.heads, self.code, self.unit = heads, code, unit
        inner = heads * head_dim
        self.to_q, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.to_k = nn.Linear(dim + 2 * code.dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """What ``x`` [place, n, dim] reads; ``at`` [place, those with a place, 2]."""
        own, relative = self.to_k.weight.split([x.shape[-1], 2 * self.code.dim], 1)
        q, k, v = (
            rearrange(t, "p n (h d) -> p h n d", h=self.heads) for t in (self.to_q(x), F.linear(x, own), self.to_v(x))
        )
        step = squashed((at[:, None] - at[:, :, None]) / self.unit)
        without = x.shape[1] - at.shape[1]
        turned = torch.einsum("phnd,hdc->phnc", q[:, :, : at.shape[1]], relative.unflatten(0, (self.heads, -1)))
        bias = torch.einsum("phnc,pnmc->phnm", turned, self.code(step).flatten(-2)) * q.shape[-1] ** -0.5
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(bias, (0, without, 0, without)))
        return self.to_out(rearrange(out, "p h n d -> p n (h d)"))


def nearest(query: Tensor, at: Tensor, count: int) -> Tensor:
    """Numbers [place, query, count] of the places ``at`` [place, n, 2] nearest to each ``query`` [place, query, 2]."""
    squared = (query[:, :, None] - at[:, None]).square().sum(-1)
    return squared.topk(count, dim=-1, largest=False).indices
