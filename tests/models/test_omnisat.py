"""OmniSat: equality with the plain formulation, geometry, and pre-training."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain_omnisat import encode
from everysat.models import omnisat
from everysat.nn.attention import RelativeTable
from everysat.nn.position import Grid
from everysat.objectives import omnisat as pretraining
from everysat.types import Batch, Place, Raster

DAY_S = 86400.0


def tiny(**changes) -> omnisat.OmniSat:
    torch.manual_seed(0)
    model = omnisat.build("tiny", **changes).eval()
    for name, parameter in model.named_parameters():  # fresh weights are so small that attention hardly matters
        if not parameter.any() or ".attn." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if model.settings.locality:
        for module in model.modules():
            if isinstance(module, RelativeTable):
                module.near.data *= 10.0
    return model


def arrays(model: omnisat.OmniSat, count: int, dates: int) -> tuple[dict, dict, Batch]:
    """Dense synthetic inputs of ``count`` places for the plain formulation, and the same as a batch."""
    side, images, days, batches = model.settings.grid * model.settings.patch_m, {}, {}, []
    for name, wanted in model.inputs.items():
        px, kind = round(side / wanted.gsd_m), model.settings.modalities[name].projector
        length = () if kind in ("image", "texture") else (dates,) if kind == "series" else (1,)
        images[name] = torch.randn(count, *length, len(wanted.sensor.bands), px, px)
        days[name] = torch.randint(1, 366, (count, dates)) if kind == "series" else torch.full((count, 1), 120)
    for i in range(count):
        layers = {}
        for name, image in images.items():
            stack = image[i] if image.ndim == 5 else image[i : i + 1]
            first = 17897 * DAY_S  # 2019-01-01
            start = first + (days[name][i] - 1) * DAY_S if model.inputs[name].dated else None
            times = None if start is None else torch.stack([start, start + DAY_S], 1)
            layers[name] = Raster.of(model.inputs[name].sensor, stack, model.inputs[name].gsd_m, time_s=times)
        batches.append(Batch((Place(side, side),), layers))
    return images, days, Batch.cat(batches)


@pytest.mark.parametrize("quirks", [(), ("sequence_grid",)])
def test_equals_the_plain_formulation(quirks) -> None:
    model = tiny(quirks=quirks)
    images, days, batch = arrays(model, 3, 4)
    with torch.inference_mode():
        expected = encode(model, images, days)
    features = model.embed(batch)
    torch.testing.assert_close(features.summary, expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.mean.view(3, 16, -1), expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_relative_positions_depend_on_the_ground_not_on_the_number_of_modalities() -> None:
    same, other = Grid(1, 3, 4, 4).buckets(), Grid(1, 1, 4, 4).buckets()
    assert torch.equal(same[1:17, 17:33], other[1:, 1:])


@pytest.mark.parametrize(
    "changes", [{"absolute": False}, {"relative": False}, {"modality_code": True}, {"locality": 2.0}, {"depth": 0}]
)
def test_variants_work_and_differ(changes) -> None:
    base, model = tiny(), tiny(**changes)
    _, _, batch = arrays(model, 1, 2)
    assert not torch.allclose(model.embed(batch).summary, base.embed(batch).summary, atol=1e-3)


def test_other_tile_sizes_interpolate_the_learned_positions() -> None:
    model = tiny()
    _, _, batch = arrays(model, 1, 2)
    half = {
        n: Raster.of(r.sensor, r.values[..., : r.values.shape[3] // 2], r.gsd_m, time_s=r.time_s)
        for n, r in batch.layers.items()
    }
    features = model.embed(Batch((Place(40.0, 20.0),), half))
    assert features.grid().shape == (1, model.dim, 4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_m": 15.0}, "no multiple of gsd_m"),
        ({"heads": 5}, "divisible by heads"),
        ({"modalities": {}}, "modalities is empty"),
        ({"depht": 3}, "depht"),
    ],
)
def test_wrong_settings_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_unknown_variant_offers_known_ones() -> None:
    with pytest.raises(LookupError, match="pastis"):
        omnisat.build("pastiss")


# --- pre-training ------------------------------------------------------------------------------------------------------------


def test_hides_the_asked_share_of_what_is_there(generator) -> None:
    model = tiny()
    _, _, batch = arrays(model, 2, 2)
    batch = Batch.cat([batch, batch[0].only("s2")])
    tokens = model.tokenize(batch)
    noise = torch.rand(3, len(tokens.groups), 16, generator=generator)
    hidden = pretraining.hide(tokens, noise, 0.75)
    for row in range(3):
        mine = tokens.coords.row == row
        assert int((~hidden[mine]).sum()) == int(mine.sum()) // 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bypass": False},
        {"modality_dropout": 0.5},
        {"negatives": None},
        {"reconstruct": False},
        {"normalise": False},
        {"random_ratio": True, "contrasted": 0.5, "negatives": "other_images"},
        {"shift_m": 5.0, "shift_step_m": 5.0, "texture": 4},
    ],
)
def test_losses_are_finite_and_reach_every_parameter(options, generator) -> None:
    model = tiny().train()
    objective = pretraining.build(encoder=model, **options)
    _, _, batch = arrays(model, 2, 3)
    terms = objective(model, batch, generator)
    assert all(torch.isfinite(v) for v in terms.values())
    torch.testing.assert_close(terms["loss"], sum(v for k, v in terms.items() if k != "loss"))
    terms["loss"].backward()
    silent = [n for n, p in [*objective.named_parameters(), *model.named_parameters()] if p.grad is None]
    assert not silent or options.get("reconstruct") is False


@pytest.mark.parametrize("options", [{}, {"shift_m": 5.0, "shift_step_m": 5.0, "texture": 4, "modality_dropout": 0.3}])
def test_autocast_gives_nearly_the_same_losses(options) -> None:
    model = tiny(skip=True)
    objective = pretraining.build(encoder=model, **options).eval()
    _, _, batch = arrays(model, 2, 3)
    plain = objective(model, batch, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = objective(model, batch, torch.Generator().manual_seed(0))
    for name, value in plain.items():
        assert cast[name].item() == pytest.approx(value.item(), rel=0.1), name


def test_the_generator_decides_what_is_hidden() -> None:
    model = tiny()
    objective = pretraining.build(encoder=model).eval()
    _, _, batch = arrays(model, 2, 3)
    losses = [objective(model, batch, torch.Generator().manual_seed(seed))["loss"].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_masked_pixels_do_not_reach_the_loss(generator) -> None:
    model = tiny()
    objective = pretraining.build(encoder=model).eval()
    _, _, batch = arrays(model, 2, 3)
    losses = []
    for fill in (0.0, 1e4):
        layers = {}
        for name, raster in batch.layers.items():
            valid = raster.valid & (torch.rand(raster.valid.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
            layers[name] = Raster(
                raster.sensor, torch.where(valid, raster.values, fill), valid, raster.time_s, raster.row, raster.gsd_m
            )
        losses.append(objective(model, Batch(batch.places, layers), torch.Generator().manual_seed(0))["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_lowers_the_loss(generator) -> None:
    model = tiny(dropout=0.0, drop_path=0.0).train()
    objective = pretraining.build(encoder=model)
    _, _, batch = arrays(model, 4, 3)
    optimiser = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective(model, batch, torch.Generator().manual_seed(0))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_turned_views_meet_on_the_same_ground(generator) -> None:
    """Tokens of a second view, without any move, carry the coordinates of the ground that they saw."""
    model = tiny(modalities={"s2-mono": omnisat.VARIANTS["tiny"]["modalities"]["s2-mono"]})
    _, _, batch = arrays(model, 2, 1)
    views = pretraining.ShiftedViews(10.0, 5.0, 5.0)
    views.count = 1  # no move: one pixel is one patch, so that a turn changes no token, only where it is
    for _ in range(8):
        first, second = views(batch, generator)
        a, b = model.tokenize(first), second.original(model.tokenize(second.batch))
        key_a, key_b = (t.coords.row * 100 + t.coords.cells()[:, 0] * 10 + t.coords.cells()[:, 1] for t in (a, b))
        torch.testing.assert_close(a.x[key_a.argsort()], b.x[key_b.argsort()])


def test_skip_puts_projected_tokens_beside_fused_ones() -> None:
    model, plain = tiny(skip=True), tiny()
    _, _, batch = arrays(model, 2, 3)
    features, fused = model.embed(batch), plain.embed(batch)
    assert model.dim == 32 * 6
    torch.testing.assert_close(features.mean[:, :32], fused.mean)
    alone = model.embed(batch.only("s2"))
    assert (alone.mean[:, 32:96] == 0).all()  # spot and texture were not given
    torch.testing.assert_close(alone.mean[:, 96:128], features.mean[:, 96:128])
