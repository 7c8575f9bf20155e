"""WorldCereal: what its crop classifier reads, as a small cube of Belgium and as labelled points of France.

Van Tricht et al. 2023, doi:10.5194/essd-15-5491-2023. Both come with the tests of the repository
github.com/WorldCereal/worldcereal-classification (MIT; contains modified Copernicus data; labels of the points from LPIS):

    worldcereal_preprocessed_inputs.nc                  uint16 [12 months, 100, 100] at 10 m, one variable a band
    worldcereal_cropland_classification.nc, _croptype_  [classification, probability, probability_<class>...; 100, 100]
    2023_FRA_LPIS_POLY_110.geoparquet                   one row a point and dekad
    class_mappings.json                                 {grouping: {code: group}}

Digital numbers of both: reflectance in 1/10000, with the offset of newer Sentinel-2 products already removed; radar
backscatter as 20 log10(number) - 83 dB; temperature and the sum of rain in 1/100; elevation in metres; 65535 for no data.
Months and dekads (days 1-10, 11-20, 21-end) are composites and are dated as such. Sentinel-2 band B8A is a column of the points
without any data, and is not read. Slope is left out: it follows from elevation.

Labels of the cube are another model's output, not ground truth. The codes of a classification count its own
``probability_<class>`` bands, so in the cropland file 0 is cropland and 1 other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from everysat import sensors
from everysat.data import published, tiling
from everysat.data.augment import crop
from everysat.io import arrays, cube, grid
from everysat.io.dates import span
from everysat.io.place import local_crs
from everysat.io.plane import Plane
from everysat.types import ALWAYS, Batch, Raster

LICENCE = "MIT; contains modified Copernicus Sentinel data"
SOURCE = (
    "https://github.com/WorldCereal/worldcereal-classification, in its tests; Van Tricht et al. 2023, "
    "doi:10.5194/essd-15-5491-2023"
)
VARIANTS = ("cube", "points")
LABELS = ("cropland", "croptype")
INPUTS, MAPPINGS = "worldcereal_preprocessed_inputs.nc", "class_mappings.json"
POINTS = "2023_FRA_LPIS_POLY_110.geoparquet"
GSD_M = 10.0
NODATA = 65535
COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    "s2": (
        "sentinel-2-l2a",
        {b: f"S2-L2A-{b}" for b in ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")},
    ),
    "s1": ("sentinel-1-grd", {"VV": "S1-SIGMA0-VV", "VH": "S1-SIGMA0-VH"}),
    "dem": ("copernicus-dem", {"elevation": "elevation"}),
    "agera5": ("agera5", {"Temperature_Air_2m_Mean_24h": "AGERA5-TMEAN", "Precipitation_Flux": "AGERA5-PRECIP"}),
}
"""Of each layer the sensor, and the names in the files of its bands."""


@dataclass(frozen=True)
class Cube:
    """See :func:`build`. ``corners``: first row and column of each tile; ``labels``: which classification, if any."""

    root: Path
    layers: tuple[str, ...]
    labels: str
    side: int
    corners: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} tiles")
        whole = _cube(self.root / INPUTS, self.layers)
        geobox: Any = whole.places[0].geobox
        if self.labels:
            whole = whole.adding(label=_classification(self.root, self.labels, geobox))
        row, column = self.corners[index]
        side_m = self.side * GSD_M
        tile = crop(whole, row * GSD_M, column * GSD_M, side_m, side_m)
        if "agera5" in tile.layers:
            tile = tile.adding(agera5=replace(tile.raster("agera5"), gsd_m=side_m))
        window = slice(row, row + self.side), slice(column, column + self.side)
        return replace(tiling.observed(tile), places=(grid.place_of(grid.crop(geobox, *window)),))

    def fingerprint(self) -> str:
        return published.fingerprint(self)


@dataclass(frozen=True)
class Points:
    """See :func:`build`. ``samples`` are numbers of points of the ``file``; ``codes`` their classes, -1 for none."""

    root: Path
    file: str
    layers: tuple[str, ...]
    samples: tuple[int, ...]
    codes: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} points")
        table, sample = _table(self.root / self.file), self.samples[index]
        rows = slice(*table.starts[sample : sample + 2].tolist())
        layers = {
            name: _raster(name, table.numbers[name][rows][:, :, None, None], table.time_s[rows]) for name in self.layers
        }
        if self.codes[index] >= 0:
            classes = dict(enumerate(self.classes))
            code = np.full((1, 1), self.codes[index])
            layers["label"] = published.class_map("worldcereal-points", code, classes, GSD_M, SOURCE, Path(self.file))
        place = grid.place_of(_pixel(*table.lonlat[sample].tolist()))
        return tiling.observed(Batch((place,), layers))

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def build(
    variant: str = "cube",
    *,
    root: str | Path,
    modalities: Sequence[str] | None = None,
    part: str = "",
    block_m: float | None = None,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    tile_m: float = 100.0,
    stride_m: float | None = None,
    labels: str | None = "cropland",
    file: str = POINTS,
    grouping: str = "CROPTYPE28",
    least: int = 1,
    unlabelled: bool = False,
) -> Cube | Points:
    """Tiles of the cube, or points that are places of one pixel.

    Layers are ``s2`` (9 bands, reflectance), ``s1`` (VV and VH, dB), ``dem`` (m, undated), ``agera5`` (mean temperature in K and
    sum of rain in mm over each month or dekad, one pixel as large as the place) and ``label``. Dates without a valid value
    are left out, and so are layers without a date.

    Args:
        variant: ``cube`` (1 km2 in Belgium, November 2020 to October 2021) or ``points`` (500 in western France, September 2022
            to January 2024).
        root: folder with the files named above.
        modalities: layers to read; ``s2`` and ``s1`` by default.
        part, block_m, shares, seed: only the places of one part (``train``, ``val``, ``test``) of a split by blocks of ground
            of that side, 200 m in the cube and 20 km among the points.
        tile_m, stride_m: of the cube: side of a tile, and from one to the next (a side), metres.
        labels: of the cube: ``cropland``, ``croptype``, or nothing for none. Not ground truth.
        file: of the points: another file of the same columns, below ``root``; months are told from dekads.
        grouping: of the points: which table of ``class_mappings.json`` makes classes of their codes. Codes that it lacks or
            calls ``ignore``, and groups of fewer than ``least`` points, are no label. Classes are numbered by name over all
            parts.
        unlabelled: of the points: keep those without a label.

    Raises:
        FileNotFoundError: a file is missing. LookupError: an unknown name. ValueError: a file or size that does not fit.
    """
    published.one_of(variant or "cube", VARIANTS, "variant")
    layers = published.layers_of(modalities, tuple(COLUMNS), ("s2", "s1"))
    if variant == "points":
        return _points(root, layers, (part, block_m or 20_000.0, shares, seed), file, grouping, least, unlabelled)
    needed = [INPUTS, *([_classified(published.one_of(labels, LABELS, "labels"))] if labels else [])]
    folder = published.folder(root, "worldcereal/cube", needed, SOURCE)
    whole = _cube(folder / INPUTS, layers)
    side = tiling.pixels(tile_m, GSD_M, "tile_m")
    stride = tiling.pixels(stride_m or tile_m, GSD_M, "stride_m")
    if part and stride < side:
        raise ValueError(f"stride_m={stride_m} is below tile_m={tile_m}: tiles of different parts would overlap")
    corners = tiling.corners((round(whole.height_m / GSD_M), round(whole.width_m / GSD_M)), side, stride)
    centres_m = (np.array(corners) + side / 2) * GSD_M
    kept = tiling.part_of(centres_m, part, block_m or 200.0, shares, seed)
    return Cube(folder, layers, labels or "", side, tuple(corners[i] for i in kept))


# --- the cube --------------------------------------------------------------------------------------------------------


def _classified(labels: str) -> str:
    return f"worldcereal_{labels}_classification.nc"


@lru_cache(maxsize=4)
def _cube(path: Path, layers: tuple[str, ...]) -> Batch:
    """The whole cube: a few megabytes."""
    found: dict[str, list[Plane]] = {}
    for plane in cube.cube_planes(str(path)):
        found.setdefault(plane.label, []).append(plane)
    rasters = {}
    for name in layers:
        columns = COLUMNS[name][1].values()
        if missing := [column for column in columns if column not in found]:
            raise ValueError(f"{path} has no variable {missing[0]!r}; it has {', '.join(found)}")
        numbers = np.stack([np.stack([plane.read()[0] for plane in found[column]]) for column in columns], 1)
        months = [np.datetime64(int(plane.time[0]), "s") for plane in found[next(iter(columns))] if plane.time]
        if len(months) < len(numbers):
            raise ValueError(f"{path} has no dates: its axis t must be in months")
        rasters[name] = _raster(name, numbers, np.array([span(str(m)[:7]) for m in months]))
    if "agera5" in rasters:
        rasters["agera5"] = _pooled(rasters["agera5"])
    return Batch((grid.place_of(next(iter(found.values()))[0].geobox),), rasters)


def _pooled(raster: Raster) -> Raster:
    """One pixel, the mean of what is valid: pixels of 0.1 degrees are larger than the cube."""
    count = raster.valid.sum((2, 3), keepdim=True)
    mean = torch.where(raster.valid, raster.values, 0.0).sum((2, 3), keepdim=True) / count.clamp(min=1)
    return replace(raster, values=mean, valid=count > 0, gsd_m=raster.gsd_m * raster.values.shape[2])


@lru_cache(maxsize=4)
def _classification(root: Path, labels: str, geobox: GeoBox) -> Raster:
    path = root / _classified(labels)
    bands = {plane.label: plane for plane in cube.cube_planes(str(path), crs=geobox.crs)}
    chances = {label.removeprefix("probability_"): p for label, p in bands.items() if label.startswith("probability_")}
    if "classification" not in bands or not chances:
        raise ValueError(f"{path} has the bands {', '.join(bands)}; expected classification and probability_<class>")
    if bands["classification"].geobox != geobox:
        raise ValueError(f"{path} has another grid than {INPUTS}: they are not of the same place")
    codes = bands["classification"].read()[0].astype(np.int64)
    percent = np.stack([plane.read()[0] for plane in chances.values()]).astype(np.int64)
    if codes.max() >= len(chances) or (np.take_along_axis(percent, codes[None], 0)[0] < percent.max(0)).any():
        raise ValueError(f"{path}: the codes do not count the probability bands, so what they mean is unknown")
    name = f"worldcereal-{labels}"
    return published.class_map(name, codes, dict(enumerate(chances)), GSD_M, f"{SOURCE}; not ground truth", path)


# --- the points ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of a file by point and date. ``starts`` [point + 1] says where the rows of a point begin; ``numbers`` [row, band] are
    of each layer, ``time_s`` [row, 2]; ``lonlat`` [point, 2] and ``code`` [point] of the points."""

    starts: np.ndarray
    numbers: Mapping[str, np.ndarray]
    time_s: np.ndarray
    lonlat: np.ndarray
    code: np.ndarray


