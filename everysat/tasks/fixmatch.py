"""Classification that also learns from what nobody labelled: pseudo-labels in the manner of FixMatch (Sohn et al. 2020, eq. 3 and 4).

Each batch is seen twice: as it came, and in a strong view from which layers, dates, bands and a square of ground are left out and whose
values are disturbed. Where there is no label and the class of the first is sure enough, the second has to give that class too. Both views
lie on the same grid (flips, turns and crops are the recipe's ``augment``, which the first had already), so that this holds pixel by pixel.

Unlabelled is what has no valid, listed label: places without the target layer, such as those of a source that has none, and the pixels
between sparse labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everysat.find import suggest
from everysat.nn.draws import generator as own_generator
from everysat.nn.draws import uniform
from everysat.nn.gather import global_mean, row_offset
from everysat.tasks import classify
from everysat.tasks.classify import DEFINITIONS as DEFINITIONS
from everysat.tasks.classify import Classify
from everysat.types import Batch, Encoder, Features, Layer, Raster, Task


@dataclass(frozen=True)
class Strong:
    """What the strong view of a place lacks, and how its values are disturbed. Draws are the place's own, whichever process holds it.

    drop_layers, drop_dates, drop_bands: chance of each to be left out; at least one of each stays.
    cut: side of a square that is not seen in any layer, as a share of the place's shorter side (Cutout, DeVries and Taylor 2017).
    shift, noise: standard deviations of a constant added to each band of each date, and of noise added to each pixel, in standard
    deviations of the band among the places of the batch.
    """

    drop_layers: float = 0.3
    drop_dates: float = 0.3
    drop_bands: float = 0.1
    cut: float = 0.3
    shift: float = 0.2
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < 1:
                raise ValueError(f"strong: {name}={value} must be at least 0 and below 1")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        rasters = {name: layer for name, layer in batch.layers.items() if isinstance(layer, Raster)}
        first = row_offset(len(batch), next((r.row.device for r in rasters.values()), "cpu"))
        rows = torch.arange(len(batch)) + first
        there = (
            torch.stack([torch.bincount(r.row.cpu(), minlength=len(batch)) > 0 for r in rasters.values()], 1)
            if rasters
            else None
        )
        layers: dict[str, Layer] = {}
        seed = int(torch.randint(2**62, (), generator=generator))
        if there is not None:
            stays = _stay(uniform(generator, rows[:, None], torch.arange(len(rasters))[None]), self.drop_layers, there)
        corner = uniform(generator, rows[:, None], torch.arange(2)[None])
        for index, (name, raster) in enumerate(rasters.items()):
            drawn = own_generator(seed, name)
            kept = raster.obs(stays[:, index].to(raster.row.device)[raster.row])
            layers[name] = self._disturbed(self._cut(self._thinned(kept, first, drawn), batch, corner), first, drawn)
        return replace(batch, layers={**batch.layers, **layers})

    def _thinned(self, raster: Raster, first: int, generator: torch.Generator) -> Raster:
        """Without some of the dates and bands."""
        if len(raster.row) == 0:
            return raster
        row, number = raster.row, _number_in_row(raster.row)
        rows = torch.arange(int(row.max()) + 1, device=row.device)
        draw = torch.full((len(rows), int(number.max()) + 1), -1.0, device=row.device)
        draw[row, number] = uniform(generator, row + first, number)
        raster = raster.obs(_stay(draw, self.drop_dates, draw >= 0)[row, number])
        bands = torch.arange(raster.values.shape[1], device=row.device)
        draw = uniform(generator, rows[:, None] + first, bands[None])
        stays = _stay(draw, self.drop_bands, torch.ones_like(draw, dtype=torch.bool))
        return replace(raster, valid=raster.valid & stays[raster.row][:, :, None, None])

    def _cut(self, raster: Raster, batch: Batch, corner: Tensor) -> Raster:
        """Without the pixels whose centres lie in the place's square."""
        size_m = torch.tensor([(place.height_m, place.width_m) for place in batch.places])
        side_m = self.cut * size_m.min(1, keepdim=True).values
        start_m = (corner * (size_m - side_m)).to(raster.row.device)[raster.row]
        end_m = start_m + side_m.to(raster.row.device)[raster.row]
        hidden = [
            (at >= start_m[:, axis, None]) & (at < end_m[:, axis, None])
            for axis, at in enumerate(
                (torch.arange(n, device=raster.row.device) + 0.5) * raster.gsd_m for n in raster.values.shape[2:]
            )
        ]
        return replace(raster, valid=raster.valid & ~(hidden[0][:, None, :, None] & hidden[1][:, None, None, :]))

    def _disturbed(self, raster: Raster, first: int, generator: torch.Generator) -> Raster:
        seen, values = raster.valid, torch.where(raster.valid, raster.values, 0.0)
        count = seen.sum((0, 2, 3)).clamp(min=1)
        mean = values.sum((0, 2, 3)) / count
        spread = torch.where(seen, values - mean[:, None, None], 0.0).square().sum((0, 2, 3)).div(count).sqrt()
        row, number = raster.row + first, _number_in_row(raster.row)
        draws = []
        for shape in ((values.shape[1], 1, 1), values.shape[1:]):
            cells = shape[0] * shape[1] * shape[2]
            index = number[:, None] * cells + torch.arange(cells, device=row.device)
            draws.append(((2 * uniform(generator, row[:, None], index) - 1) * 3**0.5).view(len(row), *shape).to(values))
        change = spread[:, None, None] * (self.shift * draws[0] + self.noise * draws[1])
        return replace(raster, values=raster.values + change)


