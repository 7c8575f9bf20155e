"""Polygons: as labels on a pixel grid, and as a layer of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import rasterio.features
import shapely
import shapely.affinity
import torch
from odc.geo.geobox import GeoBox

from everysat.find import suggest
from everysat.io import dates, grid
from everysat.sensors import Band, Sensor
from everysat.types import Place, Raster, Vector

OVERLAPS = ("smallest", "first", "last", "drop", "error")


def load_frame(source: Any, place: Place | None = None) -> geopandas.GeoDataFrame:
    """Geometries with attributes of a file (GPKG, GeoJSON, GeoParquet, shapefile, ...) or a geopandas frame.

    With ``place``, in its CRS, and those alone whose bounds touch it. The index keeps the position in the source.

    Raises:
        OSError: the file is missing or cannot be read; the message names it.
        ValueError: it has no CRS.
    """
    frame = source if isinstance(source, geopandas.GeoDataFrame) else _file(source)
    if isinstance(source, geopandas.GeoDataFrame):
        frame = frame.reset_index(drop=True)
    if frame.crs is None:
        name = "the frame" if frame is source else source
        raise ValueError(
            f"{name} has no CRS, so where its geometries lie is unknown; set it with frame.set_crs('EPSG:...')"
        )
    if place is None:
        return frame
    geobox = _geobox(place)
    frame = frame.to_crs(grid.crs_of(geobox).to_wkt())
    near = ~(frame.geometry.is_empty | frame.geometry.isna()) & frame.intersects(geobox.extent.geom)
    return frame[near]


def _file(path: Any) -> geopandas.GeoDataFrame:
    path = Path(os.fspath(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix.lower() in (".parquet", ".geoparquet"):
            return geopandas.read_parquet(path)
        return geopandas.read_file(path)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError, OSError) as error:
        raise OSError(f"{path} cannot be read as a file of geometries ({error})") from error


@dataclass(frozen=True)
class Polygons:
    """What :func:`rasterize` makes of polygons.

    Attributes:
        raster: codes, of kind ``classes``, [1, 1, y, x]; valid where labelled.
        ids: int64 [y, x], position in the source of the polygon that a pixel belongs to; -1 where there is none.
    """

    raster: Raster
    ids: torch.Tensor

    def __iter__(self) -> Any:
        return iter((self.raster, self.ids))


def rasterize(
    source: Any,
    place: Place,
    column: str,
    classes: Mapping[str, int] | Sequence[str] | None = None,
    *,
    gsd_m: float | None = None,
    all_touched: bool = False,
    overlap: str = "smallest",
    time: Any = None,
) -> Polygons:
    """Labels of polygons as a raster on the place's grid.

    Args:
        source: a file of polygons or a geopandas frame.
        column: attribute that holds the class.
        classes: codes by value of ``column``, or its values in the order of their codes from 0; all values that occur in the
            source, sorted, when omitted. Polygons of other classes label nothing.
        gsd_m: of the labels, metres; that of the place's geobox when omitted.
        all_touched: label every pixel that a polygon touches, not only those whose centre it covers.
        overlap: where polygons overlap: the ``smallest`` counts (a pond in a meadow), the ``first`` or ``last`` of the source,
            ``drop`` leaves pixels unlabelled that several classes claim, ``error`` raises.
        time: when the labels hold, as in :func:`everysat.io.dates.span`; always when omitted.

    Raises:
        ValueError: ``column`` or a class does not exist, or polygons overlap and that is an error.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap={overlap!r} is not one of {', '.join(OVERLAPS)}")
    whole = load_frame(source)
    codes = _codes(whole, column, classes)
    geobox = _geobox(place) if gsd_m is None else grid.at_gsd(_geobox(place), gsd_m)
    frame = load_frame(whole, place)
    values = frame[column].astype(str)
    frame = frame[values.isin(codes)]
    code_of = np.full(len(whole), -1, np.int64)
    code_of[frame.index] = [codes[value] for value in frame[column].astype(str)]
    ids = _burn(frame, code_of, geobox, all_touched, overlap)
    seen = ids >= 0
    label = np.where(seen, code_of[np.where(seen, ids, 0)] if len(code_of) else 0, 0)
    band = Band(column, grid.gsd_m(geobox), "class", classes={code: name for name, code in codes.items()})
    name = "polygons" if isinstance(source, geopandas.GeoDataFrame) else Path(os.fspath(source)).name
    raster = Raster.of(
        Sensor(column, "classes", (band,), f"polygons of {name}"),
        torch.from_numpy(label.astype(np.float32))[None, None],
        grid.gsd_m(geobox),
        valid=torch.from_numpy(seen)[None, None],
        time_s=[dates.span(time)],
    )
    return Polygons(raster, torch.from_numpy(ids.astype(np.int64)))


