"""Alignment of witnesses: its parts against definitions, its draws, and a made-up world in which words, images and positions tell of the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from layered_encoder import LayeredEncoder, layered_batch
from shapely.geometry import box

from everysat.models import georeset, prommrs
from everysat.nn.gaussian import Gaussian, expected_match
from everysat.nn.risk import auroc
from everysat.objectives.probabilistic import sigmoid_match
from everysat.objectives.witnesses import build, distance_m, on_earth, soft_match, swapped
from everysat.types import Batch, Place, Text, Vector

WORDS = {"encoder": "letters", "vector": 26, "hidden": 32}
SHAPES = {"longest_m": 100.0, "shortest_m": 10.0, "count": 2, "width": 16, "latents": 4, "words": WORDS}
OPTIONS = {"dim": 16, "text": WORDS, "shapes": SHAPES, "location": {"degrees": 4, "width": 24}}
FACTORS = 6


def model(**changes) -> georeset.GeoReset:
    torch.manual_seed(0)
    own = georeset.Config.model_validate({**OPTIONS, "heads": "each", **changes})
    return georeset.GeoReset(own, LayeredEncoder(("a", "b")))


def world(places: int, generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
    """Places with images, one letter for each factor of which there is more or less than usual, a position and a box; and their factors."""
    images, z = layered_batch(places, generator)
    mean = z.mean((2, 3))
    strings = tuple(
        " ".join(chr(97 + 2 * k + int(row[k] > 0)) * 3 for k in range(FACTORS) if abs(row[k]) > 0.2) or "z"
        for row in mean
    )
    side = (20 + 10 * mean[:, 2].tanh()).tolist()
    vector = Vector(
        tuple(box(20 - s / 2, 20 - s / 2, 20 + s / 2, 20 + s / 2) for s in side),
        ({"use": "box"},) * places,
        torch.zeros(places, 2, dtype=torch.float64),
        torch.arange(places),
    )
    at = [(float(100 * row[0].tanh()), float(60 * row[1].tanh())) for row in mean]
    layers = {"a": images.raster("a"), "b": images.raster("b"), "osm": vector}
    layers["captions"] = Text(strings, ("caption",) * places, torch.arange(places))
    return Batch(tuple(Place(40.0, 40.0, lonlat=lonlat) for lonlat in at), layers), mean


def gaussian(n, generator) -> Gaussian:
    mean, log_var = torch.randn(2, n, 6, generator=generator)
    return Gaussian(mean, log_var - 2, torch.ones(n, dtype=torch.bool))


def test_match_of_strangers_is_the_sigmoid_loss(generator) -> None:
    a, b = gaussian(5, generator), gaussian(5, generator)
    scale, bias = torch.tensor(7.0), torch.tensor(-3.0)
    torch.testing.assert_close(soft_match(a, b, scale, bias, torch.eye(5)), sigmoid_match(a, b, scale, bias))


def test_match_is_least_where_probabilities_are_the_targets(generator) -> None:
    a, b = gaussian(4, generator), gaussian(4, generator)
    scale, bias = torch.tensor(7.0), torch.tensor(-1.0)
    logits = 7.0 * expected_match(a, b) - 1.0
    best = logits.sigmoid()
    entropy = -(best * best.log() + (1 - best) * (1 - best).log()).sum(1).mean()
    torch.testing.assert_close(soft_match(a, b, scale, bias, best), entropy)


def test_distances_on_earth() -> None:
    places = [Place(30.0, 40.0, lonlat=at) for at in ((10.0, 0.0), (10.0, 1.0), (-170.0, 0.0))] + [Place(1.0, 1.0)]
    at = on_earth(places)
    found = distance_m(at, at)
    assert found[0, 1].item() == pytest.approx(111_195, rel=1e-4)
    assert found[0, 2].item() == pytest.approx(math.pi * 6_371_008.8, rel=1e-6)
    assert found[0, 0] == 0
    assert found[3].isnan().all()
    assert at[0, 3] == 25


def test_swapping_keeps_what_is_said_and_takes_its_share(generator) -> None:
    batch, _ = world(400, generator)
    found = swapped(batch, 0.25, torch.Generator().manual_seed(3))
    text = batch.layers["captions"]
    assert sorted(found.layers["captions"].row.tolist()) == list(range(400))
    assert (found.layers["captions"].row != text.row).float().mean().item() == pytest.approx(0.25, abs=0.07)
    moved = torch.tensor([a.lonlat != b.lonlat for a, b in zip(batch.places, found.places, strict=True)])
    both = (found.layers["captions"].row != text.row) & moved
    assert both.float().mean().item() == pytest.approx(0.0625, abs=0.04)
    assert {p.lonlat for p in found.places} == {p.lonlat for p in batch.places}
    assert torch.equal(found.raster("a").values, batch.raster("a").values)
    none = swapped(batch, 0.0, generator)
    assert torch.equal(none.layers["captions"].row, text.row)
    assert none.places == batch.places


def test_sets_of_witnesses(generator) -> None:
    there = torch.rand(3000, 5, generator=generator) > 0.3
    there = there[there.sum(1) > 1]
    draw = torch.rand(len(there), 2 * 64 + 3, generator=generator)

    def sets(**options):
        return build(encoder=model(), **options)._sets(there, draw)

    for first, second in (sets(singles=0.0), sets(singles=0.5), sets(dropout=0.5)):
        assert not (first & second).any()
        assert not ((first | second) & ~there).any()
        assert first.any(1).all()
        assert second.any(1).all()
    for options in ({"singles": 1.0}, {"dropout": 1.0}):
        first, second = sets(**options)
        assert (first.sum(1) == 1).all()
        assert (second.sum(1) == 1).all()
    there, draw = torch.ones(4000, 5, dtype=torch.bool), torch.rand(4000, 2 * 64 + 3, generator=generator)
    assert len(torch.unique(torch.cat(sets(singles=0.0), 1), dim=0)) == 3**5 - 2 * 2**5 + 1  # all pairs that there are
    assert len(torch.unique(torch.cat(sets(singles=1.0), 1), dim=0)) == 20


def test_neighbours_and_places_of_which_the_same_is_said_are_no_strangers(generator) -> None:
    batch, _ = world(4, generator)
    at = [(10.0, 0.0), (10.0, 1.0), (50.0, 0.0), (60.0, 0.0)]
    places = tuple(replace(p, lonlat=lonlat) for p, lonlat in zip(batch.places, at, strict=True))
    told = Text(("aa b", "c", "d", "aa b"), ("caption",) * 4, torch.arange(4))
    batch = replace(batch, places=places).adding(captions=told)
    encoder = model()
    said = encoder.said_by(encoder.tokenize(batch))
    found = build(encoder=encoder, near_m=111_195.0)._targets(said, batch, torch.arange(4))
    near = math.exp(-0.5)
    expected = torch.tensor([[1, near, 0, 1], [near, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    strangers = build(encoder=encoder, same=1.0)._targets(said, batch, torch.arange(4))
    assert torch.equal(strangers, torch.eye(4))
    part = build(encoder=encoder, same=1.0)._targets(said, batch, torch.tensor([1, 3]))
    assert torch.equal(part, torch.eye(2))


def test_a_place_says_more_than_one_around_it(generator) -> None:
    objective = build(encoder=model())
    small, country = Place(100.0, 100.0, lonlat=(10.0, 50.0)), Place(500_000.0, 500_000.0, lonlat=(11.0, 50.5))
    batch = Batch((small, country, Place(100.0, 100.0)))
    mean, seen = torch.randn(3, 16, generator=generator) * 0.1, torch.ones(3, dtype=torch.bool)

    def cost(of_small, of_country):
        log_var = torch.tensor([of_small, of_country, 0.0])[:, None].expand(3, 16)
        return objective._nested(Gaussian(mean, log_var, seen), batch, torch.arange(3))

    assert cost(-4.0, 0.0) < math.log(2) < cost(0.0, -4.0)
    assert objective._nested(Gaussian(mean[:1], mean[:1], seen[:1]), batch, torch.arange(1)) == 0


def test_the_generator_decides_everything(generator) -> None:
    batch, _ = world(6, generator)
    encoder = model()
    objective = build(encoder=encoder, corruption=0.5)
    losses = [objective(encoder, batch, torch.Generator().manual_seed(seed))["loss"].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_every_parameter_learns_and_terms_sum_up(generator) -> None:
    batch, _ = world(8, generator)
    encoder = model()
    weights = {"cells": 0.7, "reconstruction": 0.5, "prior": 0.1, "inclusion": 0.2, "agreement": 2.0}
    objective = build(encoder=encoder, **weights)
    terms = objective(encoder, batch, generator)
    terms["loss"].backward()
    pairs = [*encoder.named_parameters(), *objective.named_parameters()]
    silent = [name for name, p in pairs if p.grad is None or not p.grad.any()]
    alone = {"bag.trust", "set.reading.to_q.weight", "set.reading.norm.weight", "set.reading.norm.bias"}
    assert set(silent) <= alone  # of one sentence, of one shape, there is nothing to weigh
    total = terms["match"] + sum(weight * terms[name] for name, weight in weights.items())
    torch.testing.assert_close(terms["loss"].detach(), total)


def test_places_with_one_witness_cost_nothing(generator) -> None:
    batch, _ = world(3, generator)
    encoder = model()
    objective = build(encoder=encoder, corruption=0.0)
    bare = replace(batch, places=tuple(replace(p, lonlat=None) for p in batch.places))
    assert objective(encoder, bare.only("a"), generator)["loss"].item() == 0
    assert objective(encoder, replace(bare, layers={}), generator)["loss"].item() == 0


def test_the_model_keeps_scale_and_bias() -> None:
    encoder = model()
    objective = build(encoder=encoder, scale=20.0, bias=-6.0)
    objective.after_step(encoder, 0, 1)
    assert encoder.scale.item() == pytest.approx(20.0)
    assert encoder.bias.item() == -6.0


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="prommrs is none"):
        build(encoder=prommrs.wrap(LayeredEncoder()))
    with pytest.raises(ValueError, match="the witness text alone"):
        build(
            encoder=georeset.GeoReset(
                georeset.Config.model_validate({"text": WORDS, "heads": "shared"}), georeset.Blind()
            )
        )
    with pytest.raises(ValueError, match=r"singles=1\.5 must be a share"):
        build(encoder=model(), singles=1.5)
    with pytest.raises(LookupError, match="no variant"):
        build("small", encoder=model())


@pytest.fixture(scope="module")
def trained() -> georeset.GeoReset:
    """Images, words and positions after 80 steps."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        encoder = model(shapes=None)
        objective = build(encoder=encoder, corruption=0.3, bias=-4.0)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=5e-3)
    for step in range(80):
        loss = objective(encoder, world(24, generator)[0], generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(encoder, step, 80)
    return encoder.eval()


def bare(batch: Batch) -> Batch:
    return replace(batch, places=tuple(replace(p, lonlat=None) for p in batch.places))


def found_first(logits: torch.Tensor, most: int = 5) -> float:
    """Share of rows whose own column is among the ``most`` largest."""
    rank = (logits > logits.diagonal()[:, None]).sum(1)
    return float((rank < most).float().mean())


def test_words_find_images_and_images_words(trained, generator) -> None:
    batch, _ = world(100, generator)
    images, words = trained.place(bare(batch).only("a", "b")), trained.place(bare(batch).only("captions"))
    logits = trained.match(images, words)
    assert found_first(logits) > 0.3  # chance 0.05
    assert found_first(logits.T) > 0.3


def test_more_witnesses_find_more(trained, generator) -> None:
    batch, _ = world(200, generator)
    words = trained.place(bare(batch).only("captions"))
    one, two, more = (
        found_first(trained.match(trained.place(b), words))
        for b in (bare(batch).only("a"), bare(batch).only("a", "b"), batch.without("captions"))
    )
    assert one < two + 0.02
    assert two < more + 0.02
    assert one < more


def test_spoilt_images_are_less_sure(trained, generator) -> None:
    batch, _ = world(100, generator)
    raster = batch.raster("a")
    spoilt = replace(raster, values=raster.values + 3 * torch.randn(raster.values.shape, generator=generator))
    clean, bad = (trained.place(bare(batch).only("a").adding(a=r)).log_var.mean(-1) for r in (raster, spoilt))
    truth = torch.cat([torch.zeros(100), torch.ones(100)]).bool()
    assert auroc(torch.cat([clean, bad]), truth) > 0.65


def test_words_find_their_cells(trained, generator) -> None:
    """Of the four cells of a place, that with more of a factor fits its word better."""
    batch, z = layered_batch(100, generator)
    features = trained.embed(batch.only("a", "b"))
    cells = Gaussian(features.mean, features.var.log(), torch.ones(len(features.mean), dtype=torch.bool))
    k = 4
    more, less = trained.match(cells, trained.text([chr(97 + 2 * k + 1) * 3, chr(97 + 2 * k) * 3])).T
    truth = z[features.coords.row, k, features.coords.cells()[:, 0], features.coords.cells()[:, 1]] > 0
    assert auroc(more - less, truth) > 0.7


def mapped(batch: Batch, z: torch.Tensor, k: int = 4) -> Batch:
    """The same with a square over the north-west or the south-east cell of each place, that says whether factor ``k`` is above 0 there."""
    corner = torch.arange(len(batch)) % 2
    over = z[torch.arange(len(batch)), k, corner, corner] > 0
    squares = tuple(box(20 * c, 20 * c, 20 * c + 20, 20 * c + 20) for c in corner.tolist())
    told = tuple({"kind": "nnn" if more else "jjj"} for more in over.tolist())
    return batch.adding(osm=Vector(squares, told, torch.zeros(len(batch), 2).double(), torch.arange(len(batch))))


def test_cells_learn_what_polygons_around_them_say(generator) -> None:
    with torch.random.fork_rng():
        encoder = model(shapes=None, location=None)
        objective = build(encoder=encoder, ground=1.0, cells=0.0, bias=-2.0, corruption=0.0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-3)
    for _ in range(60):
        batch, z = layered_batch(24, generator)
        terms = objective(encoder, mapped(batch.only("a", "b"), z), generator)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    batch, z = layered_batch(100, generator)
    features = encoder.eval().embed(batch.only("a", "b"))
    cells = Gaussian(features.mean, features.var.log(), torch.ones(len(features.mean), dtype=torch.bool))
    more, less = encoder.match(cells, encoder.text(["nnn", "jjj"])).T
    at = features.coords.cells()
    assert auroc(more - less, z[features.coords.row, 4, at[:, 0], at[:, 1]] > 0) > 0.75


def test_ground_of_which_the_map_says_nothing_costs_nothing(generator) -> None:
    batch, _ = layered_batch(6, generator)
    encoder, far = model(), (box(500, 500, 600, 600),) * 6
    vector = Vector(far, ({"kind": "n"},) * 6, torch.zeros(6, 2).double(), torch.arange(6))
    objective = build(encoder=encoder, ground=1.0, cells=0.0)
    assert objective(encoder, batch.only("a", "b").adding(osm=vector), generator)["ground"] == 0
