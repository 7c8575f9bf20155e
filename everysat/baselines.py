"""Features without learned weights, to hold learned ones against: bands, image statistics, random convolutions, tables of series.

:class:`Bands`, :class:`Statistics` and :class:`RandomConvolutions` go from a batch to features of every pixel of ``gsd_m``, float
[row, dim, y, x]; NaN where nothing was observed in any of its layers. Where some bands are missing, they are filled with the mean of what was
observed of the band. :class:`PlaceStatistics`, :class:`Series` and :class:`Pooled` give one vector of each place, [row, dim], NaN for what was not
observed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from everysat.nn.grid import grid_shape, on_grid
from everysat.types import Batch, Encoder, Raster


@dataclass(frozen=True)
class Bands:
    """The bands of ``layers`` (all raster layers by default) on one grid, dates averaged."""

    gsd_m: float
    layers: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Tensor:
        values, valid = self.observed(batch)
        return torch.where(valid.any(1, keepdim=True), values, torch.nan)

    def observed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values without gaps and validity, [row, band, y, x]."""
        names = self.layers or tuple(n for n, layer in batch.layers.items() if isinstance(layer, Raster))
        if not names:
            raise ValueError("the batch has no raster layer to take bands from")
        shape = grid_shape(batch.places, self.gsd_m)
        parts = [on_grid(batch.raster(name), len(batch), self.gsd_m, *shape) for name in names]
        values, valid = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        count = valid.sum((0, 2, 3), keepdim=True).clamp(min=1)
        mean = (values * valid).sum((0, 2, 3), keepdim=True) / count
        return torch.where(valid, values, mean), valid


@dataclass(frozen=True)
class Statistics:
    """Bands with mean and standard deviation of what was observed in squares of ``window_m`` metres around the pixel; several
    sizes are allowed. Windows are cut off at the border."""

    gsd_m: float
    window_m: tuple[float, ...] = (90.0,)
    layers: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Tensor:
        values, valid = Bands(self.gsd_m, self.layers).observed(batch)
        # Centred per place and band, because squares of large numbers lose the digits that the deviation is made of.
        centre = values.mean((2, 3), keepdim=True)
        seen = valid.to(values.dtype)
        x = (values - centre) * seen
        parts = [values]
        for size in self.window_m:
            side = max(1, 2 * round((size / self.gsd_m - 1) / 2) + 1)
            share = _box(seen, side).clamp(min=0.5 / side**2)
            mean = _box(x, side) / share
            parts += [mean + centre, (_box(x * x, side) / share - mean**2).clamp(min=0).sqrt()]
        return torch.where(valid.any(1, keepdim=True), torch.cat(parts, 1), torch.nan)


