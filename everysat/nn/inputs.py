"""What the config of a model says about one of its input layers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from everysat import sensors
from everysat.types import Input


class InputConfig(BaseModel):
    """Bands, pixel size and statistics of an input layer.

    ``sensor`` is a name, or a table as in ``everysat/sensors/*.toml`` with a ``name``. ``mean`` and ``std`` are per band, in the
    band's unit. Day numbers of its dates count from ``origin`` (an ISO date) or are days of the year.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sensor: str | dict[str, Any]
    bands: tuple[str, ...]
    gsd_m: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    period_days: float = 367.0
    origin: str | None = None

    def input(self, *, dated: bool) -> Input:
        """The band contract; without statistics, values are taken as they come."""
        table = dict(self.sensor) if isinstance(self.sensor, dict) else None
        sensor = sensors.get(str(self.sensor)) if table is None else sensors.from_table(table.pop("name"), table)
        count = len(self.bands)
        mean, std = self.mean or (0.0,) * count, self.std or (1.0,) * count
        return Input(sensor.select(self.bands), self.gsd_m, mean, std, dated=dated)

    @property
    def origin_s(self) -> float | None:
        return None if self.origin is None else datetime.fromisoformat(self.origin).replace(tzinfo=UTC).timestamp()


def described(wanted: Input) -> dict[str, Any]:
    """The fields of an :class:`InputConfig` that say the same as an input contract."""
    known = wanted.sensor.name in sensors.names()
    sensor = wanted.sensor.name if known else {**sensors.to_table(wanted.sensor), "name": wanted.sensor.name}
    facts = {"sensor": sensor, "gsd_m": wanted.gsd_m, "bands": list(wanted.sensor.names)}
    return {**facts, "mean": list(wanted.mean), "std": list(wanted.std)}


class AnyInput(InputConfig):
    """A layer that the contract of a model for any sensor lists. ``dated``: its observations have dates. Bands and pixel size may
    differ at a call."""

    dated: bool = False
