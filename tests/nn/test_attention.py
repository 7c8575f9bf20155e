"""Attention in chunks equals the full formulation, and leaves out what is not kept."""

from __future__ import annotations

import pytest
import torch

from everysat.nn import attention
from everysat.nn.attention import Block, CrossBlock, RelativeTable, attend
from everysat.nn.position import Grid, bucket_of


def full(q, k, v, scale, bias, queries, keys, keep=None):
    logits = scale * q @ k.transpose(-1, -2)
    logits = logits + bias.gather(-1, keys.buckets(queries).expand(*bias.shape[:2], -1, -1))
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v


LAYOUTS = [
    (Grid(1, 1, 5, 7), Grid(1, 3, 5, 7)),
    (Grid(1, 3, 9, 8), Grid(1, 3, 9, 8)),
    (Grid.guessed(109), Grid.guessed(109)),
    (Grid(0, 2, 6, 6), Grid(0, 2, 6, 6)),
]


@pytest.mark.parametrize(("queries", "keys"), LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 2000, 10**9])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_equal_the_full_table(queries, keys, chunk, masked, monkeypatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (len(queries), len(keys), len(keys)))
    table = RelativeTable(4).double()
    torch.nn.init.normal_(table.table)
    keep = torch.rand(2, len(keys)) > 0.3 if masked else None
    bias = table(q)
    ours = attend(q, k, v, scale=0.5, bias=bias, queries=queries, keys=keys, keep=keep)
    torch.testing.assert_close(ours, full(q, k, v, 0.5, bias, queries, keys, keep))


def test_gradients_of_chunks_equal_those_of_the_full_table(monkeypatch) -> None:
    grid = Grid(1, 2, 6, 6)
    gradients = []
    for chunk in (1, 10**9):
        monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
        torch.manual_seed(0)
        block = Block(16, 4, relative=True).double()
        torch.nn.init.normal_(block.attn.relative.table)
        x = torch.randn(2, len(grid), 16, dtype=torch.float64)
        block(x, grid).square().sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    torch.testing.assert_close(*gradients)


def test_buckets_follow_the_rounded_distance() -> None:
    distances = torch.tensor([0, 1, 2, 4, 5, 12, 13, 16, 400])
    assert bucket_of(distances).tolist() == [3, 4, 4, 5, 5, 5, 6, 6, 6]


def test_prefix_tokens_have_a_bucket_of_their_own() -> None:
    table = Grid(2, 1, 3, 3).buckets()
    assert (table[:2] == 7).all()
    assert (table[:, :2] == 7).all()
    assert (table[2:, 2:] != 7).all()


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_what_is_not_kept_has_no_effect(kind) -> None:
    torch.manual_seed(0)
    grid, queries = Grid(1, 2, 3, 3), Grid(1, 1, 3, 3)
    x = torch.randn(2, len(grid), 16)
    keep = torch.rand(2, len(grid)) > 0.4
    keep[:, 0] = True
    other = torch.where(keep[..., None], x, 1e3)
    if kind == "self":
        block = Block(16, 4, relative=True).eval()
        a, b = block(x, grid, keep)[keep], block(other, grid, keep)[keep]
    else:
        cross = CrossBlock(16, 4, relative=True).eval()
        position = torch.randn(1, len(queries), 16)
        a, b = (cross(t, position, queries, grid, keep) for t in (x, other))
    torch.testing.assert_close(a, b)
