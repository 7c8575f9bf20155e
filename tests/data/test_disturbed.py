"""Disturbed places: the same draws each time, no layer beyond those named, never a place without anything, noise as wide as said."""

from __future__ import annotations

import pytest
import torch

from everysat.data import fuel_moisture
from everysat.data.catalogue import dataset
from everysat.data.disturbed import Disturbed
from everysat.data.statistics import band_statistics
from everysat.manifest import fingerprint


@pytest.fixture(scope="module")
def fuel(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuel")
    fuel_moisture.fake(root)
    return dataset("fuel_moisture", root=str(root), fold=0, split="train")


@pytest.fixture(scope="module")
def std(fuel):
    return {name: std for name, (_, std) in band_statistics(fuel).items() if name != "label"}


def test_missing_layers_are_left_out_and_one_stays(fuel, std):
    most = Disturbed(fuel, share=1.0, how="missing", std=std)
    some = Disturbed(fuel, share=0.3, how="missing", std=std)
    gone, count = 0, 0
    for index in range(len(fuel)):
        assert len(set(most[index].layers) & set(std)) == 1
        assert set(some[index].layers) == set(some[index].layers) & set(fuel[index].layers)
        assert "label" in some[index].layers
        gone += len(fuel[index].layers) - len(some[index].layers)
        count += len(set(fuel[index].layers) & set(std))
    assert 0.2 < gone / count < 0.4
    assert {len(most[i].layers) for i in range(3)} == {2}
    assert {tuple(most[i].layers) for i in range(len(fuel))} != {tuple(most[0].layers)}, "which one stays differs"


def test_noise_has_the_width_that_is_said_and_touches_nothing_else(fuel, std):
    only = {"s2": std["s2"]}
    noisy = Disturbed(fuel, share=1.0, how="noise", std=only, deviations=2.0)
    ratios = []
    for index in range(len(fuel)):
        before, after = fuel[index], noisy[index]
        for name in set(before.layers) - {"s2"}:
            assert torch.equal(after.raster(name).values, before.raster(name).values)
        a, b = before.raster("s2"), after.raster("s2")
        assert torch.equal(a.valid, b.valid)
        change = (b.values - a.values) / torch.tensor(std["s2"])[None, :, None, None]
        assert (change[~a.valid] == 0).all()
        ratios.append(change[a.valid])
    assert 1.9 < float(torch.cat(ratios).std()) < 2.1
    assert torch.equal(noisy[0].raster("s2").values, noisy[0].raster("s2").values)
    other = Disturbed(fuel, share=1.0, how="noise", std=only, deviations=2.0, seed=1)
    assert not torch.equal(other[0].raster("s2").values, noisy[0].raster("s2").values)
    assert fingerprint(other) != fingerprint(noisy)


def test_what_cannot_be_is_refused(fuel, std):
    for wrong in ({"share": 0.0}, {"how": "gone"}, {"deviations": 0.0}):
        with pytest.raises(ValueError, match="must be above 0"):
            Disturbed(fuel, **{"share": 0.5, "how": "noise", "std": std, **wrong})
