"""Commands that map an area."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import (
    AnyFiles,
    At,
    Model,
    Period,
    Quiet,
    Sensor,
    Source,
    Times,
    Where,
    encoder_of,
    scene_of,
)

app = typer.Typer()


@app.command()
def predict(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="map, a Cloud-Optimized GeoTIFF")],
    files: AnyFiles = None,
    labels: Annotated[
        Path | None, typer.Option(help="polygons to learn the classes from, for a model without a task")
    ] = None,
    column: Annotated[str | None, typer.Option(help="which attribute holds the class")] = None,
    gsd_m: Annotated[float | None, typer.Option(help="pixel of the map, metres; the finest input by default")] = None,
    shifts: Annotated[int, typer.Option(help="token grids per axis for maps finer than tokens")] = 1,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    period: Period = None,
    source: Source = None,
    at: At = None,
    quiet: Quiet = False,
) -> None:
    """A map and its confidence, of an area of any size. Interrupted, the same command goes on."""
    from everysat import polygons
    from everysat.models import weights
    from everysat.predict import predict as run

    if labels is None:
        encoder, task = weights.load_task(model)
        mapper: Any = polygons.task_mapper(encoder, task)
        scene = scene_of(files, encoder, sensor, times, place, period, source)
    else:
        if column is None:
            raise ValueError("--labels needs --column, the attribute that holds the class")
        encoder = encoder_of(model, at)
        scene = scene_of(files, encoder, sensor, times, place, period, source)
        mapper = polygons.probe_mapper(encoder, scene.read(), labels, column, gsd_m=gsd_m, shifts=shifts)
    for what, path in run(mapper, scene, out, quiet=quiet).items():
        print(f"{what}: {path}")


@app.command()
def embed(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help=".zarr, .tif or .parquet")],
    files: AnyFiles = None,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    period: Period = None,
    source: Source = None,
    at: At = None,
    quiet: Quiet = False,
) -> None:
    """Features of an area, one per token: as a Cloud-Optimized GeoTIFF (of any size, resumable), Zarr or GeoParquet."""
    from everysat import polygons
    from everysat.io.write import write
    from everysat.predict import predict as run
    from everysat.types import Features

    encoder = encoder_of(model, at)
    scene = scene_of(files, encoder, sensor, times, place, period, source)
    mapper = polygons.dense(encoder, polygons.token_m(encoder))
    if out.suffix in (".tif", ".tiff"):
        print(run(mapper, scene, out, quiet=quiet)["features"])
        return
    batch = scene.read()
    print(write(Features.of_grid(mapper(batch), batch.places, mapper.gsd_m), out))
