"""Laws of draws that depend on their purpose alone."""

from __future__ import annotations

import torch

from everysat.nn.draws import generator, key, stream, uniform


def test_same_purpose_same_numbers_and_other_purpose_others():
    first, again, other = (
        torch.rand(8, generator=generator(*p)) for p in [(1, 2, "mask"), (1, 2, "mask"), (1, 3, "mask")]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parts_of_a_purpose_are_not_run_together():
    assert len({key(1, 23), key(12, 3), key("1", 23), key(1, "23"), key(123)}) == 5


def test_a_longer_stream_begins_like_a_shorter_one():
    assert (stream(7, "dataset").random(1000)[:5] == stream(7, "dataset").random(5)).all()


def test_uniform_of_a_place_does_not_depend_on_the_other_places():
    index = torch.arange(50)
    rows = torch.arange(6)[:, None]
    together = uniform(generator("x"), rows, index)
    alone = torch.cat([uniform(generator("x"), rows[i : i + 1], index) for i in range(6)])
    assert torch.equal(together, alone)


def test_uniform_is_uniform_and_uncorrelated_between_neighbours():
    u = uniform(generator("y"), torch.arange(400)[:, None], torch.arange(500)).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002
    histogram = torch.histc(u, 16, 0, 1) / u.numel()
    assert (histogram - 1 / 16).abs().max() < 0.002
    for a, b in [(u[1:], u[:-1]), (u[:, 1:], u[:, :-1])]:
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 0.01


def test_uniform_takes_one_number_of_the_generator_whatever_the_size():
    a, b = generator("z"), generator("z")
    uniform(a, torch.arange(3), torch.tensor(0))
    uniform(b, torch.arange(9), torch.tensor(0))
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
