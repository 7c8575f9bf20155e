"""A toolkit for Earth observation: pre-train, fine-tune, embed and map with any mix of sensors.

The public names are imported on first use, so that ``import everysat`` costs little and torch is loaded only when needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Batch": "types", "ContractError": "types", "Coords": "types", "Encoder": "types", "Features": "types", "Input": "types",
    "Objective": "types", "Place": "types", "Raster": "types", "Task": "types", "Text": "types", "Tokens": "types", "Vector": "types",
    "Band": "sensors", "Sensor": "sensors",
    "load": "models.weights", "save": "models.weights",
    "read": "io.read", "place": "io.read", "places": "io.fields", "read_each": "io.fields",
    "write": "io.write",
    "Recipe": "recipe",
    "data": "",
}  # fmt: skip
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'everysat' has no attribute {name!r}")
    if not _WHERE[name]:  # a package that can be called: everysat.data("pastis-hd", ...) beside everysat.data.pastis
        return importlib.import_module(f"everysat.{name}")
    value = getattr(importlib.import_module(f"everysat.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


if TYPE_CHECKING:
    from everysat.sensors import Band as Band
    from everysat.sensors import Sensor as Sensor
    from everysat.types import Batch as Batch
    from everysat.types import ContractError as ContractError
    from everysat.types import Encoder as Encoder
    from everysat.types import Features as Features
    from everysat.types import Place as Place
    from everysat.types import Raster as Raster
