"""TimeSen2Crop: 16 crop types of Austria, one Sentinel-2 pixel a sample over an agronomic year.

1 212 224 pixels of 15 tiles, September 2017 to August 2018, and of one tile in the year after (Weikmann, Paris and Bruzzone 2021, IEEE JSTARS 14,
4699-4708). Surface reflectance without band B08, which is not valid here.

Layout, under ``root``::

    <tile>/dates.csv                       acquisition_date, YYYYMMDD
    <tile>/<class 0-15>/<sample>.csv       a row a date: B2, B3, B4, B5, B6, B7, B8A, B11, B12, Flag

Against the published loader of AnySat, which leaves clouds in, puts B8A in the place of B8 and the flag in the place of B8A: bands are where they
belong, and only clear dates are valid. The validation and test tiles are the same: 33TWN and 33UVP; ``2019_33UVP`` is in no split.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays
from everysat.types import Batch, Place

LICENCE = "CC-BY-4.0"
SOURCE = "https://zenodo.org/records/4715631"
SPLITS = ("train", "val", "test")
LAYERS = ("s2", "label")
CLASSES = dict(
    enumerate(
        (
            "legumes", "grassland", "maize", "potato", "sunflower", "soy", "winter barley", "winter caraway", "rye",
            "rapeseed", "beet", "spring cereals", "winter wheat", "winter triticale", "permanent plantations", "other crops",
        )
    )
)  # fmt: skip
COLUMNS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B11", "B12")
FLAG = "Flag"
FLAGS = {0: "clear", 1: "cloud", 2: "shadow", 3: "snow"}
HELD_OUT = {"val": "33TWN", "test": "33UVP"}
OTHER_YEAR = "2019_33UVP"
"""The test tile in another year, which training may not see."""
GSD_M = 10.0


@dataclass(frozen=True)
class TimeSen2Crop:
    """See :func:`build`. ``files`` are paths of samples under ``root``; ``days`` [T, 2] the dates of each tile."""

    root: Path
    split: str
    files: tuple[str, ...]
    days: Mapping[str, Tensor]
    clear: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        path = self.root / self.files[index]
        frame = archives.table(path, (*COLUMNS, FLAG))
        table = sensors.get("sentinel-2-l2a").select(published.S2_BANDS)
        numbers = np.zeros((len(frame), len(table.bands), 1, 1), np.float32)
        held = [table.names.index(table[name].name) for name in COLUMNS]
        numbers[:, held, 0, 0] = _numeric(frame[list(COLUMNS)], path)
        flags = _numeric(frame[FLAG], path)
        if not np.isin(flags, list(FLAGS)).all():
            raise ValueError(f"{path}: {FLAG} is {flags[~np.isin(flags, list(FLAGS))][0]:g}, expected {FLAGS}")
        seen = np.zeros(numbers.shape, bool)
        seen[:, held] = np.isin(flags, self.clear)[:, None, None, None]
        s2 = bands.series(table, numbers, self.days[_tile(path)], path, GSD_M, seen=torch.from_numpy(seen))
        code = np.array([[int(path.parent.name)]])
        label = published.class_map("timesen2crop", code, CLASSES, GSD_M, SOURCE, path)
        return Batch((Place(GSD_M, GSD_M),), {"s2": s2, "label": label})

    def fingerprint(self) -> str:
        return published.fingerprint(replace(self, days={}))

    @property
    def codes(self) -> tuple[int, ...]:
        """The class of each place, from the name of its folder."""
        return tuple(int(name.split("/")[-2]) for name in self.files)


def _tile(path: Path) -> str:
    return path.parent.parent.name


def _numeric(values: pd.DataFrame | pd.Series, path: Path) -> np.ndarray:
    try:
        return values.to_numpy(dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"{path} holds something else than numbers: {error}") from error


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    clear: Sequence[int] = (0,),
) -> TimeSen2Crop:
    """Pixels of TimeSen2Crop: the layer ``s2`` of one pixel, ten bands of which B08 is never valid, and the crop.

    Args:
        root: the folder that holds the tiles. Listing its million files takes a while.
        clear: flags of dates that count: 0 clear, 1 cloud, 2 shadow, 3 snow. ``(0, 1, 2, 3)`` is what the published scores of
            AnySat were reached with.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    published.layers_of(modalities, LAYERS[:1], LAYERS[:1])
    if not clear or any(flag not in FLAGS for flag in clear):
        raise ValueError(f"clear={tuple(clear)} must be some of {FLAGS}")
    base = published.folder(root, "TimeSen2Crop", (HELD_OUT[split],) if split in HELD_OUT else (), SOURCE)
    apart = {*HELD_OUT.values(), OTHER_YEAR}
    held = sorted(
        entry.name for entry in os.scandir(base) if entry.is_dir() and (base / entry.name / "dates.csv").is_file()
    )
    tiles = [HELD_OUT[split]] if split in HELD_OUT else [name for name in held if name not in apart]
    if not tiles:
        raise published.absent(base, "<tile>/dates.csv of a training tile", "TimeSen2Crop", SOURCE)
    days = {tile: _days(base / tile / "dates.csv") for tile in tiles}
    files = tuple(name for tile in tiles for name in _samples(base, tile))
    if not files:
        raise published.absent(base, f"{tiles[0]}/<class>/<sample>.csv", "TimeSen2Crop", SOURCE)
    return TimeSen2Crop(base, split, files, days, tuple(clear))


def _days(path: Path) -> Tensor:
    return published.days(archives.table(path, ("acquisition_date",))["acquisition_date"], path)


def _samples(base: Path, tile: str) -> list[str]:
    """Paths of the samples of a tile, in the order of classes and names, which the order on disk is not."""
    found = []
    for code in CLASSES:
        folder = base / tile / str(code)
        if folder.is_dir():
            names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".csv"))
            found += [f"{tile}/{code}/{name}" for name in names]
    return found


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` pixels in each of five tiles."""
    rng = np.random.default_rng(seed)
    for tile, year in (
        ("32TPT", 2017),
        ("33UWP", 2017),
        (HELD_OUT["val"], 2017),
        (HELD_OUT["test"], 2017),
        (OTHER_YEAR, 2018),
    ):
        start = np.datetime64(f"{year}-09-03")
        days = start + np.sort(rng.choice(360, 12, replace=False))
        stamps = "".join(f"{str(day).replace('-', '')}\n" for day in days)
        arrays.write_text(folder / tile / "dates.csv", "acquisition_date\n" + stamps)
        for i in range(places):
            numbers = np.column_stack([rng.integers(100, 6000, (12, 9)), rng.choice(4, 12, p=[0.7, 0.1, 0.1, 0.1])])
            path = folder / tile / str((5 * i) % 16) / f"{i}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(numbers, columns=[*COLUMNS, FLAG]).to_csv(path, index=False)
