"""What Galileo promises beyond the laws of all models: the published numbers at every size of patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_rivals import batch_of, golden, weights_of

from everysat.data import chips
from everysat.models import galileo, weights
from everysat.types import Batch, ContractError, Features, Place


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return golden("galileo")


@pytest.fixture(scope="module")
def tiny(io) -> galileo.Galileo:
    model = galileo.build("nano", dim=16, depth=1, heads=2)
    weights.load_strictly(model, galileo.convert(weights_of(io), model.config), "golden")
    return model.eval()


@pytest.fixture(scope="module")
def published(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> galileo.Galileo:
    file = data_dir / "weights" / "galileo_nano" / "encoder.safetensors"
    out = tmp_path_factory.mktemp("galileo") / "nano.safetensors"
    done = weights.convert("galileo/nano", file, out)
    assert (done.kept, len(done.dropped)) == (74, 14)
    return weights.load(out)  # type: ignore[return-value]


def check(model: galileo.Galileo, io: dict[str, torch.Tensor], which: str, pixels: int) -> None:
    features = model.embed(batch_of(io), patch_m=10.0 * pixels)
    torch.testing.assert_close(features.summary, io[f"out.{which}.summary.{pixels}"], rtol=1e-4, atol=3e-5)
    side = 8 // pixels
    cells = features.coords.cells()
    expected = io[f"out.{which}.patches.{pixels}"][features.coords.row, cells[:, 0] * side + cells[:, 1]]
    assert len(expected) > side
    torch.testing.assert_close(features.mean, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("pixels", [2, 4])
def test_matches_the_published_implementation(tiny, io, pixels) -> None:
    check(tiny, io, "tiny", pixels)


@pytest.mark.parametrize("pixels", [2, 4])
def test_matches_the_published_weights(published, io, pixels) -> None:
    check(published, io, "real", pixels)


def test_tables_of_months_and_steps_are_those_of_the_weights(tiny, io) -> None:
    fresh, converted = galileo.build("nano", dim=16, depth=1, heads=2), galileo.convert(weights_of(io), {})
    torch.testing.assert_close(fresh.month, converted["month"])
    torch.testing.assert_close(fresh.position, converted["position"])


def test_a_tensor_without_a_place_is_noticed(tmp_path, io) -> None:
    state = {**weights_of(io), "space_embed.NEW.proj.weight": torch.zeros(1)}
    model = galileo.build("nano", dim=16, depth=1, heads=2)
    with pytest.raises(ContractError, match="NEW"):
        weights.load_strictly(model, galileo.convert(state, model.config), "golden")


@pytest.mark.parametrize("pixels", [1, 2, 4, 7])
def test_smaller_patches_have_the_same_product_with_what_they_can_show(tiny, pixels) -> None:
    """Images without more detail than is left when they are made smaller: the resampled weights say the same of both."""
    torch.manual_seed(0)
    resize = {"size": (pixels, pixels), "mode": "bicubic", "antialias": True}
    shrink = torch.nn.functional.interpolate(torch.eye(64).view(-1, 1, 8, 8), **resize).flatten(1)
    image = (torch.randn(2, pixels**2) @ shrink.T).view(1, 2, 8, 8)
    small = torch.nn.functional.interpolate(image, **resize)
    full, less = (tiny.at(patch_m=10.0 * x.shape[-1])._project("S1", x.flatten(1)) for x in (image, small))
    torch.testing.assert_close(less, full, rtol=1e-3, atol=1e-3)


def test_a_patch_seen_in_part_takes_the_mean_of_what_was_seen(tiny, io) -> None:
    batch = batch_of(io)[0]
    s1 = batch.raster("s1")
    half = torch.zeros_like(s1.valid)
    half[..., ::2] = True
    part = replace(s1, valid=s1.valid & half)
    patches = [s1.values[..., i : i + 4, j : j + 4][..., ::2].mean((-1, -2)) for i in (0, 4) for j in (0, 4)]
    even = torch.stack(patches, -1).view(*s1.values.shape[:2], 2, 2).repeat_interleave(4, -1).repeat_interleave(4, -2)
    filled = replace(s1, values=torch.where(half, s1.values, even))
    place = batch.only("s1")
    a, b = (tiny.embed(place.adding(s1=layer), patch_m=40.0) for layer in (part, filled))
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)


def test_weather_alone_speaks_for_every_patch(tiny, io) -> None:
    batch = batch_of(io)[0].only("era5")
    features = tiny.embed(batch, patch_m=40.0)
    assert features.grid().shape == (1, 16, 2, 2)
    torch.testing.assert_close(features.mean, features.summary.expand(4, -1))


def test_places_that_are_not_square_work(tiny, io) -> None:
    batch = batch_of(io)[1]
    wide = {n: replace(r, values=r.values[..., :4, :], valid=r.valid[..., :4, :]) for n, r in batch.layers.items()}
    wide["era5"] = batch.raster("era5")
    features = tiny.embed(Batch((replace(batch.places[0], height_m=40.0),), wide), patch_m=20.0)
    assert features.grid().shape == (1, 16, 2, 4)


def test_nothing_is_known_of_nowhere(tiny) -> None:
    features = tiny.embed(Batch((Place(40.0, 40.0), Place(40.0, 40.0, lonlat=(3.0, 4.0)))))
    assert len(features.coords) == 0
    assert (features.summary[0] == 0).all()
    assert (features.summary[1] != 0).any()


def test_patches_have_one_to_eight_pixels(tiny) -> None:
    for patch_m in (90.0, 15.0, 0.0):
        with pytest.raises(ValueError, match="patch_m"):
            tiny.at(patch_m=patch_m)
    with pytest.raises(TypeError, match="Did you mean patch_m"):
        tiny.at(patch=2)


def test_a_view_shares_the_weights(tiny) -> None:
    assert tiny.at(patch_m=40.0).channel is tiny.channel
    assert tiny.at(patch_m=40.0).settings.chip_m == 240.0


def test_a_real_place_of_cropharvest(published, data_dir) -> None:
    batch = chips.build("cropharvest", root=data_dir / "chips")[0]
    features: Features = published.embed(batch, patch_m=40.0)
    assert features.grid().shape == (1, 128, 5, 5)
    assert torch.isfinite(features.grid()).all()
