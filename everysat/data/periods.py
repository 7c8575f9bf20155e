"""Composites of 30 days as CropHarvest exports them from Earth Engine (Tseng et al. 2021), which several datasets hold.

Sentinel-2 is Level-1C of the clearest pixels of a period, Sentinel-1 the median of the images within 15 days of its middle, or of the nearest
one. Temperature and rain are of ERA5-Land and of the calendar month in which a period begins, rain in metres a day.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import numpy as np

from everysat import sensors
from everysat.data import points
from everysat.io.dates import Span
from everysat.types import Raster

DAYS = 30
LEAST_DB = -40.0
"""Backscatter below this is the border of an image: the noise of the instrument lies far above it."""


def spans(starts: Sequence[datetime]) -> list[Span]:
    """Start and end of each period, seconds since 1970; ``starts`` know their zone."""
    return [(start.timestamp(), (start + timedelta(days=DAYS)).timestamp()) for start in starts]


def weather(numbers: np.ndarray, starts: Sequence[datetime], side_m: float) -> Raster:
    """Temperature (K) and sum of rain (mm) of one place by calendar month, from ``numbers`` [period, 2]: K and metres a day.

    Two periods that begin in one month hold the same numbers, which are that month's once. One pixel, as large as the place.
    """
    months = [_month(start) for start in starts]
    first = [period for period, month in enumerate(months) if month not in months[:period]]
    held = [months[period] for period in first]
    days = np.array([(end - start) / 86400 for start, end in held])
    values = numbers[first] * np.stack([np.ones_like(days), 1000 * days], 1)
    return points.layer(sensors.get("era5-land-monthly").select(("t2m", "tp")), values, side_m, time_s=held)


def _month(start: datetime) -> Span:
    first = start.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first.timestamp(), (first + timedelta(days=32)).replace(day=1).timestamp()
