"""The UPerNet head: its shapes, what has no effect on it, and that it uses what lies around."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from simple_encoder import SquareEncoder, image_batch, label_raster

from everysat.nn.heads import PixelHead, UperNet, build_head
from everysat.tasks.classify import build
from everysat.types import Batch


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder()


def head_of(encoder, gsd_m=10.0, out=3):
    torch.manual_seed(1)
    return PixelHead("upernet", encoder, out, token_size_m=20.0, gsd_m=gsd_m).eval()


@pytest.mark.parametrize(("gsd_m", "side"), [(20.0, 5), (10.0, 10), (5.0, 20), (4.0, 25), (2.0, 50)])
def test_every_pixel_gets_its_values(encoder, generator, gsd_m, side):
    batch = image_batch(torch.rand(2, 2, 10, 10, generator=generator))
    values, seen = head_of(encoder, gsd_m)(encoder.embed(batch))
    assert values.shape == (2, 3, side, side)
    assert seen.all()
    assert values.std((2, 3)).min() > 0


def test_places_alone_are_places_in_a_batch_whatever_their_sizes(encoder, generator):
    head = head_of(encoder)
    places = [image_batch(torch.rand(1, 2, *size, generator=generator)) for size in ((6, 14), (10, 4), (6, 14), (2, 2))]
    values, seen = head(encoder.embed(Batch.cat(places)))
    for i, place in enumerate(places):
        alone, there = head(encoder.embed(place))
        height, width = alone.shape[2:]
        torch.testing.assert_close(values[i, :, :height, :width], alone[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(seen[i, :height, :width], there[0])
        assert not seen[i, height:].any()
        assert not seen[i, :, width:].any()


def test_what_is_not_valid_has_no_effect(encoder, generator):
    head, values = head_of(encoder), torch.rand(1, 2, 12, 12, generator=generator)
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[:, :, 2:8, 4:8] = False
    found = []
    for wrong in (0.0, 1e6, math.inf):
        batch = image_batch(torch.where(valid, values, wrong), valid=valid)
        found.append(head(encoder.embed(batch)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][1][0], valid[0, 0])
    assert torch.isfinite(found[0][0]).all()


def test_missing_cells_are_not_zeros_in_its_means():
    """The mean over the whole place, of a place of one value, is that value, also where the upper half was not seen."""
    torch.manual_seed(0)
    net = UperNet(4, 2, 1, hidden=8).eval()
    net.context = torch.nn.Identity()
    level, seen = torch.rand(1, 8, 1, 1).expand(1, 8, 6, 6), torch.ones(1, 1, 6, 6)
    half = seen.clone()
    half[:, :, :3] = 0
    whole, part = (net._with_context(level * there, there)[:, 8:16] for there in (seen, half))
    torch.testing.assert_close(whole, part)
    assert whole.std() > 0


def test_it_looks_around_and_a_token_head_does_not(encoder, generator):
    values = torch.rand(1, 2, 12, 12, generator=generator)
    far = values.clone()
    far[:, :, 8:, 8:] += 1.0
    for kind, moved in (("upernet", True), ("norm", False)):
        head = PixelHead(kind, encoder, 3, token_size_m=20.0, gsd_m=10.0).eval()
        a, b = (head(encoder.embed(image_batch(v)))[0][..., :2, :2] for v in (values, far))
        assert (not torch.allclose(a, b, atol=1e-6)) == moved


def test_gradients_reach_every_parameter(encoder, generator):
    for gsd_m in (20.0, 10.0, 5.0):
        head = head_of(encoder, gsd_m)
        values, _ = head(encoder.embed(image_batch(torch.rand(1, 2, 16, 16, generator=generator))))
        values.square().sum().backward()
        assert not [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]


def test_it_learns_what_only_the_neighbourhood_tells(encoder, generator):
    """Is there anything bright in the place? No token but the bright one knows."""
    values = torch.rand(24, 2, 8, 8, generator=generator) * 0.2
    bright = torch.arange(24) % 2
    for row in bright.nonzero()[:, 0].tolist():
        y, x = torch.randint(8, (2,), generator=generator).tolist()
        values[row, :, y, x] = 3.0
    codes = bright.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    batch = image_batch(values).adding(label=label_raster(codes, 10.0))
    scores = {}
    for kind in ("upernet", "norm"):
        torch.manual_seed(2)
        encoder = SquareEncoder()
        task = build("pixel", encoder=encoder, classes=["dark", "bright"], gsd_m=10.0, token_size_m=20.0, head=kind)
        optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=0.01)
        for _ in range(100):
            loss = task(encoder, batch, generator)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        p, truth = task.pairs(task.predict(encoder.embed(batch)), batch)
        scores[kind] = float((p.argmax(1) == truth).float().mean())
    assert scores["upernet"] > 0.97
    assert scores["norm"] < 0.8


def test_a_place_is_no_image(encoder):
    with pytest.raises(ValueError, match="take the level 'pixel'"):
        build_head("place", "upernet", encoder, 3, gsd_m=None, token_size_m=None)


def test_a_head_may_have_features_of_another_width(encoder, generator):
    features = encoder.embed(image_batch(torch.rand(1, 2, 6, 6, generator=generator)))
    wide = replace(features, mean=features.mean.repeat(1, 3), summary=features.summary.repeat(1, 3))
    for level in ("place", "pixel"):
        for kind in ("linear", "norm", "mlp", "upernet"):
            if (level, kind) != ("place", "upernet"):
                chosen = build_head(level, kind, encoder, 2, gsd_m=10.0, token_size_m=20.0, dim=18)
                assert chosen(wide)[0].shape[1] == 2
