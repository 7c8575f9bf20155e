"""The values that flow through the toolkit, and the three classes that models and training are written against.

Everything is a layer over a place: an input, a label, a prediction and an embedding are the same few carriers. One place is
a batch of one. Observations of all places of a batch are stacked on one axis (``obs``) beside the index of their place
(``row``), so that places may have different numbers of dates. Axis order is ``obs band y x`` everywhere; y counts from the
north edge, x from the west edge.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everysat.sensors import Sensor

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

ALWAYS = (-math.inf, math.inf)
"""``time_s`` of what has no date, such as elevation."""


class ContractError(ValueError):
    """Data do not fit what a model was trained on. The message says what came, what was expected, and how to go on."""


@dataclass(frozen=True)
class Place:
    """A rectangle on the ground: a ``geobox`` (CRS and affine grid) or, without georeference, just its size in metres."""

    height_m: float
    width_m: float
    geobox: GeoBox | None = None
    lonlat: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not (self.height_m > 0 and self.width_m > 0):
            raise ValueError(f"height_m={self.height_m} and width_m={self.width_m} must be positive (metres)")


@dataclass(frozen=True, repr=False)
class Raster:
    """Observations of one sensor on one pixel grid, in physical units.

    Attributes:
        sensor: its bands, in the order of the band axis.
        values: float [obs, band, y, x]; what stands where ``valid`` is false has no meaning and must have no effect.
        valid: bool [obs, band, y, x].
        time_s: float64 [obs, 2], start and end in seconds since 1970-01-01 UTC, end excluded; :data:`ALWAYS` when undated.
        row: int64 [obs], index of the observed place in ``Batch.places``.
        gsd_m: side of a pixel, metres.
        var: variance of ``values``, same shape, when known.
    """

    sensor: Sensor
    values: Tensor
    valid: Tensor
    time_s: Tensor
    row: Tensor
    gsd_m: float
    var: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 4:
            raise ValueError(f"values has shape {tuple(self.values.shape)}, expected [obs, band, y, x]")
        obs, band = self.values.shape[:2]
        expected: dict[str, tuple[int, ...]] = {"valid": tuple(self.values.shape), "time_s": (obs, 2), "row": (obs,)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {shape}")
        if band != len(self.sensor.bands):
            raise ValueError(
                f"values has {band} bands, sensor {self.sensor.name} lists {len(self.sensor.bands)}: {', '.join(self.sensor.names)}"
            )

    @classmethod
    def of(
        cls,
        sensor: Sensor,
        values: Tensor,
        gsd_m: float,
        *,
        valid: Tensor | None = None,
        time_s: Tensor | Sequence[tuple[float, float]] | None = None,
    ) -> Raster:
        """A raster of one place from ``values`` [obs, band, y, x]; all valid and undated unless told. NaN is invalid."""
        if not values.is_floating_point():
            values = values.float()
        seen = torch.isfinite(values) if valid is None else valid & torch.isfinite(values)
        obs = values.shape[0]
        times = (
            torch.tensor([ALWAYS] * obs, dtype=torch.float64)
            if time_s is None
            else torch.as_tensor(time_s, dtype=torch.float64)
        )
        if times.numel() != 2 * obs:
            raise ValueError(
                f"time_s has shape {tuple(times.shape)}, expected ({obs}, 2): start and end of each observation"
            )
        times = times.reshape(obs, 2)
        if (times[:, 0] > times[:, 1]).any():
            raise ValueError(
                "time_s: an observation ends before it starts; expected [start, end) in seconds since 1970"
            )
        return cls(sensor, values.nan_to_num(0.0), seen, times, torch.zeros(obs, dtype=torch.int64), gsd_m)

    def __repr__(self) -> str:
        """Sensor, shape, range of the valid values, and dates; not the numbers."""
        (obs, bands, height, width), seen = self.values.shape, self.valid
        known = self.values[seen]
        values = (
            f"{known.min():.4g} to {known.max():.4g}, {seen.float().mean():.0%} valid"
            if len(known)
            else "nothing valid"
        )
        start, end = (self.time_s[:, 0].min(), self.time_s[:, 1].max()) if obs else (math.nan, math.nan)
        dates = f", {_day(start)} to {_day(end)}" if math.isfinite(start) and math.isfinite(end) else ""
        names = ", ".join(self.sensor.names[:12]) + (", ..." if bands > 12 else "")
        return f"Raster {self.sensor.name} ({names}), {obs} obs of {bands} bands, {height} x {width} px of {self.gsd_m:g} m: {values}{dates}"

    def select(self, bands: Iterable[str]) -> Raster:
        """The named bands alone, in this order."""
        chosen = self.sensor.select(bands)
        order = [self.sensor.names.index(name) for name in chosen.names]
        var = None if self.var is None else self.var[:, order]
        return replace(self, sensor=chosen, values=self.values[:, order], valid=self.valid[:, order], var=var)

    def obs(self, keep: Tensor) -> Raster:
        """The observations that ``keep`` picks (a bool mask or indices), rows unchanged."""
        var = None if self.var is None else self.var[keep]
        return replace(
            self,
            values=self.values[keep],
            valid=self.valid[keep],
            time_s=self.time_s[keep],
            row=self.row[keep],
            var=var,
        )

    def to(self, device: torch.device | str) -> Raster:
        return replace(
            self,
            values=self.values.to(device),
            valid=self.valid.to(device),
            time_s=self.time_s.to(device),
            row=self.row.to(device),
            var=None if self.var is None else self.var.to(device),
        )

    def _padded(self, height: int, width: int) -> Raster:
        """Grown to height x width pixels at the south and east; what is added is invalid."""
        missing = (0, width - self.values.shape[3], 0, height - self.values.shape[2])
        if not any(missing):
            return self
        grown: dict[str, Any] = {
            n: nn.functional.pad(getattr(self, n), missing)
            for n in ("values", "valid", "var")
            if getattr(self, n) is not None
        }
        return replace(self, **grown)

    @staticmethod
    def _cat(parts: Sequence[Raster], rows: Sequence[int]) -> Raster:
        """Parts stacked on the obs axis; ``rows`` is what each part's row index is shifted by."""
        first = parts[0]
        for part in parts[1:]:
            if part.sensor.names != first.sensor.names or part.sensor.name != first.sensor.name:
                raise ValueError(
                    f"a layer mixes {part.sensor.name} ({', '.join(part.sensor.names)}) and {first.sensor.name} "
                    f"({', '.join(first.sensor.names)}); select the same bands in the same order first"
                )
            if not math.isclose(part.gsd_m, first.gsd_m, rel_tol=1e-6):
                raise ValueError(f"a layer mixes gsd_m {part.gsd_m} and {first.gsd_m}; resample, or use two layers")
        height, width = (max(part.values.shape[axis] for part in parts) for axis in (2, 3))
        grown = [part._padded(height, width) for part in parts]
        has_var = all(part.var is not None for part in parts)
        return Raster(
            first.sensor,
            torch.cat([p.values for p in grown]),
            torch.cat([p.valid for p in grown]),
            torch.cat([p.time_s for p in grown]),
            torch.cat([p.row + shift for p, shift in zip(grown, rows, strict=True)]),
            first.gsd_m,
            torch.cat([p.var for p in grown if p.var is not None]) if has_var else None,
        )


