"""What commands share: their options, and what these stand for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Files = Annotated[
    list[str], typer.Argument(help="GeoTIFF, COG, JP2, NetCDF or Zarr; one band or many, one date or many")
]
AnyFiles = Annotated[
    list[str] | None,
    typer.Argument(help="GeoTIFF, COG, JP2, NetCDF or Zarr; or none, with --place and --period", show_default=False),
]
Model = Annotated[str, typer.Argument(help="a saved model (.safetensors), or a name such as omnisat/treesat")]
Sensor = Annotated[str | None, typer.Option(help="name or .toml of the files' sensor, where they do not tell")]
Times = Annotated[
    list[str] | None, typer.Option("--time", help="date of each file, or of all, where they do not tell (2024-05-31)")
]
Where = Annotated[
    str | None,
    typer.Option("--place", help="GeoJSON/GPKG, raster, west,south,east,north or lon,lat,size_m (degrees, metres)"),
]
Period = Annotated[
    str | None, typer.Option(help="instead of files: 2024, 2024-06, or 2024-04-01/2024-09-30, from a source")
]
Source = Annotated[
    str | None,
    typer.Option(help="instead of files: earth-search, planetary-computer, a STAC address or catalog.json, or a .toml"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="change one entry, such as steps=2000 or model.options.dim=64")
]
At = Annotated[
    list[str] | None, typer.Option("--at", help="choose a setting of the model, such as patch_m=20 or output=dense")
]
Reading = Annotated[
    list[str] | None,
    typer.Option(
        help="what files do not tell: processing_baseline=N0400, stored=physical, nodata=0, crs=EPSG:32633, order=[B04,B08]"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]


def encoder_of(model: str, at: list[str] | None = None) -> Any:
    from everysat.models import weights

    return weights.load(model).at(**settings_of(at))


def settings_of(given: list[str] | None) -> dict[str, Any]:
    """Settings as ``key=value``, the values as YAML has them."""
    from everysat.recipe import settings

    return settings(given or ())


def scene_of(
    files: list[str] | None,
    encoder: Any,
    sensor: str | None,
    times: list[str] | None,
    place: str | None,
    period: str | None,
    source: str | None,
    reading: list[str] | None = None,
) -> Any:
    """Files over a place, or without files what a source has of a place in a period."""
    from everysat.io import read

    inputs = encoder.reads
    where = place_of(place, min((i.gsd_m for i in (inputs or encoder.inputs).values()), default=None))
    if files:
        if period or source:
            raise ValueError("give either files, or --period and --source of a --place, not both")
        when: Any = times[0] if times and len(times) == 1 else times or None  # one date is that of all files
        return read.open_scene(files, sensor=sensor, place=where, times=when, inputs=inputs, **reading_of(reading))
    if where is None:
        raise ValueError("give files, or a --place and a --period")
    if sensor or times or reading:
        raise ValueError("--sensor, --time and --reading are for files: the source of a --place knows them")
    when = tuple(period.split("/")) if period and "/" in period else period
    return read.open_scene(where, when, inputs, source=source)


READING = ("processing_baseline", "stored", "nodata", "crs", "order")


def reading_of(given: list[str] | None) -> dict[str, Any]:
    """What ``--reading`` says."""
    from everysat.find import suggest

    found = settings_of(given)
    for name in found:
        if name not in READING:
            raise ValueError(f"--reading {name}: {suggest(name, READING)}")
    baseline = found.get("processing_baseline")
    if isinstance(baseline, float):  # YAML takes 04.00 for a number
        found["processing_baseline"] = f"{baseline:05.2f}"
    return found


def place_of(place: str | None, gsd_m: float | None) -> Any:
    """The place that ``--place`` stands for, if it was given."""
    from everysat.io import read

    if place is None:
        return None
    numbers = place.split(",")
    if len(numbers) == 3:
        lon, lat, size_m = map(float, numbers)
        return read.place((lon, lat), gsd_m=gsd_m, size_m=size_m)
    return read.place([float(n) for n in numbers] if len(numbers) == 4 else place, gsd_m=gsd_m)


def or_dash(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def console() -> Any:
    from rich.console import Console

    return Console()


def show(table: Any) -> None:
    console().print(table)
