"""MMEarth: 1.2 million places around the world, 640 or 1280 m, in twelve aligned modalities of 2017-2020; no labels.

Nedungadi et al. 2024 (ECCV, https://arxiv.org/abs/2405.02771). Places are drawn evenly over biomes and ecoregions; all pixels lie on the 10 m
grid of a Sentinel-2 image, which is Level-2A for about half of the places and Level-1C for the others.

Layout of version v001, under ``root`` or ``root/<name>``; ``<name>`` is ``data_1M_v001_64`` (64 pixels), ``data_1M_v001`` or
``data_100k_v001`` (128 pixels)::

    <name>.h5                 one row a place: sentinel2 [13, y, x], sentinel2_cloudmask, _cloudprod and _scl [1, y, x], sentinel1 [8, y, x],
                              aster [2, y, x], canopy_height_eth [2, y, x], dynamic_world and esa_worldcover [1, y, x], era5 [12],
                              biome [14] and eco_region [846] one-hot, lat, lon and month [2] sine and cosine, metadata (name, level)
    <name>_splits.json        rows of train, val and test; in version v001 all are in train
    <name>_tile_info.json     by name: S2_DATE, S2_type (l1c or l2a), lat, lon, CRS, BANDS
    <name>_band_stats.json    mean and deviation; not needed here

Layers: ``s2`` (Level-2A, 12 bands) or ``s2-l1c`` (13 bands), of one day; ``s1-asc`` and ``s1-des`` (VV, VH, HH, HV; those of the acquisition next
in time, whose date the files do not give); ``dem``, ``canopy-height``; ``worldcover`` of 2020, ``dynamic-world``, the most frequent class of
the year of the image; ``era5`` (the place's mean temperature, its minimum and maximum, and rain, of the month before, of the month, and of the 13 months that
end with it); ``scl``; ``biome`` and ``ecoregion`` as codes of the place.

Against the published loaders: the wavelengths that RAMEN gives the channels take B8A for B08 and the reverse, here bands have the order of
the file; codes of ``dynamic_world`` are moved to the product's, 0 is no data; canopy height is stored in 8 bits, in which its
no-data value 255 cannot stand, so that whatever is not 0 to 100 m is invalid; backscatter of exactly 0 dB is the edge of an image. Sentinel-2 is of
collections without the offset of baseline 04.00. Taken from the published programs that wrote the files, not from the files themselves: the order
of channels, the period of ``era5``, that all places are in train, and that no-data is -inf (Sentinel-1) and NaN (``era5``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import sensors
from everysat.data import bands, published, tiling
from everysat.io import archives, arrays, dates
from everysat.io.plane import unreadable
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, Batch, Place, Raster

LICENCE = "CC-BY-4.0"
SOURCE = "https://github.com/vishalned/MMEarth-data (arXiv 2405.02771)"
SPLITS = ("train",)
LAYERS = (
    "s2", "s2-l1c", "s1-asc", "s1-des", "dem", "canopy-height", "dynamic-world", "worldcover", "scl", "era5", "biome", "ecoregion"
)  # fmt: skip
DEFAULT = LAYERS[:5]
VARIANTS = {"": "data_1M_v001_64", "128": "data_1M_v001", "100k": "data_100k_v001"}
FILED = ("train", "val", "test")
GSD_M = 10.0
S2_ORDER = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B08", "B09", "B10", "B11", "B12")
S2_L2A = tuple(band for band in S2_ORDER if band != "B10")
S1_BANDS = ("VV", "VH", "HH", "HV")
HELD = {
    "s2": "sentinel2", "s2-l1c": "sentinel2", "s1-asc": "sentinel1", "s1-des": "sentinel1", "dem": "aster",
    "canopy-height": "canopy_height_eth", "dynamic-world": "dynamic_world", "worldcover": "esa_worldcover", "scl": "sentinel2_scl",
    "era5": "era5", "biome": "biome", "ecoregion": "eco_region",
}  # fmt: skip
"""Name of each layer in the HDF5 file."""
BIOMES = (
    "Tundra", "Tropical & Subtropical Moist Broadleaf Forests", "Mediterranean Forests, Woodlands & Scrub", "Deserts & Xeric Shrublands",
    "Temperate Grasslands, Savannas & Shrublands", "Boreal Forests/Taiga", "Temperate Conifer Forests", "Temperate Broadleaf & Mixed Forests",
    "Montane Grasslands & Shrublands", "Mangroves", "Flooded Grasslands & Savannas",
    "Tropical & Subtropical Grasslands, Savannas & Shrublands", "Tropical & Subtropical Dry Broadleaf Forests",
    "Tropical & Subtropical Coniferous Forests",
)  # fmt: skip
ECOREGIONS = tuple(f"ecoregion {i} of MMEarth" for i in range(846))
SCL_HIDDEN, QA60_HIDDEN, NO_QA60 = (3, 8, 9, 10), 0b11 << 10, 65535
"""Classes of SCL and bits of QA60 that stand for cloud or its shadow."""
KEPT = ("S2_DATE", "S2_type", "lat", "lon")


@dataclass(frozen=True, eq=False)
class MMEarth:
    """See :func:`build`. ``rows`` are those of the HDF5 file; ``day_s`` the start of the day of Sentinel-2, ``l1c`` its level."""

    path: Path
    split: str
    layers: tuple[str, ...]
    rows: np.ndarray
    day_s: np.ndarray
    l1c: np.ndarray
    lonlat: np.ndarray
    clouds: bool
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        wanted = [name for name in self.layers if name != ("s2" if self.l1c[index] else "s2-l1c")]
        needed = dict.fromkeys([HELD[name] for name in wanted] + ["sentinel2"])
        if not self.clouds:
            needed |= dict.fromkeys(("sentinel2_cloudmask", "sentinel2_scl"))
        held = archives.hdf5_row(self.path, needed, int(self.rows[index]))
        side_m = held["sentinel2"].shape[-1] * GSD_M
        layers = {}
        for name in wanted:
            raster = self._layer(name, held, float(self.day_s[index]), side_m)
            if raster.valid.any():
                layers["s2" if self.present_as and name == "s2-l1c" else name] = raster
        lon, lat = (float(degrees) for degrees in self.lonlat[index])
        return Batch((Place(side_m, side_m, lonlat=(lon, lat)),), layers)

    def fingerprint(self) -> str:
        content = hashlib.blake2b(self.rows.tobytes(), digest_size=8)
        content.update(repr((self.path.name, self.split, self.layers, self.clouds, self.present_as)).encode())
        return f"mmearth:{content.hexdigest()}"

    def _layer(self, name: str, held: Mapping[str, np.ndarray], day_s: float, side_m: float) -> Raster:
        numbers = held[HELD[name]]
        if name in ("s2", "s2-l1c"):
            return self._s2(name, numbers, held, day_s)
        if name in ("s1-asc", "s1-des"):
            return self._s1(name, numbers)
        if name == "era5":
            return _era5(numbers, day_s, side_m, self.path)
        if name in ("biome", "ecoregion"):
            return _code(name, numbers, side_m, self.path)
        if name in ("dynamic-world", "worldcover", "scl"):
            return _classes(name, numbers, day_s, self.path)
        sensor = sensors.get({"dem": "aster-gdem", "canopy-height": "eth-canopy-height"}[name])
        when, seen = ALWAYS, None
        if name == "canopy-height":
            when, seen = dates.span("2020"), torch.from_numpy((numbers >= 0) & (numbers <= 100))[None]
        return _raster(sensor, numbers, when, self.path, seen)

    def _s2(self, name: str, numbers: np.ndarray, held: Mapping[str, np.ndarray], day_s: float) -> Raster:
        names, table = (S2_L2A, "sentinel-2-l2a") if name == "s2" else (S2_ORDER, "sentinel-2-l1c")
        if len(numbers) != len(S2_ORDER):
            raise ValueError(f"{self.path}: sentinel2 is {numbers.shape}, expected [{len(S2_ORDER)}, y, x]")
        seen = None
        if not self.clouds:
            quality, scene = held["sentinel2_cloudmask"], held["sentinel2_scl"]
            hidden = ((quality & QA60_HIDDEN) != 0) & (quality != NO_QA60) | np.isin(scene, SCL_HIDDEN)
            seen = torch.from_numpy(~hidden[None].repeat(len(names), 1))
        chosen = numbers[[S2_ORDER.index(band) for band in names]]
        day = (day_s, day_s + dates.DAY_S)
        raster = _raster(sensors.get(table).select(names), chosen, day, self.path, seen)
        if not self.present_as:
            return raster
        shown = S2_L2A if self.present_as["s2"] == "sentinel-2-l2a" else S2_ORDER
        return bands.presented("s2", raster, self.present_as, shown)

    def _s1(self, name: str, numbers: np.ndarray) -> Raster:
        if len(numbers) != 2 * len(S1_BANDS):
            raise ValueError(f"{self.path}: sentinel1 is {numbers.shape}, expected [{2 * len(S1_BANDS)}, y, x]")
        first, table = (0, "sentinel-1-asc") if name == "s1-asc" else (len(S1_BANDS), "sentinel-1-desc")
        part = numbers[first : first + len(S1_BANDS)]
        return _raster(sensors.get(table).select(S1_BANDS), part, ALWAYS, self.path, torch.from_numpy(part != 0)[None])


def _raster(
    sensor: Sensor, numbers: np.ndarray, when: dates.Span, path: Path, seen: torch.Tensor | None = None
) -> Raster:
    return bands.series(sensor, numbers[None], torch.tensor([when], dtype=torch.float64), path, GSD_M, seen=seen)


def _classes(name: str, numbers: np.ndarray, day_s: float, path: Path) -> Raster:
    """Land cover by the codes of the product."""
    tables = {"dynamic-world": "dynamic-world", "worldcover": "esa-worldcover", "scl": "sentinel-2-scl"}
    missing = {"dynamic-world": (0, 10), "worldcover": (0, 255), "scl": (0, 255)}[name]
    seen = ~np.isin(numbers, missing)
    codes = numbers.astype(np.int64) - (1 if name == "dynamic-world" else 0)
    sensor = sensors.get(tables[name])
    known = sensor.bands[0].classes or {}
    if not np.isin(codes[seen], list(known)).all():
        strange = sorted(set(np.unique(codes[seen])) - set(known))
        raise ValueError(f"{path}: {HELD[name]} holds the code {strange[0]}, which is no class; expected {list(known)}")
    day = (day_s, day_s + dates.DAY_S)
    when = {"worldcover": dates.span("2020"), "dynamic-world": dates.span(dates.iso(day_s)[:4]), "scl": day}[name]
    values = torch.from_numpy(np.where(seen, codes, 0).astype(np.float32))[None]
    return Raster.of(sensor, values, GSD_M, valid=torch.from_numpy(seen)[None], time_s=[when])


def _era5(numbers: np.ndarray, day_s: float, side_m: float, path: Path) -> Raster:
    """Three periods in the order of their start: 13 months, the month before, and the month of the image."""
    sensor = sensors.get("era5-land-monthly")
    if numbers.shape != (3 * len(sensor.bands),):
        raise ValueError(f"{path}: era5 is {numbers.shape}, expected ({3 * len(sensor.bands)},): three periods")
    month = np.datetime64(int(day_s), "s").astype("datetime64[M]")
    starts = [month - 12, month - 1, month]
    ends = [month + 1, month, month + 1]
    when = np.array([starts, ends]).T.astype("datetime64[s]").astype(np.float64)
    values = numbers.reshape(3, len(sensor.bands))[[2, 0, 1], :, None, None]
    return Raster(
        sensor,
        *published.physical(sensor, values),
        torch.from_numpy(when),
        torch.zeros(3, dtype=torch.int64),
        side_m,
    )


def _code(name: str, numbers: np.ndarray, side_m: float, path: Path) -> Raster:
    """The biome or ecoregion of a place from its one-hot row."""
    classes = BIOMES if name == "biome" else ECOREGIONS
    if numbers.shape != (len(classes),) or np.count_nonzero(numbers) != 1:
        raise ValueError(f"{path}: {HELD[name]} is {numbers.shape}, expected ({len(classes)},) with a single 1")
    band = Band(name, side_m, "class", classes=dict(enumerate(classes)))
    sensor = Sensor(f"mmearth-{name}", "classes", (band,), source=SOURCE)
    return Raster.of(sensor, torch.full((1, 1, 1, 1), float(numbers.argmax())), side_m)


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    clouds: bool = True,
    present_as: Mapping[str, str] | None = None,
    part: str = "",
    shares: Mapping[str, float] | None = None,
    block_m: float = 100_000.0,
    seed: int = 0,
) -> MMEarth:
    """Places of MMEarth. The table of places is read whole, which takes a minute and some GB for the 1.2 million.

    Args:
        variant: ``""`` for MMEarth64, ``"128"`` for MMEarth, ``"100k"`` for MMEarth100k.
        root: the folder that holds the HDF5 file, or the folder around it.
        split: ``train``; ``val`` and ``test`` where a list of your own fills them.
        modalities: by default ``s2``, ``s2-l1c``, ``s1-asc``, ``s1-des`` and ``dem``. Places that have none of the levels of
            Sentinel-2 asked for are left out if nothing else is asked for.
        clouds: without, pixels of Sentinel-2 that QA60 or SCL takes for cloud or shadow are invalid; images have at most 10 %.
        present_as: ``{"s2": "sentinel-2-l2a"}`` gives both levels as the layer ``s2`` under that name (B10 is left out), for models
            that do not tell them apart; with ``"sentinel-2-l1c"`` there are 13 bands, B10 invalid in Level-2A.
        part, shares, block_m, seed: only the places of one part (``train``, ``val``, ``test``) of a split by blocks of ground of
            that side, as the published split holds out none.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, VARIANTS, "variant")
    published.one_of(split, FILED, "split")
    layers = published.layers_of(modalities, LAYERS, DEFAULT)
    name = VARIANTS[variant]
    outer = Path(root).expanduser()
    inside = outer / name if (outer / name).is_dir() else outer
    published.folder(inside, "MMEarth", [f"{name}.h5", f"{name}_splits.json", f"{name}_tile_info.json"], SOURCE)
    path, list_path = inside / f"{name}.h5", inside / f"{name}_splits.json"
    metadata = arrays.hdf5(path, ["metadata"])["metadata"]
    rows = _rows(list_path, split, len(metadata))
    names = metadata[metadata.dtype.names[0]] if metadata.dtype.names else metadata
    day_s, l1c, lonlat = _places(inside / f"{name}_tile_info.json", [n.decode() for n in names[rows]])
    shown = bands.presentable(present_as, ("s2",))
    if set(layers) <= {"s2", "s2-l1c"} and len(layers) == 1 and not shown:
        chosen = np.flatnonzero(l1c == (layers[0] == "s2-l1c"))
    else:
        chosen = np.arange(len(rows))
    if shown and "s2" in layers:
        layers = tuple(dict.fromkeys(("s2", "s2-l1c", *layers)))
    if part:
        chosen = chosen[tiling.part_of(tiling.on_earth_m(lonlat[chosen]), part, block_m, shares, seed)]
    return MMEarth(path, split, layers, rows[chosen], day_s[chosen], l1c[chosen], lonlat[chosen], clouds, shown)