def _day(time_s: Tensor | float) -> str:
    return datetime.fromtimestamp(float(time_s), tz=UTC).date().isoformat()


@dataclass(frozen=True)
class Vector:
    """Geometries (shapely, in metres from the place's north-west corner: x east, y south) with attributes and dates."""

    geometry: tuple[Any, ...]
    attributes: tuple[Mapping[str, Any], ...]
    time_s: Tensor
    row: Tensor

    def obs(self, keep: Tensor) -> Vector:
        index = torch.arange(len(self.geometry), device=keep.device)[keep].tolist()
        picked = tuple(self.geometry[i] for i in index), tuple(self.attributes[i] for i in index)
        return Vector(*picked, self.time_s[keep], self.row[keep])

    def to(self, device: torch.device | str) -> Vector:
        return replace(self, time_s=self.time_s.to(device), row=self.row.to(device))

    @staticmethod
    def _cat(parts: Sequence[Vector], rows: Sequence[int]) -> Vector:
        return Vector(
            tuple(g for p in parts for g in p.geometry),
            tuple(a for p in parts for a in p.attributes),
            torch.cat([p.time_s for p in parts]),
            torch.cat([p.row + shift for p, shift in zip(parts, rows, strict=True)]),
        )


@dataclass(frozen=True)
class Text:
    """Strings about places; ``role`` says what each is (caption, question, ...)."""

    strings: tuple[str, ...]
    role: tuple[str, ...]
    row: Tensor

    def obs(self, keep: Tensor) -> Text:
        index = torch.arange(len(self.strings), device=keep.device)[keep].tolist()
        return Text(tuple(self.strings[i] for i in index), tuple(self.role[i] for i in index), self.row[keep])

    def to(self, device: torch.device | str) -> Text:
        return replace(self, row=self.row.to(device))

    @staticmethod
    def _cat(parts: Sequence[Text], rows: Sequence[int]) -> Text:
        return Text(
            tuple(s for p in parts for s in p.strings),
            tuple(r for p in parts for r in p.role),
            torch.cat([p.row + shift for p, shift in zip(parts, rows, strict=True)]),
        )


