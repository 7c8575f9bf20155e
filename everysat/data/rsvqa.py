"""RSVQA: questions about images and their answers, of Sentinel-2 at 10 m (LR: 772 images) and of aerial photographs at 0.15 m (HR: 10 659).

Lobry et al. 2020 (doi:10.1109/TGRS.2020.2988782). Questions and answers are made from OpenStreetMap, about a hundred an image.

Layout, under ``root``, ``<part>`` being ``train``, ``val`` or ``test``, for HR also ``test_phili``, which is of a city that ``train`` has not::

    LR: LR_split_<part>_images.json, LR_split_<part>_questions.json, LR_split_<part>_answers.json, Images_LR/<id>.tif
    HR: USGS_split_<part>_images.json, ..., Data/<id>.tif

    images.json       {"images": [{"id": 0, "active": true, "questions_ids": [0, 1, ...]}, {"id": 1, "active": false}, ...]}
    questions.json    {"questions": [{"id": 0, "img_id": 0, "type": "presence", "question": "...", "answers_ids": [0], "active": true}, ...]}
    answers.json      {"answers": [{"id": 0, "question_id": 0, "answer": "yes", "active": true}, ...]}

Files of a part list the entries of all parts; those of others are not active, and may lack everything but ``id``. Entries are found by ``id``, which in
the published files is also their position.

Taken from programs that read them, not from the files: all of the above, that images are TIFF of three channels of 8 bits, of 256 and 512 pixels,
and the licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everysat import sensors
from everysat.data import published
from everysat.data.captions import said
from everysat.io import arrays, pictures
from everysat.types import Batch, Layer, Place

LICENCE = "CC-BY-4.0"
SOURCE = (
    "https://rsvqa.sylvainlobry.com, https://zenodo.org/records/6344334 (LR), https://zenodo.org/records/6344367 (HR)"
)
SPLITS = ("train", "val", "test")
LAYERS = ("rgb", "questions", "answers", "types")
PARTS = {**{split: split for split in SPLITS}, "test-phili": "test_phili"}
TEXTS = {"questions": "question", "answers": "answer", "types": "type"}
"""The role of each text layer."""


@dataclass(frozen=True)
class Edition:
    """What the names of its lists begin with, the folders of images that are in use, its splits, sides of an image and a pixel."""

    prefix: str
    folders: tuple[str, ...]
    splits: tuple[str, ...]
    side_px: int
    gsd_m: float


VARIANTS = {
    "lr": Edition("LR", ("Images_LR", "data"), SPLITS, 256, 10.0),
    "hr": Edition("USGS", ("Data", "Images_HR"), tuple(PARTS), 512, 0.15),
}


@dataclass(frozen=True)
class Asked:
    """An image: its number, and its questions, answers and types of question, one after another."""

    number: int
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Rsvqa:
    """See :func:`build`. ``images`` in the order of the list; ``folder`` below ``root`` holds their files."""

    root: Path
    variant: str
    split: str
    folder: str
    images: tuple[Asked, ...]
    layers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        edition, asked = VARIANTS[self.variant], self.images[index]
        height_m = width_m = edition.side_px * edition.gsd_m
        layers: dict[str, Layer] = {}
        if "rgb" in self.layers:
            path = self.root / self.folder / f"{asked.number}.tif"
            rgb = published.image(sensors.get("rgb-image"), pictures.picture(path), path, edition.gsd_m)
            height_m, width_m = (pixels * edition.gsd_m for pixels in rgb.values.shape[2:])
            layers["rgb"] = rgb
        layers |= {name: said(getattr(asked, name), role) for name, role in TEXTS.items() if name in self.layers}
        return Batch((Place(height_m, width_m),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def build(
    variant: str = "lr",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    types: Sequence[str] | None = None,
) -> Rsvqa:
    """Images ``rgb`` in digital numbers with three text layers in the same order: ``questions``, ``answers`` and ``types``
    (presence, count, comp, ...), whose roles are ``question``, ``answer`` and ``type``.

    Args:
        variant: ``lr`` or ``hr``; ``""`` is ``lr``.
        root: the folder that holds the JSON files and the folder of images.
        split: ``train``, ``val`` or ``test``; of ``hr`` also ``test-phili``.
        modalities: any of :data:`LAYERS`; all by default.
        types: of these types alone; images without any are left out.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "lr", VARIANTS, "variant")
    edition = VARIANTS[variant]
    published.one_of(split, edition.splits, "split")
    layers = published.layers_of(modalities, LAYERS, LAYERS)
    lists = {kind: f"{edition.prefix}_split_{PARTS[split]}_{kind}.json" for kind in ("images", "questions", "answers")}
    base = published.folder(root, f"RSVQA {variant.upper()}", list(lists.values()), SOURCE)
    folder = next((name for name in edition.folders if (base / name).is_dir()), "")
    if "rgb" in layers and not folder:
        raise published.absent(base, edition.folders[0], f"RSVQA {variant.upper()}", SOURCE)
    images = _images({kind: base / name for kind, name in lists.items()}, types)
    return Rsvqa(base, variant, split, folder, images, layers)


