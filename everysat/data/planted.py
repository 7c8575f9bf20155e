"""PLANTED: the tree species of planted forests around the world, 120 m places seen by five satellites for years.

1 346 662 places of 40 species in the archive that AnySat was trained on (Pazos-Outon et al. 2024, arXiv:2406.18554; Astruc et al. 2025,
CVPR). Digital numbers of the optical sensors become reflectance, of ALOS-2 dB; Sentinel-1 is in dB as it stands.

Layout, under ``root``; the archive is made of the published TFRecords, one folder a place::

    <split>/labels2.json                      {id: species, 0-39}
    <split>/<id>/<id>_<layer>.npz             arr_0 [T, y, x, band]: s2 12 x 12 x 10, s1 12 x 12 x 2, l7 4 x 4 x 6, alos 4 x 4 x 2, modis 1 x 1 x 7
    <split>/<id>/<id>_<layer>_mask.npz        arr_0, same shape: 1 where valid
    <split>/<id>/<id>_<layer>_timestamp.npz   arr_0 [T]: milliseconds since 1970 UTC

Against the published loader: days are those of UTC, not of the time zone of the machine; masks decide what is valid, also of VV/VH and HH/HV,
and reach the model; every place is read once an epoch (the published one draws a class, then a place, whatever the index).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays, dates
from everysat.sensors import Sensor
from everysat.types import Batch, Place, Raster

LICENCE = "CC-BY-4.0"
SOURCE = "https://github.com/google-deepmind/forest_typology (planted, subset species)"
SPLITS = ("train", "val", "test")
LAYERS = ("s2", "s1", "l7", "alos", "modis", "label")
SPECIES = (
    "Elaeis guineensis", "Pinus taeda", "Pinus rigida", "Pinus koraiensis", "Pinus densiflora", "Abies sachalinensis",
    "Pinus elliottii", "Shorea robusta", "Castanea crenata", "Pseudotsuga menziesii", "Eucalyptus globulus", "Pinus radiata",
    "Robinia pseudoacacia", "Pinus thunbergii", "Pinus echinata", "Thea sinensis", "Betula pendula", "Hevea brasiliensis",
    "Picea glehnii", "Quercus acutissima", "Eucalyptus nitens", "Cocos nucifera", "Anacardium occidentale", "Zelkova serrata",
    "Acer pictum", "Prunus serrulata", "Prunus dulcis", "Picea jezoensis", "Quercus variabilis", "Fraxinus rhynchophylla",
    "Ginkgo biloba", "Pasania edulis", "Dendropanax morbiferus", "Machilus thunbergii", "Cryptomeria japonica",
    "Acacia melanoxylon", "Malus pumila", "Picea mariana", "Cornus controversa", "Theobroma cacao",
)  # fmt: skip
CLASSES = dict(enumerate(SPECIES))
SIDE_M = 120.0
ALOS_DB = -83.0
"""Calibration of the ALOS-2 mosaic: dB = 20 log10(amplitude) + this."""


@dataclass(frozen=True)
class Kind:
    """One satellite: its sensor, its bands in the order of the files, pixels a side, and their size."""

    sensor: str
    names: tuple[str, ...]
    pixels: int
    gsd_m: float

    @property
    def table(self) -> Sensor:
        """The sensor with the bands of the layer, those of radar with their quotient."""
        radar = ("ratio",) if sensors.get(self.sensor).kind == "sar" else ()
        return sensors.get(self.sensor).select((*self.names, *radar))


KINDS = {
    "s2": Kind("sentinel-2-l2a", published.S2_BANDS, 12, 10.0),
    "s1": Kind("sentinel-1-grd", ("VV", "VH"), 12, 10.0),
    "l7": Kind("landsat-7-etm", ("B1", "B2", "B3", "B4", "B5", "B7"), 4, 30.0),
    "alos": Kind("alos-2-palsar-2", ("HH", "HV"), 4, 30.0),
    "modis": Kind("modis", tuple(f"B{i}" for i in range(1, 8)), 1, 250.0),
}


@dataclass(frozen=True)
class Planted:
    """See :func:`build`. ``ids`` are the names of the places, ``codes`` the species of each."""

    root: Path
    split: str
    ids: tuple[str, ...]
    codes: tuple[int, ...]
    layers: tuple[str, ...]
    stored: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        layers = {name: self._series(index, name) for name in self.layers}
        label = np.array([[self.codes[index]]])
        layers["label"] = published.class_map("planted-species", label, CLASSES, SIDE_M, SOURCE, self._labels)
        return Batch((Place(SIDE_M, SIDE_M),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def _labels(self) -> Path:
        return self.root / self.split / "labels2.json"

    def _series(self, index: int, name: str) -> Raster:
        kind, stem = KINDS[name], self.root / self.split / self.ids[index] / f"{self.ids[index]}_{name}"
        path = stem.with_name(f"{stem.name}.npz")
        numbers = _channels(path, kind, self.stored[name] == "numbers" and name == "alos")
        mask_path = stem.with_name(f"{stem.name}_mask.npz")
        mask = archives.only(archives.npz(mask_path), "arr_0", mask_path)
        seen = _mask(mask, numbers.shape, mask_path)
        stamps_path = stem.with_name(f"{stem.name}_timestamp.npz")
        stamps = archives.only(archives.npz(stamps_path), "arr_0", stamps_path)
        days = np.floor(np.asarray(stamps, np.float64).reshape(-1) / 1e3 / dates.DAY_S) * dates.DAY_S
        time_s = torch.from_numpy(np.stack([days, days + dates.DAY_S], -1))
        return bands.series(kind.table, numbers, time_s, path, kind.gsd_m, stored=self.stored[name], seen=seen)


def _channels(path: Path, kind: Kind, amplitude: bool) -> np.ndarray:
    """Values [T, band, y, x] of a file, radar with its quotient; of ``amplitude`` in dB, the quotient of the amplitudes."""
    held = archives.only(archives.npz(path), "arr_0", path)
    expected = (kind.pixels, kind.pixels)
    if held.ndim != 4 or held.shape[1:3] != expected or held.shape[3] < len(kind.names):
        raise ValueError(
            f"{path} holds {held.shape}, expected [date, {expected[0]}, {expected[1]}, {len(kind.names)} bands]"
        )
    numbers = np.moveaxis(held[..., : len(kind.names)], -1, 1)
    if kind.table.kind != "sar":
        return numbers
    numbers = bands.with_ratio(numbers)
    if amplitude:
        if numbers.size and np.nanmin(numbers[:, :2]) < 0:
            raise ValueError(f"{path} holds negative numbers, so dB, no amplitude. Pass stored={{'alos': 'physical'}}")
        powers = np.where(numbers[:, :2] > 0, numbers[:, :2], np.nan)
        numbers[:, :2] = 20 * np.log10(powers) + ALOS_DB
    return numbers


def _mask(mask: np.ndarray, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    """Validity of [T, band, y, x] from a mask per band or for all of them; a quotient is valid where both of its bands are."""
    if mask.ndim != 4 or (mask.shape[0], *mask.shape[1:3]) != (shape[0], *shape[2:]):
        raise ValueError(f"{path} holds {mask.shape}, expected [{shape[0]}, {shape[2]}, {shape[3]}, band]")
    seen = np.moveaxis(mask, -1, 1) > 0
    if seen.shape[1] == 1:
        seen = np.repeat(seen, shape[1], 1)
    if shape[1] == 3:
        seen = np.concatenate([seen[:, :2], seen[:, :2].all(1, keepdims=True)], 1)
    return torch.from_numpy(seen[:, : shape[1]].copy())


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    stored: str | Mapping[str, str] = "numbers",
) -> Planted:
    """Places of PLANTED, with the species as ``label``.

    Args:
        root: the folder that holds the splits.
        modalities: of ``s2``, ``s1`` (VV, VH, VV/VH), ``l7``, ``alos`` (HH, HV, HH/HV) and ``modis``; all by default.
        stored: what the files hold, for all layers or by layer: ``numbers`` as the agencies distribute them, or ``physical``,
            reflectance and dB. What cannot be is an error, not a guess.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    base = published.folder(root, "PLANTED", (f"{split}/labels2.json",), SOURCE)
    path = base / split / "labels2.json"
    labels: dict[str, Any] = arrays.parsed(path)
    codes = tuple(labels.values())
    if wrong := [code for code in codes if code not in CLASSES]:
        raise ValueError(f"{path} must map places to species, 0 to {len(SPECIES) - 1}; it has {wrong[0]!r}")
    if not codes:
        raise ValueError(f"{path} lists no place. Fetch it again")
    by_layer = {name: stored if isinstance(stored, str) else stored.get(name, "numbers") for name in KINDS}
    for word in (*by_layer.values(), *((stored,) if isinstance(stored, str) else stored.values())):
        published.one_of(word, bands.STORED, "stored")
    layers = published.layers_of(modalities, tuple(KINDS), tuple(KINDS))
    return Planted(base, split, tuple(labels), codes, layers, by_layer)


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split."""
    rng = np.random.default_rng(seed)
    dates_per = {"s2": 8, "s1": 8, "l7": 20, "alos": 4, "modis": 10}
    for number, split in enumerate(SPLITS):
        ids = [f"{1000 * number + i}" for i in range(places)]
        arrays.write_json(folder / split / "labels2.json", {n: int(rng.integers(40)) for n in ids})
        for place in ids:
            for name, kind in KINDS.items():
                stem = folder / split / place / f"{place}_{name}"
                shape = (dates_per[name], kind.pixels, kind.pixels, len(kind.names))
                archives.write_npz(stem.with_name(f"{stem.name}.npz"), arr_0=_noise(rng, name, shape))
                archives.write_npz(stem.with_name(f"{stem.name}_mask.npz"), arr_0=rng.random(shape) > 0.1)
                start = 1_420_070_400_000 + np.sort(rng.integers(0, 1500, shape[0])) * 86_400_000
                late = start + rng.integers(0, 86_400_000, shape[0])
                archives.write_npz(stem.with_name(f"{stem.name}_timestamp.npz"), arr_0=late)


def _noise(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "s1":
        return (rng.normal(size=shape) - (9.0, 15.0)).astype(np.float32)
    low, high = {"s2": (100, 5000), "l7": (7500, 20000), "alos": (1000, 9000), "modis": (100, 5000)}[name]
    return rng.integers(low, high, shape).astype(np.float32)
