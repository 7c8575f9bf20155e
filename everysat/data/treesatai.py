"""TreeSatAI and TreeSatAI Time Series: tree genera of 60 m forest plots in Lower Saxony, Germany; multi-label.

50 381 places. Ahlswede et al. 2023 (Earth System Science Data 15, 681-695) published aerial photographs of 0.2 m, one Sentinel-1
and one Sentinel-2 image and the area share of 15 genera; Astruc et al. 2024 (OmniSat, ECCV) added a year of Sentinel-1 and 2.

Layout, under ``root`` (lists and labels may also lie in the folders of their archives, ``split`` and ``labels``)::

    train_filenames.lst  val_filenames.lst  test_filenames.lst        one TIFF name a line
    labels/TreeSatBA_v9_60m_multi_labels.json                         {name.tif: [[genus, share of the area], ...]}
    aerial/<name>.tif                                                 uint8 [4, 304, 304]: NIR, R, G, B
    sentinel-ts/<name>_<year>.h5  (or sentinel/, or <name>.h5)        sen-1-asc|des-data, sen-2-data, -masks, -products
    s1/60m/<name>.tif  s2/60m/<name>.tif                              the single images, variant "mono"

In place of list and labels, ``<part>.csv`` with the columns aerial_name, sen_name and one share per genus is read too.

Against the published loaders: dates and data are read together (those drop dates without data from one and not from the other);
NaN is invalid, not the mean of its date; the aerial crop is the centre, not drawn at random; nothing is preprocessed on disk.
The Sentinel-1 series hold linear power, although the statistics published for AnySat are of neither linear power nor dB.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everysat import sensors
from everysat.data import published
from everysat.io import arrays, grid
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-4.0"
SOURCE = (
    "https://huggingface.co/datasets/IGNF/TreeSatAI-Time-Series (series), doi:10.5281/zenodo.6780578 (single images)"
)
SPLITS = ("train", "val", "test")
LAYERS = ("aerial", "s2", "s1-asc", "s1-des", "s1", "label")
GENERA = (
    "Abies", "Acer", "Alnus", "Betula", "Cleared", "Fagus", "Fraxinus", "Larix", "Picea", "Pinus", "Populus", "Prunus",
    "Pseudotsuga", "Quercus", "Tilia",
)  # fmt: skip
DEFAULT = {"": ("aerial", "s2", "s1-asc", "s1-des"), "mono": ("aerial", "s2-mono", "s1-mono")}
KNOWN = {"": LAYERS[:-1], "mono": DEFAULT["mono"]}
MONO_BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
LABELS = "TreeSatBA_v9_60m_multi_labels.json"
AERIAL_PX, CENTRE_PX, AERIAL_GSD_M = 304, 300, 0.2
YEARS = range(2017, 2023)
LEAST_POWER = 1e-5  # -50 dB, the least plausible value in the sensor's table
Shares = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TreeSatAI:
    """See :func:`build`. ``names`` are the TIFF names, ``series`` the HDF5 names where a list gives them, ``shares`` the area
    of each genus in each place."""

    root: Path
    variant: str
    names: tuple[str, ...]
    series: tuple[str, ...]
    shares: tuple[Shares, ...]
    layers: tuple[str, ...]
    crop: str
    clouds: float | None
    s1_unit: str
    min_share: float

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        side_m = (CENTRE_PX if self.crop == "centre" else AERIAL_PX) * AERIAL_GSD_M
        place, layers = Place(side_m, side_m), {}
        if "aerial" in self.layers:
            place, layers["aerial"] = self._aerial(index)
        if dated := [name for name in self.layers if name in ("s2", "s1-asc", "s1-des", "s1")]:
            layers |= self._series(index, dated)
        for name in ("s2-mono", "s1-mono"):
            if name in self.layers:
                layers[name] = self._single(index, name)
        genera = [genus for genus, share in self.shares[index] if share > self.min_share]
        layers["label"] = published.presence("treesatai-genera", genera, GENERA, side_m, SOURCE)
        return Batch((place,), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _aerial(self, index: int) -> tuple[Place, Raster]:
        path = self.root / "aerial" / self.names[index]
        numbers, geobox = arrays.tiff(path)
        if numbers.shape[1:] != (AERIAL_PX, AERIAL_PX):
            raise ValueError(f"{path} has {numbers.shape[1:]} pixels, expected {AERIAL_PX} x {AERIAL_PX}")
        side = slice(0, AERIAL_PX)
        if self.crop == "centre":
            margin = (AERIAL_PX - CENTRE_PX) // 2
            side = slice(margin, margin + CENTRE_PX)
        raster = published.image(sensors.get("treesatai-aerial"), numbers[:, side, side], path, AERIAL_GSD_M)
        extent = (side.stop - side.start) * AERIAL_GSD_M
        return Place(extent, extent) if geobox is None else grid.place_of(grid.crop(geobox, side, side)), raster

    def _series(self, index: int, wanted: Sequence[str]) -> dict[str, Raster]:
        path = self._hdf5(index)
        orbits = {"s1-asc": ("asc",), "s1-des": ("des",), "s1": ("asc", "des")}
        parts = {f"sen-1-{orbit}" for name in wanted for orbit in orbits.get(name, ())}
        parts |= {"sen-2"} if "s2" in wanted else set()
        keys = [f"{part}-{what}" for part in sorted(parts) for what in ("data", "products")]
        held = arrays.hdf5(path, [*keys, *(["sen-2-masks"] if "s2" in wanted and self.clouds is not None else [])])
        found = {
            name: self._s2(held, path) if name == "s2" else self._s1(held, name, orbits[name], path) for name in wanted
        }
        return {name: raster for name, raster in found.items() if len(raster.row)}

    def _s2(self, held: Mapping[str, np.ndarray], path: Path) -> Raster:
        time_s = published.days(published.stamps_in(held["sen-2-products"], 2, path), path)
        sensor = sensors.get("sentinel-2-l2a").select(published.S2_BANDS)
        raster = published.series(sensor, held["sen-2-data"], time_s, path)
        if self.clouds is not None:
            raster = published.clear(raster, held["sen-2-masks"], self.clouds, path)
        return _seen(raster)

    def _s1(self, held: Mapping[str, np.ndarray], name: str, orbits: Sequence[str], path: Path) -> Raster:
        power = np.concatenate([held[f"sen-1-{orbit}-data"] for orbit in orbits])
        stamps = [s for orbit in orbits for s in published.stamps_in(held[f"sen-1-{orbit}-products"], 4, path)]
        if power.ndim != 4 or power.shape[1] != 2:
            raise ValueError(f"{path} holds Sentinel-1 data of shape {power.shape}, expected [date, VV and VH, y, x]")
        if np.nanmin(power, initial=0.0) < 0:
            raise ValueError(
                f"{path} holds negative Sentinel-1 values down to {np.nanmin(power):.3g}; the published files hold linear power"
            )
        # Some pixels at edges of swaths hold 0 or powers like 1e-12, far below the noise of the instrument, where VV/VH explodes.
        values = np.where(power >= LEAST_POWER, power, np.nan)
        bands = ("VV", "VH") if name != "s1" else ("VV", "VH", "ratio")
        if name == "s1":
            values = np.concatenate([values, values[:, :1] / values[:, 1:]], 1)
        if self.s1_unit == "dB":
            values[:, :2] = 10 * np.log10(values[:, :2])
        sensor = published.sentinel1(*bands, unit=self.s1_unit)
        return _seen(published.series(sensor, values, published.days(stamps, path), path))

    def _single(self, index: int, name: str) -> Raster:
        path = self.root / name.removesuffix("-mono") / "60m" / self.names[index]
        s2 = sensors.get("sentinel-2-l2a").select(MONO_BANDS)
        sensor = s2 if name == "s2-mono" else published.sentinel1("VV", "VH", "ratio")
        return published.image(sensor, arrays.tiff(path)[0], path, 10.0)

    def _hdf5(self, index: int) -> Path:
        stem = self.names[index].removesuffix(".tif")
        folders = [self.root / name for name in ("sentinel-ts", "sentinel") if (self.root / name).is_dir()]
        if self.series[index]:
            return arrays.present((folders or [self.root / "sentinel-ts"])[0] / self.series[index])
        ends = ("", *(f"_{year}" for year in YEARS))
        found = [f for d in folders for end in ends if (f := d / f"{stem}{end}.h5").is_file()]
        if len(found) != 1:
            what = "is missing" if not found else f"is ambiguous ({', '.join(f.name for f in found)})"
            raise FileNotFoundError(
                f"{(folders or [self.root / 'sentinel-ts'])[0] / stem}_<year>.h5 {what}: the dataset is incomplete, or mixes "
                "archives. Fetch this file again"
            )
        return found[0]


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    crop: str = "centre",
    clouds: float | None = None,
    s1_unit: str = "dB",
    min_share: float = 0.07,
) -> TreeSatAI:
    """TreeSatAI Time Series (``""`` or ``"ts"``) or the single images of TreeSatAI (``"mono"``).

    Args:
        root: the folder that holds the dataset.
        split: ``train``, ``val`` or ``test``. The archive of the single images lists no ``val``: that of the series does.
        modalities: of ``aerial``, ``s2``, ``s1-asc``, ``s1-des`` (VV, VH) and ``s1`` (both orbits, with VV/VH; on request alone);
            with ``mono`` of ``aerial``, ``s2-mono`` (12 bands) and ``s1-mono`` (VV, VH in dB, VV/VH of these).
        crop: ``centre`` (the 60 m of the Sentinel pixels) or ``whole`` (60.8 m) aerial photograph.
        clouds: leave out Sentinel-2 pixels whose probability of snow or cloud exceeds this, 0-1; None keeps them.
        s1_unit: ``dB``, or ``linear`` as in the files and as the published models were given. VV/VH is of the linear values.
        min_share: genera that cover more than this share of the area are labels; 0.07 is the published choice.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    variant = published.one_of("" if variant == "ts" else variant, DEFAULT, "variant")
    published.one_of(split, SPLITS, "split")
    published.one_of(crop, ("centre", "whole"), "crop")
    published.one_of(s1_unit, ("dB", "linear"), "s1_unit")
    layers = published.layers_of(modalities, KNOWN[variant], DEFAULT[variant])
    base = published.folder(root, "TreeSatAI", (), SOURCE)
    names, files, shares = _listed(base, split)
    return TreeSatAI(base, variant, names, files, shares, layers, crop, clouds, s1_unit, min_share)


