"""What readers of published datasets share: where the files lie, what is asked for, days as times, and label layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everysat import sensors
from everysat.find import suggest
from everysat.io import dates
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, Raster

S2_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""The ten Sentinel-2 bands of 10 and 20 m, in the order that the datasets of the OmniSat and AnySat papers store."""


def folder(root: str | Path, name: str, needed: Sequence[str], source: str) -> Path:
    """``root`` as a path, when it is a folder in which the files or folders ``needed`` are.

    Raises:
        FileNotFoundError: it or one of them is missing; the message says what was looked for and where the data come from.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise absent(path, "this folder", name, source)
    for entry in needed:
        if not (path / entry).exists():
            raise absent(path, entry, name, source)
    return path


def absent(root: Path, entry: str, name: str, source: str) -> FileNotFoundError:
    """The error for a dataset that does not lie in ``root``, because ``entry`` is missing there."""
    return FileNotFoundError(
        f"{name} was looked for in {root}, but {entry} is missing. root is the folder that holds the dataset; "
        f"it is published at {source}"
    )


def one_of(value: str, known: Iterable[str], argument: str) -> str:
    """``value`` if it is known, or an error that offers the nearest."""
    known = tuple(known)
    if value not in known:
        raise LookupError(f"{argument}={value!r} is unknown. {suggest(value, known)}")
    return value


def layers_of(wanted: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The layers asked for, in the order of ``known``; ``default`` when nothing is asked for."""
    if wanted is None:
        return tuple(default)
    if isinstance(wanted, str):
        raise TypeError(f"modalities={wanted!r} must be a list of names, such as [{wanted!r}]")
    for name in wanted:
        one_of(name, known, "modalities")
    return tuple(name for name in known if name in wanted)


def days(stamps: Iterable[Any], path: str | Path) -> Tensor:
    """The UTC day of each ``YYYYMMDD``, as [start, end) seconds since 1970, float64 [obs, 2]; ``path`` is for the error."""
    try:
        spans = [_day(int(stamp)) for stamp in stamps]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected days as YYYYMMDD") from error
    return torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)


@lru_cache(maxsize=1 << 16)
def _day(stamp: int) -> tuple[float, float]:
    return dates.span(f"{stamp:08d}")


def stamps_in(products: Iterable[Any], field: int, path: str | Path) -> list[str]:
    """``YYYYMMDD`` from the names of Copernicus products, in which it stands in the underscore-separated ``field``."""
    found = []
    for product in products:
        name = product.decode() if isinstance(product, bytes) else str(product)
        parts = name.split("_")
        if len(parts) <= field:
            raise ValueError(f"{path}: {name!r} is no name of a Sentinel product, so its date is unknown")
        found.append(parts[field][:8])
    return found


def series(
    sensor: Sensor,
    numbers: np.ndarray,
    time_s: Tensor,
    path: str | Path,
    *,
    gsd_m: float = 10.0,
    listed_in: str | Path = "",
) -> Raster:
    """A dated layer of one place from digital numbers [obs, band, y, x] of the file ``path``, by the sensor's scale and nodata.
    ``listed_in`` is the file that has the dates, when that is another one.

    Raises:
        ValueError: dates, bands or axes do not fit; names the file.
    """
    if numbers.ndim != 4 or numbers.shape[1] != len(sensor.bands):
        raise ValueError(f"{path} holds {numbers.shape}, expected [date, {len(sensor.bands)} bands, y, x]")
    if len(numbers) != len(time_s):
        raise ValueError(
            f"{path} holds {len(numbers)} dates, but {len(time_s)} are listed for it{f' in {listed_in}' if listed_in else ''}"
        )
    return Raster(sensor, *physical(sensor, numbers), time_s, torch.zeros(len(numbers), dtype=torch.int64), gsd_m)


def image(sensor: Sensor, numbers: np.ndarray, path: str | Path, gsd_m: float) -> Raster:
    """An undated layer of one place from digital numbers [band, y, x] of the file ``path``."""
    if numbers.ndim != 3 or len(numbers) != len(sensor.bands):
        raise ValueError(f"{path} holds {numbers.shape}, expected [{len(sensor.bands)} bands, y, x]")
    always = torch.tensor([ALWAYS], dtype=torch.float64)
    return Raster(sensor, *physical(sensor, numbers[None]), always, torch.zeros(1, dtype=torch.int64), gsd_m)


