"""Tiles of your own rasters, with labels from your own polygons if you have some.

The files are opened as :func:`everysat.io.read.open_scene` does; each item is a square of the scene with all its layers, and a
``label`` layer where polygons are given. Larger tiles with ``augment.crop_m`` in the recipe give random crops.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everysat.data.augment import crop
from everysat.data.split import label_fraction, spatial_blocks
from everysat.find import suggest
from everysat.io import grid, vector
from everysat.io.read import open_scene
from everysat.io.read import place as place_of
from everysat.io.scene import Scene
from everysat.nn.draws import stream
from everysat.types import Batch, Place, Raster

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".img", ".nc", ".zarr")
IN_MEMORY_BYTES = 2e9
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Tiles:
    """See :func:`build`. ``corners`` int64 [tile, 2] are the first row and column of each tile, in pixels of the scene;
    ``whole`` the scene in memory, if it fits."""

    scene: Scene
    corners: np.ndarray
    pixels: int
    label: str
    labels: Raster | None
    whole: Batch | None

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} tiles")
        row, column = self.corners[index].tolist()
        window = (slice(row, row + self.pixels), slice(column, column + self.pixels))
        batch = self.scene.read(window) if self.whole is None else self._cut(self.whole, row, column)
        if self.labels is not None:
            batch = batch.adding(**{self.label: self.label_at(row, column)})
        return replace(batch, places=(grid.place_of(grid.crop(self.scene.geobox, *window)),))

    def footprints(self) -> list[Any]:
        """Outline of each tile in the CRS of the scene, for :func:`everysat.data.split.leaks`."""
        n = self.pixels
        return [self.scene.geobox[r : r + n, c : c + n].extent.geom for r, c in self.corners.tolist()]

    def label_at(self, row: int, column: int) -> Raster:
        """The label layer in the tile of that corner."""
        assert self.labels is not None
        return self._cut(Batch((self.scene.place,), {self.label: self.labels}), row, column).raster(self.label)

    def _cut(self, batch: Batch, row: int, column: int) -> Batch:
        gsd = grid.gsd_m(self.scene.geobox)
        return crop(batch, row * gsd, column * gsd, self.pixels * gsd, self.pixels * gsd)


def build(
    variant: str = "",
    *,
    files: str | Path | Sequence[str | Path],
    tile_m: float,
    stride_m: float | None = None,
    place: Any = None,
    labels: str | Path | None = None,
    column: str = "",
    classes: Mapping[str, int] | Sequence[str] | None = None,
    label: str = "label",
    label_gsd_m: float | None = None,
    part: str = "",
    block_m: float | None = None,
    shares: Mapping[str, float] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    min_valid: float = 0.0,
    memory: bool | None = None,
    **reading: Any,
) -> Tiles:
    """Tiles of a scene.

    Args:
        files: rasters, a folder of them, or patterns such as ``scene/*.jp2``.
        tile_m, stride_m: side of a tile, and from one to the next (a side), metres; multiples of the coarsest pixel. What is
            left at the south and east edge and does not make a whole tile is not used.
        place: a part of the scene, as :func:`everysat.place` takes it.
        labels, column, classes: file of polygons, its attribute with the class, and the classes in the order of their codes
            (all, sorted, if not given). Only tiles with a labelled pixel are then used.
        label, label_gsd_m: name of the layer and its pixel (that of the scene).
        part, block_m, shares: only the tiles of one part (``train``, ``val`` or ``test``) of a split by blocks of ground of
            that side; ``shares`` names parts and their sizes. A polygon labels pixels in one part alone, that with most of it.
        fraction: of the labelled polygons of each class (of this part) to keep, at least one of each.
        seed: of the split and of the fraction.
        min_valid: tiles with a smaller share of valid values, over all layers, are left out.
        memory: hold the scene in memory; by default if it takes less than 2 GB.
        reading: further arguments of :func:`everysat.read`, such as ``sensor``, ``times``, ``bands``, ``names``, ``valid``.

    Raises:
        FileNotFoundError, ValueError: nothing to read, sizes that cut pixels, no tile left; the message says which.
    """
    if variant:
        raise LookupError(f"scene has no variants; got {variant!r}")
    where = None if place is None else place_of(place)
    scene = open_scene(listed(files), place=where, **reading)
    side, stride = (_pixels(scene, m, n) for m, n in ((tile_m, "tile_m"), (stride_m or tile_m, "stride_m")))
    corners = _corners(scene, side, stride)
    if part:
        if stride < side:
            raise ValueError(f"stride_m={stride_m} is below tile_m={tile_m}: tiles of different parts would overlap")
        parts = _parts(corners, scene, side, part, block_m, shares or SHARES, seed)
    else:
        parts = {part: corners}
    corners = parts[part]
    whole = scene.read() if (_bytes(scene) < IN_MEMORY_BYTES if memory is None else memory) else None
    burned = None
    if labels is not None:
        if not column:
            raise ValueError("column is missing: which attribute of the polygons holds the class?")
        base = grid.gsd_m(scene.geobox) if label_gsd_m is None else label_gsd_m
        burned, ids = vector.rasterize(labels, scene.place, column, classes, gsd_m=base)
        pick = stream(seed, "labels")
        burned, corners = _kept_labels(
            Tiles(scene, corners, side, label, burned, None), ids, parts, part, fraction, pick
        )
    tiles = Tiles(scene, corners, side, label, burned, whole)
    if min_valid:
        tiles = replace(tiles, corners=corners[[_valid_share(tiles[i], label) >= min_valid for i in range(len(tiles))]])
    if not len(tiles):
        raise ValueError(
            f"no tile of {tile_m:g} m is left: the scene has {scene.shape} pixels; lower tile_m or min_valid, or see "
            "whether the labels lie in the scene"
        )
    return tiles


def listed(files: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths of rasters: folders and patterns become what is in them, sorted; the rest stays."""
    found: list[str] = []
    for entry in [files] if isinstance(files, str | Path) else files:
        if Path(entry).is_dir() and not str(entry).endswith(".zarr"):
            inside = sorted(str(f) for f in Path(entry).iterdir() if f.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"the folder {entry} holds no raster ({', '.join(SUFFIXES)})")
            found += inside
        elif any(sign in str(entry) for sign in "*?[") and not Path(entry).exists():
            matching = sorted(glob.glob(str(entry)))
            if not matching:
                raise FileNotFoundError(f"no file matches {entry}")
            found += matching
        else:
            found.append(str(entry))
    return found


def _pixels(scene: Scene, metres: float, name: str) -> int:
    gsd = grid.gsd_m(scene.geobox)
    exact = metres / gsd
    if abs(exact - round(exact)) > 1e-3 or round(exact) < 1 or round(exact) % scene.step:
        raise ValueError(
            f"{name}={metres:g} must be a multiple of {scene.step * gsd:g} m, so that no pixel of a layer is cut"
        )
    return round(exact)


def _corners(scene: Scene, side: int, stride: int) -> np.ndarray:
    rows, columns = (np.arange(0, size - side + 1, stride) for size in scene.shape)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def _parts(
    corners: np.ndarray,
    scene: Scene,
    side: int,
    part: str,
    block_m: float | None,
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, np.ndarray]:
    if part not in shares:
        raise ValueError(f"part={part!r} is none of the parts. {suggest(part, shares)}")
    if block_m is None:
        raise ValueError("block_m is missing: the side of the blocks that a part is made of, metres")
    centres_m = (corners + side / 2) * grid.gsd_m(scene.geobox)
    split = spatial_blocks(centres_m, block_m, shares, stream(seed, "split"))
    return {name: corners[index] for name, index in split.items()}


def _kept_labels(
    tiles: Tiles, ids: Tensor, parts: Mapping[str, np.ndarray], part: str, fraction: float, rng: np.random.Generator
) -> tuple[Raster, np.ndarray]:
    """The labels of the polygons that belong to ``part``, a fraction of them, and the corners of tiles that have any."""
    assert tiles.labels is not None
    numbered = replace(tiles, labels=_numbered(tiles.labels, ids))
    of_tiles = {name: _polygons(replace(numbered, corners=corners)) for name, corners in parts.items()}
    kept = _some_polygons(_owned(of_tiles, part), tiles.labels, ids, fraction, rng)
    some = [bool(torch.isin(mine, kept).any()) for mine, _ in of_tiles[part]]
    valid = tiles.labels.valid & torch.isin(ids, kept)[None, None]
    return replace(tiles.labels, valid=valid), parts[part][some]


def _numbered(burned: Raster, ids: Tensor) -> Raster:
    """The label layer with the number of the polygon in place of its class (float64 holds every int that can come)."""
    return replace(burned, values=ids[None, None].double())


def _polygons(numbered: Tiles) -> list[tuple[Tensor, Tensor]]:
    """Of each tile, the numbers of the polygons in it and how many pixels each has there."""
    rasters = (numbered.label_at(*corner) for corner in numbered.corners.tolist())
    return [r.values[r.valid].long().unique(return_counts=True) for r in rasters]


def _owned(of_tiles: Mapping[str, list[tuple[Tensor, Tensor]]], part: str) -> Tensor:
    """Numbers of the polygons that have more pixels in the tiles of ``part`` than in those of any other."""
    nothing = torch.zeros(0, dtype=torch.long)
    most = 1 + max((int(i.max()) for tiles in of_tiles.values() for i, _ in tiles if len(i)), default=-1)
    pixels = {
        name: torch.zeros(most, dtype=torch.long).index_add(
            0, torch.cat([nothing, *(i for i, _ in tiles)]), torch.cat([nothing, *(c for _, c in tiles)])
        )
        for name, tiles in of_tiles.items()
    }
    counts, names = torch.stack(list(pixels.values())), list(pixels)
    return torch.nonzero((counts.argmax(0) == names.index(part)) & (counts.sum(0) > 0)).flatten()


def _some_polygons(own: Tensor, burned: Raster, ids: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Of the polygons ``own``, ``fraction`` of each class."""
    if fraction == 1 or not len(own):
        return own
    first = torch.stack([torch.nonzero(ids.flatten() == i)[0, 0] for i in own])
    codes = burned.values.flatten()[first].numpy()
    return own[torch.from_numpy(label_fraction(codes, fraction, rng))]


def _valid_share(batch: Batch, label: str) -> float:
    layers = [layer.valid for name, layer in batch.layers.items() if name != label and isinstance(layer, Raster)]
    return sum(float(v.sum()) for v in layers) / max(1, sum(v.numel() for v in layers))


def _bytes(scene: Scene) -> float:
    """Memory of the whole scene: float32 values and a byte of validity each."""
    extent: Place = scene.place
    per_layer = (
        len(layer.times) * len(layer.sensor.bands) * extent.height_m * extent.width_m / layer.gsd_m**2
        for layer in scene.layers.values()
    )
    return 5.0 * math.fsum(per_layer)
