"""Land use and crops of Brazil from years of MODIS and Landsat 8: points with a series each, from the R packages sits and dtwSat.

Simoes et al. 2021 (doi:10.3390/rs13132428) and Maus et al. 2016 (doi:10.1109/JSTARS.2016.2517118). Variants::

    mato-grosso    sits_rda/samples_modis_ndvi.rda            1 218 series, NDVI at 12 dates of a year, 4 land uses, 2000-2016
    cerrado        sits_rda/cerrado_2classes.rda              746 series, NDVI and EVI at 23 dates, savanna or pasture
    rondonia       sits_rda/samples_l8_rondonia_2bands.rda    160 series, NDVI and EVI of Landsat 8 at 25 dates, 4 land uses
    soybean        dtwsat_mato_grosso/                        603 seasons of pixels of a cube of 6 bands, 5 crops and forest, 2007-2013

The last is a folder of GeoTIFFs, one band a date (``blue, red, nir, mir, ndvi, evi`` and ``doy``, the day of the year on which a pixel was
seen), a ``timeline`` of the starts of the composites and ``samples.csv`` (longitude, latitude, from, to, label).

The same place comes in many years - the savanna series are of 83 places - and neighbours look alike, so blocks of ground are held out
whole. All forest of ``mato-grosso`` is within 3 km, so no model that learned it is ever tested on it: ``leave_out=["Forest"]`` gives the
classes that can be compared. Values are physical in the files. -0.3, which the MODIS product puts for what it has not seen, is not valid. A composite is dated
by its 16 days; in ``soybean`` a pixel by its day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from affine import Affine
from pyproj import Transformer

from everysat import sensors
from everysat.data import points, published, tiling
from everysat.io import archives, arrays, grid, rda
from everysat.types import Batch, Raster

LICENCE = (
    "GPL-2.0-or-later and GPL-3.0 (the packages that the data come with): read at run time, never part of EverySat"
)
SOURCE = "https://github.com/e-sensing/sits, data; https://github.com/vwmaus/dtwSat, inst/lucc_MT"
SPLITS = points.SPLITS
LAYERS = ("indices", "label")
INPUTS = ("modis", "indices")
FILES = {
    "mato-grosso": "sits_rda/samples_modis_ndvi.rda",
    "cerrado": "sits_rda/cerrado_2classes.rda",
    "rondonia": "sits_rda/samples_l8_rondonia_2bands.rda",
    "soybean": "dtwsat_mato_grosso/samples.csv",
}
CLASSES = {
    "mato-grosso": ("Cerrado", "Forest", "Pasture", "Soy_Corn"),
    "cerrado": ("Cerrado", "Pasture"),
    "rondonia": ("Deforestation", "Forest", "NatNonForest", "Pasture"),
    "soybean": ("Cotton-fallow", "Forest", "Soybean-cotton", "Soybean-maize", "Soybean-millet"),
}
BLOCK_DEG = {"mato-grosso": 1.0, "cerrado": 1.0, "rondonia": 0.25, "soybean": 0.01}
BANDS = {"blue": "B3", "red": "B1", "nir": "B2", "mir": "B7"}
MODIS_M, LANDSAT_M = 231.656, 30.0
UNSEEN, COMPOSITE_S = -0.2, 16 * 86400.0


@dataclass(frozen=True)
class Table:
    """Places of one variant: ``lonlat`` [n, 2], ``label`` [n], and of each layer by its bands the series ``values``, n arrays
    [date, band], with ``time_s``, n arrays [date, 2]."""

    lonlat: np.ndarray
    label: np.ndarray
    bands: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Sequence[np.ndarray]]
    time_s: Sequence[np.ndarray]


@dataclass(frozen=True)
class Series:
    """See :func:`build`. ``rows`` of the table are the places."""

    root: Path
    variant: str
    rows: tuple[int, ...]
    layers: tuple[str, ...]
    block_deg: float
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        table, row = self._table, self.rows[index]
        gsd_m = LANDSAT_M if self.variant == "rondonia" else MODIS_M
        layers = {name: _layer(name, table, row, self.variant, gsd_m) for name in self.layers}
        code, classes = np.array([[self.classes.index(table.label[row])]]), dict(enumerate(self.classes))
        lon, lat = table.lonlat[row].tolist()
        batch = tiling.observed(Batch((points.pixel(lon, lat, gsd_m),), layers))
        name = f"land-use-{self.variant}"
        return batch.adding(label=published.class_map(name, code, classes, gsd_m, SOURCE, Path(FILES[self.variant])))

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def codes(self) -> np.ndarray:
        """The class of each place."""
        return np.searchsorted(self.classes, self._table.label[list(self.rows)])

    @property
    def groups(self) -> np.ndarray:
        """The block of ground of each place."""
        return _blocks(self._table.lonlat[list(self.rows)], self.block_deg)

    @property
    def _table(self) -> Table:
        return _read(self.root, self.variant)


def build(
    variant: str = "mato-grosso",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    block_deg: float | None = None,
    leave_out: Sequence[str] = (),
) -> Series:
    """Series of one pixel. ``indices`` are NDVI and, but in ``mato-grosso``, EVI; ``modis`` are the four reflectance bands of
    ``soybean``; ``label`` is the land use or crop.

    Args:
        variant: ``mato-grosso``, ``cerrado``, ``rondonia`` or ``soybean``.
        root: the folder that holds the files named above.
        split: ``train``, ``val``, ``test``, by blocks of ground; or ``all``.
        modalities: all that the variant has by default.
        fold, folds, seed: which of the folds of blocks is the test; the next is ``val``.
        block_deg: side of a block in degrees; 1, in ``rondonia`` 0.25, in ``soybean``, which is 9 km wide, 0.01.
        leave_out: classes whose places are left out.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "mato-grosso", FILES, "variant")
    base = published.folder(root, f"modis_ts/{variant}", (FILES[variant],), SOURCE)
    table = _read(base, variant)
    layers = published.layers_of(modalities, INPUTS, tuple(table.bands))
    if missing := [name for name in layers if name not in table.bands]:
        raise LookupError(f"modalities={missing[0]!r}: the variant {variant} has {', '.join(table.bands)} alone")
    block_deg = BLOCK_DEG[variant] if block_deg is None else block_deg
    for name in leave_out:
        published.one_of(name, CLASSES[variant], "leave_out")
    kept = np.flatnonzero(~np.isin(table.label, list(leave_out)))
    rows = kept[points.held_out(_blocks(table.lonlat[kept], block_deg), split, fold, folds, seed)]
    classes = tuple(name for name in CLASSES[variant] if name not in leave_out)
    return Series(base, variant, tuple(rows.tolist()), layers, block_deg, classes)


