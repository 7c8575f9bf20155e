from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everysat.objectives.masks import BlockMasks


def draw(grid: tuple[int, int], sizes: int = 0, positions: int = 0, **options):
    g = torch.Generator().manual_seed(sizes), torch.Generator().manual_seed(positions)
    return BlockMasks(**options)(grid, *g)


@given(st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda g: g[0] * g[1] > 1), st.integers(0, 1000))
def test_something_is_shown_and_every_target_is_a_block_inside_the_grid(grid, seed) -> None:
    context, targets = draw(grid, seed, seed)
    assert context.shape == grid
    assert targets.shape == (4, *grid)
    assert context.any()
    for target in targets:
        rows, columns = torch.nonzero(target.any(1)).flatten(), torch.nonzero(target.any(0)).flatten()
        assert int(target.sum()) == len(rows) * len(columns) > 0
        assert int(rows[-1] - rows[0]) == len(rows) - 1
        assert int(columns[-1] - columns[0]) == len(columns) - 1


def test_the_context_holds_no_target_where_there_is_room() -> None:
    for seed in range(50):
        context, targets = draw((12, 12), seed, seed, target_area=(0.1, 0.2))
        assert not (context & targets.any(0)).any()


def test_sizes_and_positions_come_from_their_own_generators() -> None:
    _, a = draw((8, 8), sizes=3, positions=1)
    _, b = draw((8, 8), sizes=3, positions=2)
    assert int(a[0].sum()) == int(b[0].sum())
    assert not torch.equal(a, b)


def test_targets_are_as_large_as_asked() -> None:
    shares = torch.tensor([float(draw((40, 40), s, s, target_area=(0.2, 0.3))[1][0].float().mean()) for s in range(30)])
    assert shares.min() > 0.15
    assert shares.max() < 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, "targets=0"),
        ({"target_area": (0.5, 0.2)}, "target_area"),
        ({"context_area": (0, 1)}, "context_area"),
    ],
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMasks(**options)


def test_a_single_patch_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="1 x 1"):
        draw((1, 1))
