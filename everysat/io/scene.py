"""An opened set of files over a place, of which any window can be read: the one reader behind all others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from odc.geo.geobox import GeoBox

from everysat.io import grid, remote, warp
from everysat.io.calibration import CODED, Calibration
from everysat.io.dates import Span
from everysat.io.plane import Plane
from everysat.sensors import Sensor
from everysat.types import Batch, Place, Raster

Clear = Collection[int] | Callable[[np.ndarray], np.ndarray]
"""Which codes of a mask mean clear: the codes, or a function from codes to a bool array."""

_LARGE = 1 << 16
"""Pixels from which decoding takes longer than starting threads."""


@dataclass(frozen=True)
class Part:
    """A plane that belongs to a layer, and how it becomes physical."""

    plane: Plane
    calibration: Calibration


@dataclass(frozen=True)
class Mask:
    """Planes of codes of one observation, and which codes mean clear."""

    planes: tuple[Plane, ...]
    clear: Clear

    def read(self, target: GeoBox) -> np.ndarray:
        """Where the ground was seen clearly, bool [y, x]; outside the mask it was not."""
        codes = _filled(self.planes, lambda plane: warp.on_grid(plane, target, "nearest", _codes))
        seen = np.isfinite(codes)
        whole = np.where(seen, codes, 0).astype(np.int64)
        clear = self.clear(whole) if callable(self.clear) else np.isin(whole, list(self.clear))
        return seen & np.asarray(clear, bool)


@dataclass(frozen=True)
class LayerPlan:
    """What a layer is made of: ``parts`` by (observation, band), in the order of ``times`` and of the sensor's bands."""

    name: str
    sensor: Sensor
    gsd_m: float
    times: tuple[Span, ...]
    parts: Mapping[tuple[int, int], tuple[Part, ...]]
    masks: tuple[tuple[Mask, ...], ...]
    resampling: str

    def read(self, target: GeoBox) -> Raster:
        shape = (len(self.times), len(self.sensor.bands), *target.shape)
        values = np.full(shape, np.nan, np.float32)

        def fill(item: tuple[tuple[int, int], tuple[Part, ...]]) -> None:
            (obs, band), parts = item
            values[obs, band] = _filled([p.plane for p in parts], self._reader(parts, target))

        clear = np.ones((shape[0], 1, *target.shape), bool)

        def cover(obs: int) -> None:
            for mask in self.masks[obs]:
                clear[obs] &= mask.read(target)

        self._do(fill, list(self.parts.items()), target)
        self._do(cover, [obs for obs, masks in enumerate(self.masks) if masks], target)
        valid = np.isfinite(values) & clear
        values[~valid] = 0.0
        times = torch.tensor(self.times, dtype=torch.float64).reshape(-1, 2)
        return Raster(
            self.sensor,
            torch.from_numpy(values),
            torch.from_numpy(valid),
            times,
            torch.zeros(shape[0], dtype=torch.int64),
            self.gsd_m,
        )

    def _do(self, work: Callable[[Any], None], items: list[Any], target: GeoBox) -> None:
        """``work`` on each item, in threads where these are worth their start; each holds one window of pixels."""
        distant = any(remote.is_remote(part.plane.source) for parts in self.parts.values() for part in parts)
        threads = remote.THREADS if distant else os.cpu_count() or 1
        if len(items) < 2 or (not distant and target.shape[0] * target.shape[1] < _LARGE):
            for item in items:
                work(item)
            return
        with ThreadPoolExecutor(min(len(items), threads)) as pool:
            list(pool.map(work, items))

    def _reader(self, parts: tuple[Part, ...], target: GeoBox) -> Callable[[Plane], np.ndarray]:
        calibrations = {id(part.plane): part.calibration for part in parts}

        def read(plane: Plane) -> np.ndarray:
            convert = calibrations[id(plane)]
            is_class = convert.band.unit in CODED
            method = warp.method_for(grid.gsd_m(plane.geobox), self.gsd_m, is_class, self.resampling)
            if convert.band.unit != "dB" or method != "average":
                return warp.on_grid(plane, target, method, convert)
            power = warp.on_grid(plane, target, method, replace(convert, power=True))
            return 10 * np.log10(power)

        return read


@dataclass(frozen=True)
class Scene:
    """Opened files over a place. Holds metadata alone, so it can be pickled, forked and shared between threads.

    Attributes:
        place: the whole extent; its geobox is the grid that windows are counted on.
        layers: by name, in the order in which they come in a batch.
    """

    place: Place
    layers: Mapping[str, LayerPlan]

    @property
    def geobox(self) -> GeoBox:
        return self.place.geobox  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the geobox."""
        return self.geobox.shape[0], self.geobox.shape[1]

    @property
    def step(self) -> int:
        """Windows that start and end at multiples of this many pixels hold whole pixels of every layer."""
        base = grid.gsd_m(self.geobox)
        ratios = [max(1, round(layer.gsd_m / base)) for layer in self.layers.values()]
        return math.lcm(*ratios)

    def read(self, window: GeoBox | tuple[slice, slice] | None = None) -> Batch:
        """The layers in a window as a batch of one; all of the scene without a window.

        Args:
            window: (rows, columns) as slices of the scene's geobox, or any geobox, onto which is then resampled.

        Reading slices equals reading all and cropping. Beyond the files all is invalid.

        Raises:
            ValueError: slices that cut pixels of a coarser layer; see :attr:`step`.
        """
        geobox = window if isinstance(window, GeoBox) else self._crop(window)
        own = self._gsd_m(geobox)
        layers = {name: layer.read(grid.at_gsd(geobox, layer.gsd_m, own)) for name, layer in self.layers.items()}
        return Batch((grid.place_of(geobox),), layers)

    def _gsd_m(self, geobox: GeoBox) -> float:
        """That of the scene, in windows of it too: some CRS have pixels that are larger in one place than in another."""
        if geobox.crs != self.geobox.crs:
            return grid.gsd_m(geobox)
        a, b = geobox.affine, self.geobox.affine
        return grid.gsd_m(self.geobox) * math.hypot(a.a, a.d) / math.hypot(b.a, b.d)

    def _crop(self, window: tuple[slice, slice] | None) -> GeoBox:
        if window is None:
            return self.geobox
        spans = []
        for part, size in zip(window, self.shape, strict=True):
            start, stop = part.start or 0, size if part.stop is None else part.stop
            if part.step not in (None, 1) or not start < stop:
                raise ValueError(f"window={window!r} must be two slices with start below stop and no step")
            if start % self.step or (stop % self.step and stop != size):
                raise ValueError(
                    f"window={window!r} cuts pixels of a coarser layer; let it start and end at multiples of {self.step} pixels (scene.step)"
                )
            spans.append(slice(start, stop))
        return grid.crop(self.geobox, *spans)


def _codes(numbers: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid, numbers, np.nan).astype(np.float32)


def _filled(planes: Any, read: Callable[[Plane], np.ndarray]) -> np.ndarray:
    """Planes over one another, the first that has a value counts: neighbouring tiles of one acquisition."""
    planes = list(planes)
    values = read(planes[0])
    for plane in planes[1:]:
        missing = ~np.isfinite(values)
        if not missing.any():
            break
        values[missing] = read(plane)[missing]
    return values
