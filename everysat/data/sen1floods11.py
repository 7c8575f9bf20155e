"""Sen1Floods11: surface water in 446 hand-labelled chips of 11 floods on six continents, with Sentinel-1 and Sentinel-2.

Bonafilia et al. 2020 (CVPR Workshops). Sentinel-2 is Level-1C, all 13 bands resampled to 10 m; Sentinel-1 is in dB. The chips are in degrees:
a pixel is 10 m high everywhere and 10 m wide at the equator only (7.9 m at 38 degrees north). As in all published work they are taken for
squares of 10 m; the geobox of the place says where they lie.

Layout, under ``root`` (or one folder further down)::

    v1.1/splits/flood_handlabeled/flood_{train,valid,test,bolivia}_data.csv       <chip>_S1Hand.tif,<chip>_LabelHand.tif a line
    v1.1/Sen1Floods11_Metadata.geojson                                            location, s1_date, s2_date of each flood
    v1.1/data/flood_events/HandLabeled/{S1Hand,S2Hand,LabelHand}/<chip>_<folder>.tif    512 x 512
    S1/<chip>_S1Hand.tif  S2/<chip>_S2Hand.tif  Labels/<chip>_LabelHand.tif       variant "chip": single chips, no splits, no dates

Against the published loaders: NaN of Sentinel-1 and 0 of Sentinel-2 are invalid, not 0; label -1 is invalid; a flood without a date in the
metadata is undated, not of 1998; the chips of the Mekong get the dates of Cambodia, where that flood was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from everysat import sensors
from everysat.data import bands, published
from everysat.io import archives, arrays, dates, grid
from everysat.types import ALWAYS, Batch, Place, Raster

LICENCE = "as stated at the source; Copernicus Sentinel data"
SOURCE = "https://github.com/cloudtostreet/Sen1Floods11 (gs://sen1floods11)"
SPLITS = ("train", "val", "test", "bolivia")
LAYERS = ("s2", "s1", "label")
VARIANTS = ("", "chip")
CLASSES = {0: "no water", 1: "water"}
LISTS = {"train": "train", "val": "valid", "test": "test", "bolivia": "bolivia"}
FOLDERS = {"": ("S1Hand", "S2Hand", "LabelHand"), "chip": ("S1", "S2", "Labels")}
FLOODS = {"Mekong": "Cambodia"}
"""Names of floods in the file names that the metadata call otherwise."""
GSD_M, NO_LABEL = 10.0, -1
HAND = "data/flood_events/HandLabeled"


@dataclass(frozen=True)
class Sen1Floods11:
    """See :func:`build`. ``chips`` are names such as Spain_7370579; ``days`` the dates of Sentinel-1 and 2 by flood."""

    root: Path
    variant: str
    split: str
    chips: tuple[str, ...]
    days: Mapping[str, tuple[dates.Span, dates.Span]]
    layers: tuple[str, ...]
    present_as: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.chips)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        chip = self.chips[index]
        s1_path, s2_path, label_path = (
            self.root / folder / f"{chip}_{ending}.tif"
            for folder, ending in zip(FOLDERS[self.variant], FOLDERS[""], strict=True)
        )
        when = self.days.get(chip.split("_")[0], (ALWAYS, ALWAYS))
        label, geobox = _label(label_path)
        layers: dict[str, Raster] = {}
        if "s2" in self.layers:
            table = sensors.get("sentinel-2-l1c")
            optical = _seen(table, _read(s2_path, 13, label), when[1], s2_path)
            layers["s2"] = bands.presented("s2", optical, self.present_as, published.S2_BANDS)
        if "s1" in self.layers:
            radar = bands.with_ratio(_read(s1_path, 2, label))
            layers["s1"] = _seen(published.sentinel1("VV", "VH", "ratio"), radar, when[0], s1_path)
        return Batch((_place(label, geobox),), {**layers, "label": label})

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def _read(path: Path, count: int, label: Raster) -> np.ndarray:
    """[1, band, y, x] of a chip that lies on the pixels of its label."""
    numbers, _ = arrays.tiff(path)
    expected = (count, *label.values.shape[2:])
    if numbers.shape != expected:
        raise ValueError(f"{path} holds {numbers.shape}, expected {expected}, the size of the label")
    return numbers[None]


def _seen(sensor: sensors.Sensor, numbers: np.ndarray, when: dates.Span, path: Path) -> Raster:
    return bands.series(sensor, numbers, torch.tensor([when], dtype=torch.float64), path, GSD_M)


def _label(path: Path) -> tuple[Raster, GeoBox | None]:
    codes, geobox = arrays.tiff(path)
    if len(codes) != 1:
        raise ValueError(f"{path} has {len(codes)} bands, expected 1: water")
    known = codes[0] != NO_LABEL
    label = published.class_map("sen1floods11-water", np.where(known, codes[0], 0), CLASSES, GSD_M, SOURCE, path)
    return replace(label, valid=torch.from_numpy(known)[None, None]), geobox


def _place(label: Raster, geobox: GeoBox | None) -> Place:
    height, width = label.values.shape[2:]
    if geobox is None:
        return Place(height * GSD_M, width * GSD_M)
    lon, lat = grid.to_lonlat(geobox, width / 2, height / 2)
    return Place(height * GSD_M, width * GSD_M, geobox, (float(lon), float(lat)))


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    present_as: Mapping[str, str] | None = None,
) -> Sen1Floods11:
    """Hand-labelled chips of Sen1Floods11.

    Args:
        variant: ``""`` for the archive, ``"chip"`` for a folder of single chips, which has no splits.
        root: the folder that holds ``v1.1`` or is it; for chips the folder that holds ``S1``, ``S2`` and ``Labels``.
        split: ``train``, ``val``, ``test``, or ``bolivia``, a flood that is in none of them.
        modalities: of ``s2`` (13 bands) and ``s1`` (VV, VH, VV/VH); both by default.
        present_as: ``{"s2": "sentinel-2-l2a"}`` gives ten bands under that name, for models such as AnySat, which do not tell
            top-of-atmosphere from surface reflectance.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    published.one_of(variant, VARIANTS, "variant")
    published.one_of(split, SPLITS, "split")
    layers = published.layers_of(modalities, LAYERS[:2], LAYERS[:2])
    shown = bands.presentable(present_as, ("s2",))
    if variant == "chip":
        base = published.folder(root, "a chip of Sen1Floods11", FOLDERS["chip"], SOURCE)
        chips = tuple(sorted(f.name.removesuffix("_LabelHand.tif") for f in (base / "Labels").glob("*_LabelHand.tif")))
        if not chips:
            raise published.absent(base, "Labels/<chip>_LabelHand.tif", "a chip of Sen1Floods11", SOURCE)
        return Sen1Floods11(base, variant, "", chips, {}, layers, shown)
    listing = f"splits/flood_handlabeled/flood_{LISTS[split]}_data.csv"
    inside = "v1.1" if (Path(root).expanduser() / "v1.1").is_dir() else "."
    published.folder(root, "Sen1Floods11", (f"{inside}/{listing}", f"{inside}/{HAND}"), SOURCE)
    base = Path(root).expanduser() / inside
    chips = tuple(line.split(",")[0].strip().removesuffix("_S1Hand.tif") for line in arrays.lines(base / listing))
    return Sen1Floods11(base / HAND, variant, split, chips, _days(base), layers, shown)


