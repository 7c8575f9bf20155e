"""Regression of places or of pixels: every band of the target layer is predicted, in its physical unit.

Training sees the target less ``mean`` over ``std`` per band; predictions and metrics are in the band's unit. Places: one pixel
per place. What is not ``valid`` is ignored by loss and metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchmetrics.regression as tm
from torch import Tensor

from everysat.nn.heads import PixelHead, PlaceHead, aligned, build_head
from everysat.nn.losses import loss
from everysat.sensors import Sensor, from_table
from everysat.sensors import get as get_sensor
from everysat.types import Batch, Encoder, Features, Raster, Task

DEFINITIONS = {
    "rmse": "square root of the mean squared error over all labelled pixels or places and bands, in the target's unit",
    "mae": "mean absolute error over all labelled pixels or places and bands, in the target's unit",
    "r2": "1 - sum of squared errors / sum of squared deviations from the mean label, over all labelled values together",
}
"""What each metric of this module means, in full."""


class Regress(Task):
    """See :func:`build`."""

    mean: Tensor
    std: Tensor

    def __init__(self, head: PlaceHead | PixelHead, sensor: Sensor, config: dict[str, Any]) -> None:
        super().__init__()
        self.head, self.sensor, self.config = head, sensor, config
        self.target = config["target"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name], dtype=torch.float32), persistent=False)
        self.loss = loss(config["loss"], **config["loss_options"])

    def forward(self, encoder: Encoder, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        values, seen = self.head(self.features(encoder, batch), batch)
        predicted, truth, band = self._labelled(values, seen, batch)
        return {
            "loss": self.loss(predicted, (truth - self.mean[band]) / self.std[band]),
            "labelled": predicted.new_tensor(float(len(truth))),
        }

    @torch.no_grad()
    def predict(self, features: Features, batch: Batch | None = None) -> Raster:
        """Values in the target's units. ``batch`` is needed by heads that read local pixels."""
        values, seen = self.head(features, batch)
        physical = values * self.std[:, None, None] + self.mean[:, None, None]
        return self.head.raster(self.sensor, physical, seen, features)

    def pairs(self, prediction: Raster, batch: Batch) -> tuple[Tensor, Tensor]:
        """What ``metrics()`` are updated with: predicted and labelled values [n], in the target's units."""
        return self._labelled(prediction.values, prediction.valid[:, 0], batch)[:2]

    def metrics(self) -> Mapping[str, Any]:
        return {"rmse": tm.MeanSquaredError(squared=False), "mae": tm.MeanAbsoluteError(), "r2": tm.R2Score()}

    def _labelled(self, values: Tensor, seen: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        target = batch.raster(self.target).select(self.sensor.names)
        values, seen, truth, valid = aligned(values, seen, target)
        keep = valid & seen[:, None]
        return values[keep], truth[keep], keep.nonzero()[:, 1]


def build(
    variant: str = "pixel",
    *,
    encoder: Encoder,
    bands: Sensor | str | Sequence[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    target: str = "label",
    sensor: str | Mapping[str, Any] = "",
    head: str = "norm",
    loss: str = "mse",
    loss_options: Mapping[str, Any] | None = None,
    gsd_m: float | None = None,
    token_size_m: float | None = None,
    local: Sequence[str] = (),
) -> Regress:
    """A regression on ``encoder``.

    Args:
        variant: ``place`` (from the summary) or ``pixel`` (each token gives the pixels that it covers).
        bands: the target's :class:`Sensor`, or names of bands of ``sensor``: a name, or a table as in ``everysat/sensors/*.toml`` with a ``name``.
        mean, std: of the target per band in its unit, from the training labels; 0 and 1 when not given.
        target: name of the layer that holds the labels.
        loss: ``mse`` or ``huber`` (``loss_options={"delta": ...}``), on standardised values.
        head, gsd_m, token_size_m, local: as for classification.

    Raises:
        ValueError, LookupError: the options do not fit together; the message says which.
    """
    variant = variant or "pixel"
    if loss not in ("mse", "huber"):
        raise LookupError(f"loss={loss!r} is none of mse, huber")
    if not isinstance(bands, Sensor):
        if not sensor:
            raise ValueError(f"bands={bands!r} are names: say of which sensor with sensor=...")
        table = dict(sensor) if isinstance(sensor, Mapping) else None
        whole = get_sensor(str(sensor)) if table is None else from_table(table.pop("name"), table)
        bands = whole.select([bands] if isinstance(bands, str) else bands)
    n = len(bands.bands)
    statistics = {"mean": [0.0] * n if mean is None else list(mean), "std": [1.0] * n if std is None else list(std)}
    for name, values in statistics.items():
        if len(values) != n:
            raise ValueError(f"{name} has {len(values)} values for {n} bands")
    if min(statistics["std"]) <= 0:
        raise ValueError(f"std={statistics['std']} must be positive")
    config = {
        "variant": variant, "bands": list(bands.names), "sensor": dict(sensor) if isinstance(sensor, Mapping) else bands.name, "target": target, "head": head, "loss": loss,
        "loss_options": dict(loss_options or {}), "gsd_m": gsd_m, "token_size_m": token_size_m, "local": list(local), **statistics,
    }  # fmt: skip
    chosen = build_head(variant, head, encoder, n, gsd_m=gsd_m, token_size_m=token_size_m, local=local)
    return Regress(chosen, bands, config)
