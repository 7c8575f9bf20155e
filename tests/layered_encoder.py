"""A small encoder of several layers, and places whose layers see the same factors: each layer misses one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everysat.nn.cells import cells_at
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Coords, Encoder, Features, Input, Place, Raster, Tokens

NAMES = ("a", "b", "c")
FACTORS = 6


def sensor(name: str) -> Sensor:
    return Sensor(
        f"made-{name}", "optical", tuple(Band(f"b{i}", 10, "reflectance") for i in range(4)), "made for tests"
    )


class LayeredEncoder(Encoder):
    """A network per layer on squares of 2 x 2 pixels of 10 m; the feature of a cell is the mean over layers."""

    family = "layered_encoder"

    def __init__(self, names: tuple[str, ...] = NAMES, dim: int = 32) -> None:
        super().__init__()
        self.inputs = {name: Input(sensor(name), 10.0, (0.0,) * 4, (1.0,) * 4) for name in names}
        self.dim, self.config = dim, {"names": list(names), "dim": dim}
        self.nets = nn.ModuleDict({n: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, dim)) for n in names})

    def tokenize(self, batch: Batch) -> Tokens:
        groups = tuple(name for name in self.inputs if name in batch.layers)
        nowhere = torch.zeros(0, dtype=torch.long)
        parts = [(torch.zeros(0, self.dim), cells_at(nowhere, nowhere, nowhere, 20.0, 0))]
        for group, name in enumerate(groups):
            raster = self.inputs[name].fit(batch.raster(name), name)
            x, seen = (squares(image) for image in (self.inputs[name].normalise(raster), raster.valid))
            there = seen.any(-1)
            obs, y, x_at = there.nonzero(as_tuple=True)
            parts.append((self.nets[name](x[there]), cells_at(raster.row[obs], y, x_at, 20.0, group)))
        return Tokens(torch.cat([x for x, _ in parts]), Coords.cat([c for _, c in parts]), groups, batch.places)

    def forward(self, tokens: Tokens) -> Features:
        keys = torch.cat([tokens.coords.row[:, None], tokens.coords.cells()], 1)
        keys, where = torch.unique(keys, dim=0, return_inverse=True)
        mean = mean_by(tokens.x, where, len(keys))
        summary = mean_by(mean, keys[:, 0], len(tokens.places))
        return Features(mean, cells_at(keys[:, 0], keys[:, 1], keys[:, 2], 20.0, 0), summary, tokens.places)


def squares(image: Tensor) -> Tensor:
    """[obs, y, x, 16] of images [obs, 4, 2 y, 2 x]."""
    return image.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)


def mean_by(x: Tensor, index: Tensor, count: int) -> Tensor:
    total = x.new_zeros(count, x.shape[1]).index_add(0, index, x)
    return total / torch.bincount(index, minlength=count).clamp(min=1)[:, None]


def layered_batch(places: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Places of 40 m, and the factors [place, factor, y, x] of their four cells; layer number i does not see factor 2 i."""
    fixed = torch.Generator().manual_seed(1)
    factors = torch.randn(places, FACTORS, 2, 2, generator=generator)
    layers = {}
    for i, name in enumerate(NAMES):
        mix = torch.randn(4, FACTORS, generator=fixed) * (torch.arange(FACTORS) != 2 * i) / 2
        values = torch.einsum("bf,nfyx->nbyx", mix, factors).repeat_interleave(2, 2).repeat_interleave(2, 3)
        layers[name] = of_places(name, values + 0.2 * torch.randn(values.shape, generator=generator))
    return Batch((Place(40.0, 40.0),) * places, layers), factors


def of_places(name: str, values: Tensor) -> Raster:
    """One observation [band, y, x] of each place."""
    raster = Raster.of(sensor(name), values, 10.0)
    return Raster(raster.sensor, raster.values, raster.valid, raster.time_s, torch.arange(len(values)), 10.0)
