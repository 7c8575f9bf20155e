"""SatCLIP (Klemmer et al., AAAI 2025, arXiv:2311.17179): where a place lies, as Sentinel-2 images of such places tell it apart.

Spherical harmonics of the position, read by a sinusoidal network that was trained against images (MIT, microsoft/satclip). The image
encoder is not part of this. ``l10`` knows climates and continents, ``l40`` about 500 km across.

Published weights are six checkpoints (``satclip-resnet18-l10.ckpt`` ...) that hold image encoders too: ``everysat convert satclip/l40 FILE``
takes the location encoder. None was at hand here: the key map follows the public code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from everysat.find import suggest
from everysat.nn.location import LocationEncoder, Siren, spherical_harmonics

Quirk = Literal["zonal_pi"]
"""``zonal_pi``: harmonics of order 0 are pi times too large, as the formulas that the published code generates have them."""


class Config(BaseModel):
    """Sizes of a :class:`SatClip`.

    Attributes:
        degrees: of spherical harmonics, counted from 0 (the L of the paper): the network reads their square.
        calculation: the published code has two: ``analytic``, and ``closed-form``, in which odd orders have the other sign.
        width, hidden: of the network, and its layers but the last.
        dropout: before each sine, in training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    degrees: PositiveInt = 40
    calculation: Literal["analytic", "closed-form"] = "analytic"
    dim: PositiveInt = 256
    width: PositiveInt = 512
    hidden: PositiveInt = 2
    dropout: float = 0.5
    quirks: tuple[Quirk, ...] = ()


class SatClip(LocationEncoder):
    """See the module's text."""

    family = "satclip"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.config, self.dim = config, config.model_dump(mode="json"), config.dim
        self.siren = Siren(config.degrees**2, config.width, config.dim, config.hidden, dropout=config.dropout)

    def code(self, lonlat: Tensor) -> Tensor:
        """Harmonics [n, degrees^2] of the direction that the published code takes for a position: angles are longitude + 180 degrees
        and latitude + 90 degrees from the pole, so that north and south change places."""
        lon, lat = lonlat.unbind(-1)
        found = spherical_harmonics(torch.stack([lon + 180, -lat], -1), self.settings.degrees)
        orders = [order for degree in range(self.settings.degrees) for order in range(-degree, degree + 1)]
        order = torch.tensor(orders, device=found.device)
        if self.settings.calculation == "closed-form":
            found = torch.where(order % 2 == 1, -found, found)
        elif "zonal_pi" in self.settings.quirks:
            found = torch.where(order == 0, torch.pi * found, found)
        return found.to(next(self.parameters()).dtype)

    def network(self, code: Tensor) -> Tensor:
        found: Tensor = self.siren(code)
        return found


VARIANTS: dict[str, dict[str, Any]] = {
    "l10": {"degrees": 10},
    "l40": {},
    "nano": {"degrees": 5, "dim": 16, "width": 24},
}
"""``l10`` and ``l40`` have the sizes of the published weights, ``width`` and ``hidden`` after what loads them elsewhere; other widths
are a change of ``width``. ``nano`` is for tests."""

PUBLISHED: dict[str, Any] = {"quirks": ("zonal_pi",)}
"""What the config of converted weights says beside the variant."""


def build(variant: str = "l40", **changes: Any) -> SatClip:
    """A fresh SatCLIP location encoder: one of :data:`VARIANTS`, with fields of :class:`Config` changed."""
    if variant and variant not in VARIANTS:
        raise LookupError(f"satclip has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    return from_config({**VARIANTS.get(variant, {}), **changes})


def from_config(config: Mapping[str, Any]) -> SatClip:
    return SatClip(Config.model_validate(dict(config)))


DROPPED = {
    r"^model\.visual\.": "the image encoder, which is not part of this model",
    r"^model\.logit_scale$": "temperature of the loss",
    r"^model\.nnet\.": "the tensors of model.location.nnet a second time",
}
"""Keys of published weights that have no counterpart here, by pattern, and why."""

_KEY = re.compile(r"^(?:model\.)?(?:location\.)?nnet\.(?:layers\.(\d+)|last_layer)\.(weight|bias)$")


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the published ``SirenNet`` under the names used here; double precision becomes single. Keys that are none of its are
    kept as they are, so that they are noticed."""
    out = {}
    for key, value in state.items():
        found = _KEY.match(key)
        number = None if found is None else found[1] or config["hidden"]
        out[key if found is None else f"siren.layers.{number}.{found[2]}"] = value.float()
    return out
