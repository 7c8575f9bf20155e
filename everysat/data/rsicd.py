"""RSICD and AID: scenes of 30 kinds seen from above, each with five sentences about it.

Lu et al. 2018 (captions, doi:10.1109/TGRS.2017.2776321), Xia et al. 2017 (scenes, doi:10.1109/TGRS.2017.2685945), joined by name. For research alone:
the images are of Google Earth, and nothing that is made of them may be given away, no weights either.

Layout, under ``root``::

    captions.jsonl                    file, label, split (train, valid or test), captions [5], an object a line
    images/<label>/<name>.jpg         red, green, blue

Images of AID have pixels of 0.5 to 8 m, which the files do not tell, and are made smaller by four here, so ``gsd_m`` is a name for it. Half of the
scenes have the same sentence five times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everysat import sensors
from everysat.data import published
from everysat.io import arrays, pictures
from everysat.io.plane import unreadable
from everysat.types import Batch, Layer, Place, Text

LICENCE = (
    "none given; imagery of Google Earth, for research use only: never redistribute images or weights made from them"
)
SOURCE = "https://github.com/201528014227051/RSICD_optimal; AID: https://captain-whu.github.io/AID"
SPLITS = ("train", "val")
LAYERS = ("rgb", "label")
VARIANTS = ("", "captions")
STORED = {"train": "train", "val": "valid", "test": "test"}
LISTING = "captions.jsonl"
CLASSES = (
    "Airport", "BareLand", "BaseballField", "Beach", "Bridge", "Center", "Church", "Commercial", "DenseResidential", "Desert", "Farmland",
    "Forest", "Industrial", "Meadow", "MediumResidential", "Mountain", "Park", "Parking", "Playground", "Pond", "Port", "RailwayStation",
    "Resort", "River", "School", "SparseResidential", "Square", "Stadium", "StorageTanks", "Viaduct",
)  # fmt: skip
GSD_M = 2.0


@dataclass(frozen=True)
class Scenes:
    """See :func:`build`. ``files`` below ``root``, their ``labels``, and what is said about each."""

    root: Path
    split: str
    files: tuple[str, ...]
    labels: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    gsd_m: float

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        path = self.root / self.files[index]
        rgb = published.image(sensors.get("rgb-image"), pictures.picture(path), path, self.gsd_m)
        height_m, width_m = (pixels * self.gsd_m for pixels in rgb.values.shape[2:])
        code = np.array([[CLASSES.index(self.labels[index])]])
        label = published.class_map("aid-scenes", code, dict(enumerate(CLASSES)), max(height_m, width_m), SOURCE, path)
        layers: dict[str, Layer] = {"rgb": rgb, "label": label}
        if self.captions:
            said = self.captions[index]
            layers["captions"] = Text(said, ("caption",) * len(said), torch.zeros(len(said), dtype=torch.int64))
        return Batch((Place(height_m, width_m),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)

    @property
    def codes(self) -> np.ndarray:
        """The class of each place."""
        return np.array([CLASSES.index(label) for label in self.labels])


def build(
    variant: str = "",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    gsd_m: float = GSD_M,
) -> Scenes:
    """Scenes: ``rgb`` in digital numbers, ``label`` the kind of scene; with ``variant="captions"`` also the text layer ``captions``.

    Args:
        variant: ``""`` or ``captions``.
        root: the folder that holds ``captions.jsonl``.
        split: ``train`` or ``val``, which is ``valid`` in the file; ``test`` where the file lists one.
        gsd_m: side of a pixel in metres, which is not known.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    published.one_of(variant, VARIANTS, "variant")
    published.one_of(split, STORED, "split")
    published.layers_of(modalities, LAYERS[:1], LAYERS[:1])
    base = published.folder(root, "rsicd", (LISTING,), SOURCE)
    rows = [row for row in _listed(base / LISTING) if row["split"] == STORED[split]]
    if not rows:
        raise ValueError(f"{base / LISTING} lists no scene of split={split!r}")
    told = tuple(tuple(row["captions"]) for row in rows) if variant else ()
    return Scenes(base, split, tuple(row["file"] for row in rows), tuple(row["label"] for row in rows), told, gsd_m)


def _listed(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(arrays.lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise unreadable(str(path), ValueError(f"line {number}: {error}")) from error
        if missing := [key for key in ("file", "label", "split", "captions") if key not in row]:
            raise ValueError(f"{path}, line {number}: lacks {missing[0]!r}")
        if row["label"] not in CLASSES:
            raise ValueError(f"{path}, line {number}: {row['label']!r} is none of the {len(CLASSES)} kinds of scenes")
        rows.append(row)
    return rows


def fake(folder: Path, *, places: int = 3, side_px: int = 24, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split."""
    rng = np.random.default_rng(seed)
    lines = []
    for split in ("train", "valid"):
        for i in range(places):
            label = CLASSES[7 * i % len(CLASSES)]
            name = f"images/{label}/{label.lower()}_{split}_{i}.jpg"
            pictures.write_jpeg(folder / name, rng.integers(0, 256, (3, side_px, side_px), dtype=np.uint8))
            said = [f"sentence {n} about a {label.lower()} ." for n in range(5)]
            lines.append(json.dumps({"file": name, "label": label, "split": split, "captions": said}))
    arrays.write_text(folder / LISTING, "\n".join([*lines, ""]))
