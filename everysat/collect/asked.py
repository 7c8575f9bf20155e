"""Questions about all places of a dataset whose answers cannot be guessed from the question: those of :mod:`everysat.collect.questions`, balanced over the places.

In a recipe ``name: everysat.collect.asked`` with ``options: {base: ..., features: ...}``. The variant ``berlin`` is the embedded Sentinel-2 scene with its land
use, for which nothing has to be fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from everysat.collect import osm, questions, witnesses
from everysat.collect.inventory import Inventory
from everysat.collect.questions import Question
from everysat.data.batches import Dataset
from everysat.data.scene import Tiles
from everysat.data.split import spatial_blocks
from everysat.find import suggest
from everysat.io import grid
from everysat.nn.draws import stream
from everysat.types import Batch, Vector


@dataclass(frozen=True)
class Asked:
    """See :func:`build`: the places ``index`` of ``base``, and what is asked about each."""

    base: Dataset
    index: tuple[int, ...]
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        return self.base[self.index[index]].adding(**questions.layers(self.questions[index]))


def build(
    variant: str = "",
    *,
    base: str = "",
    options: Mapping[str, Any] | None = None,
    features: str | Path | None = None,
    part: str = "",
    block_m: float | None = None,
    shares: Mapping[str, float] | None = None,
    kinds: Sequence[str] | None = None,
    each: int = 4,
    most: float = 2.0,
    gsd_m: float | None = None,
    licence: str = osm.LICENCE,
    seed: int = 0,
) -> Asked:
    """Places with the layers ``questions``, ``answers`` and ``types``; those about which nothing is asked are left out.

    Args:
        variant, base, options, features, gsd_m, licence: as for :func:`everysat.collect.witnesses.build`.
        part, block_m, shares: one part of a split of a tiled scene by blocks of ground of that side; only tiles that lie in one block. Unlike the same
            options of the base, these let tiles overlap (``stride_m`` below ``tile_m``).
        kinds, each: of these types, at most so many of a type and place, before they are balanced. most: see :func:`everysat.collect.questions.balanced`.
        seed: another one asks other questions, and splits otherwise.

    Raises:
        LookupError, ValueError, FileNotFoundError: an argument is unknown or lacking, or nothing can be asked.
    """
    if (features is None) and variant != "berlin":
        raise ValueError("features is missing: a file of what lies in the places, or take the variant berlin")
    made = witnesses.build(
        variant, base=base, options=options, features=features, modalities=["osm"], gsd_m=gsd_m, licence=licence
    )
    if part:
        made = replace(made, base=_part(made.base, part, block_m, shares, seed))
    seen = [_inventory(made, index) for index in range(len(made))]
    known = questions.vocabulary([things for things in seen if things is not None])
    wanted = tuple(questions.ANSWERS) if kinds is None else tuple(kinds)
    asked = [
        () if things is None else questions.ask(things, seed=f"{seed} {index}", kinds=wanted, each=each, vocabulary=known, licence=licence)
        for index, things in enumerate(seen)
    ]  # fmt: skip
    kept = questions.balanced(asked, seed=seed, most=most)
    index = tuple(i for i, some in enumerate(kept) if some)
    if not index:
        raise ValueError(
            f"nothing can be asked about the {len(made)} places: each answer must be given in some and not in others. Take more places, or other features"
        )
    return Asked(made.base, index, tuple(kept[i] for i in index))


def _inventory(made: witnesses.Witnesses, index: int) -> Inventory | None:
    """What lies in a place; None where nothing is mapped, of which nothing is known."""
    batch = made[index]
    things = batch.layers.get("osm")
    if not isinstance(things, Vector):
        return None
    smallest_m = 2 * (witnesses._gsd_m(batch) if made.gsd_m is None else made.gsd_m)
    return Inventory(batch.places[0], things, smallest_m=smallest_m)


def _part(base: Dataset, part: str, block_m: float | None, shares: Mapping[str, float] | None, seed: int) -> Tiles:
    """The tiles that lie in one block of the part."""
    if not isinstance(base, Tiles):
        raise ValueError(
            f"part={part!r} is for tiles of a scene; a {type(base).__name__} has its own split: give it in options"
        )
    if block_m is None or not shares:
        raise ValueError(f"part={part!r} needs block_m (metres) and shares, such as {{train: 0.7, val: 0.3}}")
    if part not in shares:
        raise ValueError(f"part={part!r} is none of the shares. {suggest(part, shares)}")
    gsd_m = grid.gsd_m(base.scene.geobox)
    first, last = (np.floor((base.corners * gsd_m + add) / block_m) for add in (0.0, base.pixels * gsd_m - 1e-3))
    inside = (first == last).all(1)
    if not inside.any():
        raise ValueError(f"no tile lies in one block of {block_m:g} m: make blocks larger than tiles")
    # Blocks that hold a tile in their corner are drawn, not those that these tiles lie in: so the stride of a part does not change which ground is whose.
    starts = [np.arange(0, n * gsd_m - base.pixels * gsd_m + 1e-3, block_m) for n in base.scene.shape]
    blocks = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, 2)
    split = spatial_blocks(blocks + base.pixels * gsd_m / 2, block_m, shares, stream(seed, "split"))
    mine = {tuple(block) for block in np.floor(blocks[split[part]] / block_m + 1e-6)}
    return replace(base, corners=base.corners[inside & np.array([tuple(block) in mine for block in first])])
