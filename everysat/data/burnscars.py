"""HLS Burn Scars: 804 scenes of the conterminous United States, 2018-2021, with the outlines of fires; 30 m, 512 x 512 pixels.

Harmonized Landsat and Sentinel-2 of NASA, surface reflectance, with scars of the Monitoring Trends in Burn Severity programme
(Phillips et al. 2023, https://huggingface.co/datasets/ibm-nasa-geospatial/hls_burn_scars).

Layout, under ``root``::

    training|validation/subsetted_512x512_HLS.S30.<tile>.<year><day>.v1.4_merged.tif      6 bands: B02, B03, B04, B8A, B11, B12
    training|validation/subsetted_512x512_HLS.S30.<tile>.<year><day>.v1.4.mask.tif        1 burnt, 0 not, -1 missing

The published ``validation`` is ``test`` here, as in published comparisons, and ``val`` is a tenth of ``training``. Against the published loader of
AnySat: ``val`` takes whole tiles, so that no ground is in both; the day of the year in the name is the date; -1 is not labelled, and pixels without
data (9999 and -9999) are invalid, not 0. ``protocol="pangaea"`` is the split of PANGAEA, which draws scenes, not tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from everysat import sensors
from everysat.data import bands, published
from everysat.io import arrays, dates, grid
from everysat.nn.draws import stream
from everysat.types import ALWAYS, Batch, Place

LICENCE = "CC-BY-4.0"
SOURCE = "https://huggingface.co/datasets/ibm-nasa-geospatial/hls_burn_scars"
SPLITS = ("train", "val", "test")
LAYERS = ("hls", "label")
CLASSES = {0: "not burnt", 1: "burnt"}
BANDS = ("B02", "B03", "B04", "B8A", "B11", "B12")
FOLDERS = {"train": "training", "val": "training", "test": "validation"}
GSD_M, NO_LABEL, NO_DATA, VAL_SHARE = 30.0, -1, (9999.0, -9999.0), 0.1
MERGED, PANGAEA_SEED = "_merged.tif", 23
_NAME = re.compile(r"\.(T\d{2}[A-Z]{3})\.(\d{4})(\d{3})\.")


@dataclass(frozen=True)
class BurnScars:
    """See :func:`build`. ``scenes`` are the names of the image files."""

    root: Path
    split: str
    scenes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        path = self.root / FOLDERS[self.split] / self.scenes[index]
        numbers, geobox = arrays.tiff(path)
        sensor = sensors.get("hls-s30").select(BANDS)
        if len(numbers) != len(BANDS):
            raise ValueError(f"{path} has {len(numbers)} bands, expected {len(BANDS)}: {', '.join(BANDS)}")
        seen = torch.from_numpy(~np.isin(numbers, NO_DATA))[None]
        hls = bands.series(sensor, numbers[None], _time(path), path, GSD_M, stored="physical", seen=seen)
        mask_path = mask_of(path)
        codes = arrays.tiff(mask_path)[0]
        if codes.shape != (1, *numbers.shape[1:]):
            raise ValueError(
                f"{mask_path} holds {codes.shape}, expected {(1, *numbers.shape[1:])}, the size of the scene"
            )
        known = codes[0] != NO_LABEL
        label = published.class_map("hls-burn-scars", np.where(known, codes[0], 0), CLASSES, GSD_M, SOURCE, mask_path)
        label = replace(label, valid=torch.from_numpy(known)[None, None])
        height, width = (n * GSD_M for n in numbers.shape[1:])
        place = Place(height, width) if geobox is None else grid.place_of(geobox)
        return Batch((place,), {"hls": hls, "label": label})

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def mask_of(path: Path) -> Path:
    """The mask that belongs to a scene."""
    stem = path.name.removesuffix(MERGED)
    candidates = [path.with_name(f"{stem}{ending}") for ending in (".mask.tif", "_mask.tif")]
    return next((c for c in candidates if c.is_file()), candidates[0])


def _time(path: Path) -> Tensor:
    """The day in the name of a scene; always, where there is none."""
    span = ALWAYS
    if match := _NAME.search(path.name):
        start = datetime(int(match[2]), 1, 1, tzinfo=UTC) + timedelta(days=int(match[3]) - 1)
        span = start.timestamp(), start.timestamp() + dates.DAY_S
    return torch.tensor([span], dtype=torch.float64)


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    seed: int = 23,
    protocol: str = "",
) -> BurnScars:
    """Scenes of HLS Burn Scars: the layer ``hls`` (six bands) and the label.

    Args:
        root: the folder that holds ``training`` and ``validation``.
        seed: of the tenth of the training tiles that is ``val``.
        protocol: ``pangaea`` draws ``val`` as PANGAEA does: a tenth of the scenes, by scikit-learn's ``train_test_split`` with seed 23. Needs all 540
            scenes, and puts scenes of the same ground into both parts.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, ("",), "variant")
    published.one_of(split, SPLITS, "split")
    published.layers_of(modalities, LAYERS[:1], LAYERS[:1])
    published.one_of(protocol, ("", "pangaea"), "protocol")
    base = published.folder(root, "HLS Burn Scars", (FOLDERS[split],), SOURCE)
    scenes = tuple(sorted(f.name for f in (base / FOLDERS[split]).glob(f"*{MERGED}")))
    _refuse_lone_masks(base / FOLDERS[split], scenes)
    if split != "test" and protocol:
        drawn = _drawn(len(scenes))
        scenes = tuple(name for i, name in enumerate(scenes) if (i in drawn) == (split == "val"))
    elif split != "test":
        scenes = tuple(name for name in scenes if _in_val(_tile(name), seed) == (split == "val"))
    if not scenes:
        raise published.absent(base, f"{FOLDERS[split]}/*{MERGED}", "HLS Burn Scars", SOURCE)
    return BurnScars(base, split, scenes)


