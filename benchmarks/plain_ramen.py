"""RAMEN as one would write it down from the paper and the released layout: the oracle of the tests and the reference of the
benchmarks. Every pixel becomes a vector before anything is resampled, the experts are four convolutions, L-TAE takes a series per cell
with its layers one by one, and the decoder resamples vectors before it makes values of them. It takes the parameters of a
:class:`everysat.models.ramen.Ramen` and dense arrays; square places, sizes that fit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from everysat.models.ramen import Ramen
from everysat.nn.position import grid_sinusoid, sine_cosine, sinusoid
from everysat.nn.spectral import BandVectors, ScaleExperts
from everysat.nn.temporal import Ltae
from everysat.sensors import Sensor


def tokens_of(model: Ramen, sensor: Sensor, x: Tensor, native_m: float, days: Tensor | None = None) -> Tensor:
    """[place, cell, dim] of normalised images ``x`` [place, date, band, y, x] of pixels of ``native_m``."""
    ratio, count = native_m / model.settings.gsd_m, x.shape[1]
    z = torch.einsum("btchw,cd->btdhw", x, model.bands(sensor)).flatten(0, 1)
    z = scaled(model.scale, F.interpolate(z, scale_factor=ratio, mode="bilinear", align_corners=False), ratio)
    size = math.floor(x.shape[-1] * ratio + 1e-9)
    if z.shape[-1] != size:
        z = F.interpolate(z, size=(size, size), mode="bilinear", align_corners=False)
    z = rearrange(z, "(b t) d h w -> b (h w) t d", t=count)
    if count == 1 or days is None:
        return z[:, :, 0]
    series = rearrange(z, "b n t d -> (b n) t d")
    day = repeat(days, "b t -> (b n) t", n=z.shape[1])
    return pooled(model.temporal, series, day).view(len(x), -1, z.shape[-1])


def scaled(experts: ScaleExperts, z: Tensor, ratio: float) -> Tensor:
    """z + the experts' convolutions of z [n, dim, y, x], weighted."""
    code = sine_cosine(torch.tensor(math.log(ratio)), experts.dim, torch.float32)
    weight = (experts.mlp(code) / experts.temperature.clamp(min=1e-3)).softmax(-1)
    out = z
    for share, expert in zip(weight, experts.experts, strict=True):
        assert isinstance(expert, nn.Linear)
        out = out + share * F.conv2d(z, expert.weight[:, :, None, None], expert.bias)
    return out


def pooled(ltae: Ltae, x: Tensor, day: Tensor) -> Tensor:
    """L-TAE of series ``x`` [n, date, dim] with ``day`` [n, date], padded, in eval mode."""
    n, count, dim = x.shape
    x = ltae.observation(x.flatten(0, 1)).view(n, count, dim)
    assert ltae.in_norm is not None
    x = ltae.in_norm(x.transpose(1, 2)).transpose(1, 2)
    x = x + repeat(sinusoid(day, dim // ltae.heads, ltae.period), "n t d -> n t (h d)", h=ltae.heads)
    key = rearrange(ltae.key(x), "n t (h k) -> n h t k", h=ltae.heads)
    attention = torch.einsum("hk,nhtk->nht", ltae.query, key).div(math.sqrt(ltae.key_dim)).softmax(-1)
    values = rearrange(x, "n t (h d) -> n h t d", h=ltae.heads)
    return ltae.out(torch.einsum("nht,nhtd->nhd", attention, values).flatten(1))


def encode(model: Ramen, layers: list[Tensor]) -> Tensor:
    """[place, 1 + token, dim] of the tokens [place, cell, dim] of each layer, on one square grid."""
    side = math.isqrt(layers[0].shape[1])
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    code = grid_sinusoid(torch.stack([y, x], -1).reshape(-1, 2) * model.settings.gsd_m, model.settings.dim)
    z = torch.cat([model.in_norm(tokens) + code for tokens in layers], 1)
    z = torch.cat([model.class_token.expand(len(z), -1, -1), z], 1)
    for block in model.blocks:
        z = block(z)
    return model.norm(z)


def values(bands: BandVectors, experts: ScaleExperts, sensor: Sensor, z: Tensor, ratio: float, pixels: int) -> Tensor:
    """Values [n, band, y, x] of decoded cells ``z`` [n, dim, y, x] that are ``ratio`` pixels long."""
    z = scaled(experts, F.interpolate(z, scale_factor=ratio, mode="bilinear", align_corners=False), ratio)
    if z.shape[-1] != pixels:
        z = F.interpolate(z, size=(pixels, pixels), mode="bilinear", align_corners=False)
    return torch.einsum("ndhw,cd->nchw", z, bands(sensor))
