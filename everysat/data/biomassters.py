"""BioMassters: biomass of 11 462 places of 2.6 km in Finnish forests, from twelve months of Sentinel-1 and Sentinel-2.

Nascetti et al. 2023 (NeurIPS Datasets and Benchmarks, https://nascetti-a.github.io/BioMasster). The target is above-ground biomass in t/ha from airborne
laser scans. Where a place lies is not published, nor the year (2016-2021): ``year`` is a name for it.

Layout, under ``root``; months count from 00, September, to 11, August::

    biomassters_features_metadata.csv                filename, chip_id, satellite, split (train or test), month, ..., corresponding_agbm
    {train,val,test}_Data_list.csv                   chip_id; lists of PANGAEA, which hold where they are there
    {train,test}_features/<chip>_S1_<month>.tif      VV, VH ascending, VV, VH descending in dB, -9999 where there is none
    {train,test}_features/<chip>_S2_<month>.tif      ten bands, uint16, and the probability of cloud; not every month
    {train,test}_agbm/<chip>_agbm.tif                float32; that of the test was not in the first archive, whose test has no label

PANGAEA evaluates on these lists with all twelve months. Without lists ``val`` is a tenth of ``train``. Against the published loaders: orbits are layers of their own, and months without an image are left out and
not 0; identifiers stay text (some consist of digits); a month is a month, not a day; a target that is not a number is not labelled, instead of 0.

Order of bands, no-data and units are those of the real samples of GEO-Bench-2, names of files and tables those that several readers agree on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays, dates
from everysat.nn.draws import stream
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-4.0"
SOURCE = "https://huggingface.co/datasets/nascetti-a/BioMassters"
SPLITS = ("train", "val", "test")
LAYERS = ("s2", "s1-asc", "s1-des", "label")
TABLES = ("biomassters_features_metadata.csv", "features_metadata.csv", "The_BioMassters_-_features_metadata.csv.csv")
MONTHS = (
    "September",
    "October",
    "November",
    "December",
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
)
ORBITS = {"s1-asc": (0, "sentinel-1-asc"), "s1-des": (2, "sentinel-1-desc")}
"""First band in the file, and sensor, of each orbit."""
BIOMASS = Sensor(
    "biomassters-agb", "terrain", (Band("agb", 10.0, "t ha-1", description="above-ground biomass"),), SOURCE
)
GSD_M, NO_DATA, VAL_SHARE = 10.0, -9999.0, 0.1
_FILE = re.compile(r"^(?P<chip>.+)_(?P<satellite>S[12])_(?P<month>\d{2})\.tif$")


@dataclass(frozen=True)
class BioMassters:
    """See :func:`build`. ``chips`` are identifiers with the months of Sentinel-1 and of Sentinel-2 that there are."""

    root: Path
    split: str
    chips: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    layers: tuple[str, ...]
    labelled: bool
    max_cloud: float | None
    year: int
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.chips)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        chip, radar, optical = self.chips[index]
        layers: dict[str, Raster] = {}
        if "s2" in self.layers and optical:
            layers["s2"] = self._s2(chip, optical)
        orbits = [name for name in self.layers if name in ORBITS]
        if orbits and radar:
            numbers, path = self._stack(chip, "S1", radar, 4)
            layers |= {name: self._s1(name, numbers, radar, path) for name in orbits}
        layers = {name: raster.obs(raster.valid.flatten(1).any(1)) for name, raster in layers.items()}
        layers = {name: raster for name, raster in layers.items() if len(raster.row)}
        if not layers:
            raise ValueError(f"{self._features} has no image of the place {chip}. Fetch its files again")
        sides = {tuple(raster.values.shape[2:]) for raster in layers.values()}
        if self.labelled:
            path = self.root / f"{self._part}_agbm" / f"{chip}_agbm.tif"
            target, _ = arrays.tiff(path)
            layers["label"] = Raster.of(BIOMASS, torch.from_numpy(target.astype(np.float32))[None], GSD_M)
            sides.add(target.shape[1:])
        if len(sides) > 1:
            raise ValueError(f"images of the place {chip} in {self._features} differ in size: {sorted(sides)}")
        height, width = sides.pop()
        return Batch((Place(height * GSD_M, width * GSD_M),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def _part(self) -> str:
        return "test" if self.split == "test" else "train"

    @property
    def _features(self) -> Path:
        return self.root / f"{self._part}_features"

    def _stack(self, chip: str, satellite: str, months: Sequence[int], count: int) -> tuple[np.ndarray, Path]:
        """[month, band, y, x], and a name for all of the files."""
        images: list[np.ndarray] = []
        for month in months:
            path = self._features / f"{chip}_{satellite}_{month:02d}.tif"
            numbers, _ = arrays.tiff(path)
            if len(numbers) != count or numbers.shape != (images or [numbers])[0].shape:
                raise ValueError(
                    f"{path} holds {numbers.shape}, expected {count} bands in the size of the other months"
                )
            images.append(numbers)
        return np.stack(images), self._features / f"{chip}_{satellite}_*.tif"

    def _times(self, months: Sequence[int]) -> torch.Tensor:
        """Month 0 is the September before ``year``."""
        spans = [dates.span(f"{self.year - (month < 4)}-{(month + 8) % 12 + 1:02d}") for month in months]
        return torch.tensor(spans, dtype=torch.float64)

    def _s2(self, chip: str, months: Sequence[int]) -> Raster:
        numbers, path = self._stack(chip, "S2", months, len(published.S2_BANDS) + 1)
        sensor, seen = sensors.get("sentinel-2-l2a").select(published.S2_BANDS), None
        if self.max_cloud is not None:
            clear = torch.from_numpy(numbers[:, -1:] <= self.max_cloud)
            seen = clear.expand(-1, len(sensor.bands), -1, -1)
        raster = bands.series(sensor, numbers[:, :-1], self._times(months), path, GSD_M, seen=seen)
        return bands.presented("s2", raster, self.present_as, published.S2_BANDS)

    def _s1(self, name: str, numbers: np.ndarray, months: Sequence[int], path: Path) -> Raster:
        first, table = ORBITS[name]
        pair = numbers[:, first : first + 2]
        with_ratio = bands.with_ratio(np.where(pair == NO_DATA, np.nan, pair))
        sensor = sensors.get(table).select(("VV", "VH", "ratio"))
        raster = bands.series(sensor, with_ratio, self._times(months), path, GSD_M)
        if self.present_as and name in self.present_as:
            return bands.presented(name, raster, self.present_as, sensor.names)
        return raster.select(("VV", "VH"))


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    max_cloud: float | None = None,
    year: int = 2020,
    seed: int = 23,
    present_as: Mapping[str, str] | None = None,
) -> BioMassters:
    """Places of BioMassters; ``label`` is biomass in t/ha, for :mod:`everysat.tasks.regress`.

    Args:
        root: the folder that holds the table or the lists, ``train_features``, ``train_agbm`` and so on.
        modalities: of ``s2`` (ten bands), ``s1-asc`` and ``s1-des`` (VV, VH); all by default. Months without data are left out.
        max_cloud: pixels whose probability of cloud is higher, in percent, are invalid.
        year: that of the last month, August; it is not published.
        seed: of the tenth of the training places that is ``val``, where there are no lists.
        present_as: ``{"s1-asc": "sentinel-1-grd", "s1-des": "sentinel-1-grd"}`` gives VV, VH and VV/VH under that name, as AnySat
            takes them.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    layers = published.layers_of(modalities, LAYERS[:-1], LAYERS[:-1])
    shown = bands.presentable(present_as, LAYERS[:-1])
    part = "test" if split == "test" else "train"
    base = published.folder(root, "BioMassters", (f"{part}_features",), SOURCE)
    labelled = split != "test" or (base / "test_agbm").is_dir()
    table = next((base / name for name in TABLES if (base / name).is_file()), None)
    lists = base / f"{split}_Data_list.csv"
    if table is None and not lists.is_file():
        raise published.absent(base, f"{TABLES[0]} or {lists.name}", "BioMassters", SOURCE)
    months = _listed(table, part) if table else _found(base / f"{part}_features")
    if lists.is_file():
        wanted = list(archives.table(lists, ("chip_id",), dtype=str)["chip_id"])
        if lost := [chip for chip in wanted if chip not in months]:
            raise FileNotFoundError(
                f"{base / part}_features has no image of {lost[0]}, which {lists.name} lists. Fetch it again"
            )
    else:
        wanted = [chip for chip in sorted(months) if split == "test" or _in_val(chip, seed) == (split == "val")]
    chips = tuple((chip, *(tuple(sorted(months[chip][s])) for s in ("S1", "S2"))) for chip in wanted)
    if not chips:
        raise ValueError(f"{table or lists} lists no places for split={split!r}")
    return BioMassters(base, split, chips, layers, labelled, max_cloud, year, shown)


