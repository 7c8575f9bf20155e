"""Crop mask of Digital Earth Africa: crop or not at places all over Africa, from two seasons of Sentinel-2 and of rain.

What the map of 2019 was trained on. Every row is the median over the pixels of a reference polygon; where that lies is not published. Regions
are agro-ecological zones, and whole ones are held out: a random split scores much higher.

Layout, under ``root``::

    <region>/training_data.txt    a header "# Class blue_S1 ... rain_S1 blue_S2 ... slope", then a row a place; Class 1 is crop

``_S1`` and ``_S2`` are the seasons January to June and July to December, no Sentinels. Per season: a geomedian (surface reflectance),
the negative logarithms of three deviations from it, three indices of it, and the mean rain of that half year, of no year in
particular. Slopes are in per cent in the files, and in degrees here. Against the files: rows that are there twice (52 in the
Sahel) are one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from everysat import sensors
from everysat.data import points, published
from everysat.find import suggest
from everysat.io import arrays, dates
from everysat.io.plane import unreadable
from everysat.types import Batch, Place, Raster

LICENCE = "Apache-2.0; contains modified Copernicus Sentinel data"
SOURCE = "https://github.com/digitalearthafrica/crop-mask, testing"
SPLITS = points.SPLITS
LAYERS = ("s2", "mads", "indices", "rain", "slope", "label")
CLASSES = {0: "not crop", 1: "crop"}
FILE = "training_data.txt"
SEASONS = {"_S1": ("2019-01", "2019-06"), "_S2": ("2019-07", "2019-12")}
S2 = {
    "blue": "B02", "green": "B03", "red": "B04", "red_edge_1": "B05", "red_edge_2": "B06", "red_edge_3": "B07", "nir": "B08",
    "swir_1": "B11", "swir_2": "B12",
}  # fmt: skip
MADS, INDICES = ("bcdev", "edev", "sdev"), ("NDVI", "LAI", "MNDWI")
COLUMNS = tuple(f"{name}{season}" for season in SEASONS for name in (*S2, *MADS, *INDICES, "rain"))
GSD_M = 10.0


@dataclass(frozen=True)
class CropMask:
    """See :func:`build`. ``rows`` are region and number of the row of each place."""

    root: Path
    rows: tuple[tuple[str, int], ...]
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        region, row = self.rows[index]
        columns = _read(self.root, region)
        layers = {
            name: _layer(name, {column: values[row] for column, values in columns.items()}) for name in self.layers
        }
        code = np.array([[columns["Class"][row]]])
        layers["label"] = published.class_map("dea-cropmask", code, CLASSES, GSD_M, SOURCE, self.root / region / FILE)
        return Batch((Place(GSD_M, GSD_M),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def codes(self) -> np.ndarray:
        """The class of each place."""
        return np.array([_read(self.root, region)["Class"][row] for region, row in self.rows], dtype=np.int64)

    @property
    def groups(self) -> np.ndarray:
        """The region of each place."""
        return np.array([region for region, _ in self.rows])


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    held_out: str = "southern",
    validate_on: str | None = None,
) -> CropMask:
    """Places of one pixel of 10 m, without georeference; ``label`` is crop or not.

    Args:
        root: the folder that holds the regions.
        split: ``test`` is the region that is held out, ``val`` another one, ``train`` all the rest; ``all`` is everything.
        modalities: of ``s2`` (9 bands of two seasons), ``mads`` (three deviations, as negative logarithms), ``indices`` (NDVI, LAI,
            MNDWI), ``rain`` (mm, two bands, undated) and ``slope`` (degrees, undated); all by default.
        held_out, validate_on: names of regions; ``val`` is ``central`` by default, or ``eastern`` when that is held out.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, (*SPLITS, points.EVERY), "split")
    layers = published.layers_of(modalities, LAYERS[:-1], LAYERS[:-1])
    base = published.folder(root, "dea_cropmask", (), SOURCE)
    regions = sorted(path.parent.name for path in base.glob(f"*/{FILE}"))
    if not regions:
        raise published.absent(base, f"<region>/{FILE}", "dea_cropmask", SOURCE)
    apart = validate_on or ("eastern" if held_out == "central" else "central")
    for argument, name in (("held_out", held_out), ("validate_on", apart)):
        if name not in regions:
            raise LookupError(f"{argument}={name!r}: {base} has no {name}/{FILE}. {suggest(name, regions)}")
    if apart == held_out:
        raise ValueError(
            f"validate_on={apart!r} is the region that is held out; take another one of {', '.join(regions)}"
        )
    parts = {"test": [held_out], "val": [apart], points.EVERY: regions}
    wanted = parts.get(split, [region for region in regions if region not in (held_out, apart)])
    if not wanted:
        raise ValueError(f"{base} has the regions {', '.join(regions)}: none is left to train on")
    rows = tuple((region, row) for region in wanted for row in range(len(_read(base, region)["Class"])))
    return CropMask(base, rows, layers)


