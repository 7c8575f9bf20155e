"""Dense features: shifted grids interleave exactly, chips do not change what is local, nothing is made up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simple_encoder import SquareEncoder, image_batch

from everysat.nn.dense import dense_at, dense_features


class MeanEncoder(SquareEncoder):
    """Its feature is the mean of the first band over the token."""

    def __init__(self, size_m):
        super().__init__(size_m, dim=1)
        with torch.no_grad():
            self.proj.weight.zero_()
            self.proj.weight[:, : self.k**2] = 0.5 / self.k**2  # Input std 0.5, mean 0.2
            self.proj.bias.fill_(0.2)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder(30.0)


def test_one_shift_at_the_token_grid_is_the_encoder_itself(encoder, generator):
    batch = image_batch(torch.rand(2, 2, 12, 9, generator=generator))
    torch.testing.assert_close(dense_features(encoder, batch, 30.0, token_m=30.0), encoder.embed(batch).grid())


@given(st.integers(6, 14), st.integers(6, 14))
@settings(max_examples=10, deadline=None)
def test_three_shifts_give_each_inner_pixel_the_token_centred_on_it(height, width):
    values = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    dense = dense_features(MeanEncoder(30.0), image_batch(values), 10.0, token_m=30.0, shifts=3)
    around = torch.nn.functional.avg_pool2d(values[:, :1], 3, 1)  # centred on pixels 1 .. n - 2
    whole = [n - n % 3 for n in (height, width)]
    inner = dense[:, :, 1 : whole[0] - 1, 1 : whole[1] - 1]
    torch.testing.assert_close(inner, around[:, :, : inner.shape[2], : inner.shape[3]])
    assert dense.shape[2:] == (height, width)
    assert torch.isfinite(dense).all()
    torch.testing.assert_close(dense[:, :, 0], dense[:, :, 1])


def test_two_shifts_interpolate_between_the_four_nearest_centres(generator):
    values = torch.rand(1, 2, 8, 8, generator=generator)
    dense = dense_features(MeanEncoder(20.0), image_batch(values), 10.0, token_m=20.0, shifts=2)
    boxes = torch.nn.functional.avg_pool2d(values[:, :1], 2, 1)
    torch.testing.assert_close(dense[:, :, 1:-1, 1:-1], torch.nn.functional.avg_pool2d(boxes, 2, 1))


def test_mean_is_over_all_tokens_that_cover_the_pixel(generator):
    values = torch.rand(1, 2, 9, 9, generator=generator)
    dense = dense_features(MeanEncoder(30.0), image_batch(values), 10.0, token_m=30.0, shifts=3, how="mean")
    boxes = torch.nn.functional.avg_pool2d(values[:, :1], 3, 1)
    torch.testing.assert_close(dense[:, :, 2:-2, 2:-2], torch.nn.functional.avg_pool2d(boxes, 3, 1))
    torch.testing.assert_close(dense[..., 0, 0], boxes[..., 0, 0])


def test_a_coarse_layer_is_averaged_by_area_onto_the_shifted_grid():
    """One pixel per token: a shift of a third takes two thirds of the pixel and a third of its neighbour."""
    encoder = SquareEncoder(30.0, gsd_m=30.0, dim=1)
    with torch.no_grad():
        encoder.proj.weight.copy_(torch.tensor([[0.5, 0.0]]))
        encoder.proj.bias.fill_(0.2)
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 2, 4, 4)
    dense = dense_features(encoder, image_batch(ramp, 30.0), 10.0, token_m=30.0, shifts=3)
    torch.testing.assert_close(dense[0, 0, 5, 1:11], torch.arange(10) / 3)


@pytest.mark.parametrize("shifts", [1, 3])
def test_chips_and_batch_sizes_change_nothing_for_a_local_encoder(encoder, generator, shifts):
    batch = image_batch(torch.rand(2, 2, 30, 21, generator=generator))
    whole = dense_features(encoder, batch, 10.0, token_m=30.0, shifts=shifts)
    for size, stride, together in ((90.0, 60.0, 64), (120.0, None, 5), (30.0, 30.0, 1)):
        chips = dense_features(
            encoder, batch, 10.0, token_m=30.0, shifts=shifts, chip_m=size, stride_m=stride, batch_size=together
        )
        torch.testing.assert_close(chips, whole, atol=1e-5, rtol=1e-5)


def test_the_encoder_sees_chips_of_the_asked_extent(encoder, generator):
    seen = set()
    real = encoder.tokenize
    encoder.tokenize = lambda batch: seen.update((p.height_m, p.width_m) for p in batch.places) or real(batch)
    dense_features(
        encoder, image_batch(torch.rand(1, 2, 30, 30, generator=generator)), 10.0, token_m=30.0, shifts=3, chip_m=90.0
    )
    assert seen == {(90.0, 90.0)}


def test_unobserved_ground_has_no_features_and_does_not_touch_the_rest(encoder, generator):
    values = torch.rand(1, 2, 18, 18, generator=generator)
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[:, :, :, 9:] = False
    results = [
        dense_features(
            encoder, image_batch(torch.where(valid, values, fill), valid=valid), 10.0, token_m=30.0, shifts=3
        )
        for fill in (0.0, 1e6)
    ]
    assert torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))
    assert torch.isnan(results[0][..., 12:]).all()
    assert torch.isfinite(results[0][..., :9]).all()
    nothing = dense_features(encoder, image_batch(values, valid=valid & False), 10.0, token_m=30.0)
    assert torch.isnan(nothing).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chip_m": 100.0}, "chip_m=100 is not a multiple"),
        ({"chip_m": 60.0, "stride_m": 90.0}, "larger than chip_m"),
        ({"shifts": 0}, "at least 1"),
        ({"how": "cubic"}, "none of bilinear, mean"),
        ({"token_m": 60.0}, "its tokens are 30 m wide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(encoder, generator, options, message):
    batch = image_batch(torch.rand(1, 2, 12, 12, generator=generator))
    with pytest.raises(ValueError, match=message):
        dense_features(encoder, batch, 10.0, **{"token_m": 30.0, **options})


@pytest.mark.parametrize("shifts", [1, 3])
def test_single_pixels_equal_those_of_the_image(encoder, generator, shifts):
    values = torch.rand(1, 2, 12, 15, generator=generator)
    values[0, :, :3, :3] = torch.nan
    batch = image_batch(values)
    image = dense_features(encoder, batch, 10.0, token_m=30.0, shifts=shifts)[0]
    y, x = torch.randint(12, (40,), generator=generator), torch.randint(15, (40,), generator=generator)
    found = dense_at(encoder, batch, 10.0, y, x, token_m=30.0, shifts=shifts)
    torch.testing.assert_close(found, image[:, y, x].T, equal_nan=True)
