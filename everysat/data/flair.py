"""FLAIR #1 and #2: land cover of France at 0.2 m, from aerial photographs with height, and a year of Sentinel-2.

Garioud et al. 2022 (arXiv:2211.12979) and 2023 (NeurIPS, arXiv:2310.13336): 61 712 places of 102.4 m for training and
validation in 40 departments and years ("domains"), 15 700 in the test of #1 and 16 050 in that of #2, in other domains.

Layout, under ``root``, with ``<area>`` = ``D004_2021/Z1_NN``::

    flair_aerial_train/<area>/img/IMG_000001.tif        uint8 [5, 512, 512]: R, G, B, NIR, height in steps of 0.2 m
    flair_labels_train/<area>/msk/MSK_000001.tif        uint8 [1, 512, 512]: 1..19
    flair_sen_train/<area>/sen/SEN2_sp_D004_2021-Z1_NN_data.npy         uint16 [T, 10, h, w] of the whole area
                               ..._masks.npy            [T, 2, h, w] probability of snow and cloud, percent
                               ..._products.txt         product names, one a line
    flair_2_aerial_test, flair_2_labels_test, flair_2_sen_test (and flair_1_aerial_test, flair_1_labels_test)
    flair-2_centroids_sp_to_patch.json                  {IMG_000001.tif: [row, column] in the Sentinel-2 array}

Against the published loaders: validation is the 8 official domains, so that nothing leaks; the loader of OmniSat shuffles the
domains anew for training and for validation, that of AnySat validates on the test set. A Sentinel-2 window that leaves its array
is filled with what is not valid. Ten pixels of 10 m cover 100 m of the 102.4 m: ``crop="centre"`` cuts the photograph to these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everysat import sensors
from everysat.data import published
from everysat.io import arrays, grid
from everysat.types import Batch, Place, Raster

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

LICENCE = "etalab-2.0"
SOURCE = "https://huggingface.co/datasets/IGNF/FLAIR, https://ignf.github.io/FLAIR/"
SPLITS = ("train", "val", "test")
LAYERS = ("aerial-flair", "s2", "label")
VARIANTS = {"": "flair_2", "2": "flair_2", "1": "flair_1"}
VAL_DOMAINS = ("D004", "D014", "D029", "D031", "D058", "D066", "D067", "D077")
CLASSES = {
    1: "building", 2: "pervious surface", 3: "impervious surface", 4: "bare soil", 5: "water", 6: "coniferous",
    7: "deciduous", 8: "brushwood", 9: "vineyard", 10: "herbaceous vegetation", 11: "agricultural land", 12: "plowed land",
    13: "swimming pool", 14: "snow", 15: "clear cut", 16: "mixed", 17: "ligneous", 18: "greenhouse", 19: "other",
}  # fmt: skip
OTHER = 13
MERGED = {code: name for code, name in CLASSES.items() if code < OTHER} | {OTHER: "other"}
"""The 12 classes of the official metric; the rest is one class that it leaves out."""
CENTROIDS = "flair-2_centroids_sp_to_patch.json"
SIDE_PX, CENTRE_PX, GSD_M, S2_PX = 512, 500, 0.2, 10


@dataclass(frozen=True)
class Flair:
    """See :func:`build`. ``images`` are paths below the folder of photographs; ``centroids`` row and column of each place in the
    Sentinel-2 array of its area."""

    root: Path
    folders: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    centroids: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]
    label: str
    classes: int
    other: bool
    clouds: float | None
    crop: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        domain, area, _, name = self.images[index].split("/")
        side_m = (CENTRE_PX if self.crop == "centre" else SIDE_PX) * GSD_M
        place: Place | None = None
        layers: dict[str, Raster] = {}
        if "aerial-flair" in self.layers:
            place, layers["aerial-flair"] = self._aerial(self._folder("aerial") / self.images[index])
        if "s2" in self.layers:
            series = self._s2(self._folder("sen") / domain / area / "sen", f"SEN2_sp_{domain}-{area}", index)
            layers |= {"s2": series} if len(series.row) else {}
        if self.label:
            mask = self._folder("labels") / domain / area / "msk" / name.replace("IMG_", "MSK_")
            layers["label"] = self._label(mask, side_m)
        return Batch((place or Place(side_m, side_m),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _folder(self, kind: str) -> Path:
        return self.root / dict(self.folders)[kind]

    def _side(self) -> slice:
        margin = (SIDE_PX - CENTRE_PX) // 2 if self.crop == "centre" else 0
        return slice(margin, SIDE_PX - margin)

    def _pixels(self, path: Path) -> tuple[np.ndarray, GeoBox | None]:
        numbers, geobox = arrays.tiff(path)
        if numbers.shape[1:] != (SIDE_PX, SIDE_PX):
            raise ValueError(f"{path} has {numbers.shape[1:]} pixels, expected {SIDE_PX} x {SIDE_PX}")
        side = self._side()
        return numbers[:, side, side], None if geobox is None else grid.crop(geobox, side, side)

    def _aerial(self, path: Path) -> tuple[Place | None, Raster]:
        numbers, geobox = self._pixels(path)
        raster = published.image(sensors.get("flair-aerial"), numbers, path, GSD_M)
        return None if geobox is None else grid.place_of(geobox), raster

    def _label(self, path: Path, side_m: float) -> Raster:
        last, names = (OTHER, MERGED) if self.classes == len(MERGED) else (max(CLASSES), CLASSES)
        codes = self._pixels(path)[0][0]
        codes = np.where((codes > last) & (codes <= max(CLASSES)), last, codes)
        merged = published.class_map("flair-land-cover", codes, names, GSD_M, SOURCE, path)
        if self.label == "presence":
            kept = [name for code, name in names.items() if self.other or code != last]
            there = [names[code] for code in np.unique(codes).tolist()]
            return published.presence("flair-land-cover", there, kept, side_m, SOURCE)
        return merged if self.other else published.without(merged, (last,))

    def _s2(self, folder: Path, stem: str, index: int) -> Raster:
        path = folder / f"{stem}_data.npy"
        numbers = _window(arrays.npy(path, mapped=True), self.centroids[index], path)
        products = folder / f"{stem}_products.txt"
        time_s = published.days(published.stamps_in(arrays.lines(products), 2, products), products)
        sensor = sensors.get("sentinel-2-l2a").select(published.S2_BANDS)
        raster = published.series(sensor, numbers, time_s, path, listed_in=products)
        if self.clouds is not None:
            masks = folder / f"{stem}_masks.npy"
            held = _window(arrays.npy(masks, mapped=True), self.centroids[index], masks)
            raster = published.clear(raster, held, self.clouds, masks)
        return raster.obs(raster.valid.flatten(1).any(1))


def _window(area: np.ndarray, centre: tuple[int, int], path: Path) -> np.ndarray:
    """The ten rows and columns around ``centre`` of [obs, band, y, x]; 0, which is no data, beyond the edge."""
    if area.ndim != 4:
        raise ValueError(f"{path} holds {area.shape}, expected [date, band, y, x]")
    window = np.zeros((*area.shape[:2], S2_PX, S2_PX), area.dtype)
    first = [at - S2_PX // 2 for at in centre]
    inside = [slice(max(f, 0), max(0, min(f + S2_PX, n))) for f, n in zip(first, area.shape[2:], strict=True)]
    target = [slice(s.start - f, s.stop - f) for s, f in zip(inside, first, strict=True)]
    if any(s.stop <= s.start for s in inside):
        raise ValueError(f"{path} of {area.shape[2:]} pixels does not hold the place at row and column {centre}")
    window[:, :, target[0], target[1]] = area[:, :, inside[0], inside[1]]
    return window


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    label: str = "map",
    classes: int = 13,
    other: bool = False,
    clouds: float | None = None,
    crop: str = "whole",
) -> Flair:
    """FLAIR #2 (``""`` or ``"2"``) or #1 (``"1"``, whose test has other domains and no Sentinel-2).

    Args:
        root: the folder that holds ``flair_aerial_train`` and the others.
        split: ``train`` and ``val``, the official 32 and 8 domains, or ``test``.
        modalities: of ``aerial-flair`` and ``s2``; all that the variant has by default.
        label: ``map`` (0.2 m), ``presence`` of each class in the place, or empty for none.
        classes: 13 (the classes from swimming pool on as one, ``other``) or all 19.
        other: whether the last class, ``other``, counts. The official metric leaves it out.
        clouds: leave out Sentinel-2 pixels whose probability of snow or cloud exceeds this, 0-1; None keeps them.
        crop: ``whole`` (102.4 m) or ``centre`` (the 100 m of the Sentinel-2 pixels) of photograph and label.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, or an argument is unknown.
    """
    edition = VARIANTS[published.one_of(variant, VARIANTS, "variant")]
    published.one_of(split, SPLITS, "split")
    published.one_of(crop, ("whole", "centre"), "crop")
    if label:
        published.one_of(label, ("map", "presence"), "label")
    if classes not in (len(MERGED), len(CLASSES)):
        raise ValueError(f"classes={classes} must be {len(MERGED)} or {len(CLASSES)}")
    has_s2 = edition == "flair_2" or split != "test"
    known = LAYERS[:-1] if has_s2 else LAYERS[:1]
    layers = published.layers_of(modalities, known, known)
    folders = {
        kind: f"{edition}_{kind}_test" if split == "test" else f"flair_{kind}_train"
        for kind in ("aerial", "labels", "sen")
    }
    needed = [folders["aerial"], *([folders["labels"]] if label else [])]
    needed += [folders["sen"], CENTROIDS] if "s2" in layers else []
    base = published.folder(root, "FLAIR", needed, SOURCE)
    images = _images(base / folders["aerial"], split, base / folders["labels"] if label else None)
    centroids = _centroids(base / CENTROIDS, images) if "s2" in layers else ()
    return Flair(base, tuple(folders.items()), images, centroids, layers, label, classes, other, clouds, crop)


def _images(folder: Path, split: str, labels: Path | None) -> tuple[str, ...]:
    """Paths of the photographs of a split below ``folder``, sorted; an error when one is there without its label, or not there."""
    found = _below(folder, split, "img/IMG_*.tif")
    if labels is not None:
        masks = {mask.replace("/msk/MSK_", "/img/IMG_") for mask in _below(labels, split, "msk/MSK_*.tif")}
        for odd in sorted(masks ^ set(found)):
            path = folder / odd if odd in masks else labels / odd.replace("/img/IMG_", "/msk/MSK_")
            raise FileNotFoundError(f"{path} is missing, its counterpart is there. Fetch it again")
    if not found:
        wanted = f"one of {', '.join(VAL_DOMAINS)}" if split == "val" else "a domain of this split"
        raise FileNotFoundError(f"{folder} holds no <domain>/<area>/img/IMG_*.tif of {wanted}, for split={split!r}")
    return found


def _below(folder: Path, split: str, pattern: str) -> tuple[str, ...]:
    """Files of a split that match ``<domain>/<area>/`` and the pattern, relative to ``folder``, sorted."""
    domains = sorted(d for d in folder.iterdir() if d.is_dir())
    mine = [d for d in domains if split == "test" or (d.name.split("_")[0] in VAL_DOMAINS) == (split == "val")]
    return tuple(p.relative_to(folder).as_posix() for d in mine for p in sorted(d.glob(f"*/{pattern}")))


def _centroids(path: Path, images: Sequence[str]) -> tuple[tuple[int, int], ...]:
    known: Mapping[str, Sequence[int]] = arrays.parsed(path)
    found = []
    for image in images:
        if (name := image.rsplit("/", 1)[1]) not in known:
            raise ValueError(f"{path} has no entry for {name}: it is of another edition. Fetch this file again")
        found.append((int(known[name][0]), int(known[name][1])))
    return tuple(found)


def fake(folder: Path, *, places: int = 4, seed: int = 0) -> None:
    """A synthetic set in the published layout (noise, no measurement): areas of three places, domains of every part."""
    rng = np.random.default_rng(seed)
    centroids: dict[str, list[int]] = {}
    areas = (
        ("D006_2020/Z1_NN", "flair_{}_train"), ("D004_2021/Z3_AU", "flair_{}_train"),
        ("D015_2020/Z2_UF", "flair_2_{}_test"), ("D012_2019/Z5_UU", "flair_1_{}_test"),
    )  # fmt: skip
    for i in range(max(places, len(areas))):
        area, pattern = areas[i % len(areas)]
        name, corner = f"IMG_{i + 1:06d}.tif", (873782.4 + 102.4 * i, 6891028.8)
        photo = rng.integers(0, 256, (5, SIDE_PX, SIDE_PX)).astype(np.uint8)
        path = folder / pattern.format("aerial") / area / "img" / name
        arrays.write_tiff(path, photo, crs="EPSG:2154", corner=corner, gsd_m=GSD_M)
        codes = np.kron(rng.integers(1, 20, (16, 16)), np.ones((32, 32)))[None].astype(np.uint8)
        path = folder / pattern.format("labels") / area / "msk" / name.replace("IMG", "MSK")
        arrays.write_tiff(path, codes, crs="EPSG:2154", corner=corner, gsd_m=GSD_M)
        if not pattern.startswith("flair_1"):
            centroids[name] = [(4, 12, 30)[i // len(areas) % 3], 9]  # the first window leaves the array in the north
            _fake_series(rng, folder / pattern.format("sen") / area / "sen", area)
    arrays.write_json(folder / CENTROIDS, centroids)


def _fake_series(rng: np.random.Generator, folder: Path, area: str) -> None:
    stem = folder / f"SEN2_sp_{area.replace('/', '-')}"
    numbers = rng.integers(100, 9000, (4, 10, 40, 36)).astype(np.uint16)
    numbers[1] = 0
    arrays.write_npy(stem.with_name(f"{stem.name}_data.npy"), numbers)
    masks = rng.choice([0, 20, 90], (4, 2, 40, 36)).astype(np.uint8)
    arrays.write_npy(stem.with_name(f"{stem.name}_masks.npy"), masks)
    days = [f"2021{month:02d}15T105021" for month in (1, 4, 7, 10)]
    text = "".join(f"S2A_MSIL2A_{day}_N0300_R051_T31UDP_{day}\n" for day in days)
    arrays.write_text(stem.with_name(f"{stem.name}_products.txt"), text)