class RandomConvolutions:
    """Patches of the data themselves as filters: whitened, correlated with the image, positive and negative parts pooled over
    ``pool_m`` metres (Coates & Ng 2012; Rolf et al. 2021). ``fit`` draws the patches; nothing is learned from labels.
    """

    def __init__(
        self,
        gsd_m: float,
        *,
        filters: int = 128,
        side: int = 5,
        pool_m: float = 90.0,
        threshold: float = 0.5,
        layers: Sequence[str] = (),
    ) -> None:
        if filters < 1 or side < 1 or side % 2 == 0:
            raise ValueError(f"filters={filters} must be positive and side={side} odd (pixels)")
        self.bands = Bands(gsd_m, tuple(layers))
        self.filters, self.side, self.threshold = filters, side, threshold
        self.pool = max(1, 2 * round((pool_m / gsd_m - 1) / 2) + 1)
        self.weight: Tensor | None = None

    def fit(self, batch: Batch, generator: torch.Generator, samples: int = 4000) -> RandomConvolutions:
        """Filters from random patches of ``batch`` whose middle was observed."""
        values, valid = self.bands.observed(batch)
        self.mean = (values * valid).sum((0, 2, 3)) / valid.sum((0, 2, 3)).clamp(min=1)
        spread = ((values - self.mean[:, None, None]) ** 2 * valid).sum((0, 2, 3)) / valid.sum((0, 2, 3)).clamp(min=1)
        self.std = spread.sqrt().clamp(min=1e-6)
        patches = self._patches(self._standard(values), valid, generator, max(samples, self.filters))
        centre = patches.mean(0)
        covariance = (patches - centre).T @ (patches - centre) / max(1, len(patches) - 1)
        length, axes = torch.linalg.eigh(covariance + 0.1 * torch.eye(len(covariance)))
        whiten = axes @ torch.diag(length**-0.5) @ axes.T
        chosen = F.normalize((patches[: self.filters] - centre) @ whiten, dim=1) @ whiten
        self.weight = chosen.view(len(chosen), -1, self.side, self.side)
        self.bias = -(chosen @ centre)
        return self

    def __call__(self, batch: Batch) -> Tensor:
        return torch.cat(list(self.responses(batch)), 1)

    def responses(self, batch: Batch) -> Iterator[Tensor]:
        """Features of a few filters at a time, because those of all pixels and filters of many places fill the memory."""
        if self.weight is None:
            raise ValueError("the filters are not drawn yet: call fit(batch, generator) first")
        values, valid = self.bands.observed(batch)
        x, seen = F.pad(self._standard(values), (self.side // 2,) * 4, mode="replicate"), valid.any(1, keepdim=True)
        for weight, bias in zip(self.weight.split(32), self.bias.split(32), strict=True):
            y = F.conv2d(x, weight, bias)
            for sign in (1, -1):
                yield torch.where(seen, _box(F.relu(sign * y - self.threshold), self.pool), torch.nan)

    def _standard(self, values: Tensor) -> Tensor:
        return (values - self.mean[:, None, None]) / self.std[:, None, None]

    def _patches(self, x: Tensor, valid: Tensor, generator: torch.Generator, count: int) -> Tensor:
        half = self.side // 2
        middle = valid.any(1)[:, half : valid.shape[2] - half, half : valid.shape[3] - half].nonzero()
        if len(middle) == 0:
            raise ValueError(f"no observed patch of {self.side} x {self.side} pixels fits into the batch")
        picked = middle[torch.randint(len(middle), (count,), generator=generator)]
        dy, dx = torch.arange(self.side)[:, None], torch.arange(self.side)[None]
        row, y, x0 = (picked[:, i, None, None] for i in range(3))
        return x.movedim(1, -1)[row, y + dy, x0 + dx].permute(0, 3, 1, 2).flatten(1)


QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class PlaceStatistics:
    """Mean, standard deviation and the quantiles 10, 50 and 90 % of each band over all valid pixels and dates of a place."""

    layers: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> Tensor:
        return torch.cat([_moments(one, len(batch)) for _, one in _layers(batch, self.layers)], 1)


@dataclass(frozen=True)
class Series:
    """The table that series are usually classified from: the mean over a place of each band in each of ``steps`` equal parts of
    the time that its layers span, and sine and cosine of the day of the year in the middle. Undated layers give a mean. With
    ``position``, also longitude and latitude: places near training places are then known again, which flatters."""

    steps: int = 12
    layers: tuple[str, ...] = ()
    position: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        layers, rows = _layers(batch, self.layers), len(batch)
        dated = {name for name, one in layers if torch.isfinite(one.time_s).all()}
        start, end = torch.full((2, rows), torch.nan, dtype=torch.float64)
        for name, one in layers:
            if name in dated:
                start = torch.fmin(
                    start, start.scatter_reduce(0, one.row, one.time_s[:, 0], "amin", include_self=False)
                )
                end = torch.fmax(end, end.scatter_reduce(0, one.row, one.time_s[:, 1], "amax", include_self=False))
        parts = [self._table(one, rows, self.steps if name in dated else 1, start, end) for name, one in layers]
        if dated:
            angle = (start + end) / 2 / 86400 / 365.25 * 2 * torch.pi
            parts.append(torch.stack([angle.sin(), angle.cos()], 1).float())
        if self.position:
            parts.append(torch.tensor([place.lonlat or (torch.nan, torch.nan) for place in batch.places]))
        return torch.cat(parts, 1)

    @staticmethod
    def _table(one: Raster, rows: int, steps: int, start: Tensor, end: Tensor) -> Tensor:
        cell = one.row * steps
        if steps > 1:
            share = (one.time_s.mean(1) - start[one.row]) / (end - start)[one.row]
            cell = cell + (share * steps).long().clamp(0, steps - 1)
        seen = one.valid.sum((2, 3)).float()
        total = torch.where(one.valid, one.values, 0.0).sum((2, 3))
        sums = [part.new_zeros(rows * steps, part.shape[1]).index_add(0, cell, part) for part in (total, seen)]
        return torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), torch.nan).view(rows, -1)


