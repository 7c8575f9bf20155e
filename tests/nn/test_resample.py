"""Grids of the same ground: against PyTorch's interpolation, and what valid pixels mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from everysat.nn.resample import axis_weights, resample, resample_valid


@pytest.mark.parametrize(("before", "after", "ratio"), [(16, 8, 0.5), (16, 4, 0.25), (16, 32, 2.0), (15, 5, 1 / 3)])
def test_equals_interpolation_where_sizes_fit(before, after, ratio) -> None:
    image = torch.rand(2, 3, before, before)
    weight = axis_weights(before, after, ratio)
    expected = F.interpolate(image, scale_factor=ratio, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample(image, weight, weight), expected)


def test_antialiased_equals_that_of_pytorch_inside() -> None:
    image = torch.rand(1, 1, 64, 64)
    weight = axis_weights(64, 16, 0.25, True)
    expected = F.interpolate(image, size=16, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(resample(image, weight, weight), expected)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("before", "after", "ratio"), [(10, 3, 0.3), (7, 40, 5.5), (1, 4, 3.7), (9, 9, 1.0)])
def test_a_constant_stays_and_a_slope_stays_straight(before, after, ratio, antialias) -> None:
    weight = axis_weights(before, after, ratio, antialias)
    torch.testing.assert_close(weight.sum(1), torch.ones(after))
    metres = torch.arange(before) + 0.5
    cells = (torch.arange(after) + 0.5) / ratio
    reach = max(1.0, 1 / ratio)
    inside = (cells > reach) & (cells < before - reach)
    torch.testing.assert_close((weight @ metres)[inside], cells[inside], rtol=1e-4, atol=1e-4)


def test_invalid_pixels_have_no_effect_and_empty_cells_say_so() -> None:
    values, valid = torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    valid[..., :4, :4] = False
    valid[..., 6, 6] = False
    weight = axis_weights(8, 4, 0.5, True)
    found, seen = resample_valid(values, valid, weight, weight)
    other, _ = resample_valid(torch.where(valid, values, torch.inf), valid, weight, weight)
    assert torch.equal(found, other)
    assert not seen[0, 0, 0, 0]
    assert seen[0, 0, 3, 3]
    assert (found[~seen] == 0).all()
    inside = values[0, 0, 4:, 4:]
    assert inside.min() <= found[0, 0, 3, 3] <= inside.max()
