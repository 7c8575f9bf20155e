"""Which places to label next: those whose class is uncertain and that are unlike what is labelled and unlike each other."""

from __future__ import annotations

import math
from typing import Any

import geopandas
import numpy as np
import shapely
import torch
from torch.nn import functional as F

from everysat.store.search import DEGREES, moved

APART_PX = 10
"""Places to label next lie so far from each other and from labelled ones."""
KNOWN = 4096
"""Labelled pixels that candidates are compared with, at most."""


class Pool:
    """Candidates, drawn without replacement with a chance that grows with uncertainty, in one pass and in any order.

    Of each pixel, ``log(u) / uncertainty`` is a key and the largest ``size`` keys stay (Efraimidis and Spirakis 2006, "Weighted
    random sampling with a reservoir"). Its u in (0, 1) is a hash of its number (the finaliser of splitmix64), so that windows and
    their order do not matter.

    Attributes:
        index: number of the pixel. uncertainty: 1 - (probability of the likeliest class - of the second), 0 to 1.
        guesses: the two likeliest classes, [n, 2]. vectors: [n, dim]. xy: centre, [n, 2].
    """

    NAMES = ("key", "index", "uncertainty", "guesses", "vectors", "xy")

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.key = np.empty(0)
        self.index = self.uncertainty = self.guesses = self.vectors = self.xy = np.empty(0)

    def __len__(self) -> int:
        return len(self.key)

    def offer(
        self, index: np.ndarray, uncertainty: np.ndarray, guesses: np.ndarray, vectors: np.ndarray, xy: np.ndarray
    ) -> None:
        """Show more pixels."""
        key = np.log(self._u(index)) / np.maximum(uncertainty, 1e-9)
        new: tuple[np.ndarray, ...] = (key, index, uncertainty, guesses, vectors, xy)
        if len(self):
            new = tuple(
                np.concatenate([getattr(self, name), values]) for name, values in zip(self.NAMES, new, strict=True)
            )
        order = np.lexsort((new[1], -new[0]))[: self.size]
        for name, values in zip(self.NAMES, new, strict=True):
            setattr(self, name, values[order])

    def _u(self, index: np.ndarray) -> np.ndarray:
        z = index.astype(np.uint64) + np.uint64((self.seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return ((z ^ (z >> np.uint64(31))).astype(float) + 1) / (2.0**64 + 2)


def to_label(store: Any, labelled: Any, pool: Pool, count: int) -> geopandas.GeoDataFrame:
    """Points in degrees with ``rank``, the two likeliest classes (``guess``, ``or``), ``uncertainty`` and ``index``.

    Greedy: the largest uncertainty times distance (1 - cosine of centred vectors) to whatever is labelled or chosen already, a
    weighted form of farthest-first (Gonzalez 1985). Fewer than ``count`` where the area is too small for so many 10 pixels apart.
    """
    if not len(pool):
        raise ValueError(f"{store.path} has no pixel with data")
    middle = pool.vectors.mean(0)
    unlike = F.normalize(torch.from_numpy(pool.vectors - middle), dim=1)
    known = F.normalize(labelled.x - torch.from_numpy(middle), dim=1)[:: max(1, len(labelled.x) // KNOWN)]
    distance = 1 - (unlike @ known.T).max(1).values
    apart = APART_PX * math.sqrt(abs(store.geobox.affine.determinant))
    centres = np.array([[shape.centroid.x, shape.centroid.y] for shape in labelled.shapes])
    free = ~np.isin(pool.index, labelled.index)
    for centre in centres:
        free &= np.linalg.norm(pool.xy - centre, axis=1) >= apart
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        value = torch.from_numpy(np.where(free, pool.uncertainty, -1)) * distance.clamp(min=1e-6)
        best = int(value.argmax())
        chosen.append(best)
        distance = torch.minimum(distance, 1 - unlike @ unlike[best])
        free &= np.linalg.norm(pool.xy - pool.xy[best], axis=1) >= apart
    columns = {
        "rank": list(range(1, len(chosen) + 1)),
        "guess": [labelled.classes[pool.guesses[i, 0]] for i in chosen],
        "or": [labelled.classes[pool.guesses[i, 1]] for i in chosen],
        "uncertainty": [round(float(pool.uncertainty[i]), 4) for i in chosen],
        "index": [int(pool.index[i]) for i in chosen],
    }
    points = [moved(shapely.Point(*pool.xy[i]), store.crs, DEGREES) for i in chosen]
    return geopandas.GeoDataFrame(columns, geometry=points, crs=DEGREES)
