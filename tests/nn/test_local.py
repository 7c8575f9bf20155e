"""Attention with offsets: what the layers do, against the plain formulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from everysat.nn.atoms import Fourier
from everysat.nn.local import (
    GaussianAttention,
    LocalReading,
    RelativeAttention,
    Rotary,
    cartesian_code,
    nearest,
    polar_code,
    squashed,
)


def test_rotary_keeps_lengths_and_adds_up() -> None:
    torch.manual_seed(0)
    rotary = Rotary(16)
    keys, offset = torch.randn(5, 2, 16), torch.randn(5, 2)
    turned = rotary(keys, offset)
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1))
    torch.testing.assert_close(rotary(turned, -offset), keys)
    torch.testing.assert_close(rotary(turned, offset), rotary(keys, 2 * offset))
    assert torch.equal(turned[..., 8:], rotary(keys, offset * torch.tensor([0.0, 1.0]))[..., 8:])


def test_rotary_makes_logits_depend_on_offsets_alone() -> None:
    """Turning query and key by their places is turning the key by their difference."""
    torch.manual_seed(0)
    rotary = Rotary(8)
    q, k, at_q, at_k = torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 2), torch.randn(1, 2)
    both = (rotary(q, at_q) * rotary(k, at_k)).sum()
    torch.testing.assert_close((q * rotary(k, at_k - at_q)).sum(), both)


def test_a_query_reads_its_own_inputs_alone() -> None:
    torch.manual_seed(0)
    reading = LocalReading(8, 6, 2, 4, rotary=True)
    x, context, offset = torch.randn(3, 8), torch.randn(3, 5, 6), torch.randn(3, 5, 2)
    keep = torch.rand(3, 5) > 0.4
    keep[2] = False
    out = reading(x, context, keep, offset)
    other = torch.where(keep[..., None], context, 1e3)
    torch.testing.assert_close(reading(x, other, keep, offset), out)
    torch.testing.assert_close(out[2], reading.to_out.bias)
    some = keep[0]
    alone = reading(x[:1], context[:1, some], None, offset[:1, some])
    torch.testing.assert_close(out[:1], alone)


def test_gaussian_attention_fades_with_distance() -> None:
    torch.manual_seed(0)
    attention = GaussianAttention(8, 2, 4, sigma=0.01)
    x = torch.randn(1, 3, 8)
    at = torch.tensor([[[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]])
    v = F.linear(x, attention.to_qkv.weight[16:])
    torch.testing.assert_close(attention(x, at), attention.to_out(v))  # each reads itself alone
    torch.nn.init.constant_(attention.log_sigma, 10.0)
    without = GaussianAttention(8, 2, 4)
    without.load_state_dict(attention.state_dict())
    torch.testing.assert_close(attention(x, at), without(x, at * 0), rtol=1e-4, atol=1e-5)


def test_relative_keys_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    code = Fourier(4, 3)
    attention = RelativeAttention(8, 2, 4, code=code, unit=3.0)
    x, at = torch.randn(2, 5, 8), torch.randn(2, 3, 2)
    pairs = torch.zeros(2, 5, 5, 2 * code.dim)
    pairs[:, :3, :3] = code(squashed((at[:, None] - at[:, :, None]) / 3.0)).flatten(-2)
    keys = attention.to_k(torch.cat([x[:, None].expand(-1, 5, -1, -1), pairs], -1)).unflatten(-1, (2, 4))
    q, v = (t(x).unflatten(-1, (2, 4)) for t in (attention.to_q, attention.to_v))
    weight = (torch.einsum("pihd,pijhd->phij", q, keys) / 2).softmax(-1)
    expected = attention.to_out(torch.einsum("phij,pjhd->pihd", weight, v).flatten(-2))
    torch.testing.assert_close(attention(x, at), expected)


def test_codes_of_offsets() -> None:
    code = Fourier(4, 2)
    offset, size = torch.tensor([[3.0, 0.0], [0.0, -3.0]]), torch.zeros(2)
    plain, polar = cartesian_code(offset, size, code), polar_code(offset, size, code)
    assert plain.shape == polar.shape == (2, 15)
    torch.testing.assert_close(plain[0, 4], torch.tensor(0.75))  # 3 / (1 + 3)
    torch.testing.assert_close(polar[:, 4], torch.tensor([0.75, 0.75]))
    torch.testing.assert_close(polar[:, 9], torch.tensor([0.0, -0.5]))  # direction over pi


def test_nearest() -> None:
    at = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]]])
    assert nearest(torch.tensor([[[0.9, 0.0], [8.0, 8.0]]]), at, 2).tolist() == [[[1, 0], [2, 1]]]


def test_a_head_that_cannot_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim=6 must be a multiple of 4"):
        Rotary(6)
    assert math.isclose(float(Rotary(8).inv_freq[1]), 10**-0.5, rel_tol=1e-6)
