"""Planes of NetCDF, Zarr and xarray objects: variables on a regular grid, with or without time and band axes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from everysat.io import dates, grid, labels
from everysat.io.dates import DAY_S, Span
from everysat.io.plane import HANDLES, Plane, unreadable

_X = ("x", "lon", "longitude", "easting")
_Y = ("y", "lat", "latitude", "northing")
_TIME = ("time", "t", "date", "obs")
_BAND = ("band", "bands", "channel", "channels", "feature")
_CRS_ATTRIBUTES = ("crs_wkt", "spatial_ref", "proj:code", "proj:epsg", "proj:wkt2", "crs", "epsg")


@dataclass(frozen=True)
class CubePixels:
    """The y-x slice at ``index`` of a variable, of a file or (``path`` empty) of an array in memory."""

    path: str
    variable: str
    index: tuple[tuple[str, int], ...]
    dims: tuple[str, str]
    array: xr.DataArray | None = None

    def read(self, rows: slice, cols: slice, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, None]:
        where = {**dict(self.index), self.dims[0]: rows, self.dims[1]: cols}
        if self.array is not None:
            values = _values(self.array, where, self.dims)
        else:
            dataset, lock = HANDLES.get(self.path, open_cube)
            try:
                with lock:
                    values = _values(dataset[self.variable], where, self.dims)
            except (OSError, RuntimeError) as error:
                raise unreadable(self.path, error) from error
        if shape is not None:
            picks = [((np.arange(out) + 0.5) * n / out).astype(int) for out, n in zip(shape, values.shape, strict=True)]
            values = values[np.ix_(*picks)]
        return values, None


def _values(array: xr.DataArray, where: Mapping[str, Any], dims: tuple[str, str]) -> np.ndarray:
    values = array.isel(where).transpose(*dims).to_numpy()
    return values.view(_dtype(array)) if _dtype(array) != values.dtype else values


def _dtype(array: xr.DataArray) -> np.dtype:
    """Type of the stored numbers; NetCDF may keep unsigned ones in a signed type and say so."""
    told = array.attrs.get("_Unsigned", array.encoding.get("_Unsigned", ""))
    if str(told).lower() == "true" and array.dtype.kind == "i":
        return np.dtype(f"u{array.dtype.itemsize}")
    return array.dtype


def open_cube(path: str) -> xr.Dataset:
    """A NetCDF file or a Zarr store as stored: digital numbers, times decoded."""
    if "://" not in path and not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    options: dict[str, Any] = {"mask_and_scale": False, "decode_coords": "all", "chunks": None}
    try:
        if path.rstrip("/").lower().endswith(".zarr"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated", RuntimeWarning)
                return xr.open_zarr(path, **options)
        return xr.open_dataset(path, engine="netcdf4", cache=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise unreadable(path, error) from error


def cube_planes(source: str | xr.Dataset | xr.DataArray, crs: Any = None) -> list[Plane]:
    """The planes of a NetCDF file, Zarr store or xarray object; variables without a y and an x axis are passed over."""
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if path:
        dataset = HANDLES.get(path, open_cube)[0]
    elif isinstance(source, xr.DataArray):
        dataset = source.to_dataset(name=source.name or "values")
        dataset.attrs = {**source.attrs, **dataset.attrs}
    else:
        dataset = source
    name = path or "the xarray object"
    planes: list[Plane] = []
    for variable in dataset.data_vars:
        array = dataset[variable]
        dims = _spatial(array)
        # Variances that this package writes beside bands are for others to use: a reading has none of its own.
        if dims is not None and array.dtype.kind in "iufb" and not str(variable).endswith("_variance"):
            geobox = _geobox(dataset, array, dims, crs, name)
            planes += _variable_planes(dataset, array, dims, geobox, path, name)
    if not planes:
        raise ValueError(
            f"{name} has no variable with axes named y and x (or lat and lon); it has {', '.join(map(str, dataset.data_vars))}"
        )
    return [replace(plane, siblings=len(planes)) for plane in planes]


def _spatial(array: xr.DataArray) -> tuple[str, str] | None:
    lower = {str(dim).lower(): str(dim) for dim in array.dims}
    y, x = (next((lower[name] for name in names if name in lower), None) for names in (_Y, _X))
    return (y, x) if y and x else None


def _variable_planes(
    dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, str], geobox: GeoBox, path: str, name: str
) -> Iterator[Plane]:
    geobox, flip_y, flip_x = grid.north_up(geobox)
    attrs = {**array.encoding, **array.attrs} if path else array.attrs
    scaled = "scale_factor" in attrs or "add_offset" in attrs
    # xarray keeps integers with a fill value as they are in memory, and tells the value in the encoding.
    filled = {**array.encoding, **array.attrs} if array.dtype.kind in "iu" else attrs
    nodata = filled.get("_FillValue", filled.get("missing_value", filled.get("nodata")))
    tags = {**dataset.attrs, **array.attrs}
    shared = Plane(
        name, None, "", geobox, str(_dtype(array)), 1, flip=(flip_y, flip_x), tags=tags,
        nodata=None if nodata is None else float(np.ravel(nodata)[0]),
        scale=float(attrs.get("scale_factor", 1.0)) if scaled else None,
        offset=float(attrs.get("add_offset", 0.0)) if scaled else None,
        unit=str(attrs.get("units", "")), sensor=labels.from_json(str(tags.get(labels.SENSOR_TAG, ""))),
    )  # fmt: skip
    when = dates.in_tags(tags) or (dates.in_name(Path(path).name) if path else None)
    for index, label, time in _slices(dataset, array, dims, when, name):
        pixels = CubePixels(path, str(array.name), index, dims, None if path else array)
        yield replace(shared, pixels=pixels, label=label, time=time)


def _slices(
    dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, str], when: Span | None, name: str
) -> Iterator[tuple[tuple[tuple[str, int], ...], str, Span | None]]:
    """Index, band label and time of every y-x slice of a variable."""
    time_dim = band_dim = None
    for dim in (str(d) for d in array.dims if d not in dims):
        if dim.lower() in _TIME or np.issubdtype(array[dim].dtype, np.datetime64):
            time_dim = dim
        elif dim.lower() in _BAND:
            band_dim = dim
        elif array.sizes[dim] > 1:
            raise ValueError(
                f"{name}: axis {dim!r} of {array.name} is neither time, band, y nor x; select one entry of it first"
            )
    single = tuple((str(d), 0) for d in array.dims if d not in (*dims, time_dim, band_dim))
    spans = _spans(dataset, array, time_dim, when)
    for t, time in enumerate(spans):
        for b in range(array.sizes[band_dim] if band_dim else 1):
            index = single + (((time_dim, t),) if time_dim else ()) + (((band_dim, b),) if band_dim else ())
            label = str(array[band_dim].values[b]) if band_dim and band_dim in array.coords else ""
            yield index, _label(label) if band_dim else str(array.name), time


def _label(text: str) -> str:
    """A band's name; plain counting (0, 1, 2) is no name."""
    return "" if text.isdigit() else text


