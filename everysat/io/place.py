"""Places from what people hold: a file of polygons, a box, a point, a raster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely
import shapely.geometry
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from pyproj import Transformer

from everysat.io import grid
from everysat.io.sources import open_planes
from everysat.io.vector import load_frame
from everysat.types import Place

VECTOR_SUFFIXES = (
    ".geojson", ".json", ".geojsonl", ".gpkg", ".shp", ".fgb", ".parquet", ".geoparquet", ".kml", ".kmz", ".gml", ".gpx", ".tab", ".mif",
    ".sqlite", ".dxf", ".csv",
)  # fmt: skip
DEFAULT_GSD_M = 10.0


def place(
    source: str | Path | Sequence[float] | GeoBox | Place | Any,
    *,
    gsd_m: float | None = None,
    crs: str | int | None = None,
    size_m: float | None = None,
) -> Place:
    """A rectangle on the ground with a pixel grid.

    Args:
        source: a file of polygons (GeoJSON, GPKG, GeoParquet, ...), a GeoJSON object (a dict), a raster file, ``(west, south, east, north)`` in degrees,
            ``(lon, lat)`` with ``size_m``, a geopandas frame, an odc-geo ``BoundingBox`` or ``GeoBox``, or a place.
        gsd_m: side of a pixel, metres; a raster or a geobox keeps its own unless this is given, everything else has 10 m.
        crs: of the grid; the local UTM zone by default. A raster or a geobox keeps its own.
        size_m: side of the square around a point.

    The extent grows outward to whole pixels. At 10, 20 and 60 m the north-west corner lies on a multiple of 60 m, so that
    the native 10, 20 and 60 m pixels of Sentinel-2 can be used untouched. A point's square keeps its size.

    Raises:
        ValueError: ``source`` is none of these, is empty, has no CRS, or does not fit the other arguments.
    """
    if isinstance(source, Place):
        if source.geobox is None:
            raise ValueError("source is a place without geobox: it lies nowhere in particular and has no grid")
        source = source.geobox
    if isinstance(source, (str, Path)) and not str(source).lower().endswith(VECTOR_SUFFIXES):
        source = _raster_grid(source)
    if isinstance(source, GeoBox):
        return _of_geobox(source, gsd_m, crs)
    if isinstance(source, (str, Path)):
        source = load_frame(source)
    elif isinstance(source, Mapping):
        source = _geojson(source)
    lonlat = _lonlat_bounds(source, size_m)
    gsd = DEFAULT_GSD_M if gsd_m is None else gsd_m
    if not gsd > 0:
        raise ValueError(f"gsd_m={gsd_m} must be positive (metres)")
    target = local_crs(lonlat) if crs is None else CRS(crs)
    if not target.projected:
        raise ValueError(f"crs={crs!r} is in degrees, in which pixels are not square; give a projected CRS or none")
    bounds = _bounds(source, lonlat, target)
    if size_m is not None:
        x, y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
        return grid.place_of(_square(x, y, size_m, gsd, target))
    return grid.place_of(_snapped(bounds, gsd, target))


def local_crs(lonlat: tuple[float, float, float, float]) -> CRS:
    """The UTM zone (polar stereographic beyond 84 degrees north, 80 south) of the centre of bounds in degrees."""
    west, south, east, north = lonlat
    lon, lat = ((west + east) / 2 + 180) % 360 - 180, (south + north) / 2
    if not -80 <= lat <= 84:
        return CRS("EPSG:32661" if lat > 0 else "EPSG:32761")
    zone = int((lon + 180) / 6) + 1
    if 56 <= lat < 64 and 3 <= lon < 12:
        zone = 32  # Norway is not cut through; Svalbard has four wide zones
    elif lat >= 72 and 0 <= lon < 42:
        zone = 31 + 2 * int((lon + 3) / 12)
    return CRS(f"EPSG:{(32600 if lat >= 0 else 32700) + zone}")


def on_ground(geobox: GeoBox, gsd: float | None = None) -> GeoBox:
    """A grid of square pixels in the local UTM zone that covers ``geobox``, whose pixels are not square on the ground."""
    lon, lat = grid.to_lonlat(geobox, *_outline(geobox))
    lonlat = (lon.min(), lat.min(), lon.max(), lat.max())
    if lonlat[2] - lonlat[0] > 12:
        raise ValueError(
            f"the raster spans {lonlat[2] - lonlat[0]:.0f} degrees of longitude, too much for square pixels on one grid; "
            "give place=... for a part of it"
        )
    gsd = grid.pixel_m(geobox)[0] if gsd is None else gsd
    return _snapped(_projected(lonlat, local_crs(lonlat)), gsd, local_crs(lonlat))


def _of_geobox(geobox: GeoBox, gsd_m: float | None, crs: Any) -> Place:
    if geobox.crs is None:
        raise ValueError("source has no CRS; a place needs to know where it is")
    if crs is not None and CRS(crs) != geobox.crs:
        gsd = gsd_m or grid.gsd_m(geobox)
        lon, lat = grid.to_lonlat(geobox, *_outline(geobox))
        return grid.place_of(
            _snapped(_projected((lon.min(), lat.min(), lon.max(), lat.max()), CRS(crs)), gsd, CRS(crs))
        )
    if not grid.is_square(geobox):
        return grid.place_of(on_ground(geobox, gsd_m))
    return grid.place_of(geobox if gsd_m is None else grid.at_gsd(geobox, gsd_m))


def _outline(geobox: GeoBox) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of points all over a grid, its edges included."""
    cols, rows = np.meshgrid(np.linspace(0, geobox.shape[1], 11), np.linspace(0, geobox.shape[0], 11))
    return cols, rows


