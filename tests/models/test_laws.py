"""Laws that every model keeps, on synthetic observations made from its own band contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat.find import find, names
from everysat.types import Batch, ContractError, Encoder, Features, Place, Raster

DAY_S = 86400.0


def example(encoder: Encoder, generator: torch.Generator, *, dates: int = 3) -> Batch:
    """One place somewhere, of four times the coarsest pixel along each side, every input observed, with some invalid pixels."""
    side = 4 * max((wanted.gsd_m for wanted in encoder.inputs.values()), default=10.0)
    lon, lat = (torch.rand(2, generator=generator) * 100 - 50).tolist()
    layers = {}
    for name, wanted in encoder.inputs.items():
        obs, px = dates if wanted.dated else 1, round(side / wanted.gsd_m)
        shape = (obs, len(wanted.sensor.bands), px, px)
        days = 18000 + torch.randperm(300, generator=generator)[:obs]
        values = torch.randn(shape, generator=generator)
        valid = (torch.rand(obs, 1, px, px, generator=generator) > 0.2).expand(shape)
        times = torch.stack([days, days + 1], 1).double() * DAY_S if wanted.dated else None
        layers[name] = Raster.of(wanted.sensor, values, wanted.gsd_m, valid=valid, time_s=times)
    return Batch((Place(side, side, lonlat=(lon, lat)),), layers)


@pytest.fixture(scope="module", params=names("models"))
def encoder(request) -> Encoder:
    module, _ = find("models", request.param)
    smallest = next((v for v in ("nano", "tiny") if v in getattr(module, "VARIANTS", {})), None)
    if smallest is None:
        pytest.skip(f"{request.param} has no variant 'nano' or 'tiny'")
    torch.manual_seed(0)
    model = module.build(smallest).eval()
    for parameter in model.parameters():  # what starts at zero would hide errors
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def reader(encoder: Encoder) -> Encoder:
    """The encoder, of laws about layers: some read none, only where a place lies."""
    if not encoder.inputs:
        pytest.skip(f"{encoder.family} reads no layer")
    return encoder


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(a.coords.row, b.coords.row)
    torch.testing.assert_close(a.coords.at_m, b.coords.at_m)


def test_features_have_the_promised_shape(encoder, generator) -> None:
    features = encoder.embed(Batch.cat([example(encoder, generator), example(encoder, generator)]))
    assert features.summary.shape == (2, encoder.dim)
    assert features.mean.shape == (len(features.coords), encoder.dim)
    assert features.grid().shape[:2] == (2, encoder.dim)
    assert torch.isfinite(features.summary).all()


def test_features_of_a_grid_are_the_features_again(reader, generator) -> None:
    batch = example(reader, generator)
    features = reader.embed(Batch.cat([batch, Batch(batch.places), batch.only(next(iter(reader.inputs)))]))
    again = Features.of_grid(features.grid(), features.places, float(features.coords.size_m[0]))
    torch.testing.assert_close(again.mean, features.mean)
    torch.testing.assert_close(again.coords.at_m, features.coords.at_m)
    assert torch.equal(again.coords.row, features.coords.row)
    torch.testing.assert_close(again.summary[0], features.mean[features.coords.row == 0].mean(0))
    assert (again.summary[1] == 0).all()


def test_two_in_a_batch_equal_one_by_one(encoder, generator) -> None:
    places = [example(encoder, generator, dates=n) for n in (2, 5, 1)]
    places.append(places[0].only(*list(encoder.inputs)[:1]))
    together = encoder.embed(Batch.cat(places))
    for i, place in enumerate(places):
        alone = encoder.embed(place)
        mine = together.coords.row == i
        torch.testing.assert_close(together.summary[i], alone.summary[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.mean[mine], alone.mean, rtol=1e-4, atol=1e-5)


def test_order_of_dates_is_irrelevant(reader, generator) -> None:
    batch = example(reader, generator, dates=5)
    layers = {n: layer.obs(torch.randperm(len(layer.row), generator=generator)) for n, layer in batch.layers.items()}
    same(reader.embed(batch), reader.embed(Batch(batch.places, layers)))


def test_order_of_modalities_is_irrelevant(reader, generator) -> None:
    batch = example(reader, generator)
    same(reader.embed(batch), reader.embed(Batch(batch.places, dict(reversed(batch.layers.items())))))


def test_changing_masked_values_changes_nothing(reader, generator) -> None:
    batch = example(reader, generator)
    layers = {n: replace(r, values=torch.where(r.valid, r.values, 1e6)) for n, r in batch.layers.items()}
    same(reader.embed(batch), reader.embed(Batch(batch.places, layers)))


def test_an_observation_that_is_all_invalid_changes_nothing(reader, generator) -> None:
    batch = example(reader, generator)
    layers = {}
    for name, raster in batch.layers.items():
        blind = replace(raster, valid=torch.zeros_like(raster.valid))
        layers[name] = Raster._cat([raster, blind.obs(torch.arange(1))], [0, 0])
    same(reader.embed(batch), reader.embed(Batch(batch.places, layers)))


@pytest.mark.parametrize("missing", ["one", "all but one"])
def test_any_subset_of_modalities_works(reader, generator, missing) -> None:
    batch = example(reader, generator)
    for name in reader.inputs:
        part = batch.without(name) if missing == "one" else batch.only(name)
        if part.layers:
            features = reader.embed(part)
            assert torch.isfinite(features.summary).all()
            assert torch.isfinite(features.mean).all()


def test_a_place_without_any_observation_has_a_finite_summary(reader, generator) -> None:
    batch = example(reader, generator)
    features = reader.embed(Batch.cat([Batch(batch.places), batch]))
    assert torch.isfinite(features.summary).all()
    assert not (features.coords.row == 0).any()
    alone = reader.embed(Batch(batch.places))
    torch.testing.assert_close(alone.summary[0], features.summary[0], rtol=1e-4, atol=1e-5)


def test_layers_that_the_model_does_not_know_are_ignored(reader, generator) -> None:
    batch = example(reader, generator)
    extra = batch.adding(unknown=next(iter(batch.layers.values())))
    same(reader.embed(batch), reader.embed(extra))


def test_gradients_reach_every_parameter(encoder, generator) -> None:
    encoder.zero_grad()
    if encoder.config.get("output") == "patch":  # some parameters serve the dense output alone
        encoder = encoder.at(output="dense")
    features = encoder(encoder.tokenize(example(encoder, generator)))
    (features.mean.square().sum() + features.summary.square().sum()).backward()
    silent = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert not silent


def test_a_layer_with_a_missing_band_is_refused(reader, generator) -> None:
    if reader.any_sensor:
        pytest.skip("takes any bands: what is missing counts as not valid")
    batch = example(reader, generator)
    name, wanted = next((n, w) for n, w in reader.inputs.items() if len(w.sensor.bands) > 1)
    first, *rest = wanted.sensor.names
    with pytest.raises(ContractError, match=first):
        reader.embed(batch.adding(**{name: batch.raster(name).select(rest)}))


def test_bands_in_another_order_are_put_right(reader, generator) -> None:
    batch = example(reader, generator)
    layers = {n: r.select(reversed(r.sensor.names)) for n, r in batch.layers.items()}
    same(reader.embed(batch), reader.embed(Batch(batch.places, layers)))


def test_config_rebuilds_the_same_model(encoder, generator) -> None:
    module, _ = find("models", encoder.family)
    twin = module.from_config(encoder.config).eval()
    twin.load_state_dict(encoder.state_dict())
    batch = example(encoder, generator)
    same(encoder.embed(batch), twin.embed(batch))


def test_a_place_that_is_no_multiple_of_the_patch_is_padded(reader, generator) -> None:
    batch = example(reader, generator)
    cut = {n: replace(r, values=r.values[..., :-1, :], valid=r.valid[..., :-1, :]) for n, r in batch.layers.items()}
    place = batch.places[0]
    lost = max(r.gsd_m for r in batch.layers.values())
    small = Batch((Place(place.height_m - lost, place.width_m),), cut)
    features = reader.embed(small)
    assert torch.isfinite(features.mean).all()


def test_a_missing_band_equals_an_invalid_one(reader, generator) -> None:
    if not reader.any_sensor:
        pytest.skip("needs all bands of its contract")
    batch = example(reader, generator)
    name, raster = next((n, r) for n, r in batch.layers.items() if len(r.sensor.bands) > 1)
    valid = raster.valid.clone()
    valid[:, 0] = False
    part = raster.select(raster.sensor.names[1:])
    same(reader.embed(batch.adding(**{name: replace(raster, valid=valid)})), reader.embed(batch.adding(**{name: part})))


def test_the_same_bands_of_another_sensor_are_refused(reader, generator) -> None:
    if reader.any_sensor:
        pytest.skip("takes any sensor, by the physics of its bands")
    batch = example(reader, generator)
    name, raster = next(iter(batch.layers.items()))
    other = replace(raster, sensor=replace(raster.sensor, name="another-sensor"))
    with pytest.raises(ContractError, match="read them with sensor="):
        reader.embed(batch.adding(**{name: other}))