def _listed(root: Path, split: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Shares, ...]]:
    """Names, HDF5 names and shares of the places of a part, from the official list and labels or from a table."""
    listing = f"{split}_filenames.lst"
    path = next((p for p in (root / listing, root / "split" / listing) if p.is_file()), None)
    if path is None and (root / f"{split}.csv").is_file():
        return _table(root / f"{split}.csv")
    if path is None:
        raise published.absent(root, listing, "TreeSatAI", SOURCE)
    names = tuple(arrays.lines(path))
    labels = next((p for p in (root / "labels" / LABELS, root / LABELS) if p.is_file()), root / "labels" / LABELS)
    known = arrays.parsed(labels)
    for name in names:
        if name not in known:
            raise ValueError(f"{labels} has no entry for {name}, which {path} lists")
    shares = tuple(tuple((str(genus), float(share)) for genus, share in known[name]) for name in names)
    for genus in {genus for place in shares for genus, _ in place}:
        if genus not in GENERA:
            raise ValueError(f"{labels} names the genus {genus!r}; expected one of {', '.join(GENERA)}")
    return names, ("",) * len(names), shares


def _table(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Shares, ...]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    lacking = [column for column in ("aerial_name", "sen_name", *GENERA) if rows and column not in rows[0]]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}")
    shares = tuple(tuple((genus, float(row[genus])) for genus in GENERA) for row in rows)
    return tuple(r["aerial_name"] for r in rows), tuple(r["sen_name"] for r in rows), shares


