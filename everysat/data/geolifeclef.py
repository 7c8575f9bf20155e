"""GeoLifeCLEF: plants where people saw them, from images of the place and its past. Samples for trying things out, not for scores.

Botella et al. 2023 (the challenge of 2023) and Lorieul et al. 2022 (that of 2022), in the layout of the samples of malpolon. Under ``root``::

    glc23/Presence_only_occurrences/Presences_only_train_sample.csv      lon, lat, speciesId, patchID, timeSerieID, ...
    glc23/SatelliteImages/{rgb,nir}/<cd>/<ab>/<...abcd>.jpeg             128 px of 10 m, Sentinel-2 in 8 bits
    glc23/SatelliteTimeSeries/time_series_<band>.csv                     timeSerieID, 2000_1 ... 2020_4, Landsat in 8 bits; "eos" after the end
    glc22/observations/observations_{fr,us}_{train,test}.csv             observation_id, latitude, longitude, species_id
    glc22/patches-{fr,us}/<cd>/<ab>/<...abcd>_{rgb,near_ir}.jpg          256 px of 1 m
    glc22/patches-{fr,us}/<cd>/<ab>/<...abcd>_{altitude,landcover}.tif

Numbers of 8 bits were stretched in ways that are not given, so they stay digital numbers. Quarters are those of the EcoDataCube (Witjes et
al. 2023): from 2 December, 21 March, 25 June and 13 September. A seen plant says nothing about others; nearly every place of the sample has
a species of its own. ``glc22/rasters`` hold links that lead nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

from everysat import sensors
from everysat.data import points, published, tiling
from everysat.io import archives, arrays, dates, pictures
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-4.0 (data); MIT (github.com/plantnet/malpolon)"
SOURCE = "https://github.com/plantnet/malpolon; https://www.imageclef.org/GeoLifeCLEF2023, GeoLifeCLEF2022"
SPLITS = points.SPLITS
VARIANTS = {"2023": ("rgbn", "landsat"), "2022": ("rgbn", "altitude", "landcover")}
LAYERS = ("rgbn", "landsat", "label")
TABLE = "glc23/Presence_only_occurrences/Presences_only_train_sample.csv"
SERIES = "glc23/SatelliteTimeSeries/time_series_{}.csv"
BANDS = {"blue": "B2", "green": "B3", "red": "B4", "nir": "B5", "swir1": "B6", "swir2": "B7"}
END = "eos"
QUARTERS = {1: (-1, 12, 2), 2: (0, 3, 21), 3: (0, 6, 25), 4: (0, 9, 13)}
"""Year (0, or that before), month and day on which each begins."""
PIXEL_M = {"2023": 10.0, "2022": 1.0}
SERIES_M, SERIES_SIDE = 30.0, 43
"""The series is that of one pixel, where the plant stood: the middle one of as many as the image covers, and the others are not valid."""


def _eight_bits(name: str, table: str, bands: Sequence[str]) -> Sensor:
    """Bands as in ``table``, stretched to 8 bits."""
    held = sensors.get(table).select(bands).bands
    made = tuple(Band(b.name, b.gsd_m, "DN", b.wavelength_um, b.width_um, range=(0, 255)) for b in held)
    return Sensor(name, "optical", made, SOURCE)


IMAGES = {
    "2023": _eight_bits("sentinel-2-8bit", "sentinel-2-l2a", ("B04", "B03", "B02", "B08")),
    "2022": _eight_bits("aerial-8bit", "naip", ("red", "green", "blue", "nir")),
}
LANDSAT = _eight_bits("landsat-8bit", "landsat-8-oli", tuple(BANDS.values()))


@dataclass(frozen=True)
class Observation:
    """``image`` is the number of the patch, ``species`` -1 where it is not told."""

    image: str
    series: str
    lonlat: tuple[float, float]
    species: int
    folder: str


@dataclass(frozen=True)
class GeoLife:
    """See :func:`build`. ``species`` are all that the tables know, in the order of their codes."""

    root: Path
    variant: str
    places: tuple[Observation, ...]
    species: tuple[int, ...]
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        seen = self.places[index]
        readers = {
            "rgbn": self._rgbn,
            "landsat": self._landsat,
            "altitude": self._altitude,
            "landcover": self._landcover,
        }
        layers = {name: readers[name](seen) for name in self.layers}
        side_m = {"2023": 1280.0, "2022": 256.0}[self.variant]
        if seen.species >= 0:
            code, names = (
                np.array([[self.species.index(seen.species)]]),
                {i: str(s) for i, s in enumerate(self.species)},
            )
            layers["label"] = published.class_map("geolifeclef-species", code, names, side_m, SOURCE, Path(seen.image))
        return tiling.observed(Batch((Place(side_m, side_m, None, seen.lonlat),), layers))

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def codes(self) -> np.ndarray:
        """The species of each place, as its index in ``species``; -1 for none."""
        return np.array([self.species.index(p.species) if p.species >= 0 else -1 for p in self.places])

    def _file(self, seen: Observation, kind: str) -> Path:
        inside = self.root / seen.folder.format(kind) / seen.image[-2:] / seen.image[-4:-2]
        return inside / (f"{seen.image}.jpeg" if self.variant == "2023" else f"{seen.image}_{kind}")

    def _rgbn(self, seen: Observation) -> Raster:
        rgb, nir = ("rgb", "nir") if self.variant == "2023" else ("rgb.jpg", "near_ir.jpg")
        path = self._file(seen, rgb)
        colours, infrared = pictures.picture(path), pictures.picture(self._file(seen, nir), 1)
        if colours.shape[1:] != infrared.shape[1:]:
            raise ValueError(f"{path} and its near infrared differ in size: {colours.shape[1:]}, {infrared.shape[1:]}")
        both = np.concatenate([colours, infrared])
        return published.image(IMAGES[self.variant], both, path, PIXEL_M[self.variant])

    def _landsat(self, seen: Observation) -> Raster:
        files = points.state(*(self.root / SERIES.format(band) for band in BANDS))
        tables = _series(files)
        for (path, *_), table in zip(files, tables, strict=True):
            if seen.series not in table.index:
                raise ValueError(f"{path} has no series {seen.series}, which {TABLE} asks for")
        values = np.stack([table.loc[seen.series].to_numpy(np.float32) for table in tables], 1)
        quarters = [_quarter(name) for name in tables[0].columns]
        around = [(0, 0), (0, 0), (SERIES_SIDE // 2,) * 2, (SERIES_SIDE // 2,) * 2]
        held = np.pad(values[:, :, None, None], around, constant_values=np.nan)
        return Raster.of(
            LANDSAT, torch.from_numpy(held), SERIES_M, valid=torch.from_numpy(held == held), time_s=quarters
        )

    def _altitude(self, seen: Observation) -> Raster:
        path = self._file(seen, "altitude.tif")
        return published.image(sensors.get("srtm"), arrays.tiff(path)[0], path, 1.0)

    def _landcover(self, seen: Observation) -> Raster:
        """Codes of the map of the country, France or the United States, whose meaning is not among the files."""
        path = self._file(seen, "landcover.tif")
        codes = arrays.tiff(path)[0][0]
        country = "fr" if "patches-fr" in seen.folder else "us"
        names = {code: f"{country} {code}" for code in range(256)}
        return published.class_map("geolifeclef-land-cover", codes, names, 1.0, SOURCE, path)


def build(
    variant: str = "2023",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    block_deg: float = 2.0,
) -> GeoLife:
    """Places with a plant that was seen there; ``label`` is its species, for the whole place.

    Args:
        variant: ``2023``: ``rgbn`` (10 m) and ``landsat``, quarters from 2000 on; ``2022``: ``rgbn`` (1 m), ``altitude`` (m) and ``landcover``.
        root: the folder that holds ``glc23`` and ``glc22``.
        split: ``train``, ``val``, ``test``, by blocks of ground of ``block_deg``, of which folds are made; or ``all``.
        modalities: some of the layers.
        fold, folds, seed: which of the folds of blocks is the test; the next is ``val``.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "2023", VARIANTS, "variant")
    layers = published.layers_of(modalities, VARIANTS[variant], VARIANTS[variant])
    needed = (TABLE,) if variant == "2023" else ("glc22/observations",)
    base = published.folder(root, f"geolifeclef/{variant}", needed, SOURCE)
    seen = _seen_2023(base) if variant == "2023" else _seen_2022(base)
    blocks = [str(np.floor(np.array(place.lonlat) / block_deg).astype(int)) for place in seen]
    kept = points.held_out(blocks, split, fold, folds, seed)
    species = tuple(sorted({place.species for place in seen if place.species >= 0}))
    return GeoLife(base, variant, tuple(seen[i] for i in kept), species, layers)


