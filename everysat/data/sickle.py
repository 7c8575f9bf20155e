"""SICKLE: paddy and other crops of the Cauvery delta, India, in series of Sentinel-1, Sentinel-2 and Landsat 8 of 320 m places.

2370 samples of 388 plots, 2018-2021 (Sani et al. 2024, WACV). Sentinel-2 and Landsat are surface reflectance, Landsat's thermal band is surface
temperature, Sentinel-1 is in dB. Where the places lie is withheld by the authors.

Layout, under ``root``::

    sickle_dataset_tabular.csv             UNIQUE_ID, PLOT_ID, SPLIT, ...
    images/S1|S2|L8/npy/<id>/<scene>.npz   one array a band, of its own size: VV, VH | B1 ... B12 | SR_B1 ... SR_B7, ST_B10
    masks/10m/<id>.tif                     first band: plot; second band: crop, 0 not labelled, 1 paddy, above other crops

A place has several plots, and plots of different splits: as in the published code only those of the split are labelled, so images of a split show
fields of another one, but not their labels. Against the published loader of AnySat: B8 and B8A are where they belong; dates come in order; a place
without background does not lose its first plot; what is negative is not labelled (it was counted as paddy); Landsat's bands stay those of Level-2.
AnySat's published scores on "test" are of ``split="val"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays
from everysat.sensors import Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "as stated at the source; Copernicus Sentinel data, Landsat courtesy of the U.S. Geological Survey"
SOURCE = "https://sites.google.com/iiitd.ac.in/sickle/home (code: https://github.com/Depanshu-Sani/SICKLE)"
SPLITS = ("train", "val", "test")
LAYERS = ("l8", "s2", "s1", "label")
CLASSES = {0: "paddy", 1: "other crop"}
SIDE_PX, GSD_M, PADDY = 32, 10.0, 1
L8_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B10")
ANYSAT_L8 = ("B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")
DATE_FIELD = {"s1": 4, "l8": 2}
"""Where the date stands in the underscore-separated name of a scene; in that of Sentinel-2 it is first, or second after a tile."""


@dataclass(frozen=True)
class Sickle:
    """See :func:`build`. ``ids`` are the places, ``plots`` those whose labels belong to the split."""

    root: Path
    split: str
    ids: tuple[int, ...]
    plots: tuple[int, ...]
    layers: tuple[str, ...]
    stored: str
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        uid, side_m = self.ids[index], SIDE_PX * GSD_M
        layers = {name: self._series(uid, name) for name in self.layers}
        return Batch((Place(side_m, side_m),), {**layers, "label": self._label(uid)})

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _series(self, uid: int, name: str) -> Raster:
        folder = self.root / "images" / name.upper() / "npy" / str(uid)
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no .npz: the dataset is incomplete. Fetch it again, or leave out {name!r}"
            )
        sensor, keys = _table(name)
        numbers = np.stack([_scene(path, keys) for path in files])
        if name == "s1":
            numbers = bands.with_ratio(numbers)
        time_s = published.days([_stamp(path, name) for path in files], folder)
        raster = bands.series(sensor, numbers, time_s, folder, GSD_M, stored=self.stored)
        return bands.presented(name, raster, self.present_as, ANYSAT_L8)

    def _label(self, uid: int) -> Raster:
        path = self.root / "masks" / "10m" / f"{uid}.tif"
        held, _ = arrays.tiff(path)
        if len(held) < 2:
            raise ValueError(f"{path} has {len(held)} bands, expected at least 2: plot and crop")
        plot, crop = bands.nearest(held[:2], SIDE_PX)
        known = (crop >= PADDY) & np.isin(plot, self.plots)
        codes = np.where(known, crop > PADDY, 0)
        label = published.class_map("sickle-paddy", codes, CLASSES, GSD_M, SOURCE, path)
        return replace(label, valid=torch.from_numpy(known)[None, None])


def _table(name: str) -> tuple[Sensor, tuple[str, ...]]:
    """The sensor of a layer, and the names of its bands in the files."""
    if name == "s1":
        return published.sentinel1("VV", "VH", "ratio"), ("VV", "VH")
    if name == "s2":
        keys = tuple(band.replace("B0", "B") for band in published.S2_BANDS)
        return sensors.get("sentinel-2-l2a").select(published.S2_BANDS), keys
    return sensors.get("landsat-8-oli").select(L8_BANDS), tuple(f"{'ST' if b == 'B10' else 'SR'}_{b}" for b in L8_BANDS)


def _scene(path: Path, keys: Sequence[str]) -> np.ndarray:
    """[band, y, x] of a scene on the grid of the place; NaN for a band that the file lacks, as some of Landsat do, and where all
    bands are 0, outside of the scene."""
    held = archives.npz(path)
    if not any(key in held for key in keys):
        archives.only(held, keys[0], path)
    image = np.full((len(keys), SIDE_PX, SIDE_PX), np.nan, np.float32)
    for index, key in enumerate(keys):
        if key in held:
            if held[key].ndim != 2 or not held[key].size:
                raise ValueError(f"{path}: {key} is {held[key].shape}, expected [y, x]")
            image[index] = bands.nearest(held[key], SIDE_PX)
    image[:, ((image == 0) | np.isnan(image)).all(0)] = np.nan
    return image


def _stamp(path: Path, name: str) -> str:
    """``YYYYMMDD`` of a scene, from its name."""
    parts = path.stem.split("_")
    field = DATE_FIELD.get(name, 1 if parts[0].startswith("T") else 0)
    stamp = parts[field][:8] if field < len(parts) else ""
    if not stamp.isdigit():
        raise ValueError(
            f"{path}: the name has no date where scenes of {name!r} have it, in part {field + 1} between underscores"
        )
    return stamp


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    stored: str = "numbers",
    present_as: Mapping[str, str] | None = None,
) -> Sickle:
    """Places of SICKLE with paddy and other crops as label, on a grid of 10 m; coarser bands repeat their nearest pixel.

    Args:
        root: the folder that holds the dataset.
        modalities: of ``l8`` (B1-B7 and B10 of Level-2), ``s2`` (10 bands) and ``s1`` (VV, VH, VV/VH); all by default.
        stored: what the optical files hold: ``numbers`` as the agencies distribute them, or ``physical``, reflectance and kelvin.
            What cannot be is an error.
        present_as: ``{"l8": "landsat-8-oli-l1"}`` gives Landsat in the eleven bands of AnySat's contract, of which B8, B9 and B11
            are never valid and B10 holds kelvin.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    published.one_of(stored, bands.STORED, "stored")
    layers = published.layers_of(modalities, LAYERS[:3], LAYERS[:3])
    base = published.folder(root, "SICKLE", ("sickle_dataset_tabular.csv", "masks/10m"), SOURCE)
    path = base / "sickle_dataset_tabular.csv"
    frame = archives.table(path, ("UNIQUE_ID", "PLOT_ID", "SPLIT"))
    mine = frame[frame["SPLIT"] == split]
    if not len(mine):
        raise ValueError(f"{path} has no row with SPLIT={split!r}; it has {_listed(frame['SPLIT'])}")
    ids, plots = (tuple(int(v) for v in dict.fromkeys(mine[key])) for key in ("UNIQUE_ID", "PLOT_ID"))
    return Sickle(base, split, ids, plots, layers, stored, bands.presentable(present_as, ("l8",)))


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(map(str, values))))


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split."""
    rng = np.random.default_rng(seed)
    rows = ["UNIQUE_ID,PLOT_ID,SPLIT,YEAR,STANDARD_SEASON"]
    for number, split in enumerate(SPLITS):
        for i in range(places):
            uid, plot = 1000 * number + i, 10 * number + i + 1
            rows.append(f"{uid},{plot},{split},2018,jan-jun")
            mask = np.zeros((2, SIDE_PX, SIDE_PX), np.float32)
            mask[:, 4:14, 4:20] = np.array([plot, 1 + 3 * (i % 2)]).reshape(2, 1, 1)
            mask[:, 20:28, 4:20] = np.array([500 + i, 1]).reshape(2, 1, 1)
            arrays.write_tiff(folder / "masks" / "10m" / f"{uid}.tif", mask)
            _fake_scenes(folder / "images", uid, rng)
    (folder / "sickle_dataset_tabular.csv").write_text("\n".join(rows) + "\n")


def _fake_scenes(folder: Path, uid: int, rng: np.random.Generator) -> None:
    def numbers(side: int, low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, (side, side)).astype(np.uint16)

    for day in rng.choice(28, 4, replace=False) + 1:
        stamp = f"201802{day:02d}"
        tile = f"T44PKU_{stamp}T045939" if day % 2 else f"{stamp}T045939_{stamp}T051209_T44PKU"
        fine, coarse = ("B2", "B3", "B4", "B8"), ("B5", "B6", "B7", "B8A", "B11", "B12")
        s2 = {b: numbers(32 if b in fine else 16, 100, 5000) for b in (*fine, *coarse)}
        archives.write_npz(folder / "S2" / "npy" / str(uid) / f"{tile}.npz", **s2)
        l8 = {f"SR_B{b}": numbers(11, 8000, 20000) for b in range(1, 8)}
        l8 |= {"ST_B10": numbers(11, 42000, 46000)} if day % 3 else {}
        archives.write_npz(folder / "L8" / "npy" / str(uid) / f"LC08_143053_{stamp}.npz", **l8)
        s1 = {b: (rng.normal(size=(32, 32)) - level).astype(np.float32) for b, level in (("VV", 9.0), ("VH", 15.0))}
        name = f"S1A_IW_GRDH_1SDV_{stamp}T003000_{stamp}T003025_020000_022000_ABCD.npz"
        archives.write_npz(folder / "S1" / "npy" / str(uid) / name, **s1)
