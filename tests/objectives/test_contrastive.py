"""MIL-NCE against a loop over tokens, and InfoNCE against its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from everysat.objectives.contrastive import info_nce, mil_nce


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
