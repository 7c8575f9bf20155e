"""Mean and standard deviation of bands, and the input contract that follows from a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from everysat.data.batches import Dataset
from everysat.types import Input, Raster

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
        total = (self.count + count).clamp(min=1)
        shift = mean - self.mean
        self.square += square + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count += count

    def moments(self, name: str, *, unseen: bool = False) -> Moments:
        """Mean and deviation per band; with ``unseen``, a band that was nowhere valid gets 0 and 1 instead of an error."""
        if (self.count == 0).any() and not unseen:
            raise ValueError(
                f"layer {name!r} has no valid pixel in band number {int(self.count.argmin())}: no mean exists"
            )
        std = (self.square / self.count.clamp(min=1)).sqrt()
        return tuple(self.mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())  # a constant band is centred


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
    wanted = None if names is None else list(names)
    pooled: dict[str, tuple[tuple[str, ...], Pooled]] = {}
    for index in spread(len(dataset), places):
        for name, raster in dataset[index].layers.items():
            if not isinstance(raster, Raster) or (
                raster.sensor.kind == "classes" if wanted is None else name not in wanted
            ):
                continue
            raster = inputs[name].fit(raster, name) if inputs and name in inputs else raster
            bands, pool = pooled.setdefault(name, (raster.sensor.names, Pooled(len(raster.sensor.bands))))
            if raster.sensor.names != bands:
                raise ValueError(f"layer {name!r} has bands {raster.sensor.names} in place {index}, {bands} before")
            pool.add(raster.values, raster.valid)
    for name in wanted or ():
        if name not in pooled:
            raise LookupError(f"no place has a raster layer {name!r}; there are {', '.join(pooled) or 'none'}")
    return {name: pool.moments(name, unseen=unseen) for name, (_, pool) in pooled.items()}


def contract(dataset: Dataset, names: Iterable[str] | None = None, *, places: int | None = None) -> dict[str, Input]:
    """The input contract of a model trained on this dataset: sensors, pixel sizes and statistics of its layers."""
    statistics = band_statistics(dataset, names, places=places)
    found: dict[str, Raster] = {}
    for index in range(len(dataset)):
        for name, layer in dataset[index].layers.items():
            if name in statistics and isinstance(layer, Raster) and len(layer.row):
                found.setdefault(name, layer)
        if len(found) == len(statistics):
            break
    return {
        name: Input(r.sensor, r.gsd_m, *statistics[name], dated=bool(torch.isfinite(r.time_s).all()))
        for name, r in found.items()
    }


def spread(count: int, wanted: int | None) -> list[int]:
    """``wanted`` numbers evenly spread over ``range(count)``, or all of them."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]
