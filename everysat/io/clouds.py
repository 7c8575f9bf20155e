"""Which codes of the quality layers that products come with mean that the ground was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from everysat.io.scene import Clear


@dataclass(frozen=True)
class NoneOf:
    """Clear where none of these bits, counted from 0, is set."""

    bits: tuple[int, ...]

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        return (codes & sum(1 << bit for bit in self.bits)) == 0


CLEAR: Mapping[str, Clear] = {
    # Dark areas are shadows of mountains or soil as often as of clouds, which have a code of their own; snow is ground.
    "sentinel-2-scl": (2, 4, 5, 6, 7, 11),
    "landsat-qa-pixel": NoneOf((0, 1, 2, 3, 4)),  # fill, dilated cloud, cirrus, cloud, cloud shadow
    "hls-fmask": NoneOf((1, 2, 3)),  # cloud, next to cloud or shadow, cloud shadow
}
"""By sensor table."""
