"""Patches of very high resolution images to tokens by a small CNN, and back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCHES_AT_ONCE = 64
"""Patches that go through the CNN together at inference: bounds memory without slowing a processor."""


class PatchCnn(nn.Module):
    """Each patch to one vector: a strided convolution, then max-pooling and residual blocks down to one cell (OmniSat).

    A patch of 50 px goes 50, 25, 12, 6, 3, 1. Pooling positions are kept for :class:`PatchDecoder` when asked for.
    """

    def __init__(self, bands: int, dim: int, patch: int) -> None:
        super().__init__()
        if patch < 3:
            raise ValueError(f"patch={patch} pixels is too small for an image projector; use a series projector")
        self.sizes = pooled_sizes(patch)
        self.stem = nn.Conv2d(bands, dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim)
        self.residuals = nn.ModuleList(Residual(dim) for _ in self.sizes[2:])

    def forward(self, patches: Tensor, *, indices: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Vectors [n, dim] of patches [n, band, y, x], and the position of each maximum, one tensor a pooling."""
        if self.training or torch.is_grad_enabled() or indices:
            return self._run(patches, indices)
        return torch.cat([self._run(part, False)[0] for part in patches.split(PATCHES_AT_ONCE)]), []

    def _run(self, x: Tensor, indices: bool) -> tuple[Tensor, list[Tensor]]:
        x = F.gelu(self.norm(self.stem(x.contiguous(memory_format=torch.channels_last))))
        found: list[Tensor] = []
        for level in range(len(self.sizes) - 1):
            if indices:
                x, where = F.max_pool2d(x, 2, return_indices=True)
                found.append(where)
            else:
                x = F.max_pool2d(x, 2)
            if level < len(self.residuals):
                x = self.residuals[level](x)
        return x.flatten(1), found


class TexturePool(nn.Module):
    """Each small patch to one vector: mean and standard deviation over the patch of the bands and of learned 3 x 3 features.

    For patches of a few pixels, where pooling level by level has nothing to descend. Invalid pixels count in neither.
    """

    def __init__(self, bands: int, dim: int, patch: int, hidden: int = 64) -> None:
        super().__init__()
        self.spread = patch > 1
        side = 3 if patch > 1 else 1
        self.conv = nn.Conv2d(
            bands, hidden, side, padding=side // 2, padding_mode="replicate" if patch > 1 else "zeros"
        )
        self.mix = nn.Conv2d(hidden, hidden, 1)
        width = (bands + hidden) * (2 if self.spread else 1)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, patches: Tensor, valid: Tensor) -> Tensor:
        """Vectors [n, dim] of patches [n, band, y, x] with ``valid`` [n, y, x]; invalid pixels must hold 0."""
        hidden = F.gelu(self.mix(F.gelu(self.conv(patches))))
        x = torch.cat([patches, hidden], 1).float()
        weight = valid[:, None].to(x.dtype)
        count = weight.sum((2, 3)).clamp(min=1)
        mean = (x * weight).sum((2, 3)) / count
        parts = [mean]
        if self.spread:
            variance = ((x - mean[:, :, None, None]).square() * weight).sum((2, 3)) / count
            parts.append((variance + 1e-4).sqrt())
        return self.out(torch.cat(parts, 1))


class Residual(nn.Module):
    """x + norm(conv(gelu(norm(conv x)))), then GELU. One norm serves twice, as in the published model."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv2(F.gelu(self.norm(self.conv1(x))))) + x)


class PatchDecoder(nn.Module):
    """One vector a patch back to pixels: max-unpooling and transposed convolutions.

    With ``bypass`` the maxima go back to where the encoder found them (``indices`` of :class:`PatchCnn`): detail that the
    vector need not carry, and that leaks from masked patches. Without, cells are repeated.
    """

    def __init__(self, bands: int, dim: int, patch: int, *, bypass: bool = True) -> None:
        super().__init__()
        self.patch, self.sizes, self.bypass = patch, pooled_sizes(patch), bypass
        levels = len(self.sizes) - 2
        self.refine = nn.ModuleList(nn.ConvTranspose2d(dim, dim, 3, padding=1, bias=False) for _ in range(levels))
        self.last = nn.ConvTranspose2d(dim, bands, 3, stride=2, padding=1)

    def forward(self, x: Tensor, indices: list[Tensor]) -> Tensor:
        """Patches [n, band, y, x] from vectors [n, dim]."""
        x = x[:, :, None, None]
        for level, size in enumerate(reversed(self.sizes[:-1])):
            if self.bypass:
                x = F.max_unpool2d(x, indices[-1 - level], [2, 2], output_size=(size, size))
            else:
                x = F.interpolate(x, size=(size, size), mode="nearest")
            if level < len(self.refine):
                x = self.refine[level](x)
        return self.last(x, output_size=(self.patch, self.patch))


def pooled_sizes(patch: int) -> list[int]:
    """Side after the strided convolution and after each pooling, down to 1: 50 gives 25, 12, 6, 3, 1."""
    sizes = [math.ceil(patch / 2)]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes
