"""Atomizer as it is usually written: the oracle that the fast formulation is measured and tested against.

Every value has its vector [value, dim] written down, invalid ones too, which a mask then leaves out; each layer normalises and maps
all of them anew.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from everysat.models.atomizer import Atomizer, Channel
from everysat.nn.spectral import physics
from everysat.types import Batch


def vectors(model: Atomizer, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Vectors of all values of a layer with one undated observation per place [place, value, dim], and which are valid."""
    raster, wanted = model.contracted(name, batch.raster(name))
    settings, sensor = model.settings, raster.sensor
    values = wanted.normalise(raster)
    rows, _, height, width = values.shape
    channels = [Channel(p, max(b.gsd_m, raster.gsd_m)) for b in sensor.bands if (p := physics(sensor, b))]
    band = model.channel_table(channels)
    codes = []
    for count in (height, width):
        edge = count - 1 if "corner_positions" in settings.quirks else count
        half = (count - 1) / 2 * count / edge * raster.gsd_m / settings.unit_m
        half *= 2 if "double_extent" in settings.quirks else 1
        codes.append(settings.place_code(torch.linspace(-half, half, count)))
    tokens = torch.cat(
        [
            repeat(band, "c d -> r (y x c) d", r=rows, y=height, x=width),
            settings.value_code(rearrange(values, "r c y x -> r (y x c)")),
            repeat(codes[0], "y d -> r (y x c) d", r=rows, x=width, c=len(band)),
            repeat(codes[1], "x d -> r (y x c) d", r=rows, y=height, c=len(band)),
        ],
        -1,
    )
    valid = rearrange(raster.valid, "r c y x -> r (y x c)")
    return tokens * valid[..., None], valid


def encode(model: Atomizer, batch: Batch, name: str) -> Tensor:
    """The summary [place, dim] of a model without dates and read-out, of a batch of one layer."""
    tokens, valid = vectors(model, batch, name)
    x = model.latents.expand(len(tokens), -1, -1)
    for layer in range(model.settings.depth):
        cross = model.crosses[min(layer, len(model.crosses) - 1)]
        reading = cross.reading
        q = rearrange(reading.to_q(reading.norm(x)), "p n (h d) -> (p h) n d", h=reading.heads)
        k, v = reading.to_kv(reading.context_norm(tokens)).chunk(2, -1)
        k, v = (rearrange(t, "p n (h d) -> (p h) n d", h=reading.heads) for t in (k, v))
        mask = repeat(valid, "p j -> (p h) i j", h=reading.heads, i=x.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = cross.feed(x + reading.to_out(rearrange(out, "(p h) n d -> p n (h d)", h=reading.heads)))
        for block in model.selfs[min(layer, len(model.selfs) - 1)]:
            x = block(x)
    return model.pooling(x)
