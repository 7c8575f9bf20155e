"""Features and labels of the places of a dataset, computed once and kept by a hash of weights, data and settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from everysat.data.batches import Dataset, prefetch
from everysat.manifest import fingerprint
from everysat.nn.draws import generator
from everysat.polygons import dense
from everysat.sensors import Sensor
from everysat.types import Batch, ContractError, Encoder, Features, Raster

LEVELS = ("place", "pixel")
BATCH, FEW = 32, 2**19
"""Places of a batch at most, and of small ones as many as have so few values together: series of single pixels go by hundreds."""
VALUES, PIXELS = 2**26, 2**18
"""What is read of the places of a batch, and pixels whose features are held at once, at most."""
KEPT = 2**27
"""Values of places that a part holds in memory, at most: models are compared on the same places."""


@dataclass(frozen=True)
class Labelled:
    """What is asked for at the places of one part of a dataset.

    ``label``: int64 [n] (index into ``classes``), bool [n, class] or float [n]; ``place`` int64 [n], which place each sample is of; ``at`` int64
    [n, 2], row and column of its pixel in the label layer.
    """

    label: Tensor
    place: Tensor
    at: Tensor
    classes: tuple[str, ...]
    gsd_m: float
    sensor: Sensor

    def __len__(self) -> int:
        return len(self.label)


class Shelf(dict[int, Batch]):
    """Places that were read, as long as there is room for them."""

    room = KEPT

    def offer(self, index: int, place: Batch) -> None:
        size = sum(layer.values.numel() for layer in place.layers.values() if isinstance(layer, Raster))
        if size <= self.room and all(isinstance(layer, Raster) for layer in place.layers.values()):
            self[index] = place
            self.room -= size


@dataclass
class Part:
    """Places of a dataset of which some layers are shown, ``layers`` (all but the target if empty). ``pairs``: layers of two times by the name
    under which a model is shown either, see :func:`at_time`."""

    dataset: Dataset
    target: str = "label"
    layers: tuple[str, ...] = ()
    per_place: int = 100
    seed: int = 0
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    _hash: str = field(default="", repr=False)
    _kept: Shelf = field(default_factory=Shelf, repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def place(self, index: int) -> Batch:
        """A place with all its layers, read once if there is room for it."""
        if index in self._kept:
            return self._kept[index]
        place = self.dataset[index]
        self._kept.offer(index, place)
        return place

    def showing(self, layers: tuple[str, ...]) -> Part:
        """The same places with other layers shown; what was read is shared."""
        return replace(self, layers=layers)

    def shown(self, place: Batch) -> Batch:
        """What a model may see of a place."""
        return place.only(*self.layers) if self.layers else place.without(self.target)

    def fingerprint(self) -> str:
        if not self._hash:
            self._hash = fingerprint(self.dataset)
        return self._hash

    def batches(self, size: int = BATCH) -> Iterable[list[Batch]]:
        work = [range(at, min(at + size, len(self))) for at in range(0, len(self), size)]
        return prefetch(lambda some: [self.place(i) for i in some], work, workers=1)

    def labelled(self) -> Labelled:
        """The labels of all places; of labels of pixels at most ``per_place`` random ones a place.

        Raises:
            ValueError: no place is labelled.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        layer: Raster | None = None
        index = 0
        for places in self.batches():
            for place in places:
                if self.target in place.layers:
                    layer = place.raster(self.target)
                    found.append(self._of_place(layer, index))
                index += 1
        if layer is None or not sum(len(one[0]) for one in found):
            raise ValueError(f"no place has a label in layer {self.target!r}")
        values, place_of, at = (torch.cat(part) for part in zip(*found, strict=True))
        label, classes = _coded(layer, values)
        return Labelled(label, place_of, at, classes, layer.gsd_m, layer.sensor)

    def _of_place(self, layer: Raster, index: int) -> tuple[Tensor, Tensor, Tensor]:
        seen = layer.valid[0].all(0).nonzero()
        if len(seen) > self.per_place:
            draw = torch.randperm(len(seen), generator=generator(self.seed, "pixels", index))[: self.per_place]
            seen = seen[draw.sort().values]
        return layer.values[0][:, seen[:, 0], seen[:, 1]].T, torch.full((len(seen),), index), seen


