"""Images with five sentences each, as first published: RSICD (10 921 images), RSITMD (4 743) and UCM-Captions (2 100).

Lu et al. 2018 (RSICD, doi:10.1109/TGRS.2017.2776321), Yuan et al. 2021 (RSITMD, doi:10.1109/TGRS.2021.3078451), Qu et al. 2016 (UCM-Captions).

Layout, under ``root``; every JSON file is ``{"images": [{"filename", "split", "sentences": [{"raw": "..."}, ...]}, ...]}``::

    rsicd     dataset_rsicd.json, RSICD_images/*.jpg of 224 x 224 pixels, perhaps txtclasses_rsicd/<class>.txt (names of images)
    rsitmd    dataset_RSITMD.json, images/<class>_<number>.tif of 256 x 256 pixels; no split ``val``
    ucm       dataset.json, imgs/<number>.tif of 256 x 256 pixels, those of a class in a row, 100 of each

The class is that of the list, or what stands before the number in the name of an image; an image without either (RSICD has names like ``00412.jpg``) has
a label that is not valid. UCM-Captions numbers the images of UC Merced: that their classes follow one another in alphabetical order is
taken from its readers.

Taken from programs that read them, not from the files: names of files and folders, sizes, the form of JSON. The pixels of RSICD and RSITMD have sides
of unknown and differing length; ``gsd_m`` is a name for it, and 0.3048 m for UCM-Captions. Many images of RSICD have the same sentence several
times (``distinct``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import sensors
from everysat.data import published, rsicd
from everysat.io import arrays, pictures
from everysat.types import Batch, Layer, Place, Raster, Text

LICENCE = "none given (RSICD, RSITMD: imagery of Google Earth and others, for research); UC Merced imagery is of the USGS, public domain"
SOURCE = "https://github.com/201528014227051/RSICD_optimal, https://github.com/xiaoyuan1996/AMFMN/tree/master/RSITMD"
SPLITS = ("train", "val", "test")
LAYERS = ("rgb", "captions", "label")
UC_MERCED = (
    "agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral", "denseresidential", "forest", "freeway", "golfcourse",
    "harbor", "intersection", "mediumresidential", "mobilehomepark", "overpass", "parkinglot", "river", "runway", "sparseresidential",
    "storagetanks", "tenniscourt",
)  # fmt: skip
CLASSES = {"rsicd": tuple(name.lower() for name in rsicd.CLASSES), "ucm": UC_MERCED}
"""Those of RSITMD are the ones that its list names."""


@dataclass(frozen=True)
class Edition:
    """Names of the list, of the folders of images that are in use, and of the folder of classes; side of an image and of a pixel."""

    listing: str
    folders: tuple[str, ...]
    classes: str
    side_px: int
    gsd_m: float


VARIANTS = {
    "rsicd": Edition("dataset_rsicd.json", ("RSICD_images", "images"), "txtclasses_rsicd", 224, 1.0),
    "rsitmd": Edition("dataset_RSITMD.json", ("images", "RSITMD_images"), "", 256, 1.0),
    "ucm": Edition("dataset.json", ("imgs", "images"), "", 256, 0.3048),
}
_CLASS = re.compile(r"^([A-Za-z].*?)_?\d+$")


@dataclass(frozen=True)
class Captions:
    """See :func:`build`. ``files`` below ``root``, the codes of their ``classes``, -1 for none, and what is said about each."""

    root: Path
    variant: str
    split: str
    files: tuple[str, ...]
    codes: tuple[int, ...]
    sentences: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    layers: tuple[str, ...]
    gsd_m: float

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        path = self.root / self.files[index]
        height_m = width_m = VARIANTS[self.variant].side_px * self.gsd_m
        layers: dict[str, Layer] = {}
        if "rgb" in self.layers:
            rgb = published.image(sensors.get("rgb-image"), pictures.picture(path), path, self.gsd_m)
            height_m, width_m = (pixels * self.gsd_m for pixels in rgb.values.shape[2:])
            layers["rgb"] = rgb
        if "captions" in self.layers:
            layers["captions"] = said(self.sentences[index], "caption")
        layers["label"] = self._label(index, max(height_m, width_m), path)
        return Batch((Place(height_m, width_m),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    def _label(self, index: int, side_m: float, path: Path) -> Raster:
        code = self.codes[index]
        classes = dict(enumerate(self.classes or ("unknown",)))
        label = published.class_map(f"{self.variant}-scenes", np.array([[max(code, 0)]]), classes, side_m, SOURCE, path)
        return label if code >= 0 else replace(label, valid=torch.zeros_like(label.valid))


def said(strings: Sequence[str], role: str) -> Text:
    """A text layer of one place whose strings all have the same role."""
    return Text(tuple(strings), (role,) * len(strings), torch.zeros(len(strings), dtype=torch.int64))


def build(
    variant: str = "rsicd",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    distinct: bool = False,
    gsd_m: float | None = None,
) -> Captions:
    """Images ``rgb`` in digital numbers, the text layer ``captions`` (role ``caption``), and the class of the image as ``label``.

    Args:
        variant: ``rsicd``, ``rsitmd`` or ``ucm``; ``""`` is ``rsicd``.
        root: the folder that holds the JSON file and the folder of images.
        split: ``train``, ``val`` or ``test`` as the JSON file has it; RSITMD has no ``val``.
        modalities: of ``rgb`` and ``captions``; both by default.
        distinct: leave out sentences that an image already has.
        gsd_m: side of a pixel, metres; see above.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "rsicd", VARIANTS, "variant")
    published.one_of(split, SPLITS, "split")
    layers = published.layers_of(modalities, LAYERS[:-1], LAYERS[:-1])
    edition = VARIANTS[variant]
    base = published.folder(root, variant, (edition.listing,), SOURCE)
    folder = next((name for name in edition.folders if (base / name).is_dir()), "")
    if "rgb" in layers and not folder:
        raise published.absent(base, edition.folders[0], variant, SOURCE)
    path = base / edition.listing
    rows = _rows(path)
    own = [row for row in rows if row["split"] == split]
    if not own:
        raise ValueError(
            f"{path} lists no image of split={split!r}; it has {', '.join(sorted({r['split'] for r in rows}))}"
        )
    kinds = _kinds(base, variant, [row["filename"] for row in rows])
    classes = CLASSES.get(variant) or tuple(sorted({kind for kind in kinds.values() if kind}))
    codes = tuple(classes.index(kind) if (kind := kinds[row["filename"]]) in classes else -1 for row in own)
    files = tuple(f"{folder or edition.folders[0]}/{row['filename']}" for row in own)
    sentences = tuple(_sentences(row, distinct, path) for row in own)
    return Captions(base, variant, split, files, codes, sentences, classes, layers, gsd_m or edition.gsd_m)


