"""Places as they come in practice: some of their layers are missing, or full of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from everysat.data.batches import Dataset
from everysat.nn.draws import generator
from everysat.types import Batch, Raster

HOW = ("missing", "noise")


class Disturbed:
    """A dataset of whose places some layers are disturbed with a chance of ``share``, each by a draw of its own, which is always the same.

    Args:
        how: ``missing``: the layer is left out; one at random stays where all would be. ``noise``: normal noise is added to every value,
            ``deviations`` times as wide as ``std`` of its band.
        std: of each layer that may be disturbed, one number per band.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        share: float,
        how: Literal["missing", "noise"],
        std: Mapping[str, tuple[float, ...]],
        deviations: float = 3.0,
        seed: int = 0,
    ) -> None:
        if not 0 < share <= 1 or how not in HOW or not deviations > 0:
            raise ValueError(
                f"share={share} must be above 0 and at most 1, how={how!r} one of {', '.join(HOW)}, deviations={deviations} positive"
            )
        self.dataset, self.share, self.how = dataset, share, how
        self.std, self.deviations, self.seed = dict(std), deviations, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        place = self.dataset[index]
        names = [name for name in sorted(self.std) if name in place.layers]
        drawn = {name: float(torch.rand((), generator=generator(self.seed, index, name, "chance"))) for name in names}
        hit = [name for name in names if drawn[name] < self.share]
        if self.how == "missing":
            stays = max(hit, key=drawn.__getitem__) if hit and len(hit) == len(names) else None
            return place.without(*(name for name in hit if name != stays))
        return place.adding(**{name: self._noisy(place.raster(name), name, index) for name in hit})

    def _noisy(self, layer: Raster, name: str, index: int) -> Raster:
        width = layer.values.new_tensor(self.std[name])[None, :, None, None] * self.deviations
        noise = torch.randn(layer.values.shape, generator=generator(self.seed, index, name, "noise"))
        return replace(layer, values=torch.where(layer.valid, layer.values + width * noise, layer.values))

    def __getattr__(self, name: str) -> Any:
        if name != "fingerprint":  # which a dataset may have; a copy has nothing yet
            raise AttributeError(name)
        known = self.dataset.fingerprint  # type: ignore[attr-defined]
        return lambda: f"{known()} {self.how} {self.share} {self.deviations} {self.seed} {','.join(sorted(self.std))}"
