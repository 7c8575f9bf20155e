"""Check of the fixture of the published Scale-MAE."""

from __future__ import annotations

from collections.abc import Callable

from golden_fixture import Fixture, close

from everysat.models import scalemae
from everysat.types import Batch, Place, Raster


def check(fixture: Fixture) -> None:
    for number, gsd_m in enumerate(fixture.facts["gsd_m"]):
        case = fixture.group(f"case{number}.")
        values = case["in.x"]
        plain = {**scalemae.PUBLISHED_COLOURS, "gsd_m": gsd_m, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        config = {**fixture.facts["config"], "modalities": {"x": plain}}
        model = scalemae.from_config(config).eval()
        model.load_state_dict(scalemae.convert(fixture.weights, config))
        side = values.shape[-1] * gsd_m
        raster = Raster.of(model.inputs["x"].sensor, values, gsd_m)
        features = model.embed(Batch((Place(side, side),), {"x": raster}))
        close(features.summary, case["out.summary"], f"summary at {gsd_m} m")
        close(features.mean, case["out.tokens"], f"patches at {gsd_m} m")


CHECKS: dict[str, Callable[[Fixture], None]] = {"scalemae": check}
