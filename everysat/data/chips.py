"""Single real places of several datasets, as their repositories have them for tests: for trying things out, not for scores.

Variants, each a folder below ``root``::

    cropharvest     cropharvest_togo/*_<start>_<end>.tif    170 m of Togo, 12 periods of 30 days: s2 (13 bands), s1, era5, srtm
    s2_nz           s2_nz/<day>T*.tif                       2.6 km of New Zealand, Sentinel-2 Level-1C, 13 bands
    ftw             ftw_austria/inference-img.tif           5.8 km of Austria in two seasons: s2-first, s2-second (red, green, blue, NIR)
    sen1floods11    sen1floods11_spain                      see :mod:`everysat.data.sen1floods11`
    treesatai       treesatai_betula                        see :mod:`everysat.data.treesatai`

``ftw_austria/mask.tif`` is of another tile and is not read. The seasons of ``ftw`` have no date, so they are layers of their own. Of
``cropharvest`` see :mod:`everysat.data.periods`; bands are found by the names in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from everysat import sensors
from everysat.data import periods, published, sen1floods11, treesatai
from everysat.data.batches import Dataset
from everysat.io import arrays, dates, grid
from everysat.io.bandnames import band_names, name_bands
from everysat.types import Batch, Place, Raster

LICENCE = (
    "CropHarvest: CC-BY-SA-4.0; Fields of the World: CC-BY-4.0; the others as their datasets; Copernicus Sentinel data"
)
SOURCE = "https://github.com/nasaharvest/cropharvest; https://github.com/fieldsoftheworld; Sen1Floods11; TreeSatAI"
SPLITS = ("all",)
VARIANTS = {
    "cropharvest": ("s2", "s1", "era5", "srtm"),
    "s2_nz": ("s2",),
    "ftw": ("s2-first", "s2-second"),
    "sen1floods11": ("s2", "s1"),
    "treesatai": ("aerial", "s2", "s1-asc", "s1-des"),
}
LAYERS = VARIANTS["cropharvest"]
PATTERNS = {
    "cropharvest": "cropharvest_togo/*.tif",
    "s2_nz": "s2_nz/*.tif",
    "ftw": "ftw_austria/inference-img.tif",
}
FOLDERS = {"sen1floods11": "sen1floods11_spain", "treesatai": "treesatai_betula"}
GSD_M = 10.0
SEASONS = {"s2-first": 0, "s2-second": 4}
FTW_BANDS = ("B04", "B03", "B02", "B08")
_PERIOD = re.compile(r"_(?P<start>\d{4}-\d{2}-\d{2})_(?P<end>\d{4}-\d{2}-\d{2})$")
_DAY = re.compile(r"^(?P<day>20\d{6})T\d{6}_")


@dataclass(frozen=True)
class Chip:
    """See :func:`build`: one place."""

    path: Path
    variant: str
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        if index != 0:
            raise IndexError(f"index {index} is outside a dataset of 1 place")
        return _READERS[self.variant](self.path, self.layers)

    def fingerprint(self) -> str:
        return published.fingerprint(Chip(Path(self.path.name), self.variant, self.layers))


def build(
    variant: str = "cropharvest", *, root: str | Path, split: str = "all", modalities: Sequence[str] | None = None
) -> Dataset:
    """One place, in physical units.

    Args:
        variant: see above.
        root: the folder that holds the folders above.
        split: ``all``: a single place has no parts.
        modalities: some of its layers; all by default.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "cropharvest", VARIANTS, "variant")
    published.one_of(split, SPLITS, "split")
    layers = published.layers_of(modalities, VARIANTS[variant], VARIANTS[variant])
    if variant in FOLDERS:
        base = published.folder(root, f"chips/{variant}", (FOLDERS[variant],), SOURCE) / FOLDERS[variant]
        if variant == "treesatai":
            return treesatai.build(root=base, modalities=layers)
        return sen1floods11.build("chip", root=base, modalities=layers)
    base = published.folder(root, f"chips/{variant}", (), SOURCE)
    found = sorted(base.glob(PATTERNS[variant]))
    if not found:
        raise published.absent(base, PATTERNS[variant], f"chips/{variant}", SOURCE)
    return Chip(found[0], variant, layers)


