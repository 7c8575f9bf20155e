"""Losses equal their formulas, ignore what is not labelled, and fall where a prediction gets better."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everysat.nn.losses import LOSSES, binary_cross_entropy, cross_entropy, dice, focal, huber, labelled, loss

CLASSIFY = ("ce", "focal", "dice", "ce+dice")


@pytest.fixture
def case(generator):
    return torch.randn(12, 4, generator=generator), torch.randint(4, (12,), generator=generator)


def test_cross_entropy_is_the_mean_of_minus_log_p(case):
    logits, target = case
    p = logits.softmax(1)[torch.arange(12), target]
    assert cross_entropy(logits, target) == pytest.approx(float(-p.log().mean()), rel=1e-5)


def test_weighted_cross_entropy_is_a_weighted_mean(case):
    logits, target = case
    weight = torch.tensor([1.0, 2.0, 0.0, 5.0])
    each = -logits.log_softmax(1)[torch.arange(12), target]
    expected = (each * weight[target]).sum() / weight[target].sum()
    torch.testing.assert_close(cross_entropy(logits, target, weight=weight), expected)
    torch.testing.assert_close(focal(logits, target, weight=weight, gamma=0.0), expected)


def test_smoothing_makes_certainty_cost(case):
    _, target = case
    sure = 50.0 * torch.nn.functional.one_hot(target, 4)
    assert cross_entropy(sure, target) < 1e-3
    assert cross_entropy(sure, target, smoothing=0.1) == pytest.approx(50 * 0.1 * 3 / 4, rel=1e-3)


def test_dice_by_hand():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.5, 0.1]])
    target = torch.tensor([0, 1])
    classes = [(2 * 0.8 + 1) / (1.2 + 1 + 1), (2 * 0.5 + 1) / (0.6 + 1 + 1)]  # the third class does not occur
    assert dice(p.log(), target) == pytest.approx(1 - sum(classes) / 2, rel=1e-5)


def test_cross_entropy_dice_lies_between_its_parts(case):
    whole = loss("ce+dice", share=0.25)(*case)
    torch.testing.assert_close(whole, 0.75 * cross_entropy(*case) + 0.25 * dice(*case))


def test_binary_cross_entropy_by_hand():
    logits, target = torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 0]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert binary_cross_entropy(logits, target) == pytest.approx(expected, rel=1e-6)
    weighted = (3 * math.log(2) + math.log(1 + math.exp(2))) / 2
    assert binary_cross_entropy(logits, target, weight=torch.tensor([3.0, 1.0])) == pytest.approx(weighted, rel=1e-6)


def test_huber_is_linear_far_away():
    assert huber(torch.tensor([10.0]), torch.tensor([0.0]), delta=2.0) == pytest.approx(2 * (10 - 1))


@given(st.sampled_from(CLASSIFY), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_what_is_not_valid_has_no_effect(name, seed):
    g = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(2, 3, 4, 5, generator=g), torch.randint(3, (2, 4, 5), generator=g)
    valid = torch.rand(2, 4, 5, generator=g) > 0.5
    before = LOSSES[name](*labelled(logits, target, valid))
    logits, target = torch.where(valid[:, None], logits, torch.nan), torch.where(valid, target, 99)
    torch.testing.assert_close(LOSSES[name](*labelled(logits, target, valid)), before)


@pytest.mark.parametrize("name", [*LOSSES])
def test_nothing_labelled_is_zero_with_zero_gradient(name):
    several = name not in CLASSIFY
    logits = torch.randn(0, 3, requires_grad=True)
    value = LOSSES[name](logits, torch.zeros((0, 3) if several else (0,), dtype=torch.float if several else torch.long))
    assert value == 0
    value.backward()
    assert logits.grad is not None


@pytest.mark.parametrize("name", CLASSIFY)
def test_a_step_down_the_gradient_lowers_the_loss(name, case):
    logits = case[0].clone().requires_grad_()
    before = LOSSES[name](logits, case[1])
    before.backward()
    assert LOSSES[name](logits.detach() - 0.1 * logits.grad, case[1]) < before


def test_unknown_names_and_options_are_refused():
    with pytest.raises(LookupError, match="Did you mean dice"):
        loss("dize")
    with pytest.raises(TypeError, match="takes no option 'gamma'"):
        loss("ce", gamma=2.0)
    with pytest.raises(TypeError, match="takes no option 'weight'"):
        loss("dice", weight=torch.ones(3))
