"""Read rasters of any sensor into layers over a place: :func:`read`, :func:`open_scene`, :func:`place`.

What is read are files, or a place and a period: then a catalogue or a folder says which files those are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from everysat.io import area, grid, plan, warp
from everysat.io.assign import SensorLike, Wanted
from everysat.io.place import place as place
from everysat.io.scene import Clear, Scene
from everysat.types import Batch, Input, Place


def read(
    files: Any,
    period: Any = None,
    inputs: Mapping[str, Input] | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    max_cloud_percent: float = 100,
    sensor: Wanted | Sequence[SensorLike] = None,
    place: Place | None = None,
    bands: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    gsd_m: float | None = None,
    times: Any = None,
    resampling: str = "auto",
    names: Mapping[str, str] | None = None,
    valid: Mapping[str, Clear] | None = None,
    stored: str = "auto",
    processing_baseline: str | None = None,
    crs: Any = None,
    nodata: float | None = None,
) -> Batch:
    """The layers of one place, in physical units: ``read(files)``, or ``read(place, "2024-06", encoder.inputs)``.

    Args:
        files: a place (:func:`place`), of which ``source`` has files; or one or several of: GeoTIFF, COG, JP2 and whatever else GDAL reads, ``.nc``, ``.zarr``, xarray objects with a
            CRS. One file may hold one band or many, one date or many; the files may come from several sensors and tiles.
        period: of a place, when: ``"2024"``, ``"2024-06"``, ``("2024-04", "2024-09")``, see :func:`everysat.io.dates.span`. What
            has no dates, such as elevation, needs none.
        inputs: the band contract of an encoder, ``encoder.inputs``: names, bands and resolutions of the layers are its.
        source: of a place, where its files come from: ``earth-search`` (the default), ``planetary-computer``, the address of a STAC
            API, the path or address of a static catalogue, or a .toml (see :mod:`everysat.io.catalogue`) about a catalogue or
            about a folder of rasters.
        max_cloud_percent: of a place, scenes that their catalogue says are cloudier are left out.
        sensor: name, table or :class:`~everysat.sensors.Sensor`, or a mapping from file name patterns to these; inferred from
            product names, band names and the tags of this package when that leaves no choice. Of a place without ``inputs``,
            what to read of it: one or a list.
        place: where to read; files are warped to its grid when theirs differs, and are untouched where theirs fits.
            Without it: the extent of the files on the grid of their finest band (in the local UTM zone for files in degrees).
        bands: read these alone, in this order.
        order: names of the bands of each file in file order, for files whose bands have no names.
        gsd_m: resample everything to this ground sampling distance, metres. Without it bands keep their own, and those of
            different resolution are layers of their own.
        times: dates where files do not tell: one for all (a tuple is a start and an end), a list with one for each file (or
            for each step of a single file), or a mapping from file names. See :func:`everysat.io.dates.span`.
        resampling: ``auto`` (nearest for classes; average when coarsening, of radar in linear power; bilinear else) or
            ``nearest``, ``bilinear``, ``average``, ``mode``.
        names: new names of layers by their default ones.
        valid: masks: a word of a file's or band's name, or the path of a mask, with the codes that mean clear (or a
            function from codes to bool, for bit flags): ``{"fmask": (0, 1)}``. Of a place, the cloud masks of its source count
            by themselves; ``{}`` is without them, ``{"sentinel-2-scl": (4, 5)}`` says what is clear by their table.
        stored: what the files hold: ``digital`` numbers, ``physical`` values, or ``auto`` to tell from type, scale and unit.
        processing_baseline: of Sentinel-2, such as ``"04.00"``, where product names and tags do not say it.
        crs: of files that do not tell their CRS.
        nodata: digital number of pixels without data, where files and sensor do not tell or tell wrongly.

    Of a place, ``place``, ``order``, ``times``, ``stored``, ``processing_baseline``, ``crs`` and ``nodata`` are not asked for: the source
    knows. Files on servers are fetched in parts, several at a time, and kept in a cache (``EVERYSAT_CACHE``,
    ``EVERYSAT_CACHE_GB``).

    Returns:
        A batch of one. Layers are named as in ``inputs``, else by sensor and ground sampling distance:
        ``sentinel-2-l1c-10m``. Observations are in the order of their dates; what is no data, masked, or outside the
        files is invalid. The place has the geobox and the longitude and latitude of its centre. Of a place, tiles of one pass are
        one observation, and observations without any valid pixel are left out.

    Raises:
        OSError: a file is missing, truncated or corrupt, or a server fails, refuses or stays silent.
        LookupError: a sensor or band is unknown or cannot be told; or nothing is found of a place.
        ContractError: a band is missing, or values are not in the unit that the sensor says.
        ValueError: no CRS, no overlap with the place, dates missing, names ambiguous, arguments that do not fit.
    """
    options = {key: value for key, value in locals().items() if key != "files"}
    scene = open_scene(files, **options)
    return area.observed(area.whole(scene)) if isinstance(files, Place) else scene.read()


def open_scene(
    files: Any,
    period: Any = None,
    inputs: Mapping[str, Input] | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    max_cloud_percent: float = 100,
    sensor: Wanted | Sequence[SensorLike] = None,
    place: Place | None = None,
    bands: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    gsd_m: float | None = None,
    times: Any = None,
    resampling: str = "auto",
    names: Mapping[str, str] | None = None,
    valid: Mapping[str, Clear] | None = None,
    stored: str = "auto",
    processing_baseline: str | None = None,
    crs: Any = None,
    nodata: float | None = None,
) -> Scene:
    """Like :func:`read`, but reads metadata alone: pixels come with ``scene.read(window)``, for areas larger than memory."""
    warp.method_for(1.0, 1.0, False, resampling)
    if gsd_m is not None and not gsd_m > 0:
        raise ValueError(f"gsd_m={gsd_m} must be positive (metres)")
    if isinstance(files, Place):
        given = {"place": place, "order": order, "times": times, "stored": stored if stored != "auto" else None}
        given |= {"processing_baseline": processing_baseline, "crs": crs, "nodata": nodata}
        _refuse(given, "is for files: of a place, its source knows. Describe the source in a .toml to change it")
        return area.finder(
            [files], period, inputs, source=source, max_cloud_percent=max_cloud_percent, sensor=sensor, bands=bands, gsd_m=gsd_m,
            resampling=resampling, names=names, valid=valid,
        ).scene(files)  # fmt: skip
    _refuse(
        {"period": period, "source": source},
        "is for a place, made with everysat.place(...): read(place, period, inputs). Dates of files are times=...",
    )
    where = None if place is None else place.geobox
    if place is not None and where is None:
        raise ValueError("place has no geobox: it does not say where it lies. Make it with everysat.place(...)")
    if isinstance(sensor, Sequence) and not isinstance(sensor, str):
        raise ValueError(
            f"sensor={sensor!r}: a list is for a place; of files, give one, or a mapping from file names to sensors"
        )
    options = plan.Options(
        sensor, bands, order, gsd_m, times, resampling, names or {}, valid or {}, stored, processing_baseline, crs,
        nodata, inputs,
    )  # fmt: skip
    opened, masks = plan.open_all(_listed(files), options)
    plans = plan.layers(plan.find_bands(opened, options), masks, options)
    if where is None:
        base = plan.base_grid(plans)
        where = base if gsd_m is None else grid.at_gsd(base, gsd_m)
    return Scene(grid.place_of(where), plan.over(plans, where))


def _refuse(given: Mapping[str, Any], why: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} {why}")


def _listed(files: Any) -> list[Any]:
    single = isinstance(files, (str, os.PathLike)) or hasattr(files, "dims")
    listed = [files] if single else list(files)
    if not listed:
        raise ValueError("files is empty: give at least one file")
    return listed
