"""A U-Net over the images of a series, with attention over its dates (U-TAE, Sainte Fare Garnot & Landrieu, ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from everysat.nn.temporal import Ltae


class Sizes(BaseModel):
    """Channels from the highest to the lowest resolution, of encoder (``widths``) and decoder (``out_widths``), and of L-TAE."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    widths: tuple[int, ...] = (64, 64, 64, 128)
    out_widths: tuple[int, ...] = (32, 32, 64, 128)
    heads: int = 16
    time_dim: int = 256
    key_dim: int = 4
    dropout: float = 0.2

    @model_validator(mode="after")
    def _widths_agree(self) -> Sizes:
        if len(self.widths) < 2 or len(self.widths) != len(self.out_widths) or self.widths[-1] != self.out_widths[-1]:
            raise ValueError(
                f"widths={self.widths} and out_widths={self.out_widths} must have one length, two or more, and end alike"
            )
        for name, numbers in {"widths": self.widths, "time_dim": (self.time_dim,)}.items():
            if any(n % self.heads or n % 4 for n in numbers):
                raise ValueError(f"{name}={numbers} must be divisible by heads={self.heads} and by 4")
        return self

    @property
    def stride(self) -> int:
        """Pixels along a cell of the lowest level."""
        return 2 ** (len(self.widths) - 1)


def convolution(before: int, after: int, norm: str, *, side: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution with reflected edges, norm (``group``: 4 groups; ``batch``), ReLU."""
    normed = nn.GroupNorm(4, after) if norm == "group" else nn.BatchNorm2d(after)
    conv = nn.Conv2d(before, after, side, stride=stride, padding=1, padding_mode="reflect")
    return nn.Sequential(conv, normed, nn.ReLU())


class Down(nn.Module):
    """Half the resolution, then a convolution and one with a residual."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.down = convolution(before, before, "group", side=4, stride=2)
        self.conv1, self.conv2 = convolution(before, after, "group"), convolution(after, after, "group")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.down(x))
        return x + self.conv2(x)


class Up(nn.Module):
    """Twice the resolution; the map of the encoder behind it; then a convolution and one with a residual."""

    def __init__(self, before: int, after: int, skipped: int) -> None:
        super().__init__()
        self.skip = nn.Sequential(nn.Conv2d(skipped, skipped, 1), nn.BatchNorm2d(skipped), nn.ReLU())
        raised = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        self.up = nn.Sequential(raised, nn.BatchNorm2d(after), nn.ReLU())
        self.conv1, self.conv2 = convolution(after + skipped, after, "batch"), convolution(after, after, "batch")

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.conv1(torch.cat([self.up(x), self.skip(skip)], 1))
        return x + self.conv2(x)


class SeriesUnet(nn.Module):
    """The network of one layer: :meth:`encoded`, then :meth:`decoded`."""

    def __init__(self, bands: int, sizes: Sizes, period_days: float) -> None:
        super().__init__()
        widths, out = sizes.widths, sizes.out_widths
        self.in_conv = nn.Sequential(
            *convolution(bands, widths[0], "group"), *convolution(widths[0], widths[0], "group")
        )
        levels = range(len(widths) - 1)
        self.down = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in levels)
        self.up = nn.ModuleList(Up(out[i + 1], out[i], widths[i]) for i in reversed(levels))
        self.temporal = Ltae(
            widths[-1],
            (sizes.time_dim,),
            (widths[-1],),
            heads=sizes.heads,
            key_dim=sizes.key_dim,
            period=period_days,
            dropout=sizes.dropout,
            linear=True,
        )

    def encoded(
        self, x: Tensor, valid: Tensor, row: Tensor, day: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images ``x`` [obs, band, y, x] of ``rows`` series, ``valid`` [obs, y, x], to one map each.

        Returns:
            vectors [row, y, x, channel] of the cells of the lowest level, which of them any date observed, bool [row, y, x], and the
            maps [row, channel, y, x] of the levels above, from the lowest of these to the highest resolution.
        """
        maps = [self.in_conv(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        deep = maps.pop().permute(0, 2, 3, 1)
        height, width = deep.shape[1:3]
        side = x.shape[2] // height
        seen = F.max_pool2d(valid[:, None].to(x.dtype), side)[:, 0] > 0
        obs, y, x_ = torch.nonzero(seen, as_tuple=True)
        present, series = torch.unique((row[obs] * height + y) * width + x_, return_inverse=True)
        vectors, attention = self.temporal.by_head(deep[seen], series, day[obs], len(present))
        deep = vectors.new_zeros(rows * height * width, vectors.shape[1]).index_copy(0, present, vectors)
        known = torch.zeros(len(deep), dtype=torch.bool, device=x.device).index_fill_(0, present, True)
        mask = attention.new_zeros(*seen.shape, attention.shape[1]).index_put((obs, y, x_), attention)
        skips = [_weighted(m, mask.permute(0, 3, 1, 2), row, rows) for m in reversed(maps)]
        return deep.view(rows, height, width, -1), known.view(rows, height, width), skips

    def decoded(self, deep: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """The map [row, channel, y, x] of the highest resolution, from vectors [row, y, x, channel] of the lowest."""
        x = deep.permute(0, 3, 1, 2)
        for up, skip in zip(self.up, skips, strict=True):
            x = up(x, skip)
        return x


def _weighted(maps: Tensor, mask: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums over dates of ``maps`` [obs, channel, y, x] by ``mask`` [obs, head, y, x], of which each head weights its channels."""
    mask = F.interpolate(mask, size=maps.shape[-2:], mode="bilinear", align_corners=False)
    shares = rearrange(maps, "o (h c) y x -> o h c y x", h=mask.shape[1]) * mask[:, :, None]
    return maps.new_zeros(rows, *maps.shape[1:]).index_add(0, row, shares.flatten(1, 2).to(maps.dtype))
