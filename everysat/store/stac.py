"""STAC items and collections that describe stores, with the embedding extension ``emb:`` 0.0.1.

Source: geo-embeddings/embeddings-stac-specification, version 0.0.1 (a proposal). What belongs to a product (type, length of the
vectors, model) it allows in collections alone, what belongs to a run (codes, settings) in items alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import shapely

from everysat import __version__
from everysat.io.output import replacing
from everysat.store.attributes import clearly, quantization
from everysat.store.chips import ChipStore
from everysat.store.quantise import Float16, Float32
from everysat.store.read import Period, PixelStore, Store

EMB = "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json"
PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
_MEDIA = {
    ".zarr": "application/vnd.zarr; version=3",
    ".parquet": "application/vnd.apache.parquet",
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
}


def stac_item(
    store: Store,
    *,
    name: str | None = None,
    href: str | None = None,
    period: Period | None = None,
    made: datetime | None = None,
    collection: str | None = None,
) -> dict[str, Any]:
    """The STAC item of a store, as JSON.

    Args:
        store: what it describes.
        name: identifier; the name of the file without suffix when omitted.
        href: where the store will lie for readers of the item; its path when omitted.
        period: of the vectors, where the store does not tell it.
        made: when it was computed (UTC); now when omitted.
        collection: ``id`` of the collection that it belongs to.

    Raises:
        ValueError: no period is known, which an item cannot do without.
    """
    period = period or store.period
    if period is None:
        raise ValueError(f"{store.path} tells no period, which STAC needs; give period=('2024-01-01', '2025-01-01')")
    start, end = (_instant(one) for one in period)
    footprint = _footprint(store)
    told = store.attrs.get("everysat", {})
    runtime = {
        "quantiser": store.quantiser.to_dict(),
        "dimensions": store.dim,
        "type": store.kind,
        "model": store.model,
    }
    if told.get("quality"):
        runtime["quality"] = told["quality"]
    properties: dict[str, Any] = {
        "datetime": None,
        "start_datetime": start,
        "end_datetime": end,
        "processing:datetime": (made or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "processing:software": {"everysat": __version__},
        "emb:runtime_parameters": runtime,
        **_projection(store),
    }
    if store.attrs.get("geoemb:gsd"):
        properties["gsd"] = store.attrs["geoemb:gsd"]
    if not isinstance(store.quantiser, Float32) or isinstance(store.quantiser, Float16):
        codes = quantization(store.quantiser)
        properties["emb:quantization"] = {k: codes[k] for k in ("method", "original_dtype", "quantized_dtype")}
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [EMB, PROCESSING, PROJECTION],
        "id": name or store.path.stem,
        "geometry": json.loads(shapely.to_geojson(footprint)),
        "bbox": list(footprint.bounds),
        "properties": properties,
        "links": _links(store),
        "assets": {
            "embeddings": {
                "href": href or str(store.path),
                "type": _MEDIA.get(
                    store.path.suffix.lower(), _MEDIA[".zarr"] if store.path.is_dir() else _MEDIA[".tif"]
                ),
                "title": f"{store.kind} embeddings, {store.dim} numbers each",
                "roles": ["data"],
                "data_type": store.quantiser.dtype,
            }
        },
    }
    if collection:
        item["collection"] = collection
        item["links"].append({"rel": "collection", "href": "./collection.json", "type": "application/json"})
    return item


def stac_collection(
    stores: Sequence[Store],
    *,
    name: str,
    description: str,
    license: str = "other",
    period: Period | None = None,
) -> dict[str, Any]:
    """The STAC collection of stores that one model made, as JSON: their extent, type, length of vectors, model and sources.

    Raises:
        ValueError: no store, stores of different kinds, models or lengths, or one without a period where none is given.
    """
    if not stores:
        raise ValueError("a collection needs at least one store")
    for fact in ("kind", "dim", "model"):
        found = {json.dumps(getattr(store, fact), sort_keys=True) for store in stores}
        if len(found) > 1:
            raise ValueError(f"the stores differ in {fact}: {', '.join(sorted(found))}; make a collection of each")
    periods = [period or store.period for store in stores]
    if None in periods:
        raise ValueError("a store tells no period; give period=(start, end)")
    boxes = [_footprint(store).bounds for store in stores]
    first = stores[0]
    layout = dict(first.attrs.get("geoemb:chip_layout", {}))
    if layout.get("layout_type") == "irregular":  # a word that the extension for Zarr has and this one has not
        layout["layout_type"] = "variable_grid"
    about: dict[str, Any] = {
        "type": "Collection",
        "stac_version": "1.0.0",
        "stac_extensions": [EMB],
        "id": name,
        "description": description,
        "license": license,
        "extent": {
            "spatial": {"bbox": [[f(b[i] for b in boxes) for i, f in enumerate((min, min, max, max))]]},
            "temporal": {
                "interval": [
                    [min(_instant(p[0]) for p in periods if p), max(_instant(p[1]) for p in periods if p)],
                ]
            },
        },
        "emb:type": first.kind,
        "emb:dimensions": first.dim,
        "data_type": first.quantiser.dtype,
        "links": _links(first),
    }
    if first.attrs.get("geoemb:gsd"):
        about["gsd"] = first.attrs["geoemb:gsd"]
    if layout:
        about["emb:chip_layout"] = layout
    return about


def write_stac(about: dict[str, Any], path: str | Path) -> Path:
    """Write an item or a collection as JSON."""
    path = Path(path)
    with clearly(path), replacing(path) as partial:
        partial.write_text(json.dumps(about, indent=2), encoding="utf-8")
    return path


def _links(store: Store) -> list[dict[str, Any]]:
    sources = store.attrs.get("geoemb:source_data") or ["urn:everysat:source:unstated"]
    model = store.attrs.get("geoemb:model") or "urn:everysat:model:unstated"
    title = str(store.model.get("name") or "model")
    return [
        {"rel": "emb:model", "href": model, "title": title},
        *({"rel": "emb:source-data", "href": one} for one in sources),
    ]


def _instant(text: str) -> str:
    """RFC 3339, UTC."""
    try:
        stamp = pd.Timestamp(text)
    except ValueError as error:
        raise ValueError(f"period: {text!r} is no ISO 8601 date") from error
    stamp = stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")
    return str(stamp.strftime("%Y-%m-%dT%H:%M:%SZ"))


def _footprint(store: Store) -> Any:
    """Outline in degrees: of the grid, or of the box around all chips."""
    if isinstance(store, PixelStore):
        outline = shapely.box(*store.grid.boundingbox)
    else:
        assert isinstance(store, ChipStore)
        outline = shapely.box(*store.bounds)
    # Edges that are straight in the CRS bend in degrees.
    bent = shapely.segmentize(outline, outline.length / 80)
    turned = geopandas.GeoSeries([bent], crs=store.crs).to_crs("EPSG:4326").iloc[0]
    west, _, east, _ = turned.bounds
    return _across(turned) if east - west > 180 and outline.bounds != turned.bounds else turned


def _across(outline: Any) -> Any:
    """An outline over the antimeridian, whose corners have longitudes of both signs, as its two parts."""
    whole = shapely.transform(outline, lambda at: np.stack([at[:, 0] % 360, at[:, 1]], 1))
    east = shapely.transform(whole & shapely.box(180, -90, 360, 90), lambda at: at - [360, 0])
    return shapely.union_all([whole & shapely.box(0, -90, 180, 90), east])


def _projection(store: Store) -> dict[str, Any]:
    told: dict[str, Any] = {"proj:code": store.crs} if store.crs.startswith("EPSG:") else {"proj:wkt2": store.crs}
    if isinstance(store, PixelStore):
        a = store.grid.affine
        told |= {"proj:shape": list(store.shape), "proj:transform": [a.a, a.b, a.c, a.d, a.e, a.f]}
        told["proj:bbox"] = list(store.grid.boundingbox)
    return told
