"""OmniSat's forward pass as one would write it down from the paper and the released layout: the oracle of the tests and the
reference of the benchmarks. Full tables of relative positions for every head, one attention key a head, max-pooling with
indices, one size of everything. It takes the parameters of an :class:`everysat.models.omnisat.OmniSat` and dense arrays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from everysat.models.omnisat import OmniSat
from everysat.nn.attention import Block, CrossBlock
from everysat.nn.patch import PatchCnn, TexturePool
from everysat.nn.position import Grid
from everysat.nn.temporal import Ltae


def encode(model: OmniSat, images: dict[str, Tensor], days: dict[str, Tensor]) -> Tensor:
    """[place, 1 + patch, dim] from images [place, band, y, x] and series [place, date, band, y, x] with ``days`` [place, date].
    The model must be in eval mode; every place must be a tile of ``grid`` x ``grid`` patches."""
    side = model.settings.grid
    tokens = []
    for name in model.inputs:
        projector, patch = model.projectors[name], model.settings.patch(name)
        if isinstance(projector, PatchCnn):
            x = rearrange(images[name], "b c (h y) (w x) -> (b h w) c y x", h=side, w=side)
            tokens.append(rearrange(_cnn(projector, x), "(b p) d -> b p d", p=side * side))
        elif isinstance(projector, TexturePool):
            x = rearrange(images[name], "b c (h y) (w x) -> (b h w) c y x", h=side, w=side)
            found = projector(x, torch.ones_like(x[:, 0], dtype=torch.bool))
            tokens.append(rearrange(found, "(b p) d -> b p d", p=side * side))
        else:
            x = rearrange(images[name], "b t c (h y) (w x) -> (b h w) t (c y x)", y=patch, x=patch)
            day = repeat(days[name], "b t -> (b p) t", p=side * side)
            tokens.append(rearrange(ltae_vectors(projector, x, day), "(b p) d -> b p d", p=side * side))
    position = model.position
    assert position is not None
    z = torch.cat([x + position[:, 1:] for x in tokens], dim=1)
    z = torch.cat([(model.class_token + position[:, :1]).expand(len(z), -1, -1), z], dim=1)
    keys = Grid(1, len(tokens), side, side)
    layout = Grid.guessed(len(keys)) if "sequence_grid" in model.settings.quirks else keys
    for block in model.blocks:
        z = block_forward(block, z, layout.buckets())
    return cross_forward(model.cross, z, model.query_position, keys.buckets(Grid(1, 1, side, side)))


def _cnn(cnn: PatchCnn, x: Tensor) -> Tensor:
    x = F.gelu(cnn.norm(cnn.stem(x)))
    for level in range(len(cnn.sizes) - 1):
        x, _ = F.max_pool2d(x, 2, return_indices=True)
        if level < len(cnn.residuals):
            x = cnn.residuals[level](x)
    return x[:, :, 0, 0]


def ltae_vectors(ltae: Ltae, x: Tensor, day: Tensor) -> Tensor:
    n, t = x.shape[:2]
    values = ltae.observation(x.flatten(0, 1)).view(n, t, -1)
    if ltae.in_norm is not None:
        values = ltae.in_norm(values.transpose(1, 2)).transpose(1, 2)
    width = values.shape[-1] // ltae.heads
    j = torch.arange(width)
    angle = day[..., None].float() / ltae.period ** (2 * (j // 2) / width)
    values = values + torch.where(j % 2 == 0, angle.sin(), angle.cos()).repeat(1, 1, ltae.heads)
    keys = ltae.key(values).view(n, t, ltae.heads, ltae.key_dim)
    attention = torch.einsum("nthk,hk->nht", keys, ltae.query).div(ltae.key_dim**0.5).softmax(-1)
    chunks = torch.stack(values.split(width, dim=-1), dim=1)
    return ltae.out_norm(ltae.out(torch.einsum("nht,nhtd->nhd", attention, chunks).flatten(1)))


def block_forward(block: Block, x: Tensor, buckets: Tensor) -> Tensor:
    attention, y = block.attn, block.norm1(x)
    q, k, v = rearrange(attention.qkv(y), "b n (three h d) -> three b h n d", three=3, h=attention.heads)
    q = q * q.shape[-1] ** -0.5
    logits = q @ k.transpose(-1, -2)
    if attention.relative is not None:
        table = attention.relative(q)
        logits = logits + table.gather(-1, buckets.expand(*table.shape[:2], -1, -1))
    x = x + attention.proj(rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)"))
    return x + block.mlp(block.norm2(x))


def cross_forward(block: CrossBlock, x: Tensor, position: Tensor, buckets: Tensor) -> Tensor:
    attention, y = block.attn, block.norm1(x)
    q, k, v = (
        rearrange(t, "b n (h d) -> b h n d", h=attention.heads)
        for t in ((attention.query + position).expand(len(x), -1, -1), attention.key(y), attention.value(y))
    )
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attention.relative is not None:
        table = attention.relative(q)
        logits = logits + table.gather(-1, buckets.expand(*table.shape[:2], -1, -1))
    x = attention.proj(rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)"))
    return x + block.mlp(block.norm2(x))
