"""Check of the fixture of the published UT&T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_fixture import Fixture, close
from golden_utae import GSD_M, plain_layer, series

from everysat.models import utt
from everysat.types import Batch, Place, Raster


def config(fixture: Fixture) -> dict[str, Any]:
    """The config of the fixture: an image and a series of the same ground."""
    image, values = fixture.io["in.image"], fixture.io["in.series"]
    side = values.shape[-1] * GSD_M
    modalities = {
        "image": {**plain_layer(image.shape[1], side / image.shape[-1]), "role": "image"},
        "series": plain_layer(values.shape[2]),
    }
    return {**fixture.facts["config"], "modalities": modalities, **utt.PUBLISHED}


def check(fixture: Fixture) -> None:
    image, values, days = (fixture.io[f"in.{name}"] for name in ("image", "series", "days"))
    model = utt.from_config(config(fixture)).eval()
    model.load_state_dict(utt.convert(fixture.weights, model.config))
    side = values.shape[-1] * GSD_M
    layers = {
        "image": Raster.of(model.inputs["image"].sensor, image, side / image.shape[-1]),
        "series": series(model.inputs["series"], values, -days, torch.arange(values.shape[1]).flip(0)),
    }
    features = model.embed(Batch((Place(side, side),), layers))
    close(features.grid(), fixture.io["out.features"], "features")


CHECKS: dict[str, Callable[[Fixture], None]] = {"utt": check}
