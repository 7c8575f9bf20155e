"""DOFA beside the laws of all models: what it refuses, wavelengths, sizes, dates, published names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everysat import sensors
from everysat.io import statistics as moments
from everysat.models import dofa, weights
from everysat.tasks import classify
from everysat.types import Batch, ContractError, Encoder, Features, Place, Raster

GOLDEN = Path(__file__).parent.parent / "golden"
DAY_S = 86400.0


def model(**changes: Any) -> dofa.Dofa:
    torch.manual_seed(0)
    return dofa.build("nano", **changes).eval()


def listed(sensor: str, *bands: str, gsd_m: float = 10.0, **more: Any) -> dict[str, Any]:
    return {
        "sensor": sensor,
        "bands": bands,
        "gsd_m": gsd_m,
        "mean": [0.0] * len(bands),
        "std": [1.0] * len(bands),
        **more,
    }


def place(
    encoder: Encoder, name: str, values: Tensor, gsd_m: float | None = None, dates: Tensor | None = None
) -> Batch:
    sensor = encoder.inputs[name].sensor
    gsd_m = encoder.inputs[name].gsd_m if gsd_m is None else gsd_m
    times = None if dates is None else torch.stack([dates, dates + 1], 1).double() * DAY_S
    side = values.shape[-1] * gsd_m
    return Batch((Place(values.shape[-2] * gsd_m, side),), {name: Raster.of(sensor, values, gsd_m, time_s=times)})


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.coords.at_m, b.coords.at_m)


# --- what is refused, and wavelengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (listed("copernicus-dem", "elevation"), "elevation .* has no wavelength"),
        (listed("alos-2-palsar-2", "HH", "HV"), "HH .* has no wavelength"),
    ],
)
def test_bands_without_a_wavelength_are_refused(described, message, generator) -> None:
    encoder = model(modalities={"x": described})
    batch = place(encoder, "x", torch.randn(1, len(described["bands"]), 8, 8, generator=generator))
    with pytest.raises(ContractError, match=message):
        encoder.embed(batch)


def test_given_wavelengths_stand_for_missing_ones_and_count(generator) -> None:
    values = torch.randn(1, 2, 8, 8, generator=generator)
    found = []
    for number in (3.75, 0.6):
        described = listed("alos-2-palsar-2", "HH", "HV", wavelength_um=[number, number])
        encoder = model(modalities={"x": described})
        found.append(encoder.embed(place(encoder, "x", values)))
    assert not torch.allclose(found[0].mean, found[1].mean, atol=1e-3)
    with pytest.raises(ValueError, match="wavelength_um has 1 values for 2 bands"):
        model(modalities={"x": listed("alos-2-palsar-2", "HH", "HV", wavelength_um=[0.5])})


def test_sentinel_1_has_the_number_of_the_published_weights(generator) -> None:
    values = torch.randn(1, 2, 8, 8, generator=generator)
    plain = model(modalities={"x": listed("sentinel-1-grd", "VV", "VH")})
    said = model(modalities={"x": listed("sentinel-1-grd", "VV", "VH", wavelength_um=[3.75, 3.75])})
    same(plain.embed(place(plain, "x", values)), said.embed(place(said, "x", values)))
    other = model(modalities={"x": listed("sentinel-1-grd", "VV", "VH")}, sentinel1=5.405)
    assert not torch.allclose(
        other.embed(place(other, "x", values)).mean, plain.embed(place(plain, "x", values)).mean, atol=1e-3
    )


def test_bands_by_their_wavelength_whatever_the_sensor(generator) -> None:
    """Two sensors whose tables differ in nothing but names give the same features."""
    values = torch.randn(1, 1, 8, 8, generator=generator)
    wave = sensors.get("sentinel-2-l2a")["B04"].wavelength_um
    own = {
        "name": "mine",
        "kind": "optical",
        "source": "x",
        "bands": [{"name": "r", "gsd_m": 10.0, "unit": "reflectance", "wavelength_um": wave}],
    }
    s2, mine = model(modalities={"x": listed("sentinel-2-l2a", "B04")}), model(modalities={"x": listed(own, "r")})  # type: ignore[arg-type]
    same(s2.embed(place(s2, "x", values)), mine.embed(place(mine, "x", values)))


@pytest.mark.parametrize("name", ["s2", "x"])
def test_statistics_of_the_band_itself_are_needed(name, generator) -> None:
    described = {**listed("sentinel-2-l2a", "B02", "B03"), "mean": None, "std": None}
    encoder = model(modalities={name: described})
    with pytest.raises(ContractError, match="no mean and std for layer"):
        encoder.embed(place(encoder, name, torch.randn(1, 2, 8, 8, generator=generator)))


def test_statistics_are_not_derived_from_other_bands(generator) -> None:
    encoder = model(modalities={"s2": listed("sentinel-2-l2a", "B02", "B04")})
    raster = Raster.of(
        sensors.get("sentinel-2-l2a").select(["B03"]), torch.randn(1, 1, 8, 8, generator=generator), 10.0
    )
    with pytest.raises(ContractError, match=r"B03 .* would be a guess"):
        encoder.embed(Batch((Place(80.0, 80.0),), {"s2": raster}))
    bare = model(modalities={})
    with pytest.raises(ContractError, match="would be a guess"):
        bare.embed(Batch((Place(80.0, 80.0),), {"s2": raster}))


def test_values_are_normalised_by_the_statistics(generator) -> None:
    plain = model(modalities={"s2": listed("sentinel-2-l2a", "B02", "B04")})
    scaled = model(modalities={"s2": {**listed("sentinel-2-l2a", "B02", "B04"), "mean": [0.2, 0.4], "std": [0.5, 0.1]}})
    values = torch.randn(1, 2, 8, 8, generator=generator)
    physical = values * torch.tensor([0.5, 0.1])[:, None, None] + torch.tensor([0.2, 0.4])[:, None, None]
    same(plain.embed(place(plain, "s2", values)), scaled.embed(place(scaled, "s2", physical)))


# --- sizes, dates, layers -----------------------------------------------------------------------------------------------


def test_the_size_of_a_patch_is_chosen_at_a_call(generator) -> None:
    encoder = model()
    batch = place(encoder, "s2", torch.randn(1, 3, 16, 8, generator=generator))
    assert encoder.embed(batch).grid().shape == (1, encoder.dim, 4, 2)
    coarse = encoder.embed(batch, patch_m=80.0)
    assert coarse.grid().shape == (1, encoder.dim, 2, 1)
    assert encoder.at(patch_m=80.0).settings.token_m == 80.0 == float(coarse.coords.size_m[0])
    with pytest.raises(TypeError, match="Did you mean patch_m"):
        encoder.at(patch=3)


def test_the_same_ground_at_another_pixel_size_gives_the_same(generator) -> None:
    """Nearest pixels repeated: an image of 10 m, and the same as one of 5 m, resampled to patches of pixels of 10 m."""
    encoder = model()
    values = torch.randn(1, 3, 4, 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fine = values.repeat_interleave(2, 2).repeat_interleave(2, 3)
    flat = torch.ones(1, 3, 16, 16) * torch.tensor([0.1, 0.5, 0.2])[:, None, None]
    a, b = encoder.embed(place(encoder, "s2", flat)), encoder.embed(place(encoder, "s2", flat.repeat(1, 1, 2, 2), 5.0))
    same(a, b)
    close = encoder.embed(place(encoder, "s2", fine, 5.0)).mean - encoder.embed(place(encoder, "s2", values)).mean
    assert 0 < close.abs().mean() < 0.1


def test_dates_count_as_their_mean_and_layers_stand_beside_each_other(generator) -> None:
    encoder = model()
    values = torch.randn(2, 3, 16, 16, generator=generator)
    both = place(encoder, "s2", values, dates=torch.tensor([18000, 18100]))
    each = [encoder.embed(place(encoder, "s2", values[i : i + 1])) for i in (0, 1)]
    found = encoder.embed(both)
    torch.testing.assert_close(found.mean, (each[0].mean + each[1].mean) / 2)
    torch.testing.assert_close(found.summary, (each[0].summary + each[1].summary) / 2)
    width = encoder.settings.dim
    assert (found.mean[:, width:] == 0).all()
    radar = place(encoder, "s1", torch.randn(1, 2, 8, 8, generator=generator))
    joint = encoder.embed(both.adding(**radar.layers))
    torch.testing.assert_close(joint.mean[:, :width], found.mean[:, :width])
    torch.testing.assert_close(joint.mean[:, width:], encoder.embed(radar).mean[:, width:])


def test_places_of_different_sizes_together_equal_one_by_one(generator) -> None:
    encoder = model()
    places = [
        place(encoder, "s2", torch.randn(1, 3, *size, generator=generator)) for size in ((16, 8), (10, 21), (16, 8))
    ]
    together = encoder.embed(Batch.cat(places))
    for i, one in enumerate(places):
        alone = encoder.embed(one)
        torch.testing.assert_close(together.mean[together.coords.row == i], alone.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.summary[i], alone.summary[0], rtol=1e-4, atol=1e-5)


def test_the_order_of_bands_counts_only_in_scrambled_kernels(generator) -> None:
    values = torch.randn(1, 2, 8, 8, generator=generator)
    for quirks, alike in (((), True), (("scrambled_kernels",), False)):
        a = model(modalities={"x": listed("sentinel-2-l2a", "B02", "B04")}, quirks=quirks)
        b = model(modalities={"x": listed("sentinel-2-l2a", "B04", "B02")}, quirks=quirks)
        found = a.embed(place(a, "x", values)).mean, b.embed(place(b, "x", values.flip(1))).mean
        assert torch.allclose(*found, atol=1e-5) == alike


def test_tokens_cannot_be_picked_from(generator) -> None:
    encoder = model()
    tokens = encoder.tokenize(place(encoder, "s2", torch.randn(1, 3, 16, 16, generator=generator)))
    with pytest.raises(ValueError, match="cannot be picked from"):
        encoder(tokens[torch.arange(3)])


def test_a_place_head_learns(generator) -> None:
    encoder = model(modalities={"s2": listed("sentinel-2-l2a", "B02", "B04")}).train()
    task = classify.build("place", encoder=encoder, classes=["a", "b"])
    codes = sensors.Sensor(
        "codes", "classes", (sensors.Band("label", 80.0, "class", classes={0: "a", 1: "b"}),), "made up"
    )
    places = []
    for i in range(4):
        one = place(encoder, "s2", torch.randn(1, 2, 8, 8, generator=generator) + 4.0 * (i % 2))
        places.append(one.adding(label=Raster.of(codes, torch.full((1, 1, 1, 1), float(i % 2)), 80.0)))
    batch, losses = Batch.cat(places), []
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = task(encoder, batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# --- published weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["base", "large"])
def test_every_published_name_and_shape_has_its_place(variant) -> None:
    published = json.loads((GOLDEN / "dofa_keys.json").read_text())[variant]
    state = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    with torch.device("meta"):
        encoder = dofa.build(variant)
    mapped = dofa.convert(state, encoder.config)
    assert {k: tuple(v.shape) for k, v in mapped.items()} == {
        k: tuple(v.shape) for k, v in encoder.state_dict().items()
    }
    assert len(published) - len(mapped) == 3  # mask_token and projector


NAMES = {
    "kernels.mix.": "patch_embed.weight_generator.transformer_encoder.layers.0.",
    "kernels.weight.": "patch_embed.weight_generator.fc_weight.",
    "kernels.bias.": "patch_embed.weight_generator.fc_bias.",
    "kernels.tokens": "patch_embed.weight_generator.weight_tokens",
    "kernels.last": "patch_embed.weight_generator.bias_token",
    "kernels.wave": "patch_embed.fclayer.w",
    "class_token": "cls_token",
    "position": "pos_embed",
}


def published(encoder: Encoder) -> dict[str, Tensor]:
    out = {}
    for key, value in encoder.state_dict().items():
        mine = next((n for n in NAMES if key.startswith(n)), "")
        out[NAMES.get(mine, "") + key.removeprefix(mine)] = value.clone()
    return out


@pytest.mark.parametrize("last", ["norm", "fc_norm", "none"])
def test_a_published_file_is_installed_under_its_name(tmp_path, last) -> None:
    encoder = model()
    torch.nn.init.normal_(encoder.norm.weight)
    state = published(encoder)
    plain = {key: state.pop(f"norm.{key}") for key in ("weight", "bias")}
    state |= {} if last == "none" else {f"{last}.{key}": value for key, value in plain.items()}
    state |= {"mask_token": torch.zeros(1, 1, 8), "projector.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "dofa.pth")
    done = weights.convert("dofa/nano", tmp_path / "dofa.pth", tmp_path / "d.safetensors", licence="CC-BY-4.0")
    assert set(done.dropped) == {"mask_token", "projector.weight"}
    again = weights.load(done.path).state_dict()
    if last == "none":
        assert (again["norm.weight"] == 1).all()
        again["norm.weight"] = encoder.norm.weight
    assert all(torch.equal(again[key], value) for key, value in encoder.state_dict().items())


def test_a_name_that_is_not_published_is_refused(tmp_path) -> None:
    state = published(model()) | {"blocks.7.extra": torch.zeros(1)}
    torch.save(state, tmp_path / "dofa.pth")
    with pytest.raises(ContractError, match=r"blocks\.7\.extra"):
        weights.convert("dofa/nano", tmp_path / "dofa.pth", tmp_path / "d.safetensors")
    both = published(model()) | {"fc_norm.weight": torch.zeros(1)}
    with pytest.raises(ContractError, match="both norm and fc_norm"):
        dofa.convert(both, {})


def test_statistics_of_data_list_the_layers(tmp_path, generator) -> None:
    entry = {
        "sensor": "sentinel-2-l2a",
        "bands": ["B02", "B03"],
        "gsd_m": 10.0,
        "mean": [0.1, 0.1],
        "std": [0.2, 0.2],
        "count": [9, 9],
    }
    stats = {"format": moments.FORMAT, "layers": {"s2": {**entry, "unit": ["reflectance"] * 2}}}
    encoder = model(modalities={})
    full = weights.normalised(encoder, stats).eval()
    assert list(full.inputs) == ["s2"]
    assert torch.isfinite(full.embed(place(full, "s2", torch.rand(1, 2, 8, 8, generator=generator))).summary).all()


def test_an_invalid_band_is_left_out_place_by_place(generator) -> None:
    encoder = model()
    values = torch.randn(2, 3, 8, 8, generator=generator)
    one, two = (place(encoder, "s2", values[i : i + 1]) for i in (0, 1))
    raster = two.raster("s2")
    valid = raster.valid.clone()
    valid[:, 1] = False
    two = two.adding(s2=replace(raster, valid=valid))
    together = encoder.embed(Batch.cat([one, two]))
    alone = encoder.embed(two.adding(s2=raster.select(["B02", "B04"])))
    torch.testing.assert_close(together.mean[together.coords.row == 1], alone.mean, rtol=1e-4, atol=1e-5)
