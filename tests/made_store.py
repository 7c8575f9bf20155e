"""Made stores of embeddings: a grid of 10 m pixels in UTM zone 31, some of them without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from everysat.store import create, open_store
from everysat.store.search import DEGREES, moved

WEST, NORTH = 500_000.0, 5_000_000.0


def random_vectors(height: int = 40, width: int = 52, dim: int = 16, kinds: int = 6, seed: int = 0) -> np.ndarray:
    """Unit vectors [y, x, dim] around a few directions; a rectangle is NaN."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(kinds, dim))
    x = middles[rng.integers(0, kinds, (height, width))] + 0.7 * rng.normal(size=(height, width, dim))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    x[5:9, 3:20] = np.nan
    return x.astype(np.float32)


def made_store(
    path: Path,
    vectors: np.ndarray,
    *,
    crs: str = "EPSG:32631",
    corner: tuple[float, float] = (WEST, NORTH),
    **options: Any,
) -> Any:
    """A store of vectors [y, x, dim]."""
    options = {"chunk": 16, "shard": 32, "period": ("2023-01-01", "2024-01-01"), "model": {"name": "made"}, **options}
    geobox = GeoBox(vectors.shape[:2], Affine(10, 0, corner[0], 0, -10, corner[1]), crs)
    writer = create(path, geobox, vectors.shape[2], **options)
    writer.write(slice(0, vectors.shape[0]), slice(0, vectors.shape[1]), vectors.transpose(2, 0, 1))
    writer.finish()
    return open_store(path)


def read_all(store: Any) -> np.ndarray:
    """Decoded unit vectors [pixel, dim], NaN without data."""
    x = store.read(*(slice(0, n) for n in store.shape)).reshape(-1, store.dim)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def in_degrees(x: Any, y: Any) -> list[tuple[float, float]]:
    """Longitude and latitude of points given in metres east and south of the corner."""
    points = [shapely.Point(WEST + a, NORTH - b) for a, b in zip(np.atleast_1d(x), np.atleast_1d(y), strict=True)]
    return [(p.x, p.y) for p in (moved(point, "EPSG:32631", DEGREES) for point in points)]


def box(west: float, north: float, east: float, south: float) -> Any:
    """A rectangle in degrees, given in metres east and south of the corner."""
    return moved(
        shapely.segmentize(shapely.box(WEST + west, NORTH - south, WEST + east, NORTH - north), 20),
        "EPSG:32631",
        DEGREES,
    )