def _coded(layer: Raster, values: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Values [n, band] of a label layer as labels, and the names of classes (or of the value)."""
    bands = layer.sensor.bands
    if layer.sensor.kind != "classes":
        if len(bands) > 1:
            raise ValueError(f"the label layer has {len(bands)} values; one can be evaluated at a time")
        return values[:, 0].double(), (bands[0].name,)
    if len(bands) > 1:
        return values > 0.5, tuple(band.name for band in bands)
    names = bands[0].classes or {}
    codes = torch.tensor(sorted(names))
    return torch.searchsorted(codes, values[:, 0].long()), tuple(names[int(code)] for code in codes)


@dataclass(frozen=True)
class Extracted:
    """Features of the labelled samples of a part, float [n, dim], and what computing them took."""

    x: Tensor
    seconds: float


def extract(
    model: Encoder | Callable[[Batch], Tensor], part: Part, labelled: Labelled, level: str, pool: str = "summary"
) -> Extracted:
    """Features of labelled places (``level="place"``: an encoder's summary) or pixels (``pixel``: its dense features at the pixel of the label).

    ``model``: an encoder, or a callable that gives [row, dim] of places or [row, dim, y, x] of pixels, see :mod:`everysat.baselines`. Of a part with
    ``pairs``, features are those of after less those of before, and the size of that. ``pool="moments"``: of places mean and standard
    deviation of an encoder's tokens in place of its summary.

    Raises:
        ContractError: the model takes none of the layers that are shown, or not as they are.
    """
    if level not in LEVELS:
        raise LookupError(f"level={level!r} is none of {', '.join(LEVELS)}")
    start, found = time.perf_counter(), []
    always = [] if isinstance(model, Encoder) else _covering(part)
    order = torch.argsort(labelled.place, stable=True)
    ends = torch.searchsorted(labelled.place[order], torch.arange(len(part) + 1))
    index = 0
    for places in part.batches(at_once(part, labelled)):
        batch = Batch.cat([*always, *(part.shown(place) for place in places)])
        times = [at_time(batch, part.pairs, time) for time in (0, 1)] if part.pairs else [batch]
        x, *after = (_rows(model, one, level, labelled.gsd_m, pool) for one in times)
        rows = (torch.cat([after[0] - x, (after[0] - x).abs()], 1) if after else x)[len(always) :]
        for row in rows:
            mine = order[ends[index] : ends[index + 1]]
            if len(mine):
                at = labelled.at[mine]
                found.append((mine, row[None].expand(len(mine), -1) if row.ndim == 1 else row[:, at[:, 0], at[:, 1]].T))
            index += 1
    x = torch.empty(len(labelled), found[0][1].shape[1])
    for mine, features in found:
        x[mine] = features.float()
    return Extracted(x, time.perf_counter() - start)


def at_once(part: Part, labelled: Labelled) -> int:
    """How many places are computed together: places of 0.2 m or of many dates are large, and more so their features."""
    layers = part.shown(part.place(0)).layers.values()
    values = sum(layer.values.numel() for layer in layers if isinstance(layer, Raster))
    pixels = (int(labelled.at.max()) + 1) ** 2
    most = max(BATCH, FEW // max(values, 1))
    return max(1, min(most, VALUES // max(values, 1), PIXELS // pixels))


def at_time(batch: Batch, pairs: Mapping[str, tuple[str, str]], time: int) -> Batch:
    """The batch as a model is shown it at one of two times, 0 (before) or 1 (after); layers that are in no pair stay."""
    paired = {name for both in pairs.values() for name in both}
    return batch.without(*paired).adding(**{name: batch.raster(both[time]) for name, both in pairs.items()})


def _rows(model: Any, batch: Batch, level: str, gsd_m: float, pool: str) -> Tensor:
    if not isinstance(model, Encoder):
        return model(batch)
    if model.inputs and not model.known(batch).layers:
        raise ContractError(
            f"the model takes {', '.join(model.inputs)}; what is shown has {', '.join(batch.layers) or 'no layer'}"
        )
    if level == "place":
        features = model.embed(batch)
        return features.summary if pool == "summary" else _moments(features)
    return dense(model, gsd_m)(batch)


def _moments(features: Features) -> Tensor:
    """Mean and standard deviation over each place of what its tokens say, [row, 2 dim]; 0 where there is none."""
    row, x = features.coords.row, features.mean
    rows = len(features.places)
    count = torch.bincount(row, minlength=rows).clamp(min=1)[:, None]
    mean = x.new_zeros(rows, x.shape[1]).index_add(0, row, x) / count
    variance = x.new_zeros(mean.shape).index_add(0, row, (x - mean[row]).square()) / count
    return torch.cat([mean, variance.sqrt()], 1)


def _covering(part: Part) -> list[Batch]:
    """A few places that have every layer between them: beside them, a batch whose places all lack a layer has it too."""
    found, seen = [], set[str]()
    for index in range(len(part)):
        place = part.shown(part.place(index))
        if not set(place.layers) <= seen:
            found.append(place)
            seen |= set(place.layers)
        elif index > 200:
            break
    return found


def state_hash(encoder: Encoder) -> str:
    """A hash of what an encoder computes: its config and weights."""
    digest = hashlib.blake2b(json.dumps([encoder.family, encoder.config], sort_keys=True, default=str).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if value.ndim
            else repr(value.item()).encode()
        )
    return digest.hexdigest()[:32]


class Cache:
    """Features on disk, under a hash of everything that they depend on."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, facts: Sequence[Any], compute: Callable[[], Extracted]) -> Extracted:
        """What ``compute`` gives, or gave before for the same ``facts``."""
        key = hashlib.blake2b(json.dumps(list(facts), sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{key}.safetensors"
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                return Extracted(file.get_tensor("x"), float(file.metadata()["seconds"]))
        found = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{key}.{id(found)}.part")
        save_file({"x": found.x.contiguous()}, beside, {"seconds": repr(found.seconds)})
        beside.replace(path)
        return found
