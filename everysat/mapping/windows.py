"""How a large map is cut into windows, and how they fade into each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from everysat.types import Batch, Place, Raster

Box = tuple[int, int, int, int]
"""Rows [top, bottom) and columns [left, right) as (top, bottom, left, right)."""


def crop(batch: Batch, top_m: float, left_m: float, height_m: float, width_m: float) -> Batch:
    """The rectangle of the places of ``batch`` that begins ``top_m`` south and ``left_m`` east of their corners.

    Raises:
        ValueError: an edge that cuts a pixel of a layer.
    """
    layers = {}
    for name, layer in batch.layers.items():
        if not isinstance(layer, Raster):
            continue
        edges = [v / layer.gsd_m for v in (top_m, left_m, top_m + height_m, left_m + width_m)]
        if any(abs(edge - round(edge)) > 1e-3 for edge in edges[:2]):
            raise ValueError(
                f"top_m={top_m:g}, left_m={left_m:g} cut a pixel of layer {name!r} (gsd_m={layer.gsd_m:g})"
            )
        top, left = round(edges[0]), round(edges[1])
        bottom, right = math.ceil(edges[2] - 1e-3), math.ceil(edges[3] - 1e-3)
        parts = {n: getattr(layer, n)[:, :, top:bottom, left:right] for n in ("values", "valid")}
        layers[name] = replace(layer, **parts, var=None)
    places = tuple(Place(height_m, width_m, lonlat=p.lonlat) for p in batch.places)
    return Batch(places, layers)


@dataclass(frozen=True)
class Window:
    """Pixels ``core`` of the map, those that are ``read`` for them, halo included, and those that are ``kept`` of the result:
    the core, and what fades into its neighbours."""

    index: int
    core: Box
    read: Box
    kept: Box


@dataclass(frozen=True)
class Plan:
    """How a map of ``shape`` pixels is cut; sizes in pixels. Windows fade into each other over ``fade`` pixels on both sides of
    their common edge, which must leave enough of the halo as sight; 0 for a clean cut. Windows begin on multiples of ``step``.
    Where the last step of the map is not a whole one, mappers cut chips otherwise: whoever touches it reads from a step before the
    end to the end."""

    shape: tuple[int, int]
    gsd_m: float
    window: int
    halo: int
    fade: int = 0
    step: int = 1

    def __post_init__(self) -> None:
        if self.window < 2 * self.fade:
            raise ValueError(f"windows of {self.window} pixels cannot fade over {self.fade} pixels on both sides")

    @property
    def grid(self) -> tuple[int, int]:
        """Number of windows down and across."""
        return math.ceil(self.shape[0] / self.window), math.ceil(self.shape[1] / self.window)

    def windows(self) -> Iterator[Window]:
        """All windows, row by row."""
        return (self.at(index) for index in range(self.grid[0] * self.grid[1]))

    def at(self, index: int) -> Window:
        """Window number ``index``."""
        (height, width), size = self.shape, self.window
        y, x = (n * size for n in divmod(index, self.grid[1]))
        core = y, min(height, y + size), x, min(width, x + size)
        return Window(index, core, self._to_the_end(self._grown(core, self.halo)), self._grown(core, self.fade))

    def _to_the_end(self, box: Box) -> Box:
        edges: list[int] = []
        for axis, size in enumerate(self.shape):
            low, high = box[2 * axis : 2 * axis + 2]
            if size % self.step and size - high < self.step:
                high = size
                low = max(0, min(low, (size // self.step - 1) * self.step))
            edges += [low, high]
        return edges[0], edges[1], edges[2], edges[3]

    def _grown(self, box: Box, by: int) -> Box:
        height, width = self.shape
        return max(0, box[0] - by), min(height, box[1] + by), max(0, box[2] - by), min(width, box[3] + by)

    def reaching(self, box: Box) -> list[Window]:
        """The windows that say something about pixels of ``box``, in the order of their numbers: it is that in which they are
        summed, whichever was finished first."""
        top, bottom, left, right = self._grown(box, self.fade)
        down, across = (
            range(low // self.window, -(-high // self.window)) for low, high in ((top, bottom), (left, right))
        )
        return [self.at(i * self.grid[1] + j) for i in down for j in across]

    def weight(self, window: Window) -> np.ndarray:
        """Weight of each pixel that is kept; the weights of all windows add up to 1 everywhere."""
        sides = []
        for axis, size in enumerate(self.shape):
            low, high = window.kept[2 * axis : 2 * axis + 2]
            first, last = window.core[2 * axis : 2 * axis + 2]
            side = np.ones(high - low)
            if self.fade:
                at = np.arange(low, high)
                rise = (at - (first - self.fade) + 0.5) / (2 * self.fade) if first > 0 else side
                fall = ((last + self.fade) - at - 0.5) / (2 * self.fade) if last < size else side
                side = np.minimum(rise, fall).clip(0, 1)
            sides.append(side)
        return (sides[0][:, None] * sides[1][None]).astype(np.float32)


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes share."""
    box = max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])
    return box if box[0] < box[1] and box[2] < box[3] else None


def inside(box: Box, of: Box) -> tuple[slice, slice]:
    """Rows and columns of ``box`` in an image of ``of``."""
    return slice(box[0] - of[0], box[1] - of[0]), slice(box[2] - of[2], box[3] - of[2])
