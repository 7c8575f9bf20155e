"""S2NAIP-URBAN: cities of the United States in a NAIP photograph and in series of Sentinel-2, Sentinel-1 and Landsat; no labels.

515 270 places of 640 m, the urban part of AI2-S2-NAIP, that AnySat was trained on (Astruc et al. 2025, CVPR). Sentinel-2 is Level-1C,
top of the atmosphere; Landsat 8 and 9 are Level-1; Sentinel-1 is in dB; NAIP is a colour image.

Layout, under ``root``; names are ``<EPSG>_<column>_<row>`` of tiles of 640 m, from which the place follows::

    {train,val,test}_dict.json       name, s1_dates, s2_dates, l8_dates: lists of the same order, dates as YYYYMMDD
    naip/<name>.png                  uint8 512 x 512: R, G, B, NIR
    sentinel2/<name>_8.tif           4 bands x T, 64 x 64: B02, B03, B04, B08        _16.tif: 6 bands x T, 32 x 32: B05-B07, B8A, B11, B12
    sentinel1/<name>.tif             2 bands x T, 64 x 64: VV, VH
    landsat/<name>_8.tif             T, 64 x 64: B8                                  _16.tif: 10 bands x T, 32 x 32: B1-B7, B9-B11
    openstreetmap/<name>.geojson     not read: AnySat's published loader draws these outlines and uses them nowhere

Against the published loader: Landsat numbers above 32 767 (clouds, snow) stay what they are, where a cast to 16 bits made them negative; pixels
made by interpolation with no-data are not valid; the level of Sentinel-2 is that of the data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays, grid
from everysat.sensors import Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "Apache-2.0 (the compilation); NAIP and Landsat public domain, Copernicus Sentinel data"
SOURCE = "https://huggingface.co/datasets/allenai/s2-naip"
SPLITS = ("train", "val", "test")
LAYERS = ("naip", "l8", "s2", "s1")
SIDE_M, SIDE_PX, GSD_M, NAIP_PX = 640.0, 64, 10.0, 512
S2_FINE, S2_COARSE = ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12")
L8_COARSE = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")
L8_BANDS = ("B8", *L8_COARSE)
SERIES: dict[str, str] = {"s2": "s2_dates", "s1": "s1_dates", "l8": "l8_dates"}


@dataclass(frozen=True)
class S2Naip:
    """See :func:`build`. ``names`` of the places, and the ``dates`` of each by layer."""

    root: Path
    split: str
    names: tuple[str, ...]
    dates: Mapping[str, Sequence[Sequence[str]]]
    layers: tuple[str, ...]
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        readers = {"naip": self._naip, "s2": self._s2, "s1": self._s1, "l8": self._l8}
        return Batch((place_of(self.names[index]),), {name: readers[name](index) for name in self.layers})

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _naip(self, index: int) -> Raster:
        path = self.root / "naip" / f"{self.names[index]}.png"
        numbers, _ = arrays.tiff(path)
        if numbers.shape[1:] != (NAIP_PX, NAIP_PX):
            raise ValueError(f"{path} has {numbers.shape[1:]} pixels, expected {NAIP_PX} x {NAIP_PX}")
        return published.image(sensors.get("naip"), numbers, path, SIDE_M / NAIP_PX)

    def _s2(self, index: int) -> Raster:
        table, folder = sensors.get("sentinel-2-l1c"), self.root / "sentinel2"
        raster = self._two_files(
            index, "s2", folder, table.select(S2_FINE), table.select(S2_COARSE), published.S2_BANDS
        )
        return bands.presented("s2", raster, self.present_as, published.S2_BANDS)

    def _l8(self, index: int) -> Raster:
        table, folder = sensors.get("landsat-8-oli-l1"), self.root / "landsat"
        return self._two_files(index, "l8", folder, table.select(["B8"]), table.select(L8_COARSE), L8_BANDS)

    def _s1(self, index: int) -> Raster:
        path = self.root / "sentinel1" / f"{self.names[index]}.tif"
        numbers = bands.with_ratio(self._stack(index, "s1", path, 2))
        return self._series(index, "s1", path, published.sentinel1("VV", "VH", "ratio"), numbers)

    def _two_files(
        self, index: int, layer: str, folder: Path, fine: Sensor, coarse: Sensor, order: Sequence[str]
    ) -> Raster:
        parts = []
        for suffix, sensor in (("_8", fine), ("_16", coarse)):
            path = folder / f"{self.names[index]}{suffix}.tif"
            numbers = self._stack(index, layer, path, len(sensor.bands))
            parts.append(bands.finer(self._series(index, layer, path, sensor, numbers), SIDE_PX))
        return bands.joined(parts[0], parts[1], order)

    def _stack(self, index: int, layer: str, path: Path, count: int) -> np.ndarray:
        """[T, band, y, x] of a file with the bands of all dates one after the other."""
        numbers, _ = arrays.tiff(path)
        listed = len(self.dates[layer][index])
        if len(numbers) != listed * count:
            raise ValueError(
                f"{path} has {len(numbers)} bands, expected {listed * count}: {count} at each of the {listed} dates listed in "
                f"{self.split}_dict.json"
            )
        return numbers.reshape(listed, count, *numbers.shape[1:])

    def _series(self, index: int, layer: str, path: Path, sensor: Sensor, numbers: np.ndarray) -> Raster:
        time_s = published.days(self.dates[layer][index], path)
        return bands.series(sensor, numbers, time_s, path, SIDE_M / numbers.shape[-1])


def place_of(name: str) -> Place:
    """The ground of a tile from its name ``<EPSG>_<column>_<row>``; rows are counted southwards from the origin of the zone."""
    match = re.fullmatch(r"(\d{5})_(-?\d+)_(-?\d+)", name)
    if not match:
        return Place(SIDE_M, SIDE_M)
    west, north = int(match[2]) * SIDE_M, -int(match[3]) * SIDE_M
    transform = Affine(GSD_M, 0.0, west, 0.0, -GSD_M, north)
    return grid.place_of(GeoBox((SIDE_PX, SIDE_PX), transform, f"EPSG:{match[1]}"))


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    present_as: Mapping[str, str] | None = None,
) -> S2Naip:
    """Places of S2NAIP-URBAN.

    Args:
        root: the folder that holds the dataset.
        modalities: of ``naip``, ``l8`` (11 bands on 10 m), ``s2`` (10 bands on 10 m) and ``s1`` (VV, VH, VV/VH); all by default.
        present_as: ``{"s2": "sentinel-2-l2a"}`` gives Sentinel-2 under that name, for models that were trained on it together with
            surface reflectance, as AnySat was.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    layers = published.layers_of(modalities, LAYERS, LAYERS)
    base = published.folder(root, "S2NAIP-URBAN", (f"{split}_dict.json",), SOURCE)
    path = base / f"{split}_dict.json"
    held: dict[str, Any] = arrays.parsed(path)
    keys = ["name", *(SERIES[name] for name in layers if name in SERIES)]
    if lacking := [key for key in keys if key not in held]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; it has {', '.join(held)}")
    if len({len(held[key]) for key in keys}) > 1 or not held["name"]:
        raise ValueError(
            f"{path}: the lists are { ({key: len(held[key]) for key in keys}) } long, expected all the same, not 0"
        )
    listed = {name: held[SERIES[name]] for name in layers if name in SERIES}
    return S2Naip(base, split, tuple(held["name"]), listed, layers, bands.presentable(present_as, ("s2",)))


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split."""
    rng = np.random.default_rng(seed)
    for number, split in enumerate(SPLITS):
        names = [f"326{11 + number}_{960 + i}_-{6049 + i}" for i in range(places)]
        held: dict[str, list[Any]] = {"name": names, "s2_dates": [], "s1_dates": [], "l8_dates": []}
        for name in names:
            for layer, count in (("s2", 6), ("s1", 3), ("l8", 4)):
                held[f"{layer}_dates"].append([f"2020{m:02d}{d:02d}" for m, d in _fake_days(rng, count)])
            _fake_place(folder, name, rng)
        arrays.write_json(folder / f"{split}_dict.json", held)


def _fake_place(folder: Path, name: str, rng: np.random.Generator) -> None:
    def numbers(count: int, side: int, low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, (count, side, side)).astype(np.uint16)

    archives.write_png(folder / "naip" / f"{name}.png", rng.integers(0, 256, (4, NAIP_PX, NAIP_PX)).astype(np.uint8))
    arrays.write_tiff(folder / "sentinel2" / f"{name}_8.tif", numbers(6 * 4, 64, 100, 6000))
    arrays.write_tiff(folder / "sentinel2" / f"{name}_16.tif", numbers(6 * 6, 32, 100, 6000))
    arrays.write_tiff(folder / "landsat" / f"{name}_8.tif", numbers(4, 64, 6000, 40000))
    arrays.write_tiff(folder / "landsat" / f"{name}_16.tif", numbers(4 * 10, 32, 6000, 40000))
    db = rng.normal(size=(3, 2, 64, 64)) - np.array([9.0, 15.0]).reshape(2, 1, 1)
    arrays.write_tiff(folder / "sentinel1" / f"{name}.tif", db.reshape(6, 64, 64).astype(np.float32))


def _fake_days(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return sorted((int(m), int(d)) for m, d in zip(rng.integers(1, 13, count), rng.integers(1, 29, count), strict=True))