def _blocks(lonlat: np.ndarray, block_deg: float) -> np.ndarray:
    if not block_deg > 0:
        raise ValueError(f"block_deg={block_deg} must be positive (degrees)")
    return np.array([f"{east} {north}" for east, north in np.floor(lonlat / block_deg).astype(int)])


def _layer(name: str, table: Table, row: int, variant: str, gsd_m: float) -> Raster:
    values = table.values[name][row]
    sensor = "modis" if name == "modis" else "landsat-8-indices" if variant == "rondonia" else "mod13q1"
    seen = np.isfinite(values) & ((values >= UNSEEN) if name == "indices" else (values > 0))
    return points.layer(sensors.get(sensor).select(table.bands[name]), np.where(seen, values, 0), gsd_m, valid=seen, time_s=table.time_s[row])  # fmt: skip


def _read(base: Path, variant: str) -> Table:
    path = base / FILES[variant]
    if variant != "soybean":
        return _samples(points.state(path), CLASSES[variant])
    names = ("timeline", *(f"{name}.tif" for name in (*BANDS, "ndvi", "evi", "doy")))
    return _pixels(points.state(path, *(path.parent / name for name in names)))


def _checked(label: Sequence[Any] | np.ndarray, classes: Sequence[str], lonlat: np.ndarray, path: str) -> np.ndarray:
    """Labels as text, if all are classes and all places somewhere on Earth."""
    named = np.array([str(name) for name in label])
    if unknown := sorted(set(named) - set(classes)):
        raise ValueError(f"{path} has the label {str(unknown[0])!r}, expected {', '.join(classes)}")
    if not len(named) or lonlat.shape != (len(named), 2) or not (np.abs(lonlat) <= (180, 90)).all():
        raise ValueError(f"{path} lacks a longitude and latitude in degrees for each of {len(named)} labels")
    return named


