"""Arithmetic on pixel grids: size of a pixel on the ground, the grid of a layer over a place, where two grids agree."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from pyproj import Geod, Transformer

from everysat.types import Place

_ELLIPSOID = Geod(ellps="WGS84")
FIT = 0.01
"""Grids whose pixel edges differ by less than this share of a pixel are the same grid."""


def crs_of(geobox: GeoBox) -> CRS:
    """The CRS of a grid, or an error where it has none."""
    if geobox.crs is None:
        raise ValueError("the geobox has no CRS; without one a place is Place(height_m, width_m)")
    return geobox.crs


def positions(affine: Affine, cols: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """x and y of pixel positions: the affine transform of many points."""
    cols, rows = np.asarray(cols, float), np.asarray(rows, float)
    return affine.a * cols + affine.b * rows + affine.c, affine.d * cols + affine.e * rows + affine.f


@lru_cache(maxsize=256)
def plain_crs(crs: Hashable) -> CRS:
    """The CRS by its EPSG code where it has one: files spell the same CRS in many ways, which would not compare equal."""
    found = CRS(crs)
    code = found.to_epsg()
    return found if code is None else CRS(f"EPSG:{code}")


@lru_cache(maxsize=4096)
def pixel_m(geobox: GeoBox) -> tuple[float, float]:
    """Height and width of the central pixel on the ground, metres.

    The nominal size of a projected grid is kept when it is within 0.5 % of the measured one (UTM distorts by up to 0.1 %);
    in Web Mercator or in degrees the measured one counts.
    """
    y, x = geobox.shape[0] / 2, geobox.shape[1] / 2
    cols, rows = [x - 0.5, x + 0.5, x, x], [y, y, y - 0.5, y + 0.5]
    lon, lat = to_lonlat(geobox, cols, rows)
    width = _ELLIPSOID.inv(lon[0], lat[0], lon[1], lat[1])[2]
    height = _ELLIPSOID.inv(lon[2], lat[2], lon[3], lat[3])[2]
    if crs_of(geobox).projected:
        unit = crs_of(geobox).proj.axis_info[0].unit_conversion_factor
        a = geobox.affine
        nominal = math.hypot(a.b, a.e) * unit, math.hypot(a.a, a.d) * unit
        height, width = (n if abs(m / n - 1) < 5e-3 else m for n, m in zip(nominal, (height, width), strict=True))
    return height, width


def is_square(geobox: GeoBox) -> bool:
    """Whether the central pixel is as wide as high on the ground, within 1 %."""
    height, width = pixel_m(geobox)
    return abs(height / width - 1) < 0.01


def is_true_to_scale(geobox: GeoBox) -> bool:
    """Whether pixels have the same size everywhere: square, and in a CRS whose units are metres on the ground here."""
    height, width = pixel_m(geobox)
    unit = crs_of(geobox).proj.axis_info[0].unit_conversion_factor
    nominal = math.hypot(geobox.affine.a, geobox.affine.d) * unit
    return (
        crs_of(geobox).projected
        and is_square(geobox)
        and math.isclose(math.sqrt(height * width), nominal, rel_tol=5e-3)
    )


def gsd_m(geobox: GeoBox) -> float:
    """Ground sampling distance, metres, free of rounding noise; of pixels that are not square, the geometric mean."""
    height, width = pixel_m(geobox)
    return float(f"{math.sqrt(height * width):.6g}")


def to_lonlat(geobox: GeoBox, cols: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of pixel positions (0, 0 is the corner of the first pixel)."""
    x, y = positions(geobox.affine, cols, rows)
    lon, lat = _to_degrees(crs_of(geobox).proj).transform(x, y)
    return lon, lat


@lru_cache(maxsize=256)
def _to_degrees(crs: Any) -> Transformer:
    """Making one takes longer than reading a small image; they may be used in several threads."""
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True)


def place_of(geobox: GeoBox) -> Place:
    """The rectangle that a grid covers.

    Raises:
        ValueError: no CRS, or pixels that are not square on the ground.
    """
    if not is_square(geobox):
        height, width = pixel_m(geobox)
        raise ValueError(
            f"pixels of {height:.4g} x {width:.4g} m in {geobox.crs} are not square on the ground; "
            "use a grid in a projected CRS, such as the local UTM zone"
        )
    gsd = gsd_m(geobox)
    lon, lat = to_lonlat(geobox, geobox.shape[1] / 2, geobox.shape[0] / 2)
    return Place(geobox.shape[0] * gsd, geobox.shape[1] * gsd, geobox, (float(lon), float(lat)))


