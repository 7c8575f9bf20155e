"""Scale-MAE beside the laws of all models: positions by ground distance, colours, sizes, published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everysat import sensors
from everysat.models import scalemae, weights
from everysat.tasks import regress
from everysat.types import Batch, ContractError, Encoder, Features, Input, Place, Raster

GOLDEN = Path(__file__).parent.parent / "golden"


def model(**changes: Any) -> scalemae.ScaleMae:
    torch.manual_seed(0)
    return scalemae.build("nano", **changes).eval()


def colours(sensor: str = "spot-6-7", gsd_m: float = 5.0, bands: tuple[str, ...] = ("red", "green", "blue")) -> Any:
    zero, one = [0.0] * len(bands), [1.0] * len(bands)
    return {"sensor": sensor, "bands": bands, "gsd_m": gsd_m, "mean": zero, "std": one}


def place(encoder: Encoder, name: str, values: Tensor, gsd_m: float | None = None) -> Batch:
    gsd_m = encoder.inputs[name].gsd_m if gsd_m is None else gsd_m
    raster = Raster.of(encoder.inputs[name].sensor, values, gsd_m)
    return Batch((Place(values.shape[-2] * gsd_m, values.shape[-1] * gsd_m),), {name: raster})


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-4, atol=1e-5)


def test_positions_count_metres_on_the_ground() -> None:
    """The fourth patch at 5 m has the code of the second at 15 m, and of none at 5 m but itself."""
    fine, coarse = (model(modalities={"x": colours(gsd_m=g)})._positions(2, 7) for g in (5.0, 15.0))
    torch.testing.assert_close(fine[0, 3], coarse[0, 1])
    torch.testing.assert_close(fine[1, 6][16:], fine[1, 0][16:])  # rows in one half
    assert not torch.allclose(fine[0, 3], coarse[0, 3], atol=1e-2)
    halved = model(modalities={"x": colours(gsd_m=10.0)}, reference_m=2.0)._positions(2, 7)
    torch.testing.assert_close(halved, fine)


def test_the_same_numbers_at_another_pixel_size_are_other_features(generator) -> None:
    encoder = model(modalities={"x": colours()})
    values = torch.randn(1, 3, 16, 16, generator=generator)
    near, far = encoder.embed(place(encoder, "x", values)), encoder.at(gsd_m={"x": 20.0})
    other = far.embed(place(far, "x", values))
    assert not torch.allclose(near.mean, other.mean, atol=1e-3)
    assert float(other.coords.size_m[0]) == 80.0 == far.settings.token_m
    assert next(far.parameters()) is next(encoder.parameters())


def test_patches_are_those_of_the_finest_layer_unless_chosen(generator) -> None:
    encoder = model()
    batch = place(encoder, "s2", torch.randn(1, 3, 4, 6, generator=generator))
    assert encoder.settings.token_m == 20.0
    assert encoder.embed(batch).grid().shape == (1, encoder.dim, 4, 6)
    assert encoder.embed(batch, patch_m=80.0).grid().shape == (1, encoder.dim, 1, 2)


def test_resampled_images_count_the_pixels_that_they_are_read_at(generator) -> None:
    """An image that is constant has the same features whatever its pixels are, once read at one pixel size."""
    encoder = model(modalities={"x": colours(gsd_m=20.0)}, patch_m=40.0)
    finer = encoder.at(gsd_m={"x": 5.0})
    flat = torch.tensor([0.3, -1.0, 2.0])[None, :, None, None]
    same(
        encoder.embed(place(encoder, "x", flat.expand(1, 3, 4, 4))),
        finer.embed(place(finer, "x", flat.expand(1, 3, 16, 16))),
    )


def test_layers_stand_beside_each_other_and_dates_are_averaged(generator) -> None:
    encoder = model()
    values = torch.randn(2, 3, 16, 16, generator=generator)
    both = encoder.embed(place(encoder, "spot", values))
    each = [encoder.embed(place(encoder, "spot", values[i : i + 1])) for i in (0, 1)]
    torch.testing.assert_close(both.mean, (each[0].mean + each[1].mean) / 2)
    assert (both.mean[:, 32:] == 0).all()
    assert encoder.dim == 64


def test_places_of_different_sizes_together_equal_one_by_one(generator) -> None:
    encoder = model()
    places = [place(encoder, "spot", torch.randn(1, 3, *s, generator=generator)) for s in ((16, 8), (10, 21), (16, 8))]
    together = encoder.embed(Batch.cat(places))
    for i, one in enumerate(places):
        alone = encoder.embed(one)
        torch.testing.assert_close(together.mean[together.coords.row == i], alone.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.summary[i], alone.summary[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "described",
    [
        colours(bands=("blue", "green", "red")),
        colours(bands=("red", "green", "nir")),
        colours(bands=("red", "green", "blue", "nir")),
        colours("sentinel-1-grd", bands=("VV", "VH")),
        colours("sentinel-2-l2a", bands=("B02", "B03", "B04")),
    ],
)
def test_other_bands_than_red_green_and_blue_are_refused(described) -> None:
    with pytest.raises(ContractError, match="reads red, green and blue, in this order"):
        model(modalities={"x": described})


def test_without_wavelengths_names_count() -> None:
    table = {"name": "mine", "kind": "optical", "source": "x", "defaults": {"gsd_m": 1.0, "unit": "DN"}}
    for names, fits in ((("Red", "Green", "Blue"), True), (("a", "b", "c"), False)):
        described = {**colours(bands=names), "sensor": {**table, "bands": [{"name": n} for n in names]}}
        if fits:
            model(modalities={"x": described})
        else:
            with pytest.raises(ContractError, match="bands a, b, c"):
                model(modalities={"x": described})


def test_a_layer_without_statistics_is_refused(generator) -> None:
    encoder = model(modalities={"x": {**colours(), "mean": None, "std": None}})
    with pytest.raises(ContractError, match="no mean and std for layer 'x'"):
        encoder.embed(place(encoder, "x", torch.randn(1, 3, 8, 8, generator=generator)))


def test_unknown_choices_are_errors_that_name_the_nearest() -> None:
    with pytest.raises(TypeError, match="Did you mean patch_m"):
        model().at(patch=3)
    with pytest.raises(LookupError, match="spot"):
        model().at(gsd_m={"spott": 3.0})
    with pytest.raises(ValueError, match="must be positive"):
        model(patch_m=-1.0)


def test_a_pixel_head_learns(generator) -> None:
    encoder = model(modalities={"x": colours()}).train()
    options: dict[str, Any] = {"gsd_m": 20.0, "token_size_m": encoder.settings.token_m}
    sensor = "copernicus-dem"
    task = regress.build("pixel", encoder=encoder, sensor=sensor, bands=["elevation"], mean=[0.0], std=[1.0], **options)
    batch = place(encoder, "x", torch.randn(1, 3, 16, 16, generator=generator))
    height = Raster.of(sensors.get(sensor), torch.randn(1, 1, 4, 4, generator=generator), 20.0)
    batch, losses = batch.adding(**{task.target: height}), []
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=0.005)
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(encoder, batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for n, p in encoder.named_parameters())


def test_every_published_name_and_shape_has_its_place() -> None:
    listed = json.loads((GOLDEN / "scalemae_keys.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in listed["encoder"].items()}
    with torch.device("meta"):
        encoder = scalemae.build("large")
    mapped = scalemae.convert({**state, **{key: torch.empty(1) for key in listed["other"]}}, encoder.config)
    own = encoder.state_dict()
    assert {k: tuple(v.shape) for k, v in mapped.items()} == {k: tuple(v.shape) for k, v in own.items()}
    assert len(mapped) == len(listed["encoder"]) == 293


@pytest.mark.parametrize("last", ["norm", "fc_norm"])
def test_a_published_file_is_installed_under_its_name(tmp_path, last) -> None:
    encoder = model()
    new = {"patches.": "patch_embed.proj.", "class_token": "cls_token", "norm.": f"{last}."}
    state = {}
    for key, value in encoder.state_dict().items():
        mine = next((n for n in new if key.startswith(n)), "")
        state[new.get(mine, "") + key.removeprefix(mine)] = value
    rest = {
        "pos_embed": torch.zeros(1, 5, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(1),
        "fpn.x": torch.zeros(1),
    }
    torch.save({"model": state | rest}, tmp_path / "published.pth")
    done = weights.convert(
        "scalemae/nano", tmp_path / "published.pth", tmp_path / "w.safetensors", licence="CC-BY-NC-4.0"
    )
    assert set(done.dropped) == set(rest)
    again = weights.load(done.path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in encoder.state_dict().items())
    with pytest.raises(ContractError, match="both norm and fc_norm"):
        scalemae.convert({"norm.weight": torch.zeros(1), "fc_norm.weight": torch.zeros(1)}, {})


@pytest.mark.parametrize(
    ("name", "bands"),
    [
        ("sentinel-2-l2a", ["B04", "B03", "B02"]),
        ("landsat-8-oli", ["B4", "B3", "B2"]),
        ("planetscope-8b", ["red", "green", "blue"]),
        ("flair-aerial", ["red", "green", "blue"]),
        ("sentinel-1-grd", None),
    ],
)
def test_the_colours_of_a_dataset_are_found_with_their_statistics(name, bands) -> None:
    sensor = sensors.get(name)
    count = len(sensor.bands)
    mean = tuple(float(i) for i in range(count))
    found = scalemae.layer(Input(sensor, 10.0, mean, (1.0,) * count))
    assert found.get("bands") == bands
    if bands is not None:
        assert found["mean"] == [mean[sensor.names.index(band)] for band in bands]
        model(modalities={"x": {"sensor": name, "gsd_m": 10.0, **found}})
