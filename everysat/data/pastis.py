"""PASTIS-R and PASTIS-HD: crop types of 2433 places of 1280 m in France, with series of a year and a SPOT image.

Garnot and Landrieu 2021 (ICCV), Garnot et al. 2022 (ISPRS Journal 187) and Astruc et al. 2024 (OmniSat, ECCV). Sentinel-2 is
surface reflectance of the Theia processor, Sentinel-1 is backscatter in dB, SPOT 6/7 a colour image resampled to 1 m.

Layout, under ``root``::

    metadata.geojson                     ID_PATCH, Fold, TILE, dates-S2, dates-S1A, dates-S1D, outline in EPSG:2154
    DATA_S2/S2_<id>.npy                  int16 [T, 10, 128, 128]
    DATA_S1A/S1A_<id>.npy  DATA_S1D/     float16 [T, 3, 128, 128]: VV, VH, VV - VH, ascending and descending
    DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019/SPOT6_RVB_1M00_2019_<id>.tif       [3, 1280, 1280]: R, G, B
    ANNOTATIONS/TARGET_<id>.npy          uint8 [3, 128, 128]; the first is the crop type

Against the published loaders: all dates are read, in the order of the files, none drawn at random; training uses folds 1-3
alone, where the mixed pre-training sees all five; no-data is invalid. ``protocol="pangaea"`` is what PANGAEA evaluates on, whose folds are these:
six dates of each series, evenly spaced. PANGAEA first draws 50 dates at random where there are more, anew every time, and leaves them
unsorted; here no date is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import sensors
from everysat.data import published
from everysat.io import arrays, footprint
from everysat.sensors import Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-SA-4.0 (PASTIS, PASTIS-R); etalab-2.0 (SPOT images)"
SOURCE = "https://zenodo.org/records/5735646 (PASTIS-R), https://huggingface.co/datasets/IGNF/PASTIS-HD"
SPLITS = ("train", "val", "test")
LAYERS = ("spot", "s2", "s1-asc", "s1-des", "s1", "label")
FOLDS = {"train": (1, 2, 3), "val": (4,), "test": (5,)}
VARIANTS = ("", "classify")
CLASSES = dict(
    enumerate(
        (
            "background", "meadow", "soft winter wheat", "corn", "winter barley", "winter rapeseed", "spring barley",
            "sunflower", "grapevine", "beet", "winter triticale", "winter durum wheat", "fruits, vegetables, flowers",
            "potatoes", "leguminous fodder", "soybeans", "orchard", "mixed cereal", "sorghum", "void",
        )
    )
)  # fmt: skip
BACKGROUND, VOID = 0, 19
CROPS = tuple(name for code, name in CLASSES.items() if code not in (BACKGROUND, VOID))
SIDE_M, SIDE_PX = 1280.0, 128
NODATA, PANGAEA_DATES = -10000, 6
SERIES = {
    "s2": ("DATA_S2", "S2", "dates-S2"),
    "s1-asc": ("DATA_S1A", "S1A", "dates-S1A"),
    "s1-des": ("DATA_S1D", "S1D", "dates-S1D"),
}
SERIES["s1"] = SERIES["s1-asc"]
SPOT = "DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019/SPOT6_RVB_1M00_2019_{}.tif"


@dataclass(frozen=True)
class Patch:
    """What the metadata say of one place: number, fold, ground, and days (YYYYMMDD) by key."""

    number: str
    fold: int
    place: Place
    days: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Pastis:
    """See :func:`build`."""

    root: Path
    variant: str
    patches: tuple[Patch, ...]
    layers: tuple[str, ...]
    ratio: str
    background: bool
    void: bool
    dates: int | None = None

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        patch = self.patches[index]
        layers = {name: self._spot(patch) if name == "spot" else self._series(patch, name) for name in self.layers}
        return Batch((patch.place,), {**layers, "label": self._label(patch)})

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def observations(self) -> list[int]:
        """How many each place has, as :func:`everysat.data.batches.observations` counts them; no array is read."""
        keys = [SERIES[name][2] if name in SERIES else "" for name in self.layers]
        most = self.dates or sys.maxsize
        return [
            sum(min(most, len(days[key])) if key else 1 for key in keys)
            for days in (dict(p.days) for p in self.patches)
        ]

    def _spot(self, patch: Patch) -> Raster:
        path = self.root / SPOT.format(patch.number)
        numbers = arrays.tiff(path)[0]
        return published.image(
            sensors.get("spot-6-7").select(("red", "green", "blue")), numbers, path, SIDE_M / numbers.shape[-1]
        )

    def _series(self, patch: Patch, name: str) -> Raster:
        raster = self._whole(patch, name)
        count = len(raster.row)
        if self.dates is None or count <= self.dates:
            return raster
        return raster.obs(torch.linspace(0, count - 1, self.dates, dtype=torch.long))

    def _whole(self, patch: Patch, name: str) -> Raster:
        directory, prefix, key = SERIES[name]
        path = self.root / directory / f"{prefix}_{patch.number}.npy"
        listed = self.root / "metadata.geojson"
        time_s = published.days(dict(patch.days)[key], listed)
        numbers = arrays.npy(path)
        if name == "s2":
            return published.series(theia(), numbers, time_s, path, listed_in=listed)
        if self.ratio == "quotient" and numbers.ndim == 4:
            numbers = np.where(np.isfinite(numbers), numbers, np.nan).astype(np.float32)
            numbers[:, 2] = numbers[:, 0] / np.where(numbers[:, 1] == 0, np.nan, numbers[:, 1])
        return published.series(sentinel1(self.ratio), numbers, time_s, path, listed_in=listed)

    def _label(self, patch: Patch) -> Raster:
        path = self.root / "ANNOTATIONS" / f"TARGET_{patch.number}.npy"
        codes = arrays.npy(path)
        if codes.shape[-2:] != (SIDE_PX, SIDE_PX):
            raise ValueError(f"{path} holds {codes.shape}, expected [3, {SIDE_PX}, {SIDE_PX}]")
        codes = codes[0] if codes.ndim == 3 else codes
        full = published.class_map("pastis-crops", codes, CLASSES, SIDE_M / SIDE_PX, SOURCE, path)
        if self.variant == "classify":
            there = [CLASSES[code] for code in np.unique(codes).tolist()]
            return published.presence("pastis-crops", there, CROPS, SIDE_M, SOURCE)
        hidden = [c for c, shown in ((BACKGROUND, self.background), (VOID, self.void)) if not shown]
        return published.without(full, hidden)


@cache
def theia() -> Sensor:
    """Sentinel-2 as the Theia processor delivers it: -10000 is no data, 0 a value, and so are other negative numbers."""
    table = sensors.get("sentinel-2-l2a").select(published.S2_BANDS)
    return replace(table, bands=tuple(replace(band, nodata=NODATA) for band in table.bands))


@cache
def sentinel1(ratio: str = "stored") -> Sensor:
    """VV, VH and the third channel: as stored, VV less VH in dB; or their quotient, as the sensor's table has it."""
    table = published.sentinel1("VV", "VH", "ratio")
    if ratio == "quotient":
        return table
    stored = replace(table["ratio"], description="VV less VH in dB: the ratio of the two powers on a logarithmic scale")
    return replace(table, bands=(*table.bands[:2], stored))


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    fold: int | Sequence[int] | None = None,
    modalities: Sequence[str] | None = None,
    ratio: str = "stored",
    background: bool = True,
    void: bool = False,
    dates: int | None = None,
    protocol: str = "",
) -> Pastis:
    """PASTIS-R or PASTIS-HD with crop types per pixel, or with ``"classify"`` the presence of the 18 crops in each place.

    Args:
        root: the folder that holds ``metadata.geojson``.
        split: ``train`` (official folds 1-3), ``val`` (4) or ``test`` (5).
        fold: these folds instead, for cross-validation.
        modalities: of ``spot``, ``s2``, ``s1-asc``, ``s1-des`` (all by default), and ``s1``, the name of the ascending series in
            AnySat. A set without SPOT (PASTIS-R) needs this list.
        ratio: the band ``ratio`` of Sentinel-1: ``stored``, VV less VH in dB, which published models of this dataset take; or
            ``quotient``, VV/VH of the numbers in dB, which AnySat computes for its other datasets.
        background: whether class 0 is a class; otherwise these pixels are not labelled.
        void: whether 19, parcels mostly outside the place or of other crops, is a class; officially it is not.
        dates: so many of each series, evenly spaced from the first to the last; all by default.
        protocol: ``pangaea``: unless told otherwise, ``s2`` and ``s1-asc`` at six dates.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, VARIANTS, "variant")
    published.one_of(split, SPLITS, "split")
    published.one_of(ratio, ("stored", "quotient"), "ratio")
    pangaea = published.one_of(protocol, ("", "pangaea"), "protocol") == "pangaea"
    dates = PANGAEA_DATES if pangaea and dates is None else dates
    if dates is not None and dates < 2:
        raise ValueError(f"dates={dates} must be 2 or more: how many of each series are read")
    default = ("s2", "s1-asc") if pangaea else ("spot", "s2", "s1-asc", "s1-des")
    layers = published.layers_of(modalities, LAYERS[:-1], default)
    base = published.folder(root, "PASTIS", ("metadata.geojson", "ANNOTATIONS"), SOURCE)
    wanted = FOLDS[split] if fold is None else (fold,) if isinstance(fold, int) else tuple(fold)
    every = _patches(base / "metadata.geojson", {SERIES[name][2] for name in layers if name in SERIES})
    chosen = tuple(patch for patch in every if patch.fold in wanted)
    if not chosen:
        raise ValueError(
            f"{base / 'metadata.geojson'}: no place is in folds {wanted}; there are {sorted({p.fold for p in every})}"
        )
    return Pastis(base, variant, chosen, layers, ratio, background, void, dates)


def _patches(path: Path, keys: set[str]) -> list[Patch]:
    """Places by number, with the days of the series named by ``keys``."""
    content = arrays.parsed(path)
    crs = str((content.get("crs") or {}).get("properties", {}).get("name", "EPSG:2154"))
    found = []
    for feature in content["features"]:
        facts = feature["properties"]
        lacking = {"ID_PATCH", "Fold", *keys} - set(facts)
        if lacking:
            raise ValueError(
                f"{path}: a place lacks {', '.join(sorted(lacking))}; PASTIS without the R has no Sentinel-1"
            )
        place = _place(feature.get("geometry"), crs, str(facts.get("TILE", "")))
        days = tuple((key, _days(facts[key])) for key in sorted(keys))
        found.append(Patch(str(facts["ID_PATCH"]), int(facts["Fold"]), place, days))
    return sorted(found, key=lambda patch: int(patch.number))


def _days(listed: Any) -> tuple[int, ...]:
    """Days in the order of their indices, from ``{"0": 20180924, ...}``, which some copies hold as a string."""
    table = json.loads(listed.replace("'", '"')) if isinstance(listed, str) else listed
    return tuple(int(table[index]) for index in sorted(table, key=int))


def _place(geometry: Any, crs: str, tile: str) -> Place:
    """The ground of a place: its grid, in the UTM zone of its Sentinel-2 tile, where the outline is that square; its centre."""
    if not geometry:
        return Place(SIDE_M, SIDE_M)
    zone = tile.upper().lstrip("T")[:2]
    geobox, lonlat = footprint.square(
        geometry, crs, f"EPSG:326{zone}" if zone.isdigit() else None, SIDE_M, SIDE_M / SIDE_PX
    )
    return Place(SIDE_M, SIDE_M, geobox, lonlat)


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the published layout (noise, no measurement), folds 1, 4 and 5 first."""
    rng = np.random.default_rng(seed)
    features = []
    for i in range(max(places, len(SPLITS))):
        number = 10000 + 37 * i
        facts: dict[str, Any] = {"Fold": (1, 4, 5, 2, 3)[i % 5], "TILE": "t31tfm"}
        for prefix, key, count in (("S2", "dates-S2", 5), ("S1A", "dates-S1A", 4), ("S1D", "dates-S1D", 3)):
            days = np.sort(rng.choice(np.arange(28), count, replace=False)) + 20181001
            facts[key] = {str(n): int(day) for n, day in enumerate(days)}
            arrays.write_npy(folder / f"DATA_{prefix}" / f"{prefix}_{number}.npy", _fake_series(rng, prefix, count))
        target = np.stack([np.kron(rng.integers(0, 20, (8, 8)), np.ones((16, 16))) for _ in range(3)])
        arrays.write_npy(folder / "ANNOTATIONS" / f"TARGET_{number}.npy", target.astype(np.uint8))
        spot = rng.integers(0, 256, (3, 1280, 1280)).astype(np.uint8)
        arrays.write_tiff(folder / SPOT.format(number), spot)
        outline = footprint.outline((640000.0 + 1280 * i, 5110000.0), SIDE_M, "EPSG:32631", "EPSG:2154")
        facts |= {"ID_PATCH": number, "N_Parcel": 64, "Parcel_Cover": 0.5}
        features.append({"type": "Feature", "id": str(number), "properties": facts, "geometry": outline})
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}}
    arrays.write_json(folder / "metadata.geojson", {"type": "FeatureCollection", "crs": crs, "features": features})


def _fake_series(rng: np.random.Generator, prefix: str, count: int) -> np.ndarray:
    shape = (count, 1, SIDE_PX, SIDE_PX)
    if prefix == "S2":
        numbers = rng.integers(-200, 9000, (count, 10, SIDE_PX, SIDE_PX)).astype(np.int16)
        numbers[0, :, :4] = NODATA
        return numbers
    vv, vh = rng.normal(-11, 2, shape), rng.normal(-17, 2, shape)
    numbers = np.concatenate([vv, vh, vv - vh], 1).astype(np.float16)
    numbers[0, :, 0, 0] = -np.inf
    return numbers
