"""FLAIR-HUB: 241 100 places of 102.4 m in 74 departments of France, 0.2 m labels of land cover, with parcels of crops and six sensors.

Garioud et al. 2025 (arXiv:2506.07080). It contains FLAIR #1 and #2 with files of another layout and classes of another order.

Layout, under ``root``, with ``<domain>`` = ``D006-2020``, ``<roi>`` = ``FF-S1-14`` and ``<at>`` = ``5-5``, row and column in the region::

    <domain>_<modality>/<roi>/<domain>_<modality>_<roi>_<at>.tif      one GeoTIFF a place and modality:
      AERIAL_RGBI          uint8 [4, 512, 512]: red, green, blue, near infrared
      AERIAL-RLT_PAN       uint8 [1, y, x]: photograph of about 1950, the year in <domain> is then 195X
      DEM_ELEV             float32 [2, 512, 512]: surface, ground, m
      SPOT_RGBI            uint16 [4, 64, 64]: red, green, blue, near infrared
      SENTINEL2_TS         uint16 [dates x 10, 10, 10], all bands of a date together; SENTINEL2_MSK-SC [dates x 2, ...] snow, cloud, percent
      SENTINEL1-ASC_TS, SENTINEL1-DESC_TS                          float32 [dates x 2, 10, 10]: VV, VH, linear power
      AERIAL_LABEL-COSIA   uint8 [1, 512, 512]: 0..18;  ALL_LABEL-LPIS  uint8 [3, 512, 512]: crop in three grades of detail
    GLOBAL_ALL_MTD/GLOBAL_ALL_MTD_SPLIT.gpkg                       patch_id (D006-2020_FF-S1-14_5-5), split_1, ...: train, valid or test
    GLOBAL_ALL_MTD/GLOBAL_{SENTINEL2,SENTINEL1-ASC,SENTINEL1-DESC}_MTD_DATES.gpkg    patch_id, acquisition_dates: {"1": "20200105", ...}
    GLOBAL_ALL_MTD/GLOBAL_{AERIAL,AERIAL-RLT,SPOT}_MTD_DATES.gpkg                    patch_id, date: 20200714
    <name>_TRAIN.csv, <name>_VALID.csv, <name>_TEST.csv            patch_id and others, between commas or semicolons: the other form of a split

Test domains are apart. The official validation is drawn from the domains of training, so its places may adjoin those of ``train``.

Taken from the authors' programs and from readers of others, not from the files: sizes, types, band orders, names of tables and columns, that Sentinel-1 is
linear power and that SPOT holds digital numbers. Whether Sentinel-2 of 2022 has the offset of baseline 04.00 is not documented; none is taken
off. The names of the finer two grades of crops are not here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyogrio
import torch
from shapely import Point

from everysat import sensors
from everysat.data import published
from everysat.io import archives, arrays, grid
from everysat.io.plane import unreadable
from everysat.sensors import Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "etalab-2.0"
SOURCE = "https://huggingface.co/datasets/IGNF/FLAIR-HUB, https://ignf.github.io/FLAIR/FLAIR-HUB/flairhub.html"
SPLITS = ("train", "val", "test")
LAYERS = ("aerial-flair", "spot", "dem", "s2", "s1-asc", "s1-des", "aerial-rlt", "label")
VARIANTS = {"": "split_1", "toy": "FLAIR-HUB_TOY-DATASET"}
MODALITIES = {
    "aerial-flair": "AERIAL_RGBI", "spot": "SPOT_RGBI", "dem": "DEM_ELEV", "s2": "SENTINEL2_TS", "s1-asc": "SENTINEL1-ASC_TS",
    "s1-des": "SENTINEL1-DESC_TS", "aerial-rlt": "AERIAL-RLT_PAN", "cosia": "AERIAL_LABEL-COSIA", "lpis": "ALL_LABEL-LPIS",
}  # fmt: skip
SERIES = ("s2", "s1-asc", "s1-des")
DATED = ("aerial-flair", "aerial-rlt", "spot")
METADATA, MASKS = "GLOBAL_ALL_MTD", "SENTINEL2_MSK-SC"
SPLIT_FILE = f"{METADATA}/GLOBAL_ALL_MTD_SPLIT.gpkg"
COSIA = dict(enumerate((
    "building", "greenhouse", "swimming pool", "impervious surface", "pervious surface", "bare soil", "water", "snow",
    "herbaceous vegetation", "agricultural land", "plowed land", "vineyard", "deciduous", "coniferous", "brushwood", "clear cut",
    "ligneous", "mixed", "undefined",
)))  # fmt: skip
WEAK = (15, 16, 17, 18)
"""Classes of COSIA that the official evaluation leaves out."""
LPIS = dict(enumerate((
    "grasses", "wheat", "barley", "maize", "other cereals", "rice", "flax, hemp and tobacco", "sunflower", "rapeseed",
    "other oilseed crops", "soy", "other protein crops", "fodder legumes", "beetroots", "potatoes", "other arable crops", "vineyard",
    "olive groves", "fruit orchards", "nut orchards", "other permanent crops", "mixed crops", "background",
)))  # fmt: skip
SIDE_M, LEAST_POWER = 102.4, 1e-5


@dataclass(frozen=True)
class Dates:
    """Distinct lists of days, and which of them each place has; -1 for none."""

    lists: tuple[tuple[str, ...], ...]
    of: tuple[int, ...]


@dataclass(frozen=True)
class FlairHub:
    """See :func:`build`. ``patches`` are the names of places, ``dates`` those of the layers that have some."""

    root: Path
    patches: tuple[str, ...]
    layers: tuple[str, ...]
    dates: tuple[tuple[str, Dates], ...]
    label: str
    weak: bool
    clouds: float | None
    s1_unit: str

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        layers: dict[str, Raster] = {}
        place = Place(SIDE_M, SIDE_M)
        for name in self.layers:
            path = self._path(index, MODALITIES[name])
            numbers, geobox = arrays.tiff(path)
            if geobox is not None and place.geobox is None:
                place = replace(grid.place_of(geobox), height_m=SIDE_M, width_m=SIDE_M)
            raster = (
                self._series(index, name, numbers, path) if name in SERIES else self._image(index, name, numbers, path)
            )
            layers |= {name: raster} if len(raster.row) else {}
        if self.label:
            layers["label"] = self._label(self._path(index, MODALITIES[self.label]))
        return Batch((place,), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _path(self, index: int, modality: str) -> Path:
        domain, roi, at = self.patches[index].split("_")
        if modality == MODALITIES["aerial-rlt"]:
            domain = f"{domain.rsplit('-', 1)[0]}-195X"
        return self.root / f"{domain}_{modality}" / roi / f"{domain}_{modality}_{roi}_{at}.tif"

    def _days(self, index: int, name: str) -> tuple[str, ...]:
        held = dict(self.dates).get(name)
        return () if held is None or held.of[index] < 0 else held.lists[held.of[index]]

    def _image(self, index: int, name: str, numbers: np.ndarray, path: Path) -> Raster:
        raster = published.image(_sensor(name), numbers, path, _gsd_m(numbers, path))
        day = self._days(index, name)
        return replace(raster, time_s=published.days(day, _table(self.root, name))) if day else raster

    def _series(self, index: int, name: str, numbers: np.ndarray, path: Path) -> Raster:
        sensor, listed = _sensor(name, self.s1_unit), _table(self.root, name)
        numbers = _by_date(numbers, len(sensor.bands), path)
        if name != "s2":
            numbers = _power(numbers, path) if self.s1_unit == "linear" else 10 * np.log10(_power(numbers, path))
        time_s = published.days(self._days(index, name), listed)
        raster = published.series(sensor, numbers, time_s, path, gsd_m=_gsd_m(numbers, path), listed_in=listed)
        if name == "s2" and self.clouds is not None:
            masks = self._path(index, MASKS)
            raster = published.clear(raster, _by_date(arrays.tiff(masks)[0], 2, masks), self.clouds, masks)
        raster = raster.obs(raster.valid.flatten(1).any(1))
        return raster.obs(torch.argsort(raster.time_s[:, 0], stable=True))

    def _label(self, path: Path) -> Raster:
        numbers, _ = arrays.tiff(path)
        classes = COSIA if self.label == "cosia" else LPIS
        label = published.class_map(f"flair-{self.label}", numbers[0], classes, _gsd_m(numbers, path), SOURCE, path)
        return label if self.label == "lpis" or self.weak else published.without(label, WEAK)


def _sensor(name: str, s1_unit: str = "dB") -> Sensor:
    if name.startswith("s1"):
        return published.sentinel1("VV", "VH", unit=s1_unit)
    table = {"aerial-flair": "flair-aerial", "spot": "spot-6-7", "dem": "flair-dem", "s2": "sentinel-2-l2a"}
    sensor = sensors.get(table.get(name, "french-aerial-historical"))
    if name == "s2":
        return sensor.select(published.S2_BANDS)
    return sensor.select(("red", "green", "blue", "nir")) if name in ("aerial-flair", "spot") else sensor


def _gsd_m(numbers: np.ndarray, path: Path) -> float:
    if numbers.shape[-1] != numbers.shape[-2]:
        raise ValueError(f"{path} has {numbers.shape[-2:]} pixels, expected a square of {SIDE_M} m")
    return SIDE_M / numbers.shape[-1]


def _by_date(numbers: np.ndarray, count: int, path: Path) -> np.ndarray:
    if len(numbers) % count:
        raise ValueError(f"{path} has {len(numbers)} bands, expected a multiple of {count}: so many a date")
    return numbers.reshape(-1, count, *numbers.shape[1:])


def _power(numbers: np.ndarray, path: Path) -> np.ndarray:
    """Linear power, NaN where it is below what the instrument can tell from nothing."""
    if np.nanmin(numbers, initial=0.0) < 0:
        raise ValueError(
            f"{path} holds negative Sentinel-1 values down to {np.nanmin(numbers):.3g}; the published files hold linear power"
        )
    return np.where(numbers >= LEAST_POWER, numbers, np.nan).astype(np.float32)


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    label: str = "cosia",
    weak: bool = False,
    clouds: float | None = None,
    s1_unit: str = "dB",
    listing: str = "",
) -> FlairHub:
    """FLAIR-HUB, or with ``"toy"`` the 250 places of its sample.

    Args:
        root: the folder that holds ``D004-2021_AERIAL_RGBI`` and the others.
        modalities: any of :data:`LAYERS` but ``label``; all by default. Archives are of one modality each, and only those asked for are needed.
        label: ``cosia`` (land cover, 0.2 m), ``lpis`` (crops, the coarsest of the three grades), or empty for none.
        weak: whether the four classes of land cover count that the official evaluation leaves out.
        clouds: leave out Sentinel-2 pixels whose probability of snow or cloud exceeds this, 0-1; None keeps them.
        s1_unit: ``dB``, or ``linear`` power as in the files.
        listing: the split: a column of ``GLOBAL_ALL_MTD_SPLIT.gpkg`` such as ``split_2`` or ``split_flairchallenge``, or the name of three tables,
            as ``FLAIR-HUB`` for ``FLAIR-HUB_TRAIN.csv``, in ``root`` or in its folder ``csv``. By default ``split_1``, of the sample the tables.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    listing = listing or VARIANTS[published.one_of(variant, VARIANTS, "variant")]
    published.one_of(split, SPLITS, "split")
    published.one_of(s1_unit, ("dB", "linear"), "s1_unit")
    if label:
        published.one_of(label, ("cosia", "lpis"), "label")
    layers = published.layers_of(modalities, LAYERS[:-1], LAYERS[:-1])
    base = published.folder(root, "FLAIR-HUB", (SPLIT_FILE,) if listing.startswith("split_") else (), SOURCE)
    patches = _patches(base, listing, "valid" if split == "val" else split)
    dated = [name for name in layers if name in SERIES or (name in DATED and _table(base, name).is_file())]
    dates = tuple((name, _dates(_table(base, name), patches, name in SERIES)) for name in dated)
    return FlairHub(base, patches, layers, dates, label, weak, clouds, s1_unit)


