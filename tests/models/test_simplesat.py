"""SimpleSat beside the laws of all models: branches apart, grids, tokens left out, training of its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from everysat.data.augment import Augment
from everysat.models import simplesat, weights
from everysat.objectives import contrastive
from everysat.sensors import Band, Sensor
from everysat.tasks import classify
from everysat.types import Batch, ContractError, Features, Place, Raster

DAY_S = 86400.0
SIDE_M = 80.0


def model(**changes: Any) -> simplesat.SimpleSat:
    torch.manual_seed(0)
    return simplesat.build("nano", **changes).eval()


def layer(
    encoder: simplesat.SimpleSat, name: str, generator: torch.Generator, side_m: float = SIDE_M, dates: int = 3
) -> Raster:
    wanted = encoder.inputs[name]
    dates, px = dates if wanted.dated else 1, round(side_m / wanted.gsd_m)
    values = torch.randn(dates, len(wanted.sensor.bands), px, px, generator=generator)
    days = torch.arange(dates)[:, None] * 20.0 + 18000.0 + torch.tensor([0.0, 1.0])
    return Raster.of(wanted.sensor, values, wanted.gsd_m, time_s=days.double() * DAY_S if wanted.dated else None)


def place(encoder: simplesat.SimpleSat, generator: torch.Generator, *names: str, side_m: float = SIDE_M) -> Batch:
    layers = {name: layer(encoder, name, generator, side_m) for name in names or encoder.inputs}
    return Batch((Place(side_m, side_m),), layers)


def changed(batch: Batch, name: str, cells: slice) -> Batch:
    """With other values of a layer in these rows of pixels."""
    raster = batch.raster(name)
    values = raster.values.clone()
    values[:, :, cells] += 5.0
    return batch.adding(**{name: Raster.of(raster.sensor, values, raster.gsd_m, time_s=raster.time_s)})


def test_every_layer_lies_on_the_grid_of_tokens(generator) -> None:
    """s2 at 10 m, s1 at 20 m, spot at 2.5 m."""
    for token_m, cells in ((10.0, 8), (20.0, 4), (5.0, 16), (30.0, 3)):
        encoder = model(token_m=token_m)
        tokens = encoder.tokenize(place(encoder, generator))
        assert tokens.groups == ("s2", "s1", "spot")
        assert torch.bincount(tokens.coords.group).tolist() == [cells**2] * 3
        assert (tokens.coords.size_m == encoder.settings.token_m).all()
        assert encoder(tokens).grid().shape == (1, encoder.dim, cells, cells)


def test_the_tokens_of_a_layer_depend_on_that_layer_alone(generator) -> None:
    encoder = model()
    batch = place(encoder, generator)
    with torch.no_grad():
        before = encoder.tokenize(batch)
        for group, name in enumerate(encoder.inputs):
            after = encoder.tokenize(changed(batch, name, slice(None)))
            same = before.coords.group != group
            torch.testing.assert_close(after.x[same], before.x[same])
            assert (after.x[~same] - before.x[~same]).abs().amax(1).min() > 1e-4


def test_tokens_tell_where_they_are_of(generator) -> None:
    """What changes in the north changes tokens there, not those at the far end, which convolutions do not reach."""
    encoder = model(modalities={"spot": simplesat.VARIANTS["nano"]["modalities"]["spot"]})
    batch = place(encoder, generator, "spot", side_m=400.0)
    change = encoder.embed(changed(batch, "spot", slice(4))).grid() - encoder.embed(batch).grid()
    assert change[0, :, 0].abs().min(dim=1).values.max() > 1e-4
    assert change[0, :, -10:].abs().max() == 0


def test_fusion_reads_the_tokens_of_its_cell_alone(generator) -> None:
    """A cell where one layer is left gives what that layer gives when it is the only one."""
    encoder = model()
    batch = place(encoder, generator)
    with torch.no_grad():
        tokens = encoder.tokenize(batch)
        north = tokens.coords.at_m[:, 0] < SIDE_M / 2
        s2 = tokens.coords.group == tokens.groups.index("s2")
        mixed = encoder(tokens[s2 | ~north]).grid()
    full, alone = encoder.embed(batch).grid(), encoder.embed(batch.only("s2")).grid()
    torch.testing.assert_close(mixed[:, :, :4], alone[:, :, :4])
    torch.testing.assert_close(mixed[:, :, 4:], full[:, :, 4:])
    assert (full - alone).abs().max() > 1e-4


def test_layers_that_are_not_there_equal_a_model_that_does_not_know_them(generator) -> None:
    encoder = model()
    one = model(modalities={"s1": simplesat.VARIANTS["nano"]["modalities"]["s1"]})
    mine = {name: tensor for name, tensor in encoder.state_dict().items() if name in one.state_dict()}
    one.load_state_dict({**mine, "code": encoder.code[list(encoder.inputs).index("s1")][None]})
    batch = place(encoder, generator)
    torch.testing.assert_close(encoder.embed(batch.only("s1")).mean, one.embed(batch).mean)


def test_layers_are_told_apart_where_they_say_the_same(generator) -> None:
    encoder = model()
    with torch.no_grad():
        tokens = encoder.tokenize(place(encoder, generator, "s2"))
        as_s1 = encoder(type(tokens)(tokens.x, tokens.coords, ("s1",), tokens.places))
        assert (as_s1.mean - encoder(tokens).mean).abs().max() > 1e-4


def test_several_images_of_a_place_are_averaged(generator) -> None:
    encoder = model()
    batch = place(encoder, generator, "spot")
    image = batch.raster("spot")
    twice = Raster._cat([image, image], [0, 0])
    torch.testing.assert_close(encoder.embed(batch.adding(spot=twice)).mean, encoder.embed(batch).mean)


def test_cells_that_only_one_layer_observed_have_a_feature(generator) -> None:
    encoder = model()
    batch = place(encoder, generator, "s2", "spot")
    s2, spot = batch.raster("s2"), batch.raster("spot")
    valid = torch.ones_like(s2.valid)
    valid[..., :6, :] = False
    nothing = torch.ones_like(spot.valid)
    nothing[..., 8:, :] = False
    batch = batch.adding(
        s2=Raster.of(s2.sensor, s2.values, s2.gsd_m, valid=valid, time_s=s2.time_s),
        spot=Raster.of(spot.sensor, spot.values, spot.gsd_m, valid=nothing),
    )
    seen = torch.isfinite(encoder.embed(batch).grid()[0, 0]).all(1)
    assert seen[[0, 1, 6, 7]].all()
    assert not seen[3:5].any()


def test_a_layer_without_statistics_is_refused(generator) -> None:
    encoder = simplesat.build("small", modalities={"s2": simplesat.S2})
    with pytest.raises(ContractError, match="no mean and std for layer 's2'"):
        encoder.embed(place(encoder, generator))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modalities": {}}, "name at least one layer"),
        ({"dim": 15}, "divisible by fusion_heads"),
        ({"image_blocks": (1, 1)}, "one more than image_blocks"),
        ({"token_m": 0}, "token_m"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, says) -> None:
    with pytest.raises(ValidationError, match=says):
        simplesat.build("nano", **change)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(LookupError, match="Did you mean small"):
        simplesat.build("smal")


def test_base_has_a_network_for_each_layer_of_pastis() -> None:
    encoder = simplesat.build("base")
    assert list(encoder.inputs) == ["spot", "s2", "s1-asc", "s1-des"]
    assert [encoder.inputs[n].dated for n in encoder.inputs] == [False, True, True, True]
    assert encoder.projectors["spot"].stride == 8


def test_weights_come_back(tmp_path, generator) -> None:
    encoder = model()
    batch = place(encoder, generator)
    again = weights.load(weights.save(tmp_path / "a.safetensors", encoder))
    assert torch.equal(again.embed(batch).mean, encoder.embed(batch).mean)


def halves(encoder: simplesat.SimpleSat, generator: torch.Generator, count: int) -> list[Batch]:
    """Places whose every layer says the same: which of two classes each half is of."""
    sensor = Sensor("halves", "classes", (Band("class", 10.0, "class", range=(0, 1)),), source="made up")
    places = []
    for _ in range(count):
        code = torch.randint(2, (2,), generator=generator).float().repeat_interleave(4)[:, None].expand(8, 8)
        layers = {}
        for name in encoder.inputs:
            raster = layer(encoder, name, generator)
            px = raster.values.shape[-1]
            level = torch.nn.functional.interpolate(code[None, None], size=(px, px), mode="nearest")
            values = raster.values * 0.5 + 2.0 * level - 1.0
            layers[name] = Raster.of(raster.sensor, values, raster.gsd_m, time_s=raster.time_s)
        layers["label"] = Raster.of(sensor, code[None, None], 10.0)
        places.append(Batch((Place(SIDE_M, SIDE_M),), layers))
    return places


def test_contrast_brings_layers_of_the_same_ground_together(generator) -> None:
    encoder = model()
    objective = contrastive.build(encoder=encoder, cells=8)
    places = halves(encoder, generator, 8)
    batch = Batch.cat([p.without("label") for p in places])
    optimizer = torch.optim.Adam([*encoder.train().parameters(), *objective.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective(encoder, batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    silent = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is None}
    assert silent == {"cross", "code"}, "fusion alone has no part in it"


def test_a_segmentation_that_saw_layers_left_out_holds_with_each_alone(generator) -> None:
    encoder = model(dropout=0.0)
    task = classify.build("pixel", encoder=encoder, classes=["a", "b"], loss="ce+dice", gsd_m=10, token_size_m=10)
    train, test = halves(encoder, generator, 12), Batch.cat(halves(encoder, generator, 12))
    augment = Augment(drop_layers=0.5)
    optimizer = torch.optim.Adam([*encoder.train().parameters(), *task.parameters()], lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        batch = Batch.cat([augment(p, generator, ("label",)) for p in train])
        task(encoder, batch, generator)["loss"].backward()
        optimizer.step()
    encoder.eval()
    for names in (tuple(encoder.inputs), *((name,) for name in encoder.inputs)):
        features: Features = encoder.embed(test.only(*names))
        found, truth = task.pairs(task.predict(features), test)
        accuracy = (found.argmax(1) == truth).float().mean()
        assert accuracy > 0.85, f"{names}: {accuracy:.2f}"
