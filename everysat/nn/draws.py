"""Random numbers as a pure function of what they are for.

A run that is interrupted and resumed, or spread over several processes, makes the same draws as one that is not, because no
generator carries state from one step to the next: each is made afresh from (seed, step, purpose, ...).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def key(*purpose: int | str) -> int:
    """A 63-bit number that depends on every part of ``purpose``, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest(), "little") & _MASK


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose, such as ``generator(seed, step, "mask")``."""
    return torch.Generator().manual_seed(key(*purpose))


def stream(*purpose: int | str) -> np.random.Generator:
    """A numpy generator for one purpose whose first n numbers do not depend on how many are drawn in all (torch's do)."""
    return np.random.Generator(np.random.Philox(key=key(*purpose)))


def uniform(generator: torch.Generator, row: Tensor, index: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float32, each a function of the generator's next draw and of its own (row, index) alone.

    With ``row`` the number of a place in the global batch (local row plus the offset of :func:`everysat.nn.gather.row_offset`),
    a place draws the same whichever process holds it. One number is taken from ``generator`` whatever the size.
    SplitMix64 finaliser (Steele, Lea & Flood 2014) in wrapping int64 arithmetic.
    """
    seed = int(torch.randint(0, _MASK, (1,), generator=generator))
    row, index = torch.broadcast_tensors(row.long(), index.long())
    bits = _mix(_mix(row + seed) + index)
    return (_shift(bits, 40)).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = x - 7046029254386353131  # + 0x9E3779B97F4A7C15
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's ``>>`` on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