def _images(paths: Mapping[str, Path], types: Sequence[str] | None) -> tuple[Asked, ...]:
    held = {kind: _active(path, kind) for kind, path in paths.items()}
    known = {str(q["type"]) for q in held["questions"].values()}
    for name in types or ():
        published.one_of(name, sorted(known), "types")
    # The same few sentences are asked again and again: one string serves for all.
    once: dict[str, str] = {}
    found = []
    for number, image in held["images"].items():
        texts = []
        for key in image["questions_ids"]:
            question = _entry(held["questions"], key, paths["questions"], f"image {number}")
            if types is None or question["type"] in types:
                first = question["answers_ids"][0]
                answer = _entry(held["answers"], first, paths["answers"], f"question {key}")
                row = (str(question["question"]), str(answer["answer"]), str(question["type"]))
                texts.append(tuple(once.setdefault(text, text) for text in row))
        if texts:
            columns = tuple(zip(*texts, strict=True))
            found.append(Asked(int(number), columns[0], columns[1], columns[2]))
    if not found:
        raise ValueError(f"{paths['images']} lists no active image that is asked about")
    return tuple(found)


NEEDED = {
    "images": ("questions_ids",), "questions": ("question", "type", "answers_ids"), "answers": ("answer",),
}  # fmt: skip


def _active(path: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Entries of this part by ``id``."""
    content = arrays.parsed(path)
    rows = content.get(kind) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list {kind!r}. Fetch this file again")
    active = {row["id"]: row for row in rows if row.get("active", True)}
    for number, row in active.items():
        if missing := [key for key in NEEDED[kind] if key not in row]:
            raise ValueError(f"{path}: the entry {number} lacks {missing[0]!r}. Fetch this file again")
    return active


def _entry(rows: Mapping[int, dict[str, Any]], key: int, path: Path, asker: str) -> dict[str, Any]:
    if key not in rows:
        raise ValueError(
            f"{path} has no active entry {key}, which {asker} refers to. Fetch all files of this part again"
        )
    return rows[key]


def fake(folder: Path, variant: str = "lr", *, side_px: int = 64, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement): two images with three questions each in every split."""
    rng = np.random.default_rng(seed)
    edition = VARIANTS[variant]
    count = 2 * len(edition.splits)
    for i in range(count):
        path = folder / edition.folders[0] / f"{i}.tif"
        arrays.write_tiff(path, rng.integers(0, 256, (3, side_px, side_px), dtype=np.uint8))
    for part, split in enumerate(edition.splits):
        content: dict[str, list[dict[str, Any]]] = {"images": [], "questions": [], "answers": []}
        for i in range(count):
            own = i // 2 == part
            keys = [3 * i + n for n in range(3)]
            content["images"].append({"id": i, "active": own} | ({"questions_ids": keys} if own else {}))
            for key, kind in zip(keys, ("presence", "count", "comp"), strict=True):
                text = {"img_id": i, "type": kind, "question": f"What is the {kind} in {i}?", "answers_ids": [key]}
                content["questions"].append({"id": key, "active": own} | (text if own else {}))
                reply = {"question_id": key, "answer": ("yes", str(i), "no")[key % 3]}
                content["answers"].append({"id": key, "active": own} | (reply if own else {}))
        for kind, rows in content.items():
            arrays.write_json(folder / f"{edition.prefix}_split_{PARTS[split]}_{kind}.json", {kind: rows})