def _spans(dataset: xr.Dataset, array: xr.DataArray, dim: str | None, when: Span | None) -> list[Span | None]:
    if dim is None:
        scalar = next((array.coords[n] for n in _TIME if n in array.coords and array.coords[n].ndim == 0), None)
        if scalar is not None and np.issubdtype(scalar.dtype, np.datetime64):
            return [_span_of(_seconds(scalar.values), daily=_seconds(scalar.values) % DAY_S == 0)]
        return [when]
    if dim not in array.coords or not np.issubdtype(array[dim].dtype, np.datetime64):
        return [when] * array.sizes[dim]
    bounds = dataset.get(array[dim].attrs.get("bounds", array[dim].encoding.get("bounds", "")))
    if bounds is not None and np.issubdtype(bounds.dtype, np.datetime64):
        return [(_seconds(a), _seconds(b)) for a, b in bounds.values]
    starts = [_seconds(v) for v in array[dim].values]
    daily = all(start % DAY_S == 0 for start in starts)
    return [_span_of(start, daily) for start in starts]


def _seconds(value: Any) -> float:
    return float(np.asarray(value).astype("datetime64[us]").astype(np.int64)) / 1e6


def _span_of(start: float, daily: bool) -> Span:
    return start, start + (DAY_S if daily else 1.0)


def _geobox(dataset: xr.Dataset, array: xr.DataArray, dims: tuple[str, str], crs: Any, name: str) -> GeoBox:
    found, transform = _crs_of(dataset, array)
    found = found or (grid.plain_crs(crs) if crs is not None else None)
    if found is None and dims[1].lower() in _X[1:3]:
        found = CRS("EPSG:4326")  # CF: axes called longitude and latitude are in degrees
    if found is None:
        raise ValueError(
            f"{name} has no CRS: no grid mapping variable and no attribute {', '.join(_CRS_ATTRIBUTES[:3])}. Give crs='EPSG:...' if you know it"
        )
    shape = array.sizes[dims[0]], array.sizes[dims[1]]
    steps = [_step(array, dim, name) for dim in dims]
    if any(step is None for step in steps):
        if transform is None:
            raise ValueError(f"{name}: axes {dims[0]}, {dims[1]} have no coordinates, so the grid is unknown")
        return GeoBox(shape, transform, found)
    (y0, dy), (x0, dx) = steps  # type: ignore[misc]
    return GeoBox(shape, Affine(dx, 0, x0 - dx / 2, 0, dy, y0 - dy / 2), found)


def _step(array: xr.DataArray, dim: str, name: str) -> tuple[float, float] | None:
    """First coordinate and spacing of an axis; None when it has no coordinate or just one."""
    if dim not in array.coords or array.sizes[dim] < 2:
        return None
    values = array[dim].values.astype(float)
    steps = np.diff(values)
    if np.abs(steps - steps.mean()).max() > 0.01 * abs(steps.mean()):
        raise ValueError(f"{name}: coordinates of axis {dim!r} are not evenly spaced; regrid it first")
    return float(values[0]), float((values[-1] - values[0]) / (len(values) - 1))


def _crs_of(dataset: xr.Dataset, array: xr.DataArray) -> tuple[CRS | None, Affine | None]:
    mapping = array.attrs.get("grid_mapping", array.encoding.get("grid_mapping"))
    named = [dataset[mapping]] if mapping in dataset.variables else []
    spots: list[Any] = [
        *named,
        *(v for n, v in dataset.variables.items() if v.ndim == 0 and n != mapping),
        array,
        dataset,
    ]
    for spot in spots:
        attrs = spot.attrs
        for key in _CRS_ATTRIBUTES:
            if key in attrs:
                code = f"EPSG:{attrs[key]}" if str(attrs[key]).isdigit() else attrs[key]
                return grid.plain_crs(code), _transform(attrs)
        if "grid_mapping_name" in attrs:
            from pyproj import CRS as ProjCRS

            return grid.plain_crs(ProjCRS.from_cf(dict(attrs)).to_wkt()), _transform(attrs)
    return None, None


def _transform(attrs: Mapping[str, Any]) -> Affine | None:
    if "GeoTransform" not in attrs:
        return None
    return Affine.from_gdal(*(float(v) for v in str(attrs["GeoTransform"]).split()))
