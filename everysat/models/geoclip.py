"""GeoCLIP (Vivanco Cepeda et al., NeurIPS 2023, arXiv:2309.16020): where a place lies, as photographs taken there tell it apart.

The position in the Equal Earth projection, in random Fourier features of three scales, each read by a network of its own; the sum was trained
against photographs of the whole world. Trained weights of this location encoder are in the Python package ``geoclip`` (MIT), which need
not be installed: ``everysat convert geoclip/base location_encoder_weights.pth`` reads the file out of its wheel, version 1.3.0, from
``geoclip/model/weights``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from everysat.find import suggest
from everysat.nn.location import Fourier, LocationEncoder, equal_earth

SCALE = 66.50336 / 180
"""Units of the projected position per radius of the Earth."""


class Config(BaseModel):
    """Sizes of a :class:`GeoClip`: ``sigmas`` are the scales of the Fourier features, ``features`` how many frequencies each has, ``width``
    and ``hidden`` those of the networks."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sigmas: tuple[float, ...] = (1.0, 16.0, 256.0)
    features: PositiveInt = 256
    dim: PositiveInt = 512
    width: PositiveInt = 1024
    hidden: PositiveInt = 3


class GeoClip(LocationEncoder):
    """See the module's text."""

    family = "geoclip"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.config, self.dim = config, config.model_dump(mode="json"), config.dim
        self.scales = nn.ModuleList(_scale(config, sigma) for sigma in config.sigmas)

    def code(self, lonlat: Tensor) -> Tensor:
        """Projected positions, float64 [n, 2]: they stay in double precision up to the sines."""
        return equal_earth(lonlat) * SCALE

    def network(self, code: Tensor) -> Tensor:
        total = code.new_zeros(len(code), self.dim, dtype=next(self.parameters()).dtype)
        for scale in self.scales:
            total = total + scale(code)
        return total


def _scale(config: Config, sigma: float) -> nn.Sequential:
    """Fourier features and the network that reads them."""
    sizes = [2 * config.features, *[config.width] * config.hidden]
    layers: list[nn.Module] = [Fourier(2, config.features, sigma)]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], config.dim))


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "nano": {"sigmas": (1.0, 4.0), "features": 8, "dim": 16, "width": 24, "hidden": 2},
}
"""``base`` has the sizes of the published weights; ``nano`` is for tests."""


def build(variant: str = "base", **changes: Any) -> GeoClip:
    """A fresh GeoCLIP location encoder: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"geoclip has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def from_config(config: Mapping[str, Any]) -> GeoClip:
    return GeoClip(Config.model_validate(dict(config)))


_RENAMES = (
    (r"^LocEnc(\d+)\.capsule\.0\.b$", r"scales.\1.0.matrix"),
    (r"^LocEnc(\d+)\.capsule\.", r"scales.\1."),
)


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``LocationEncoder`` under the names used here."""
    out, last = {}, 2 * config["hidden"] + 1
    for key, value in state.items():
        for pattern, new in (*_RENAMES, (r"^LocEnc(\d+)\.head\.0\.", rf"scales.\g<1>.{last}.")):
            key = re.sub(pattern, new, key)
        out[key] = value
    return out
