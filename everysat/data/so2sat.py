"""So2Sat LCZ42: the local climate zones of cities around the world, 320 m places in Sentinel-1 and Sentinel-2.

400 673 places of 17 zones in 42 cities, and ten other cities for validation and test (Zhu et al. 2020, IEEE Geoscience and Remote Sensing Magazine
8(3), 76-89). Sentinel-2 is top-of-atmosphere reflectance, composed of images of a season of 2017; Sentinel-1 is intensity, given in dB here.

Layout, under ``root``, of the second version (the third, which splits by blocks or cities, has the same content)::

    {training,validation,testing}.h5     sen1 [N, y, x, 8], sen2 [N, y, x, 10], label [N, 17], one-hot

``sen1``: VH and VV complex without filter (real, imaginary, real, imaginary), intensity of VH and of VV after a refined Lee filter, covariance (real,
imaginary). Against the published loader of AnySat, which takes the real parts of VV and VH - numbers around zero whose quotient means nothing -, turns
rows into columns and holds a whole split in memory: filtered intensities are read, places are upright, and one place is read at a time. Its scores are
of its own input, which is not offered. Files give no dates: layers are undated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays
from everysat.types import ALWAYS, Batch, Place, Raster

LICENCE = "CC-BY-4.0"
SOURCE = "https://mediatum.ub.tum.de/1483140 (doi:10.14459/2018mp1483140)"
SPLITS = ("train", "val", "test")
LAYERS = ("s2", "s1", "label")
FILES = {"train": "training", "val": "validation", "test": "testing"}
CLASSES = dict(
    enumerate(
        (
            "compact high-rise", "compact mid-rise", "compact low-rise", "open high-rise", "open mid-rise", "open low-rise",
            "lightweight low-rise", "large low-rise", "sparsely built", "heavy industry", "dense trees", "scattered trees",
            "bush, scrub", "low plants", "bare rock or paved", "bare soil or sand", "water",
        )
    )
)  # fmt: skip
SIDE_PX, GSD_M = 32, 10.0
VV, VH = 5, 4
"""Channels of ``sen1`` that hold the filtered intensities."""


@dataclass(frozen=True)
class So2Sat:
    """See :func:`build`. ``codes`` are the zones of the places."""

    path: Path
    split: str
    codes: tuple[int, ...]
    layers: tuple[str, ...]
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        names = {"s2": "sen2", "s1": "sen1"}
        held = archives.hdf5_row(self.path, [names[name] for name in self.layers], index)
        readers = {"s2": self._s2, "s1": self._s1}
        layers = {name: readers[name](held[names[name]]) for name in self.layers}
        side_m = SIDE_PX * GSD_M
        code = np.array([[self.codes[index]]])
        layers["label"] = published.class_map("so2sat-zones", code, CLASSES, side_m, SOURCE, self.path)
        return Batch((Place(side_m, side_m),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(So2Sat(Path(self.path.name), self.split, self.codes, self.layers, self.present_as))

    def _s2(self, held: np.ndarray) -> Raster:
        sensor = sensors.get("sentinel-2-l1c").select(published.S2_BANDS)
        raster = self._undated(sensor, self._upright(held, len(sensor.bands)), "physical")
        return bands.presented("s2", raster, self.present_as, published.S2_BANDS)

    def _s1(self, held: np.ndarray) -> Raster:
        intensity = self._upright(held, 8)[:, [VV, VH]]
        numbers = bands.with_ratio(np.where(intensity > 0, intensity, np.nan))
        numbers[:, :2] = 10 * np.log10(numbers[:, :2])
        return self._undated(published.sentinel1("VV", "VH", "ratio"), numbers, "numbers")

    def _upright(self, held: np.ndarray, count: int) -> np.ndarray:
        """[1, band, y, x] of [y, x, band]."""
        if held.shape != (SIDE_PX, SIDE_PX, count):
            raise ValueError(f"{self.path} holds {held.shape}, expected [{SIDE_PX}, {SIDE_PX}, {count}]")
        return np.moveaxis(held, -1, 0)[None]

    def _undated(self, sensor: sensors.Sensor, numbers: np.ndarray, stored: str) -> Raster:
        always = torch.tensor([ALWAYS], dtype=torch.float64)
        return bands.series(sensor, numbers, always, self.path, GSD_M, stored=stored)


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    present_as: Mapping[str, str] | None = None,
) -> So2Sat:
    """Places of So2Sat with their local climate zone as ``label``.

    Args:
        root: the folder that holds the three HDF5 files.
        modalities: of ``s2`` (10 bands) and ``s1`` (VV, VH in dB, VV/VH of the intensities); both by default.
        present_as: ``{"s2": "sentinel-2-l2a"}`` gives Sentinel-2 under that name, for models such as AnySat, which do not tell
            top-of-atmosphere from surface reflectance.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    layers = published.layers_of(modalities, LAYERS[:2], LAYERS[:2])
    path = published.folder(root, "So2Sat", (f"{FILES[split]}.h5",), SOURCE) / f"{FILES[split]}.h5"
    label = arrays.hdf5(path, ["label"])["label"]
    if label.ndim != 2 or label.shape[1] != len(CLASSES) or not len(label) or not ((label != 0).sum(1) == 1).all():
        raise ValueError(f"{path}: label is {label.shape}, expected [place, {len(CLASSES)}] with a single 1 a row")
    codes = tuple(int(code) for code in label.argmax(1))
    return So2Sat(path, split, codes, layers, bands.presentable(present_as, ("s2",)))


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split."""
    rng = np.random.default_rng(seed)
    for name in FILES.values():
        sen1 = rng.normal(size=(places, SIDE_PX, SIDE_PX, 8))
        sen1[..., [VH, VV]] = rng.gamma(4.0, (0.01, 0.03), (places, SIDE_PX, SIDE_PX, 2)) + 1e-4
        content = {
            "sen1": sen1,
            "sen2": rng.uniform(0.01, 0.6, (places, SIDE_PX, SIDE_PX, 10)),
            "label": np.eye(len(CLASSES))[rng.integers(0, len(CLASSES), places)],
        }
        arrays.write_hdf5(folder / f"{name}.h5", content)
