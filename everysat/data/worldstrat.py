"""WorldStrat: 3 890 sites of 1.6 km around the world in SPOT 6/7 at 1.5 m, each with 16 revisits of Sentinel-2, and the land use of the site.

Cornebise et al. 2022 (NeurIPS Datasets and Benchmarks, https://arxiv.org/abs/2207.06418). Sites are drawn over classes of land use and density of
settlement, with sites of humanitarian interest and mines.

Layout, under ``root``; the archive at Kaggle has ``hr_dataset/12bit``, Level-2A alone, and 8 revisits::

    metadata.csv                            a line for each site (first column) and n: lowres_date, highres_date, cloud_cover, lon, lat, ...
    stratified_train_val_test_split.csv     tile, IPCC Class, SMOD, source, joint_class, split
    hr_dataset/<site>/<site>_ps.tiff        red, green, blue, near infrared, pan-sharpened to 1.5 m, uint16
    hr_dataset/<site>/<site>_rgbn.tiff      the same four at 6 m; <site>_pan.tiff the panchromatic band at 1.5 m
    lr_dataset/<site>/<level>/<site>-<n>-<level>_data.tiff     L1C: 13 bands, L2A: 12 bands, reflectance in float32, 10 m
    lr_dataset/<site>/<level>/<site>-<n>-CLM.tiff              1 cloud

Sizes differ a little from site to site. SPOT is not georeferenced and covers the same ground; its numbers are kept as they are.

The published split lists 38 sites twice, 11 of them in two parts, and spreads the nine neighbours that make up a site of Amnesty or ASMSpotter over
its parts (54 of 60): 394 of the 3 114 sites of ``train`` touch one of ``val`` or ``test``. These are left out of ``train`` (and what touches
``test`` of ``val``), ``test`` is as published; ``published_split=True`` is the split as it is. The label is the class of the IPCC, which 71 lines lack.

Taken from the published programs and from readers of others, not from the files: the order of bands, the unit of Sentinel-2 (``stored="numbers"`` is for
digital numbers), the code of cloud. A pixel that is 0 in all bands is taken for no data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from affine import Affine

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays, dates
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-NC-4.0 (SPOT, Airbus); CC-BY-4.0 (Sentinel-2, labels)"
SOURCE = "https://zenodo.org/records/6810792 (doi:10.5281/zenodo.6810792)"
SPLITS = ("train", "val", "test")
LAYERS = ("s2", "s2-l1c", "spot", "spot-ms", "spot-pan", "label")
DEFAULT = ("s2", "spot")
SPLIT_FILE = "stratified_train_val_test_split.csv"
LEVELS = {"s2": ("L2A", "sentinel-2-l2a"), "s2-l1c": ("L1C", "sentinel-2-l1c")}
SPOT = {
    "spot": ("ps", ("red", "green", "blue", "nir"), 1.5),
    "spot-ms": ("rgbn", ("red", "green", "blue", "nir"), 6.0),
    "spot-pan": ("pan", ("pan",), 1.5),
}
"""Ending of the file, bands and size of a pixel of each layer of SPOT."""
CLASSES = dict(enumerate(("Agriculture", "Forest", "Grassland", "Other", "Settlement", "Water", "Wetland")))
S2_GSD_M, CLOUD, DEGREE_M = 10.0, 1, 111_195.0
_NEIGHBOUR = re.compile(r"^((?:Amnesty|ASMSpotter).*)-\d+-\d+$")


@dataclass(frozen=True)
class Site:
    """A site: the code of its class, if it has one, the day of SPOT, and number and day of the revisits of Sentinel-2."""

    name: str
    code: int | None
    lonlat: tuple[float, float]
    spot: dates.Span
    revisits: tuple[tuple[int, dates.Span], ...]


@dataclass(frozen=True)
class WorldStrat:
    """See :func:`build`. A site is ``parts`` x ``parts`` places, one after another."""

    root: Path
    split: str
    sites: tuple[Site, ...]
    layers: tuple[str, ...]
    parts: int
    clouds: bool
    allow_missing: bool
    stored: str
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.sites) * self.parts**2

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        number, part = divmod(index, self.parts**2)
        site, corner = self.sites[number], divmod(part, self.parts)
        read = [(name, self._s2(name, site) if name in LEVELS else self._spot(name, site)) for name in self.layers]
        whole = {name: raster for name, raster in read if raster is not None}
        if not whole:
            raise FileNotFoundError(f"{self.root} has no image of the site {site.name}. Fetch its folder again")
        sides = [max(r.values.shape[axis] * r.gsd_m for r in whole.values()) for axis in (2, 3)]
        layers = {name: self._cut(raster, corner) for name, raster in whole.items()}
        height, width = (max(r.values.shape[axis] * r.gsd_m for r in layers.values()) for axis in (2, 3))
        place = Place(height, width, lonlat=self._centre(site, corner, sides))
        layers["label"] = _label(site, max(height, width), self.root / SPLIT_FILE)
        return Batch((place,), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _s2(self, name: str, site: Site) -> Raster | None:
        level, table = LEVELS[name]
        folder, sensor = self.root / "lr_dataset" / site.name / level, sensors.get(table)
        images: list[np.ndarray] = []
        hidden, when = [], []
        for number, span in site.revisits:
            path = folder / f"{site.name}-{number}-{level}_data.tiff"
            if self.allow_missing and not path.is_file():
                continue
            images.append(_read(path, len(sensor.bands), images[0].shape[1:] if images else None))
            when.append(span)
            if not self.clouds:
                hidden.append(_read(folder / f"{site.name}-{number}-CLM.tiff", 1, images[0].shape[1:]) == CLOUD)
        if not images:
            return None
        numbers = np.stack(images)
        seen = np.broadcast_to((numbers != 0).any(1, keepdims=True), numbers.shape)
        if hidden:
            seen = seen & ~np.stack(hidden)
        time_s, source = torch.tensor(when, dtype=torch.float64), folder / f"{site.name}-*-{level}_data.tiff"
        raster = bands.series(
            sensor, numbers, time_s, source, S2_GSD_M, stored=self.stored, seen=torch.from_numpy(seen.copy())
        )
        shown = sensors.get((self.present_as or {}).get(name, table)).names
        return bands.presented(name, raster, self.present_as, [band for band in sensor.names if band in shown])

    def _spot(self, name: str, site: Site) -> Raster | None:
        ending, names, gsd_m = SPOT[name]
        inner = Path("hr_dataset") / "12bit"
        base = self.root / (inner if (self.root / inner).is_dir() else "hr_dataset")
        path = base / site.name / f"{site.name}_{ending}.tiff"
        if self.allow_missing and not path.is_file():
            return None
        numbers = _read(path, len(names))
        seen = torch.from_numpy(np.broadcast_to((numbers != 0).any(0), numbers.shape).copy())[None]
        time_s = torch.tensor([site.spot], dtype=torch.float64)
        return bands.series(sensors.get("spot-6-7").select(names), numbers[None], time_s, path, gsd_m, seen=seen)

    def _cut(self, raster: Raster, corner: tuple[int, int]) -> Raster:
        """The part of a raster, from the pixel whose edge is next to that of the part."""
        if self.parts == 1:
            return raster
        spans = []
        for size, at in zip(raster.values.shape[2:], corner, strict=True):
            first = min(round(size * at / self.parts), size - size // self.parts)
            spans.append(slice(first, first + size // self.parts))
        cut = (..., spans[0], spans[1])
        return replace(raster, values=raster.values[cut].clone(), valid=raster.valid[cut].clone())

    def _centre(self, site: Site, corner: tuple[int, int], sides: Sequence[float]) -> tuple[float, float]:
        south, east = (side * ((at + 0.5) / self.parts - 0.5) for side, at in zip(sides, corner, strict=True))
        lon, lat = site.lonlat
        return lon + east / (DEGREE_M * math.cos(math.radians(lat))), lat - south / DEGREE_M


def _read(path: Path, count: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    numbers, _ = arrays.tiff(path)
    if len(numbers) != count or (shape is not None and numbers.shape[1:] != shape):
        size = "y, x" if shape is None else ", ".join(map(str, shape))
        raise ValueError(f"{path} holds {numbers.shape}, expected [{count} bands, {size}]")
    return numbers


def _label(site: Site, side_m: float, path: Path) -> Raster:
    codes = np.array([[site.code or 0]])
    label = published.class_map("worldstrat-ipcc", codes, CLASSES, side_m, SOURCE, path)
    return label if site.code is not None else replace(label, valid=torch.zeros_like(label.valid))


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    parts: int = 1,
    revisits: int = 16,
    max_cloud: float = 100.0,
    clouds: bool = True,
    published_split: bool = False,
    allow_missing: bool = False,
    stored: str = "physical",
    present_as: Mapping[str, str] | None = None,
) -> WorldStrat:
    """Sites of WorldStrat with the class of the IPCC as ``label`` of the site.

    Args:
        root: the folder that holds the two tables, ``hr_dataset`` and ``lr_dataset``.
        modalities: of ``s2`` (Level-2A), ``s2-l1c``, ``spot`` (pan-sharpened), ``spot-ms`` (6 m) and ``spot-pan``; by default
            ``s2`` and ``spot``.
        parts: a site is cut into this many rows and columns of places; RAMEN takes 4, of 263 pixels of SPOT. The whole site is
            read for each of them.
        revisits: the first of the 16 that are read; 8 for the archive at Kaggle.
        max_cloud: revisits whose scene has more cloud than this are left out, percent.
        clouds: without, pixels that the cloud mask hides are invalid.
        published_split: the split as it is, with sites that stand in two parts or touch those of another.
        allow_missing: sites and images that are not there are left out; else they are an error.
        stored: ``"physical"`` where Sentinel-2 is in reflectance, as published, ``"numbers"`` for digital numbers.
        present_as: ``{"s2-l1c": "sentinel-2-l2a"}`` gives Level-1C under that name, for models that do not tell them apart.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    published.one_of(stored, bands.STORED, "stored")
    layers = published.layers_of(modalities, LAYERS[:-1], DEFAULT)
    shown = bands.presentable(present_as, tuple(LEVELS))
    if not 1 <= parts <= 16:
        raise ValueError(f"parts={parts} must be 1 to 16: into how many rows and columns a site is cut")
    needed = {"lr_dataset" if name in LEVELS else "hr_dataset" for name in layers}
    base = published.folder(root, "WorldStrat", ("metadata.csv", SPLIT_FILE, *sorted(needed)), SOURCE)
    listed = archives.table(base / SPLIT_FILE, ("tile", "IPCC Class", "split"))
    chosen = _chosen(listed, split, published_split)
    if allow_missing:
        chosen = chosen[
            [any((base / n / s).is_dir() or (base / n / "12bit" / s).is_dir() for n in needed) for s in chosen["tile"]]
        ]
    sites = tuple(_sites(base / "metadata.csv", chosen, revisits, max_cloud))
    if not sites:
        raise ValueError(f"{base / SPLIT_FILE} lists no sites of {split!r} that are there")
    return WorldStrat(base, split, sites, layers, parts, clouds, allow_missing, stored, shown)


