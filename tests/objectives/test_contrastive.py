"""MIL-NCE against a loop over tokens, InfoNCE against its definition, and pre-training by the latter."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from everysat.objectives.contrastive import build, info_nce, mil_nce
from everysat.types import ALWAYS, Batch, Coords, Place, Tokens


def loop(x, group, row, cell, tau, negatives):
    """The definition, token by token."""
    total, count = 0.0, 0
    for i in range(len(x)):
        s = [math.exp(F.cosine_similarity(x[i], x[j], dim=0).item() / tau) for j in range(len(x))]
        positives = [j for j in range(len(x)) if group[j] != group[i] and row[j] == row[i] and cell[j] == cell[i]]
        if not positives:
            continue
        outside = {
            "all": lambda j, i=i: group[j] == group[i] and row[j] == row[i],
            "other_modalities": lambda j, i=i: group[j] == group[i],
            "everything": lambda j, i=i: i == j,
            "other_images": lambda j, i=i, positives=positives: row[j] == row[i] and j not in positives,
        }[negatives]
        denominator = sum(s[j] for j in range(len(x)) if not outside(j))
        total += math.log(denominator) - math.log(sum(s[j] for j in positives))
        count += 1
    return total / count


@pytest.mark.parametrize("negatives", ["all", "other_modalities", "everything", "other_images"])
def test_mil_nce_equals_its_definition_with_tokens_missing(negatives, generator) -> None:
    index = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
    index = index[torch.rand(len(index), generator=generator) > 0.25]
    x = torch.randn(len(index), 6, generator=generator)
    ours = mil_nce(x, *index.T, tau=0.3, negatives=negatives)
    assert ours.item() == pytest.approx(loop(x, *index.T, 0.3, negatives), rel=1e-4)


def test_order_of_tokens_is_irrelevant(generator) -> None:
    index = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2))
    x, shuffled = torch.randn(len(index), 6, generator=generator), torch.randperm(len(index), generator=generator)
    torch.testing.assert_close(mil_nce(x, *index.T), mil_nce(x[shuffled], *index[shuffled].T))


def test_one_modality_alone_costs_nothing(generator) -> None:
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    loss = mil_nce(x, torch.zeros(4).long(), torch.arange(4), torch.zeros(4).long())
    loss.backward()
    assert loss.item() == 0.0


def test_info_nce_equals_its_definition(generator) -> None:
    a, b = torch.randn(2, 5, 6, generator=generator)
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(info_nce(a, b), expected)


class Given:
    """In place of an encoder: tokenizes to these tokens ``x`` [token, 6] of ``names``, at ``index`` [token, 4]: modality, row, y, x."""

    family = "given"

    def __init__(self, x, index, names=("a", "b", "c"), places=3) -> None:
        self.x, self.index, self.inputs = x, index, dict.fromkeys(names)
        self.places = (Place(40.0, 40.0),) * places

    def tokenize(self, batch) -> Tokens:
        group, row, *at = self.index.T
        at_m = (torch.stack(at, 1) + 0.5) * 10.0
        always = torch.tensor(ALWAYS, dtype=torch.float64).expand(len(row), 2)
        coords = Coords(row, at_m, torch.full((len(row),), 10.0), always, group)
        return Tokens(self.x, coords, tuple(self.inputs), self.places)


def given(generator, *, share=0.7, modalities=3) -> Given:
    index = torch.cartesian_prod(torch.arange(modalities), torch.arange(3), torch.arange(4), torch.arange(4))
    index = index[torch.rand(len(index), generator=generator) < share]
    return Given(torch.randn(len(index), 6, generator=generator, requires_grad=True), index)


def pairwise(encoder: Given, kept=None) -> float:
    """The definition: for each pair of modalities, InfoNCE of the cells that both have, averaged over pairs that have any."""
    table = {tuple(key): x for key, x in zip(encoder.index.tolist(), encoder.x, strict=True)}
    losses = []
    for a, b in combinations(range(3), 2):
        cells = [c for c in {tuple(k[1:]) for k in table} if (a, *c) in table and (b, *c) in table]
        cells = [c for c in cells if kept is None or c in kept]
        if cells:
            losses.append(info_nce(*(torch.stack([table[(m, *c)] for c in cells]) for m in (a, b)), tau=0.1))
    return torch.stack(losses).mean().item()


def test_pre_training_is_info_nce_of_every_pair_of_modalities(generator) -> None:
    encoder = given(generator)
    objective = build(encoder=encoder, cells=16, tau=0.1)
    assert objective(encoder, Batch(()), generator)["loss"].item() == pytest.approx(pairwise(encoder), rel=1e-4)
    more = Given(encoder.x, encoder.index, names=("a", "b", "c", "a layer that no place has"))
    assert objective(more, Batch(()), generator)["loss"].item() == pytest.approx(pairwise(encoder), rel=1e-4)
    shuffle = torch.randperm(len(encoder.x), generator=generator)
    other = Given(encoder.x[shuffle], encoder.index[shuffle])
    assert objective(other, Batch(()), generator)["loss"].item() == pytest.approx(pairwise(encoder), rel=1e-4)


def test_so_many_cells_of_each_place_are_drawn_anew_each_time(generator) -> None:
    encoder = given(generator, share=0.8)
    objective = build(encoder=encoder, cells=5, tau=0.1)
    tokens = encoder.tokenize(None)
    draws = [objective._drawn(encoder, tokens, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for slot in draws:
        assert ((slot >= 0).sum(1) >= 2).all()
        first = slot.max(1).values
        assert torch.bincount(tokens.coords.row[first]).tolist() == [5, 5, 5]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    kept = {tuple(encoder.index[i, 1:].tolist()) for i in draws[0].max(1).values.tolist()}
    loss = objective(encoder, Batch(()), torch.Generator().manual_seed(0))["loss"]
    assert loss.item() == pytest.approx(pairwise(encoder, kept), rel=1e-4)


def test_cells_are_drawn_all_over_the_place(generator) -> None:
    encoder = given(generator, share=1.0)
    objective = build(encoder=encoder, cells=4)
    slot = objective._drawn(encoder, encoder.tokenize(None), generator)
    for row in range(3):
        at = encoder.index[slot[:, 0]][encoder.index[slot[:, 0]][:, 1] == row, 2:]
        assert len(at[:, 0].unique()) > 1
        assert len(at[:, 1].unique()) > 1


def test_a_place_draws_the_same_cells_whatever_lies_beside_it(generator) -> None:
    encoder = given(generator)
    objective = build(encoder=encoder, cells=4)
    alone = encoder.index[:, 1] == 0
    one = Given(encoder.x[alone], encoder.index[alone], places=1)
    found = []
    for each in (encoder, one):
        tokens = each.tokenize(None)
        slot = objective._drawn(each, tokens, torch.Generator().manual_seed(3)).max(1).values
        found.append(each.index[slot][each.index[slot][:, 1] == 0, 1:])
    assert torch.equal(*found)


def test_what_only_one_modality_observed_costs_nothing(generator) -> None:
    encoder = given(generator, modalities=1)
    loss = build(encoder=encoder)(encoder, Batch(()), generator)["loss"]
    loss.backward()
    assert loss.item() == 0.0


def test_the_temperature_is_learned_and_stays_above_a_hundredth(generator) -> None:
    encoder = given(generator)
    objective = build(encoder=encoder, tau=0.05)
    terms = objective(encoder, Batch(()), generator)
    terms["loss"].backward()
    assert terms["tau"].item() == pytest.approx(0.05)
    assert objective.log_scale.grad.abs() > 1e-4
    torch.nn.init.constant_(objective.log_scale, 9.0)
    assert objective(encoder, Batch(()), generator)["tau"].item() == pytest.approx(0.01)


def test_models_that_cannot_be_contrasted_are_refused(generator) -> None:
    with pytest.raises(ValueError, match="needs two layers or more"):
        build(encoder=SimpleNamespace(inputs={"s2": None}))
    encoder = given(generator)
    with pytest.raises(ValueError, match="cells=0 must be 1 or more"):
        build(encoder=encoder, cells=0)
    with pytest.raises(LookupError, match="no variant 'clip'"):
        build("clip", encoder=encoder)
    twice = Given(torch.cat([encoder.x] * 2), torch.cat([encoder.index] * 2))
    with pytest.raises(ValueError, match="several tokens of one layer at a cell"):
        build(encoder=twice)(twice, Batch(()), generator)
