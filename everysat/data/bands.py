"""What readers of published datasets do to bands: quotients, checks of the unit, finer pixels, and the names a model knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from everysat import sensors
from everysat.data import published
from everysat.sensors import Sensor
from everysat.types import Raster

STORED = ("numbers", "physical")
RATIO_LIMIT = 1e4


def with_ratio(numbers: np.ndarray) -> np.ndarray:
    """The first two bands of [obs, band, y, x] and their quotient, within +-10 000; NaN where one of them is not there or the
    second is 0. The quotient is of the values as they stand in the file, which is what AnySat takes for a third channel."""
    first, second = numbers[:, :1].astype(np.float32), numbers[:, 1:2].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.clip(np.where(second == 0, np.nan, first / second), -RATIO_LIMIT, RATIO_LIMIT)
    return np.concatenate([first, second, ratio], axis=1)


def series(
    sensor: Sensor,
    numbers: np.ndarray,
    time_s: Tensor,
    path: str | Path,
    gsd_m: float,
    *,
    stored: str = "numbers",
    seen: Tensor | None = None,
) -> Raster:
    """:func:`everysat.data.published.series` in the order of time, checked against the plausible range of the bands.

    Args:
        numbers: [obs, band, y, x]; digital numbers, or with ``stored="physical"`` values in the unit of the bands.
        seen: where they are valid, as far as the dataset says so itself.

    Raises:
        ValueError: shapes do not fit, there is no date, or the values cannot be what ``stored`` says; names the file.
    """
    if not len(numbers):
        raise ValueError(f"{path} holds no date. Leave this place out, or fetch the file again")
    reading = sensor if stored == "numbers" else _plain(sensor)
    raster = replace(published.series(reading, numbers, time_s, path, gsd_m=gsd_m), sensor=sensor)
    if seen is not None:
        if seen.shape != raster.valid.shape:
            raise ValueError(f"{path}: the mask is {tuple(seen.shape)}, expected {tuple(raster.valid.shape)}")
        raster = replace(raster, valid=raster.valid & seen)
    _plausible(raster, numbers, stored, path)
    starts = raster.time_s[:, 0]
    return raster if (starts[1:] >= starts[:-1]).all() else raster.obs(torch.argsort(starts, stable=True))


def _plain(sensor: Sensor) -> Sensor:
    return replace(sensor, bands=tuple(replace(b, scale=1.0, offset=0.0, nodata=None) for b in sensor.bands))


def _plausible(raster: Raster, numbers: np.ndarray, stored: str, path: str | Path) -> None:
    values, valid = raster.values, raster.valid
    limits = torch.tensor([b.range or (-np.inf, np.inf) for b in raster.sensor.bands])
    low, high = (limits[:, i].view(1, -1, 1, 1) for i in (0, 1))
    # NumPy counts much faster than torch sums booleans, and this is half of the time that a series takes.
    count = np.count_nonzero(valid.numpy())
    outside = np.count_nonzero((((values < low) | (values > high)) & valid).numpy())
    if outside > 0.5 * count:
        other, holds = (
            ("physical", "values in the unit of the bands") if stored == "numbers" else ("numbers", "digital numbers")
        )
        raise ValueError(
            f"{path}: {outside / count:.0%} of the values of {raster.sensor.name} are outside of the plausible range (their median is "
            f"{float(values[valid].median()):.4g}), read as stored={stored!r}. If the files hold {holds}, stored={other!r} is right"
        )
    scaled = stored == "numbers" and all(b.unit == "reflectance" and b.scale < 1 for b in raster.sensor.bands)
    if scaled and count and (largest := float(numbers.max(where=valid.numpy(), initial=0))) <= 2:
        raise ValueError(
            f"{path}: the largest value of {raster.sensor.name} is {largest:.4g}, so the file holds reflectance, no digital "
            "numbers. Where the reader takes it, stored='physical' is right"
        )


def finer(raster: Raster, side: int) -> Raster:
    """``raster`` on ``side`` x ``side`` pixels, bilinear; valid where all that a value is made of is."""
    if raster.values.shape[-1] == side == raster.values.shape[-2]:
        return raster
    valid = interpolate(raster.valid.float(), size=(side, side), mode="bilinear", align_corners=False) > 1 - 1e-5
    values = interpolate(raster.values, size=(side, side), mode="bilinear", align_corners=False)
    return replace(raster, values=values, valid=valid, gsd_m=raster.gsd_m * raster.values.shape[-1] / side)


def nearest(image: np.ndarray, side: int) -> np.ndarray:
    """[..., y, x] on ``side`` x ``side`` pixels: that in which the centre of the new one lies."""
    for axis in (-2, -1):
        size = image.shape[axis]
        if size != side:
            image = image.take(((np.arange(side) + 0.5) * size / side).astype(int), axis=axis)
    return image


def joined(first: Raster, second: Raster, names: Sequence[str]) -> Raster:
    """The bands ``names`` of two rasters of the same dates and pixels, which are of the same sensor."""
    sensor = replace(first.sensor, bands=(*first.sensor.bands, *second.sensor.bands))
    both = replace(
        first,
        sensor=sensor,
        values=torch.cat([first.values, second.values], 1),
        valid=torch.cat([first.valid, second.valid], 1),
    )
    return both.select(names)


def presented(layer: str, raster: Raster, tables: Mapping[str, str] | None, names: Sequence[str]) -> Raster:
    """``raster`` under the name of another sensor, if ``tables`` gives one for the layer: the bands ``names`` of that sensor, with
    the values of the bands called alike and nothing valid in the others. Values are not changed, whatever the units."""
    if not tables or layer not in tables:
        return raster
    sensor = sensors.get(tables[layer]).select(names)
    shape = (len(raster.row), len(sensor.bands), *raster.values.shape[2:])
    values, valid = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for index, name in enumerate(sensor.names):
        if name in raster.sensor.names:
            own = raster.sensor.names.index(name)
            values[:, index], valid[:, index] = raster.values[:, own], raster.valid[:, own]
    return replace(raster, sensor=sensor, values=values, valid=valid)


def presentable(tables: Mapping[str, str] | None, layers: Sequence[str]) -> dict[str, str] | None:
    """``tables`` checked: layers and sensors that exist."""
    for layer, name in (tables or {}).items():
        published.one_of(layer, layers, "present_as")
        sensors.get(name)
    return None if tables is None else dict(tables)