# --- sits ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _samples(files: tuple[tuple[str, int, int], ...], classes: tuple[str, ...]) -> Table:
    path = files[0][0]
    held = next(iter(rda.tables(path).values()), {})
    if missing := [name for name in ("longitude", "latitude", "label", "time_series") if name not in held]:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(held) or 'none'}")
    lonlat = np.stack([np.asarray(held[name], float) for name in ("longitude", "latitude")], -1)
    label, series = _checked(held["label"], classes, lonlat, path), held["time_series"]
    names = tuple(name for name in ("NDVI", "EVI") if len(series) and name in series[0])
    if len(series) != len(label) or not names or any(missing not in s for s in series for missing in ("Index", *names)):
        raise ValueError(f"{path}: every row of time_series must hold Index and the same of NDVI and EVI")
    values = [np.stack([np.asarray(s[name], np.float32) for name in names], -1) for s in series]
    starts = [np.asarray(s["Index"], float) * 86400 for s in series]
    return Table(lonlat, label, {"indices": names}, {"indices": values}, [_composites(s) for s in starts])


def _composites(start_s: np.ndarray) -> np.ndarray:
    return np.stack([start_s, start_s + COMPOSITE_S], -1)


# --- dtwSat ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _pixels(files: tuple[tuple[str, int, int], ...]) -> Table:
    path, timeline, *images = (Path(name) for name, *_ in files)
    frame = archives.table(path, ("longitude", "latitude", "from", "to", "label"))
    lonlat = frame[["longitude", "latitude"]].to_numpy(float)
    label = _checked(frame["label"].to_numpy(), CLASSES["soybean"], lonlat, str(path))
    held = {image.stem: arrays.tiff(image) for image in images}
    start = np.array(arrays.lines(timeline), "datetime64[D]")
    geobox = held["doy"][1]
    for image in images:
        cube, own = held[image.stem]
        if geobox is None or own != geobox or len(cube) != len(start):
            raise ValueError(
                f"{image} holds {cube.shape}, expected {len(start)} dates of {timeline} on the grid of doy.tif"
            )
    assert geobox is not None
    to = Transformer.from_crs("EPSG:4326", grid.crs_of(geobox).proj, always_xy=True)
    inverse: Affine = ~geobox.affine
    cols, rows = (np.floor(v).astype(int) for v in grid.positions(inverse, *to.transform(*lonlat.T)))
    outside = (cols < 0) | (rows < 0) | (cols >= geobox.shape[1]) | (rows >= geobox.shape[0])
    if outside.any():
        raise ValueError(f"{path} has {outside.sum()} samples outside of the images")
    seasons = [
        (start >= np.datetime64(a, "D")) & (start < np.datetime64(b, "D"))
        for a, b in zip(frame["from"], frame["to"], strict=True)
    ]
    bands = {"modis": tuple(BANDS.values()), "indices": ("NDVI", "EVI")}
    stacks = {
        "modis": np.stack([held[n][0] for n in BANDS], 1),
        "indices": np.stack([held[n][0] for n in ("ndvi", "evi")], 1),
    }
    values = {
        name: [np.where(np.abs(stack[s, :, r, c]) < 2, stack[s, :, r, c], np.nan).astype(np.float32) for s, r, c in zip(seasons, rows, cols, strict=True)]
        for name, stack in stacks.items()
    }  # fmt: skip
    days = [_days(start[s], held["doy"][0][s, r, c]) for s, r, c in zip(seasons, rows, cols, strict=True)]
    return Table(lonlat, label, bands, values, days)


