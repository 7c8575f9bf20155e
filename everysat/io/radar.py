"""The third band that models of Sentinel-1 take and no product has: the quotient of its two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from everysat.io.calibration import Calibration, calibration
from everysat.io.plane import Plane
from everysat.sensors import Sensor

RATIO_LIMIT = 1e4
"""The quotient of two bands in dB, one of which may be near zero, is kept within this."""


def ratios(planes: Sequence[Plane], sensor: Sensor, stored: str) -> list[Plane]:
    """Planes of the band ``ratio``, in dB over dB, for every pair of VV and VH (HH and HV) of one time and grid."""
    by_spot = {(p.label, p.time, p.geobox, p.rank): p for p in planes}
    made = []
    for over, under in (("VV", "VH"), ("HH", "HV")):
        for plane in planes:
            other = by_spot.get((under, plane.time, plane.geobox, plane.rank))
            if plane.label == over and other is not None:
                pair = [(p, calibration(p, sensor, sensor[p.label], stored)) for p in (plane, other)]
                quotient = replace(
                    plane, label="ratio", pixels=Quotient(*pair), dtype="float32", unit="ratio", flip=(False, False)
                )
                made.append(replace(quotient, nodata=None, scale=None, offset=None))
    return made


@dataclass(frozen=True)
class Quotient:
    """Pixels of one plane over those of another, both in dB; NaN where one is missing."""

    over: tuple[Plane, Calibration]
    under: tuple[Plane, Calibration]

    def read(self, rows: slice, cols: slice, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, None]:
        a, b = (convert(*plane.read(rows, cols, shape)) for plane, convert in (self.over, self.under))
        return np.clip(a / np.where(b == 0, np.nan, b), -RATIO_LIMIT, RATIO_LIMIT), None
