"""The patch CNN and its decoder."""

from __future__ import annotations

import pytest
import torch

from everysat.nn.patch import PatchCnn, PatchDecoder, TexturePool, pooled_sizes


@pytest.mark.parametrize(
    ("patch", "sizes"), [(50, [25, 12, 6, 3, 1]), (40, [20, 10, 5, 2, 1]), (6, [3, 1]), (3, [2, 1])]
)
def test_sizes_fall_to_one(patch, sizes) -> None:
    assert pooled_sizes(patch) == sizes


@pytest.mark.parametrize("patch", [3, 6, 10, 17, 50])
@pytest.mark.parametrize("bypass", [True, False])
def test_decoder_gives_the_patch_back_in_shape(patch, bypass) -> None:
    cnn, decoder = PatchCnn(3, 8, patch), PatchDecoder(3, 8, patch, bypass=bypass)
    x = torch.randn(4, 3, patch, patch)
    vectors, indices = cnn(x, indices=True)
    assert vectors.shape == (4, 8)
    out = decoder(vectors, indices)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None for p in [*cnn.parameters(), *decoder.parameters()])


def test_inference_in_parts_equals_training_path_in_eval_mode() -> None:
    torch.manual_seed(0)
    cnn = PatchCnn(3, 8, 10).eval()
    x = torch.randn(150, 3, 10, 10)
    with torch.inference_mode():
        parts, _ = cnn(x)
    torch.testing.assert_close(parts, cnn(x, indices=True)[0], rtol=1e-5, atol=1e-6)


def test_too_small_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="patch=2 pixels is too small"):
        PatchCnn(3, 8, 2)


@pytest.mark.parametrize("patch", [1, 3, 6])
def test_texture_of_a_patch_ignores_invalid_pixels_and_turns(patch) -> None:
    torch.manual_seed(0)
    pool, x = TexturePool(3, 8, patch), torch.randn(5, 3, patch, patch)
    everything = torch.ones(5, patch, patch, dtype=torch.bool)
    assert pool(x, everything).shape == (5, 8)
    pool.conv.weight.data = pool.conv.weight.data + pool.conv.weight.data.rot90(2, (2, 3))
    torch.testing.assert_close(pool(x, everything), pool(x.rot90(2, (2, 3)), everything))
    if patch > 1:
        some = everything.clone()
        some[:, 0] = False
        seen = torch.where(some[:, None], x, 0.0)
        assert not torch.allclose(pool(seen, some), pool(seen, everything))
