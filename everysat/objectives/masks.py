"""What a training step is shown: blocks of patches, as in I-JEPA (Assran et al. 2023), some of the dates, a size of patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from everysat.nn.draws import uniform
from everysat.nn.ragged import ordinal
from everysat.types import Batch

Span = tuple[float, float]
TRIES = 20
"""How often a context block is drawn anew before it may overlap one more target."""


@dataclass(frozen=True)
class BlockMasks:
    """Context and target blocks of a place.

    Attributes:
        targets: blocks to predict, of ``target_area`` (share of the patches) and ``target_aspect`` (height over width).
        context_area: share of the patches of the square block that is shown, less the targets.
    """

    targets: int = 4
    target_area: Span = (0.2, 0.8)
    target_aspect: Span = (0.75, 1.5)
    context_area: Span = (0.85, 1.0)

    def __post_init__(self) -> None:
        for name in ("target_area", "context_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be two shares between 0 and 1, in order")
        if self.targets < 1:
            raise ValueError(f"targets={self.targets} must be at least 1")

    def __call__(
        self, grid: tuple[int, int], sizes: torch.Generator, positions: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which patches are the context, bool [y, x], and the targets, bool [target, y, x].

        ``sizes`` and ``positions`` give the random numbers: places that share the former get blocks of one size. The published
        code cuts the context of all places of a batch to the smallest of them; here each keeps its own.

        Raises:
            ValueError: the grid has a single patch, of which nothing could be left to show.
        """
        if grid[0] * grid[1] < 2:
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} patches cannot be split; take smaller patches or larger places"
            )
        target = _size(sizes, self.target_area, self.target_aspect, grid)
        context = _size(sizes, self.context_area, (1.0, 1.0), grid)
        hidden = torch.stack([_block(positions, target, grid) for _ in range(self.targets)])
        return _context(positions, context, grid, hidden), hidden


def _size(g: torch.Generator, area: Span, aspect: Span, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a block, below those of the grid; one random number decides area and aspect, as published."""
    r = float(torch.rand(1, generator=g))
    count = int(grid[0] * grid[1] * (area[0] + r * (area[1] - area[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(count * ratio)), round(math.sqrt(count / ratio))
    return max(1, min(height, grid[0] - 1)), max(1, min(width, grid[1] - 1))


def _block(g: torch.Generator, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    top, left = (int(torch.randint(0, n - s + 1, (1,), generator=g)) for n, s in zip(grid, size, strict=True))
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[top : top + size[0], left : left + size[1]] = True
    return mask


def _context(g: torch.Generator, size: tuple[int, int], grid: tuple[int, int], hidden: Tensor) -> Tensor:
    """A block without the targets; after :data:`TRIES` draws that leave nothing, one target fewer is respected."""
    for respected in range(len(hidden), -1, -1):
        for _ in range(TRIES):
            mask = _block(g, size, grid) & ~hidden[:respected].any(0)
            if mask.any():
                return mask
    raise AssertionError("a block is never empty")


def drawn_size(
    sizes: Sequence[float] | Mapping[str, Sequence[float]], source: str, name: str, generator: torch.Generator
) -> float:
    """One of ``sizes``, or of those listed for the ``source`` of a batch; ``name`` is that of the option, for the error."""
    if isinstance(sizes, Mapping):
        if source not in sizes:
            raise LookupError(f"{name} lists {', '.join(sizes)}, but a batch comes from {source!r}: give its sizes too")
        sizes = sizes[source]
    return float(sizes[int(torch.randint(len(sizes), (1,), generator=generator))])


def fewer_dates(batch: Batch, names: Iterable[str], ratio: float, generator: torch.Generator, first: int) -> Batch:
    """Without a random part ``ratio`` of the dates of each place in the layers ``names``, of which at least one stays. ``first``:
    number of the first place in the global batch."""
    layers = dict(batch.layers)
    for name in names:
        if name not in layers:
            continue
        layer = batch.raster(name)
        row = layer.row.cpu()
        count = torch.bincount(row, minlength=len(batch))
        luck = uniform(generator, row + first, ordinal(row, len(batch))).double()
        order = torch.argsort(luck + row)
        rank = torch.empty_like(order)
        rank[order] = ordinal(row[order], len(batch))
        keep = rank < (count[row] * (1.0 - ratio)).long().clamp(min=1)
        layers[name] = layer.obs(torch.nonzero(keep).flatten().to(layer.row.device))
    return replace(batch, layers=layers)
