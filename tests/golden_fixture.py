"""A fixture of numbers from a published implementation, as ``tests/golden/README.md`` describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=1e-4, atol=3e-5, msg=lambda text: f"{what}: {text}"
    )


class Fixture:
    def __init__(self, path: Path) -> None:
        self.facts: dict[str, Any] = json.loads(path.read_text())
        self.io = load_file(path.parent / self.facts["io"])
        self.weights: dict[str, Tensor] = {}
        for name in self.facts["weights"]:
            self.weights.update(load_file(path.parent / name))
        self.folder = path.parent

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.io.items() if key.startswith(prefix)}
