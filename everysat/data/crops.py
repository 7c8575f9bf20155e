"""Squares cut from places that are in memory, of several sizes or from several sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everysat.data.augment import crop
from everysat.types import Batch


@dataclass(frozen=True)
class Crops:
    """Squares of ``tile_m`` at every ``stride_m`` of ``places``, batches of one; what is left at the south and east edge and makes
    no whole square is not used. Both sides must be multiples of the pixels of all layers."""

    places: Sequence[Batch]
    tile_m: float
    stride_m: float

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"no place has room for a square of tile_m={self.tile_m:g}")

    def __len__(self) -> int:
        return sum(len(self._corners(place)) for place in self.places)

    def __getitem__(self, index: int) -> Batch:
        for place in self.places:
            corners = self._corners(place)
            if 0 <= index < len(corners):
                return crop(place, *corners[index], self.tile_m, self.tile_m)
            index -= len(corners)
        raise IndexError(f"index is outside a dataset of {len(self)} squares")

    def _corners(self, batch: Batch) -> list[tuple[float, float]]:
        place = batch.places[0]
        sides = (
            [i * self.stride_m for i in range(int((m - self.tile_m) / self.stride_m + 1e-6) + 1)]
            if m >= self.tile_m
            else []
            for m in (place.height_m, place.width_m)
        )
        south, east = sides
        return [(s, e) for s in south for e in east]
