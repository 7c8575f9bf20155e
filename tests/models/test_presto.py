"""What Presto promises beyond the laws of all models: the published numbers, and that nothing missing becomes a value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_rivals import batch_of, golden, weights_of

from everysat.data import fuel_moisture, worldcereal
from everysat.models import presto, weights
from everysat.types import Batch, ContractError, Features, Place


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return golden("presto")


@pytest.fixture(scope="module")
def tiny(io) -> presto.Presto:
    model = presto.build("nano")
    weights.load_strictly(model, presto.convert(weights_of(io), model.config), "golden")
    return model.eval()


@pytest.fixture(scope="module")
def published(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> presto.Presto:
    file = data_dir / "weights" / "presto" / "default_model.safetensors"
    out = tmp_path_factory.mktemp("presto") / "base.safetensors"
    done = weights.convert("presto/base", file, out)
    assert done.kept == 49
    assert {key.split(".")[0] for key in done.dropped} == {"decoder", "encoder"}
    assert [key for key in done.dropped if key.startswith("encoder")] == ["encoder.dw_embed.weight"]
    return weights.load(out)  # type: ignore[return-value]


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)


def test_matches_the_published_implementation(tiny, io) -> None:
    features = tiny.embed(batch_of(io))
    torch.testing.assert_close(features.mean, io["out.tiny"], rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(features.summary, features.mean)


def test_matches_the_published_weights(published, io) -> None:
    torch.testing.assert_close(published.embed(batch_of(io)).mean, io["out.real"], rtol=1e-4, atol=3e-5)


def test_tables_of_months_and_steps_are_those_of_the_weights(io) -> None:
    fresh, converted = presto.build("nano"), presto.convert(weights_of(io), {})
    torch.testing.assert_close(fresh.month, converted["month"])
    torch.testing.assert_close(fresh.position, converted["position"])


def test_gradients_take_the_same_road_as_inference(tiny, io) -> None:
    batch = batch_of(io)
    with torch.enable_grad():
        same(tiny(tiny.tokenize(batch)), tiny.embed(batch))


def test_chunks_change_nothing(tiny, io, monkeypatch) -> None:
    batch = Batch.cat([batch_of(io), Batch((Place(10.0, 10.0),)), batch_of(io)])
    whole = tiny.embed(batch)
    monkeypatch.setattr(presto, "CHUNK_ELEMENTS", 1)
    same(tiny.embed(batch), whole)


def test_weather_alone_speaks_for_every_pixel(tiny, io) -> None:
    batch = batch_of(io)[0]
    place = replace(batch.places[0], height_m=20.0, width_m=30.0)
    features = tiny.embed(Batch((place,), batch.only("era5").layers))
    assert features.grid().shape == (1, tiny.dim, 2, 3)
    torch.testing.assert_close(features.mean, features.mean[:1].expand(6, -1))


def test_a_position_alone_gives_a_summary(tiny) -> None:
    here, there, nowhere = (
        tiny.embed(Batch((Place(10.0, 10.0, lonlat=at),))).summary for at in ((2.0, 48.0), (30.0, -3.0), None)
    )
    assert not torch.allclose(here, there, atol=1e-3)
    torch.testing.assert_close(nowhere[0], tiny.norm.bias.detach())


def test_what_is_missing_is_no_zero(tiny, io) -> None:
    """Bands that are not valid must not be as if they were measured to be 0, nor the NDVI that is made of them."""
    batch = batch_of(io)[0]
    s2 = batch.raster("s2")
    dark = replace(s2, values=torch.where(s2.valid, s2.values, 0.0), valid=torch.ones_like(s2.valid))
    assert not torch.allclose(tiny.embed(batch).mean, tiny.embed(batch.adding(s2=dark)).mean, atol=1e-3)
    nothing = replace(s2, values=torch.full_like(s2.values, torch.nan), valid=torch.zeros_like(s2.valid))
    same(tiny.embed(batch.adding(s2=nothing)), tiny.embed(batch.without("s2")))


def test_pixels_without_light_have_no_ndvi(tiny, io) -> None:
    batch = batch_of(io)[0]
    black = replace(batch.raster("s2"), values=torch.zeros_like(batch.raster("s2").values))
    groups = tiny.tokenize(batch.adding(s2=black)).coords.group
    assert not (groups == presto.GROUPS.index("NDVI")).any()
    assert (groups == presto.GROUPS.index("S2_RGB")).any()


def test_level_1c_is_taken_as_well(tiny, io) -> None:
    batch = batch_of(io)
    raster = batch.raster("s2")
    other = replace(raster, sensor=replace(raster.sensor, name="sentinel-2-l1c"))
    same(tiny.embed(batch.adding(s2=other)), tiny.embed(batch))


def test_two_years_are_the_limit(tiny, io) -> None:
    batch = batch_of(io)[0]
    s1 = batch.raster("s1").obs(torch.tensor([0, 1]))
    later = s1.time_s.clone()
    later[1] = later[0] + 24 * 30 * 86400.0
    with pytest.raises(ContractError, match="25 months, the model takes 24"):
        tiny.embed(Batch(batch.places, {"s1": replace(s1, time_s=later, valid=torch.ones_like(s1.valid))}))


def test_seasons_are_no_months(tiny, io) -> None:
    batch = batch_of(io)[0]
    s2 = batch.raster("s2")
    season = replace(s2, time_s=torch.stack([s2.time_s[:, 0], s2.time_s[:, 0] + 180 * 86400.0], 1))
    with pytest.raises(ContractError, match="180 days"):
        tiny.embed(batch.adding(s2=season))


def test_a_wrong_position_is_refused(tiny, io) -> None:
    batch = batch_of(io)[0]
    with pytest.raises(ContractError, match="latitude"):
        tiny.embed(replace(batch, places=(replace(batch.places[0], lonlat=(48.0, 120.0)),)))


def test_left_out_bands_are_as_if_they_were_not_valid(tiny, io) -> None:
    batch = batch_of(io)
    s2 = batch.raster("s2")
    hidden = replace(
        s2, valid=s2.valid & torch.tensor([name not in ("B04", "B8A") for name in s2.sensor.names]).view(1, -1, 1, 1)
    )
    fewer = s2.select(name for name in s2.sensor.names if name not in ("B04", "B8A"))
    same(tiny.embed(batch.adding(s2=fewer), without=["B04", "B8A"]), tiny.embed(batch.adding(s2=hidden)))


def test_an_unknown_setting_variant_or_band_is_an_error(tiny) -> None:
    with pytest.raises(TypeError, match="cannot be changed"):
        tiny.at(patch_m=20.0)
    with pytest.raises(ValueError, match="B01 is none of the optical bands"):
        tiny.at(without=["B01"])
    with pytest.raises(LookupError, match="base"):
        presto.build("bass")
    wrong = {"s2": {**presto.MODALITIES["s2"], "bands": ("B01",), "mean": (0.0,), "std": (1.0,)}}
    with pytest.raises(ValueError, match="B01"):
        presto.build("nano", modalities=wrong)
    with pytest.raises(ValueError, match="gsd_m"):
        presto.build("nano", gsd_m=20.0)


def test_real_sites_of_fuel_moisture(published, data_dir) -> None:
    data = fuel_moisture.build(root=data_dir / "fuel_moisture", split="all")
    features = published.embed(Batch.cat(data[i] for i in range(0, 1578, 100)))
    assert features.summary.shape == (16, 128)
    assert torch.isfinite(features.summary).all()


def test_real_fields_of_worldcereal_lack_b8a(data_dir, published) -> None:
    data = worldcereal.build("points", root=data_dir / "worldcereal", modalities=["s2", "s1", "dem", "agera5"])
    batch = Batch.cat(data[i] for i in range(4))
    with pytest.raises(ContractError, match="lacks B8A"):
        published.embed(batch)
    model = published.at(without=["B8A"])
    features = model.embed(batch)
    assert torch.isfinite(features.summary).all()
    groups = {presto.GROUPS[g] for g in model.tokenize(batch).coords.group.tolist()}
    assert groups == set(presto.GROUPS) - {"S2_NIR_20m", "SRTM"}