def at_gsd(geobox: GeoBox, gsd: float, own: float | None = None) -> GeoBox:
    """The grid of pixels of ``gsd`` metres from the same north-west corner that covers ``geobox``.

    Where the extent is no multiple of ``gsd`` the last row and column reach beyond it. ``own`` is the ground sampling
    distance of ``geobox``, measured when omitted.
    """
    ratio = gsd / (gsd_m(geobox) if own is None else own)
    if abs(ratio - 1) < 1e-6:
        return geobox
    height, width = (max(1, math.ceil(n / ratio - 1e-4)) for n in geobox.shape)
    return GeoBox((height, width), geobox.affine * Affine.scale(ratio), geobox.crs)


def north_up(geobox: GeoBox) -> tuple[GeoBox, bool, bool]:
    """The same grid with rows counted from the north and columns from the west; whether rows, columns were turned round."""
    if not axis_aligned(geobox):
        return geobox, False, False
    flip_y, flip_x = geobox.affine.e > 0, geobox.affine.a < 0
    if flip_y:
        geobox = geobox.flipy()
    if flip_x:
        geobox = geobox.flipx()
    return geobox, flip_y, flip_x


def axis_aligned(geobox: GeoBox) -> bool:
    """Whether rows run along the x axis of the CRS."""
    a = geobox.affine
    return abs(a.b) < 1e-9 * abs(a.a) and abs(a.d) < 1e-9 * abs(a.e)


def offset(source: GeoBox, target: GeoBox) -> tuple[float, float, float, float] | None:
    """Position of ``target`` on ``source``: (row, column) of its corner and (rows, columns) per pixel of the target.

    None when the CRS differs or one of the grids is rotated.
    """
    if source.crs != target.crs or not (axis_aligned(source) and axis_aligned(target)):
        return None
    s, t = source.affine, target.affine
    return (t.f - s.f) / s.e, (t.c - s.c) / s.a, t.e / s.e, t.a / s.a


def window_on(source: GeoBox, target: GeoBox, margin: float) -> tuple[slice, slice] | None:
    """Rows and columns of ``source`` that ``target`` touches, grown by ``margin`` pixels; None when there are none."""
    y, x = (np.linspace(0, n, 22) for n in target.shape)
    cols, rows = (v.ravel() for v in np.meshgrid(x, y))
    east, north = positions(target.affine, cols, rows)
    if source.crs != target.crs:
        east, north = Transformer.from_crs(crs_of(target).proj, crs_of(source).proj, always_xy=True).transform(
            east, north
        )
    seen = np.isfinite(east) & np.isfinite(north)
    if not seen.any():
        return None
    col, row = positions(~source.affine, east[seen], north[seen])
    slices = []
    for along, size in ((row, source.shape[0]), (col, source.shape[1])):
        low, high = along.min(), along.max()
        if low >= size or high <= 0:
            return None
        slices.append(slice(max(0, math.floor(low - margin)), min(size, math.ceil(high + margin))))
    return slices[0], slices[1]


def crop(geobox: GeoBox, rows: slice, cols: slice) -> GeoBox:
    """The part of a grid between integer rows and columns, which may lie outside it."""
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    return GeoBox(shape, geobox.affine * Affine.translation(cols.start, rows.start), geobox.crs)


def union(boxes: list[GeoBox]) -> GeoBox:
    """The smallest grid with the pixels of the first box that covers all of them; they share its CRS and are not rotated."""
    first = boxes[0]
    spots = [(0.0, 0.0, 1.0, 1.0) if b is first else offset(first, b) for b in boxes]
    if any(spot is None for spot in spots):
        raise ValueError(f"grids differ in CRS or are rotated: {', '.join(sorted({str(b.crs) for b in boxes}))}")
    edges = []
    for axis in (0, 1):
        low = min(s[axis] for s in spots if s)
        high = max(s[axis] + s[axis + 2] * b.shape[axis] for s, b in zip(spots, boxes, strict=True) if s)
        edges.append(slice(math.floor(low + FIT), math.ceil(high - FIT)))
    return (
        first
        if all(e.start == 0 and e.stop == n for e, n in zip(edges, first.shape, strict=True))
        else crop(first, *edges)
    )


def describe(geobox: GeoBox) -> str:
    """CRS and extent in degrees, for messages."""
    h, w = geobox.shape
    lon, lat = to_lonlat(geobox, [0, w, w, 0], [0, 0, h, h])
    return f"{geobox.crs}, longitude {lon.min():.4f} to {lon.max():.4f}, latitude {lat.min():.4f} to {lat.max():.4f}"
