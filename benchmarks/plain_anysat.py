"""AnySat's forward pass as one would write it down from the paper and the released layout: the oracle of the tests and the
reference of the benchmarks. Everything at once, no chunks, full tables of relative positions, date codes per pixel, sub-patches
carried through the last layer. It takes the parameters of an :class:`everysat.models.anysat.AnySat` and dense arrays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from benchmarks.plain_omnisat import block_forward, cross_forward, ltae_vectors
from everysat.models.anysat import AnySat, ImageProjector, nested
from everysat.nn.position import Grid, grid_sinusoid


def encode(model: AnySat, images: dict[str, Tensor], days: dict[str, Tensor]) -> Tensor:
    """[place, 1 + patch, dim] from normalised images [place, band, y, x] and series [place, date, band, y, x] with ``days``
    [place, date]. Eval mode; square tiles of whole patches; no layer coarser than a patch."""
    settings, tokens, grid = model.settings, [], 0
    for name in model.inputs:
        modality = settings.modalities[name]
        side = round(settings.patch_m / modality.sub_m)
        px = side * modality.pixels
        grid = images[name].shape[-1] // px
        if isinstance(model.projectors[name], ImageProjector):
            cut = "b c (h y k) (w x l) -> (b h w) (y x) (c k l)"
            x = rearrange(images[name], cut, h=grid, w=grid, y=side, x=side, k=modality.pixels, l=modality.pixels)
            x = model.projectors[name](x)
        else:
            x = rearrange(images[name], "b t c (h y) (w x) -> (b h w y x) t c", y=px, x=px)
            day = repeat(days[name], "b t -> (b p) t", p=images[name].shape[-1] ** 2)
            x = rearrange(ltae_vectors(model.projectors[name], x, day), "(p s) d -> p s d", s=side * side)
        tokens.append(rearrange(_spatial(model, x, side, modality.sub_m), "(b p) d -> b p d", p=grid * grid))
    place = _code(grid, settings.patch_m / 10.0, settings.dim)
    z = torch.cat([x + place for x in tokens], 1)
    z = torch.cat([model.class_token.expand(len(z), -1, -1), z], 1)
    keys = Grid(1, len(tokens), grid, grid)
    for block in model.blocks:
        z = block_forward(block, z, keys.buckets()[:0])  # no relative positions here
    return cross_forward(model.cross, z, F.pad(place, (0, 0, 1, 0)), keys.buckets(Grid(1, 1, grid, grid)))


def _code(side: int, step: float, dim: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return grid_sinusoid(torch.stack([y, x], -1).reshape(-1, 2) * step, dim)


def _spatial(model: AnySat, x: Tensor, side: int, sub_m: float) -> Tensor:
    assert model.spatial is not None
    order = nested(side, sub_m) if "nested_subpatches" in model.settings.quirks else None
    x = (x if order is None else x[:, order]) + _code(side, sub_m, x.shape[-1])
    z = torch.cat([model.spatial.class_token.expand(len(x), -1, -1), x], 1)
    for block in model.spatial.blocks:
        z = block_forward(block, z, Grid(1, 1, side, side).buckets())
    return model.spatial.norm(z)[:, 0]
