"""A text encoder for tests that needs no weights: how often each letter occurs, of length 1. Found as ``letters``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Letters:
    dim = 26

    def __call__(self, strings: Sequence[str]) -> Tensor:
        counts = torch.tensor([[float(text.count(chr(97 + i))) for i in range(26)] for text in strings])
        return torch.nn.functional.normalize(counts.view(-1, 26), dim=1)


def build() -> Letters:
    return Letters()
