"""Low-rank adaptation: begins as the model it was, learns in its factors alone, and is the same model when merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from everysat.find import find
from everysat.nn import lora
from everysat.nn.attention import Block
from everysat.nn.position import Grid
from everysat.types import Batch, Place, Raster

GRID = Grid(1, 1, 3, 3)


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Block(16, 2, relative=True, locality=1.0).eval()
    nn.init.normal_(block.attn.relative.table, std=0.3)
    return block


def disturbed(module: nn.Module) -> nn.Module:
    """Factors as after some training."""
    torch.manual_seed(1)
    for parameter in lora.factors(module).values():
        nn.init.normal_(parameter, std=0.2)
    return module


def test_it_begins_as_the_model_it_was_to_the_bit(block, generator):
    x = torch.randn(2, 10, 16, generator=generator)
    before = block(x, GRID)
    names = lora.attach(block, rank=3)
    assert set(names) == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert torch.equal(block(x, GRID), before)


def test_the_sum_is_the_equation(block):
    plain = copy.deepcopy(block)
    lora.attach(block, rank=2, alpha=6.0, targets=["mlp.fc1"])
    disturbed(block)
    a, b = lora.factors(block)["mlp.fc1.a"], lora.factors(block)["mlp.fc1.b"]
    assert a.shape == (2, 16)
    assert b.shape == (64, 2)
    torch.testing.assert_close(block.mlp.fc1.weight, plain.mlp.fc1.weight + 3.0 * b @ a)
    assert torch.equal(block.mlp.fc2.weight, plain.mlp.fc2.weight)


@pytest.mark.parametrize("first", [None, 1], ids=["layers", "parts of a weight"])
def test_merged_outputs_are_unmerged_outputs_to_the_bit(block, generator, first):
    """With ``first``, attention multiplies by parts of the weight of qkv, past the layer's own forward."""
    x = torch.randn(2, 10, 16, generator=generator)
    before, names = block(x, GRID, None, first), set(block.state_dict())
    lora.attach(block, rank=3)
    unmerged = disturbed(block)(x, GRID, None, first)
    assert not torch.allclose(unmerged, before)
    assert lora.merge(block) == 4
    assert torch.equal(block(x, GRID, None, first), unmerged)
    assert set(block.state_dict()) == names
    assert lora.merge(block) == 0
    assert all(isinstance(p, nn.Parameter) for p in (block.attn.qkv.weight, block.mlp.fc1.weight))


def test_merged_is_unmerged_under_reduced_precision_too(block, generator):
    x = torch.randn(2, 10, 16, generator=generator)
    lora.attach(block, rank=3)
    disturbed(block)
    with torch.autocast("cpu", torch.bfloat16):
        unmerged = block(x, GRID)
        lora.merge(block)
        assert torch.equal(block(x, GRID), unmerged)


def observed(encoder, generator) -> Batch:
    """One place, two dates of every series, one of what has none."""
    side, layers = 4 * max(wanted.gsd_m for wanted in encoder.inputs.values()), {}
    for name, wanted in encoder.inputs.items():
        px, days = round(side / wanted.gsd_m), torch.tensor([18000.0, 18100.0])
        days = days[: 2 if wanted.dated else 1]
        values = torch.randn(len(days), len(wanted.sensor.bands), px, px, generator=generator)
        times = torch.stack([days, days + 1], 1).double() * 86400 if wanted.dated else None
        layers[name] = Raster.of(wanted.sensor, values, wanted.gsd_m, time_s=times)
    return Batch((Place(side, side),), layers)


@pytest.mark.parametrize("name", ["omnisat/tiny", "anysat/nano", "ramen/nano", "atomizer/nano"])
def test_gradients_reach_both_factors_of_every_layer_of_the_models(name, generator):
    module, variant = find("models", name)
    torch.manual_seed(0)
    encoder = module.build(variant).eval()
    for parameter in encoder.parameters():  # a product with what starts at zero passes no gradient
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    own = {id(p) for p in encoder.parameters()}
    lora.attach(encoder, rank=2)
    disturbed(encoder)
    encoder.requires_grad_(False)
    for parameter in lora.factors(encoder).values():
        parameter.requires_grad_(True)
    features = encoder(encoder.tokenize(observed(encoder, generator)))
    (features.mean.square().sum() + features.summary.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.factors(encoder).values())
    assert all(p.grad is None for p in encoder.parameters() if id(p) in own)


def test_factors_travel_alone(block, generator, tmp_path):
    x = torch.randn(2, 10, 16, generator=generator)
    fresh = copy.deepcopy(block)
    lora.attach(block, rank=1, alpha=2.0)
    disturbed(block)
    path = lora.save(block, tmp_path / "lora.safetensors")
    assert path.stat().st_size < 0.5 * sum(4 * p.numel() for p in fresh.parameters())
    assert lora.load(fresh, path) == ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    assert torch.equal(fresh(x, GRID), block(x, GRID))
    assert [f.name for f in tmp_path.iterdir()] == ["lora.safetensors"]
    with pytest.raises(ValueError, match=r"has no linear layer 'attn\.proj' of \(16, 16\)"):
        lora.load(Block(8, 2), path)
    path.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="holds no low-rank factors"):
        lora.load(Block(16, 2), path)
    with pytest.raises(ValueError, match="0 kinds"):
        lora.save(nn.Linear(2, 2), path)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(block):
    with pytest.raises(LookupError, match=r"no linear layer is called 'attn\.qvk'\. Did you mean attn\.qkv"):
        lora.attach(block, targets=["mlp.fc1", "attn.qvk"])
    with pytest.raises(ValueError, match="rank=17 must be from 1 to 16"):
        lora.attach(block, rank=17)
    with pytest.raises(LookupError, match="usual names"):
        lora.attach(nn.Sequential(nn.Linear(2, 2)))
    assert not lora.adapted(block)
    assert all(p.requires_grad for p in block.parameters())
    lora.attach(block, targets=["mlp.*"])
    with pytest.raises(ValueError, match=r"'mlp\.fc1' is adapted already"):
        lora.attach(block)
    assert set(lora.adapted(block)) == {"mlp.fc1", "mlp.fc2"}


def test_a_copy_is_adapted_apart(block, generator):
    x = torch.randn(1, 10, 16, generator=generator)
    lora.attach(block, rank=2)
    twin = copy.deepcopy(block)
    before = twin(x, GRID)
    disturbed(block)
    assert torch.equal(twin(x, GRID), before)
    assert not torch.allclose(block(x, GRID), before)
    lora.merge(block)
    assert torch.equal(twin(x, GRID), before)
    assert len(lora.adapted(twin)) == 4
