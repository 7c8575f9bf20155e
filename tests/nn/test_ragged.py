from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from everysat.nn.ragged import ordinal, side_by_side


@given(st.lists(st.integers(0, 4), max_size=30))
def test_rows_side_by_side_hold_what_was_stacked(rows) -> None:
    row = torch.tensor(rows, dtype=torch.long)
    x = torch.randn(len(rows), 3)
    out, there, slot = side_by_side(x, row, 6)
    assert torch.equal(out.flatten(0, 1)[slot], x)
    assert there.sum(1).tolist() == [rows.count(i) for i in range(6)]
    assert not out[~there].any()
    for i in range(6):
        assert torch.equal(out[i][there[i]], x[row == i])
        assert ordinal(row, 6)[row == i].tolist() == list(range(rows.count(i)))