Layer = Raster | Vector | Text


@dataclass(frozen=True, repr=False)
class Batch:
    """Places and what is known of them, by layer name. A place without observations in a layer just has no row there.

    ``source``: the name of the dataset that they come from, in training on several.
    """

    places: tuple[Place, ...]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            row = layer.row
            if row.device.type == "cpu" and row.numel() and not 0 <= int(row.min()) <= int(row.max()) < len(self):
                raise ValueError(
                    f"layer {name!r} has rows {int(row.min())} to {int(row.max())}, the batch has {len(self)} places; "
                    "join batches with Batch.cat, which shifts the rows"
                )

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        """What is in it, not its numbers: a line per layer."""
        first = self.places[0] if self.places else None
        size = (
            f" of {first.height_m:g} x {first.width_m:g} m"
            if first and len({(p.height_m, p.width_m) for p in self.places}) == 1
            else ""
        )
        lines = [f"  {name}: {layer!r}" for name, layer in self.layers.items()]
        return "\n".join([f"Batch: {len(self)} place{'s' * (len(self) != 1)}{size}", *lines])

    @staticmethod
    def cat(batches: Iterable[Batch]) -> Batch:
        """Batches one after another: the collate function. Nothing is padded on the obs axis."""
        batches = list(batches)
        starts = [0, *itertools.accumulate(map(len, batches))][: len(batches)]
        layers: dict[str, Layer] = {}
        for name in dict.fromkeys(name for b in batches for name in b.layers):
            pairs = [(b.layers[name], start) for b, start in zip(batches, starts, strict=True) if name in b.layers]
            kinds = {type(layer) for layer, _ in pairs}
            if len(kinds) > 1:
                raise ValueError(
                    f"layer {name!r} is of different kinds: {', '.join(sorted(k.__name__ for k in kinds))}"
                )
            layers[name] = kinds.pop()._cat([layer for layer, _ in pairs], [start for _, start in pairs])  # type: ignore[misc]
        return Batch(tuple(place for b in batches for place in b.places), layers)

    def __getitem__(self, index: int) -> Batch:
        """The place at ``index`` as a batch of one; layers that do not observe it are left out."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a batch of {len(self)} places")
        index %= len(self)
        layers: dict[str, Layer] = {}
        for name, layer in self.layers.items():
            mine = layer.row == index
            if mine.any():
                part = layer.obs(mine)
                layers[name] = replace(part, row=torch.zeros_like(part.row))
        return Batch((self.places[index],), layers)

    def only(self, *names: str) -> Batch:
        """The named layers alone."""
        return replace(self, layers={name: layer for name, layer in self.layers.items() if name in names})

    def without(self, *names: str) -> Batch:
        """All layers but the named ones."""
        return replace(self, layers={name: layer for name, layer in self.layers.items() if name not in names})

    def adding(self, **layers: Layer) -> Batch:
        """With these layers added or replaced (a dash in a layer's name is fine through ``**{"s1-asc": raster}``)."""
        return replace(self, layers={**self.layers, **layers})

    def raster(self, name: str) -> Raster:
        """The raster layer of that name, or an error that lists the layers there are."""
        layer = self.layers.get(name)
        if not isinstance(layer, Raster):
            raise LookupError(f"the batch has no raster layer {name!r}; it has {', '.join(self.layers) or 'no layers'}")
        return layer

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, layers={name: layer.to(device) for name, layer in self.layers.items()})

    @property
    def width_m(self) -> float:
        """Width of the widest place, metres."""
        return max(place.width_m for place in self.places)

    @property
    def height_m(self) -> float:
        """Height of the highest place, metres."""
        return max(place.height_m for place in self.places)