def _refuse_lone_masks(folder: Path, scenes: Sequence[str]) -> None:
    """The folder is the only list of scenes there is; a mask without one tells that it is incomplete."""
    stems = {name.removesuffix(MERGED) for name in scenes}
    for mask in sorted(folder.glob("*mask.tif")):
        stem = re.sub(r"[._]mask\.tif$", "", mask.name)
        if stem not in stems:
            raise FileNotFoundError(f"{folder / (stem + MERGED)} is missing, its mask is there. Fetch this file again")


def _tile(name: str) -> str:
    match = _NAME.search(name)
    return match[1] if match else name


def _in_val(tile: str, seed: int) -> bool:
    """Whether a tile is in ``val``. Each draws for itself, so that a file that is missing moves no other."""
    return bool(stream(seed, "burnscars", tile).random() < VAL_SHARE)


def _drawn(count: int) -> set[int]:
    """Which of so many sorted scenes PANGAEA validates on: the first tenth of a permutation, as ``train_test_split`` takes it."""
    share = math.ceil(VAL_SHARE * count)
    return set(np.random.RandomState(PANGAEA_SEED).permutation(count)[:share].tolist())


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` scenes of 512 x 512 pixels in each folder, two at least."""
    rng = np.random.default_rng(seed)
    tiles = [f"T{zone}S{letter}H" for zone in range(10, 20) for letter in "ABCDEFGHJKLMNPQRSTUV"]
    held_out = [tile for tile in tiles if _in_val(tile, 23)]
    others = [tile for tile in tiles if tile not in held_out]
    for number, name in enumerate(("training", "validation")):
        for i in range(max(places, 2)):
            tile = held_out[i // 2] if number == 0 and i % 2 == 0 else others[number * places + i]
            scene = f"subsetted_512x512_HLS.S30.{tile}.20{18 + i % 4}{190 + i}.v1.4"
            block = (1, 16, 16)  # repeated: noise of this size would take seconds
            values = np.tile(rng.uniform(0.01, 0.5, (6, 32, 32)).astype(np.float32), block)
            values[:, :5] = NO_DATA[0]
            codes = np.tile(rng.integers(NO_LABEL, 2, (1, 32, 32)).astype(np.int16), block)
            corner = (600000.0 + 1000 * i, 4200000.0)
            for ending, content in ((MERGED, values), (".mask.tif", codes)):
                path = folder / name / f"{scene}{ending}"
                arrays.write_tiff(path, content, crs="EPSG:32610", corner=corner, gsd_m=GSD_M)
