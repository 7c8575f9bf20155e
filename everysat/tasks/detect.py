"""Objects found and counted as peaks of a heat map: trees, ships, buildings, whatever a point, a box or an outline stands for.

The target is a vector layer, whose geometries count by their centroids, or a raster of instances (0 for none, a number for each object). An
object is a peak of 1 in the heat map of its class, which falls off like a Gaussian of ``sigma_m``; two more channels say where in its pixel
it lies (CenterNet, Zhou et al. 2019, "Objects as Points", without sizes). Detections are the pixels that are the largest within ``radius_m``
(the maximum-pooling that stands for non-maximum suppression there), as points with a confidence.

All places of a batch with a vector target count as searched: a place without objects has an empty layer, not none. Where objects were looked
for in parts of a place alone, an ``area`` layer says so, and nothing outside of it is learnt from or scored. Of a raster of instances, the
area is what is valid. Two objects of one class in one pixel are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchmetrics import Metric

from everysat.find import suggest
from everysat.nn.grid import on_grid
from everysat.nn.heads import PixelHead
from everysat.nn.losses import heat_focal
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Encoder, Features, Raster, Task, Vector

_MATCHED = (
    "detections of at least the task's threshold and objects of one place and class are matched one to one, at most match_m apart, so that "
    "as many as possible are matched and, of such, the sum of distances is least (Hungarian algorithm)"
)
DEFINITIONS = {
    "precision": f"matched / detections; {_MATCHED}; 0 without detections",
    "recall": f"matched / objects; {_MATCHED}; 0 without objects",
    "f1": f"2 matched / (detections + objects) over all places and classes together; {_MATCHED}; 0 where there is neither",
    "count_mae": "mean over the places that were searched of |detections - objects|, classes together; places without objects count",
    "count_rmse": "square root of the mean over the places that were searched of (detections - objects)^2, classes together",
}
"""What each metric of this module means, in full."""

PRIOR = 0.1
"""Confidence that a head begins with everywhere: else the many pixels without an object drown the first steps (Lin et al. 2017)."""


class Detect(Task):
    """See :func:`build`."""

    def __init__(self, head: PixelHead, config: dict[str, Any]) -> None:
        super().__init__()
        self.head, self.config, self.target = head, config, config["target"]
        self.names = tuple(config["classes"] or ("object",))
        bands = [Band(name, 1.0, "probability", range=(0.0, 1.0)) for name in self.names]
        bands += [
            Band(name, 1.0, "m", description="of an object from the centre of its pixel") for name in ("south", "east")
        ]
        self.sensor = Sensor(f"{self.target}-heat", "classes", tuple(bands), source="predicted")

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        values, seen = self.head(self.features(encoder, batch), batch)
        objects, area = self.objects(batch), self._area(batch, *values.shape[2:])
        area = seen if area is None else seen & area
        n, gsd_m = len(self.names), self.head.gsd_m
        heat = heat_map(objects, values.shape[0], n, gsd_m, self.config["sigma_m"], *values.shape[2:])
        row, y, x = _pixels(objects, gsd_m)
        inside = _inside(row, y, x, area)
        wanted = objects[inside, 1:3].to(values) / gsd_m - torch.stack([y, x], 1)[inside] - 0.5
        found = values[row[inside], n:, y[inside], x[inside]]
        terms = {
            "heat": heat_focal(
                values[:, :n].movedim(1, -1)[area], heat.movedim(1, -1)[area], **self.config["loss_options"]
            ),
            "offset": F.l1_loss(found, wanted) if len(wanted) else found.sum() * 0,
        }
        count = values.new_tensor(float(inside.sum()))
        return {"loss": terms["heat"] + self.config["offset_weight"] * terms["offset"], **terms, "objects": count}

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """The heat map: confidence per class, and metres south and east of the centre of its pixel at which an object lies."""
        values, seen = self.head(features, batch)
        n = len(self.names)
        heat = torch.cat([values[:, :n].sigmoid(), values[:, n:].clamp(-0.5, 0.5) * self.head.gsd_m], 1)
        return self.head.raster(self.sensor, heat, seen, features)

    def detect(self, features: Features, batch: Batch | None = None) -> Vector:
        """Detections of a batch, see :func:`peaks`."""
        return self.points(self.predict(features, batch))

    def points(self, heat: Raster) -> Vector:
        """Detections in a heat map, with the task's radius and threshold."""
        return peaks(heat, radius_m=self.config["radius_m"], threshold=self.config["threshold"])

    def objects(self, batch: Batch) -> Tensor:
        """What the target says, float64 [n, 4]: row, metres south, metres east, class."""
        layer = batch.layers.get(self.target)
        if isinstance(layer, Raster):
            return _instances(layer)
        if not isinstance(layer, Vector):
            raise LookupError(
                f"the batch has no layer {self.target!r} of objects; it has {', '.join(batch.layers) or 'none'}. Places without objects "
                "have an empty Vector there"
            )
        classes = self.config["classes"]
        kinds = [_kind(attributes, classes) for attributes in layer.attributes]
        centres = [geometry.centroid for geometry in layer.geometry]
        rows = [
            (row, centre.y, centre.x, kind)
            for row, centre, kind in zip(layer.row.tolist(), centres, kinds, strict=True)
            if kind >= 0
        ]
        return torch.tensor(rows, dtype=torch.float64, device=layer.row.device).reshape(-1, 4)

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``metrics()`` are updated with, float64: detections [n, 5] (row, metres south, metres east, class, confidence) and objects
        [m, 4], after one line (row, nan, nan, -1) for each place that was searched."""
        height, width = prediction.values.shape[2:]
        area = self._area(batch, height, width)
        if area is None:
            area = prediction.valid.new_ones(len(batch), height, width)
        parts = [_table(self.points(prediction), self.names).to(area.device), self.objects(batch)]
        kept = [part[_inside(*_pixels(part, prediction.gsd_m), area)] for part in parts]
        searched = area.flatten(1).any(1).nonzero().double()
        return kept[0], torch.cat([F.pad(F.pad(searched, (0, 2), value=math.nan), (0, 1), value=-1.0), kept[1]])

    def metrics(self) -> Mapping[str, Any]:
        return {name: Matched(name, self.config["match_m"]) for name in DEFINITIONS}

    def _area(self, batch: Batch, height: int, width: int) -> Tensor | None:
        """Where objects were looked for [row, y, x]; None for everywhere."""
        layer = batch.raster(self.config["area"]) if self.config["area"] else batch.layers.get(self.target)
        if not isinstance(layer, Raster):
            return None
        values, valid = on_grid(layer, len(batch), self.head.gsd_m, height, width)
        return valid[:, 0] & (values[:, 0] > 0) if self.config["area"] else valid[:, 0]


class Matched(Metric):
    """One of :data:`DEFINITIONS`, of detections and objects as :meth:`Detect.pairs` gives them."""

    full_state_update = False
    SCORES: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
        "precision": lambda s: s["hits"] / s["found"].clamp(min=1),
        "recall": lambda s: s["hits"] / s["real"].clamp(min=1),
        "f1": lambda s: 2 * s["hits"] / (s["found"] + s["real"]).clamp(min=1),
        "count_mae": lambda s: s["missed_by"] / s["places"].clamp(min=1),
        "count_rmse": lambda s: (s["missed_by_squared"] / s["places"].clamp(min=1)).sqrt(),
    }
    COUNTS = ("hits", "found", "real", "missed_by", "missed_by_squared", "places")

    def __init__(self, score: str, match_m: float) -> None:
        super().__init__()
        self.score, self.match_m = score, match_m
        for name in self.COUNTS:
            self.add_state(name, torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, real: Tensor) -> None:
        searched = real[real[:, 3] < 0, 0]
        for row in searched.tolist():
            mine, true = found[found[:, 0] == row], real[(real[:, 0] == row) & (real[:, 3] >= 0)]
            hits = sum(
                len(matching(mine[mine[:, 3] == kind, 1:3], true[true[:, 3] == kind, 1:3], self.match_m)[0])
                for kind in true[:, 3].unique().tolist()
            )
            off = len(mine) - len(true)
            for name, value in zip(self.COUNTS, (hits, len(mine), len(true), abs(off), off * off, 1), strict=True):
                setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        return self.SCORES[self.score]({name: getattr(self, name) for name in self.COUNTS})


def build(
    variant: str = "pixel",
    *,
    encoder: Encoder,
    sigma_m: float,
    gsd_m: float,
    token_size_m: float,
    classes: Sequence[str] | None = None,
    radius_m: float | None = None,
    threshold: float = 0.3,
    match_m: float | None = None,
    target: str = "label",
    area: str = "",
    head: str = "norm",
    offset_weight: float = 1.0,
    loss_options: Mapping[str, Any] | None = None,
    local: Sequence[str] = (),
) -> Detect:
    """A detector on ``encoder``.

    Args:
        sigma_m: standard deviation of an object's Gaussian in the heat map, metres; about a third of its radius.
        gsd_m, token_size_m: pixel of the heat map and side of the encoder's tokens, metres.
        classes: names, as the attribute ``class`` of geometries says them; others are not looked for. By default one class, of all.
        radius_m: detections of a class are farther than this apart, along one of the axes; by default twice ``sigma_m``.
        threshold: least confidence of a detection. match_m: how far from an object it may lie to be right; by default ``radius_m``.
        target: name of the layer of objects. area: name of a raster layer that is above 0 where objects were looked for.
        head, local: as for classification. offset_weight: of the mean absolute error of positions in their pixels, in pixels.
        loss_options: ``alpha`` and ``beta`` of :func:`everysat.nn.losses.heat_focal`.

    Raises:
        ValueError, LookupError: the options do not fit together; the message says which.
    """
    if variant not in ("", "pixel"):
        raise LookupError(f"detect has no variant {variant!r}. {suggest(variant, ['pixel'])}")
    radius_m = 2 * sigma_m if radius_m is None else radius_m
    match_m = radius_m if match_m is None else match_m
    for name, value in {"sigma_m": sigma_m, "radius_m": radius_m, "match_m": match_m}.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive (metres)")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must lie between 0 and 1")
    if not offset_weight > 0:
        raise ValueError(f"offset_weight={offset_weight} must be positive")
    if classes is not None and (isinstance(classes, str) or not classes or len(set(classes)) < len(classes)):
        raise ValueError(f"classes={classes!r} must be different names, or left out for one class of all objects")
    taken = heat_focal.__kwdefaults__ or {}
    for option in loss_options or {}:
        if option not in taken:
            raise TypeError(
                f"loss_options: the loss of heat maps takes no option {option!r}; it takes {', '.join(taken)}"
            )
    config = {
        "variant": "pixel", "sigma_m": sigma_m, "gsd_m": gsd_m, "token_size_m": token_size_m,
        "classes": None if classes is None else list(classes), "radius_m": radius_m, "threshold": threshold, "match_m": match_m,
        "target": target, "area": area, "head": head, "offset_weight": offset_weight, "loss_options": dict(loss_options or {}),
        "local": list(local),
    }  # fmt: skip
    n = len(classes or "1")
    chosen = PixelHead(head, encoder, n + 2, token_size_m=token_size_m, gsd_m=gsd_m, local=local)
    last = [m for m in chosen.head.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.bias.view(n + 2, -1)[:n] = math.log(PRIOR / (1 - PRIOR))
    return Detect(chosen, config)


def heat_map(objects: Tensor, rows: int, classes: int, gsd_m: float, sigma_m: float, height: int, width: int) -> Tensor:
    """The ideal heat map [row, class, y, x] of ``objects`` [n, 4] (row, metres south, metres east, class): 1 in the pixel that holds one,
    exp(-d^2 / 2 sigma^2) at a distance d from that pixel's centre, the largest of all objects of the class. What lies outside is left out."""
    row, y, x = _pixels(objects, gsd_m)
    heat = torch.zeros(rows, classes, height, width, device=objects.device)
    reach = math.ceil(4 * sigma_m / gsd_m)
    step = torch.arange(-reach, reach + 1, device=objects.device)
    bell = torch.exp(-0.5 * (step * (gsd_m / sigma_m)).square())
    inside = (row >= 0) & (row < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row, y, x, kind = (each[inside, None, None] for each in (row, y, x, objects[:, 3].long()))
    at_y, at_x = y + step[:, None], x + step
    there = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
    cell = (((row * classes + kind) * height + at_y) * width + at_x)[there]
    value = (bell[:, None] * bell).float().expand(there.shape)[there]
    return heat.view(-1).scatter_reduce(0, cell, value, "amax").view_as(heat)


def peaks(heat: Raster, *, radius_m: float, threshold: float) -> Vector:
    """Points where a band of ``heat`` is at least ``threshold`` and the largest within ``radius_m`` along both axes, among what is valid; of
    equal ones the first from the north-west. Bands ``south`` and ``east``, when there are any, say how far from the centre of its pixel each
    lies, in metres.

    Attributes are ``class``, the name of the band, and ``confidence``, its value.
    """
    from shapely import Point

    names = heat.sensor.names
    shift = [names.index(name) for name in ("south", "east")] if {"south", "east"} <= set(names) else []
    bands = [i for i in range(len(names)) if i not in shift]
    values = torch.where(heat.valid[:, bands], heat.values[:, bands], -torch.inf).float()
    reach = math.floor(radius_m / heat.gsd_m + 1e-6)
    _, largest = F.max_pool2d(values, 2 * reach + 1, 1, reach, return_indices=True)
    own = torch.arange(values.shape[2] * values.shape[3], device=values.device).view(values.shape[2:])
    obs, kind, y, x = ((largest == own) & (values >= threshold)).nonzero().unbind(1)
    at_m = (torch.stack([y, x], 1) + 0.5) * heat.gsd_m
    if shift:
        at_m = at_m + heat.values[obs[:, None], torch.tensor(shift, device=obs.device), y[:, None], x[:, None]]
    confidence = values[obs, kind, y, x].tolist()
    attributes = tuple(
        {"class": names[bands[k]], "confidence": c} for k, c in zip(kind.tolist(), confidence, strict=True)
    )
    points = tuple(Point(east, south) for south, east in at_m.tolist())
    return Vector(points, attributes, heat.time_s[obs], heat.row[obs])


def matching(found: Tensor, real: Tensor, match_m: float) -> tuple[Tensor, Tensor]:
    """Indices of detections [n, 2] and of the objects [m, 2] that they are matched with (metres): at most ``match_m`` apart, as many as
    possible, and of such matchings the one with the least sum of distances."""
    distance = torch.cdist(found.double(), real.double()).cpu()
    near = distance <= match_m
    never = (1 + min(distance.shape)) * (1 + match_m)  # more than all matches together can cost
    first, second = linear_sum_assignment(torch.where(near, distance, never).numpy())
    kept = near[first, second]
    return torch.as_tensor(first)[kept], torch.as_tensor(second)[kept]


def _kind(attributes: Mapping[str, Any], classes: Sequence[str] | None) -> int:
    """Number of the class, -1 for one that is not looked for."""
    if classes is None:
        return 0
    if "class" not in attributes:
        raise LookupError(
            f"an object has no attribute 'class' but {', '.join(attributes) or 'none'}; leave classes out for one class of all"
        )
    return classes.index(attributes["class"]) if attributes["class"] in classes else -1


def _instances(layer: Raster) -> Tensor:
    """Centroids of the pixels of each number above 0 of each place, [n, 4] as :meth:`Detect.objects`."""
    if len(layer.row.unique()) < len(layer.row):
        raise ValueError("the target has several maps of instances of one place; select those of one date")
    obs, y, x = ((layer.values[:, 0] > 0) & layer.valid[:, 0]).nonzero().unbind(1)
    number = layer.values[obs, 0, y, x].round().long()
    _, which = torch.unique(torch.stack([layer.row[obs], number]), dim=1, return_inverse=True)
    each = torch.stack([layer.row[obs], y, x], 1).double()
    count = torch.bincount(which)
    mean = each.new_zeros(len(count), 3).index_add(0, which, each) / count[:, None]
    return torch.cat([mean[:, :1], (mean[:, 1:] + 0.5) * layer.gsd_m, torch.zeros_like(mean[:, :1])], 1)


def _table(points: Vector, names: Sequence[str]) -> Tensor:
    """Detections as [n, 5]: row, metres south, metres east, class, confidence."""
    rows = [
        (row, point.y, point.x, names.index(attributes["class"]), attributes["confidence"])
        for row, point, attributes in zip(points.row.tolist(), points.geometry, points.attributes, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)


def _pixels(objects: Tensor, gsd_m: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row, and y and x of the pixel, of each object."""
    y, x = (objects[:, 1:3] / gsd_m).floor().long().unbind(1)
    return objects[:, 0].long(), y, x


def _inside(row: Tensor, y: Tensor, x: Tensor, area: Tensor) -> Tensor:
    """Which pixels lie in the image and in its ``area`` [row, y, x]."""
    rows, height, width = area.shape
    there = (row < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return there & area[row.clamp(max=rows - 1), y.clamp(0, height - 1), x.clamp(0, width - 1)]
