"""A U-Net whose encoder is a residual network (ResNet-34 and the like), without attention, as in segmentation-models-pytorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 32
"""Pixels of the image along a cell of the lowest level."""


class Residual(nn.Module):
    """Two convolutions around a residual, which is projected where sizes differ (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.stride, alike = stride, stride == 1 and before == after
        project = [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.downsample = None if alike else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        # One pixel of each step is taken first: oneDNN's gradient of a strided 1 x 1 convolution of few channels writes beyond its memory.
        kept = x if self.downsample is None else self.downsample(x[..., :: self.stride, :: self.stride])
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + kept)


class ImageUnet(nn.Module):
    """U-Net of an image with a residual encoder: :meth:`encoded` gives maps of five levels, :meth:`decoded` the features.

    ``widths`` are the channels of the first convolution and of the four stages, ``blocks`` the residual blocks of these, ``out_widths``
    the channels of the decoder, from the lowest to the highest resolution.
    """

    def __init__(self, bands: int, widths: Sequence[int], blocks: Sequence[int], out_widths: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(bands, widths[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(widths[0]),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                Residual(widths[i], widths[i + 1], 1 if i == 0 else 2),
                *(Residual(widths[i + 1], widths[i + 1], 1) for _ in range(count - 1)),
            )
            for i, count in enumerate(blocks)
        )
        below, skipped = (widths[-1], *out_widths[:-1]), (*reversed(widths[:-1]), 0)
        self.up = nn.ModuleList(
            nn.Sequential(_double(before + skip, after), _double(after, after))
            for before, skip, after in zip(below, skipped, out_widths, strict=True)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def encoded(self, x: Tensor) -> list[Tensor]:
        """Maps of half the resolution of ``x`` [row, band, y, x], of a quarter, and so on to a 32nd."""
        maps = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(maps[0], 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def decoded(self, deep: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Features [row, channel, y, x] at the image's pixels, of the lowest map and those above it, the highest resolution first."""
        x = deep
        for number, up in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = up(torch.cat([x, skips[-1 - number]], 1) if number < len(skips) else x)
        return x


def _double(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
