"""Live fuel moisture: water in living plants at 100 sites of the western United States, from three months of satellites and weather.

1 578 samples of 2015 to 2019 (Rao et al. 2020, doi:10.1016/j.rse.2020.111797), with the inputs that Presto was evaluated on
(Tseng et al. 2023, arXiv:2304.14065; the repository's training rows). A place is one pixel; the label is the mass of water over
the dry mass, in per cent.

Layout, under ``root``::

    s1_s2_era5_srtm.npy    float64 [N, 3 periods, 18]: VV VH, B2 ... B8 B8A B9 B11 B12, temperature rain, elevation slope, NDVI
    month.npy              int64 [N, 3], month (from 0) in which each period of 30 days begins; the last ends on the day of the label
    latlon.npy             float64 [N, 2]
    site.npy               text [N]
    target.npy             float64 [N]
    is_test.npy            optional [N], the repository's split of its full table, for fold=None

What the files do not say, and what is done about it:

- Labels are from the last day of a month, never of February, so months alone tell the periods, but not the year: ``year`` is a
  name for it.
- Composites are those of :mod:`everysat.data.periods`. Sentinel-2 is top-of-atmosphere reflectance; 1 is what the product puts for what
  it could not measure. Temperature and rain are dated by the calendar month, once if two periods begin in it, and rain is its sum.
- The NDVI of the files is made of the bands B7 and B3. It is not read, nor is ``dynamic_world.npy``, another model's map.
- One site name stands for two places; they are held out together. The nearest sites are 4.8 km apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np

from everysat import sensors
from everysat.data import bands, periods, points, published
from everysat.io import arrays
from everysat.types import Batch, Raster

LICENCE = "MIT; contains modified Copernicus data; labels of the National Fuel Moisture Database"
SOURCE = "https://github.com/nasaharvest/presto, data/fuel_moisture; Rao et al. 2020, doi:10.1016/j.rse.2020.111797"
SPLITS = points.SPLITS
LAYERS = ("s2", "s1", "era5", "srtm", "label")
FILES = ("s1_s2_era5_srtm", "month", "latlon", "site", "target")
S2_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
COLUMNS = {"s1": slice(0, 2), "s2": slice(2, 13), "era5": slice(13, 15), "srtm": slice(15, 17)}
CHANNELS, PERIODS = 18, 3
GSD_M = 10.0


@dataclass(frozen=True)
class Table:
    """The rows of the files."""

    inputs: np.ndarray
    month: np.ndarray
    latlon: np.ndarray
    site: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class FuelMoisture:
    """See :func:`build`. ``rows`` of the files are the places."""

    root: Path
    rows: tuple[int, ...]
    layers: tuple[str, ...]
    year: int
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        table, row = _read(self.root), self.rows[index]
        months = tuple(table.month[row].tolist())
        layers = {name: _layer(name, table.inputs[row], months, self.year) for name in self.layers}
        if "s2" in layers:
            layers["s2"] = bands.presented("s2", layers["s2"], self.present_as, published.S2_BANDS)
        layers["label"] = points.value("live-fuel-moisture", float(table.target[row]), "%", GSD_M, SOURCE)
        lat, lon = table.latlon[row].tolist()
        return Batch((points.pixel(lon, lat, GSD_M),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def targets(self) -> np.ndarray:
        """The label of each place, per cent."""
        return _read(self.root).target[list(self.rows)]

    @property
    def groups(self) -> np.ndarray:
        """The site of each place."""
        return _read(self.root).site[list(self.rows)]


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    fold: int | None = 0,
    folds: int = 5,
    seed: int = 0,
    year: int = 2017,
    present_as: Mapping[str, str] | None = None,
) -> FuelMoisture:
    """Samples of live fuel moisture, places of one pixel of 10 m; ``label`` in per cent, for :mod:`everysat.tasks.regress`.

    Args:
        root: the folder that holds the files.
        split: ``train``, ``val``, ``test``, by sites; or ``all``.
        modalities: of ``s2`` (11 bands, top-of-atmosphere reflectance, three periods), ``s1`` (VV, VH in dB), ``era5`` (temperature
            in K and sum of rain in mm by calendar month) and ``srtm`` (elevation in m, slope in degrees, undated); all by default.
        fold, folds, seed: which of the folds of sites is the test; the next is ``val``. ``fold=None``: the test of ``is_test.npy``, the first
            of the folds of the other sites being ``val``.
        year: in which the labels are taken to be; they are of 2015 to 2019.
        present_as: ``{"s2": "sentinel-2-l2a"}`` gives ten bands under that name, for models that do not tell the two apart.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    layers = published.layers_of(modalities, LAYERS[:-1], LAYERS[:-1])
    shown = bands.presentable(present_as, ("s2",))
    base = published.folder(root, "fuel_moisture", [f"{name}.npy" for name in FILES], SOURCE)
    table = _read(base)
    if fold is None:
        rows = _official(base, table.site, split, folds, seed)
    else:
        rows = points.held_out(table.site, split, fold, folds, seed)
    return FuelMoisture(base, tuple(rows.tolist()), layers, year, shown)


