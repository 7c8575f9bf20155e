"""Collected texts as a dataset: a place for each article, with its text and where it is. ``name: everysat.collect.articles`` in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from everysat.collect import records
from everysat.collect.witnesses import text
from everysat.data.split import spatial_blocks
from everysat.find import suggest
from everysat.nn.draws import stream
from everysat.types import Batch, Place

RADIUS_M = 1000.0
"""How far what an article is about may reach, where it does not say."""
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
SPLITS = tuple(SHARES)
BLOCK_DEGREES = 10.0
METRES_PER_DEGREE = 111_195.0


@dataclass(frozen=True)
class Articles:
    """See :func:`build`."""

    articles: tuple[records.Article, ...]

    def __len__(self) -> int:
        return len(self.articles)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} places")
        article = self.articles[index]
        side = 2 * (article.radius_m or RADIUS_M)
        return Batch((Place(side, side, lonlat=article.lonlat),), {"articles": text([article])})


def build(
    variant: str = "", *, root: str | Path, split: str = "", headings: Sequence[str] | None = None, seed: int = 0
) -> Articles:
    """Texts of a file as places of ``lonlat`` and twice their radius across, with a text layer ``articles``.

    Args:
        root: ``.jsonl`` or ``.parquet``, as ``everysat collect wikipedia`` and ``factbook`` write them.
        split: ``train``, ``val`` or ``test``: blocks of 10 degrees, drawn by ``seed``, so that neighbours are not in two of them; all when omitted.
        headings: of the sections to keep; articles without any of them are left out.

    Raises:
        LookupError, ValueError, FileNotFoundError: an argument is unknown, or the file is not there or empty.
    """
    if variant:
        raise LookupError(f"articles has no variants; got {variant!r}")
    if split and split not in SPLITS:
        raise LookupError(f"split={split!r} is unknown. {suggest(split, SPLITS)}")
    found = list(records.load(root))
    if headings is not None:
        kept = ((a, tuple(part for part in a.sections if part[0] in headings)) for a in found)
        found = [records.Article(**{**vars(a), "sections": sections}) for a, sections in kept if sections]
    if split and found:
        degrees = np.array([a.lonlat for a in found])
        parts = spatial_blocks(
            degrees * METRES_PER_DEGREE, BLOCK_DEGREES * METRES_PER_DEGREE, SHARES, stream(seed, "split")
        )
        found = [found[i] for i in parts[split]]
    if not found:
        raise ValueError(
            f"{root} has no text{f' in split={split!r}' if split else ''}; collect more, or see whether headings={headings} exist"
        )
    return Articles(tuple(found))
