"""Encoders of domains: who reads what, both halves, what is shared, and the encoder that is left for the target. The common laws are in test_laws.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat import sensors
from everysat.models import domains, weights
from everysat.types import Batch, Place, Raster

S2 = {
    "sensor": "sentinel-2-l2a",
    "bands": ["B02", "B03", "B04", "B08"],
    "gsd_m": 10.0,
    "mean": [0.0] * 4,
    "std": [1.0] * 4,
}
S1 = {"sensor": "sentinel-1-grd", "bands": ["VV", "VH"], "gsd_m": 20.0, "mean": [-10.0] * 2, "std": [5.0] * 2}
BOTH = {"source/image": S2, "target/image": S1}
RESNET = {"name": "resnet/", "options": {"width": 2, "blocks": [1, 1, 1, 1]}}


def built(**options):
    torch.manual_seed(0)
    model = domains.build("", **{"modalities": BOTH, "encoder": RESNET, **options}).eval()
    for buffer in model.buffers():  # statistics that are not those of the start
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape))
    return model


def place(generator, domain, entry=None, side_m=160.0):
    entry = entry or BOTH[f"{domain}/image"]
    sensor, px = sensors.get(entry["sensor"]).select(entry["bands"]), round(side_m / entry["gsd_m"])
    values = torch.randn(1, len(sensor.bands), px, px, generator=generator)
    return Batch((Place(side_m, side_m),), {f"{domain}/image": Raster.of(sensor, values, entry["gsd_m"])})


def test_a_place_is_read_by_the_encoder_of_its_domain_alone(generator) -> None:
    model = built()
    batch = Batch.cat([place(generator, d) for d in ("target", "source", "target")])
    found = model.embed(batch)
    halves = model.halves(batch)
    assert halves["source"].row.tolist() == [1]
    assert halves["target"].row.tolist() == [0, 2]
    for name, one in halves.items():
        row, part = model.part(batch, name)
        assert row.equal(one.row)
        assert list(part.layers) == ["image"]
        alone = model.one(name).embed(part)
        torch.testing.assert_close(found.summary[row], alone.summary)
        torch.testing.assert_close(one.invariant, alone.summary)
        whole = model.one(name).backbone.embed(part).summary
        torch.testing.assert_close(torch.cat([one.invariant, one.specific], 1), whole)
    keep = torch.tensor([False, True, True])
    row, part = model.part(batch, "target", keep)
    assert row.tolist() == [2]
    assert part.raster("image").values.equal(batch[2].raster("target/image").values)


def test_what_one_domain_shows_changes_nothing_in_another(generator) -> None:
    model = built(split="projected", dim=16)
    batch = Batch.cat([place(generator, "source"), place(generator, "target")])
    raster = batch.raster("source/image")
    other = batch.adding(**{"source/image": replace(raster, values=raster.values + 1)})
    a, b = model.embed(batch).summary, model.embed(other).summary
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])
    assert a.shape == (2, 16)


@pytest.mark.parametrize("split", domains.SPLITS)
def test_the_target_alone_is_saved_and_read_again(generator, tmp_path, split) -> None:
    model = built(split=split)
    batch = place(generator, "target")
    file = weights.save(tmp_path / "target.safetensors", model.one("target"))
    again = weights.load(file)
    assert list(again.inputs) == ["image"]
    assert not [name for name in again.state_dict() if "source" in name]
    plain = Batch(batch.places, {"image": batch.raster("target/image")})
    assert torch.equal(again.embed(plain).summary, model.embed(batch).summary)
    whole = weights.load(weights.save(tmp_path / "both.safetensors", model))
    assert torch.equal(whole.embed(batch).summary, model.embed(batch).summary)


def test_parts_are_shared_and_stay_so(generator, tmp_path) -> None:
    apart, shared = built(), built(shared=["stages"])
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    stages = sum(p.numel() for p in apart.one("source").backbone.stages.parameters())
    assert count(apart) - count(shared) == stages
    again = weights.load(weights.save(tmp_path / "shared.safetensors", shared))
    for model in (shared, again):
        assert model.one("source").backbone.stages is model.one("target").backbone.stages
    batch = Batch.cat([place(generator, "source"), place(generator, "target")])
    assert torch.equal(again.embed(batch).summary, shared.embed(batch).summary)
    with pytest.raises(LookupError, match="Did you mean stages"):
        built(shared=["stage"])
    with pytest.raises(ValueError, match="'conv' has other sizes"):
        built(shared=["conv"])


def test_domains_may_have_encoders_of_different_kinds(generator) -> None:
    series = {**S1, "gsd_m": 10.0, "projector": "series"}
    own = {"target": {"name": "omnisat/", "options": {"patch_m": 10, "dim": 16, "depth": 1, "heads": 4, "grid": 1}}}
    options = {"modalities": {**BOTH, "target/image": series}, "encoder": RESNET, "encoders": own, "split": "projected"}
    model = built(**options, dim=5)
    dated = place(generator, "target", series, 10.0)
    raster = dated.raster("target/image")
    dated = dated.adding(**{"target/image": replace(raster, time_s=torch.tensor([[1.6e9, 1.6e9 + 1]]).double())})
    found = model.embed(Batch.cat([place(generator, "source"), dated]))
    assert found.summary.shape == (2, 5)
    assert (found.summary >= 0).all()
    assert {model.one(n).backbone.family for n in model.names} == {"resnet", "omnisat"}
    with pytest.raises(ValueError, match="differ in width"):
        built(**{**options, "split": "halves", "encoder": {"name": "resnet/", "options": {"width": 4}}})


def test_one_place_of_a_domain_trains(generator) -> None:
    """Batch normalisation has no deviation of one sample."""
    model = built(split="projected").train()
    batch = Batch.cat([place(generator, "source"), place(generator, "source"), place(generator, "target")])
    halves = model.halves(batch)["target"]
    halves.invariant.sum().backward()
    assert torch.isfinite(halves.invariant).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modalities": {"image": S2}}, ValueError, "called <domain>/<layer>"),
        ({"modalities": {}}, ValueError, "modalities is empty"),
        ({"encoder": "resnet"}, ValueError, "must say what it is"),
        ({"encoder": None}, ValueError, "of the domain 'source'"),
        ({"dim": 3}, ValueError, "take split='projected'"),
        ({"split": "thirds"}, ValueError, "halves"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        built(**options)
    with pytest.raises(LookupError, match="Did you mean target"):
        built().one("targt")
