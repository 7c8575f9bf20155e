"""Bands by their physics."""

from __future__ import annotations

import math

import pytest
import torch

from everysat import sensors
from everysat.nn.position import sine_cosine
from everysat.nn.spectral import BandVectors, ScaleExperts, physics


@pytest.mark.parametrize(
    ("name", "band", "kind", "code", "orbit"),
    [
        ("sentinel-2-l2a", "B04", "optical", "", ""),
        ("landsat-8-oli", "B5", "optical", "", ""),
        ("sentinel-1-asc", "VV", "sar", "vv", "asc"),
        ("sentinel-1-desc", "VH", "sar", "vh", "des"),
        ("sentinel-1-grd", "VV", "sar", "vv", ""),
        ("copernicus-dem", "elevation", "terrain", "dsm", ""),
        ("aster-gdem", "slope", "terrain", "slope", ""),
    ],
)
def test_tables_say_what_a_band_measures(name, band, kind, code, orbit) -> None:
    sensor = sensors.get(name)
    found = physics(sensor, sensor[band])
    assert found is not None
    assert (found.kind, found.code, found.orbit) == (kind, code, orbit)
    if kind == "optical":
        assert found.wavelength_nm == 1000 * sensor[band].wavelength_um


def test_every_optical_and_radar_table_is_readable() -> None:
    """Of each, at least one band can be read by its physics; those that cannot are ratios, masks and the like."""
    for name in sensors.names():
        sensor = sensors.get(name)
        if sensor.kind in ("optical", "sar") and any(b.wavelength_um or b.polarisation for b in sensor.bands):
            assert any(physics(sensor, band) for band in sensor.bands), name


@pytest.mark.parametrize(
    ("name", "band"), [("era5", "t2m"), ("corine", None), ("sentinel-2-scl", None), ("eth-canopy-height", None)]
)
def test_what_is_no_physics_is_none(name, band) -> None:
    sensor = sensors.get(name)
    assert physics(sensor, sensor[band] if band else sensor.bands[0]) is None


def test_vectors_depend_on_physics_and_not_on_names_or_order() -> None:
    torch.manual_seed(0)
    vectors = BandVectors(32)
    s2 = sensors.get("sentinel-2-l2a").select(["B02", "B03", "B11"])
    forward, backward = vectors(s2), vectors(s2.select(["B11", "B03", "B02"]))
    torch.testing.assert_close(forward, backward.flip(0))
    unknown = vectors(sensors.get("sentinel-1-grd").select(["VV"]))
    orbits = [vectors(sensors.get(f"sentinel-1-{o}").select(["VV"])) for o in ("asc", "desc")]
    assert not torch.allclose(orbits[0], orbits[1])
    assert not torch.allclose(unknown, orbits[0])


def test_experts_equal_their_sum_one_by_one() -> None:
    torch.manual_seed(0)
    experts, x = ScaleExperts(16), torch.randn(5, 16)
    matrix, bias = experts(0.25)
    with torch.no_grad():
        code = sine_cosine(torch.tensor(math.log(0.25)), 16)
        share = (experts.mlp(code) / 0.7).softmax(-1)
        expected = x + sum(w * expert(x) for w, expert in zip(share, experts.experts, strict=True))
        torch.testing.assert_close(x @ matrix + bias, expected, rtol=1e-4, atol=1e-5)
