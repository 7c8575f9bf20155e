"""Write layers and features: Cloud-Optimized GeoTIFF, Zarr, GeoParquet. Nothing appears before it is complete."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import shapely.affinity
import torch
import xarray as xr
from odc.geo.geobox import GeoBox

from everysat.io import grid, labels
from everysat.io.calibration import CODED
from everysat.io.cog import CogWriter, storage
from everysat.io.output import replacing
from everysat.sensors import Band
from everysat.types import ALWAYS, Batch, Features, Place, Raster

COG, ZARR, PARQUET = (".tif", ".tiff"), (".zarr",), (".parquet", ".geoparquet")
_CHUNK = 512


def write(layer: Raster | Features | Batch, path: str | Path, *, place: Place | None = None) -> Path:
    """Write a raster layer (``.tif``, ``.zarr``) or features (those, or ``.parquet``); the suffix decides.

    Args:
        layer: a raster of one place, a batch of one place and one raster layer, or features.
        path: of the file; one that exists is replaced when the new one is complete.
        place: where a raster lies; its geobox gives the grid. Batches and features know their places.

    A GeoTIFF is a valid COG with overviews, band names, units and dates; a map of classes has colours. A Zarr store (format
    3) has one variable a band with CF coordinates, CRS and units, as xarray, GDAL and QGIS expect them. :func:`everysat.read`
    gives back the same raster without further arguments. GeoParquet has one row a token with its square as geometry.

    Raises:
        ValueError: the suffix is unknown, or the layer has no georeference or does not lie on the place's grid.
    """
    path = Path(path)
    if isinstance(layer, Batch):
        layer, place = _single(layer)
    suffix = path.suffix.lower()
    if isinstance(layer, Features):
        writers: dict[tuple[str, ...], Any] = {COG: _features_cog, ZARR: _features_zarr, PARQUET: _features_parquet}
    elif isinstance(layer, Raster):
        writers = {COG: _raster_cog, ZARR: _raster_zarr}
    else:
        raise TypeError(
            f"layer is a {type(layer).__name__}; a Raster, Features or a Batch with one raster can be written"
        )
    for suffixes, writer in writers.items():
        if suffix in suffixes:
            if isinstance(layer, Raster):
                writer(layer, path, geobox_of(layer, place))
            else:
                writer(layer, path)
            return path
    known = ", ".join(s for suffixes in writers for s in suffixes)
    raise ValueError(f"path={str(path)!r}: a {type(layer).__name__} is written as {known}")


def _single(batch: Batch) -> tuple[Raster, Place]:
    if len(batch) != 1 or len(batch.layers) != 1:
        raise ValueError(
            f"the batch has {len(batch)} places and layers {', '.join(batch.layers)}; write one raster of one place, as in write(batch[0].only('...'), ...)"
        )
    return batch.raster(next(iter(batch.layers))), batch.places[0]


def geobox_of(raster: Raster, place: Place | None) -> GeoBox:
    """The grid on which a raster lies over its place.

    Raises:
        ValueError: it has none, several places, or another number of pixels.
    """
    if place is None or place.geobox is None:
        raise ValueError(
            "place is needed, with a geobox: without georeference there is no telling where the raster lies"
        )
    if (raster.row != 0).any():
        raise ValueError("the raster observes several places; write one at a time, batch[i]")
    geobox = grid.at_gsd(place.geobox, raster.gsd_m)
    if tuple(geobox.shape) != tuple(raster.values.shape[2:]):
        raise ValueError(
            f"the raster has {tuple(raster.values.shape[2:])} pixels of {raster.gsd_m:g} m, the place {tuple(geobox.shape)}; give the place it was read for"
        )
    return geobox


def _raster_cog(raster: Raster, path: Path, geobox: GeoBox) -> None:
    if raster.var is not None:
        raise ValueError(
            "a GeoTIFF would lose the variance of this raster: write .zarr, or drop it with replace(raster, var=None)"
        )
    obs, band, *size = raster.values.shape
    times = [(float(a), float(b)) for a, b in raster.time_s]
    with CogWriter.for_sensor(path, geobox, raster.sensor, times) as file:
        shape = (obs * band, *size)
        file.write(raster.values.cpu().reshape(shape).numpy(), valid=raster.valid.cpu().reshape(shape).numpy())


def to_xarray(raster: Raster, place: Place) -> xr.Dataset:
    """A raster as xarray: one variable a band, with CF coordinates, CRS, units and time bounds; NaN where invalid.

    Codes stay integers, with ``_FillValue`` where invalid. Variances are variables called ``<band>_variance``.
    """
    dataset = empty_dataset(geobox_of(raster, place))
    dims, coords = _time_axis(raster)
    dataset = dataset.assign_coords(coords)
    values, valid = raster.values.cpu().numpy(), raster.valid.cpu().numpy()
    for index, band in enumerate(raster.sensor.bands):
        dtype, fill = storage([band])
        data = np.where(valid[:, index], values[:, index], fill).astype(dtype)
        dataset[band.name] = xr.Variable(dims, data, _attributes(band), {"_FillValue": np.dtype(dtype).type(fill)})
        if raster.var is not None:
            spread = np.where(valid[:, index], raster.var[:, index].cpu().numpy(), np.nan)
            dataset[f"{band.name}_variance"] = xr.Variable(dims, spread, {"grid_mapping": "spatial_ref"})
    dataset.attrs[labels.SENSOR_TAG] = labels.to_json(raster.sensor)
    return dataset


def empty_dataset(geobox: GeoBox) -> xr.Dataset:
    """A dataset with the coordinates and the CRS of a grid and no variables."""
    if not grid.axis_aligned(geobox):
        raise ValueError("the grid is rotated, which coordinates x and y cannot say; write a GeoTIFF")
    a, (height, width), crs = geobox.affine, geobox.shape, grid.crs_of(geobox)
    y = a.f + a.e * (np.arange(height) + 0.5)
    x = a.c + a.a * (np.arange(width) + 0.5)
    names = ("projection_y_coordinate", "projection_x_coordinate") if crs.projected else ("latitude", "longitude")
    unit = "m" if crs.projected else "degrees"
    transform = " ".join(repr(v) for v in (a.c, a.a, a.b, a.f, a.d, a.e))
    reference = {**crs.proj.to_cf(), "spatial_ref": crs.to_wkt(), "GeoTransform": transform}
    dataset = xr.Dataset(
        coords={
            "y": ("y", y, {"standard_name": names[0], "units": unit, "axis": "Y"}),
            "x": ("x", x, {"standard_name": names[1], "units": unit, "axis": "X"}),
            "spatial_ref": ((), 0, reference),
        },
        attrs={"Conventions": "CF-1.11", "spatial:transform": [a.a, a.b, a.c, a.d, a.e, a.f]},
    )
    if crs.to_epsg():
        dataset.attrs["proj:code"] = f"EPSG:{crs.to_epsg()}"
    return dataset


def _time_axis(raster: Raster) -> tuple[tuple[str, ...], dict[str, Any]]:
    spans = raster.time_s.cpu().numpy()
    if all(tuple(span) == ALWAYS for span in spans):
        return ("obs", "y", "x"), {}
    if not np.isfinite(spans).all():
        raise ValueError(
            "the raster mixes dated and undated observations, which one time axis cannot hold; write them apart"
        )
    stamps = np.round(spans * 1e6).astype(np.int64).astype("datetime64[us]")
    encoding = {"units": "microseconds since 1970-01-01", "dtype": "int64", "calendar": "proleptic_gregorian"}
    time = xr.Variable("time", stamps[:, 0], {"standard_name": "time", "bounds": "time_bnds"}, encoding)
    return ("time", "y", "x"), {"time": time, "time_bnds": xr.Variable(("time", "bounds"), stamps, {}, encoding)}


def _attributes(band: Band) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "long_name": band.description or band.name,
        "units": band.unit,
        "grid_mapping": "spatial_ref",
    }
    if band.unit in CODED:
        facts["units"] = "1"
    if band.classes and band.unit == "class":
        facts["flag_values"] = sorted(band.classes)
        facts["flag_meanings"] = " ".join(band.classes[code].replace(" ", "_") for code in sorted(band.classes))
    if band.wavelength_um is not None:
        facts["wavelength_um"] = band.wavelength_um
    return facts


def _raster_zarr(raster: Raster, path: Path, geobox: GeoBox) -> None:
    _store(to_xarray(raster, grid.place_of(geobox)), path)


def _store(dataset: xr.Dataset, path: Path) -> None:
    most = {"y": _CHUNK, "x": _CHUNK, "feature": 64}
    encoding = {
        name: {
            **variable.encoding,
            "chunks": tuple(min(size, most.get(str(dim), 1)) for dim, size in variable.sizes.items()),
        }
        for name, variable in dataset.data_vars.items()
        if variable.ndim >= 2
    }
    with replacing(path) as partial, warnings.catch_warnings():
        # Not yet in the specification of format 3, but without it opening a remote store takes a request a variable.
        warnings.filterwarnings("ignore", "Consolidated metadata")
        dataset.to_zarr(partial, mode="w", zarr_format=3, consolidated=True, encoding=encoding)


def _grid(features: Features, values: torch.Tensor) -> tuple[np.ndarray, GeoBox]:
    """``values`` [token, dim] of one place as [dim, y, x], and its grid."""
    if len(features.places) != 1 or features.places[0].geobox is None:
        raise ValueError(
            f"a grid needs one place with a geobox; these features have {len(features.places)} places. Write .parquet, or one place at a time"
        )
    image = Features(values, features.coords, features.summary, features.places).grid()[0]
    cells = torch.cat([features.coords.cells(), features.coords.row[:, None]], 1)
    if len(torch.unique(cells, dim=0)) < len(cells):
        raise ValueError(
            "several tokens lie in one cell (dates or layers of their own); pool them first, or write .parquet"
        )
    coarse = grid.at_gsd(features.places[0].geobox, float(features.coords.size_m[0]))
    return image.detach().cpu().float().numpy(), GeoBox((image.shape[1], image.shape[2]), coarse.affine, coarse.crs)


def _features_cog(features: Features, path: Path) -> None:
    image, geobox = _grid(features, features.mean)
    names = [f"feature_{i}" for i in range(len(image))]
    if features.var is not None:
        image = np.concatenate([image, _grid(features, features.var)[0]])
        names += [f"variance_{i}" for i in range(len(names))]
    with CogWriter(path, geobox, names) as file:
        file.write(image)


def _features_zarr(features: Features, path: Path) -> None:
    image, geobox = _grid(features, features.mean)
    dataset = empty_dataset(geobox)
    mapped = {"grid_mapping": "spatial_ref"}
    dataset["embedding"] = xr.Variable(("feature", "y", "x"), image, {"long_name": "embedding", "units": "1", **mapped})
    if features.var is not None:
        dataset["variance"] = xr.Variable(("feature", "y", "x"), _grid(features, features.var)[0], mapped)
    summary = features.summary.detach().cpu().float().numpy()[0]
    dataset["summary"] = xr.Variable(("summary_feature",), summary, {"long_name": "embedding of the whole place"})
    _store(dataset, path)


def _features_parquet(features: Features, path: Path) -> None:
    coords, dim = features.coords, features.mean.shape[1]
    if len(coords) == 0:
        raise ValueError("there are no tokens to write: no input layer was observed in any place")
    columns: dict[str, Any] = {
        "place": coords.row.cpu().numpy(),
        "size_m": coords.size_m.cpu().numpy(),
        "group": coords.group.cpu().numpy(),
        "time_start": _stamps(coords.time_s[:, 0]),
        "time_end": _stamps(coords.time_s[:, 1]),
    }
    small = io.BytesIO()
    geopandas.GeoDataFrame(columns, geometry=_squares(features)).to_parquet(
        small, write_covering_bbox=True, index=False
    )
    # Vectors of fixed length, which search engines map without parsing, have no counterpart in pandas: they join here.
    table = pq.read_table(small).append_column("embedding", _vectors(features.mean, dim))
    if features.var is not None:
        table = table.append_column("variance", _vectors(features.var, dim))
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _vectors(values: torch.Tensor, dim: int) -> Any:
    flat = pa.array(values.detach().cpu().float().numpy().ravel())
    return pa.FixedSizeListArray.from_arrays(flat, dim)


def _stamps(seconds: torch.Tensor) -> Any:
    stamps = [
        pd.NaT if not math.isfinite(s) else pd.Timestamp(round(s * 1e6), unit="us", tz="UTC") for s in seconds.tolist()
    ]
    return pd.Series(stamps, dtype="datetime64[us, UTC]")


def _squares(features: Features) -> geopandas.GeoSeries:
    """Footprints of the tokens: in the CRS of the places if they share one, else in degrees."""
    places = features.places
    crs = {grid.crs_of(place.geobox) for place in places if place.geobox is not None}
    if any(place.geobox is None for place in places):
        raise ValueError("a place has no geobox, so its tokens have no footprint on the ground")
    target = crs.pop().to_wkt() if len(crs) == 1 else "EPSG:4326"
    out = np.empty(len(features.coords), dtype=object)
    rows = features.coords.row.cpu().numpy()
    for row in np.unique(rows):
        mine = np.flatnonzero(rows == row)
        geobox = places[row].geobox
        index = torch.from_numpy(mine)
        half = features.coords.size_m.cpu()[index].numpy() / 2
        south, east = features.coords.at_m.cpu()[index].numpy().T
        boxes = shapely.box(east - half, south - half, east + half, south + half)
        a, gsd = geobox.affine, grid.gsd_m(geobox)
        moved = [
            shapely.affinity.affine_transform(box, (a.a / gsd, a.b / gsd, a.d / gsd, a.e / gsd, a.c, a.f))
            for box in boxes
        ]
        out[mine] = geopandas.GeoSeries(moved, crs=grid.crs_of(geobox).to_wkt()).to_crs(target).to_numpy()
    return geopandas.GeoSeries(out, crs=target)