def _official(base: Path, site: np.ndarray, split: str, folds: int, seed: int) -> np.ndarray:
    path = base / "is_test.npy"
    test = arrays.npy(path).astype(bool)
    if test.shape != site.shape:
        raise ValueError(f"{path} holds {test.shape}, expected {site.shape}")
    if split == "test":
        return np.flatnonzero(test)
    rest = np.flatnonzero(~test)
    of = {"train": ("train", "val"), "val": ("test",)}.get(split, (split,))
    return np.sort(rest[np.concatenate([points.held_out(site[rest], part, 0, folds, seed) for part in of])])


def _read(base: Path) -> Table:
    return _table(points.state(*(base / f"{name}.npy" for name in FILES)))


@lru_cache(maxsize=4)
def _table(files: tuple[tuple[str, int, int], ...]) -> Table:
    paths = [path for path, *_ in files]
    held = [arrays.npy(path) for path in paths]
    count = len(held[0])
    shapes = ((count, PERIODS, CHANNELS), (count, PERIODS), (count, 2), (count,), (count,))
    for path, found, shape in zip(paths, held, shapes, strict=True):
        if found.shape != shape:
            raise ValueError(f"{path} holds {found.shape}, expected {shape}")
    table = Table(*held)
    known = _periods(2017)
    for months in np.unique(table.month, axis=0).tolist():
        if tuple(months) not in known:
            raise ValueError(
                f"{paths[1]} has the months {months}, which no {PERIODS} periods of {periods.DAYS} days begin in"
            )
    if not (np.abs(table.latlon) <= (90, 180)).all():
        raise ValueError(f"{paths[2]} holds a position that is no latitude and longitude in degrees")
    return table


@lru_cache(maxsize=16)
def _periods(year: int) -> dict[tuple[int, ...], tuple[datetime, ...]]:
    """Start of each period by the months that they begin in; patterns that only leap years have are of 2016."""
    known = {}
    for y in (2016, year):
        for month in range(1, 13):
            if month == 2:
                continue
            end = datetime(y + month // 12, month % 12 + 1, 1, tzinfo=UTC) - timedelta(days=1)
            starts = tuple(end - timedelta(days=periods.DAYS * back) for back in range(PERIODS, 0, -1))
            known[tuple(start.month - 1 for start in starts)] = starts
    return known


def _layer(name: str, inputs: np.ndarray, months: tuple[int, ...], year: int) -> Raster:
    """Layer ``name`` from the inputs [period, channel] of a place."""
    numbers, starts = inputs[:, COLUMNS[name]], _periods(year)[months]
    if name == "srtm":
        return points.layer(sensors.get("srtm-terrain").select(("elevation", "slope")), numbers[:1], GSD_M)
    if name == "era5":
        return periods.weather(numbers, starts, GSD_M)
    time_s = periods.spans(starts)
    if name == "s1":
        table, valid = published.sentinel1("VV", "VH"), numbers > periods.LEAST_DB
        return points.layer(table, numbers, GSD_M, valid=valid, time_s=time_s)
    table = sensors.get("sentinel-2-l1c").select(S2_BANDS)
    return points.layer(table, numbers * 1e-4, GSD_M, valid=numbers > 1, time_s=time_s)


def fake(folder: Path, *, places: int = 20, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), two samples at each of ``places`` / 2 sites."""
    rng = np.random.default_rng(seed)
    low = np.array([-25, -32, *[100] * 11, 265, 0, 20, 0, -1.0])
    high = np.array([-5, -12, *[6000] * 11, 305, 0.01, 3000, 30, 1.0])
    inputs = rng.uniform(low, high, (places, PERIODS, CHANNELS))
    inputs[:, :, COLUMNS["srtm"]] = inputs[:, :1, COLUMNS["srtm"]]
    inputs[0, 0, 2], inputs[1, 1, :2] = 1, -49.9
    known = sorted(_periods(2017))
    site = np.arange(places) // 2
    latlon = np.stack([33 + 0.5 * site, -121 + 0.9 * site], 1)
    held = {
        "s1_s2_era5_srtm": inputs,
        "month": np.array([known[i % len(known)] for i in range(places)]),
        "latlon": latlon,
        "site": np.array([f"Site {number}" for number in site]),
        "target": rng.uniform(50, 250, places),
    }
    for name, values in held.items():
        arrays.write_npy(folder / f"{name}.npy", values)
