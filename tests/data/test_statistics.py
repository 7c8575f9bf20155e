"""Streamed statistics equal those of everything at once, and what is not valid has no part in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat.data.statistics import band_statistics, contract, spread
from everysat.data.synthetic import build


class Spoiled:
    """The same places with nonsense where pixels are not valid."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        batch = self.dataset[i]
        return replace(
            batch, layers={n: replace(r, values=torch.where(r.valid, r.values, 1e30)) for n, r in batch.layers.items()}
        )


def test_equal_to_all_pixels_at_once():
    data = build(places=12, clouds=0.6, missing=0.3)
    found = band_statistics(data)
    assert set(found) == {"vhr", "optical", "radar"}
    for name, (mean, std) in found.items():
        rasters = [data[i].raster(name) for i in range(12) if name in data[i].layers]
        for band in range(len(mean)):
            x = torch.cat([r.values[:, band][r.valid[:, band]] for r in rasters]).double()
            assert mean[band] == pytest.approx(x.mean().item(), rel=1e-9)
            assert std[band] == pytest.approx(x.std(unbiased=False).item(), rel=1e-9)


def test_invalid_values_have_no_effect():
    data = build(places=6, clouds=0.9)
    assert band_statistics(data) == band_statistics(Spoiled(data))


def test_contract_follows_from_the_data():
    data = build(places=6, missing=0.4)
    inputs = contract(data)
    assert {n: (i.gsd_m, i.dated) for n, i in inputs.items()} == {
        "vhr": (2.5, False),
        "optical": (10.0, True),
        "radar": (10.0, True),
    }
    normalised = torch.cat(
        [inputs["optical"].normalise(data[i].raster("optical")) for i in range(6) if "optical" in data[i].layers]
    )
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-4
    assert inputs["vhr"].fit(next(data[i].raster("vhr") for i in range(6) if "vhr" in data[i].layers), "vhr")


def test_a_constant_band_has_a_usable_deviation_and_a_missing_layer_an_error():
    data = build(places=2, noise=0.0, modalities={"flat": {"gsd_m": 10, "bands": 1}}, classes=1)
    assert band_statistics(data)["flat"][1] == (1.0,)
    with pytest.raises(LookupError, match="no place has a raster layer 's2'"):
        band_statistics(data, ["s2"])


def test_spread_takes_what_is_asked_evenly():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 4) == [0, 25, 50, 75]