def _seen_2023(base: Path) -> list[Observation]:
    needed = ("lon", "lat", "speciesId", "patchID", "timeSerieID")
    frame = archives.table(base / TABLE, needed, sep=";")
    where = "glc23/SatelliteImages/{}"
    return [
        Observation(f"{int(row.patchID):04d}", str(int(row.timeSerieID)), (row.lon, row.lat), int(row.speciesId), where)
        for row in frame.itertuples()
    ]


def _seen_2022(base: Path) -> list[Observation]:
    """Observations of which there are images."""
    found = []
    for country in ("fr", "us"):
        folder = f"glc22/patches-{country}"
        there = {path.name.split("_")[0] for path in (base / folder).glob("*/*/*_rgb.jpg")}
        for path in sorted((base / "glc22" / "observations").glob(f"observations_{country}_*.csv")):
            frame = archives.table(path, ("observation_id", "latitude", "longitude"), sep=";")
            for row in frame.to_dict("records"):
                name, species = str(int(row["observation_id"])), row.get("species_id")
                if name in there:
                    code = -1 if species is None or pd.isna(species) else int(species)
                    found.append(Observation(name, "", (row["longitude"], row["latitude"]), code, folder))
    if not found:
        raise published.absent(base, "glc22/patches-*/*/*/*_rgb.jpg of an observation", "geolifeclef/2022", SOURCE)
    return found


