"""From the outline of a place in one CRS to its pixel grid in another, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely import Polygon, transform
from shapely.geometry import mapping, shape


def square(
    geometry: Mapping[str, Any], crs: str, target: str | None, side_m: float, gsd_m: float
) -> tuple[GeoBox | None, tuple[float, float]]:
    """The grid in ``target`` of the north-up square of ``side_m`` that a GeoJSON ``geometry`` in ``crs`` outlines, and its centre
    as longitude and latitude. The grid is None where the outline is no such square, within a pixel, or no target is given."""
    outlined = shape(geometry)
    centre = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(outlined.centroid.x, outlined.centroid.y)
    lonlat = (float(centre[0]), float(centre[1]))
    if target is None:
        return None, lonlat
    turned = _in(outlined, crs, target)
    west, south, east, north = turned.bounds
    if max(abs(east - west - side_m), abs(north - south - side_m)) >= gsd_m:
        return None, lonlat
    west, north = (round(edge / gsd_m) * gsd_m for edge in (west, north))
    pixels = round(side_m / gsd_m)
    return GeoBox((pixels, pixels), Affine(gsd_m, 0.0, west, 0.0, -gsd_m, north), target), lonlat


def outline(corner: tuple[float, float], side_m: float, crs: str, target: str) -> dict[str, Any]:
    """The GeoJSON geometry, in ``target``, of the square of ``side_m`` whose north-west ``corner`` is given in ``crs``."""
    west, north = corner
    ring = [(west, north), (west + side_m, north), (west + side_m, north - side_m), (west, north - side_m)]
    return dict(mapping(_in(Polygon(ring), crs, target)))


def _in(geometry: Any, crs: str, target: str) -> Any:
    """``geometry`` with its coordinates in ``target``."""
    to = Transformer.from_crs(crs, target, always_xy=True)
    return transform(geometry, lambda xy: np.column_stack(to.transform(xy[:, 0], xy[:, 1])))