@dataclass(frozen=True)
class Coords:
    """Where, when and how large each token is.

    ``row`` int64 [token]; ``at_m`` float [token, 2], its centre, metres south and east of the place's north-west corner;
    ``size_m`` float [token], side; ``time_s`` float64 [token, 2]; ``group`` int64 [token], index into ``Tokens.groups``.
    """

    row: Tensor
    at_m: Tensor
    size_m: Tensor
    time_s: Tensor
    group: Tensor

    def __getitem__(self, keep: Tensor) -> Coords:
        return Coords(self.row[keep], self.at_m[keep], self.size_m[keep], self.time_s[keep], self.group[keep])

    def __len__(self) -> int:
        return self.row.shape[0]

    @staticmethod
    def cat(parts: Sequence[Coords]) -> Coords:
        names = ("row", "at_m", "size_m", "time_s", "group")
        return Coords(*(torch.cat([getattr(p, name) for p in parts]) for name in names))

    def cells(self) -> Tensor:
        """Row and column of each token on the grid of its own size, int64 [token, 2]."""
        return torch.floor(self.at_m / self.size_m[:, None] + 1e-4).long()


@dataclass(frozen=True)
class Tokens:
    """Vectors ``x`` [token, dim] with coordinates. Masking is indexing: ``tokens[keep]``.

    ``memo`` holds side products of tokenization that a decoder asks for, such as pooling indices.
    """

    x: Tensor
    coords: Coords
    groups: tuple[str, ...]
    places: tuple[Place, ...]
    memo: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, keep: Tensor) -> Tokens:
        return replace(self, x=self.x[keep], coords=self.coords[keep])

    def __len__(self) -> int:
        return self.x.shape[0]


@dataclass(frozen=True)
class Features:
    """What an encoder says: ``mean`` [token, dim] per token at ``coords`` and ``summary`` [row, dim] per place, with their variances
    ``var`` and ``summary_var`` if the encoder is probabilistic. A dense output is just features at finer coords."""

    mean: Tensor
    coords: Coords
    summary: Tensor
    places: tuple[Place, ...]
    var: Tensor | None = None
    summary_var: Tensor | None = None

    def grid(self) -> Tensor:
        """Token features as images, [row, dim, y, x] in north-up raster order; NaN where there is no token.

        Raises:
            ValueError: tokens of different sizes, or several in one cell, which do not form one grid.
        """
        if len(self.coords) == 0:
            raise ValueError("there are no tokens to make a grid of: no input layer was observed in any place")
        if not torch.allclose(self.coords.size_m, self.coords.size_m[:1]):
            raise ValueError("tokens have different sizes and form no single grid; select those of one size first")
        cells = self.coords.cells()
        if len(torch.unique(torch.cat([self.coords.row[:, None], cells], 1), dim=0)) < len(cells):
            raise ValueError("several tokens lie in one cell; pool dates and groups, or select one of them, first")
        size_m = float(self.coords.size_m[0])
        height, width = (
            max(int(cells[:, axis].max()) + 1, *(math.ceil(extent / size_m - 1e-4) for extent in extents))
            for axis, extents in enumerate(([p.height_m for p in self.places], [p.width_m for p in self.places]))
        )
        image = self.mean.new_full((len(self.places), height, width, self.mean.shape[1]), math.nan)
        image[self.coords.row, cells[:, 0], cells[:, 1]] = self.mean
        return image.permute(0, 3, 1, 2)

    @classmethod
    def of_grid(cls, image: Tensor, places: tuple[Place, ...], size_m: float) -> Features:
        """The inverse of :meth:`grid`: one feature per cell of [row, dim, y, x] that is not NaN; the summary is their mean."""
        row, y, x = torch.nonzero(torch.isfinite(image).all(1)).unbind(1)
        mean = image[row, :, y, x]
        at_m = (torch.stack([y, x], -1) + 0.5) * size_m
        always = torch.tensor(ALWAYS, dtype=torch.float64).expand(len(row), 2)
        coords = Coords(row, at_m, torch.full((len(row),), size_m), always, torch.zeros_like(row))
        total = mean.new_zeros(len(places), image.shape[1]).index_add(0, row, mean)
        return cls(mean, coords, total / torch.bincount(row, minlength=len(places)).clamp(min=1)[:, None], places)


