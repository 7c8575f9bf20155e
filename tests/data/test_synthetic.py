"""The synthetic set is deterministic, physical, and all modalities see the same map."""

from __future__ import annotations

import pytest
import torch

from everysat.data.batches import Dataset
from everysat.data.synthetic import build
from everysat.types import Batch


def flat(batch: Batch) -> list[torch.Tensor]:
    return [t for layer in batch.layers.values() for t in (layer.values, layer.valid, layer.time_s)]


def test_an_item_depends_on_seed_and_index_alone():
    a, b, other = (
        build(places=4, missing=0.3, clouds=0.5),
        build(places=9, missing=0.3, clouds=0.5),
        build(places=4, seed=1),
    )
    assert isinstance(a, Dataset)
    for i in (3, 0, 3):
        assert a[i].layers.keys() == b[i].layers.keys()
        assert all(torch.equal(x, y) for x, y in zip(flat(a[i]), flat(b[i]), strict=True))
    assert not torch.equal(a[0].raster("label").values, other[0].raster("label").values)
    with pytest.raises(IndexError):
        a[4]


def test_layers_are_physical_and_fill_the_place():
    for batch in (build(clouds=0.5)[i] for i in range(8)):
        for layer in batch.layers.values():
            assert layer.values.shape[2] * layer.gsd_m == batch.height_m
            if layer.sensor.kind != "classes":
                low, high = layer.sensor.bands[0].range
                assert layer.values[layer.valid].min() > low
                assert layer.values[layer.valid].max() < high
        assert (batch.raster("optical").time_s[:, 0].diff() > 0).all()
        assert not torch.isfinite(batch.raster("vhr").time_s).any()


def test_missing_modalities_ragged_dates_and_clouds_are_as_asked():
    items = [build(places=200, missing=0.4, clouds=0.5)[i] for i in range(200)]
    share = sum("radar" in b.layers for b in items) / 200
    assert 0.5 < share < 0.72
    assert all(set(b.layers) - {"label"} for b in items)
    optical = [b.raster("optical") for b in items if "optical" in b.layers]
    assert {r.values.shape[0] for r in optical} == {3, 4, 5, 6}
    cloudy = torch.cat([~r.valid.all(1).flatten(1).all(1) for r in optical]).float().mean()
    assert 0.3 < cloudy < 0.6
    assert all(r.valid.all() for r in (build(places=9)[i].raster("optical") for i in range(9)))


@pytest.mark.parametrize("name", ["vhr", "optical"])
def test_every_modality_tells_the_classes(name):
    x, y = [], []
    data = build(places=24, noise=0.02)
    for i in range(len(data)):
        raster = data[i].raster(name)
        x.append(torch.nn.functional.adaptive_avg_pool2d(raster.values.mean(0), 6).flatten(1).T)
        y.append(data[i].raster("label").values.flatten())
    split = 36 * 12
    x, y = torch.cat(x), torch.cat(y).long()
    x = torch.cat([x, x**2, torch.ones(len(x), 1)], 1)
    weights = torch.linalg.lstsq(x[:split], torch.nn.functional.one_hot(y[:split], 4).float()).solution
    score = ((x[split:] @ weights).argmax(1) == y[split:]).float().mean()
    assert score > 0.75  # of 4 classes


def test_one_class_per_place_and_batches_of_all():
    data = build(places=3, label_gsd_m=60.0, missing=0.5)
    assert data[0].raster("label").values.shape == (1, 1, 1, 1)
    assert len(Batch.cat([data[i] for i in range(3)])) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_m": 55.0}, "size_m=55 is no multiple of the pixel of label"),
        ({"variant": "thre"}, "Did you mean three"),
        ({"missing": 2}, "missing=2 must be between"),
        ({"places": 0}, "places=0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises((ValueError, LookupError), match=message):
        build(**options)