def _rows(path: Path, split: str, count: int) -> np.ndarray:
    listed = arrays.parsed(path)
    rows = np.array(listed.get(split, ()) if isinstance(listed, dict) else (), dtype=np.int64)
    if not len(rows):
        others = ", ".join(key for key in FILED if isinstance(listed, dict) and listed.get(key))
        raise ValueError(
            f"{path} lists no places for split={split!r}, only for {others or 'none'}. part= splits by blocks of ground"
        )
    if rows.min() < 0 or rows.max() >= count:
        raise ValueError(f"{path} lists row {rows.max()}, but the HDF5 file has {count} places. Fetch both again")
    return rows


def _places(path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start of the day, whether the level is 1C, and longitude and latitude of the named places."""

    def fewer(entry: dict[str, Any]) -> Any:
        return [entry.get(key) for key in KEPT] if "S2_type" in entry else entry

    try:
        table = json.loads(arrays.present(path).read_text(encoding="utf-8"), object_hook=fewer)
    except ValueError as error:
        raise unreadable(str(path), error) from error
    day_s, l1c, lonlat = np.empty(len(names)), np.empty(len(names), bool), np.empty((len(names), 2))
    for i, name in enumerate(names):
        day, level, lat, lon = table.get(name) or (None,) * len(KEPT)
        if level not in ("l1c", "l2a") or day is None or lat is None or lon is None:
            raise ValueError(f"{path}: place {name!r} lacks one of {', '.join(KEPT)}. Fetch this file again")
        day_s[i], l1c[i], lonlat[i] = dates.span(str(day))[0], level == "l1c", (lon, lat)
    return day_s, l1c, lonlat


def fake(folder: Path, *, places: int = 6, side_px: int = 64, seed: int = 0) -> None:
    """A synthetic set in the layout of MMEarth64 (noise, no measurement)."""
    rng = np.random.default_rng(seed)
    name, grid = VARIANTS[""], (side_px, side_px)
    levels = ["l2a" if i % 2 == 0 else "l1c" for i in range(places)]
    info: dict[str, Any] = {}
    for i, level in enumerate(levels):
        at = {"lat": float(rng.uniform(-50, 60)), "lon": float(rng.uniform(-170, 170)), "CRS": "EPSG:32633"}
        names = [f"B{n}" for n in (1, 2, 3, 4, 5, 6, 7, "8A", 8, 9, 11, 12)]
        info[f"place_{i}"] = {
            "S2_DATE": f"{2017 + i % 4}-{1 + i % 12:02d}-15", "S2_type": level, "BANDS": {"sentinel2": names}, **at
        }  # fmt: skip
    content = _fake_pixels(places, grid, levels, rng)
    content["metadata"] = np.array(
        [(key.encode(), value["S2_type"].encode()) for key, value in info.items()],
        dtype=[("tile_id", "S100"), ("S2_type", "S10")],
    )
    arrays.write_hdf5(folder / name / f"{name}.h5", content)
    arrays.write_json(
        folder / name / f"{name}_splits.json", {"train": rng.permutation(places).tolist(), "val": [], "test": []}
    )
    arrays.write_json(folder / name / f"{name}_tile_info.json", info)
    arrays.write_json(folder / name / f"{name}_band_stats.json", {})


def _fake_pixels(
    places: int, grid: tuple[int, int], levels: Sequence[str], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    l2a = np.array([level == "l2a" for level in levels])
    optical = rng.integers(100, 4000, (places, 13, *grid)).astype(np.uint16)
    optical[l2a, S2_ORDER.index("B10")] = 0
    radar = rng.normal(-13, 2, (places, 8, *grid)).astype(np.float32)
    radar[:, [2, 3, 6, 7]] = -np.inf
    radar[1::3, 4:] = -np.inf
    scene = rng.integers(2, 12, (places, 1, *grid)).astype(np.uint8)
    scene[~l2a] = 255
    terrain = np.stack([rng.integers(0, 3000, (places, *grid)), rng.integers(0, 60, (places, *grid))], 1)
    canopy = rng.integers(0, 50, (places, 2, *grid)).astype(np.int8)
    canopy[..., :2, :] = 127
    month = np.column_stack([rng.uniform(270, 300, (places, 3)), rng.uniform(0, 0.3, places)])
    weather = np.tile(month, 3).astype(np.float32)
    weather[0, 3] = np.nan
    cover = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100], np.uint8)
    return {
        "sentinel2": optical,
        "sentinel2_cloudmask": (rng.random((places, 1, *grid)) < 0.1).astype(np.uint16) << 10,
        "sentinel2_cloudprod": rng.integers(0, 101, (places, 1, *grid)).astype(np.uint16),
        "sentinel2_scl": scene,
        "sentinel1": radar,
        "aster": terrain.astype(np.int16),
        "era5": weather,
        "dynamic_world": rng.integers(0, 10, (places, 1, *grid)).astype(np.uint8),
        "canopy_height_eth": canopy,
        "esa_worldcover": rng.choice(cover, (places, 1, *grid)),
        "biome": np.eye(14, dtype=np.uint8)[rng.integers(0, 14, places)],
        "eco_region": np.eye(846, dtype=np.uint16)[rng.integers(0, 846, places)],
        **{key: rng.uniform(-1, 1, (places, 2)).astype(np.float32) for key in ("lat", "lon", "month")},
    }