def _rows(path: Path) -> list[dict[str, Any]]:
    held = arrays.parsed(path)
    rows = held.get("images") if isinstance(held, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path} holds no list "images". Fetch this file again')
    for number, row in enumerate(rows):
        if missing := [key for key in ("filename", "split", "sentences") if key not in row]:
            raise ValueError(f"{path}: image {number} lacks {missing[0]!r}")
    return rows


def _sentences(row: Mapping[str, Any], distinct: bool, path: Path) -> tuple[str, ...]:
    """What is said about an image, less empty strings: some were published."""
    found = [text for sentence in row["sentences"] if (text := str(sentence.get("raw", "")).strip())]
    if not found:
        raise ValueError(f"{path}: {row['filename']} has no sentence. Fetch this file again, or leave the image out")
    return tuple(dict.fromkeys(found)) if distinct else tuple(found)


def _kinds(base: Path, variant: str, names: Sequence[str]) -> dict[str, str]:
    """The class of each image, empty where it is not told."""
    if variant == "ucm":
        return {name: UC_MERCED[_number(name, base / VARIANTS[variant].listing) // 100] for name in names}
    kinds = {}
    for name in names:
        match = _CLASS.match(Path(name).stem)
        kinds[name] = match[1].lower() if match else ""
    lists = base / VARIANTS[variant].classes
    if VARIANTS[variant].classes and lists.is_dir():
        found = {path.stem.lower(): path for path in lists.glob("*.txt")}
        for missing in [kind for kind in CLASSES[variant] if kind not in found]:
            raise FileNotFoundError(
                f"{lists} has no list of the class {missing!r}. Fetch the lists again, or leave all away"
            )
        for kind, path in found.items():
            kinds |= dict.fromkeys(arrays.lines(path), kind)
    return kinds


def _number(name: str, path: Path) -> int:
    stem = Path(name).stem
    if not stem.isdecimal() or not 1 <= int(stem) <= 100 * len(UC_MERCED):
        raise ValueError(f"{path}: {name!r} is not one of 1.tif to {100 * len(UC_MERCED)}.tif, so its class is unknown")
    return int(stem) - 1


def fake(folder: Path, variant: str = "rsicd", *, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), two images in each split."""
    rng = np.random.default_rng(seed)
    edition = VARIANTS[variant]
    names = {
        "rsicd": ("airport_1.jpg", "pond_412.jpg", "viaduct_12.jpg", "beach_3.jpg", "port_7.jpg", "airport_9.jpg"),
        "rsitmd": ("boat_1.tif", "plane_22.tif", "boat_4.tif", "river_3.tif", "plane_5.tif", "river_9.tif"),
        "ucm": ("1.tif", "100.tif", "7.tif", "1542.tif", "2100.tif", "101.tif"),
    }[variant]
    rows = []
    for i, name in enumerate(names):
        path = folder / edition.folders[0] / name
        pixels = rng.integers(0, 256, (3, edition.side_px, edition.side_px), dtype=np.uint8)
        (pictures.write_jpeg if path.suffix == ".jpg" else arrays.write_tiff)(path, pixels)
        texts = [f" Sentence {n // 2 if i % 2 else n} about image {i} . " for n in range(5)]
        raw = [{"raw": text, "tokens": text.split(), "imgid": i, "sentid": 5 * i + n} for n, text in enumerate(texts)]
        split = ("train", "test")[i % 2] if variant == "rsitmd" else SPLITS[i // 2]
        rows.append({"filename": name, "imgid": i, "split": split, "sentences": raw})
    arrays.write_json(folder / edition.listing, {"dataset": variant, "images": rows})