class FixMatch(Task):
    """See :func:`build`."""

    def __init__(self, task: Classify, threshold: float, unlabelled_weight: float, strong: Strong) -> None:
        super().__init__()
        self.task, self.strong, self.threshold, self.unlabelled_weight = task, strong, threshold, unlabelled_weight
        self.target, self.sensor = task.target, task.sensor
        own = {"threshold": threshold, "unlabelled_weight": unlabelled_weight, "strong": asdict(strong)}
        self.config = {**task.config, **own}

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        n, weak = len(batch), encoder.known(batch.without(self.target))
        both = Batch.cat([weak, self.strong(weak, generator)])
        logits, seen = self.task.head(encoder(encoder.tokenize(both)), both)
        terms = {"supervised": logits.sum() * 0, "labelled": logits.new_zeros(())}
        if self.target in batch.layers:
            found = self.task.supervised(logits[:n], seen[:n], batch)
            terms = {"supervised": found["loss"], "labelled": found["labelled"]}
        free = seen[:n] & seen[n:] & ~self._labelled(batch, *logits.shape[2:])
        confidence, pseudo = logits[:n].detach().float().softmax(1).max(1)
        sure = (confidence >= self.threshold).float()[free]
        each = F.cross_entropy(logits[n:].float(), pseudo, reduction="none")[free]
        terms["unlabelled"], terms["confident"] = global_mean(sure * each), global_mean(sure)
        return {"loss": terms["supervised"] + self.unlabelled_weight * terms["unlabelled"], **terms}

    def features(self, encoder: Encoder, batch: Batch) -> Features:
        return self.task.features(encoder, batch)

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Probabilities, one band per class, as the classification gives them."""
        return self.task.predict(features, batch)

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """As the classification's; nothing of a batch without the target layer."""
        if self.target not in batch.layers:
            return prediction.values.new_zeros(0, prediction.values.shape[1]), self.task.codes[:0]
        return self.task.pairs(prediction, batch)

    def metrics(self) -> Mapping[str, Any]:
        return self.task.metrics()

    def _labelled(self, batch: Batch, height: int, width: int) -> Tensor:
        """Which pixels [row, y, x] have a valid, listed label."""
        count = torch.zeros(len(batch), height, width, device=self.task.codes.device)
        if self.target in batch.layers:
            label = batch.raster(self.target)
            known = label.valid[:, 0] & torch.isin(label.values[:, 0].round().long(), self.task.codes)
            known = known[:, :height, :width]
            known = F.pad(known.float(), (0, width - known.shape[2], 0, height - known.shape[1]))
            count = count.index_add(0, label.row, known)
        return count > 0


def build(
    variant: str = "pixel",
    *,
    encoder: Encoder,
    threshold: float = 0.95,
    unlabelled_weight: float = 1.0,
    strong: Mapping[str, float] | None = None,
    **options: Any,
) -> FixMatch:
    """A classifier on ``encoder`` with pseudo-labels.

    Args:
        threshold: least probability of a class that makes it a pseudo-label.
        unlabelled_weight: of the mean cross-entropy to pseudo-labels over all that is unlabelled and seen in both views (what is not sure
            counts as 0), beside the loss of the labels.
        strong: changes of :class:`Strong`.
        variant, options: those of classification, for one class each.

    Raises:
        ValueError, LookupError, TypeError: the options do not fit together; the message says which.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
    if not unlabelled_weight >= 0:
        raise ValueError(f"unlabelled_weight={unlabelled_weight} must not be negative")
    if options.get("multilabel"):
        raise ValueError("multilabel: pseudo-labels are of one class each; there is none for several at once")
    for given, known in ((options, classify.build.__annotations__), (strong or {}, Strong.__dataclass_fields__)):
        for option in given:
            if option not in known:
                raise TypeError(f"fixmatch takes no option {option!r}. {suggest(option, known)}")
    task = classify.build(variant, encoder=encoder, **options)
    return FixMatch(task, threshold, unlabelled_weight, Strong(**(strong or {})))


def _stay(draw: Tensor, chance: float, there: Tensor) -> Tensor:
    """What stays of each row of ``draw`` [row, thing], uniform in [0, 1), when each goes with ``chance``; one of what is ``there`` does."""
    draw = torch.where(there, draw, -1.0)
    largest = draw == draw.max(1, keepdim=True).values if draw.shape[1] else draw >= 0
    return there & ((draw >= chance) | largest)


def _number_in_row(row: Tensor) -> Tensor:
    """The how manyth of its row each is, from 0."""
    order = row.argsort(stable=True)
    first = torch.searchsorted(row[order].contiguous(), row[order].contiguous())
    return torch.empty_like(row).index_copy(0, order, torch.arange(len(row), device=row.device) - first)