@lru_cache(maxsize=2)
def _series(files: tuple[tuple[str, int, int], ...]) -> list[pd.DataFrame]:
    """Of each band, a row a series and a column a quarter; NaN from the end on."""
    tables = []
    for path, *_ in files:
        frame = archives.table(path, ("timeSerieID",), sep=";", dtype=str).set_index("timeSerieID").replace(END, "nan")
        try:
            tables.append(frame.astype(np.float32))
        except ValueError as error:
            raise ValueError(f"{path} holds something else than numbers and {END!r}: {error}") from error
        if list(frame.columns) != list(tables[0].columns):
            raise ValueError(f"{path} has other quarters than {files[0][0]}")
    return tables


def _quarter(name: str) -> dates.Span:
    """Start and end of a quarter such as ``2003_2``."""
    year, number = (int(part) for part in name.split("_"))

    def begins(quarter: int) -> float:
        after, of = divmod(quarter - 1, 4)
        before, month, day = QUARTERS[of + 1]
        return datetime(year + after + before, month, day, tzinfo=UTC).timestamp()

    return begins(number), begins(number + 1)


def fake(folder: Path, *, places: int = 10, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): ``places`` of 2023, five of 2022."""
    rng = np.random.default_rng(seed)
    names = [str(5494000 + i) for i in range(places)]
    quarters = [f"{year}_{q}" for year in (2000, 2001) for q in range(1, 5)]
    lines = ["glcID;lon;lat;speciesId;patchID;timeSerieID"]
    lines += [f"{i};{2 + 3 * i};{45 + rng.random():.5f};{100 + i % 4};{name};{900 + i}" for i, name in enumerate(names)]
    arrays.write_text(folder / TABLE, "\n".join([*lines, ""]))
    for name in names:
        for kind, count in (("rgb", 3), ("nir", 1)):
            path = folder / "glc23/SatelliteImages" / kind / name[-2:] / name[-4:-2] / f"{name}.jpeg"
            pictures.write_jpeg(path, rng.integers(0, 256, (count, 128, 128), dtype=np.uint8))
    for band in BANDS:
        series = [[str(v) for v in rng.integers(0, 255, 7)] + [END if i == 0 else "9"] for i in range(places)]
        table = [["timeSerieID", *quarters], *([str(900 + i), *row] for i, row in enumerate(series))]
        arrays.write_text(folder / SERIES.format(band), "\n".join([*map(";".join, table), ""]))
    rows = [f"{10561900 + i};{45 + i};{1.4 + 3 * i};{241 + i};train" for i in range(5)]
    text = "\n".join(["observation_id;latitude;longitude;species_id;subset", *rows, ""])
    arrays.write_text(folder / "glc22/observations/observations_fr_train.csv", text)
    for i in range(5):
        stem = folder / "glc22/patches-fr" / f"0{i}" / "19" / str(10561900 + i)
        for kind, count in (("rgb.jpg", 3), ("near_ir.jpg", 1)):
            pictures.write_jpeg(Path(f"{stem}_{kind}"), rng.integers(0, 256, (count, 256, 256), dtype=np.uint8))
        arrays.write_tiff(Path(f"{stem}_altitude.tif"), rng.integers(100, 120, (1, 256, 256)).astype(np.int16))
        arrays.write_tiff(Path(f"{stem}_landcover.tif"), rng.integers(1, 20, (1, 256, 256)).astype(np.uint8))