def _seen(raster: Raster) -> Raster:
    """Without the dates on which nothing is valid."""
    return raster.obs(raster.valid.flatten(1).any(1))


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the published layout (noise, no measurement): TIFF, HDF5, lists and labels; also the single images."""
    rng = np.random.default_rng(seed)
    names = [f"{GENERA[i % len(GENERA)]}_spec._{i}_{1000 + i}_WEFL_NLF.tif" for i in range(max(places, len(SPLITS)))]
    for number, split in enumerate(SPLITS):
        part = names[number :: len(SPLITS)]
        arrays.write_text(folder / f"{split}_filenames.lst", "".join(f"{name}\n" for name in part))
    labels = {n: [[n.split("_")[0], 0.6 + 0.03 * i % 0.3], ["Tilia", 0.05]] for i, n in enumerate(names)}
    arrays.write_json(folder / "labels" / LABELS, labels)
    for i, name in enumerate(names):
        corner = (565642.6 + 1000 * i, 5770980.4)
        photo = rng.integers(0, 256, (4, AERIAL_PX, AERIAL_PX)).astype(np.uint8)
        arrays.write_tiff(folder / "aerial" / name, photo, crs="EPSG:25832", corner=corner, gsd_m=AERIAL_GSD_M)
        s2 = rng.integers(100, 6000, (12, 6, 6)).astype(np.uint16)
        arrays.write_tiff(folder / "s2" / "60m" / name, s2, crs="EPSG:32632", corner=corner, gsd_m=10.0)
        vv, vh = -9 + rng.normal(size=(6, 6)), -15 + rng.normal(size=(6, 6))
        s1 = np.stack([vv, vh, vv / vh]).astype(np.float32)
        arrays.write_tiff(folder / "s1" / "60m" / name, s1, crs="EPSG:32632", corner=corner, gsd_m=10.0)
        year = YEARS[i % 4]
        arrays.write_hdf5(folder / "sentinel-ts" / f"{name.removesuffix('.tif')}_{year}.h5", _fake_series(rng, year))


def _fake_series(rng: np.random.Generator, year: int) -> dict[str, Any]:
    """The nine datasets of a file; the first ascending date is empty and one descending pixel is."""
    held: dict[str, Any] = {}
    for orbit, count in (("asc", 4), ("des", 6)):
        power = rng.gamma(4.0, 0.02, (count, 2, 6, 6)).astype(np.float32)
        stamps = [f"{year}{month:02d}{day:02d}T170841" for month, day in _fake_days(rng, count)]
        held[f"sen-1-{orbit}-data"] = power
        held[f"sen-1-{orbit}-products"] = [f"S1A_IW_GRDH_1SDV_{t}_{t}_030639_0382D5_360A" for t in stamps]
    held["sen-1-asc-data"][0] = np.nan
    held["sen-1-des-data"][0, 0, 0, 0] = 0.0
    stamps = [f"{year}{month:02d}{day:02d}T102421" for month, day in _fake_days(rng, 5)]
    held["sen-2-data"] = rng.integers(100, 12000, (5, 10, 6, 6)).astype(np.float32)
    held["sen-2-masks"] = rng.choice([0.0, 30.0, 100.0], (5, 2, 6, 6)).astype(np.float32)
    held["sen-2-products"] = [f"S2A_MSIL2A_{t}_N0213_R065_T32UNC_{t}" for t in stamps]
    return held


def _fake_days(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return sorted((int(m), int(d)) for m, d in zip(rng.integers(1, 13, count), rng.integers(1, 29, count), strict=True))
