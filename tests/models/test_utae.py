"""U-TAE beside the laws of all models: sizes, attention of clouded dates, several layers, conversion, training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from everysat.models import utae, weights
from everysat.nn.temporal import Ltae
from everysat.sensors import Band, Sensor
from everysat.tasks import classify
from everysat.types import Batch, ContractError, Encoder, Place, Raster

DAY_S = 86400.0


def model(**changes: Any) -> utae.Utae:
    torch.manual_seed(0)
    return utae.build("nano", **changes).eval()


def only(*names: str, **changes: Any) -> utae.Utae:
    return model(modalities={n: utae.VARIANTS["nano"]["modalities"][n] for n in names}, **changes)


def layer(encoder: Encoder, name: str, height: int, width: int, generator: torch.Generator, dates: int = 3) -> Raster:
    wanted = encoder.inputs[name]
    values = torch.randn(dates, len(wanted.sensor.bands), height, width, generator=generator)
    days = torch.arange(dates)[:, None] * 20.0 + 18000.0
    time_s = (days + torch.tensor([0.0, 1.0])).double() * DAY_S
    return Raster.of(wanted.sensor, values, wanted.gsd_m, time_s=time_s if wanted.dated else None)


def place(encoder: Encoder, height: int, width: int, generator: torch.Generator, dates: int = 3) -> Batch:
    """A place of that many pixels of s2, with layer s2 alone."""
    side = encoder.inputs["s2"].gsd_m
    raster = layer(encoder, "s2", height, width, generator, dates)
    return Batch((Place(height * side, width * side),), {"s2": raster})


def test_features_lie_at_the_pixels_of_the_finest_layer(generator) -> None:
    encoder = model()
    batch = place(encoder, 6, 4, generator)
    features = encoder.embed(batch)
    assert float(features.coords.size_m[0]) == encoder.settings.token_m == 5.0
    assert features.grid().shape == (1, encoder.dim, 12, 8)
    own = features.grid()[:, :8]
    assert torch.equal(own[:, :, ::2, ::2], own[:, :, 1::2, 1::2])  # a pixel of 10 m is four of 5 m
    assert (features.grid()[:, 8:] == 0).all()  # layers that are not there


def test_the_summary_is_the_mean_of_the_pixels(generator) -> None:
    encoder = only("s2")
    features = encoder.embed(place(encoder, 6, 4, generator))
    torch.testing.assert_close(features.summary[0], features.mean.mean(0))


def test_layers_do_not_change_each_others_features(generator) -> None:
    encoder = model()
    batch = place(encoder, 8, 8, generator)
    both = batch.adding(s1=layer(encoder, "s1", 4, 4, generator), spot=layer(encoder, "spot", 16, 16, generator, 1))
    torch.testing.assert_close(encoder.embed(both).grid()[:, :8], encoder.embed(batch).grid()[:, :8])


@pytest.mark.parametrize("height", [1, 2, 3, 5, 8])
def test_every_size_of_place_has_a_feature_per_pixel(generator, height) -> None:
    encoder = only("s2")
    assert encoder.embed(place(encoder, height, 3, generator)).grid().shape == (1, 8, height, 3)


def test_places_of_different_sizes_together_equal_one_by_one(generator) -> None:
    encoder = model()
    places = [place(encoder, *size, generator) for size in ((6, 4), (9, 9), (6, 4), (3, 12))]
    together = encoder.embed(Batch.cat(places))
    assert together.coords.row.tolist() == sorted(together.coords.row.tolist())
    for i, one in enumerate(places):
        torch.testing.assert_close(together.mean[together.coords.row == i], encoder.embed(one).mean)


def test_a_date_that_is_clouded_over_a_cell_has_no_attention_there(generator) -> None:
    encoder = only("s2")
    batch = place(encoder, 8, 8, generator, dates=2)
    raster = batch.raster("s2")
    valid = raster.valid.clone()
    valid[1, :, :, :4] = False
    network = encoder.projectors["s2"]
    seen: dict[str, Tensor] = {}
    by_head = network.temporal.by_head

    def spy(x: Tensor, series: Tensor, day: Tensor, count: int) -> tuple[Tensor, Tensor]:
        seen["dates"] = torch.bincount(series, minlength=count)
        return by_head(x, series, day, count)

    network.temporal.by_head = spy  # type: ignore[method-assign]
    encoder.embed(batch.adding(s2=replace(raster, valid=valid)))
    assert seen["dates"].view(4, 4).tolist() == [[1, 1, 2, 2]] * 4


def test_pixels_that_no_date_observed_have_no_feature(generator) -> None:
    encoder = only("s2")
    batch = place(encoder, 4, 4, generator)
    raster = batch.raster("s2")
    valid = raster.valid.clone()
    valid[:, :, 0, 0] = False
    valid[0, :, 1, 1] = False
    features = encoder.embed(batch.adding(s2=replace(raster, valid=valid)))
    missing = torch.isnan(features.grid()[0, 0])
    assert torch.nonzero(missing).tolist() == [[0, 0]]


def test_dates_matter(generator) -> None:
    encoder = only("s2")
    batch = place(encoder, 4, 4, generator)
    raster = batch.raster("s2")
    later = replace(raster, time_s=raster.time_s + torch.tensor([[0.0], [90.0], [30.0]]).double() * DAY_S)
    found, other = (encoder.embed(batch.adding(s2=r)).mean for r in (raster, later))
    assert not torch.allclose(found, other, atol=1e-3)


def test_values_are_normalised(generator) -> None:
    encoder = only("s2")
    config = {**encoder.config, "modalities": {"s2": {**encoder.config["modalities"]["s2"]}}}
    config["modalities"]["s2"] |= {"mean": (2.0,) * 10, "std": (4.0,) * 10}
    twin = utae.from_config(config).eval()
    twin.load_state_dict(encoder.state_dict())
    batch = place(encoder, 4, 4, generator)
    raster = batch.raster("s2")
    scaled = batch.adding(s2=replace(raster, values=raster.values * 4 + 2))
    torch.testing.assert_close(twin.embed(scaled).mean, encoder.embed(batch).mean)


def test_a_layer_without_statistics_is_refused(generator) -> None:
    encoder = utae.build("small").eval()
    with pytest.raises(ContractError, match="no mean and std for layer 's2'"):
        encoder.embed(place(encoder, 8, 8, generator))


def test_training_reaches_every_parameter_with_a_pixel_head(generator) -> None:
    encoder = only("s2").train()
    side = 10.0
    task = classify.build("pixel", encoder=encoder, classes=["a", "b"], gsd_m=side, token_size_m=side)
    batch = place(encoder, 8, 8, generator)
    label = torch.randint(0, 2, (1, 1, 8, 8), generator=generator).float()
    codes = Sensor("codes", "classes", (Band("label", side, "class", classes={0: "a", 1: "b"}),), "made up")
    batch = batch.adding(label=Raster.of(codes, label, side))
    losses = []
    optimizer = torch.optim.Adam([*encoder.parameters(), *task.parameters()], lr=0.01)
    torch.manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(encoder, batch, generator)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert all(p.grad is not None for p in encoder.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    encoder = utae.build("pastis")
    # That of the repository's UTAE(10) less its out_conv (15,660) and the bias of the keys (64).
    assert sum(p.numel() for p in encoder.parameters()) == 1_072_064


def test_conversion_names_what_it_drops_and_needs_one_layer(tmp_path) -> None:
    encoder = only("s2")
    back = {new: old for old, new in published_names(encoder).items()}
    state = {back[key]: value for key, value in encoder.state_dict().items()}
    state["temporal_encoder.inconv.weight"] = state["temporal_encoder.inconv.weight"][..., None]
    state["temporal_encoder.attention_heads.fc1_k.bias"] = torch.zeros(8)
    state["out_conv.conv.conv.0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "published.pth")
    done = weights.convert(
        "utae/nano", tmp_path / "published.pth", tmp_path / "w.safetensors", modalities=encoder.config["modalities"]
    )
    assert set(done.dropped) == {"temporal_encoder.attention_heads.fc1_k.bias", "out_conv.conv.conv.0.weight"}
    again = weights.load(done.path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in encoder.state_dict().items())
    with pytest.raises(ContractError, match="of one layer"):
        utae.convert(state, model().config)


def published_names(encoder: Encoder) -> dict[str, str]:
    """Names used here by those of the published code, written by hand for two levels."""
    blocks = {"down_blocks.0": ("down", "conv1", "conv2"), "up_blocks.0": ("conv1", "conv2")}
    pairs = {"in_conv.conv.conv.": "in_conv."}
    for block, parts in blocks.items():
        pairs |= {f"{block}.{part}.conv.": f"{block.replace('_blocks', '')}.{part}." for part in parts}
    pairs |= {"up_blocks.0.skip_conv.": "up.0.skip.", "up_blocks.0.up.": "up.0.up."}
    inner = {"inconv.": "observation.0.", "in_norm.": "first_norm.", "mlp.": "out.", "out_norm.": "out_norm."}
    pairs |= {f"temporal_encoder.{old}": f"temporal.{new}" for old, new in inner.items()}
    pairs |= {
        "temporal_encoder.attention_heads.Q": "temporal.query",
        "temporal_encoder.attention_heads.fc1_k.": "temporal.key.",
    }
    found = {}
    for key in encoder.state_dict():
        own = key.removeprefix("projectors.s2.")
        old, new = next((o, n) for o, n in pairs.items() if own.startswith(n))
        found[old + own.removeprefix(new)] = key
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8, 16, 32)}, "one length"),
        ({"widths": (8, 12), "out_widths": (8, 8)}, "end alike"),
        ({"widths": (6, 16)}, "divisible by heads"),
        ({"modalities": {}}, "modalities is empty"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        utae.build("nano", **changes)


def test_an_unknown_variant_is_an_error_with_the_nearest() -> None:
    with pytest.raises(LookupError, match="base"):
        utae.build("bse")


def test_attention_by_head_averages_to_the_attention_and_linear_takes_one_width() -> None:
    torch.manual_seed(0)
    ltae = Ltae(8, (16,), (8,), heads=4, key_dim=3, linear=True).eval()
    index = torch.tensor([0, 0, 1, 1, 1, 0])
    x, day = torch.randn(6, 8), torch.arange(6).double()
    vectors, attention = ltae(x, index, day, 2)
    again, by_head = ltae.by_head(x, index, day, 2)
    torch.testing.assert_close(again, vectors)
    torch.testing.assert_close(by_head.mean(1), attention)
    torch.testing.assert_close(torch.zeros(2, 4).index_add(0, index, by_head), torch.ones(2, 4))
    one = index == 1
    alone, weight = ltae.by_head(x[one], index[one] - 1, day[one], 1)  # series of one length take another path
    torch.testing.assert_close(alone[0], vectors[1])
    torch.testing.assert_close(weight, by_head[one])
    with pytest.raises(ValueError, match="one map"):
        Ltae(8, (8, 16), (8,), heads=4, key_dim=3, linear=True)


def test_networks_that_would_wait_for_another_process_are_refused(generator, monkeypatch) -> None:
    """In training over processes, normalisation runs once per layer and size of place in each."""
    encoder = only("s2").train()
    one, two = place(encoder, 8, 8, generator), place(encoder, 4, 4, generator)
    empty = one.adding(s2=one.raster("s2").obs(torch.zeros(0, dtype=torch.long)))
    monkeypatch.setattr("everysat.nn.cells.world", lambda: (0, 2))
    for batch, message in ((Batch.cat([one, two]), "places of 2 sizes"), (empty, "layer 's2' is empty")):
        with pytest.raises(ContractError, match=message):
            encoder.tokenize(batch)
        encoder.eval().tokenize(batch)
        encoder.train()


def test_features_of_cells_are_the_means_of_their_pixels(generator) -> None:
    encoder = only("s2")
    batch = place(encoder, 6, 4, generator)
    raster = batch.raster("s2")
    valid = raster.valid.clone()
    valid[..., :2, :2] = False
    valid[..., 2, 0] = False
    batch = batch.adding(s2=replace(raster, valid=valid))
    fine, coarse = encoder.embed(batch), encoder.embed(batch, cell_m=20.0)
    assert float(coarse.coords.size_m[0]) == 20.0 == encoder.at(cell_m=20.0).settings.token_m
    pixels, cells = fine.grid(), coarse.grid()
    assert torch.isnan(cells[0, :, 0, 0]).all()
    torch.testing.assert_close(cells[0, :, 1, 0], torch.nanmean(pixels[0, :, 2:4, :2], (1, 2)))
    torch.testing.assert_close(cells[0, :, 1, 1], pixels[0, :, 2:4, 2:4].mean((1, 2)))
    torch.testing.assert_close(coarse.summary, fine.summary)
    with pytest.raises(ValueError, match="must not be smaller than a pixel"):
        encoder.at(cell_m=1.0)
    with pytest.raises(TypeError, match="Did you mean cell_m"):
        encoder.at(cells=3)
