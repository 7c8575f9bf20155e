"""UT&T beside the laws of all models: missing branches, sizes, several images, conversion, training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from everysat.models import utt, weights
from everysat.sensors import Band, Sensor
from everysat.tasks import classify
from everysat.types import Batch, ContractError, Place, Raster

GOLDEN = Path(__file__).parent.parent / "golden"
DAY_S = 86400.0


def model(**changes: Any) -> utt.Utt:
    torch.manual_seed(0)
    return utt.build("nano", **changes).eval()


def place(encoder: utt.Utt, height: int, width: int, generator: torch.Generator, images: int = 1) -> Batch:
    """A place of that many pixels of 10 m, with both layers."""
    pixels = torch.randn(images, 3, 2 * height, 2 * width, generator=generator)
    dates = torch.tensor([18000.0, 18040.0, 18100.0])
    series = torch.randn(3, 10, height, width, generator=generator)
    time_s = torch.stack([dates, dates + 1], 1).double() * DAY_S
    layers = {
        "spot": Raster.of(encoder.inputs["spot"].sensor, pixels, 5.0),
        "s2": Raster.of(encoder.inputs["s2"].sensor, series, 10.0, time_s=time_s),
    }
    return Batch((Place(height * 10.0, width * 10.0),), layers)


def test_features_lie_at_the_pixels_of_the_image(generator) -> None:
    encoder = model()
    features = encoder.embed(place(encoder, 18, 5, generator))
    assert features.grid().shape == (1, 8, 36, 10)
    assert float(features.coords.size_m[0]) == encoder.settings.token_m == 5.0
    torch.testing.assert_close(features.summary[0], features.mean.mean(0))


def test_series_and_image_both_count(generator) -> None:
    encoder = model()
    batch = place(encoder, 8, 8, generator)
    full = encoder.embed(batch).mean
    for name in ("spot", "s2"):
        raster = batch.raster(name)
        other = encoder.embed(batch.adding(**{name: replace(raster, values=raster.values + 1.0)})).mean
        assert not torch.allclose(full, other, atol=1e-3), name
    later = batch.raster("s2")
    shifted = replace(later, time_s=later.time_s + torch.tensor([[0.0], [90.0], [30.0]]).double() * DAY_S)
    assert not torch.allclose(full, encoder.embed(batch.adding(s2=shifted)).mean, atol=1e-4)


def test_a_place_without_series_is_the_u_net_alone(generator) -> None:
    encoder = model()
    batch = place(encoder, 16, 16, generator).only("spot")
    unet = encoder.projectors["spot"]
    maps = unet.encoded(batch.raster("spot").values)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2, 1]
    torch.testing.assert_close(encoder.embed(batch).grid(), unet.decoded(maps[-1], maps[:-1]).detach())


def test_a_missing_image_is_one_of_invalid_pixels(generator) -> None:
    encoder = model()
    batch = place(encoder, 8, 8, generator)
    image = batch.raster("spot")
    blind = batch.adding(spot=replace(image, valid=torch.zeros_like(image.valid)))
    gone, invalid = encoder.embed(batch.without("spot")), encoder.embed(blind)
    assert gone.grid().shape == (1, 8, 16, 16)
    torch.testing.assert_close(gone.mean, invalid.mean)


def test_several_images_count_as_the_mean_of_what_is_valid(generator) -> None:
    encoder = model()
    batch = place(encoder, 8, 8, generator, images=2)
    image = batch.raster("spot")
    valid = image.valid.clone()
    valid[1, :, :4] = False
    two = batch.adding(spot=replace(image, valid=valid))
    mean = image.values.mean(0, keepdim=True)
    mean[:, :, :4] = image.values[:1, :, :4]
    one = batch.adding(spot=Raster.of(image.sensor, mean, 5.0))
    torch.testing.assert_close(encoder.embed(two).mean, encoder.embed(one).mean)


def test_pixels_that_no_layer_observed_have_no_feature(generator) -> None:
    encoder = model()
    batch = place(encoder, 4, 4, generator)
    layers = {}
    for name, raster in batch.layers.items():
        valid = raster.valid.clone()
        valid[..., 0, 0] = False
        layers[name] = replace(raster, valid=valid)
    holes = torch.isnan(encoder.embed(Batch(batch.places, layers)).grid()[0, 0])
    assert torch.nonzero(holes).tolist() == [[0, 0]]


def test_places_of_different_sizes_together_equal_one_by_one(generator) -> None:
    encoder = model()
    places = [place(encoder, *size, generator) for size in ((8, 4), (18, 9), (8, 4))]
    places[2] = places[2].without("s2")
    together = encoder.embed(Batch.cat(places))
    for i, one in enumerate(places):
        alone = encoder.embed(one).mean
        torch.testing.assert_close(together.mean[together.coords.row == i], alone, rtol=1e-4, atol=1e-5)


def test_a_series_whose_pixels_do_not_divide_the_place_is_read(generator) -> None:
    """Of 10 m on a place of 85 m: the last pixel reaches beyond, and every pixel of the image has a feature."""
    encoder = model()
    batch = place(encoder, 9, 9, generator)
    image = batch.raster("spot")
    cut = replace(image, values=image.values[..., :17, :17], valid=image.valid[..., :17, :17])
    features = encoder.embed(Batch((Place(85.0, 85.0),), {"spot": cut, "s2": batch.raster("s2")}))
    assert features.grid().shape == (1, 8, 17, 17)


def test_layers_need_an_image_and_a_series_with_statistics(generator) -> None:
    layers = utt.VARIANTS["nano"]["modalities"]
    for wrong in (
        {"s2": layers["s2"]},
        {"spot": layers["spot"]},
        {n: {**x, "role": "image"} for n, x in layers.items()},
    ):
        with pytest.raises(ValueError, match="takes one, and a series"):
            model(modalities=wrong)
    for name in layers:
        encoder = model(modalities={**layers, name: {**layers[name], "mean": None, "std": None}})
        with pytest.raises(ContractError, match=f"no mean and std for layer '{name}'"):
            encoder.embed(place(encoder, 8, 8, generator))


def test_a_pixel_head_learns(generator) -> None:
    encoder = model().train()
    task = classify.build("pixel", encoder=encoder, classes=["a", "b"], gsd_m=5.0, token_size_m=5.0)
    codes = Sensor("codes", "classes", (Band("label", 5.0, "class", classes={0: "a", 1: "b"}),), "made up")
    places = []
    for _ in range(2):
        one = place(encoder, 16, 16, generator)
        target = (torch.randn(1, 1, 4, 4, generator=generator) > 0).float()
        target = target.repeat_interleave(8, 2).repeat_interleave(8, 3)
        image = one.raster("spot")
        image = replace(image, values=image.values + 3.0 * target)
        places.append(one.adding(spot=image, label=Raster.of(codes, target, 5.0)))
    batch, losses = Batch.cat(places), []
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss = task(encoder, batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in encoder.parameters())


def test_every_published_name_and_shape_has_its_place() -> None:
    listed = json.loads((GOLDEN / "utt_keys.json").read_text())["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in listed.items()}
    with torch.device("meta"):
        encoder = utt.build("base", **utt.PUBLISHED)
    mapped = utt.convert(state, encoder.config)
    own = encoder.state_dict()
    assert {k: tuple(v.shape) for k, v in mapped.items()} == {k: tuple(v.shape) for k, v in own.items()}


def test_a_published_file_says_what_it_loses(tmp_path) -> None:
    facts = json.loads((GOLDEN / "utt_s0.json").read_text())["config"]
    state = load_file(GOLDEN / "utt_s0.state.safetensors")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "utt.ckpt")
    layers = utt.VARIANTS["nano"]["modalities"]
    two = {
        "spot": layers["spot"],
        "s2": {**layers["s2"], "bands": ("B02", "B03"), "mean": (0.0,) * 2, "std": (1.0,) * 2},
    }
    done = weights.convert(
        "utt/", tmp_path / "utt.ckpt", tmp_path / "w.safetensors", prefix="model.", modalities=two, **facts
    )
    kinds = {re_key.split(".")[1] for re_key in done.dropped}
    assert kinds == {
        "arch_hr", "arch_vhr", "fm_utae_featmap_cropped", "fm_utae_featmap_collapsed", "mtd_mlp", "reshape_utae_output"
    }  # fmt: skip
    assert weights.load(done.path).config["quirks"] == ["days_backwards"]
    with pytest.raises(ContractError, match="of one series"):
        utt.convert(state, {**facts, "modalities": {**two, "other": two["s2"]}})


def test_features_of_cells_are_the_means_of_their_pixels(generator) -> None:
    encoder = model()
    batch = place(encoder, 6, 4, generator)
    raster = batch.raster("spot")
    valid = raster.valid.clone()
    valid[..., :2, :2] = False
    valid[..., 2, 0] = False
    batch = batch.only("spot").adding(spot=replace(raster, valid=valid))
    fine, coarse = encoder.embed(batch), encoder.embed(batch, cell_m=10.0)
    assert float(coarse.coords.size_m[0]) == 10.0 == encoder.at(cell_m=10.0).settings.token_m
    pixels, cells = fine.grid(), coarse.grid()
    assert torch.isnan(cells[0, :, 0, 0]).all()
    torch.testing.assert_close(cells[0, :, 1, 0], torch.nanmean(pixels[0, :, 2:4, :2], (1, 2)))
    torch.testing.assert_close(cells[0, :, 1, 1], pixels[0, :, 2:4, 2:4].mean((1, 2)))
    torch.testing.assert_close(coarse.summary, fine.summary)
    with pytest.raises(ValueError, match="must not be smaller than a pixel"):
        encoder.at(cell_m=1.0)
    with pytest.raises(TypeError, match="Did you mean cell_m"):
        encoder.at(cells=3)
