"""A dataset with words and map vectors added: what OpenStreetMap has in each place, sentences and questions about it, and articles on what lies there.

It wraps any georeferenced dataset: in a recipe ``name: everysat.collect.witnesses`` with ``options: {base: ..., features: ...}``. The variant ``berlin`` is the
embedded Sentinel-2 scene with its land use, for which nothing has to be fetched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely
import torch

from everysat.collect import captions as rules
from everysat.collect import osm, questions, records
from everysat.collect.inventory import Inventory
from everysat.data import berlin
from everysat.data.batches import Dataset
from everysat.data.catalogue import resolve
from everysat.find import find, suggest
from everysat.io import grid
from everysat.types import Batch, Layer, Place, Raster, Text

LAYERS = ("osm", "captions", "questions", "articles")
"""What can be added; ``questions`` stands for the layers ``questions``, ``answers`` and ``types``."""
VARIANTS = ("", "berlin")


@dataclass(frozen=True)
class Witnesses:
    """See :func:`build`. ``features`` as :func:`everysat.collect.osm.read` gives them."""

    base: Dataset
    features: geopandas.GeoDataFrame
    articles: tuple[records.Article, ...]
    layers: tuple[str, ...]
    sentences: int
    each: int
    gsd_m: float | None
    licence: str
    seed: int

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Batch:
        batch = self.base[index]
        place = batch.places[0]
        if place.geobox is None:
            raise ValueError(
                f"place {index} of the base has no georeference, so what lies there is unknown; use another base"
            )
        corners = _corners(place)
        near = self.features.iloc[sorted(self.features.sindex.query(shapely.box(*corners)))]
        things = osm.layer(near, place)
        added: dict[str, Layer] = {"osm": things} if "osm" in self.layers and len(things.geometry) else {}
        seen = Inventory(place, things, smallest_m=2 * (_gsd_m(batch) if self.gsd_m is None else self.gsd_m))
        if "captions" in self.layers:
            said = rules.captions(seen, seed=f"{self.seed} {index}", most=self.sentences, licence=self.licence)
            added |= {"captions": rules.layer(said)} if said else {}
        if "questions" in self.layers:
            asked = questions.ask(seen, seed=f"{self.seed} {index}", each=self.each, licence=self.licence)
            added |= questions.layers(asked) if asked else {}
        if "articles" in self.layers and (found := self._articles(corners)):
            added["articles"] = text(found)
        return batch.adding(**added)

    def _articles(self, corners: tuple[float, float, float, float]) -> list[records.Article]:
        west, south, east, north = corners
        return [a for a in self.articles if west <= a.lonlat[0] <= east and south <= a.lonlat[1] <= north]


def build(
    variant: str = "",
    *,
    base: str = "",
    options: Mapping[str, Any] | None = None,
    features: str | Path | None = None,
    articles: str | Path | None = None,
    modalities: Sequence[str] | None = None,
    sentences: int = 5,
    each: int = 4,
    gsd_m: float | None = None,
    licence: str = osm.LICENCE,
    seed: int = 0,
) -> Witnesses:
    """A dataset whose places also have the layers ``osm`` (vector), ``captions``, ``questions``, ``answers``, ``types`` and ``articles`` (text), as far as anything is
    known of them.

    Args:
        variant: ``berlin``: base and features are the embedded scene and its land use, unless given.
        base, options: name of the dataset whose places these are, and its options, such as ``scene`` and ``{files: ..., tile_m: 480}``.
        features: a file that :func:`everysat.collect.osm.read` reads.
        articles: what ``everysat collect wikipedia`` wrote.
        modalities: which layers, of :data:`LAYERS`; all that there are data for by default.
        sentences, each: how many captions of a place, and how many questions of a type.
        gsd_m: only what pixels of so many metres show is spoken of; those of the finest raster of the place by default.
        licence: of the features.
        seed: another one gives other words.

    Raises:
        LookupError, ValueError, FileNotFoundError: an argument is unknown or lacking, or a file is not there.
    """
    if variant not in VARIANTS:
        raise LookupError(f"witnesses has no variant {variant!r}. {suggest(variant, VARIANTS)}")
    if variant == "berlin":
        base, features = base or "berlin/grid", features or berlin.polygons()
    if not base or (features is None and articles is None):
        raise ValueError("base (a dataset) and features (a file) are needed, or the variant berlin")
    for name in modalities or ():
        if name not in LAYERS:
            raise LookupError(f"modalities={name!r} is unknown. {suggest(name, LAYERS)}")
    nothing = geopandas.GeoDataFrame({"tags": []}, geometry=[], crs="EPSG:4326")
    return Witnesses(
        _base(base, options or {}), nothing if features is None else osm.read(features),
        () if articles is None else records.load(articles), tuple(LAYERS if modalities is None else modalities), sentences, each, gsd_m, licence, seed,
    )  # fmt: skip


def _base(name: str, options: Mapping[str, Any]) -> Dataset:
    """The dataset that is added to."""
    module, variant = find("data", resolve(name))
    given = {"variant": variant, **options} if variant else dict(options)
    try:
        inspect.signature(module.build).bind(**given)
    except TypeError as error:
        raise LookupError(f"options of the base {name} do not fit: {error}") from error
    return module.build(**given)


def text(articles: Sequence[records.Article]) -> Text:
    """Articles of one place as a text layer: a string for each section, whose role is ``article``; headings stand before their text."""
    strings = tuple(
        f"{a.title}. {f'{heading}: ' if heading else ''}{body}" for a in articles for heading, body in a.sections
    )
    return Text(strings, ("article",) * len(strings), torch.zeros(len(strings), dtype=torch.int64))


def _corners(place: Place) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees."""
    assert place.geobox is not None
    height, width = place.geobox.shape
    rows, columns = np.meshgrid(np.linspace(0, height, 3), np.linspace(0, width, 3))
    lon, lat = grid.to_lonlat(place.geobox, columns, rows)
    return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())


def _gsd_m(batch: Batch) -> float:
    return min((layer.gsd_m for layer in batch.layers.values() if isinstance(layer, Raster)), default=0.0)