def _cropharvest(path: Path, layers: Sequence[str]) -> Batch:
    """Bands are called ``VV``, ..., ``total_precipitation`` in the first period, ``VV_1`` in the second, and so on."""
    match = _PERIOD.search(path.stem)
    if match is None:
        raise ValueError(f"{path}: the name does not tell the period; expected <name>_<start>_<end>.tif")
    first, end = (datetime.fromisoformat(match[part]).replace(tzinfo=UTC) for part in ("start", "end"))
    starts = [first + timedelta(days=n) for n in range(0, (end - first).days, periods.DAYS)]
    numbers, box = arrays.tiff(path)
    names = {name: band for band, name in enumerate(band_names(path))}

    def stack(bands: Sequence[str]) -> np.ndarray:
        wanted = [[f"{band}_{n}" if n else band for band in bands] for n in range(len(starts))]
        if missing := [name for period in wanted for name in period if name not in names]:
            raise ValueError(f"{path} has no band {missing[0]!r}, expected {len(starts)} periods of 30 days")
        return np.stack([numbers[[names[name] for name in period]] for period in wanted])

    def series(sensor: sensors.Sensor, values: np.ndarray, seen: np.ndarray) -> Raster:
        held = torch.from_numpy(values.astype(np.float32))
        return Raster.of(sensor, held, GSD_M, valid=torch.from_numpy(seen), time_s=periods.spans(starts))

    def layer(name: str) -> Raster:
        if name == "s2":
            table = sensors.get("sentinel-2-l1c")
            held = stack([f"B{band.removeprefix('B').lstrip('0')}" for band in table.names])
            return series(table, held * 1e-4, held > 1)
        if name == "s1":
            held = stack(("VV", "VH"))
            return series(published.sentinel1("VV", "VH"), held, held > periods.LEAST_DB)
        if name == "era5":
            mean = np.nanmean(stack(("temperature_2m", "total_precipitation")), axis=(2, 3))
            return periods.weather(mean, starts, numbers.shape[2] * GSD_M)
        still = numbers[[names["elevation"], names["slope"]]][None]
        table = sensors.get("srtm-terrain").select(("elevation", "slope"))
        return Raster.of(table, torch.from_numpy(still.astype(np.float32)), GSD_M)

    return Batch((_place(numbers, box),), {name: layer(name) for name in layers})


def _place(numbers: np.ndarray, box: GeoBox | None) -> Place:
    """Where [band, y, x] lies. Pixels in degrees, near the equator, are taken for squares of 10 m."""
    height_m, width_m = (pixels * GSD_M for pixels in numbers.shape[1:])
    if box is None:
        return Place(height_m, width_m)
    if grid.is_square(box):
        return grid.place_of(box)
    lon, lat = grid.to_lonlat(box, box.shape[1] / 2, box.shape[0] / 2)
    return Place(height_m, width_m, box, (float(lon), float(lat)))


def _s2_nz(path: Path, layers: Sequence[str]) -> Batch:
    match = _DAY.match(path.name)
    if match is None:
        raise ValueError(f"{path}: the name does not tell the day; expected <YYYYMMDD>T<time>_...")
    numbers, box = arrays.tiff(path)
    raster = published.image(sensors.get("sentinel-2-l1c"), numbers, path, GSD_M)
    when = torch.tensor([dates.span(match["day"])], dtype=torch.float64)
    return Batch(
        (_place(numbers, box),), {"s2": Raster.of(raster.sensor, raster.values, GSD_M, valid=raster.valid, time_s=when)}
    )


def _ftw(path: Path, layers: Sequence[str]) -> Batch:
    numbers, box = arrays.tiff(path)
    if len(numbers) != 8:
        raise ValueError(f"{path} has {len(numbers)} bands, expected red, green, blue and NIR of two seasons")
    table = sensors.get("sentinel-2-l2a").select(FTW_BANDS)
    held = {name: numbers[SEASONS[name] : SEASONS[name] + 4] for name in layers}
    return Batch(
        (_place(numbers, box),), {name: published.image(table, part, path, GSD_M) for name, part in held.items()}
    )


_READERS: dict[str, Callable[[Path, Sequence[str]], Batch]] = {
    "cropharvest": _cropharvest,
    "s2_nz": _s2_nz,
    "ftw": _ftw,
}


def made(folder: Path, *, seed: int = 0) -> None:
    """Synthetic files (noise, no measurement) of the three variants that are read here, in their layout."""
    rng = np.random.default_rng(seed)
    names = [
        "VV",
        "VH",
        *(f"B{n}" for n in (*range(1, 9), "8A", *range(9, 13))),
        "temperature_2m",
        "total_precipitation",
    ]
    low = np.array([-20, -26, *[200] * 13, 290, 0.0])
    high = np.array([-8, -14, *[4000] * 13, 305, 0.01])
    periods_of = [rng.uniform(low[:, None, None], high[:, None, None], (len(names), 5, 5)) for _ in range(12)]
    terrain = np.stack([np.full((5, 5), 200.0), rng.uniform(0, 5, (5, 5))])
    path = folder / "cropharvest_togo" / "1-made_2019-02-06_2020-02-01.tif"
    arrays.write_tiff(
        path, np.concatenate([*periods_of, terrain]), crs="EPSG:32631", corner=(300_000.0, 850_000.0), gsd_m=10
    )
    called = [f"{name}_{n}" if n else name for n in range(12) for name in names]
    name_bands(path, [*called, "elevation", "slope"])
    at = Affine(10.0, 0.0, 562_990.0, 0.0, -10.0, 5_690_260.0)
    nz = rng.integers(0, 4000, (13, 8, 8)).astype(np.uint16)
    arrays.write_tiff(
        folder / "s2_nz" / "20201002T221611_made.tif", nz, crs="EPSG:32760", corner=(at.c, at.f), gsd_m=10
    )
    ftw = rng.integers(100, 4000, (8, 6, 9)).astype(np.uint16)
    arrays.write_tiff(
        folder / "ftw_austria" / "inference-img.tif", ftw, crs="EPSG:32633", corner=(359_130.0, 5_352_340.0), gsd_m=10
    )