def _read(base: Path, region: str) -> dict[str, np.ndarray]:
    return _columns(*points.state(base / region / FILE))


@lru_cache(maxsize=16)
def _columns(file: tuple[str, int, int]) -> dict[str, np.ndarray]:
    """Values of the rows that differ, by the name of their column."""
    path = Path(file[0])
    text = path.read_text(encoding="utf-8")
    names = text.split("\n", 1)[0].lstrip("# ").split()
    if missing := [name for name in ("Class", *COLUMNS, "slope") if name not in names]:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(names) or 'none'}")
    try:
        if not text.endswith("\n"):
            raise ValueError("its last row is not complete")
        values = np.loadtxt(text.splitlines()[1:], ndmin=2)
    except ValueError as error:
        raise unreadable(str(path), error) from error
    if values.shape[1:] != (len(names),) or not np.isfinite(values).all():
        raise ValueError(f"{path} holds {values.shape} numbers, expected {len(names)} columns, all of them finite")
    _, first = np.unique(values, axis=0, return_index=True)
    return dict(zip(names, values[np.sort(first)].T, strict=True))


def _layer(name: str, row: dict[str, np.ndarray]) -> Raster:
    """Layer ``name`` of one place from its columns."""
    if name == "slope":
        degrees = np.degrees(np.arctan(row["slope"] / 100))
        return points.layer(sensors.get("srtm-terrain").select(("slope",)), degrees.reshape(1, 1), GSD_M)
    if name == "rain":
        rain = np.array([[row[f"rain{season}"] for season in SEASONS]])
        return points.layer(sensors.get("chpclim"), rain, GSD_M)
    columns = {"s2": tuple(S2), "mads": MADS, "indices": INDICES}[name]
    sensor = (
        sensors.get("sentinel-2-l2a").select(S2.values()) if name == "s2" else sensors.get("dea-geomad").select(columns)
    )
    numbers = np.array([[row[f"{column}{season}"] for column in columns] for season in SEASONS])
    return points.layer(sensor, numbers, GSD_M, time_s=[dates.span(months) for months in SEASONS.values()])


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each of four regions."""
    rng = np.random.default_rng(seed)
    names = ("Class", *COLUMNS, "slope")
    ranges = {"rain": (1, 1000), "bcdev": (1, 5), "edev": (1, 5), "sdev": (3, 10), "slope": (0, 60), "Class": (0, 2)}
    for region in ("central", "eastern", "sahel", "southern"):
        rows = []
        for _ in range(places):
            drawn = {name: rng.uniform(*ranges.get(name.split("_S")[0], (0.02, 0.6))) for name in names}
            drawn["Class"] = float(int(drawn["Class"]))
            rows.append(" ".join(f"{drawn[name]:.6f}" for name in names))
        arrays.write_text(folder / region / FILE, "\n".join(["# " + " ".join(names), *rows, ""]))
