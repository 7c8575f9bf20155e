"""What AnySat promises beyond the laws of all models: any extent, any patch, true positions, memory in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from everysat.models import anysat
from everysat.types import Batch, ContractError, Features, Place, Raster

DAY_S = 86400.0


def model(*names: str, seed: int = 0, **changes: Any) -> anysat.AnySat:
    torch.manual_seed(seed)
    plain = {
        n: {**anysat.MODALITIES[n], "mean": (0.0,) * len(m["bands"]), "std": (1.0,) * len(m["bands"])}
        for n, m in anysat.MODALITIES.items()
        if n in names
    }
    encoder = anysat.build("", **{"dim": 64, "depth": 2, "heads": 4, "patch_m": 20.0, "modalities": plain, **changes})
    for name, parameter in encoder.named_parameters():  # at its beginning, attention is flat and would hide errors
        if not parameter.any() or "relative" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim > 1 and not name.startswith("projectors"):
            parameter.data *= 8.0
    return encoder.eval()


def layer(
    encoder: anysat.AnySat, name: str, height_m: float, width_m: float, *, dates: int = 3, seed: int = 0
) -> Raster:
    wanted, g = encoder.inputs[name], torch.Generator().manual_seed(seed)
    size = (
        -(-round(height_m * 100) // round(wanted.gsd_m * 100)),
        -(-round(width_m * 100) // round(wanted.gsd_m * 100)),
    )
    obs = dates if wanted.dated else 1
    start = (18000 + torch.randperm(300, generator=g)[:obs]).double() * DAY_S
    values = torch.randn(obs, len(wanted.sensor.bands), *size, generator=g)
    time_s = torch.stack([start, start + DAY_S], 1) if wanted.dated else None
    return Raster.of(wanted.sensor, values, wanted.gsd_m, time_s=time_s)


def place(encoder: anysat.AnySat, height_m: float, width_m: float, *names: str, dates: int = 3) -> Batch:
    layers = {n: layer(encoder, n, height_m, width_m, dates=dates, seed=i) for i, n in enumerate(names)}
    return Batch((Place(height_m, width_m),), layers)


def same(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.summary, b.summary, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.coords.at_m, b.coords.at_m)


@pytest.mark.parametrize("patch_m", [10, 20, 40, 60])
def test_the_patch_is_chosen_at_the_call(patch_m) -> None:
    encoder = model("spot", "s2", "s1")
    batch = place(encoder, 120, 120, "spot", "s2", "s1")
    features = encoder.embed(batch, patch_m=patch_m)
    assert features.grid().shape == (1, 64, 120 // patch_m, 120 // patch_m)
    assert encoder.settings.patch_m == 20  # the view changed, not the encoder


@pytest.mark.parametrize("dense", ["", "aerial", "s2"])
def test_settings_say_how_large_dense_features_are(dense) -> None:
    encoder = model("aerial", "s2", output="dense", dense=dense)
    shown = dense or next(iter(encoder.settings.modalities))
    assert encoder.settings.token_m == encoder.settings.modalities[shown].sub_m < encoder.settings.patch_m
    features = encoder.embed(place(encoder, 40, 40, "aerial", "s2"))
    assert torch.allclose(features.coords.size_m, torch.tensor(encoder.settings.token_m))


def test_places_need_not_be_square() -> None:
    encoder = model("s2", "spot")
    assert encoder.embed(place(encoder, 60, 100, "s2", "spot")).grid().shape[2:] == (3, 5)


def test_what_a_place_lacks_to_whole_patches_is_left_out_not_cropped() -> None:
    encoder = model("s2", "spot")
    small = place(encoder, 50, 70, "s2", "spot")
    found = encoder.embed(small)
    assert found.grid().shape[2:] == (3, 4)
    grown = {n: r._padded(*(round(m / r.gsd_m) for m in (60, 80))) for n, r in small.layers.items()}
    same(found, encoder.embed(Batch((Place(60, 80),), grown)))


def test_chunks_change_nothing(monkeypatch) -> None:
    encoder = model("spot", "s2", "l7", output="dense", dense="s2")
    batch = Batch.cat([place(encoder, 120, 120, "spot", "s2", "l7"), place(encoder, 60, 120, "spot", "s2", dates=5)])
    whole = encoder.embed(batch)
    monkeypatch.setattr(anysat, "CHUNK_ELEMENTS", 3000)
    same(whole, encoder.embed(batch))


def test_the_token_alone_equals_the_token_among_its_subpatches() -> None:
    encoder = model("spot", "s2", "aerial")
    batch = place(encoder, 40, 40, "spot", "s2", "aerial")
    batch = batch.adding(s2=replace(batch.raster("s2"), valid=torch.rand(batch.raster("s2").valid.shape) > 0.5))
    for name in encoder.inputs:
        alone = encoder.tokenize(batch)
        among = encoder.at(output="dense", dense=name).tokenize(batch)
        torch.testing.assert_close(alone.x, among.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quirks", [(), ("nested_subpatches",), anysat.PUBLISHED["quirks"]])
def test_dense_features_lie_where_their_ground_is(quirks) -> None:
    encoder = model("aerial", "s2", quirks=quirks, output="dense", dense="aerial")
    batch = place(encoder, 40, 40, "aerial", "s2")
    raster = batch.raster("aerial")
    assert encoder.embed(batch).grid().shape == (1, 128, 20, 20)
    for cell in ((0, 7), (13, 2), (19, 19)):
        values = raster.values.clone()
        values[:, :, cell[0] * 10 : cell[0] * 10 + 10, cell[1] * 10 : cell[1] * 10 + 10] += 3.0
        changed = encoder.embed(batch.adding(aerial=replace(raster, values=values))).grid()
        own = (changed - encoder.embed(batch).grid())[0, 64:].norm(dim=0)
        assert divmod(int(own.argmax()), 20) == cell


def test_pixels_larger_than_a_patch_inform_every_patch() -> None:
    encoder = model("s2", "l7", "modis")
    batch = place(encoder, 120, 120, "s2", "l7", "modis")
    tokens = encoder.tokenize(batch)
    counts = [int((tokens.coords.group == g).sum()) for g in range(3)]
    assert dict(zip(tokens.groups, counts, strict=True)) == {"s2": 36, "l7": 16, "modis": 1}
    changed = batch.adding(modis=replace(batch.raster("modis"), values=batch.raster("modis").values + 2.0))
    before, after = encoder.embed(batch), encoder.embed(changed)
    assert ((before.mean - after.mean).abs().amax(1) > 1e-4).all()


def test_coarse_sensors_work_alone() -> None:
    encoder = model("l7", "alos", "modis")
    assert encoder.embed(place(encoder, 500, 750, "modis"), patch_m=250).grid().shape[2:] == (2, 3)
    assert encoder.embed(place(encoder, 120, 120, "l7", "alos"), patch_m=60).grid().shape[2:] == (2, 2)
    # Smaller patches than pixels: every patch under a pixel has a feature, from context alone.
    assert len(encoder.embed(place(encoder, 120, 120, "l7"), patch_m=10).coords) == 144


def test_context_tokens_know_their_place_unless_published() -> None:
    def swapped(encoder: anysat.AnySat) -> tuple[Tensor, Tensor]:
        batch = place(encoder, 120, 120, "s2", "modis")
        batch = batch.adding(modis=layer(encoder, "modis", 250, 500))
        batch = Batch((Place(120, 500),), {**batch.layers, "s2": layer(encoder, "s2", 120, 500)})
        raster = batch.raster("modis")
        other = batch.adding(modis=replace(raster, values=raster.values.flip(3)))
        return encoder.embed(batch).mean, encoder.embed(other).mean

    ours, flipped = swapped(model("s2", "modis"))
    assert not torch.allclose(ours, flipped, atol=1e-4)
    published, flipped = swapped(model("s2", "modis", quirks=["placeless_context"]))
    torch.testing.assert_close(published, flipped, rtol=1e-4, atol=1e-5)


def test_padded_counts_invalid_values_as_the_mean_and_ours_leaves_them_out() -> None:
    for quirks, expected in (((), False), (("padded",), True)):
        encoder = model("s2", quirks=quirks)
        batch = place(encoder, 40, 40, "s2", dates=4)
        raster = batch.raster("s2")
        blind = raster.obs(torch.tensor([0]))
        blind = replace(blind, valid=torch.zeros_like(blind.valid))
        more = batch.adding(s2=Raster._cat([raster, blind], [0, 0]))
        differs = not torch.allclose(encoder.embed(batch).mean, encoder.embed(more).mean, atol=1e-5)
        assert differs == expected


def test_windows_as_wide_as_the_place_change_nothing() -> None:
    encoder = model("s2", "spot", "l7")
    batch = place(encoder, 120, 120, "s2", "spot", "l7")
    same(encoder.embed(batch), encoder.embed(batch, window=6))


def test_windows_see_their_halo_and_no_further() -> None:
    encoder = model("s2")
    batch = Batch.cat([place(encoder, 160, 120, "s2"), place(encoder, 100, 160, "s2", dates=2)])
    view = encoder.at(window=2, halo=1)
    before = view.embed(batch)
    assert torch.equal(before.coords.at_m, encoder.embed(batch).coords.at_m[_order(before, encoder.embed(batch))])
    raster = batch.raster("s2")
    values = raster.values.clone()
    values[raster.row == 0, :, 0:2, 0:2] += 2.0  # patch (0, 0)
    after = view.embed(batch.adding(s2=replace(raster, values=values)))
    moved = (after.mean - before.mean).abs().amax(1) > 1e-6
    cells = before.coords.cells()
    near = (before.coords.row == 0) & (cells < 2).all(1)
    # Window (0, 0) holds patch (0, 0); those beside it begin at patch 2 and see patch 1, not 0.
    assert torch.equal(moved, near)


def _order(a: Features, b: Features) -> Tensor:
    """Where each coordinate of ``a`` stands in ``b``."""
    keys = [[(int(r), *c) for r, c in zip(f.coords.row, f.coords.cells().tolist(), strict=True)] for f in (a, b)]
    return torch.tensor([keys[1].index(key) for key in keys[0]])


def test_windows_of_two_places_are_those_of_each() -> None:
    encoder = model("s2", "l7").at(window=2, halo=1)
    parts = [place(encoder, 160, 120, "s2", "l7"), place(encoder, 100, 160, "s2", dates=2)]
    together = encoder.embed(Batch.cat(parts))
    for row, part in enumerate(parts):
        alone = encoder.embed(part)
        mine = together.coords.row == row
        assert int(mine.sum()) == len(alone.coords)
        torch.testing.assert_close(
            together.grid()[row, :, : alone.grid().shape[2], : alone.grid().shape[3]],
            alone.grid()[0],
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
        )
        torch.testing.assert_close(together.summary[row], alone.summary[0], rtol=1e-4, atol=1e-5)


def test_windows_in_chunks_and_of_nothing(monkeypatch) -> None:
    encoder = model("s2", "l7").at(window=2, halo=1)
    batch = place(encoder, 160, 120, "s2", "l7")
    whole = encoder.embed(batch)
    monkeypatch.setattr(anysat, "CHUNK_ELEMENTS", 3000)
    same(whole, encoder.embed(batch))
    assert len(encoder.embed(Batch(batch.places)).coords) == 0


def test_another_resolution_can_be_declared() -> None:
    encoder = model("s2", "spot")
    fine = place(encoder, 120, 120, "s2")
    coarse = replace(
        fine.raster("s2"),
        values=fine.raster("s2").values[..., ::2, ::2],
        valid=fine.raster("s2").valid[..., ::2, ::2],
        gsd_m=20.0,
    )
    batch = Batch(fine.places, {"s2": coarse})
    with pytest.raises(ContractError, match="gsd_m"):
        encoder.embed(batch, patch_m=40)
    assert encoder.embed(batch, patch_m=40, gsd_m={"s2": 20.0}).grid().shape[2:] == (3, 3)
    with pytest.raises(LookupError, match="s2"):
        encoder.at(gsd_m={"s3": 20.0})


def test_without_statistics_it_says_where_to_get_them() -> None:
    torch.manual_seed(0)
    encoder = anysat.build("nano", modalities=["s2"])
    with pytest.raises(ContractError, match="everysat stats"):
        encoder.embed(Batch((Place(40, 40),), {"s2": layer(encoder, "s2", 40, 40)}))


@pytest.mark.parametrize(
    "quirk", ["first_head_bias", "across_heads", "nested_subpatches", "padded", "placeless_context"]
)
def test_each_quirk_makes_a_difference(quirk) -> None:
    plain = model("aerial", "s2", "modis")
    odd = model("aerial", "s2", "modis", quirks=[quirk])
    odd.load_state_dict(plain.state_dict())
    batch = place(plain, 40, 40, "aerial", "s2", "modis")
    raster = batch.raster("s2")
    batch = batch.adding(
        s2=replace(raster, valid=torch.rand(raster.valid.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
    )
    batch = Batch((Place(40, 500),), {**batch.layers, "modis": layer(plain, "modis", 250, 500)})
    assert not torch.allclose(plain.embed(batch).mean, odd.embed(batch).mean, atol=1e-4)


@pytest.mark.parametrize("switch", ["metric", "spatial", "fusion"])
def test_ablations_run_and_make_a_difference(switch) -> None:
    encoder = model("spot", "s2", **{switch: False})
    whole = model("spot", "s2")
    whole.load_state_dict(encoder.state_dict(), strict=False)
    batch = place(encoder, 80, 80, "spot", "s2")
    found = encoder.embed(batch, patch_m=40)
    assert found.grid().shape == (1, 64, 2, 2)
    assert torch.isfinite(found.mean).all()
    assert not torch.allclose(found.mean, whole.embed(batch, patch_m=40).mean, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    encoder = model("aerial", "s2")
    batch = place(encoder, 40, 40, "aerial", "s2")
    with pytest.raises(ContractError, match="no multiple of 2 m"):
        encoder.embed(batch, patch_m=25)
    with pytest.raises(ContractError, match="dense='s2'"):
        encoder.embed(batch.only("aerial"), output="dense", dense="s2")
    with pytest.raises(TypeError, match="patch_m"):
        encoder.at(patch=10)
    with pytest.raises(ValueError, match="divisible"):
        anysat.build("nano", dim=100)
    with pytest.raises(LookupError, match="aerial"):
        anysat.build("base", modalities=["arial"])
    with pytest.raises(LookupError, match="base"):
        anysat.build("bas")


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        counts = {v: sum(p.numel() for p in anysat.build(v).parameters()) for v in ("base", "small", "tiny")}
    # Published: 125,905,447, 43,811,271 and 8,135,015; key biases (128 per series, which cancel) and pad scalars are left out.
    dropped = 7 * (128 + 1)
    assert counts == {"base": 125_905_447 - dropped, "small": 43_811_271 - dropped, "tiny": 8_135_015 - dropped}