def _days(start: np.ndarray, doy: np.ndarray) -> np.ndarray:
    """Start and end of the day on which a pixel was seen, [date, 2]; of its composite where that is not known."""
    known = (doy >= 1) & (doy <= 366)
    january = start.astype("datetime64[Y]")
    day = january.astype("datetime64[D]") + np.where(known, doy, 1).astype(int) - 1
    after = (january + 1).astype("datetime64[D]") + np.where(known, doy, 1).astype(int) - 1
    seen_s = np.where(day >= start, day, after).astype("datetime64[s]").astype(float)
    composite = _composites(start.astype("datetime64[s]").astype(float))
    known &= (seen_s >= composite[:, 0]) & (seen_s < composite[:, 1])
    return np.where(known[:, None], np.stack([seen_s, seen_s + 86400], -1), composite)


# --- a tiny set ------------------------------------------------------------------------------------------------------


def fake(folder: Path, *, places: int = 12, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` of each variant, five or more blocks apart."""
    rng = np.random.default_rng(seed)
    for variant, bands in (("mato-grosso", ["NDVI"]), ("cerrado", ["NDVI", "EVI"]), ("rondonia", ["EVI", "NDVI"])):
        index = 13_000.0 + 16 * np.arange(6)
        series = [{"Index": index, **{b: rng.uniform(0, 0.9, 6) for b in bands}} for _ in range(places)]
        series[0]["NDVI"][2] = -0.3
        frame = {
            "longitude": -60.5 + np.arange(places) * 0.7,
            "latitude": -12.5 + rng.uniform(0, 0.9, places),
            "label": np.array([CLASSES[variant][i % len(CLASSES[variant])] for i in range(places)]),
            "time_series": series,
        }
        rda.write(folder / FILES[variant], samples=frame)
    _fake_cube(folder / "dtwsat_mato_grosso", places, rng)


def _fake_cube(folder: Path, places: int, rng: np.random.Generator) -> None:
    start = np.datetime64("2007-09-14") + 16 * np.arange(23)
    corner, shape = (-6089550.683386912, -1332950.720197616), (len(start), 24, 30)
    first = (start - start.astype("datetime64[Y]").astype("datetime64[D]")).astype(int) + 1
    doy = (first[:, None, None] + rng.integers(0, 16, shape) - 1) % 365 + 1.0
    crs = "+proj=sinu +R=6371007.181 +units=m +no_defs"
    for name in (*BANDS, "ndvi", "evi", "doy"):
        cube = doy if name == "doy" else rng.uniform(0.02, 0.9, shape)
        if name != "doy":
            cube[0, 0, 0] = -1.7e308
        archives.write_grid(folder / f"{name}.tif", cube, crs, Affine(MODIS_M, 0, corner[0], 0, -MODIS_M, corner[1]))
    to = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    at = np.array(corner) + MODIS_M * np.stack([np.arange(places) * 2 + 0.5, -np.arange(places) - 0.5], 1)
    lon, lat = to.transform(*at.T)
    frame = pd.DataFrame({"longitude": lon, "latitude": lat, "from": "2007-09-01", "to": "2008-09-01"})
    frame["label"] = [CLASSES["soybean"][i % 5] for i in range(places)]
    arrays.write_text(folder / "samples.csv", frame.to_csv(index=False))
    arrays.write_text(folder / "timeline", "".join(f"{day}\n" for day in start))
