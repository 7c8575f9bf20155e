"""Places of one pixel, as tables of points hold them: where they lie, what is asked for, and parts that share no group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from everysat.data import published
from everysat.io import arrays, grid
from everysat.io.place import local_crs
from everysat.nn.draws import stream
from everysat.sensors import Band, Sensor
from everysat.types import Place, Raster

SPLITS = ("train", "val", "test")
EVERY = "all"
"""Name of the part that holds every place, for those who draw parts of their own."""


def pixel(lon: float, lat: float, gsd_m: float) -> Place:
    """The pixel of the local UTM grid, aligned to multiples of ``gsd_m``, that a point lies in."""
    crs = local_crs((lon, lat, lon, lat))
    x, y = _to_crs(str(crs)).transform(lon, lat)
    corner = Affine(gsd_m, 0, np.floor(x / gsd_m) * gsd_m, 0, -gsd_m, np.ceil(y / gsd_m) * gsd_m)
    return grid.place_of(GeoBox((1, 1), corner, crs))


@lru_cache(maxsize=128)
def _to_crs(crs: str) -> Transformer:
    return Transformer.from_crs("EPSG:4326", crs, always_xy=True)


def value(name: str, number: float, unit: str, side_m: float, source: str) -> Raster:
    """A label of one number, one pixel as large as the place; it is not valid where the number is not finite."""
    sensor = Sensor(name, "terrain", (Band(name, side_m, unit),), source)
    return Raster.of(sensor, torch.tensor(number, dtype=torch.float32).view(1, 1, 1, 1), side_m)


def layer(sensor: Sensor, numbers: np.ndarray, gsd_m: float, **given: Any) -> Raster:
    """A raster of one pixel from physical values [obs, band]; ``given`` as in :meth:`Raster.of`, with ``valid`` [obs, band]."""
    values = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))[:, :, None, None]
    if "valid" in given:
        given["valid"] = torch.from_numpy(np.ascontiguousarray(given["valid"]))[:, :, None, None]
    return Raster.of(sensor, values, gsd_m, **given)


def held_out(groups: Sequence[Any] | np.ndarray, split: str, fold: int, folds: int, seed: int = 0) -> np.ndarray:
    """Indices of the places of ``split`` when whole groups (sites, regions) are held out: those of fold ``fold`` are the test, those
    of the next the validation, all others training. ``all`` is everything.

    Raises:
        LookupError: an unknown split. ValueError: no such fold, or fewer groups than folds.
    """
    published.one_of(split, (*SPLITS, EVERY), "split")
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if not 3 <= folds <= len(names):
        raise ValueError(f"folds={folds} must be at least 3 and at most {len(names)}, the number of groups")
    if not 0 <= fold < folds:
        raise ValueError(f"fold={fold} must be from 0 to {folds - 1}")
    if split == EVERY:
        return np.arange(len(group))
    number = np.empty(len(names), dtype=np.int64)
    number[stream(seed, "folds").permutation(len(names))] = np.arange(len(names)) % folds
    parts = {"test": [fold], "val": [(fold + 1) % folds]}
    others = [f for f in range(folds) if all(f not in part for part in parts.values())]
    return np.flatnonzero(np.isin(number[group.ravel()], parts.get(split, others)))


def state(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of files, by which what was read of them may be kept.

    Raises:
        FileNotFoundError: one is missing.
    """
    found = [(path, arrays.present(path).stat()) for path in paths]
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in found)
