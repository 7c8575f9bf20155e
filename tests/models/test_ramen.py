"""What RAMEN promises beyond the laws of all models: any sensor, any target size, and the plain formulation's numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import plain_ramen
from everysat import sensors
from everysat.models import ramen, weights
from everysat.nn.position import day_number
from everysat.types import Batch, ContractError, Features, Place, Raster

DAY_S = 86400.0
SIZES = {"dim": 64, "depth": 2, "heads": 4, "time_heads": 8, "key_dim": 4}


def model(**changes: Any) -> ramen.Ramen:
    torch.manual_seed(0)
    encoder = ramen.build("", **{**SIZES, "gsd_m": 40.0, **changes})
    for name, parameter in encoder.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
        elif "codes" in name:
            parameter.data *= 20.0
    for name, buffer in encoder.named_buffers():  # statistics of a fresh normalisation would hide a wrong fold
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return encoder.eval()


def raster(name: str, bands: list[str], px: int, gsd_m: float, *, dates: int = 1, seed: int = 0) -> Raster:
    sensor = sensors.get(name).select(bands)
    g = torch.Generator().manual_seed(seed)
    start = (18000 + torch.randperm(300, generator=g)[:dates]).double() * DAY_S
    values = torch.rand(dates, len(bands), px, px, generator=g)
    return Raster.of(sensor, values, gsd_m, time_s=torch.stack([start, start + DAY_S], 1))


def scene(px: int = 16, dates: int = 1) -> Batch:
    side = px * 10.0
    layers = {
        "s2": raster("sentinel-2-l2a", ["B02", "B03", "B04", "B08"], px, 10.0, dates=dates),
        "s1": raster("sentinel-1-desc", ["VV", "VH"], px, 10.0, dates=dates, seed=1),
    }
    return Batch((Place(side, side),), layers)


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.coords.at_m, b.coords.at_m)


def plainly(encoder: ramen.Ramen, batch: Batch) -> Tensor:
    parts = []
    for name, layer in batch.layers.items():
        x = encoder.contracted(name, layer)[1].normalise(layer)[None]
        day = day_number(layer.time_s, None)[None]
        parts.append(plain_ramen.tokens_of(encoder, layer.sensor, x, layer.gsd_m, day))
    return plain_ramen.encode(encoder, parts)


@pytest.mark.parametrize("dates", [1, 4])
@pytest.mark.parametrize("gsd_m", [5.0, 10.0, 20.0, 40.0, 80.0])
def test_the_folded_stem_equals_the_plain_formulation(gsd_m, dates) -> None:
    encoder = model(gsd_m=gsd_m, output="layer", antialias=False, layers="all")
    batch = scene(dates=dates)
    features = encoder.embed(batch)
    with torch.no_grad():
        expected = plainly(encoder, batch)
    torch.testing.assert_close(features.summary, expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.mean, expected[0, 1:], rtol=1e-4, atol=1e-4)


def test_chunks_of_cells_change_nothing(monkeypatch) -> None:
    encoder, batch = model(layers="all", gsd_m=20.0), scene(dates=5)
    whole = encoder.embed(batch)
    monkeypatch.setattr(ramen, "CHUNK_ELEMENTS", 1000)
    same(encoder.embed(batch), whole)


def test_the_published_checkpoint_has_the_keys_and_sizes_of_base() -> None:
    listed = json.loads((Path(__file__).parent.parent / "golden" / "ramen_base_encoder_keys.json").read_text())
    assert listed["n_tensors"] == len(listed["keys"]) == 224
    state = {key: torch.empty(shape, device="meta") for key, shape in listed["keys"].items()}
    with torch.device("meta"):
        encoder = ramen.build("base")
    own = encoder.state_dict()
    mapped = ramen.convert(state, encoder.config)
    assert {k: tuple(v.shape) for k, v in mapped.items()} == {k: tuple(v.shape) for k, v in own.items()}
    dropped = 256  # the bias of the keys over dates
    assert sum(p.numel() for p in encoder.parameters()) == listed["params"] - dropped


def test_a_published_file_is_installed_under_its_name(tmp_path) -> None:
    """In the published layout, made up: random numbers under the names and shapes of a narrow encoder."""
    encoder = model(**ramen.PUBLISHED)
    published = published_names(encoder)
    torch.save({"state_dict": published}, tmp_path / "ramen.ckpt")
    done = weights.convert(
        "ramen/", tmp_path / "ramen.ckpt", tmp_path / "r.safetensors", licence="MIT", gsd_m=40.0, **SIZES
    )
    assert done.dropped == {"ltae.attention_heads.fc1_k.bias": "cancels in the softmax over dates"}
    batch = scene(dates=3)
    again = weights.load(done.path)
    assert again.config["quirks"] == ["stretched"]
    same(again.embed(batch), encoder.embed(batch))  # running statistics of L-TAE included


def published_names(encoder: ramen.Ramen) -> dict[str, Tensor]:
    own = encoder.state_dict()
    listed = json.loads((Path(__file__).parent.parent / "golden" / "ramen_base_encoder_keys.json").read_text())["keys"]
    depth = encoder.settings.depth
    wanted = [k for k in listed if not k.startswith("blocks.") or int(k.split(".")[1]) < depth]
    out = {}
    for key in wanted:
        if key.endswith("_param"):
            kind, band = key.removesuffix("_param").split("_projector.")
            codes = getattr(encoder.bands, {"radar": "radar", "dem": "terrain"}[kind])
            out[key] = codes.codes[codes.names.index(band)].detach().clone()
        elif key.endswith("fc1_k.bias"):
            out[key] = torch.randn(own["temporal.key.weight"].shape[0])
        else:
            name = next(iter(ramen.convert({key: torch.zeros(1, 1, 1, 1)}, {})))
            value = own[name].clone()
            out[key] = value[:, :, None, None] if "experts" in key and key.endswith("weight") else value
    return out


def test_any_sensor_needs_a_table_and_nothing_else(tmp_path) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(
        'title = "A camera"\nkind = "optical"\nsource = "made up"\n'
        'bands = [{ name = "x", gsd_m = 3, unit = "reflectance", wavelength_um = 0.51, width_um = 0.03 },'
        ' { name = "y", gsd_m = 3, unit = "reflectance", wavelength_um = 1.02, width_um = 0.1 }]\n'
    )
    image = Raster.of(sensors.get(str(table)), torch.rand(1, 2, 40, 24), 3.0)
    features = model().embed(image, gsd_m=12.0)
    assert features.grid().shape == (1, 64, 10, 6)
    assert torch.isfinite(features.mean).all()


@pytest.mark.parametrize("gsd_m", [3.0, 7.0, 10.0, 23.0, 160.0])
def test_any_target_size_covers_the_place(gsd_m) -> None:
    features = model(layers="all").embed(scene(), gsd_m=gsd_m)
    cells = -(-160 // gsd_m)
    assert features.grid().shape[2:] == (cells, cells)
    assert torch.isfinite(features.grid()).all()


def test_the_order_of_bands_is_irrelevant() -> None:
    encoder, batch = model(), scene(dates=3)
    layers = {n: r.select(reversed(r.sensor.names)) for n, r in batch.layers.items()}
    same(encoder.embed(batch), encoder.embed(Batch(batch.places, layers)))


def test_antialiasing_reads_every_pixel_and_its_absence_few() -> None:
    image = raster("sentinel-2-l2a", ["B02"], 64, 10.0)
    place = Batch((Place(640.0, 640.0),), {"s2": image})
    for antialias, share in ((True, 1.0), (False, (2 / 16) ** 2)):
        encoder = model(antialias=antialias, gsd_m=160.0)
        batch = place.adding(s2=replace(image, values=image.values.clone().requires_grad_()))
        encoder(encoder.tokenize(batch)).mean.square().sum().backward()
        gradient = batch.raster("s2").values.grad
        assert gradient is not None
        assert float((gradient != 0).float().mean()) == share


def test_a_listed_band_has_its_own_moments_and_others_those_of_their_neighbours() -> None:
    listed = {
        "s2": {
            "sensor": "sentinel-2-l2a",
            "bands": ["B03", "B08"],
            "gsd_m": 10,
            "mean": [0.1, 0.3],
            "std": [0.01, 0.03],
        }
    }
    encoder = model(modalities=listed)
    _, found = encoder.contracted("s2", raster("sentinel-2-l2a", ["B08", "B03"], 4, 10.0))
    assert found.mean == (0.3, 0.1)
    _, found = encoder.contracted("other", raster("landsat-8-oli", ["B4"], 4, 30.0))
    middle = (654.6 - 559.8) / (832.8 - 559.8)
    assert found.mean[0] == pytest.approx(0.1 + 0.2 * middle, abs=2e-3)
    assert found.std[0] == pytest.approx(0.01 + 0.02 * middle, abs=2e-4)


def test_an_unlisted_layer_is_read_only_on_request() -> None:
    listed = {"s2": {"sensor": "sentinel-2-l2a", "bands": ["B03"], "gsd_m": 10, "mean": [0.1], "std": [0.1]}}
    encoder, batch = model(modalities=listed), scene()
    same(encoder.embed(batch), encoder.embed(batch.only("s2")))
    assert not torch.allclose(encoder.embed(batch, layers="all").mean, encoder.embed(batch).mean)
    target = batch.adding(label=batch.raster("s1"))
    same(encoder.embed(target, layers="all"), encoder.embed(batch, layers="all"))


def test_a_band_without_physics_or_moments_is_refused_by_name() -> None:
    odd = raster("era5", ["t2m"], 4, 10.0)
    with pytest.raises(ContractError, match="no wavelength, polarisation or terrain quantity"):
        model().embed(odd)
    listed = {"s2": {"sensor": "sentinel-2-l2a", "bands": ["B03"], "gsd_m": 10}}
    with pytest.raises(ContractError, match="no mean and std for layer 's2'"):
        model(modalities=listed).embed(scene())
    spot = raster("spot-6-7", ["red"], 4, 1.5)
    with pytest.raises(ContractError, match="everysat stats"):
        model().embed(spot)


def test_a_series_without_dates_is_refused() -> None:
    image = raster("sentinel-2-l2a", ["B02"], 4, 10.0, dates=2)
    undated = replace(image, time_s=torch.tensor([[-torch.inf, torch.inf]] * 2, dtype=torch.float64))
    with pytest.raises(ContractError, match="without dates"):
        model().embed(undated)


def test_one_feature_per_layer_or_their_mean() -> None:
    encoder, batch = model(layers="all"), scene()
    each = encoder.embed(batch, output="layer")
    assert len(each.mean) == 2 * 16
    halves = each.mean.view(2, 16, -1)
    torch.testing.assert_close(encoder.embed(batch).mean, halves.mean(0))


def test_what_cannot_be_changed_at_a_call_is_said() -> None:
    with pytest.raises(TypeError, match="patch_m cannot be changed"):
        model().at(patch_m=10)
    with pytest.raises(ValueError, match="gsd_m"):
        model().at(gsd_m=0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("gsd_m", [7.0, 40.0, 70.0])
def test_places_of_different_sizes_do_not_change_each_other(gsd_m, antialias) -> None:
    encoder = model(layers="all", gsd_m=gsd_m, antialias=antialias, spread=True, skip=True)
    places = [scene(16, 2), scene(5, 3), scene(1), scene(9).only("s1")]
    together = encoder.embed(Batch.cat(places))
    for row, place in enumerate(places):
        alone, mine = encoder.embed(place), together.coords.row == row
        torch.testing.assert_close(together.mean[mine], alone.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.summary[row], alone.summary[0], rtol=1e-4, atol=1e-5)


def test_spread_tells_texture_where_cells_are_larger_than_pixels() -> None:
    flat = raster("sentinel-2-l2a", ["B03", "B08"], 16, 10.0)
    flat = replace(flat, values=torch.full_like(flat.values, 0.2))
    checked = replace(flat, values=flat.values + 0.1 * (torch.arange(16) % 2 * 2 - 1))
    for spread in (True, False):
        encoder = model(spread=spread, gsd_m=40.0, layers="all")
        found = [encoder.tokenize(Batch((Place(160.0, 160.0),), {"s2": r})) for r in (flat, checked)]
        cells = found[0].coords.cells()
        inner = ((cells > 0) & (cells < 3)).all(1)  # those at the edge do not read as many dark as bright pixels
        assert torch.allclose(found[0].x[inner], found[1].x[inner], atol=1e-4) == (not spread)


def test_reduced_precision_stays_near() -> None:
    encoder = model(layers="all", gsd_m=20.0, spread=True, skip=True)
    batch = Batch.cat([scene(16, 3), scene(9)])
    exact = encoder.embed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder.embed(batch)
    assert torch.nn.functional.cosine_similarity(exact.mean, rough.mean.float()).min() > 0.99
