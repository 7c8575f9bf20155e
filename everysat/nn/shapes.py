"""Points, lines and polygons as numbers, exactly: their Fourier transforms; and sets of them with tags as one vector.

The transform of a shape is F(u) = integral over the shape of exp(-2 pi i u.x) dx, u in cycles per metre: F(0) is what is measured: the
number of points, the length of a line, the area of a polygon. It is computed from vertices, without a grid, so that nothing
is lost: a translation is a phase, and shapes of any number of vertices have numbers of one length. After Poly2Vec (Siampou et al. 2024,
arXiv:2408.14806), which also reads magnitude and phase, here with length as the weight of segments, and with polygons, with holes, by their boundary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
import torch
from shapely.geometry.base import BaseGeometry
from torch import Tensor, nn

from everysat.nn.minilm import TextEncoder
from everysat.nn.perceiver import GatedMlp, LatentAttention, Pooling, Reading
from everysat.types import Place, Vector

KINDS = ("points", "lines", "polygons")
EDGES_AT_ONCE = 50_000


@dataclass(frozen=True)
class Spectra:
    """``values`` complex128 [shape, frequency], see the module's text; ``kind`` int64 [shape], of :data:`KINDS`; ``measure`` float64 [shape], the
    number of points, the length in m or the area in m2; ``centre_m`` float64 [shape, 2], the middle of the bounds."""

    values: Tensor
    kind: Tensor
    measure: Tensor
    centre_m: Tensor


def frequencies(longest_m: float, shortest_m: float, count: int) -> Tensor:
    """Cycles per metre east and south, float64 [frequency, 2]: 0 and plus and minus ``count`` frequencies of wavelengths in equal ratios, on both axes.
    Shapes are real, so that F(-u) is the conjugate of F(u): of u and -u one is listed. The first is 0."""
    if not (longest_m > shortest_m > 0 and count >= 2):
        raise ValueError(
            f"longest_m={longest_m} must be above shortest_m={shortest_m} above 0, and count={count} at least 2"
        )
    ratio = torch.linspace(0, 1, count, dtype=torch.float64)
    positive = (shortest_m / longest_m) ** -ratio / longest_m
    axis = torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])
    every = torch.cartesian_prod(axis, axis)
    return every[len(every) // 2 :]


def transform(shapes: Sequence[BaseGeometry], frequency: Tensor, origin_m: Tensor | None = None) -> Spectra:
    """Fourier transforms of shapely geometries in metres. Of a collection, the parts of the highest dimension count; a polygon without area is its
    boundary, a line without length a point.

    Args:
        frequency: float64 [frequency, 2], cycles per metre.
        origin_m: float64 [shape, 2] or [2], where the phase is 0; (0, 0) by default.

    Raises:
        ValueError: an empty geometry, or coordinates that are not finite.
    """
    kinds, edges, index, centres = [], [], [], []
    for number, shape in enumerate(shapes):
        dimension, found = _edges(shape, number)
        left, top, right, bottom = shape.bounds
        kinds.append(dimension)
        edges.append(found)
        index.append(np.full(len(found), number))
        centres.append(((left + right) / 2, (top + bottom) / 2))
    count = len(kinds)
    kind, centre = torch.tensor(kinds, dtype=torch.long), torch.tensor(centres, dtype=torch.float64).view(-1, 2)
    edge = torch.from_numpy(np.concatenate([*edges, np.zeros((0, 4))]))
    which = torch.from_numpy(np.concatenate([*index, np.zeros(0, dtype=np.int64)])).long()
    values = torch.zeros(count, len(frequency), dtype=torch.complex128)
    for part in range(0, len(edge), EDGES_AT_ONCE):
        mine = which[part : part + EDGES_AT_ONCE]
        at = edge[part : part + EDGES_AT_ONCE]
        local = torch.cat([at[:, :2] - centre[mine], at[:, 2:]], 1)  # near 0, low frequencies keep their digits
        values.index_add_(0, mine, _of_edges(local, kind[mine], frequency))
    measure = _measure(edge, which, kind, centre)
    values = torch.where((frequency == 0).all(1), measure[:, None].to(values.dtype), values)
    origin = torch.zeros(2, dtype=torch.float64) if origin_m is None else origin_m.double()
    phase = -2 * math.pi * (centre - origin) @ frequency.T
    return Spectra(values * torch.polar(torch.ones_like(phase), phase), kind, measure, centre)


def _of_edges(edge: Tensor, kind: Tensor, frequency: Tensor) -> Tensor:
    """Part of each edge (middle x, y and difference x, y) [edge, 4] in the transform of its shape, complex [edge, frequency].

    A segment: length x exp(-2 pi i u.middle) x sinc(u.difference). A polygon, by the divergence theorem: i / (2 pi |u|^2) x (u x difference) in place
    of length, with the outline to the left of the way round; 0 at u = 0, where it is the area."""
    middle, way = edge[:, :2], edge[:, 2:]
    phase = -2 * math.pi * middle @ frequency.T
    wave = torch.polar(torch.ones_like(phase), phase) * torch.sinc(way @ frequency.T)
    cross = frequency[:, 0] * way[:, 1:] - frequency[:, 1] * way[:, :1]
    squared = frequency.square().sum(1)
    outline = 1j * cross / (2 * math.pi * torch.where(squared > 0, squared, 1.0))
    length = way.norm(dim=1)[:, None]
    weight = torch.where(
        (kind == 2)[:, None], outline, torch.where((kind == 1)[:, None], length, 1.0).to(outline.dtype)
    )
    return weight * wave


def _measure(edge: Tensor, which: Tensor, kind: Tensor, centre: Tensor) -> Tensor:
    """Number of points, length or area of each shape, [shape]."""
    middle, way = edge[:, :2] - centre[which], edge[:, 2:]
    area = 0.5 * (middle[:, 0] * way[:, 1] - middle[:, 1] * way[:, 0])
    each = torch.stack([torch.ones_like(area), way.norm(dim=1), area], 1)
    total = torch.zeros(len(kind), 3, dtype=torch.float64).index_add(0, which, each)
    return total.gather(1, kind[:, None])[:, 0]


def _edges(shape: BaseGeometry, number: int) -> tuple[int, np.ndarray]:
    """The number of its kind, and middle and difference of every edge [edge, 4]; outer rings of polygons go counter-clockwise, holes clockwise."""
    if shape.is_empty:
        raise ValueError(f"geometry {number} is an empty {shape.geom_type}: it has no shape; leave it out")
    if not np.isfinite(shapely.get_coordinates(shape)).all():
        raise ValueError(f"geometry {number} ({shape.geom_type}) has coordinates that are not finite")
    parts = list(_parts(shape))
    kind = max(shapely.get_dimensions(part) for part in parts)
    parts = [part for part in parts if shapely.get_dimensions(part) == kind]
    if kind == 2 and not any(part.area for part in parts):
        kind, parts = 1, [part.exterior for part in parts]
    if kind == 1 and not any(part.length for part in parts):
        kind, parts = 0, [shapely.Point(part.coords[0]) for part in parts[:1]]
    if kind == 0:
        return 0, np.array([[part.x, part.y, 0.0, 0.0] for part in parts])
    lines = [np.asarray(part.coords)[:, :2] for part in parts] if kind == 1 else [r for p in parts for r in _rings(p)]
    return kind, np.concatenate([np.concatenate([(a[1:] + a[:-1]) / 2, a[1:] - a[:-1]], 1) for a in lines])


def _rings(polygon: Any) -> Iterator[np.ndarray]:
    for number, ring in enumerate((polygon.exterior, *polygon.interiors)):
        around = np.asarray(ring.coords)[:, :2]
        yield around if shapely.is_ccw(ring) == (number == 0) else around[::-1]


def _parts(shape: BaseGeometry) -> Iterator[Any]:
    for part in getattr(shape, "geoms", [shape]):
        yield from _parts(part) if hasattr(part, "geoms") else (part,)


def said(attributes: Mapping[str, Any], keys: Sequence[str] | None = None) -> list[str]:
    """Attributes as strings, ``building is church``: those of ``keys``, or all, that have a value."""
    chosen = {key: attributes.get(key) for key in (attributes if keys is None else keys)}
    known = {key: str(v).strip() for key, v in chosen.items() if v is not None and v == v}  # NaN is no value
    return [f"{key} is {value}".replace("_", " ") for key, value in sorted(known.items()) if value]


def spoken(attributes: Mapping[str, Any]) -> list[str]:
    """:func:`said`, and values without their keys, where they are words other than yes and no: ``landuse is forest``, ``forest``."""
    every = said(attributes)
    values = [text.partition(" is ")[2] for text in every]
    return [*every, *(v for v in values if v not in ("yes", "no") and any(map(str.isalpha, v)))]


def below(layer: Vector, row: Tensor, at_m: Tensor) -> tuple[Tensor, Tensor]:
    """Which points lie in which shapes of their place: indices of points and of shapes, int64 [pair]. Points of ``row`` [point], ``at_m`` [point, 2] metres
    south and east. Points and lines of the layer hold nothing."""
    nothing = torch.zeros(0, dtype=torch.long)
    points, shapes = [nothing], [nothing]
    south, east = at_m.double().cpu().numpy().T
    for number, (shape, place) in enumerate(zip(layer.geometry, layer.row.tolist(), strict=True)):
        mine = (row == place).nonzero()[:, 0].cpu() if shape.area else nothing
        inside = mine[torch.from_numpy(shapely.contains_xy(shape, east[mine.numpy()], south[mine.numpy()]))]
        points.append(inside)
        shapes.append(torch.full_like(inside, number))
    return torch.cat(points), torch.cat(shapes)


@dataclass(frozen=True)
class Features:
    """What is read of each shape of a layer: ``form`` float [shape, 3 frequency + 2 + 3], ``tags`` float [shape, text], ``row`` int64 [shape]; the
    shapes of a place behind each other."""

    form: Tensor
    tags: Tensor
    row: Tensor

    def to(self, device: torch.device | str) -> Features:
        return Features(self.form.to(device), self.tags.to(device), self.row.to(device))


def features(
    layer: Vector, places: Sequence[Place], frequency: Tensor, text: TextEncoder, keys: Sequence[str] | None = None
) -> Features:
    """Spectra, sizes, kinds and tags of a layer, around the middle of each place.

    Of a spectrum F: |F| / F(0), then real and imaginary part of F / F(0), then the logarithms of ``measure`` and of the distance of the shape from the
    middle, relative to the place, then the kind. Tags are the mean of the vectors of :func:`said`, zeros where there are none.
    """
    order = torch.argsort(layer.row, stable=True).cpu()
    row = layer.row.cpu()[order]
    size = torch.tensor([[place.width_m, place.height_m] for place in places], dtype=torch.float64).view(-1, 2)
    found = transform([layer.geometry[i] for i in order.tolist()], frequency, size[row] / 2)
    most = torch.maximum(found.measure, found.values.abs().amax(1))  # of a polygon that crosses itself, areas cancel
    relative = found.values / most[:, None]
    away = (found.centre_m - size[row] / 2).norm(dim=1) / size[row].norm(dim=1)
    scale = torch.stack([most.log(), (away + 1e-3).log()], 1) / 5  # of the size of the other numbers
    kinds = nn.functional.one_hot(found.kind, len(KINDS)).double()
    form = torch.cat([relative.abs(), relative.real, relative.imag, scale, kinds], 1).float()
    strings = [said(layer.attributes[i], keys) for i in order.tolist()]
    flat = [text_ for every in strings for text_ in every]
    owner = torch.repeat_interleave(torch.arange(len(strings)), torch.tensor([len(every) for every in strings]).long())
    tags = torch.zeros(len(strings), text.dim).index_add(0, owner, text(flat))
    return Features(form, tags / torch.bincount(owner, minlength=len(strings)).clamp(min=1)[:, None], row)


class ShapeSet(nn.Module):
    """One vector [place, dim] of all shapes of a place, in whatever order: a few latents read them and think (an induced set transformer, Lee et al.
    2019), so that the cost grows with their number and not its square.

    Magnitudes, phases (as parts of the complex number) and tags of a shape each go through a network of their own, whose sum is what is read.
    """

    def __init__(self, frequencies: int, text: int, dim: int, latents: int = 8, heads: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.frequencies = frequencies
        sizes = (frequencies, 2 * frequencies, 2 + len(KINDS), text)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(n, dim), nn.GELU(), nn.Linear(dim, dim)) for n in sizes)
        self.latents = nn.Parameter(torch.randn(latents, dim) * 0.02)
        self.reading, self.after = Reading(dim, dim, heads, dim // heads), GatedMlp(dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(LatentAttention(dim, heads, dim // heads), GatedMlp(dim)) for _ in range(depth)
        )
        self.pooling = Pooling(dim, heads, dim // heads)

    def forward(self, shapes: Features, places: int) -> tuple[Tensor, Tensor]:
        """Vectors [place, dim] and which places have shapes, bool [place]; the others are zeros."""
        f = self.frequencies
        parts = (*shapes.form.split([f, 2 * f, shapes.form.shape[1] - 3 * f], 1), shapes.tags)
        x = torch.stack([net(part) for net, part in zip(self.nets, parts, strict=True)]).sum(0)
        count = torch.bincount(shapes.row, minlength=places)
        there = count > 0
        kv = self.reading.to_kv(self.reading.context_norm(x))
        held = int(there.sum())
        asked = torch.full((held,), len(self.latents), device=x.device)
        z = self.reading(self.latents.repeat(held, 1), kv, asked, count[there])
        z = self.after(z).view(held, *self.latents.shape)
        for block in self.blocks:
            z = block(z)
        out = x.new_zeros(places, x.shape[1])
        return out.index_copy(0, there.nonzero()[:, 0], self.pooling(z)) if held else out, there
