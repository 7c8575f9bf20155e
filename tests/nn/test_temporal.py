"""L-TAE: series of different lengths together equal each alone; the order of dates means nothing; sums to one."""

from __future__ import annotations

import pytest
import torch

from everysat.nn.temporal import Ltae


@pytest.fixture(params=[{}, {"normalise": False}, {"windows": True}], ids=["normalised", "plain", "windows"])
def ltae(request) -> Ltae:
    torch.manual_seed(0)
    model = Ltae(5, (8, 16), (16,), heads=4, key_dim=3, **request.param).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.running_mean)
    return model


def series(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.randn(len(index), 5), index, torch.randint(1, 366, (len(index),)).double()


def test_ragged_series_equal_one_by_one(ltae) -> None:
    x, index, day = series([3, 1, 7, 4])
    together, attention = ltae(x, index, day, 4)
    for i in range(4):
        mine = index == i
        alone, weights = ltae(x[mine], torch.zeros(int(mine.sum()), dtype=torch.long), day[mine], 1)
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(attention[mine], weights)
        assert weights.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 5, 1]])
def test_order_of_observations_is_irrelevant(ltae, lengths) -> None:
    x, index, day = series(lengths)
    shuffled = torch.randperm(len(index))
    expected, weights = ltae(x, index, day, 3)
    found, other = ltae(x[shuffled], index[shuffled], day[shuffled], 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(other, weights[shuffled])


def test_dates_matter(ltae) -> None:
    x, index, day = series([4, 4])
    assert not torch.allclose(ltae(x, index, day, 2)[0], ltae(x, index, day + 90, 2)[0], atol=1e-3)


def test_heads_with_windows_begin_in_their_part_of_the_series() -> None:
    ltae = Ltae(5, (8, 16), (16,), heads=4, key_dim=3, windows=True).eval()
    torch.nn.init.zeros_(ltae.query)
    day = torch.arange(40).double() + 20000
    _, attention = ltae.by_head(torch.zeros(40, 5), torch.zeros(40, dtype=torch.long), day, 1)
    assert attention.argmax(0).tolist() == pytest.approx([0, 13, 26, 39], abs=1)
    assert (attention[:20].sum(0) > 0.5).tolist() == [True, True, False, False]


def test_no_observation_at_all(ltae) -> None:
    found, attention = ltae(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), torch.zeros(0).double(), 0)
    assert found.shape == (0, 16)
    assert attention.shape == (0,)


@pytest.mark.parametrize("windows", [False, True])
def test_gradients_reach_every_parameter(windows: bool) -> None:
    torch.manual_seed(0)
    ltae = Ltae(5, (8, 16), (16,), heads=4, key_dim=3, dropout=0.0, attention_dropout=0.0, windows=windows).train()
    x, index, day = series([3, 2])
    out, _ = ltae(x, index, day, 2)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ltae.parameters())
