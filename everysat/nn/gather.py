"""Values of the global batch in a process that holds a part of it. Everything works alike without processes.

The rule that training keeps: each process returns losses whose *mean over processes* is the loss of the global batch. Data
parallel training averages gradients, so the averaged gradient is then the gradient of the global loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block, this process computes for itself: nothing is gathered."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) when there is one, or :func:`alone`."""
    if not _ALONE.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@cache
def group() -> dist.ProcessGroup:
    """Processes in a group of their own, made at first use, which all must come to together.

    Data parallel training reduces gradients during the backward pass, in an order that depends on which parameters a process
    used. In one group with that, the collectives of this module would meet those of another kind.
    """
    return dist.new_group()


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, in order of rank and with gradients, and the offset of this process's rows among them.

    ``x`` [row, ...]; the number of rows may differ between processes, the other sizes may not. All processes must call it.
    A loss of all gathered rows, computed in every process, is already the global loss. A loss over a process's own rows
    against all rows is to be divided by the global mean number of own rows: see :func:`global_mean`.
    """
    _, size = world()
    if size == 1:
        return x, 0
    counts = _counts(x.shape[0], x.device)
    return _Gather.apply(x, counts), sum(counts[: dist.get_rank()])


def row_offset(rows: int, device: torch.device | str = "cpu") -> int:
    """How many rows the processes of lower rank hold, when this one holds ``rows``. All processes must call it."""
    rank, size = world()
    return sum(_counts(rows, device)[:rank]) if size > 1 else 0


def global_mean(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """This process's share of the (weighted) mean of ``x`` over the elements of all processes.

    The mean of the shares over processes is that mean, also when processes hold different numbers of elements. An empty
    global batch gives 0. All processes must call it.
    """
    total = (x if weight is None else x * weight).sum()
    count = torch.tensor(float(x.numel()), device=x.device) if weight is None else weight.expand_as(x).sum().detach()
    _, size = world()
    if size > 1:
        count = count.to(torch.float64)
        dist.all_reduce(count, group=group())
    return total * size / count.to(total.dtype).clamp(min=torch.finfo(total.dtype).tiny)


def _counts(rows: int, device: torch.device | str) -> list[int]:
    mine = torch.tensor([rows], dtype=torch.int64, device=device)
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine, group=group())
    return [int(count) for count in counts]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])  # collectives want equal sizes
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group())
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every process's loss depends on every row: the sum over processes, which the average over processes of data
        # parallel training then divides by their number.
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=group())
        start = sum(ctx.counts[: dist.get_rank()])
        return grad[start : start + ctx.counts[dist.get_rank()]], None