def _patches(base: Path, listing: str, part: str) -> tuple[str, ...]:
    if listing.startswith("split_"):
        path = base / SPLIT_FILE
        table = _attributes(path, ("patch_id", listing))
        found = table.loc[table[listing] == part, "patch_id"]
    else:
        name = f"{listing}_{part.upper()}.csv"
        path = base / "csv" / name if (base / "csv" / name).is_file() else base / name
        if not path.is_file():
            raise published.absent(base, name, "FLAIR-HUB", SOURCE)
        found = archives.table(path, ("patch_id",), sep=None, engine="python")["patch_id"]
    if not len(found):
        raise ValueError(f"{path} lists no place of the split {part!r}")
    for name in (odd := [name for name in found if str(name).count("_") != 2])[:1]:
        raise ValueError(f"{path} lists {len(odd)} names like {name!r}, expected such as 'D006-2020_FF-S1-14_5-5'")
    return tuple(sorted(found))


def _table(base: Path, name: str) -> Path:
    return base / METADATA / f"GLOBAL_{MODALITIES[name].split('_')[0]}_MTD_DATES.gpkg"


def _attributes(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The columns of a GeoPackage, without geometries."""
    try:
        frame = pyogrio.read_dataframe(arrays.present(path), read_geometry=False)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, RuntimeError, ValueError) as error:
        raise unreadable(str(path), error) from error
    for name in columns:
        if name not in frame.columns:
            raise LookupError(f"{path} has no column {name!r}; it has {', '.join(map(str, frame.columns))}")
    return frame


def _dates(path: Path, patches: Sequence[str], series: bool) -> Dates:
    """Days of each place; of a series, tables that list whole regions serve too. A place that a table of single days lacks is undated."""
    column = "acquisition_dates" if series else "date"
    frame = _attributes(path, (column,))
    key = next((name for name in ("patch_id", "zone_id") if name in frame.columns), None)
    if key is None:
        raise LookupError(f"{path} has no column 'patch_id'; it has {', '.join(map(str, frame.columns))}")
    texts = dict(zip(frame[key].astype(str), frame[column].astype(str), strict=True))
    numbered: dict[str, int] = {}
    of = []
    for patch in patches:
        text = texts.get(patch, texts.get(patch.rsplit("_", 1)[0]))
        if text is None and series:
            raise ValueError(
                f"{path} has no dates of {patch}. Fetch this file again, or leave the layer out of modalities"
            )
        of.append(-1 if text is None else numbered.setdefault(text, len(numbered)))
    return Dates(
        tuple(_listed(text, path) if series else (text[:10].replace("-", ""),) for text in numbered), tuple(of)
    )


def _listed(text: str, path: Path) -> tuple[str, ...]:
    try:
        held: dict[str, Any] = json.loads(text)
        return tuple(str(held[number]) for number in sorted(held, key=int))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'{path} holds the dates {text[:40]!r}, expected such as {{"1": "20200105"}}') from error


def fake(folder: Path, *, dates: int = 3, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): a region with places of training and validation, one of the test."""
    rng = np.random.default_rng(seed)
    split = {
        "D006-2020_FF-S1-14_5-5": "train", "D006-2020_FF-S1-14_5-6": "train", "D006-2020_FF-S1-14_6-5": "valid",
        "D012-2019_AF-S1-27_5-10": "test",
    }  # fmt: skip
    for i, patch in enumerate(split):
        _fake_place(folder, patch, (873782.4 + SIDE_M * i, 6891028.8), dates, rng)
    frame = geopandas.GeoDataFrame(
        {"patch_id": list(split)}, geometry=[Point(8e5 + i, 6e6) for i in range(4)], crs=2154
    )
    _write(folder / SPLIT_FILE, frame.assign(split_1=list(split.values()), split_2=["test", "valid", "train", "train"]))
    for name in SERIES:
        days = [{str(n + 1): f"{p[5:9]}{3 * n + 2:02d}1{len(name)}" for n in range(dates)} for p in split]
        _write(_table(folder, name), frame.assign(acquisition_dates=[json.dumps(d) for d in days]))
    for name, day in zip(DATED, ("20200714", "19550621", "20200802"), strict=True):
        _write(_table(folder, name), frame.assign(date=day))
    for part in ("train", "valid", "test"):
        rows = "".join(f"{patch};../x.tif\n" for patch, its in split.items() if its == part)
        arrays.write_text(folder / f"FLAIR-HUB_{part.upper()}.csv", f"patch_id;AERIAL_RGBI\n{rows}")


def _write(path: Path, frame: geopandas.GeoDataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_file(path, driver="GPKG")


def _fake_place(folder: Path, patch: str, corner: tuple[float, float], dates: int, rng: np.random.Generator) -> None:
    noise: dict[str, np.ndarray] = {
        "aerial-flair": rng.integers(0, 256, (4, 512, 512)).astype(np.uint8),
        "aerial-rlt": rng.integers(0, 256, (1, 256, 256)).astype(np.uint8),
        "dem": (300 + np.tile(rng.random((2, 32, 32)), (1, 16, 16)) + np.array([9, 0])[:, None, None]).astype(
            np.float32
        ),
        "spot": rng.integers(50, 3000, (4, 64, 64)).astype(np.uint16),
        "s2": rng.integers(100, 9000, (dates * 10, 10, 10)).astype(np.uint16),
        "s1-asc": rng.uniform(0.001, 0.5, (dates * 2, 10, 10)).astype(np.float32),
        "s1-des": rng.uniform(0.001, 0.5, (dates * 2, 10, 10)).astype(np.float32),
        "cosia": np.kron(rng.integers(0, 19, (16, 16)), np.ones((32, 32)))[None].astype(np.uint8),
        "lpis": np.kron(rng.integers(0, 23, (3, 16, 16)), np.ones((32, 32))).astype(np.uint8),
    }
    noise["s2"][10:20] = 0
    place = FlairHub(folder, (patch,), (), (), "", False, None, "dB")
    files = [(MODALITIES[name], values) for name, values in noise.items()]
    files.append((MASKS, rng.choice([0, 20, 90], (dates * 2, 10, 10)).astype(np.uint8)))
    for modality, values in files:
        gsd_m = SIDE_M / values.shape[-1]
        arrays.write_tiff(place._path(0, modality), values, crs="EPSG:2154", corner=corner, gsd_m=gsd_m)
