"""Random changes of a place that keep its layers consistent: flips, quarter turns, crops, and leaving things out.

What is left out becomes invalid or goes away; it is never replaced by zeros. Layers named in ``keep`` (labels), vectors and
texts follow flips, turns and crops and are never left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from everysat.types import Batch, Layer, Place, Raster, Vector

Share = Field(default=0.0, ge=0.0, lt=1.0)


class Augment(BaseModel):
    """What to draw for each place; off unless asked for. ``augment(batch, generator, keep)`` applies it to a batch of one.

    flip, turn: mirror, turn by 0, 90, 180 or 270 degrees.
    crop_m: side of a random square cut out of the place, metres; a multiple of every layer's pixel.
    max_dates: at most so many random dates of each layer, in their order.
    drop_dates, drop_bands, drop_layers: chance of each to be left out; at least one of each stays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    flip: bool = False
    turn: bool = False
    crop_m: float | None = Field(default=None, gt=0)
    max_dates: int | None = Field(default=None, ge=1)
    drop_dates: float = Share
    drop_bands: float = Share
    drop_layers: float = Share

    def __call__(self, batch: Batch, generator: torch.Generator, keep: Collection[str] = ()) -> Batch:
        if len(batch) != 1:
            raise ValueError(f"a batch of {len(batch)} places came; augment places one by one, then Batch.cat them")
        if self.crop_m is not None:
            batch = random_crop(batch, self.crop_m, generator)
        if self.flip and _integer(2, generator):
            batch = flip(batch)
        if self.turn:
            batch = turn(batch, _integer(4, generator))
        return self._leave_out(batch, generator, keep)

    def _leave_out(self, batch: Batch, generator: torch.Generator, keep: Collection[str]) -> Batch:
        inputs = [n for n, layer in batch.layers.items() if isinstance(layer, Raster) and n not in keep]
        if self.drop_layers and inputs:
            stay = _stay(len(inputs), self.drop_layers, generator).tolist()
            batch = batch.without(*(n for n, stays in zip(inputs, stay, strict=True) if not stays))
        changed: dict[str, Layer] = {}
        for name in [n for n in inputs if n in batch.layers]:
            raster = batch.raster(name)
            if self.drop_dates or self.max_dates:
                raster = raster.obs(self._dates(raster.values.shape[0], generator))
            if self.drop_bands:
                stays = _stay(raster.values.shape[1], self.drop_bands, generator)
                raster = replace(raster, valid=raster.valid & stays[None, :, None, None])
            changed[name] = raster
        return replace(batch, layers={**batch.layers, **changed})

    def _dates(self, count: int, generator: torch.Generator) -> Tensor:
        index = torch.arange(count)
        if self.drop_dates and count:
            index = index[_stay(count, self.drop_dates, generator)]
        if self.max_dates and len(index) > self.max_dates:
            index = index[torch.randperm(len(index), generator=generator)[: self.max_dates].sort().values]
        return index


def flip(batch: Batch) -> Batch:
    """Mirrored west-east. The place loses its geobox: its pixels do not lie on the ground that way."""
    _refuse_uneven(batch)
    width_m = batch.places[0].width_m
    return _moved(batch, lambda v: v.flip(-1), (-1, 0, 0, 1, width_m, 0), batch.places[0])


def turn(batch: Batch, quarters: int) -> Batch:
    """Turned counter-clockwise (as seen with north up) by ``quarters`` x 90 degrees; loses the geobox unless that is 0."""
    for _ in range(quarters % 4):
        _refuse_uneven(batch)
        old = batch.places[0]
        new = replace(old, height_m=old.width_m, width_m=old.height_m)
        batch = _moved(batch, lambda v: v.rot90(1, (-2, -1)), (0, 1, -1, 0, 0, old.width_m), new)
    return batch


def random_crop(batch: Batch, size_m: float, generator: torch.Generator) -> Batch:
    """A square of ``size_m`` metres at a random position where all layers' pixels begin. One-pixel layers stay whole."""
    place, step = batch.places[0], _common_pixel_m(batch)
    if size_m > min(place.height_m, place.width_m) + 1e-6:
        raise ValueError(
            f"crop_m={size_m:g} is larger than the place, {place.height_m:g} x {place.width_m:g} m; lower it"
        )
    free = [math.floor((extent - size_m) / step + 1e-6) for extent in (place.height_m, place.width_m)]
    south_m, east_m = (step * _integer(1 + cells, generator) for cells in free)
    return crop(batch, south_m, east_m, size_m, size_m)