Months = dict[str, dict[str, set[int]]]


def _listed(table: Path, part: str) -> Months:
    """Months of each satellite by chip, from the table."""
    frame = archives.table(table, ("filename", "split"), dtype=str)
    return _by_chip(frame[frame["split"] == part]["filename"], table)


def _found(folder: Path) -> Months:
    return _by_chip((path.name for path in sorted(folder.glob("*_S[12]_*.tif"))), folder)


def _by_chip(names: Sequence[str] | pd.Series, where: Path) -> Months:
    found: Months = {}
    for name in names:
        match = _FILE.match(name)
        if match is None or int(match["month"]) >= len(MONTHS):
            raise ValueError(f"{where} has the file {name!r}, expected <chip>_S1_00.tif to <chip>_S2_11.tif")
        found.setdefault(match["chip"], {"S1": set(), "S2": set()})[match["satellite"]].add(int(match["month"]))
    return found


def _in_val(chip: str, seed: int) -> bool:
    return bool(stream(seed, "biomassters", chip).random() < VAL_SHARE)


def fake(folder: Path, *, places: int = 2, side_px: int = 16, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split; without December in Sentinel-2."""
    rng = np.random.default_rng(seed)
    names = [f"{number:08d}" for number in range(51_241_000, 51_241_400)]
    held_out = [name for name in names if _in_val(name, 23)][:places]
    others = [name for name in names if not _in_val(name, 23)][: 2 * places]
    lines: list[dict[str, str]] = []
    for i, chip in enumerate([*held_out, *others]):
        part = "train" if i < 2 * places else "test"
        for satellite in ("S1", "S2"):
            for month, label in enumerate(MONTHS):
                if satellite == "S2" and label == "December":
                    continue
                name = f"{chip}_{satellite}_{month:02d}.tif"
                arrays.write_tiff(folder / f"{part}_features" / name, _fake_image(satellite, i, side_px, rng))
                line = {"filename": name, "chip_id": chip, "satellite": satellite, "split": part, "month": label}
                lines.append({**line, "corresponding_agbm": f"{chip}_agbm.tif"})
        biomass = rng.gamma(2.0, 40.0, (1, side_px, side_px)).astype(np.float32)
        arrays.write_tiff(folder / f"{part}_agbm" / f"{chip}_agbm.tif", biomass)
    arrays.write_text(folder / TABLES[0], pd.DataFrame(lines).to_csv(index=False))


def _fake_image(satellite: str, place: int, side: int, rng: np.random.Generator) -> np.ndarray:
    if satellite == "S1":
        radar = rng.normal(size=(4, side, side)) + np.array([-11.0, -18.0, -11.0, -18.0]).reshape(4, 1, 1)
        if place == 0:
            radar[2:] = NO_DATA
        return radar.astype(np.float32)
    optical = rng.integers(50, 5000, (11, side, side))
    optical[10] = rng.integers(0, 101, (side, side))
    return optical.astype(np.uint16)
