"""From the numbers in a file to physical units, with a check that the result is plausible."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from everysat.io import labels
from everysat.io.plane import Plane
from everysat.sensors import UNITS, Band, Sensor
from everysat.types import ContractError

STORED = ("auto", "digital", "physical", "linear")
CODED = ("class", "bits")
"""Units whose values are codes: never averaged, never scaled."""
_DIMENSIONLESS = ("reflectance", "ratio", "linear", "probability", "class", "bits", "DN")
_SPELLINGS = {
    "kelvin": "K", "celsius": "degC", "degree_celsius": "degC", "c": "degC", "metre": "m", "metres": "m", "meter": "m", "meters": "m",
    "m/s": "m s-1", "m s**-1": "m s-1", "j m**-2": "J m-2", "j/m2": "J m-2", "db": "dB", "decibel": "dB", "percent": "%",
    "pascal": "Pa", "degrees": "degree",
}  # fmt: skip
# Sentinel-2 products from this day on carry an offset unless somebody removed it; before it, only reprocessed ones do.
_OFFSET_SINCE_S = 1643068800.0  # 2022-01-25


@dataclass(frozen=True)
class Calibration:
    """``number * scale + offset`` is in the unit of ``band``. Called with digital numbers and where they are valid, gives
    float32 with NaN where invalid; ``power`` gives linear power instead of dB, in which radar is averaged. ``linear`` says
    that the numbers are linear power, which become dB.

    Raises (when called):
        ContractError: most values lie outside the band's plausible range, or the scale was applied already.
    """

    band: Band
    source: str
    scale: float
    offset: float
    nodata: float | None
    by_table: bool
    power: bool = False
    linear: bool = False

    def __call__(self, numbers: np.ndarray, valid: np.ndarray) -> np.ndarray:
        if self.nodata is not None:
            valid = valid & (numbers != self.nodata)
        values: np.ndarray = numbers.astype(np.float32)
        if (self.scale, self.offset) != (1.0, 0.0):
            values = values * np.float32(self.scale) + np.float32(self.offset)
        values[~valid] = np.nan
        if self.linear:
            # Noise removal leaves powers at or below zero, which have no logarithm: nothing was measured there.
            values = 10 * np.log10(np.where(values > 0, values, np.nan))
        self.check(numbers, values)
        if self.power:
            values = 10 ** (values / 10)
        return values

    def check(self, numbers: np.ndarray, values: np.ndarray) -> None:
        """Refuse values that cannot be in the band's unit; looks at some ten thousand of them."""
        if self.band.range is None or self.band.unit in CODED:
            return
        step = max(1, int(np.sqrt(values.size / 10_000)))
        some, raw = values[::step, ::step], numbers[::step, ::step]
        seen = np.isfinite(some)
        if not seen.any():
            return
        low, high = self.band.range
        slack = 1e-3 * (high - low)
        outside = (some[seen] < low - slack) | (some[seen] > high + slack)
        if outside.mean() > 0.5:
            raise ContractError(self._implausible(raw[seen].astype(float), some[seen].astype(float)))
        if self.by_table and self.scale < 0.1 and numbers.dtype.kind == "f":
            largest = np.abs(raw[seen]).max()
            if 0 < largest <= max(abs(low), abs(high)):
                raise ContractError(
                    f"{self.source}: band {self.band.name} holds {_spread(raw[seen].astype(float))}, which looks like "
                    f"{self.band.unit} already; scaling it by {self.scale:g} again would be wrong. Read it with stored='physical'"
                )

    def _implausible(self, numbers: np.ndarray, values: np.ndarray) -> str:
        band, (low, high) = self.band, self.band.range or (0.0, 0.0)
        text = (
            f"{self.source}: band {band.name} comes to {_spread(values)} {band.unit}, while {low:g} to {high:g} is plausible. "
            f"The file holds {_spread(numbers)}, read with scale {self.scale:g} and offset {self.offset:g}. "
        )
        middle = float(np.median(numbers))
        if middle in (65535, 255, -32768, -9999, 32767, -99999):
            return text + f"If {middle:g} stands for no data, say so with nodata={middle:g}"
        scaled = np.median(numbers) * band.scale + band.offset
        if not self.by_table and low <= scaled <= high:
            return text + "These look like digital numbers: read them with stored='digital'"
        if low <= np.median(numbers) <= high:
            return text + f"The numbers look like {band.unit} as they are: read them with stored='physical'"
        return text + "Give the sensor whose table fits the file, or a table of your own"