def crop(batch: Batch, south_m: float, east_m: float, height_m: float, width_m: float) -> Batch:
    """The rectangle whose north-west corner lies ``south_m`` and ``east_m`` metres from that of the place.

    Raises:
        ValueError: a layer's pixels do not begin and end at the edges of the rectangle.
    """
    place = batch.places[0]
    layers: dict[str, Layer] = {}
    for name, layer in batch.layers.items():
        if isinstance(layer, Raster) and not _is_whole(layer):
            bounds = [_pixels(m, layer, name) for m in (south_m, south_m + height_m, east_m, east_m + width_m)]
            rows, columns = slice(*bounds[:2]), slice(*bounds[2:])
            layers[name] = _on_grids(layer, itemgetter((..., rows, columns)))
        elif isinstance(layer, Vector):
            layers[name] = _clipped(layer, south_m, east_m, height_m, width_m)
        else:
            layers[name] = layer
    return Batch((_cropped_place(place, south_m, east_m, height_m, width_m),), layers)


def _moved(batch: Batch, grids: Callable[[Tensor], Tensor], affine: tuple[float, ...], place: Place) -> Batch:
    """All rasters by ``grids``, all geometries by shapely's ``affine`` (in metres east and south), onto ``place``."""
    layers: dict[str, Layer] = {}
    for name, layer in batch.layers.items():
        if isinstance(layer, Raster):
            layers[name] = _on_grids(layer, grids)
        elif isinstance(layer, Vector):
            from shapely.affinity import affine_transform

            layers[name] = replace(layer, geometry=tuple(affine_transform(g, affine) for g in layer.geometry))
        else:
            layers[name] = layer
    return Batch((replace(place, geobox=None),), layers)


def _on_grids(raster: Raster, change: Callable[[Tensor], Tensor]) -> Raster:
    var = None if raster.var is None else change(raster.var)
    return replace(raster, values=change(raster.values), valid=change(raster.valid), var=var)


def _clipped(vector: Vector, south_m: float, east_m: float, height_m: float, width_m: float) -> Vector:
    from shapely import box
    from shapely.affinity import translate

    window = box(0, 0, width_m, height_m)
    moved = [translate(g, -east_m, -south_m).intersection(window) for g in vector.geometry]
    stays = torch.tensor([not g.is_empty for g in moved], dtype=torch.bool)
    return replace(vector, geometry=tuple(moved)).obs(stays)


def _cropped_place(place: Place, south_m: float, east_m: float, height_m: float, width_m: float) -> Place:
    geobox: Any = place.geobox
    if geobox is not None:
        per_m = (geobox.shape[0] / place.height_m, geobox.shape[1] / place.width_m)
        edges = [
            south_m * per_m[0],
            (south_m + height_m) * per_m[0],
            east_m * per_m[1],
            (east_m + width_m) * per_m[1],
        ]
        whole = [round(edge) for edge in edges]
        fits = all(abs(edge - pixel) < 1e-3 for edge, pixel in zip(edges, whole, strict=True))
        geobox = geobox[whole[0] : whole[1], whole[2] : whole[3]] if fits else None
    return Place(height_m, width_m, geobox, place.lonlat)


def _is_whole(raster: Raster) -> bool:
    """One pixel for the whole place, such as a class per place."""
    return raster.values.shape[2:] == (1, 1)


def _pixels(metres: float, raster: Raster, name: str) -> int:
    exact = metres / raster.gsd_m
    if abs(exact - round(exact)) > 1e-3:
        raise ValueError(
            f"the crop's edge at {metres:g} m cuts through pixels of {raster.gsd_m:g} m of layer {name!r}; take a crop_m that "
            "is a multiple of the pixel of every layer"
        )
    return round(exact)


def _common_pixel_m(batch: Batch) -> float:
    """Least distance that is a whole number of pixels in every layer of more than one pixel, metres (to a millimetre)."""
    rasters = [layer for layer in batch.layers.values() if isinstance(layer, Raster) and not _is_whole(layer)]
    return math.lcm(*(max(1, round(1000 * raster.gsd_m)) for raster in rasters)) / 1000 if rasters else 1.0


def _refuse_uneven(batch: Batch) -> None:
    place = batch.places[0]
    for name, layer in batch.layers.items():
        if not isinstance(layer, Raster) or _is_whole(layer):
            continue
        size_m = [n * layer.gsd_m for n in layer.values.shape[2:]]
        if any(
            abs(have - want) > 1e-3 * layer.gsd_m
            for have, want in zip(size_m, (place.height_m, place.width_m), strict=True)
        ):
            raise ValueError(
                f"layer {name!r} covers {size_m[0]:g} x {size_m[1]:g} m of a place of {place.height_m:g} x {place.width_m:g} m: "
                "mirrored or turned it would no longer lie under the other layers. Use crop_m, or a place size that is a "
                "multiple of every pixel"
            )


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _stay(count: int, chance: float, generator: torch.Generator) -> Tensor:
    """Which of ``count`` things stay when each goes with ``chance``; at least one does."""
    draw = torch.rand(count, generator=generator)
    return (draw >= chance) | (draw == draw.max())
