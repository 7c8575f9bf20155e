"""Check of the fixtures of the published DOFA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_fixture import Fixture, close

from everysat.models import dofa
from everysat.types import Batch, Place, Raster

GSD_M = 10.0


def layer(waves: list[float]) -> dict[str, Any]:
    """Bands of these wavelengths; those of 3.75 are of Sentinel-1, whose table says no wavelength."""
    radar = round(waves[0], 4) == 3.75
    names = [f"b{i}" for i in range(len(waves))]
    bands = [
        {"name": n, "polarisation": p} if radar else {"name": n, "wavelength_um": w}
        for n, w, p in zip(names, waves, ("VV", "VH", "HH")[: len(waves)], strict=True)
    ]
    table = {
        "name": "sentinel-1-fixture" if radar else "fixture",
        "kind": "sar" if radar else "optical",
        "source": "fixture",
        "defaults": {"gsd_m": GSD_M, "unit": "DN"},
        "bands": bands,
    }
    plain = {"mean": [0.0] * len(waves), "std": [1.0] * len(waves)}
    return {"sensor": table, "bands": names, "gsd_m": GSD_M, **plain}


def check(fixture: Fixture) -> None:
    for number in range(fixture.facts["cases"]):
        case = fixture.group(f"case{number}.")
        values, facts = case["in.x"], fixture.facts["config"]
        side = values.shape[-1] * GSD_M
        config = {
            **facts,
            "patch_m": facts["patch"] * GSD_M,
            "quirks": fixture.facts["quirks"],
            "modalities": {"x": layer(case["in.waves"].tolist())},
        }
        model = dofa.from_config(config).eval()
        close(model.position, fixture.weights["pos_embed"], "position table")
        model.load_state_dict(dofa.convert(fixture.weights, config))
        raster = Raster.of(model.inputs["x"].sensor, values[:1], GSD_M)
        features = model.embed(Batch((Place(side, side),), {"x": raster}))
        close(features.summary, case["out.summary"], f"summary of case {number}")
        close(features.mean, case["out.tokens"][0], f"patches of case {number}")
        assert torch.equal(features.coords.row, torch.zeros(len(features.mean), dtype=torch.long))


CHECKS: dict[str, Callable[[Fixture], None]] = {"dofa": check}
