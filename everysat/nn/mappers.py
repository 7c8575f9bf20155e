"""From a batch to an image of class probabilities or features, [row, channel, y, x] at one ``gsd_m``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from everysat.nn.dense import cut, dense_at, dense_features, shifted
from everysat.nn.grid import grid_shape
from everysat.nn.probe import Linear
from everysat.types import Batch, Encoder, Features, Task


class Mapper(Protocol):
    """What maps windows of a large place.

    ``align_m``: windows begin on multiples of it (the north-west corner is 0), so that every window cuts tokens and chips where
    the whole place would. ``halo_m``: how far beyond a pixel the image depends on the input.
    """

    @property
    def gsd_m(self) -> float: ...

    @property
    def align_m(self) -> float: ...

    @property
    def halo_m(self) -> float: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the channels."""

    @property
    def probabilistic(self) -> bool:
        """Whether the channels are class probabilities."""

    def __call__(self, batch: Batch) -> Tensor:
        """[row, channel, y, x] at ``gsd_m``; NaN where nothing can be said."""


@dataclass(frozen=True)
class Dense:
    """Features of an encoder at ``gsd_m``; options as for :func:`dense_features`. ``embed`` takes the place of
    ``encoder.embed``, for other features than the encoder's last ones; ``dim`` is then their number."""

    encoder: Encoder
    gsd_m: float
    token_m: float
    shifts: int = 1
    how: str = "bilinear"
    chip_m: float | None = None
    stride_m: float | None = None
    batch_size: int = 64
    embed: Callable[[Batch], Features] | None = None
    dim: int | None = None

    @property
    def align_m(self) -> float:
        stride_m = self.stride_m or (self.chip_m and max(1, round(self.chip_m / self.token_m) // 2) * self.token_m)
        return common_multiple(
            [self.token_m, self.gsd_m, stride_m or 0, *(i.gsd_m for i in self.encoder.inputs.values())]
        )

    @property
    def halo_m(self) -> float:
        """Chips side by side see nothing of each other: the features of tokens need no more ground than their own chip, and those
        between the centres of two tokens the chip of either."""
        if self.chip_m and self.shifts == 1 and self.stride_m == self.chip_m:
            return (
                0.0 if math.isclose(self.gsd_m, self.token_m) else math.ceil(self.chip_m / self.align_m) * self.align_m
            )
        return math.ceil(((self.chip_m or 0) + self.token_m) / self.align_m) * self.align_m

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"feature {i}" for i in range(self.dim or self.encoder.dim))

    @property
    def probabilistic(self) -> bool:
        return False

    def __call__(self, batch: Batch) -> Tensor:
        options = {
            name: getattr(self, name) for name in ("token_m", "shifts", "how", "chip_m", "stride_m", "batch_size")
        }
        return dense_features(self.embed or self.encoder, self.encoder.known(batch), self.gsd_m, **options)

    def at(self, batch: Batch, y: Tensor, x: Tensor) -> Tensor:
        """Features of single pixels [n, dim], without holding the image; ``how`` must be bilinear."""
        options = {name: getattr(self, name) for name in ("token_m", "shifts", "chip_m", "stride_m", "batch_size")}
        known = self.encoder.known(batch)
        return dense_at(self.embed or self.encoder, known, self.gsd_m, y, x, **options)


@dataclass(frozen=True)
class Summaries:
    """One vector a square of ``chip_m`` metres: the encoder's summary of it, as a pixel of that size; NaN where it has no token."""

    encoder: Encoder
    chip_m: float
    batch_size: int = 64

    @property
    def gsd_m(self) -> float:
        return self.chip_m

    @property
    def align_m(self) -> float:
        return common_multiple([self.chip_m, *(i.gsd_m for i in self.encoder.inputs.values())])

    @property
    def halo_m(self) -> float:
        return 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"feature {i}" for i in range(self.encoder.dim))

    @property
    def probabilistic(self) -> bool:
        return False

    def __call__(self, batch: Batch) -> Tensor:
        shape = grid_shape(batch.places, self.chip_m)
        known = self.encoder.known(batch)
        return torch.stack([self._place(known[index], shape) for index in range(len(batch))])

    def _place(self, place: Batch, shape: tuple[int, int]) -> Tensor:
        view = shifted(place, 0.0, 0.0, shape, self.chip_m)
        corners = [(y, x) for y in range(shape[0]) for x in range(shape[1])]
        found = []
        for start in range(0, len(corners), self.batch_size):
            chips = cut(view, corners[start : start + self.batch_size], 1, 1, self.chip_m)
            features = self.encoder.embed(chips)
            seen = torch.zeros(len(chips), 1, dtype=torch.bool)
            seen[features.coords.row.cpu()] = True
            found.append(torch.where(seen, features.summary.float().cpu(), torch.nan))
        return torch.cat(found).T.reshape(-1, *shape)


