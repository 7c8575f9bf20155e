"""Students: each sees its own modality alone, alike with others in the batch or without, also in batch statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat.data import synthetic
from everysat.models import students, weights
from everysat.models.students import Students
from everysat.nn.inputs import described
from everysat.types import Batch, Input

OMNISAT = {
    "name": "omnisat/",
    "options": {"patch_m": 20.0, "grid": 3, "dim": 16, "depth": 1, "heads": 4, "dropout": 0.0, "drop_path": 0.0},
}


def inputs(data) -> dict[str, Input]:
    found = {}
    for name in ("vhr", "optical", "radar"):
        raster = next(data[i].raster(name) for i in range(len(data)) if name in data[i].layers)
        bands = len(raster.sensor.bands)
        found[name] = Input(raster.sensor, raster.gsd_m, (0.0,) * bands, (1.0,) * bands, dated=name != "vhr")
    return found


@pytest.fixture(scope="module")
def data():
    return synthetic.build(places=12, size_m=60.0, missing=0.3)


@pytest.fixture(scope="module")
def modalities(data):
    return {n: {**described(i), **students.layer(i, OMNISAT)} for n, i in inputs(data).items()}


@pytest.fixture
def model(modalities) -> Students:
    torch.manual_seed(0)
    model = students.build("", encoder=OMNISAT, modalities=modalities, dim=8)
    for part in model.modules():  # the attention over dates drops some, whatever the dropout
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    return model


def batch_of(data) -> Batch:
    return Batch.cat([data[i] for i in range(len(data))])


def test_a_student_alone_says_what_it_says_among_others(model, data) -> None:
    batch = batch_of(data)
    together = model.embed(batch)
    for name in model.names:
        one = model.one(name)
        assert list(one.inputs) == [name]
        alone = one.embed(batch)
        witness = together.each[name]
        torch.testing.assert_close(alone.summary, witness.features.summary)
        torch.testing.assert_close(alone.mean, witness.features.mean)
        assert torch.equal(alone.coords.row, witness.features.coords.row)
        assert alone.summary.shape[1] == one.dim == 16
    seen = torch.stack([together.each[n].observed for n in model.names])
    said = torch.stack([together.each[n].features.summary for n in model.names])
    torch.testing.assert_close(together.summary, said.sum(0) / seen.sum(0)[:, None])


def test_other_modalities_change_nothing_also_in_training(model, data) -> None:
    batch = batch_of(data)
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    together = model(model.tokenize(batch)).each["radar"]
    after = {n: t.clone() for n, t in model.state_dict().items() if "radar" in n}
    model.load_state_dict(kept)
    torch.manual_seed(1)
    alone = model(model.tokenize(batch.only("radar"))).each["radar"]
    torch.testing.assert_close(alone.places.invariant, together.places.invariant)
    for name, tensor in after.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_places_without_a_modality_take_no_part_in_its_statistics(model, data) -> None:
    batch = batch_of(data)
    rows = batch.raster("radar").row.unique()
    assert 2 < len(rows) < len(batch)
    having = Batch.cat([batch[int(i)] for i in rows])
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for one in (batch, having):
        model.load_state_dict(kept)
        witness = model(model.tokenize(one)).each["radar"]
        found.append((witness.places.useful[witness.observed], model.invariant["radar"].places.running_mean.clone()))
    torch.testing.assert_close(found[0], found[1])
    assert not found[0][1].equal(kept["invariant.radar.places.running_mean"])


def test_a_batch_of_one_can_be_trained_on(model, data) -> None:
    model.train()
    features = model(model.tokenize(data[0]))
    assert torch.isfinite(features.summary).all()
    features.summary.sum().backward()


def test_layers_of_a_group_are_one_modality(modalities, data) -> None:
    model = students.build("", encoder=OMNISAT, modalities=modalities, dim=8, groups={"earth": ["optical", "radar"]})
    assert model.names == ("earth", "vhr")
    assert set(model.one("earth").inputs) == {"optical", "radar"}
    batch = batch_of(data)
    with torch.no_grad():
        both = model.one("earth").embed(batch).summary
    assert not torch.allclose(both, model.one("earth").embed(batch.only("radar")).summary)


def test_each_modality_may_have_another_encoder(modalities, data, tmp_path) -> None:
    simple = {"name": "simplesat/nano", "options": {"token_m": 20.0}}
    model = students.build(
        "", encoders={"vhr": simple, "radar": OMNISAT}, dim=8, pair=False,
        modalities={"vhr": {k: v for k, v in modalities["vhr"].items() if k != "projector"} | {"dated": False}, "radar": modalities["radar"]},
    )  # fmt: skip
    assert [type(e[0]).__name__ for e in model.encoders.values()] == ["SimpleSat", "OmniSat"]
    batch = batch_of(data)
    before = model.embed(batch)
    assert before.grid().shape[1] == 16
    again = weights.load(weights.save(tmp_path / "a.safetensors", model))
    torch.testing.assert_close(again.embed(batch).mean, before.mean)
    one = weights.load(weights.save(tmp_path / "b.safetensors", model.one("vhr")))
    torch.testing.assert_close(one.embed(batch).mean, before.each["vhr"].features.mean)
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in model.parameters()) / 2


def test_tokens_of_different_sizes_are_not_mixed(modalities, data) -> None:
    coarse = {**OMNISAT, "options": {**OMNISAT["options"], "patch_m": 30.0}}
    model = students.build("", encoders={"optical": coarse, "radar": OMNISAT}, dim=8, modalities=modalities)
    features = model.embed(batch_of(data))
    with pytest.raises(ValueError, match="different sizes"):
        features.grid()
    assert torch.isfinite(features.summary).all()


def test_parts_are_not_negative_and_the_student_drops_the_irrelevant_one(model, data) -> None:
    witness = model.embed(batch_of(data)).each["optical"]
    for part in (witness.places.invariant, witness.places.informative, witness.places.irrelevant):
        assert (part >= 0).all()
        assert part.any()
    torch.testing.assert_close(
        witness.features.summary, torch.cat([witness.places.invariant, witness.places.informative], 1)
    )


def test_statistics_of_the_data_reach_every_encoder(modalities, data) -> None:
    model = students.build("", encoder=OMNISAT, modalities=modalities, dim=8)
    config = replace(model.inputs["vhr"], mean=(1.0, 2.0, 3.0))
    changed = {**model.config["modalities"], "vhr": {**model.config["modalities"]["vhr"], "mean": list(config.mean)}}
    again = students.from_config({**model.config, "modalities": changed})
    assert again.inputs["vhr"].mean == (1.0, 2.0, 3.0)
    assert all(e.inputs["vhr"].mean == (1.0, 2.0, 3.0) for e in again.encoders["vhr"])


def test_what_does_not_fit_is_refused(modalities) -> None:
    for options, error, words in (
        ({}, ValueError, "give either encoder"),
        ({"encoder": "omnisat"}, ValueError, "must say what to train"),
        ({"encoder": OMNISAT, "modalities": modalities, "groups": {"a": ["radr"]}}, ValueError, "Did you mean radar"),
        ({"encoder": OMNISAT, "modalities": modalities, "groups": {"a": ["vhr"], "b": ["vhr"]}}, ValueError, "is of two modalities"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            students.build("", **options)
    model = students.build("", encoder=OMNISAT, modalities=modalities)
    with pytest.raises(LookupError, match="Did you mean radar"):
        model.one("rader")
    with pytest.raises(LookupError, match="no variant"):
        students.build("big")
