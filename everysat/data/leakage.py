"""Places of different parts of a dataset that share ground, lie close together or hold the same pixels.

Scores are too good where a test place overlaps a training place, or lies beside one (Ploton et al., Nature Communications 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from pyproj import Transformer
from shapely import STRtree, area, box, distance, intersection, polygons

from everysat.types import Place, Raster

OVERLAP = 0.005
"""Share of the smaller place from which on two places overlap. Below it are the slivers between neighbours whose outlines were
drawn in different projections."""
BLOCK = 4096
"""Places that are compared with all others at a time."""


@dataclass(frozen=True)
class Pair:
    """Two places of different parts, by their numbers; the share of the smaller one that both cover, and the gap in metres."""

    a: int
    b: int
    share: float
    gap_m: float


def corners(place: Place) -> np.ndarray | None:
    """Longitude and latitude [4, 2] of the corners; of the north-up rectangle where only the centre is known; else None."""
    if place.geobox is not None and place.geobox.crs is not None:
        height, width = place.geobox.shape
        x, y = zip(
            *(place.geobox.transform * at for at in ((0, 0), (width, 0), (width, height), (0, height))), strict=True
        )
        return np.column_stack(_to_degrees(str(place.geobox.crs)).transform(x, y))
    if place.lonlat is None:
        return None
    lon, lat = place.lonlat
    half = np.array([place.width_m, place.height_m]) / 2 / metres_per_degree(lat)
    return np.array([lon, lat]) + half * np.array([[-1, 1], [1, 1], [1, -1], [-1, -1]])


@cache
def _to_degrees(crs: str) -> Transformer:
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True)


def metres_per_degree(lat: float | np.ndarray) -> np.ndarray:
    """Metres per degree of longitude and of latitude at ``lat``, on the WGS 84 ellipsoid, last axis 2 (series of its radii)."""
    phi = np.radians(np.clip(lat, -89.9, 89.9))
    east = 111412.84 * np.cos(phi) - 93.5 * np.cos(3 * phi) + 0.118 * np.cos(5 * phi)
    north = 111132.954 - 559.822 * np.cos(2 * phi) + 1.175 * np.cos(4 * phi)
    return np.stack([east, north], axis=-1)


def close_pairs(outlines: np.ndarray, part: np.ndarray, near_m: float = 0.0) -> Iterator[Pair]:
    """Pairs of places of different parts that overlap, or whose gap is less than ``near_m``.

    Args:
        outlines: longitude and latitude [place, 4, 2] of the corners; also across the antimeridian.
        part: int [place], which part each place belongs to. The first place of a pair is of the lower part.
    """
    if not len(outlines):
        return
    shapes = outlines.astype(float).copy()
    first = shapes[:, :1, 0]
    shapes[..., 0] = first + (shapes[..., 0] - first + 180) % 360 - 180
    margin = near_m / metres_per_degree(np.abs(shapes[..., 1]).max(1))
    low, high = shapes.min(1) - margin, shapes.max(1) + margin
    # A place near the antimeridian has a second outline, on the other side of the map.
    again = np.flatnonzero((low[:, 0] < -180) | (high[:, 0] > 180))
    shift = np.where(low[again, 0] < -180, 360.0, -360.0)
    index = np.concatenate([np.arange(len(shapes)), again])
    shapes = np.concatenate([shapes, shapes[again] + np.stack([shift, np.zeros_like(shift)], 1)[:, None]])
    tree = STRtree(polygons(shapes))
    for start in range(0, len(outlines), BLOCK):
        some = slice(start, min(start + BLOCK, len(outlines)))
        boxes = box(low[some, 0], low[some, 1], high[some, 0], high[some, 1])
        a, b = tree.query(boxes, predicate="intersects")
        a = a + start
        across = part[a] < part[index[b]]
        yield from _measured(a[across], b[across], shapes, index, near_m)


def _measured(a: np.ndarray, b: np.ndarray, shapes: np.ndarray, index: np.ndarray, near_m: float) -> Iterator[Pair]:
    """The pairs among those whose boxes meet, measured in metres around the first place."""
    if not len(a):
        return
    origin = shapes[a].mean(1, keepdims=True)
    scale = metres_per_degree(origin[..., 1])
    one, other = polygons((shapes[a] - origin) * scale), polygons((shapes[b] - origin) * scale)
    share = area(intersection(one, other)) / np.minimum(area(one), area(other))
    gap = distance(one, other)
    seen = set()
    for at in np.flatnonzero((share > OVERLAP) | (gap < near_m)):
        pair = int(a[at]), int(index[b[at]])
        if pair not in seen:
            seen.add(pair)
            yield Pair(*pair, float(share[at]), float(gap[at]))


def digest(raster: Raster) -> int:
    """A hash of the valid pixels of a layer, without dates; 0 where nothing, or one value alone, is valid: such layers are often
    alike by nature."""
    seen = raster.valid
    values = torch.where(seen, raster.values, 0.0)
    some = raster.values[seen]
    if not some.numel() or some.min() == some.max():
        return 0
    code = hashlib.blake2b(repr(tuple(values.shape)).encode(), digest_size=8)
    code.update(np.ascontiguousarray(values.numpy()).data)
    code.update(np.packbits(seen.numpy()).data)
    return int.from_bytes(code.digest(), "little") or 1


def equal_pairs(digests: np.ndarray, part: np.ndarray) -> tuple[list[tuple[int, int]], int]:
    """Places with the same digest uint64 [place]: pairs of different parts, each place beside the first of the lowest part that
    has it; and how many places repeat one of their own part. Digests of 0 are left out."""
    order = np.lexsort((np.arange(len(digests)), part, digests))
    order = order[digests[order] != 0]
    starts = np.r_[True, digests[order][1:] != digests[order][:-1]] if len(order) else np.zeros(0, bool)
    leader = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))] if len(order) else order
    across = part[order] != part[leader]
    same = (~starts) & np.r_[False, part[order][1:] == part[order][:-1]] if len(order) else starts
    return list(zip(leader[across].tolist(), order[across].tolist(), strict=True)), int(same.sum())