def _days(base: Path) -> dict[str, tuple[dates.Span, dates.Span]]:
    """Dates of Sentinel-1 and 2 by flood, from the metadata."""
    path = base / "Sen1Floods11_Metadata.geojson"
    found: dict[str, tuple[dates.Span, dates.Span]] = {}
    for feature in arrays.parsed(path).get("features", ()):
        known = feature.get("properties", {})
        if all(known.get(key) for key in ("location", "s1_date", "s2_date")):
            try:
                s1, s2 = (dates.span(pd.to_datetime(known[key]).date()) for key in ("s1_date", "s2_date"))
                found[str(known["location"])] = s1, s2
            except ValueError as error:
                raise ValueError(f"{path}, {known['location']}: {error}") from error
    return found | {name: found[other] for name, other in FLOODS.items() if other in found and name not in found}


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` chips of 512 x 512 pixels in each split."""
    rng = np.random.default_rng(seed)
    base = folder / "v1.1"
    floods = ("Spain", "Mekong", "Ghana", "Paraguay")
    known = [
        ("Spain", "2019/9/17", "2019/9/18"),
        ("Cambodia", "2018/8/5", "2018/8/4"),
        ("Ghana", "2018/9/18", "2018/9/19"),
    ]
    features = [
        {"type": "Feature", "geometry": None, "properties": {"location": n, "s1_date": a, "s2_date": b}}
        for n, a, b in known
    ]
    arrays.write_json(base / "Sen1Floods11_Metadata.geojson", {"type": "FeatureCollection", "features": features})
    for number, (split, listed) in enumerate(LISTS.items()):
        names = ["Bolivia" if split == "bolivia" else floods[i % len(floods)] for i in range(places)]
        chips = [f"{name}_{100_000 * (number + 1) + i}" for i, name in enumerate(names)]
        rows = "".join(f"{chip}_S1Hand.tif,{chip}_LabelHand.tif\n" for chip in chips)
        arrays.write_text(base / "splits" / "flood_handlabeled" / f"flood_{listed}_data.csv", rows)
        for chip in chips:
            _fake_chip(base / HAND, chip, rng)


def _fake_chip(hand: Path, chip: str, rng: np.random.Generator) -> None:
    transform = Affine(8.983152841195215e-05, 0, -0.78 + rng.random(), 0, -8.983152841195215e-05, 38.1)
    block = (1, 16, 16)  # repeated: noise of this size would take seconds
    radar = (rng.normal(size=(2, 32, 32)) - np.array([11.0, 19.0]).reshape(2, 1, 1)).astype(np.float32)
    radar[:, :4] = np.nan
    radar, optical = np.tile(radar, block), np.tile(rng.integers(100, 4000, (13, 32, 32)).astype(np.int16), block)
    label = np.tile(rng.integers(-1, 2, (1, 32, 32)).astype(np.int16), block)
    for name, values in (("S1Hand", radar), ("S2Hand", optical), ("LabelHand", label)):
        archives.write_grid(hand / name / f"{chip}_{name}.tif", values, "EPSG:4326", transform)
