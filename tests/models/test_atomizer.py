"""Atomizer beyond the laws of all models: any bands, the factored formulation, pruning, budgets and the read-out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import plain_atomizer
from everysat import sensors
from everysat.models import atomizer, weights
from everysat.nn.dense import dense_features
from everysat.nn.spectral import physics
from everysat.sensors import Band, Sensor
from everysat.tasks import classify
from everysat.types import Batch, ContractError, Features, Place, Raster

DAY_S = 86400.0


def raster(sensor, gsd_m, px, generator, *, dates=1, bands=None) -> Raster:
    found = sensors.get(sensor)
    found = found.select(bands) if bands else found
    values = torch.randn(dates, len(found.bands), px, px, generator=generator)
    valid = torch.rand(values.shape, generator=generator) > 0.2
    days = torch.arange(dates) * 30 + 18000
    return Raster.of(found, values, gsd_m, valid=valid, time_s=torch.stack([days, days + 1], 1).double() * DAY_S)


def place(side_m, **layers) -> Batch:
    return Batch((Place(side_m, side_m),), layers)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return atomizer.build("nano", layers="all").eval()


@pytest.fixture
def scene(generator) -> Batch:
    return place(
        80.0,
        s2=raster("sentinel-2-l2a", 10.0, 8, generator, dates=3, bands=("B02", "B03", "B04")),
        s1=raster("sentinel-1-asc", 20.0, 4, generator, bands=("VV", "VH")),
    )


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)


def test_order_of_tokens_is_irrelevant(model, scene, generator) -> None:
    tokens = model.tokenize(scene)
    with torch.no_grad():
        same(model(tokens), model(tokens[torch.randperm(len(tokens), generator=generator)]))


def test_a_token_is_a_valid_value(model, scene) -> None:
    tokens = model.tokenize(scene)
    assert len(tokens) == sum(int(layer.valid.sum()) for layer in scene.layers.values())
    assert tokens.x.shape == (len(tokens), 1)


def test_the_factored_maps_are_the_plain_ones(model, scene) -> None:
    atoms = model.atoms(model.tokenize(scene))
    maps = [cross.reading.map for cross in model.crosses]
    for norm, _ in maps:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    written = atoms.written()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for found, (norm, weight) in zip(atoms.projected(maps), maps, strict=True):
                torch.testing.assert_close(found, norm(written) @ weight.T, rtol=1e-4, atol=1e-5)


def test_chunks_change_neither_values_nor_gradients(model, scene, monkeypatch) -> None:
    found = []
    for elements in (10**9, 200):
        monkeypatch.setattr("everysat.nn.atoms.CHUNK_ELEMENTS", elements)
        model.zero_grad()
        features = model(model.tokenize(scene))
        features.mean.square().sum().backward()
        found.append(
            (features.mean.detach(), model.crosses[0].reading.to_kv.weight.grad.clone(), model.codes.grad.clone())
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_read_out_of_some_cells_at_a_time_is_that_of_all(model, scene, monkeypatch) -> None:
    whole = model.embed(scene)
    monkeypatch.setattr(atomizer, "CHUNK_PAIRS", 50)
    same(model.embed(scene), whole)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prune", [0.0, 0.3])
def test_a_stream_is_read_like_what_is_held(scene, monkeypatch, tied, prune) -> None:
    model = atomizer.build("nano", layers="all", tied=tied, prune=prune).eval()
    batch = Batch.cat([scene, Batch(scene.places), scene.only("s1")])
    found = []
    for held, pairs in ((10**9, 1 << 16), (0, 200)):
        monkeypatch.setattr(atomizer, "HELD_ELEMENTS", held)
        monkeypatch.setattr(atomizer, "CHUNK_PAIRS", pairs)
        with torch.no_grad():
            found.append(model(model.tokenize(batch), generator=torch.Generator().manual_seed(0)))
    same(*found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quirks", [(), atomizer.VARIANTS["bmvc"]["quirks"]])
def test_the_model_is_the_plain_one(generator, tied, quirks) -> None:
    torch.manual_seed(0)
    sizes = {
        k: atomizer.VARIANTS["nano"][k] for k in ("dim", "latents", "heads", "head_dim", "cross_head_dim", "depth")
    }
    changes = {"value_count": 5, "place_count": 6, "layers": "all", "tied": tied, "quirks": quirks}
    model = atomizer.build("bmvc", **{**sizes, **changes}).eval()
    batch = place(90.0, s2=raster("sentinel-2-l2a", 10.0, 9, generator))
    batch = batch.adding(s2=replace(batch.raster("s2"), time_s=torch.full((1, 2), torch.inf, dtype=torch.float64)))
    with torch.no_grad():
        expected = plain_atomizer.encode(model, batch, "s2")
    torch.testing.assert_close(model.embed(batch).summary, expected, rtol=1e-4, atol=1e-5)


def test_places_of_different_sensors_and_sizes_in_one_batch(model, generator) -> None:
    places = [
        place(60.0, naip=raster("naip", 1.25, 48, generator), dem=raster("copernicus-dem", 30.0, 2, generator)),
        place(120.0, s2=raster("sentinel-2-l2a", 20.0, 6, generator, dates=2)),
        place(40.0, s1=raster("sentinel-1-desc", 10.0, 4, generator, bands=("VH",))),
    ]
    statistics = {"sensor": "naip", "bands": sensors.get("naip").names, "gsd_m": 1.25}
    count = len(statistics["bands"])
    listed = {
        **atomizer.VARIANTS["nano"]["modalities"],
        "naip": {**statistics, "mean": (0.0,) * count, "std": (1.0,) * count},
    }
    model = atomizer.build("nano", layers="all", modalities=listed).eval()
    together = model.embed(Batch.cat(places))
    for row, alone in enumerate(map(model.embed, places)):
        mine = together.coords.row == row
        torch.testing.assert_close(together.summary[row], alone.summary[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.mean[mine], alone.mean, rtol=1e-4, atol=1e-5)


def test_an_unseen_sensor_is_read_by_its_physics(model, generator) -> None:
    """The same values under another wavelength, width, resolution or date say something else."""
    batch = place(60.0, x=raster("landsat-9-oli", 30.0, 2, generator, bands=("B2", "B5")))
    layer = batch.raster("x")
    base = model.embed(batch).summary
    blue, nir = layer.sensor.bands
    for changes in ({"wavelength_um": 1.6}, {"width_um": 0.3}, {"gsd_m": 100.0}):
        other = replace(layer, sensor=replace(layer.sensor, bands=(blue, replace(nir, **changes))))
        assert not torch.allclose(model.embed(batch.adding(x=other)).summary, base, atol=1e-4), changes
    later = replace(layer, time_s=layer.time_s + 100 * DAY_S)
    assert not torch.allclose(model.embed(batch.adding(x=later)).summary, base, atol=1e-4)
    undated = replace(layer, time_s=torch.tensor([[-torch.inf, torch.inf]], dtype=torch.float64))
    assert torch.isfinite(model.embed(batch.adding(x=undated)).summary).all()


def test_bands_of_the_same_physics_are_the_same_whatever_they_are_called(model, generator) -> None:
    batch = place(60.0, x=raster("landsat-9-oli", 30.0, 2, generator, bands=("B2", "B5")))
    layer = batch.raster("x")
    named = tuple(replace(b, name=f"b{i}", aliases=()) for i, b in enumerate(layer.sensor.bands))
    other = place(60.0, z=replace(layer, sensor=replace(layer.sensor, name="another", bands=named)))
    same(model.embed(batch), model.embed(other))


def test_radar_is_known_by_polarisation_and_orbit(model, generator) -> None:
    layer = raster("sentinel-1-grd", 10.0, 4, generator, bands=("VV", "VH"))
    said = {}
    for orbit in (None, "ascending", "descending"):
        bands = tuple(replace(b, orbit=orbit) for b in layer.sensor.bands)
        said[orbit] = model.embed(place(40.0, x=replace(layer, sensor=replace(layer.sensor, bands=bands)))).summary
    swapped = replace(layer, sensor=replace(layer.sensor, bands=tuple(reversed(layer.sensor.bands))))
    said["swapped"] = model.embed(place(40.0, x=swapped)).summary
    names = list(said)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.allclose(said[name], said[other], atol=1e-4), (name, other)


def test_a_model_of_wavelengths_alone_refuses_radar(generator) -> None:
    sizes = {"dim": 32, "latents": 4, "heads": 2, "head_dim": 8, "depth": 1}
    model = atomizer.build("bmvc", layers="all", **sizes)
    with pytest.raises(ContractError, match="no codes"):
        model.embed(place(40.0, s1=raster("sentinel-1-asc", 20.0, 2, generator, bands=("VV", "VH"))))


def test_a_layer_without_statistics_is_refused(generator) -> None:
    table = {"s2": {"sensor": "sentinel-2-l2a", "bands": ["B02"], "gsd_m": 10.0}}
    model = atomizer.build("nano", modalities=table)
    with pytest.raises(ContractError, match="no mean and std for layer 's2'"):
        model.embed(place(40.0, s2=raster("sentinel-2-l2a", 10.0, 4, generator, bands=("B02",))))


@pytest.mark.parametrize("regime", ["redrawn", "cumulative"])
def test_pruning(scene, generator, regime) -> None:
    model = atomizer.build("nano", layers="all", prune=0.4, regime=regime)
    tokens = model.tokenize(Batch.cat([scene, scene.only("s1")]))
    kept = model.pruned(tokens, torch.Generator().manual_seed(1))
    again = model.pruned(tokens, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert not torch.equal(kept[0], model.pruned(tokens, torch.Generator().manual_seed(2))[0])
    count = torch.bincount(tokens.coords.row)
    for layer, some in enumerate(kept):
        left = count - (count * 0.4).long()
        assert torch.equal(torch.bincount(tokens.coords.row[some]), left)
        if layer and regime == "cumulative":
            assert torch.isin(some, kept[layer - 1]).all()
        if layer and regime == "redrawn":
            assert not torch.equal(some, kept[layer - 1])
        count = left if regime == "cumulative" else count


def test_only_training_prunes_unless_asked(scene) -> None:
    model = atomizer.build("nano", layers="all", prune=0.5).eval()
    tokens = model.tokenize(scene)
    with torch.no_grad():
        whole = model(tokens).summary
        torch.testing.assert_close(model(tokens).summary, whole)
        drawn = [model(tokens, generator=torch.Generator().manual_seed(seed)).summary for seed in (1, 1, 2)]
        torch.testing.assert_close(drawn[0], drawn[1])
        assert not torch.allclose(drawn[0], drawn[2])
        assert not torch.allclose(drawn[0], whole)
        assert not torch.allclose(model.train()(tokens).summary, whole)


def test_pruning_draws_the_same_whatever_the_batch(scene) -> None:
    """Places draw by their number among all: the second of two draws what it draws alone as number 1."""
    row = torch.tensor([0] * 30 + [1] * 20)
    count = torch.tensor([10, 7])
    both = atomizer.kept_at_random(row, count, torch.Generator().manual_seed(0))
    alone = atomizer.kept_at_random(row[:20] * 0, count[1:], torch.Generator().manual_seed(0), first=1)
    assert torch.equal(both[30:], alone)
    assert both.sum() == 17


def test_a_budget_is_kept_and_spread(model, generator) -> None:
    px = 32
    batch = place(320.0, s2=raster("sentinel-2-l2a", 10.0, px, generator, bands=("B02", "B03", "B04")))
    view = model.at(budget=256)
    tokens = model.tokenize(batch)
    some = view.affordable(tokens)
    assert len(some) == 256
    quarters = (some.coords.at_m > 160).long()
    share = torch.bincount(quarters[:, 0] * 2 + quarters[:, 1], minlength=4)
    assert (share - 64).abs().max() <= 4
    assert (torch.bincount(some.coords.group) - 256 / 3).abs().max() < 30
    order = torch.randperm(len(tokens), generator=generator)
    again = view.affordable(tokens[order])
    assert {tuple(a) for a in some.coords.at_m.tolist()} == {tuple(a) for a in again.coords.at_m.tolist()}
    whole, part = model.embed(batch), view.embed(batch)
    assert torch.equal(whole.coords.at_m, part.coords.at_m)  # cells stay, however few tokens are read
    assert not torch.allclose(whole.summary, part.summary)
    same(model.at(budget=10**6).embed(batch), whole)


def test_cells_are_as_large_as_asked(model, scene) -> None:
    for token_m, cells in ((20.0, 16), (40.0, 4), (80.0, 1), (10.0, 64)):
        features = model.embed(scene, token_m=token_m)
        assert len(features.coords) == cells
        assert features.grid().shape[2:] == (round(80 / token_m),) * 2
    with pytest.raises(TypeError, match="depth"):
        model.at(depth=3)


def test_pixels_larger_than_a_cell_touch_all_cells_below(model, generator) -> None:
    batch = place(80.0, dem=raster("copernicus-dem", 40.0, 2, generator))
    valid = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    valid[0, 0, 0, 1] = True
    features = model.embed(batch.adding(dem=replace(batch.raster("dem"), valid=valid)), token_m=20.0)
    assert features.coords.cells().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_features_are_of_their_ground(model, generator) -> None:
    """What changes in one corner changes the features there most."""
    batch = place(80.0, s2=raster("sentinel-2-l2a", 10.0, 8, generator, bands=("B02", "B03", "B04")))
    layer = batch.raster("s2")
    values = layer.values.clone()
    values[..., :2, :2] += 3.0
    before, after = (model.embed(b).mean for b in (batch, batch.adding(s2=replace(layer, values=values))))
    assert (after - before).norm(dim=1).argmax() == 0


def test_the_submitted_model_says_one_thing_per_place(generator) -> None:
    sizes = {"dim": 32, "latents": 4, "heads": 2, "head_dim": 8, "depth": 1}
    model = atomizer.build("bmvc", layers="all", **sizes)
    batch = Batch.cat([place(40.0, s2=raster("sentinel-2-l2a", 10.0, 4, generator)), place(40.0)])
    features = model.embed(batch)
    assert features.coords.row.tolist() == [0]
    torch.testing.assert_close(features.mean[0], features.summary[0])
    assert features.grid().shape[2:] == (1, 1)


def test_converted_weights_must_be_tied_as_said() -> None:
    sizes = {"dim": 32, "latents": 4, "heads": 2, "head_dim": 8, "depth": 3, "per_cross": 1}
    model = atomizer.build("bmvc", **sizes)
    published = published_names(model.state_dict(), 3)
    converted = atomizer.convert(published, model.config)
    assert converted.keys() == model.state_dict().keys()
    name = "layers.2.1.fn.w1.weight"
    with pytest.raises(ContractError, match="differs"):
        atomizer.convert({**published, name: published[name] + 1}, model.config)


def published_names(state, depth):
    """The state under the names of the code of BMVC, tied layers listed again."""
    out = {}
    for name, value in state.items():
        layers = range(1, depth) if name.startswith(("crosses.1.", "selfs.1.")) else [None]
        for layer in layers:
            parts = name.split(".")
            if parts[0] in ("crosses", "selfs"):
                number = parts[1] if layer is None else str(layer)
                own = parts[2:] if parts[0] == "crosses" else parts[3:]
                which = {"reading": "0", "feed": "1", "attention": "0"}[own[0]]
                prefix = f"layers.{number}." + (which if parts[0] == "crosses" else f"2.{parts[2]}.{which}")
                rest = ".".join(own[1:])
                rest = (
                    rest
                    if rest.startswith("norm")
                    else "norm_context" + rest.removeprefix("context_norm")
                    if "context" in rest
                    else f"fn.{rest}"
                )
                out[f"{prefix}.{rest.replace('to_out.', 'to_out.0.')}"] = value
            elif parts[0] == "pooling":
                rest = ".".join(parts[1:])
                rest = (
                    f"1.{parts[2]}"
                    if parts[1] == "norm"
                    else "0." + rest
                    if rest == "query"
                    else "0.cross." + rest.replace("to_out.", "to_out.0.")
                )
                out[f"to_logits.{rest}"] = value
            else:
                out[name] = value
    return out


def test_the_thermal_infrared_is_no_blank(model) -> None:
    sensor = sensors.get("landsat-8-oli-l1")
    channels = [atomizer.Channel(p, b.gsd_m) for b in sensor.bands if (p := physics(sensor, b))]
    code = model.channel_table(channels)[:, : len(atomizer.ANCHORS)]
    assert (code.amax(1) > 0.5).all()


def test_errors_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"prune=1.5 must be in \[0, 1\)"):
        atomizer.build("nano", prune=1.5)
    with pytest.raises(ValueError, match="budget=-1"):
        atomizer.build("nano", budget=-1)
    with pytest.raises(LookupError, match="no variant 'nanoo'"):
        atomizer.build("nanoo")


def test_published_weights_convert_and_load(tmp_path) -> None:
    sizes = {"dim": 32, "latents": 4, "heads": 2, "head_dim": 8, "depth": 3, "per_cross": 1}
    model = atomizer.build("bmvc", **sizes)
    state = {k: v.clone() for k, v in published_names(model.state_dict(), 3).items()}
    state |= {
        "to_logits.2.weight": torch.zeros(19, 32),
        "transform.wavelength_encoding_s2": torch.zeros(1, 1, 2, 2, 12, 15),
    }
    save_file(state, tmp_path / "published.safetensors")
    done = weights.convert("atomizer/bmvc", tmp_path / "published.safetensors", tmp_path / "own.safetensors", **sizes)
    assert set(done.dropped) == {"to_logits.2.weight", "transform.wavelength_encoding_s2"}
    loaded = weights.load(tmp_path / "own.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_task_per_pixel_learns_where_things_are(generator) -> None:
    """Bright ground or dark, per cell of 20 m, from features of one encoder that is trained with its head."""
    torch.manual_seed(0)
    encoder = atomizer.build("nano", layers="all")
    bright = torch.rand(4, 4, generator=generator) > 0.5
    fine = bright.repeat_interleave(2, 0).repeat_interleave(2, 1)
    image = 0.2 * torch.randn(1, 3, 8, 8, generator=generator) + 2.0 * fine
    sensor = Sensor("marked", "classes", (Band("kind", 20.0, "class"),), source="test")
    label = Raster.of(sensor, bright.float()[None, None], 20.0)
    batch = place(
        80.0, x=Raster.of(sensors.get("sentinel-2-l2a").select(("B02", "B03", "B04")), image, 10.0), label=label
    )
    task = classify.build("pixel", encoder=encoder, classes={0: "dark", 1: "bright"}, gsd_m=20.0, token_size_m=20.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        terms = task(encoder, batch, generator)
        terms["loss"].backward()
        optimizer.step()
    assert terms["labelled"] == 16
    said = task.predict(encoder.embed(batch.without("label")), batch).values[0, 1] > 0.5
    assert torch.equal(said, bright)


def test_dense_features_of_a_large_place_come_from_chips(model, generator) -> None:
    batch = place(200.0, s2=raster("sentinel-2-l2a", 10.0, 20, generator, bands=("B02", "B03", "B04")))
    found = dense_features(model, batch, 10.0, token_m=20.0, chip_m=100.0, stride_m=100.0)
    assert found.shape == (1, 32, 20, 20)
    assert torch.isfinite(found).all()