@dataclass(frozen=True)
class Input:
    """One layer that an encoder takes: its band contract.

    ``sensor`` lists the bands in the order the model expects; ``mean`` and ``std`` are per band, in the band's unit;
    ``dated`` is true for series, whose observations need a time.
    """

    sensor: Sensor
    gsd_m: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dated: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != len(self.sensor.bands):
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {len(self.sensor.bands)} bands")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std={self.std} must be positive")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean={self.mean} must be finite")

    def fit(self, raster: Raster, name: str) -> Raster:
        """``raster`` with the contract's bands in the contract's order, or a :class:`ContractError` that says what to do."""
        if raster.sensor.name != self.sensor.name:
            raise ContractError(
                f"layer {name!r} is of sensor {raster.sensor.name}, the model expects {self.sensor.name}: the same band names may "
                f"hold other values. If these are what the model was trained on, read them with sensor={self.sensor.name!r}"
            )
        missing = [band for band in self.sensor.names if band not in raster.sensor]
        if missing:
            raise ContractError(
                f"layer {name!r} ({raster.sensor.name}: {', '.join(raster.sensor.names)}) lacks {', '.join(missing)}; the model "
                f"expects {', '.join(self.sensor.names)}. Read these bands too, or leave the layer out with batch.without({name!r})"
            )
        for band in self.sensor.bands:
            unit = raster.sensor[band.name].unit
            if unit != band.unit:
                raise ContractError(
                    f"layer {name!r} band {band.name} is in {unit}, the model expects {band.unit}; "
                    "read it with the sensor table that fits the file, or convert the values"
                )
        if not math.isclose(raster.gsd_m, self.gsd_m, rel_tol=1e-3):
            raise ContractError(
                f"layer {name!r} has gsd_m={raster.gsd_m:g}, the model expects {self.gsd_m:g}; read it with "
                f"gsd_m={self.gsd_m:g} to resample it once"
            )
        if self.dated and not torch.isfinite(raster.time_s).all():
            raise ContractError(
                f"layer {name!r} is a series: every observation needs a date. Give times=... when reading"
            )
        if tuple(raster.sensor.names) == self.sensor.names:
            return raster
        return raster.select(raster.sensor[band].name for band in self.sensor.names)

    def normalise(self, raster: Raster) -> Tensor:
        """Values less mean, over std, [obs, band, y, x]; 0 where invalid, so that an invalid value has no effect."""
        shape = (1, -1, 1, 1)
        mean, std = (
            torch.tensor(v, dtype=raster.values.dtype, device=raster.values.device).view(shape)
            for v in (self.mean, self.std)
        )
        return torch.where(raster.valid, (raster.values - mean) / std, 0.0)