def _codes(
    frame: geopandas.GeoDataFrame, column: str, classes: Mapping[str, int] | Sequence[str] | None
) -> dict[str, int]:
    if column not in frame.columns:
        raise ValueError(
            f"column={column!r} is none of the polygons' attributes. {suggest(column, map(str, frame.columns))}"
        )
    present = sorted({str(value) for value in frame[column].dropna()})
    if classes is None:
        return {value: code for code, value in enumerate(present)}
    codes = (
        {str(v): int(c) for v, c in classes.items()}
        if isinstance(classes, Mapping)
        else {str(v): c for c, v in enumerate(classes)}
    )
    absent = [value for value in codes if value not in present]
    if len(absent) == len(codes):
        raise ValueError(
            f"classes: none of {', '.join(codes)} occurs in column {column!r}, which holds {', '.join(present[:20])}"
        )
    if min(codes.values()) < 0:
        raise ValueError(f"classes={codes} has negative codes; codes count from 0")
    return codes


def _burn(
    frame: geopandas.GeoDataFrame, code_of: np.ndarray, geobox: GeoBox, all_touched: bool, overlap: str
) -> np.ndarray:
    """Position in the source of the polygon at each pixel, -1 for none; later shapes are drawn over earlier ones."""
    order = frame.index.to_numpy()
    if overlap == "smallest":
        order = order[np.argsort(-frame.geometry.area.to_numpy(), kind="stable")]
    elif overlap == "first":
        order = order[::-1]
    ids = _draw(frame, order, geobox, all_touched)
    if overlap not in ("drop", "error"):
        return ids
    # A pixel with one polygon is the same whichever way round they are drawn; one that several claim shows two of them.
    other = _draw(frame, order[::-1], geobox, all_touched)
    clash = ids != other
    if overlap == "error" and clash.any():
        y, x = np.argwhere(clash)[0]
        raise ValueError(
            f"polygons {ids[y, x]} and {other[y, x]} of the source overlap, {int(clash.sum())} pixels in all; choose another overlap policy"
        )
    if overlap == "drop" and clash.any():
        ids = np.where(_claims(frame, code_of, geobox, all_touched) > 1, -1, ids)
    return ids


def _claims(frame: geopandas.GeoDataFrame, code_of: np.ndarray, geobox: GeoBox, all_touched: bool) -> np.ndarray:
    """Number of classes that claim each pixel."""
    count = np.zeros(tuple(geobox.shape), np.int32)
    codes = code_of[frame.index]
    for code in np.unique(codes):
        mine = frame[codes == code]
        count += _draw(mine, mine.index.to_numpy(), geobox, all_touched) >= 0
    return count


def _draw(frame: geopandas.GeoDataFrame, order: np.ndarray, geobox: GeoBox, all_touched: bool) -> np.ndarray:
    if len(order) == 0:
        return np.full(tuple(geobox.shape), -1, np.int32)
    geometry = frame.geometry
    shapes = ((geometry[i], int(i)) for i in order)
    return rasterio.features.rasterize(
        shapes, out_shape=tuple(geobox.shape), transform=geobox.affine, fill=-1, all_touched=all_touched, dtype="int32"
    )


def polygons(source: Any, place: Place, *, time: Any = None) -> Vector:
    """Geometries that touch a place as a layer: in metres east and south of its north-west corner, attributes beside.

    Geometries are not cut at the edge of the place. ``time`` as in :func:`everysat.io.dates.span`.
    """
    frame = load_frame(source, place)
    geobox = _geobox(place)
    gsd, back = grid.gsd_m(geobox), ~geobox.affine
    to_metres = [gsd * v for v in (back.a, back.b, back.d, back.e, back.c, back.f)]
    geometry = tuple(shapely.affinity.affine_transform(shape, to_metres) for shape in frame.geometry)
    attributes = tuple(frame.drop(columns=frame.geometry.name).to_dict("records"))
    start, end = dates.span(time)
    times = torch.tensor([[start, end]], dtype=torch.float64).repeat(len(geometry), 1)
    return Vector(geometry, attributes, times, torch.zeros(len(geometry), dtype=torch.int64))


def _geobox(place: Place) -> GeoBox:
    if place.geobox is None:
        raise ValueError("place has no geobox: without georeference there is no telling which polygons lie in it")
    return place.geobox
