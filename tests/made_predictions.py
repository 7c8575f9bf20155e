"""Tasks of every kind, and predictions and labels made for them at random, parts of both invalid."""

from __future__ import annotations

import torch
from shapely import Point
from simple_encoder import SquareEncoder, image_batch, label_raster

from everysat.sensors import Band, Sensor
from everysat.tasks import change, classify, detect, regress
from everysat.types import ALWAYS, Batch, Raster, Task, Vector

CODES = (10, 20, 30, 40)
PIXEL = {"gsd_m": 10.0, "token_size_m": 20.0}
HEIGHT = Sensor("heights", "terrain", (Band("height", 10, "m"), Band("depth", 10, "m")), "made for tests")


def tasks() -> dict[str, Task]:
    encoder = SquareEncoder()
    return {
        "classify": classify.build("pixel", encoder=encoder, classes={c: f"class {c}" for c in CODES}, **PIXEL),
        "several": classify.build("pixel", encoder=encoder, classes=list("abcd"), multilabel=True, **PIXEL),
        "regress": regress.build("pixel", encoder=encoder, bands=HEIGHT, **PIXEL),
        "change": change.build("pixel", encoder=encoder, classes=["same", "lost", "gained"], **PIXEL),
        "detect": detect.build("pixel", encoder=encoder, sigma_m=8.0, **PIXEL),
    }


def made(name: str, task: Task, seed: int, rows: int = 3, side: int = 4, kinds: int = 4) -> tuple[Raster, Batch]:
    """A prediction of random values and a batch of random labels, parts of both invalid; ``kinds``: how many classes occur."""
    g = torch.Generator().manual_seed(seed)
    n = len(task.sensor.bands)
    values = torch.rand(rows, n, side, side, generator=g)
    if name in ("classify", "change"):
        values = values.softmax(1)
    seen = (torch.rand(rows, 1, side, side, generator=g) > 0.2).expand(-1, n, -1, -1)
    batch = image_batch(torch.zeros(rows, 2, side, side))
    if name == "detect":
        points = [
            (int(torch.randint(rows, (), generator=g)), *(10 * side * torch.rand(2, generator=g)).tolist())
            for _ in range(5)
        ]
        times = torch.tensor([ALWAYS] * len(points), dtype=torch.float64)
        label = Vector(
            tuple(Point(p[1:]) for p in points), ({},) * len(points), times, torch.tensor([p[0] for p in points])
        )
    else:
        shape = (rows, {"several": 4, "regress": 2}.get(name, 1), side, side)
        codes = torch.randint(kinds, shape, generator=g)
        if name == "several":
            codes = (torch.rand(shape, generator=g) > 0.6) & (torch.arange(4) < kinds)[:, None, None]
        elif name == "regress":
            codes = torch.rand(shape, generator=g) * 30
        elif name == "classify":
            codes = torch.tensor([*CODES, 99])[torch.where(torch.rand(shape, generator=g) > 0.1, codes, 4)]
        else:
            codes = codes.clamp(max=2)
        valid = (torch.rand(rows, 1, side, side, generator=g) > 0.3).expand(shape)
        label = label_raster(codes, 10.0, valid, tuple(HEIGHT.names) if name == "regress" else ())
        if name == "regress":
            label = Raster(HEIGHT, label.values, label.valid, label.time_s, label.row, 10.0)
    like = label_raster(torch.zeros(rows, n, side, side), 10.0)
    return Raster(task.sensor, values, seen, like.time_s, like.row, 10.0), batch.adding(label=label)
