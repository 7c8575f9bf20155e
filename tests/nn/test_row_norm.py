"""Batch normalisation of rows: PyTorch's own, but for a single row."""

from __future__ import annotations

import torch
from torch import nn

from everysat.nn.batchnorm import RowNorm


def test_a_single_row_is_normalised_by_the_running_statistics_and_leaves_them():
    torch.manual_seed(0)
    mine, theirs = RowNorm(3), nn.BatchNorm1d(3)
    x = torch.randn(7, 3) * 2 + 5
    for _ in range(3):
        assert torch.equal(mine(x), theirs(x))
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    one = mine(x[:1])
    assert mine(x[:0]).shape == (0, 3)
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(one, mine.eval()(x[:1]))
    assert list(before) == list(theirs.state_dict())
