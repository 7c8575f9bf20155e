"""Check of the fixture of the published U-TAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_fixture import Fixture, close
from torch import Tensor

from everysat.models import utae
from everysat.types import Batch, Place, Raster

GSD_M = 10.0


def plain_layer(bands: int, gsd_m: float = GSD_M) -> dict[str, Any]:
    """A layer of bands without meaning, whose values are taken as they come."""
    names = [f"b{i}" for i in range(bands)]
    table = {
        "name": "fixture",
        "kind": "optical",
        "source": "fixture",
        "defaults": {"gsd_m": gsd_m, "unit": "DN"},
        "bands": [{"name": name} for name in names],
    }
    statistics = {"mean": [0.0] * bands, "std": [1.0] * bands}
    return {"sensor": table, "bands": names, "gsd_m": gsd_m, "origin": "1970-01-01", **statistics}


def series(wanted: Any, values: Tensor, days: Tensor, order: Tensor) -> Raster:
    """Values [place, date, band, y, x] at day numbers, observations in this order."""
    places, dates = values.shape[:2]
    row = torch.arange(places).repeat_interleave(dates)[order]
    time_s = (days.double().flatten()[:, None] * 86400.0).expand(-1, 2)[order]
    flat = values.flatten(0, 1)[order]
    return Raster(wanted.sensor, flat, torch.ones_like(flat, dtype=torch.bool), time_s, row, wanted.gsd_m)


def check(fixture: Fixture) -> None:
    values, days = fixture.io["in.x"], fixture.io["in.days"]
    config = {"modalities": {"x": plain_layer(values.shape[2])}, **fixture.facts["config"]}
    model = utae.from_config(config).eval()
    model.load_state_dict(utae.convert(fixture.weights, config))
    places, dates = values.shape[:2]
    order = torch.randperm(places * dates, generator=torch.Generator().manual_seed(0))
    side = values.shape[-1] * GSD_M
    batch = Batch((Place(side, side),) * places, {"x": series(model.inputs["x"], values, days, order)})
    with torch.no_grad():
        tokens = model.tokenize(batch)
        deep = fixture.io["mid.deep"].permute(0, 2, 3, 1).flatten(0, 2)
        close(tokens.x, deep, "vectors of the lowest level")
        close(model(tokens).grid(), fixture.io["out.features"], "features")


CHECKS: dict[str, Callable[[Fixture], None]] = {"utae": check}
