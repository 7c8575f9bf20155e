"""The command that says where on Earth something may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everysat.cli.options import (
    AnyFiles,
    At,
    Model,
    Period,
    Reading,
    Sensor,
    Source,
    Times,
    Where,
    encoder_of,
    scene_of,
    show,
)

app = typer.Typer()
LARGEST = 16_000_000
"""Pixels of an image that is read in one piece."""


@app.command()
def locate(
    model: Model,
    files: AnyFiles = None,
    text: Annotated[
        list[str] | None, typer.Option(help="what is said of the place; may be repeated, and go with files")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=".tif: the likelihood of every cell of the Earth, in EPSG:4326")
    ] = None,
    top: Annotated[int, typer.Option(help="how many places are listed")] = 5,
    step_deg: Annotated[float, typer.Option(help="side of the cells, degrees")] = 1.0,
    radius_km: Annotated[float, typer.Option(help="radius of the place that is looked for")] = 100.0,
    apart_km: Annotated[float, typer.Option(help="places of the list are so far from each other")] = 1000.0,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    period: Period = None,
    source: Source = None,
    reading: Reading = None,
    at: At = None,
) -> None:
    """Where on Earth it may be, by what is said of it or what images show: a table of places, and a map of the Earth."""
    from everysat.locate import locate as run

    encoder, batch = encoder_of(model, at), None
    if files or place:
        if (not encoder.inputs and not encoder.any_sensor) or not encoder.config.get("backbone", True):
            raise ValueError(f"{model} reads no images: describe the place with --text")
        scene = scene_of(files, encoder, sensor, times, place, period, source, reading)
        rows, columns = scene.shape
        if rows * columns > LARGEST:
            raise ValueError(
                f"the images have {rows} x {columns} pixels; cut out {LARGEST:,} or fewer with --place lon,lat,size_m"
            )
        batch = scene.read()
    elif not text:
        raise ValueError("what is looked for? Give --text, or files")
    found = run(encoder, text or (), batch, step_deg=step_deg, radius_m=1000 * radius_km)
    show(found.table(top, apart_km))
    if out is not None:
        print(found.save(out))
