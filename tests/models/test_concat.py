"""Concatenation: each layer has a place of its own in the features, zeros where it is not there."""

from __future__ import annotations

import pytest
import torch
from test_laws import example

from everysat.find import find
from everysat.types import Batch


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return find("models", "concat")[0].build("nano").eval()


def test_each_layer_has_its_own_place(model):
    batch = example(model, torch.Generator().manual_seed(0))
    width, names = model.backbone.dim, list(model.inputs)
    assert model.dim == width * len(names)
    whole = model.embed(batch)
    for number, name in enumerate(names):
        mine = slice(number * width, (number + 1) * width)
        alone, without = model.embed(batch.only(name)), model.embed(batch.without(name))
        inside = model.backbone.embed(batch.only(name))
        torch.testing.assert_close(alone.summary[:, mine], inside.summary)
        torch.testing.assert_close(whole.summary[:, mine], inside.summary)
        assert not alone.summary[:, : mine.start].any()
        assert not alone.summary[:, mine.stop :].any()
        assert not without.summary[:, mine].any()
    assert not model.embed(batch.only()).summary.any()


@pytest.mark.parametrize("name", ["simplesat/nano", "omnisat/tiny", "anysat/nano"])
def test_a_place_that_lacks_a_layer_has_zeros_there_whatever_its_neighbours_have(name):
    torch.manual_seed(1)
    model = find("models", "concat")[0].build(encoder={"name": name}).eval()
    whole = [example(model, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    name, width = next(iter(model.inputs)), model.backbone.dim
    both = model.embed(Batch.cat([whole[0], whole[1].without(name)]))
    assert both.summary[0, :width].any()
    assert not both.summary[1, :width].any()
    torch.testing.assert_close(both.summary[1:], model.embed(whole[1].without(name)).summary)


def test_a_model_without_a_contract_is_refused():
    with pytest.raises(ValueError, match="must say what to wrap"):
        find("models", "concat")[0].build()
    with pytest.raises(ValueError, match="lists no layers"):
        find("models", "concat")[0].build(encoder={"name": "satclip/nano"})