def physical(sensor: Sensor, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """Physical values float32 and validity of digital numbers [obs, band, y, x], as the sensor's table has them; 0 where they are
    not valid. Few passes over the numbers, each by the library that is faster at it: they are many, and a slow pass (NumPy's over
    float16, PyTorch's over bool) takes longer than reading them."""
    half = numbers.dtype == np.float16 and numbers.flags.c_contiguous and numbers.flags.writeable
    values = torch.from_numpy(numbers).float() if half else torch.from_numpy(numbers.astype(np.float32))
    nodata = {band.nodata for band in sensor.bands}
    if nodata == {None}:
        seen = np.ones(numbers.shape, dtype=bool) if numbers.dtype.kind != "f" else np.isfinite(values.numpy())
    else:
        one = nodata.pop() if len(nodata) == 1 else None
        each = np.array([np.nan if b.nodata is None else b.nodata for b in sensor.bands])[:, None, None]
        seen = numbers != (each if one is None else one)
        if numbers.dtype.kind == "f":
            seen &= np.isfinite(values.numpy())
    for operation, column in (
        (values.mul_, [b.scale for b in sensor.bands]),
        (values.add_, [b.offset for b in sensor.bands]),
    ):
        if len(set(column)) > 1:
            operation(torch.tensor(column).view(-1, 1, 1))
        elif column[0] != (1.0 if operation == values.mul_ else 0.0):
            operation(column[0])
    if not seen.all():
        values.numpy()[~seen] = 0.0
    return values, torch.from_numpy(seen)


def clear(raster: Raster, probability: np.ndarray, limit: float, path: str | Path) -> Raster:
    """``raster`` without the pixels whose snow or cloud ``probability`` [obs, 2 or more, y, x], in percent, exceeds ``limit``
    (0-1). The first two bands are snow and cloud; what follows them in some files is empty."""
    if not 0 <= limit <= 1:
        raise ValueError(f"clouds={limit} must be between 0 and 1: the probability above which a pixel is left out")
    obs, _, height, width = raster.values.shape
    if probability.ndim != 4 or probability.shape[1] < 2 or probability.shape[::2] != (obs, height):
        raise ValueError(f"{path}: masks are {probability.shape}, expected ({obs}, 2, {height}, {width})")
    hidden = torch.from_numpy((probability[:, :2] > 100 * limit).any(1))
    return replace(raster, valid=raster.valid & ~hidden[:, None])


def class_map(
    name: str, codes: np.ndarray, classes: Mapping[int, str], gsd_m: float, source: str, path: Path
) -> Raster:
    """A label layer from class codes [y, x]; codes that ``classes`` does not list are an error that names the file."""
    listed = list(classes)  # bytes by a table: np.isin over them takes longer than reading the file
    known = np.isin(np.arange(256), listed)[codes] if codes.dtype == np.uint8 else np.isin(codes, listed)
    if not known.all():
        raise ValueError(
            f"{path} holds the code {codes[~known].flat[0]}, which is no class; expected {min(classes)} to {max(classes)}"
        )
    band = Band("class", gsd_m, "class", classes=classes)
    return Raster.of(
        Sensor(name, "classes", (band,), source=source), torch.from_numpy(codes.astype(np.float32))[None, None], gsd_m
    )


def without(labels: Raster, codes: Sequence[int]) -> Raster:
    """Labels of one band less these codes, whose pixels then count as not labelled."""
    band = labels.sensor.bands[0]
    left = {code: name for code, name in (band.classes or {}).items() if code not in codes}
    hidden = torch.zeros_like(labels.valid)
    for code in codes:
        hidden |= labels.values == code
    sensor = replace(labels.sensor, bands=(replace(band, classes=left),))
    return replace(labels, sensor=sensor, valid=labels.valid & ~hidden)


def presence(name: str, present: Iterable[str], classes: Sequence[str], side_m: float, source: str) -> Raster:
    """A multi-label layer: one band of 0 or 1 for each of ``classes``, one pixel as large as the place."""
    bands = tuple(Band(c, side_m, "class", classes={0: "absent", 1: "present"}) for c in classes)
    there = set(present)
    values = torch.tensor([float(c in there) for c in classes]).view(1, -1, 1, 1)
    return Raster.of(Sensor(name, "classes", bands, source=source), values, side_m)


@cache
def sentinel1(*bands: str, unit: str = "dB") -> Sensor:
    """Sentinel-1 with these bands; with ``unit="linear"``, VV and VH as linear power."""
    table = sensors.get("sentinel-1-grd")
    if unit == "linear":
        power = {"unit": "linear", "range": [0.0, 4000.0]}
        changed = [{"name": b.name, **power} for b in table.bands if b.unit == "dB"]
        table = sensors.from_table(table.name, {"like": table.name, "bands": changed})
    return table.select(bands)


def fingerprint(dataset: Any) -> str:
    """A hash of the names and options of a dataset (a dataclass), but not of where it lies, for the run manifest."""
    parts = [(f.name, getattr(dataset, f.name)) for f in fields(dataset) if f.name != "root"]
    return f"{type(dataset).__name__.lower()}:{hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()}"