@dataclass(frozen=True)
class Stacked:
    """Several sets of features of the same ``gsd_m``, one after another; a pixel that one of them lacks has none."""

    parts: tuple[Callable[[Batch], Tensor], ...]
    gsd_m: float
    align_m: float = 0.0
    halo_m: float = 0.0

    def __call__(self, batch: Batch) -> Tensor:
        x = torch.cat([part(batch) for part in self.parts], 1)
        return torch.where(torch.isfinite(x).all(1, keepdim=True), x, torch.nan)


@dataclass(frozen=True)
class Classified:
    """Class probabilities of a probe on the features that ``features`` (a callable from batch to image) computes."""

    features: Callable[[Batch], Tensor]
    probe: Linear
    gsd_m: float
    align_m: float = 0.0
    halo_m: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return self.probe.classes

    @property
    def probabilistic(self) -> bool:
        return True

    def __call__(self, batch: Batch) -> Tensor:
        return self.probe.probabilities(self.features(batch).movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Tasked:
    """What a trained task predicts from an encoder's features, pixel by pixel. With ``chip_m``, of squares of that side, as it was
    trained on, side by side; else the encoder sees the whole place at once."""

    encoder: Encoder
    task: Task
    gsd_m: float
    align_m: float
    halo_m: float
    chip_m: float | None = None
    batch_size: int = 16

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.task.sensor.names)

    @property
    def probabilistic(self) -> bool:
        bands = self.task.sensor.bands
        return self.task.sensor.kind == "classes" and all(band.unit == "probability" for band in bands)

    def __call__(self, batch: Batch) -> Tensor:
        if self.chip_m is None:
            return self._predicted(batch)
        height, width = grid_shape(batch.places, self.gsd_m)
        chips = grid_shape(batch.places, self.chip_m)
        images = [self._chipped(batch[index], chips, self.chip_m) for index in range(len(batch))]
        return torch.stack(images)[:, :, :height, :width]

    def _chipped(self, place: Batch, shape: tuple[int, int], chip_m: float) -> Tensor:
        """The image [channel, y, x] of one place, chip by chip."""
        view = shifted(place, 0.0, 0.0, shape, chip_m)
        corners = [(y, x) for y in range(shape[0]) for x in range(shape[1])]
        parts = [corners[i : i + self.batch_size] for i in range(0, len(corners), self.batch_size)]
        found = torch.cat([self._predicted(cut(view, some, 1, 1, chip_m)).cpu() for some in parts])
        rows = found.unflatten(0, shape).permute(2, 0, 3, 1, 4)
        return rows.flatten(3).flatten(1, 2)

    @torch.no_grad()
    def _predicted(self, batch: Batch) -> Tensor:
        was_training, device = self.encoder.training, next(self.encoder.parameters()).device
        features = self.task.features(self.encoder.eval(), batch.to(device))
        self.encoder.train(was_training)
        if len(features.coords) == 0:
            return torch.full((len(batch), len(self.names), *grid_shape(batch.places, self.gsd_m)), math.nan)
        predicted = self.task.predict(features, batch)
        return torch.where(predicted.valid, predicted.values, torch.nan)


def common_multiple(sizes_m: Sequence[float]) -> float:
    """The smallest length of which all positive ``sizes_m`` are parts, to a centimetre."""
    whole = [round(size * 100) for size in sizes_m if size]
    return math.lcm(*whole) / 100 if whole else 0.0
