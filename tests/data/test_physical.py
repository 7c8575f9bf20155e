"""Digital numbers become physical values and validity as the sensor's table says, whatever type the file holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from everysat import sensors
from everysat.data.published import physical

S2 = sensors.get("sentinel-2-l2a").select(["B04", "B08"])
S1 = sensors.get("sentinel-1-grd").select(["VV", "VH"])
MIXED = replace(S2, bands=(replace(S2.bands[0], nodata=7, offset=-0.1), replace(S2.bands[1], nodata=None, scale=2.0)))
TYPES = ("uint8", "int16", "uint16", "int32", "float16", "float32", "float64")


def plain(sensor, numbers):
    """The same, one number at a time."""
    values, valid = np.zeros(numbers.shape, np.float32), np.zeros(numbers.shape, bool)
    for at in np.ndindex(numbers.shape):
        band, number = sensor.bands[at[1]], float(numbers[at])
        if np.isfinite(number) and number != band.nodata:
            valid[at] = True
            values[at] = np.float32(number) * np.float32(band.scale) + np.float32(band.offset)
    return values, valid


@pytest.mark.parametrize("how", ["whole", "read only", "turned", "nothing"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sensor", [S2, S1, MIXED], ids=["one nodata", "none", "mixed"])
def test_it_is_what_the_table_says(sensor, kind: str, how: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 12, (3, 2, 4, 5)).astype(kind)
    if numbers.dtype.kind == "f":
        numbers[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    if how == "read only":
        numbers.setflags(write=False)
    elif how == "turned":
        numbers = numbers[::-1, :, ::-1]
    elif how == "nothing":
        numbers = numbers[:0]
    before = numbers.copy()
    values, valid = physical(sensor, numbers)
    expected = plain(sensor, numbers)
    assert values.dtype == torch.float32
    assert torch.equal(valid, torch.from_numpy(expected[1]))
    assert np.allclose(values.numpy(), expected[0], rtol=1e-6, atol=1e-7)
    assert np.array_equal(numbers, before, equal_nan=numbers.dtype.kind == "f")  # what came is left as it was
