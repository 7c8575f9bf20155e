"""Pairs of colour images of one place, before and after, and what has changed: LEVIR-CD, DSIFN-CD and two pairs of Beijing.

Chen and Shi 2020 (LEVIR-CD, doi:10.3390/rs12101662), Zhang et al. 2020 (DSIFN, doi:10.1016/j.isprsjprs.2020.06.003), Sun et al. 2021 (Beijing, doi:10.1109/TGRS.2021.3053571).
Imagery for research alone. Layout, under ``root``::

    levir_samples/{A,B,label}/<split>_<scene>_<row>_<column>.png    256 px of 0.5 m; new and gone buildings
    dsifn_samples/{A,B,label}/<image>_<part>.png                    256 px of 2 m; all changes; 255 in the label is changed
    heterogeneous/beijing_{A,B}_{1,2,gt}.jpg                        500 px; new buildings; the label is a JPEG, cut at 128

Full sets have ``A``, ``B`` and ``label`` in a folder of their own, which ``root`` may be. A picture without a label, such as the
transparent ``test_113_0256.png`` among the samples of LEVIR-CD, is no pair. Dates are not published: the layers ``before`` and ``after``
are undated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from everysat import sensors
from everysat.data import points, published, tiling
from everysat.io import archives, pictures
from everysat.types import Batch, Place

LICENCE = "imagery for research use only; samples from repositories under MIT (ChangeFormer) and Apache-2.0 (INLPG)"
SOURCE = "https://github.com/wgcban/ChangeFormer, https://github.com/yulisun/INLPG"
SPLITS = ("train", "val", "test")
LAYERS = ("before", "after", "label")
FOLDERS = {"levir": "levir_samples", "dsifn": "dsifn_samples", "beijing": "heterogeneous"}
GSD_M = {"levir": 0.5, "dsifn": 2.0, "beijing": 1.0}
CLASSES = {0: "unchanged", 1: "changed"}
CHANGED = 128
_LEVIR = re.compile(r"^(?P<split>train|val|test)_\d+")
_DSIFN = re.compile(r"^(?P<image>\d+)_\d+$")


@dataclass(frozen=True)
class Pairs:
    """See :func:`build`. ``files`` are the paths of before, after and label of each place; ``corners`` of its tiles."""

    root: Path
    variant: str
    split: str
    files: tuple[tuple[str, str, str], ...]
    layers: tuple[str, ...]
    gsd_m: float
    tile_px: int | None
    corners: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.files) * len(self.corners)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        pair, tile = divmod(index, len(self.corners))
        paths = dict(zip(LAYERS, (self.root / name for name in self.files[pair]), strict=True))
        held = {name: pictures.picture(path, 1 if name == "label" else 3) for name, path in paths.items()}
        if len(sizes := {values.shape[1:] for values in held.values()}) > 1:
            raise ValueError(f"{paths['before']} and its pair and label differ in size: {sorted(sizes)}")
        if self.tile_px:
            (row, column), side = self.corners[tile], self.tile_px
            held = {name: v[:, row : row + side, column : column + side] for name, v in held.items()}
            if held["label"].shape[1:] != (side, side):
                raise ValueError(f"{paths['before']} is smaller than the first image; leave it out, or lower tile_px")
        table = sensors.get("rgb-image")
        layers = {name: published.image(table, held[name], paths[name], self.gsd_m) for name in self.layers}
        codes = (held["label"][0] >= CHANGED).astype(np.int64)
        layers["label"] = published.class_map("change", codes, CLASSES, self.gsd_m, SOURCE, paths["label"])
        height, width = codes.shape
        return Batch((Place(height * self.gsd_m, width * self.gsd_m),), layers)

    def fingerprint(self) -> str:
        return published.fingerprint(self)


def build(
    variant: str = "levir",
    *,
    root: str | Path,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    tile_px: int | None = None,
    gsd_m: float | None = None,
    by: str = "",
) -> Pairs:
    """Pairs of images in digital numbers, ``before`` and ``after``, and ``label``: a pixel has changed or not.

    Args:
        variant: ``levir``, ``dsifn`` or ``beijing``.
        root: the folder of the layout above, or one that holds ``A``, ``B`` and ``label``.
        split: of ``levir`` the official ``train``, ``val`` and ``test``; of ``dsifn`` by images, in folds; of ``beijing`` pair A is ``train`` and
            pair B ``test``. ``all`` is everything.
        modalities: ``before`` or ``after`` alone, to see what one image gives away.
        fold, folds, seed: of ``dsifn``: which of the folds of images is the test; the next is ``val``.
        by: ``scenes``: ``levir`` too is split by folds, of the scenes that its files are cut from, as fits a few samples of it.
        tile_px: side of the tiles that images are cut into; whole images by default.
        gsd_m: side of a pixel, metres; that of Beijing is not published, and 1 is a name for it.

    Raises:
        FileNotFoundError, LookupError, ValueError: the data are not there, do not fit, or an argument is unknown.
    """
    variant = published.one_of(variant or "levir", FOLDERS, "variant")
    published.one_of(split, (*SPLITS, points.EVERY), "split")
    published.one_of(by, ("", "scenes"), "by")
    layers = published.layers_of(modalities, LAYERS[:2], LAYERS[:2])
    base = published.folder(root, f"change_pairs/{variant}", (), SOURCE)
    base = base / FOLDERS[variant] if (base / FOLDERS[variant]).is_dir() else base
    files = _beijing(base) if variant == "beijing" else _paired(base)
    chosen = _chosen(variant, base, [names[0] for names in files], split, (fold, folds, seed), bool(by))
    if not chosen:
        raise ValueError(f"{base} has no pair of split={split!r}; it has {', '.join(Path(f[0]).stem for f in files)}")
    files = [files[i] for i in chosen]
    corners = [(0, 0)]
    if tile_px is not None:
        shape = pictures.picture(base / files[0][0]).shape
        corners = tiling.corners((shape[1], shape[2]), tile_px, tile_px)
    return Pairs(base, variant, split, tuple(files), layers, gsd_m or GSD_M[variant], tile_px, tuple(corners))


def _paired(base: Path) -> list[tuple[str, str, str]]:
    """Paths of pairs that have a label, which is what says that they are one."""
    labels = sorted(path.name for path in (base / "label").glob("*.png"))
    if not labels:
        raise published.absent(base, "label/*.png", "change_pairs", SOURCE)
    return [(f"A/{name}", f"B/{name}", f"label/{name}") for name in labels]


def _beijing(base: Path) -> list[tuple[str, str, str]]:
    found = sorted(path.name[: -len("_gt.jpg")] for path in base.glob("beijing_*_gt.jpg"))
    if not found:
        raise published.absent(base, "beijing_A_gt.jpg", "change_pairs", SOURCE)
    return [(f"{name}_1.jpg", f"{name}_2.jpg", f"{name}_gt.jpg") for name in found]


def _chosen(
    variant: str, base: Path, names: Sequence[str], split: str, folds: tuple[int, int, int], scenes: bool
) -> list[int]:
    """Indices of the pairs of a split, by the names of their files."""
    if split == points.EVERY:
        return list(range(len(names)))
    stems = [Path(name).stem for name in names]
    if variant == "beijing":
        wanted = {"train": "beijing_A_1", "test": "beijing_B_1"}.get(split)
        return [i for i, stem in enumerate(stems) if stem == wanted]
    known = _LEVIR if variant == "levir" else _DSIFN
    matches = [known.match(stem) for stem in stems]
    for stem, match in zip(stems, matches, strict=True):
        if match is None:
            raise ValueError(
                f"{base}: the name {stem!r} does not tell its split; expected {known.pattern}, or take split='all'"
            )
    of = [match[1] for match in matches if match is not None]
    if variant == "levir" and scenes:
        of = [match[0] for match in matches if match is not None]
    elif variant == "levir":
        return [i for i, part in enumerate(of) if part == split]
    return points.held_out(of, split, *folds).tolist()


def fake(folder: Path, *, places: int = 2, side_px: int = 32, seed: int = 0) -> None:
    """A synthetic set in the layout above (noise, no measurement), ``places`` in each split of LEVIR-CD and three images of DSIFN-CD."""
    rng = np.random.default_rng(seed)
    names = [f"{FOLDERS['levir']}/{{}}/{s}_{i + 3}_0256_0512.png" for s in SPLITS for i in range(places)]
    names += [f"{FOLDERS['dsifn']}/{{}}/{i}_{part}.png" for i in range(3) for part in range(places)]
    for name in names:
        for part in ("A", "B"):
            archives.write_png(folder / name.format(part), rng.integers(0, 256, (3, side_px, side_px), dtype=np.uint8))
        changed = np.zeros((1, side_px, side_px), np.uint8)
        changed[:, 4 : 4 + rng.integers(4, 20), 6 : 6 + rng.integers(4, 20)] = 255
        archives.write_png(folder / name.format("label"), changed)
    for name in "AB":
        for part, count in (("1", 3), ("2", 3), ("gt", 1)):
            values = np.kron(rng.integers(0, 2, (count, 5, 5)) * 255, np.ones((1, 7, 7))).astype(np.uint8)
            pictures.write_jpeg(folder / FOLDERS["beijing"] / f"beijing_{name}_{part}.jpg", values)
