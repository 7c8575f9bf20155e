"""Cross-attention of places that differ in how much they ask and how much there is to read."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from everysat.nn.perceiver import GatedMlp, Pooling, Reading


def test_ragged_places_read_as_if_alone() -> None:
    torch.manual_seed(0)
    reading = Reading(8, 6, 2, 4)
    queries, count = torch.tensor([3, 2, 3, 1, 2]), torch.tensor([4, 7, 4, 0, 7])
    x, context = torch.randn(int(queries.sum()), 8), torch.randn(int(count.sum()), 6)
    kv = reading.to_kv(reading.context_norm(context))
    out = reading(x, kv, queries, count)
    for place in range(len(queries)):
        mine = slice(int(queries[:place].sum()), int(queries[: place + 1].sum()))
        there = slice(int(count[:place].sum()), int(count[: place + 1].sum()))
        if not count[place]:
            torch.testing.assert_close(out[mine], x[mine])
            continue
        q = reading.to_q(reading.norm(x[mine])).unflatten(-1, (2, 4)).transpose(0, 1)
        k, v = (t.unflatten(-1, (2, 4)).transpose(0, 1) for t in kv[there].chunk(2, -1))
        read = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out[mine], x[mine] + reading.to_out(read))


def test_reading_ones_own_is_reading_with_the_others_left_out() -> None:
    torch.manual_seed(0)
    reading = Reading(8, 6, 2, 4)
    x, kv = torch.randn(3, 8), torch.randn(10, 16)
    query = torch.tensor([0, 2, 0, 0, 2, 2, 0, 2, 0, 2])
    out = reading.own(x, kv, query)
    torch.testing.assert_close(out[1], x[1])
    for number in (0, 2):
        one = torch.tensor([1])
        alone = reading(x[number : number + 1], kv[query == number], one, (query == number).sum()[None])
        torch.testing.assert_close(out[number : number + 1], alone)


def test_own_reading_bears_large_logits() -> None:
    torch.manual_seed(0)
    reading = Reading(8, 6, 2, 4)
    kv = (1e4 * torch.randn(6, 16)).requires_grad_()
    out = reading.own(torch.randn(2, 8), kv, torch.tensor([0, 0, 0, 1, 1, 1]))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(kv.grad).all()


def test_a_temperature_evens_the_pooling_out() -> None:
    torch.manual_seed(0)
    sharp, even = Pooling(8, 2, 4), Pooling(8, 2, 4, temperature=1e6)
    even.load_state_dict(sharp.state_dict())
    x = torch.randn(2, 5, 8)
    mean = even.to_out(even.to_kv(x)[..., 8:].mean(1))
    torch.testing.assert_close(even(x), even.norm(mean), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sharp(x), even(x), atol=1e-4)


def test_the_gate_is_the_second_half() -> None:
    mlp = GatedMlp(4)
    with torch.no_grad():
        mlp.w1.weight[16:] = 0
        mlp.w1.bias[16:] = -100
    x = torch.randn(3, 4)
    torch.testing.assert_close(mlp(x), x + mlp.w2.bias)