class Encoder(nn.Module, ABC):
    """From layers to features. ``inputs`` is the band contract by layer name, ``dim`` the width of the features.

    ``config`` is a JSON-able dict from which ``from_config(config)`` of the model's module, named by ``family``, rebuilds the
    encoder without its weights. ``any_sensor`` is true of encoders that also take bands which the contract does not list, by
    their physics.
    """

    family: str
    inputs: dict[str, Input]
    dim: int
    config: dict[str, Any]
    any_sensor: bool = False

    @abstractmethod
    def tokenize(self, batch: Batch) -> Tokens:
        """Tokens of every layer that is both in the batch and in the contract; layers it does not know are ignored."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Features:
        """Features from tokens, of all places of ``tokens.places``, also of those that have no token."""

    @property
    def reads(self) -> Mapping[str, Input] | None:
        """The band contract that files are read by, or None if the encoder takes whatever there is."""
        return self.inputs

    def known(self, batch: Batch) -> Batch:
        """The layers of a batch that the encoder reads."""
        return batch.only(*self.inputs)

    def at(self, **changes: Any) -> Encoder:
        """The same encoder, sharing its weights, with settings changed that it lets one choose at a call, such as ``patch_m``."""
        if changes:
            raise TypeError(f"{self.family} has no settings to choose at a call; got {', '.join(changes)}")
        return self

    def embed(self, batch: Batch | Raster, **changes: Any) -> Features:
        """Features of a batch (or of one raster, whose layer is found by its sensor) without gradients, in eval mode; settings
        ``changes`` as in :meth:`at`."""
        if changes:
            return self.at(**changes).embed(batch)
        if isinstance(batch, Raster):
            batch = Batch((extent(batch),), {self.layer_for(batch): batch})
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():  # not inference_mode: heads may be trained on these features
                return self(self.tokenize(batch.to(next(self.parameters()).device)))
        finally:
            self.train(was_training)

    def layer_for(self, raster: Raster) -> str:
        """Name of the input that takes this raster: same sensor and resolution, all bands there."""
        for name, wanted in self.inputs.items():
            bands_there = all(band in raster.sensor for band in wanted.sensor.names)
            if (
                wanted.sensor.name == raster.sensor.name
                and bands_there
                and math.isclose(wanted.gsd_m, raster.gsd_m, rel_tol=1e-3)
            ):
                return name
        wanted_inputs = "; ".join(
            f"{n}: {i.sensor.name} {i.gsd_m:g} m ({', '.join(i.sensor.names)})" for n, i in self.inputs.items()
        )
        raise ContractError(
            f"no input of the model takes {raster.sensor.name} at {raster.gsd_m:g} m ({', '.join(raster.sensor.names)}). It takes {wanted_inputs}"
        )


def extent(raster: Raster) -> Place:
    """The place that a raster without georeference covers."""
    return Place(raster.values.shape[2] * raster.gsd_m, raster.values.shape[3] * raster.gsd_m)


class Objective(nn.Module, ABC):
    """What training minimises. All randomness comes from ``generator``, which lives on the CPU."""

    @abstractmethod
    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """``{"loss": scalar, ...}`` with the named terms that make it up, for the log."""

    def after_step(self, encoder: Encoder, step: int, steps: int) -> None:
        """Called after each optimiser step, for moving averages and the like."""

    def exported(self, encoder: Encoder) -> Encoder:
        """The encoder that a finished run is about: the trained one, unless the objective keeps a better one, as a teacher."""
        return encoder


class Task(Objective):
    """An objective whose target is a layer of the batch, and that can predict that layer; ``sensor`` lists its bands."""

    target: str
    sensor: Sensor
    config: dict[str, Any]

    def features(self, encoder: Encoder, batch: Batch) -> Features:
        """What :meth:`predict` is given: the encoder's features of the batch, without the target."""
        return encoder(encoder.tokenize(batch.without(self.target)))

    @abstractmethod
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """The target layer as predicted from features: class probabilities or values per pixel or per place.

        ``batch`` is what the features are of; a task that also reads pixels needs it.
        """

    @abstractmethod
    def metrics(self) -> Mapping[str, Any]:
        """Fresh torchmetrics objects by name; the caller resets or discards them."""

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the metrics are updated with: ``prediction`` and label of what is labelled in the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its predictions and labels are compared")
