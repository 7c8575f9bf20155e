"""STAC items over real Cloud-Optimized GeoTIFFs, as a static catalogue or for the search server in ``tests/loopback.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from loopback import Loopback
from odc.geo.geobox import GeoBox
from rasterio.warp import transform_bounds

from everysat import sensors
from everysat.io import grid
from everysat.types import Input, Place

UTM = "EPSG:32633"
CORNER = (330_000.0, 5_822_040.0)
SIZE = 256
GRID = Affine(10, 0, CORNER[0], 0, -10, CORNER[1])


def cog(path: Path, values: np.ndarray, transform: Affine, crs: Any, **more: Any) -> Path:
    """A Cloud-Optimized GeoTIFF of ``values`` [y, x] or [band, y, x], deflated, in tiles of 128 pixels."""
    values = values if values.ndim == 3 else values[None]
    count, height, width = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "count": count,
        "height": height,
        "width": width,
        "dtype": values.dtype.name,
        "crs": crs,
        "transform": transform,
    }
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", **profile, **more) as file:
            file.write(values)
        with memory.open() as file:
            rasterio.shutil.copy(file, path, driver="COG", BLOCKSIZE=128, COMPRESS="DEFLATE", OVERVIEWS="NONE")
    return path


def item(
    root: Path, base: str, name: str, collection: str, when: Any, assets: Mapping[str, Path], **facts: Any
) -> dict[str, Any]:
    """An item whose ``assets`` lie below ``root``, which is at ``base``; ``when`` is a datetime, a pair, or None."""
    with rasterio.open(next(iter(assets.values()))) as file:
        bbox = list(transform_bounds(file.crs, "EPSG:4326", *file.bounds))
    times = {"datetime": when}
    if not isinstance(when, str):
        times = {"datetime": None, **dict(zip(("start_datetime", "end_datetime"), when or (), strict=False))}
    if when is None:
        times = {"datetime": "2021-01-01T00:00:00Z"}
    ring = [[bbox[i], bbox[j]] for i, j in ((0, 1), (2, 1), (2, 3), (0, 3), (0, 1))]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "bbox": bbox,
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "links": [], "properties": {**times, **facts},
        "assets": {key: {"href": f"{base}/{path.relative_to(root).as_posix()}"} for key, path in assets.items()},
    }  # fmt: skip


def collection(name: str) -> dict[str, Any]:
    extent = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
    told = {
        "type": "Collection",
        "id": name,
        "stac_version": "1.0.0",
        "description": "made",
        "license": "other",
        "links": [],
    }
    return {**told, "extent": extent}


def static(folder: Path, items: Iterable[Mapping[str, Any]]) -> Path:
    """A static catalogue of ``items`` in ``folder``; returns its ``catalog.json``."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for each in items:
        grouped.setdefault(each["collection"], []).append(each)
    for name, some in grouped.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for each in some:
            (folder / name / f"{each['id']}.json").write_text(json.dumps(each))
        links = [{"rel": "item", "href": f"./{each['id']}.json"} for each in some]
        (folder / name / "collection.json").write_text(json.dumps({**collection(name), "links": links}))
    root = {"type": "Catalog", "id": "made", "stac_version": "1.0.0", "description": "made"}
    links = [{"rel": "child", "href": f"./{name}/collection.json"} for name in grouped]
    (folder / "catalog.json").write_text(json.dumps({**root, "links": links}))
    return folder / "catalog.json"


def square(x: float = 330_300, y: float = 5_821_700, size: int = 64, gsd: float = 10, crs: str = UTM) -> Place:
    return grid.place_of(GeoBox((size, size), Affine(gsd, 0, x, 0, -gsd, y), crs))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1100, 4000, shape).astype(np.uint16)


def add(
    site: Loopback, name: str, kind: str, when, bands, *, transform=GRID, crs=UTM, nodata=None, **facts
) -> dict[str, np.ndarray]:
    """An item of ``bands`` {asset: values} on the server; returns the values."""
    assets = {}
    for key, values in bands.items():
        scale = SIZE // values.shape[-1] or 1
        assets[key] = cog(
            site.folder / name / f"{key}.tif", values, transform * Affine.scale(scale), crs, nodata=nodata
        )
    site.items.append(item(site.folder, site.url, name, kind, when, assets, **facts))
    if kind not in {c["id"] for c in site.collections}:
        site.collections.append(collection(kind))
    return dict(bands)


def s2(site: Loopback, name: str, when: str, *, seed: int = 0, bands=("B04", "B08"), scl: int | None = 4, **facts):
    made = {band: numbers(SIZE, SIZE, seed=seed + i) for i, band in enumerate(bands)}
    if scl is not None:
        made["SCL"] = np.full((SIZE // 2, SIZE // 2), scl, np.uint8)
    return add(site, name, "sentinel-2-l2a", when, made, **{"s2:processing_baseline": "05.09", **facts})


def expected(values: np.ndarray, offset: float = -0.1, rows=slice(34, 98), cols=slice(30, 94)) -> np.ndarray:
    return values[rows, cols] * 1e-4 + offset


def contract(sensor: str, *bands: str, gsd: float = 10, dated: bool = True) -> Input:
    chosen = sensors.get(sensor).select(bands)
    return Input(chosen, gsd, (0.0,) * len(bands), (1.0,) * len(bands), dated)


LAST = (slice(150, 214), slice(160, 224))
"""Rows and columns of :func:`last`, in the last tile of each file, which comes with no header."""


def last() -> Place:
    return square(331_600, 5_820_540)


S2 = {"s2": contract("sentinel-2-l2a", "B04", "B08")}


def api(site: Loopback) -> str:
    return f"{site.url}/api"