def _chosen(listed: pd.DataFrame, split: str, as_published: bool) -> pd.DataFrame:
    """The lines of a part of the split, each site once; without the sites that touch a part that is nearer to the test."""
    own = listed[listed["split"] == split].drop_duplicates("tile")
    if as_published:
        return own
    nearer = listed[listed["split"].isin(SPLITS[SPLITS.index(split) + 1 :])]
    held_out = {_ground(name) for name in nearer["tile"]}
    return own[[_ground(name) not in held_out for name in own["tile"]]]


def _ground(name: str) -> str:
    """The name that neighbouring sites share."""
    match = _NEIGHBOUR.match(name)
    return match[1] if match else name


def _sites(path: Path, chosen: pd.DataFrame, revisits: int, max_cloud: float) -> Iterator[Site]:
    table = archives.table(path, ("n", "lowres_date", "highres_date", "cloud_cover", "lon", "lat"))
    lines = dict(list(table.groupby("tile" if "tile" in table.columns else table.columns[0])))
    codes = {name: code for code, name in CLASSES.items()}
    for name, kind in zip(chosen["tile"], chosen["IPCC Class"], strict=True):
        if name not in lines:
            raise ValueError(f"{path} has no line of the site {name!r}, which {SPLIT_FILE} lists. Fetch both again")
        if not pd.isna(kind) and kind not in codes:
            raise ValueError(
                f"{path.with_name(SPLIT_FILE)}: {name!r} is of the class {kind!r}, expected {', '.join(codes)}"
            )
        own = lines[name].drop_duplicates("n").sort_values("n")
        own = own[(own["n"] <= revisits) & ~(own["cloud_cover"] > max_cloud)]
        first = lines[name].iloc[0]
        seen = tuple((int(n), _day(day, path, name)) for n, day in zip(own["n"], own["lowres_date"], strict=True))
        code = None if pd.isna(kind) else codes[kind]
        yield Site(
            name, code, (float(first["lon"]), float(first["lat"])), _day(first["highres_date"], path, name), seen
        )


