"""A small convolution-like encoder: every token is a fixed map of the pixels of its own square, whatever lies around."""

from __future__ import annotations

import math

import torch
from torch import nn

from everysat.sensors import Band, Sensor
from everysat.types import Batch, Coords, Encoder, Features, Input, Place, Raster, Tokens

SENSOR = Sensor("synthetic", "optical", (Band("a", 10, "reflectance"), Band("b", 10, "reflectance")), "made for tests")


class SquareEncoder(Encoder):
    """Tokens of ``size_m`` from the ``image`` layer; a token needs one valid pixel."""

    family = "simple_encoder"

    def __init__(self, size_m: float = 20.0, gsd_m: float = 10.0, dim: int = 6) -> None:
        super().__init__()
        self.inputs = {"image": Input(SENSOR, gsd_m, (0.2, 0.3), (0.5, 0.4))}
        self.size_m, self.k, self.dim = size_m, round(size_m / gsd_m), dim
        self.config = {"size_m": size_m, "gsd_m": gsd_m, "dim": dim}
        self.proj = nn.Linear(2 * self.k**2, dim)

    def tokenize(self, batch: Batch) -> Tokens:
        raster = self.inputs["image"].fit(batch.raster("image"), "image")
        k, x, seen = self.k, self.inputs["image"].normalise(raster), raster.valid
        pad = (0, -x.shape[3] % k, 0, -x.shape[2] % k)
        x, seen = nn.functional.pad(x, pad), nn.functional.pad(seen, pad)
        patches = x.unfold(2, k, k).unfold(3, k, k).permute(0, 2, 3, 1, 4, 5).flatten(3)
        keep = seen.unfold(2, k, k).unfold(3, k, k).permute(0, 2, 3, 1, 4, 5).flatten(3).any(-1)
        obs, i, j = keep.nonzero(as_tuple=True)
        at = torch.stack([i + 0.5, j + 0.5], 1) * self.size_m
        coords = Coords(
            raster.row[obs], at, torch.full((len(obs),), self.size_m), raster.time_s[obs], torch.zeros_like(obs)
        )
        return Tokens(self.proj(patches[keep]), coords, ("image",), batch.places)

    def forward(self, tokens: Tokens) -> Features:
        rows = len(tokens.places)
        total = tokens.x.new_zeros(rows, self.dim).index_add(0, tokens.coords.row, tokens.x)
        count = tokens.x.new_zeros(rows).index_add(0, tokens.coords.row, torch.ones(len(tokens)))
        return Features(tokens.x, tokens.coords, total / count.clamp(min=1)[:, None], tokens.places)


def image_batch(values: torch.Tensor, gsd_m: float = 10.0, valid: torch.Tensor | None = None) -> Batch:
    """A batch of ``values`` [row, band, y, x], one observation per place."""
    rows, _, height, width = values.shape
    raster = Raster.of(SENSOR, values, gsd_m, valid=valid)
    raster = Raster(raster.sensor, raster.values, raster.valid, raster.time_s, torch.arange(rows), gsd_m)
    return Batch(tuple(Place(height * gsd_m, width * gsd_m) for _ in range(rows)), {"image": raster})


def label_raster(
    codes: torch.Tensor, gsd_m: float, valid: torch.Tensor | None = None, names: tuple[str, ...] = ()
) -> Raster:
    """A label layer from ``codes`` [row, band, y, x]."""
    unit = "class"
    bands = tuple(Band(n, gsd_m, unit) for n in (names or tuple(f"label{i}" for i in range(codes.shape[1]))))
    raster = Raster.of(Sensor("labels", "classes", bands, "made for tests"), codes.float(), gsd_m, valid=valid)
    rows = torch.arange(len(codes))
    assert math.isfinite(gsd_m)
    return Raster(raster.sensor, raster.values, raster.valid, raster.time_s, rows, gsd_m)