def _spread(values: np.ndarray) -> str:
    low, mid, high = np.percentile(values, (1, 50, 99))
    return f"{low:.4g} to {high:.4g} (median {mid:.4g})"


def calibration(
    plane: Plane, sensor: Sensor, band: Band, stored: str = "auto", baseline: str | None = None
) -> Calibration:
    """How ``plane`` becomes physical.

    Integers are digital numbers: the file's own scale and offset count, else the sensor's table with the offset of the
    processing baseline. Floats in a file that names the band's unit are physical; other floats are taken for digital numbers
    where the table has a scale, and refused when they cannot be.

    Raises:
        ContractError: the file is in another unit, or the processing baseline matters and is unknown.
    """
    if stored not in STORED:
        raise ValueError(f"stored={stored!r} is not one of {', '.join(STORED)}")
    unit = spelled(plane.unit)
    fits = unit == band.unit or (unit == "1" and band.unit in _DIMENSIONLESS)
    given = (plane.scale or 1.0, plane.offset or 0.0) if plane.scale is not None or plane.offset is not None else None
    if stored == "linear" and band.unit == "ratio":
        stored = "auto"  # of the two bands in dB, which is made while reading
    if stored == "linear" or (stored == "auto" and unit == "linear" and band.unit == "dB"):
        if band.unit != "dB":
            raise ContractError(f"stored='linear' is for radar; {band.name} of {sensor.name} is in {band.unit}")
        return Calibration(band, plane.name, 1.0, 0.0, None, False, linear=True)
    if band.unit in CODED:
        return Calibration(band, plane.name, 1.0, 0.0, None if plane.nodata is not None else band.nodata, False)
    if stored == "physical" or (stored == "auto" and plane.is_float and fits and given is None):
        return Calibration(band, plane.name, 1.0, 0.0, None, False)
    if unit in UNITS and not fits and (band.scale, band.offset) == (1.0, 0.0):
        raise ContractError(
            f"{plane.name} is in {plane.unit}, sensor {sensor.name} has {band.name} in {band.unit}; convert the file, or give a table "
            "of your own with the scale and offset between the two"
        )
    nodata = band.nodata if plane.nodata is None else None
    if given is not None and stored == "auto":
        # A unit that the file names and the table does not share, such as metres of rain, is what the table's scale starts from.
        again = (band.scale, band.offset) if unit in UNITS and not fits else (1.0, 0.0)
        return Calibration(band, plane.name, given[0] * again[0], given[1] * again[0] + again[1], nodata, False)
    return Calibration(
        band, plane.name, band.scale, band.offset + _baseline(plane, sensor, band, baseline), nodata, True
    )


def _baseline(plane: Plane, sensor: Sensor, band: Band, baseline: str | None) -> float:
    if not sensor.baseline_offsets or band.unit != "reflectance":
        return 0.0
    found = labels.normal_baseline(baseline) if baseline is not None else labels.baseline_in(plane.source, plane.tags)
    if found is not None:
        return labels.baseline_offset(sensor, found)
    advice = (
        f"{plane.source}: the processing baseline is unknown, and from {min(sensor.baseline_offsets)} on the digital numbers of {sensor.name} "
        "carry an offset. Give processing_baseline='04.00' (--reading processing_baseline=04.00) or what the product says, or '00.00' where the offset was removed"
    )
    if plane.time is None:
        warnings.warn(f"{advice}. Read as if there were no offset", stacklevel=8)
    elif plane.time[0] >= _OFFSET_SINCE_S:
        raise ContractError(advice)
    return 0.0


def spelled(unit: str) -> str:
    """A unit in the spelling of the sensor tables where it is known, else as it came."""
    return unit if unit in UNITS else _SPELLINGS.get(unit.strip().lower(), unit.strip())