def _raster_grid(path: str | Path) -> GeoBox:
    return open_planes(path)[0].geobox


def _geojson(source: Mapping[str, Any]) -> geopandas.GeoDataFrame:
    """A geometry, feature or collection of them as RFC 7946 has it."""
    try:
        shapes = [shapely.geometry.shape(each.get("geometry", each)) for each in source.get("features", [source])]
    except (AttributeError, TypeError, KeyError, ValueError, shapely.errors.ShapelyError) as error:
        raise ValueError(
            f"source is a mapping but no GeoJSON geometry, feature or collection of features ({error})"
        ) from error
    return geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:4326")


def _across(frame: geopandas.GeoDataFrame) -> tuple[float, float, float, float]:
    """Bounds in degrees, the shorter way round: GeoJSON cuts at the antimeridian what lies across it."""
    parts = frame.to_crs("EPSG:4326").geometry.explode().bounds
    west, south, east, north = parts.minx.min(), parts.miny.min(), parts.maxx.max(), parts.maxy.max()
    turned = parts.where(parts.maxx >= 0, parts.assign(minx=parts.minx + 360, maxx=parts.maxx + 360))
    if turned.maxx.max() - turned.minx.min() < east - west:
        west, east = turned.minx.min(), turned.maxx.max()
    return float(west), float(south), float(east), float(north)


def _lonlat_bounds(source: Any, size_m: float | None) -> tuple[float, float, float, float]:
    if hasattr(source, "total_bounds"):
        if source.crs is None:
            raise ValueError("source has no CRS: set it, for instance with frame.set_crs('EPSG:4326')")
        if len(source) == 0:
            raise ValueError("source has no geometries")
        return _across(source)
    if isinstance(source, BoundingBox):
        if source.crs is None:
            raise ValueError("source is a BoundingBox without CRS")
        to = Transformer.from_crs(source.crs.proj, "EPSG:4326", always_xy=True)
        left, bottom, right, top = to.transform_bounds(*source.bbox)
        return left, bottom, right + 360 if right < left else right, top
    numbers = _numbers(source)
    if len(numbers) == 2:
        if size_m is None or not size_m > 0:
            raise ValueError(f"source={source!r} is a point: give size_m, the side of the square around it, in metres")
        return (*numbers, *numbers)  # type: ignore[return-value]
    west, south, east, north = numbers
    if south >= north:
        raise ValueError(f"source={source!r}: south must be below north in (west, south, east, north)")
    return west, south, east + 360 if east < west else east, north


def _numbers(source: Any) -> list[float]:
    try:
        numbers = [float(v) for v in source]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (2, 4):
        raise ValueError(
            f"source={source!r} is no place; give a file, (west, south, east, north) or (lon, lat) with size_m, or a geobox"
        )
    if any(abs(v) > 180 for v in numbers[0::2]) or any(abs(v) > 90 for v in numbers[1::2]):
        raise ValueError(
            f"source={source!r} is not in degrees of longitude and latitude, in this order; "
            "for projected metres give an odc-geo BoundingBox with its CRS"
        )
    return numbers


def _bounds(source: Any, lonlat: Sequence[float], crs: CRS) -> Sequence[float]:
    """Bounds of ``source`` in ``crs``, tighter than those of its bounds in degrees."""
    if hasattr(source, "total_bounds"):
        return [float(v) for v in source.to_crs(crs.to_wkt()).total_bounds]
    if isinstance(source, BoundingBox) and source.crs is not None:
        return Transformer.from_crs(source.crs.proj, crs.proj, always_xy=True).transform_bounds(*source.bbox)
    return _projected(lonlat, crs)


def _projected(lonlat: Sequence[float], crs: CRS) -> tuple[float, float, float, float]:
    west, south, east, north = lonlat
    to = Transformer.from_crs("EPSG:4326", crs.proj, always_xy=True)
    lon, lat = np.meshgrid(np.linspace(west, east, 21), np.linspace(south, north, 21))
    x, y = to.transform(lon, lat)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"crs={crs} cannot show longitude {west} to {east}, latitude {south} to {north}")
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def _step(gsd: float, crs: CRS) -> tuple[float, float]:
    """Side of a pixel and the distance of the lines that edges snap to, in units of the CRS."""
    unit = crs.proj.axis_info[0].unit_conversion_factor
    return gsd / unit, (60.0 if gsd in (10, 20, 60) else gsd) / unit


def _snapped(bounds: Sequence[float], gsd: float, crs: CRS) -> GeoBox:
    side, line = _step(gsd, crs)
    left, top = math.floor(bounds[0] / line + 1e-6) * line, math.ceil(bounds[3] / line - 1e-6) * line
    right, bottom = math.ceil(bounds[2] / line - 1e-6) * line, math.floor(bounds[1] / line + 1e-6) * line
    shape = max(1, round((top - bottom) / side)), max(1, round((right - left) / side))
    return GeoBox(shape, Affine(side, 0, left, 0, -side, top), crs)


def _square(x: float, y: float, size_m: float, gsd: float, crs: CRS) -> GeoBox:
    side, line = _step(gsd, crs)
    count = max(1, math.ceil(size_m / gsd - 1e-6))
    half = count * side / 2
    return GeoBox(
        (count, count), Affine(side, 0, round((x - half) / line) * line, 0, -side, round((y + half) / line) * line), crs
    )