@dataclass(frozen=True)
class Pooled:
    """The mean over each place of features of pixels."""

    pixels: Callable[[Batch], Tensor]

    def __call__(self, batch: Batch) -> Tensor:
        some = self.pixels.responses(batch) if isinstance(self.pixels, RandomConvolutions) else [self.pixels(batch)]
        return torch.cat([part.flatten(2).nanmean(2) for part in some], 1)


def _layers(batch: Batch, wanted: tuple[str, ...]) -> list[tuple[str, Raster]]:
    """The raster layers of a batch, by name."""
    names = wanted or sorted(name for name, layer in batch.layers.items() if isinstance(layer, Raster))
    return [(name, batch.raster(name)) for name in names]


def _moments(one: Raster, rows: int) -> Tensor:
    """Of each band in turn the numbers of :class:`PlaceStatistics`, [row, band x number]."""
    row = one.row[:, None, None].expand_as(one.values[:, 0])
    bands = []
    for band in range(one.values.shape[1]):
        seen = one.valid[:, band]
        x, of = one.values[:, band][seen].double(), row[seen]
        x, order = x.sort()
        of, again = of[order].sort(stable=True)  # by place, and within a place by value
        x, count = x[again], torch.bincount(of, minlength=rows)
        mean = x.new_zeros(rows).index_add(0, of, x) / count
        variance = x.new_zeros(rows).index_add(0, of, (x - mean[of]).square()) / count
        first = (count.cumsum(0) - count)[:, None]
        at = torch.tensor(QUANTILES, dtype=torch.float64) * (count - 1).clamp(min=0)[:, None]
        x = torch.cat([x, x.new_zeros(1)])  # a place that saw nothing, last of all, looks there
        low, high = (x[(first + end(at).long()).clamp(max=len(x) - 1)] for end in (torch.floor, torch.ceil))
        quantiles = torch.lerp(low, high, at - at.floor())
        found = torch.cat([mean[:, None], variance.sqrt()[:, None], quantiles], 1)
        bands.append(torch.where(count[:, None] > 0, found, torch.nan))
    return torch.cat(bands, 1).float()


def reinitialised(encoder: Encoder, generator: torch.Generator) -> Encoder:
    """A copy of ``encoder`` as it was before training: each module's own initialisation, drawn anew from ``generator``.

    The same architecture without learning is the baseline that says what learning added. Parameters that no module
    initialises itself get the mean and standard deviation that they have in ``encoder``.
    """
    twin = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        done: set[int] = set()
        for module in twin.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                done |= {id(p) for p in module.parameters(recurse=False)}
        for parameter in twin.parameters():
            if id(parameter) not in done and parameter.numel() > 1:
                parameter.copy_(parameter.mean() + parameter.std() * torch.randn_like(parameter))
    return twin


def _box(image: Tensor, side: int) -> Tensor:
    """Mean over side x side pixels, cut off at the border; two passes of one axis each."""
    if side == 1:
        return image
    rows = F.avg_pool2d(image, (side, 1), 1, (side // 2, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, side), 1, (0, side // 2), count_include_pad=False)