def _points(
    root: str | Path,
    layers: tuple[str, ...],
    split: tuple[Any, ...],
    file: str,
    grouping: str,
    least: int,
    unlabelled: bool,
) -> Points:
    folder = published.folder(root, "worldcereal/points", (file, MAPPINGS), SOURCE)
    table, mappings = _table(folder / file), arrays.parsed(folder / MAPPINGS)
    groups = mappings[published.one_of(grouping, mappings, "grouping")]
    named = [groups.get(str(code), "ignore") for code in table.code.tolist()]
    counts = Counter(name for name in named if name != "ignore")
    classes = sorted(name for name, count in counts.items() if count >= least)
    codes = [classes.index(name) if name in classes else -1 for name in named]
    mine = tiling.part_of(tiling.on_earth_m(table.lonlat), *split)
    kept = [i for i in mine if unlabelled or codes[i] >= 0]
    if not kept:
        raise ValueError(f"no point of {file} has a label in {grouping}; take another grouping, or unlabelled=True")
    return Points(folder, file, layers, tuple(kept), tuple(codes[i] for i in kept), tuple(classes))


@lru_cache(maxsize=4)
def _table(path: Path) -> Table:
    wanted = {name: list(columns.values()) for name, (_, columns) in COLUMNS.items()}
    names = ["sample_id", "timestamp", "lon", "lat", "ewoc_code", *(c for columns in wanted.values() for c in columns)]
    try:
        there = parquet.read_schema(arrays.present(path)).names
        if missing := [name for name in names if name not in there]:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(there)}")
        frame = parquet.read_table(path, columns=names).to_pandas()
    except (pa.ArrowInvalid, pa.ArrowIOError) as error:
        raise OSError(f"{path} cannot be read: it is truncated or no Parquet file ({error}). Fetch it again") from error
    frame = frame.sort_values(["sample_id", "timestamp"], kind="stable")
    if (twice := frame.duplicated(["sample_id", "timestamp"])).any():
        raise ValueError(f"{path} has point {frame.sample_id[twice].iloc[0]!r} twice at one date")
    points = frame.drop_duplicates("sample_id")
    starts = np.flatnonzero(~frame.duplicated("sample_id").to_numpy())
    return Table(
        np.append(starts, len(frame)),
        {name: frame[columns].to_numpy() for name, columns in wanted.items()},
        _periods(frame.timestamp.to_numpy(), path),
        points[["lon", "lat"]].to_numpy(float),
        points.ewoc_code.to_numpy(np.int64),
    )


