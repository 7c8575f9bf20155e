"""A tiny real model for training tests: each optical place is cut into pixels, each pixel of each date is a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from everysat.nn.draws import uniform
from everysat.nn.gather import gather_rows, global_mean, row_offset
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Coords, Encoder, Features, Input, Objective, Tokens

INPUTS = {"fine": (5.0, 3), "coarse": (10.0, 4)}


class Pixels(Encoder):
    """Tokens of 10 m from the two image layers of the synthetic set: a linear map of the pixels of each square."""

    def __init__(self, dim: int = 8, dropout: float = 0.1, modalities: dict | None = None) -> None:
        super().__init__()
        self.family, self.dim = "third_party.strips", dim
        self.inputs = {}
        for name, (gsd_m, count) in INPUTS.items():
            bands = tuple(Band(f"{name}-{i + 1}", gsd_m, "reflectance") for i in range(count))
            given = (modalities or {}).get(name, {})
            mean, std = given.get("mean", [0.3] * count), given.get("std", [0.2] * count)
            sensor = Sensor(f"synthetic-{name}", "optical", bands, source="synthetic")
            self.inputs[name] = Input(sensor, gsd_m, tuple(mean), tuple(std))
        listed = {n: {"mean": list(i.mean), "std": list(i.std)} for n, i in self.inputs.items()}
        self.config = {"dim": dim, "dropout": dropout, "modalities": listed}
        self.project = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(n, dim), nn.BatchNorm1d(dim))
                for name, n in {"fine": 12, "coarse": 4}.items()
            }
        )
        self.mix = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim))
        self.register_buffer("seen", torch.zeros(()))

    def tokenize(self, batch: Batch) -> Tokens:
        parts, coords, groups = [], [], [n for n in self.inputs if n in batch.layers]
        for group, name in enumerate(groups):
            raster = self.inputs[name].fit(batch.raster(name), name)
            k = round(10 / raster.gsd_m)
            x = self.inputs[name].normalise(raster)
            height, width = (size // k for size in x.shape[2:])
            parts.append(
                self.project[name](rearrange(x, "o b (h y) (w x) -> (o h w) (b y x)", y=k, x=k, h=height, w=width))
            )
            y, z = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            at = (torch.stack([y, z], -1).flatten(0, 1) + 0.5).repeat(len(raster.row), 1) * 10.0
            row = raster.row.repeat_interleave(height * width)
            always = torch.zeros(len(row), 2, dtype=torch.float64)
            coords.append(Coords(row, at, torch.full((len(row),), 10.0), always, torch.full_like(row, group)))
        if self.training:
            self.seen += 1
        return Tokens(torch.cat(parts), Coords.cat(coords), tuple(groups), batch.places)

    def forward(self, tokens: Tokens) -> Features:
        x = tokens.x + self.mix(tokens.x)
        rows = len(tokens.places)
        total = x.new_zeros(rows, self.dim).index_add(0, tokens.coords.row, x)
        count = torch.bincount(tokens.coords.row, minlength=rows)[:, None]
        return Features(x, tokens.coords, total / count.clamp(min=1), tokens.places)


class Contrast(Objective):
    """Masked reconstruction of the coarse layer, and InfoNCE between the two layers of a place against all places."""

    def __init__(self, encoder: Encoder, poison_at: int = -1, plain: bool = False) -> None:
        super().__init__()
        self.decode = nn.Linear(encoder.dim, 4)
        self.poison_at, self.plain, self.calls = poison_at, plain, 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        tokens = encoder.tokenize(batch)
        row = tokens.coords.row + row_offset(len(batch))
        cells = tokens.coords.cells()
        keep = uniform(generator, row, cells[:, 0] * 100 + cells[:, 1] + 10000 * tokens.coords.group) > 0.5
        keep |= self.plain
        shown = Tokens(tokens.x * keep[:, None], tokens.coords, tokens.groups, tokens.places)
        features = encoder(shown)
        coarse = tokens.coords.group == list(tokens.groups).index("coarse")
        target = batch.raster("coarse").values.permute(0, 2, 3, 1).flatten(0, 2)
        rebuilt = self.decode(features.mean[coarse]).float()
        a, b = (F.normalize(self._mean(tokens, tokens.coords.group == g).float(), dim=1) for g in (0, 1))
        (every_b, start) = gather_rows(b)
        own = start + torch.arange(len(a))
        losses = {
            "reconstruction": global_mean((rebuilt - target).square()),
            "contrastive": global_mean(F.cross_entropy(a @ every_b.T / 0.2, own, reduction="none")),
        }
        if self.plain:
            return {"loss": losses["reconstruction"]}
        self.calls += 1
        if self.calls == self.poison_at:
            losses["contrastive"] = losses["contrastive"] * float("nan")
        return {"loss": sum(losses.values()), **losses}

    def after_step(self, encoder: Encoder, step: int, steps: int) -> None:
        self.steps += 1

    @staticmethod
    def _mean(tokens: Tokens, chosen: Tensor) -> Tensor:
        rows = len(tokens.places)
        return tokens.x.new_zeros(rows, tokens.x.shape[1]).index_add(0, tokens.coords.row[chosen], tokens.x[chosen])


def build(variant: str = "", *, encoder: Encoder | None = None, **options):
    """The encoder, or the objective when there is an encoder already: this module stands for both kinds."""
    return Pixels(**options) if encoder is None else Contrast(encoder, **options)


def from_config(config: dict) -> Pixels:
    return Pixels(**config)
