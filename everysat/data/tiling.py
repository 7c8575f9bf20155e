"""Tiles of a pixel grid, and the places of one part of a split by blocks of ground."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from pyproj import Transformer

from everysat.data.scene import SHARES
from everysat.data.split import spatial_blocks
from everysat.data.statistics import spread
from everysat.find import suggest
from everysat.nn.draws import stream
from everysat.types import Batch, Raster

EQUAL_AREA = "EPSG:6933"
"""Cylindrical equal-area projection of the whole Earth: blocks in it have the same area everywhere."""


def pixels(metres: float, gsd_m: float, name: str) -> int:
    """How many pixels of ``gsd_m`` make up ``metres``; an error that calls it ``name`` when it is no whole number of them."""
    exact = metres / gsd_m
    if abs(exact - round(exact)) > 1e-3 or round(exact) < 1:
        raise ValueError(f"{name}={metres:g} must be a multiple of {gsd_m:g} m, the side of a pixel")
    return round(exact)


def corners(shape: tuple[int, int], side: int, stride: int) -> list[tuple[int, int]]:
    """First row and column of each tile of ``side`` pixels that lies wholly in a grid of ``shape``, row by row.

    Raises:
        ValueError: not one fits.
    """
    if side > min(shape):
        raise ValueError(f"a tile of {side} x {side} pixels does not fit into {shape[0]} x {shape[1]}; lower tile_m")
    return [(r, c) for r in range(0, shape[0] - side + 1, stride) for c in range(0, shape[1] - side + 1, stride)]


def part_of(
    xy_m: np.ndarray, part: str, block_m: float, shares: Mapping[str, float] | None = None, seed: int = 0
) -> list[int]:
    """Indices of the places with centres ``xy_m`` [place, 2] in the blocks of ``part`` (see :func:`spatial_blocks`); all
    without a part. ``shares`` are :data:`SHARES` by default."""
    if not part:
        return list(range(len(xy_m)))
    wanted = shares or SHARES
    if part not in wanted:
        raise ValueError(f"part={part!r} is none of the parts. {suggest(part, wanted)}")
    return spatial_blocks(xy_m, block_m, wanted, stream(seed, "split"))[part].tolist()


def on_earth_m(lonlat: np.ndarray) -> np.ndarray:
    """Longitude and latitude [place, 2] in metres of :data:`EQUAL_AREA`."""
    to = Transformer.from_crs("EPSG:4326", EQUAL_AREA, always_xy=True)
    return np.stack(to.transform(*np.asarray(lonlat, dtype=float).reshape(-1, 2).T), -1)


def observed(batch: Batch, at_most: int | None = None, rng: np.random.Generator | None = None) -> Batch:
    """One place without the observations of which no value is valid, and without layers that then have none.

    Of the others ``at_most`` stay in each layer of several: drawn by ``rng``, or evenly spread when there is none.
    """
    layers = {}
    for name, layer in batch.layers.items():
        if isinstance(layer, Raster):
            keep = torch.nonzero(layer.valid.flatten(1).any(1)).flatten()
            if at_most is not None and len(keep) > at_most:
                chosen = spread(len(keep), at_most) if rng is None else rng.permutation(len(keep))[:at_most]
                keep = keep[torch.as_tensor(np.sort(chosen))]
            if not len(keep):
                continue
            layer = layer if len(keep) == len(layer.row) else layer.obs(keep)
        layers[name] = layer
    return replace(batch, layers=layers)