def _periods(start: np.ndarray, path: Path) -> np.ndarray:
    """Start and end of the months or dekads that begin at ``start`` (datetime64), float64 [row, 2]."""
    day, month = start.astype("datetime64[D]"), start.astype("datetime64[M]")
    number = (day - month.astype("datetime64[D]")).astype(int) + 1
    if not np.isin(number, (1, 11, 21)).all() or (start != day).any():
        raise ValueError(f"{path}: a timestamp is neither the first day of a month nor of a dekad (1, 11, 21)")
    last = (month + 1).astype("datetime64[D]")
    monthly = (number == 1).all()
    end = last if monthly else np.where(number == 21, last, day + 10)
    return np.stack([day, end], 1).astype("datetime64[s]").astype(np.int64).astype(np.float64)


def _pixel(lon: float, lat: float) -> GeoBox:
    """The pixel of the local UTM grid that a point lies in."""
    crs = local_crs((lon, lat, lon, lat))
    x, y = _to_crs(str(crs)).transform(lon, lat)
    corner = Affine(GSD_M, 0, np.floor(x / GSD_M) * GSD_M, 0, -GSD_M, np.ceil(y / GSD_M) * GSD_M)
    return GeoBox((1, 1), corner, crs)


@lru_cache(maxsize=128)
def _to_crs(crs: str) -> Transformer:
    return Transformer.from_crs("EPSG:4326", crs, always_xy=True)


# --- both ------------------------------------------------------------------------------------------------------------


def _raster(name: str, numbers: np.ndarray, time_s: np.ndarray) -> Raster:
    """Layer ``name`` in physical units from digital numbers [obs, band, y, x]; elevation once and undated."""
    sensor, columns = COLUMNS[name]
    valid = numbers != NODATA
    times: Any = torch.from_numpy(time_s)
    if name == "dem":
        numbers, valid, times = numbers[:1], valid[:1], [ALWAYS]
    if name == "s1":
        valid = valid & (numbers > 0)
        values = 20 * np.log10(np.where(valid, numbers, 1).astype(np.float32)) - 83
    else:
        values = numbers.astype(np.float32) * {"s2": 1e-4, "agera5": 1e-2}.get(name, 1.0)
    table = sensors.get(sensor).select(columns)
    return Raster.of(table, torch.from_numpy(values), GSD_M, valid=torch.from_numpy(valid), time_s=times)