def _day(value: Any, path: Path, name: str) -> dates.Span:
    try:
        return dates.span(str(value)[:10])
    except ValueError as error:
        raise ValueError(f"{path}, {name}: {error}") from error


def fake(folder: Path, *, side_m: float = 120.0, revisits: int = 2, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): seven sites, two of which touch one of another part."""
    rng = np.random.default_rng(seed)
    split = {
        "Landcover-773616": "train", "ASMSpotter-1-1-1": "train", "ASMSpotter-2-1-1": "train", "UNHCR-GHAs003590": "val",
        "Landcover-743-0": "val", "Landcover-771433": "test", "ASMSpotter-1-1-2": "test",
    }  # fmt: skip
    lines, listed = [], []
    for i, (name, part) in enumerate(split.items()):
        lon, lat = rng.uniform(-60, 60), rng.uniform(-40, 50)
        _fake_site(folder, name, side_m, revisits, (lon, lat), rng)
        for n in range(1, revisits + 1):
            day = f"20{18 + i % 3}-{1 + (5 * n) % 12:02d}-{10 + i:02d}"
            near = {"lowres_date": day, "highres_date": f"2019-05-{10 + i}", "cloud_cover": 20.0 * (n % 3)}
            lines.append({"": name, "n": n, "lon": lon, "lat": lat, **near})
        kind = CLASSES[i % len(CLASSES)]
        listed.append(
            {"": i, "tile": name, "IPCC Class": kind, "SMOD": 11, "source": name.split("-")[0], "split": part}
        )
    listed.append({**listed[0], "split": "train"})
    arrays.write_text(folder / "metadata.csv", pd.DataFrame(lines).to_csv(index=False))
    arrays.write_text(folder / SPLIT_FILE, pd.DataFrame(listed).to_csv(index=False))


def _fake_site(
    folder: Path, name: str, side_m: float, revisits: int, lonlat: tuple[float, float], rng: np.random.Generator
) -> None:
    for ending, names, gsd_m in SPOT.values():
        side = round(side_m / gsd_m)
        numbers = rng.integers(100, 4000, (len(names), side, side)).astype(np.uint16)
        arrays.write_tiff(folder / "hr_dataset" / name / f"{name}_{ending}.tiff", numbers)
    side = round(side_m / S2_GSD_M)
    transform = Affine(9.55e-5, 0, lonlat[0], 0, -9.1e-5, lonlat[1])
    for level, table in LEVELS.values():
        at, sensor = folder / "lr_dataset" / name / level, sensors.get(table)
        for n in range(1, revisits + 1):
            optical = rng.uniform(0.01, 0.6, (len(sensor.bands), side, side)).astype(np.float32)
            optical[:, :1] = 0
            mask = (rng.random((1, side, side)) < 0.2).astype(np.float32)
            archives.write_grid(at / f"{name}-{n}-{level}_data.tiff", optical, "EPSG:4326", transform)
            archives.write_grid(at / f"{name}-{n}-CLM.tiff", mask, "EPSG:4326", transform)
