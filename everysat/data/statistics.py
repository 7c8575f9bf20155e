"""Mean and standard deviation of bands, and the input contract that follows from a dataset."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everysat.data.batches import Dataset
from everysat.io.scene import Scene
from everysat.progress import track
from everysat.sensors import Sensor
from everysat.types import Batch, Input, Raster

Moments = tuple[tuple[float, ...], tuple[float, ...]]


class Pooled:
    """Running count, mean and summed squared deviation per band over valid pixels, float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self, bands: int) -> None:
        self.count, self.mean, self.square = torch.zeros(3, bands, dtype=torch.float64)

    def add(self, values: Tensor, valid: Tensor) -> None:
        """``values`` and ``valid`` [obs, band, y, x]."""
        x, seen = (t.movedim(1, 0).flatten(1) for t in (values.double(), valid))
        count = seen.sum(1).double()
        mean = torch.where(seen, x, 0.0).sum(1) / count.clamp(min=1)
        square = torch.where(seen, (x - mean[:, None]) ** 2, 0.0).sum(1)
        self._join(slice(None), count, mean, square)

    def merge(self, bands: Tensor, other: Pooled) -> None:
        """Add what ``other`` has seen, whose bands are these numbers here."""
        self._join(bands, other.count, other.mean, other.square)

    def _join(self, bands: Tensor | slice, count: Tensor, mean: Tensor, square: Tensor) -> None:
        total = (self.count[bands] + count).clamp(min=1)
        shift = mean - self.mean[bands]
        self.square[bands] += square + shift**2 * self.count[bands] * count / total
        self.mean[bands] += shift * count / total
        self.count[bands] += count

    def moments(self, name: str, *, unseen: bool = False) -> Moments:
        """Mean and deviation per band; with ``unseen``, a band that was nowhere valid gets 0 and 1 instead of an error."""
        if (self.count == 0).any() and not unseen:
            raise ValueError(
                f"layer {name!r} has no valid pixel in band number {int(self.count.argmin())}: no mean exists"
            )
        std = (self.square / self.count.clamp(min=1)).sqrt()
        return tuple(self.mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())  # a constant band is centred


@dataclass
class Summary:
    """What is known of a layer of a dataset: its bands, and running moments of their values. ``dated``: all dates are known."""

    sensor: Sensor
    gsd_m: float
    dated: bool
    pool: Pooled

    def joined(self, other: Summary) -> Summary:
        """Of both together: the bands of this one, then those that only the other has; the pixel size of this one."""
        new = [band.name for band in other.sensor.bands if band.name not in self.sensor]
        sensor = replace(self.sensor, bands=self.sensor.bands + other.sensor.select(new).bands)
        pool = Pooled(len(sensor.bands))
        for part in (self, other):
            at = torch.tensor([sensor.names.index(sensor[band.name].name) for band in part.sensor.bands])
            pool.merge(at, part.pool)
        return Summary(sensor, self.gsd_m, self.dated and other.dated, pool)

    def plain(self, name: str) -> dict[str, Any]:
        """As :mod:`everysat.io.statistics` keeps it."""
        mean, std = self.pool.moments(name)
        return {
            "sensor": self.sensor.name,
            "gsd_m": self.gsd_m,
            "bands": list(self.sensor.names),
            "unit": [band.unit for band in self.sensor.bands],
            "mean": list(mean),
            "std": list(std),
            "count": [int(count) for count in self.pool.count.tolist()],
        }


class Windows:
    """All of a scene in windows of about ``pixels`` on a side: a dataset that leaves out nothing, for statistics. Those at the
    south and east edge reach beyond it, where nothing is valid."""

    def __init__(self, scene: Scene, pixels: int = 512) -> None:
        side = max(1, pixels // scene.step) * scene.step
        self.scene = scene
        self.windows = [
            (slice(row, row + side), slice(column, column + side))
            for row in range(0, scene.shape[0], side)
            for column in range(0, scene.shape[1], side)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.scene.read(self.windows[index])


def summarise(
    dataset: Dataset,
    names: Iterable[str] | None = None,
    *,
    places: int | None = None,
    inputs: Mapping[str, Input] | None = None,
    quiet: bool = True,
) -> dict[str, Summary]:
    """Sensor, pixel size and pooled moments of the layers of a dataset; see :func:`band_statistics`. Shows progress unless quiet."""
    wanted = None if names is None else list(names)
    found: dict[str, Summary] = {}
    for index in track(spread(len(dataset), places), "Statistics", quiet=quiet):
        for name, raster in dataset[index].layers.items():
            asked = isinstance(raster, Raster) and (
                raster.sensor.kind != "classes" if wanted is None else name in wanted
            )
            if not asked or not isinstance(raster, Raster) or not len(raster.row):
                continue
            raster = inputs[name].fit(raster, name) if inputs and name in inputs else raster
            dated = bool(torch.isfinite(raster.time_s).all())
            summary = found.setdefault(
                name, Summary(raster.sensor, raster.gsd_m, dated, Pooled(len(raster.sensor.bands)))
            )
            _refuse_change(name, index, summary, raster)
            summary.dated &= dated
            summary.pool.add(raster.values, raster.valid)
    for name in wanted or ():
        if name not in found:
            raise LookupError(f"no place has a raster layer {name!r}; there are {', '.join(found) or 'none'}")
    return found


def band_statistics(
    dataset: Dataset,
    names: Iterable[str] | None = None,
    *,
    places: int | None = None,
    inputs: Mapping[str, Input] | None = None,
    unseen: bool = False,
) -> dict[str, Moments]:
    """``{layer: (mean, std)}`` per band, pooled over the valid pixels of all places and dates, in the band's unit.

    One pass, one place in memory at a time. ``places`` looks at that many, evenly spread, instead of all. ``names``: layers;
    by default all rasters that are not classes. ``inputs`` says which bands of a layer are meant, in which order.
    ``unseen``: whether bands that are nowhere valid are let pass, with mean 0 and deviation 1 (they have no effect).

    Raises:
        LookupError: a named layer is nowhere in the dataset. ValueError: a band is valid nowhere, or its layer changes bands.
    """
    found = summarise(dataset, names, places=places, inputs=inputs)
    return {name: summary.pool.moments(name, unseen=unseen) for name, summary in found.items()}


def contract(dataset: Dataset, names: Iterable[str] | None = None, *, places: int | None = None) -> dict[str, Input]:
    """The input contract of a model trained on this dataset: sensors, pixel sizes and statistics of its layers."""
    return {
        name: Input(s.sensor, s.gsd_m, *s.pool.moments(name), dated=s.dated)
        for name, s in summarise(dataset, names, places=places).items()
    }


def _refuse_change(name: str, index: int, before: Summary, raster: Raster) -> None:
    if (raster.sensor.name, raster.sensor.names) != (before.sensor.name, before.sensor.names):
        raise ValueError(
            f"layer {name!r} has bands {raster.sensor.names} of {raster.sensor.name} in place {index}, "
            f"{before.sensor.names} of {before.sensor.name} before"
        )
    if not math.isclose(raster.gsd_m, before.gsd_m, rel_tol=1e-3):
        raise ValueError(f"layer {name!r} has gsd_m={raster.gsd_m:g} in place {index}, {before.gsd_m:g} before")


def spread(count: int, wanted: int | None) -> list[int]:
    """``wanted`` numbers evenly spread over ``range(count)``, or all of them."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]
