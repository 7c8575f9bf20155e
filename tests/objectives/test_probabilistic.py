"""Probabilistic pre-training: its terms against definitions, its draws, and that unreliable inputs get variance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from layered_encoder import NAMES, LayeredEncoder, layered_batch, of_places

from everysat.models import prommrs
from everysat.nn.corruption import corrupted
from everysat.nn.gaussian import Gaussian, disagreement, expected_match
from everysat.nn.risk import auroc
from everysat.objectives.probabilistic import build, sigmoid_match, two_sets


def gaussian(n, generator) -> Gaussian:
    mean, log_var = torch.randn(2, n, 6, generator=generator)
    return Gaussian(mean, log_var - 2, torch.ones(n, dtype=torch.bool))


def test_match_equals_its_definition(generator) -> None:
    a, b = gaussian(5, generator), gaussian(5, generator)
    logits = 7.0 * expected_match(a, b) - 3.0
    total = 0.0
    for i in range(5):
        for j in range(5):
            total -= math.log(torch.sigmoid(logits[i, j] if i == j else -logits[i, j]).item())
    found = sigmoid_match(a, b, torch.tensor(7.0), torch.tensor(-3.0))
    assert found.item() == pytest.approx(total / 5, rel=1e-5)


def test_who_cannot_tell_places_apart_does_best_to_say_so() -> None:
    apart, alike = torch.eye(8), torch.ones(8, 8)
    seen = torch.ones(8, dtype=torch.bool)
    scale, bias = torch.tensor(10.0), torch.tensor(-6.0)

    def cost(mean, log_var):
        said = Gaussian(mean, torch.full((8, 8), log_var), seen)
        return sigmoid_match(said, Gaussian(mean, torch.full((8, 8), -6.0), seen), scale, bias)

    assert cost(apart, -6.0) < cost(apart, 0.0)
    assert cost(alike, -6.0) > cost(alike, 0.0)


def test_disagreement_is_least_at_the_true_error(generator) -> None:
    z = torch.randn(20_000, 1, generator=generator)
    seen = torch.ones(20_000, dtype=torch.bool)
    a, b = z + 0.5 * torch.randn(z.shape, generator=generator), z + 0.2 * torch.randn(z.shape, generator=generator)

    def cost(deviation):
        spread = [torch.full_like(z, 2 * math.log(s)) for s in (deviation, 0.2)]
        return disagreement(Gaussian(a, spread[0], seen), Gaussian(b, spread[1], seen)).mean()

    assert cost(0.5) < cost(0.4)
    assert cost(0.5) < cost(0.6)


def test_two_sets_are_disjoint_not_empty_and_all_occur(generator) -> None:
    there = torch.rand(4000, 4, generator=generator) > 0.3
    there = there[there.sum(1) >= 2]
    first, second = two_sets(there, torch.rand(len(there), 6, generator=generator))
    assert not (first & second).any()
    assert not ((first | second) & ~there).any()
    assert first.any(1).all()
    assert second.any(1).all()
    full = there.all(1)
    pairs = torch.cat([first[full], second[full]], 1).long() @ (2 ** torch.arange(8))
    assert len(pairs.unique()) == 50  # ordered pairs of disjoint, non-empty sets of four: 3^4 - 2 * 2^4 + 1


def test_corruption_takes_its_share_and_leaves_the_rest(generator) -> None:
    batch, _ = layered_batch(400, generator)
    encoder = LayeredEncoder()
    found = corrupted(batch, encoder.inputs, 0.25, torch.Generator().manual_seed(3))
    changed = torch.stack([(found.raster(n).values != batch.raster(n).values).flatten(1).any(1) for n in NAMES], 1)
    assert changed.float().mean(0).tolist() == pytest.approx([0.25] * 3, abs=0.08)
    both = (changed[:, 0] & changed[:, 1]).float().mean()
    assert both.item() == pytest.approx(0.0625, abs=0.04)
    noise = (found.raster("a").values - batch.raster("a").values)[changed[:, 0]]
    deviations = noise.flatten(1).std(1)
    assert 0.3 < deviations.min() < 1
    assert 2 < deviations.max() < 4.5
    same = corrupted(batch, encoder.inputs, 0.25, torch.Generator().manual_seed(3))
    assert all(torch.equal(same.raster(n).values, found.raster(n).values) for n in NAMES)
    none = corrupted(batch, encoder.inputs, 0.0, torch.Generator().manual_seed(3))
    assert all(torch.equal(none.raster(n).values, batch.raster(n).values) for n in NAMES)


def test_the_generator_decides_everything(generator) -> None:
    batch, _ = layered_batch(6, generator)
    torch.manual_seed(0)
    encoder = prommrs.wrap(LayeredEncoder(), dim=8)
    objective = build(encoder=encoder, corruption=0.5)
    losses = [objective(encoder, batch, torch.Generator().manual_seed(seed))["loss"].item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_every_parameter_learns_and_terms_sum_up(generator) -> None:
    batch, _ = layered_batch(8, generator)
    encoder = prommrs.wrap(LayeredEncoder(), dim=8)
    objective = build(encoder=encoder, reconstruction=0.5, prior=0.1, inclusion=0.2, agreement=2.0)
    terms = objective(encoder, batch, generator)
    terms["loss"].backward()
    silent = [
        n for n, p in [*encoder.named_parameters(), *objective.named_parameters()] if p.grad is None or not p.grad.any()
    ]
    assert not silent
    weights = {"match": 1.0, "reconstruction": 0.5, "prior": 0.1, "inclusion": 0.2, "agreement": 2.0}
    total = sum(w * terms[f"{level}_{name}"] for level in ("cell", "place") for name, w in weights.items())
    torch.testing.assert_close(terms["loss"].detach(), total)


def test_places_with_one_modality_cost_nothing(generator) -> None:
    batch, _ = layered_batch(3, generator)
    encoder = prommrs.wrap(LayeredEncoder(), dim=8)
    objective = build(encoder=encoder)
    assert objective(encoder, batch.only("a"), generator)["loss"].item() == 0
    assert objective(encoder, replace(batch, layers={}), generator)["loss"].item() == 0


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set model\.probabilistic"):
        build(encoder=LayeredEncoder())
    with pytest.raises(ValueError, match="the modality a alone"):
        build(encoder=prommrs.wrap(LayeredEncoder(("a",))))
    encoder = prommrs.wrap(LayeredEncoder())
    with pytest.raises(LookupError, match="Did you mean place"):
        build(encoder=encoder, levels=["places"])
    with pytest.raises(LookupError, match="no variant"):
        build("small", encoder=encoder)


@pytest.fixture(scope="module")
def trained():
    """A probabilistic encoder after 110 steps."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = prommrs.wrap(LayeredEncoder(), dim=16)
        objective = build(encoder=encoder, corruption=0.2, cells=4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=5e-3)
    for _ in range(110):
        loss = objective(encoder, layered_batch(32, generator)[0], generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


def variances(encoder, batch, level) -> torch.Tensor:
    with torch.no_grad():
        return encoder.witnesses(encoder.tokenize(batch))[level].log_var.mean(-1)


@pytest.mark.parametrize("level", [1, 2], ids=["cell", "place"])
def test_corruption_raises_variance(trained, level, generator) -> None:
    batch, _ = layered_batch(100, generator)
    for i, name in enumerate(NAMES):
        values = batch.raster(name).values
        spoilt = batch.adding(**{name: of_places(name, values + 3 * torch.randn(values.shape, generator=generator))})
        clean, bad = variances(trained, batch, level)[:, i], variances(trained, spoilt, level)[:, i]
        truth = torch.cat([torch.zeros(len(clean)), torch.ones(len(bad))]).bool()
        assert auroc(torch.cat([clean, bad]), truth) > 0.8


def test_more_modalities_know_more_of_the_factors(trained, generator) -> None:
    def r2(names):
        parts = []
        for places in (200, 200):
            batch, z = layered_batch(places, generator)
            x = trained.embed(batch.only(*names)).mean
            parts.append((torch.cat([x, torch.ones(len(x), 1)], 1), z.permute(0, 2, 3, 1).flatten(0, 2)))
        (x, y), (other, truth) = parts
        error = truth - other @ torch.linalg.lstsq(x, y).solution
        return float(1 - error.square().sum() / truth.square().sum())

    one, two, three = r2("a"), r2("ab"), r2("abc")
    assert 0.4 < one < two < three


def test_calibration_of_sets(trained, generator) -> None:
    """What one set says of another is off by about as much as both say."""
    batch, _ = layered_batch(200, generator)
    with torch.no_grad():
        cells = trained.witnesses(trained.tokenize(batch))[1]
    for first, second in (("a", "b"), ("a", "bc"), ("c", "ab")):
        a, b = (
            cells.fused("product", torch.tensor([n in names for n in NAMES]).expand(len(cells.row), 3))
            for names in (first, second)
        )
        ratio = ((a.mean - b.mean).square() / (a.var + b.var)).mean()
        assert 0.4 < ratio < 1.6
