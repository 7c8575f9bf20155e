"""Images of a place to a vision transformer and back: every observation of every layer is an image of its own.

Images are brought to one pixel size, so that the patches of all layers lie on one grid; each is encoded alone. Features are means over the
images of a layer, layers beside each other. A patch without any valid pixel is no token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.cells import cells_at, side_by_layer
from everysat.nn.ragged import side_by_side
from everysat.nn.resample import axis_weights, resample_valid
from everysat.types import Coords, Features, Place, Raster, Tokens

AT_ONCE = 32
"""Images that go through the blocks together in inference."""


@dataclass(frozen=True)
class Embedded:
    """Tokens ``x`` [token, dim] of some images at ``coords``, of which ``image`` int64 [token] they are, and the ``row`` of each image."""

    x: Tensor
    coords: Coords
    image: Tensor
    row: Tensor


def resampled(
    values: Tensor, valid: Tensor, gsd_m: float, place: Place, pixel_m: float, patch: int
) -> tuple[Tensor, Tensor]:
    """Normalised ``values`` [obs, band, y, x] of a place and which pixels have any ``valid`` band [obs, y, x], at pixels of ``pixel_m``,
    with zeros at the south and east up to a multiple of ``patch``."""
    own, size = ([math.ceil(m / side - 1e-4) for m in (place.height_m, place.width_m)] for side in (gsd_m, pixel_m))
    inside = (..., slice(own[0]), slice(own[1]))
    values, valid = values[inside], valid[inside]
    if abs(gsd_m / pixel_m - 1) > 1e-3 or list(values.shape[2:]) != size:
        weights = [axis_weights(n, m, gsd_m / pixel_m, True) for n, m in zip(values.shape[2:], size, strict=True)]
        values, valid = resample_valid(values, valid, *weights)
    pad = (0, -size[1] % patch, 0, -size[0] % patch)
    return F.pad(values, pad), F.pad(valid.any(1), pad)


def embedded(x: Tensor, seen: Tensor, position: Tensor, raster: Raster, patch_m: float, group: int) -> Embedded:
    """Patches ``x`` [obs, dim, y, x] of a raster as tokens where ``seen`` [obs, y, x], with ``position`` [y, x, dim] added."""
    image, y, across = torch.nonzero(seen, as_tuple=True)
    tokens = (x.permute(0, 2, 3, 1) + position)[seen]
    return Embedded(tokens, cells_at(raster.row[image], y, across, patch_m, group), image, raster.row)


def together(
    parts: Sequence[Embedded],
    layers: Sequence[int],
    groups: tuple[str, ...],
    places: tuple[Place, ...],
    nothing: Tensor,
) -> Tokens:
    """Tokens of all parts, of which each is of one layer, the ``layers``-th of ``groups``; ``nothing`` [0, dim] where there are none.

    ``memo["image"]`` int64 [token] says of which image a token is, ``memo["row"]`` and ``memo["group"]`` of which place and layer
    an image is.
    """
    nowhere = torch.zeros(0, dtype=torch.long, device=nothing.device)
    starts = [sum(len(p.row) for p in parts[:i]) for i in range(len(parts))]
    memo = {
        "image": torch.cat([nowhere, *(p.image + start for p, start in zip(parts, starts, strict=True))]),
        "row": torch.cat([nowhere, *(p.row for p in parts)]),
        "group": torch.cat([nowhere, *(torch.full_like(p.row, g) for p, g in zip(parts, layers, strict=True))]),
    }
    coords = Coords.cat([cells_at(nowhere, nowhere, nowhere, 1.0, 0), *(p.coords for p in parts)])
    return Tokens(torch.cat([nothing, *(p.x for p in parts)]), coords, groups, places, memo)


def encoded(
    tokens: Tokens,
    first: Tensor,
    blocks: nn.ModuleList,
    norm: nn.Module,
    summary: Literal["mean", "class"],
    inputs: Mapping[str, object],
) -> Features:
    """Tokens made by :func:`together` through the blocks, image by image behind the class token ``first`` [1, 1, dim].

    Features of patches are normalised. That of an image is the ``mean`` of its patches, or its ``class`` token, then normalised.
    """
    image, row, group = (tokens.memo[name] for name in ("image", "row", "group"))
    if len(image) != len(tokens):
        raise ValueError(f"{len(tokens)} of {len(image)} tokens came: those of images cannot be picked from")
    z, keep, slot = side_by_side(tokens.x, image, len(row))
    z = torch.cat([first.expand(len(row), -1, -1).to(z.dtype), z], 1)
    keep = F.pad(keep, (1, 0), value=True)
    step = max(1, len(row)) if torch.is_grad_enabled() else AT_ONCE
    parts = [_through(blocks, a, b) for a, b in zip(z.split(step), keep.split(step), strict=True)]
    z = torch.cat(parts) if parts else z
    x, pooled = z[:, 1:].flatten(0, 1)[slot], z[:, 0]
    if summary == "mean":
        patches = keep[:, 1:].sum(1).clamp(min=1)[:, None]
        pooled = x.new_zeros(len(row), x.shape[1]).index_add(0, image, x) / patches
    order = {name: number for number, name in enumerate(inputs)}
    layer = torch.tensor([order[name] for name in tokens.groups], dtype=torch.long, device=x.device)
    c = tokens.coords
    coords = Coords(c.row, c.at_m, c.size_m, c.time_s, layer[c.group])
    return side_by_layer(norm(x), coords, norm(pooled), row, layer[group], tokens.places, max(1, len(inputs)))


def _through(blocks: nn.ModuleList, z: Tensor, keep: Tensor) -> Tensor:
    there = None if keep.all() else keep
    for block in blocks:
        z = block(z, None, there)
    return z
