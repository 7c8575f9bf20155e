"""The command that answers questions about an image."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import Period, Reading, Sensor, Source, Times, reading_of, scene_of, show

app = typer.Typer()
SIZE_M = 480.0
"""For models that do not know on what they learned."""


@app.command()
def ask(
    model: Annotated[
        str, typer.Argument(help="a model that answers questions, as everysat finetune ask_berlin writes")
    ],
    files: Annotated[
        list[str],
        typer.Argument(help='files of a scene and questions about it, which end with "?"', show_default=False),
    ],
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", help="a question that does not end with ?; any number of them"),
    ] = None,
    place: Annotated[
        str | None, typer.Option(help="LON,LAT of the centre in degrees; by default the middle of the files")
    ] = None,
    size_m: Annotated[
        float | None,
        typer.Option(help="side of the square that is asked about, metres; by default that of the training images"),
    ] = None,
    sure: Annotated[float | None, typer.Option(help="least probability of an answer; below it says: not sure")] = None,
    json_: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    sensor: Sensor = None,
    times: Times = None,
    period: Period = None,
    source: Source = None,
    reading: Reading = None,
) -> None:
    """Is there water? How much of it is forest? Answers about a place, how likely they are right, and what could be guessed without the image."""
    images, questions = told_apart(files, question or ())
    encoder, task = _answering(model)
    if sure is not None and not 0 <= sure <= 1:
        raise ValueError(f"--sure {sure:g} must lie between 0 and 1")
    where = None if place is None else _lonlat(place)
    side_m = task.side_m or SIZE_M if size_m is None else size_m
    if not side_m > 0:
        raise ValueError(f"--size-m {side_m:g} must be positive (metres)")
    if images:
        if period or source:
            raise ValueError("give either files, or --period and --source of a --place, not both")
        batch = _middle(images, encoder, side_m, where, sensor, times, reading)
    elif where is None:
        raise ValueError("no files to look at: give files before the questions, or --place LON,LAT and --period")
    else:
        square = f"{where[0]},{where[1]},{side_m}"
        batch = scene_of(None, encoder, sensor, times, square, period, source, reading).read()
    replies = task.ask(encoder, batch, questions, sure=sure)
    if json_:
        rows = [{**asdict(reply), "said": reply.said} for reply in replies]
        print(json.dumps({"place": _described(batch.places[0]), "replies": rows}, indent=1, ensure_ascii=False))
        return
    show(table(replies, batch.places[0]))


def told_apart(given: Sequence[str], more: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files, and questions: what ends with a question mark and is no file, and ``more``.

    Raises:
        ValueError: no question.
    """
    asked = [text for text in given if text.rstrip().endswith("?") and not Path(text).exists()]
    files = [text for text in given if text not in asked]
    if sentences := [text for text in files if " " in text.strip() and not Path(text).exists() and "/" not in text]:
        raise ValueError(
            f"{sentences[0]!r} is no file, and no question either: end it with ?, or give it by --question"
        )
    questions = list(dict.fromkeys([*asked, *more]))
    if not questions:
        raise ValueError('no question: end it with ?, as "Is there water?", or give it by --question')
    return files, questions


def table(replies: Sequence[Any], place: Any) -> Any:
    """A row a question."""
    from everysat.table import Table

    rows = [
        {
            "question": reply.question, "type": reply.kind, "answer": reply.said,
            "probability": f"{reply.probability:.0%}" if reply.observed else "",
            "would be" : reply.answer if reply.observed and not reply.sure else "",
            "without the image": f"{reply.guess} ({reply.guess_probability:.0%})",
        }
        for reply in replies
    ]  # fmt: skip
    at = _described(place)
    title = f"{place.width_m:g} x {place.height_m:g} m" + (f" at {at['lon']}, {at['lat']}" if "lon" in at else "")
    notes = (
        "probability: that the answer is right. without the image: what the same model guesses from the question.",
    )
    made = Table.of(title, rows, notes)
    return made if any(row["would be"] for row in rows) else made.without("would be")


def _answering(model: str) -> tuple[Any, Any]:
    from everysat.models import weights
    from everysat.tasks.answer import Answer

    encoder, task = weights.load_task(weights.located(model))
    if not isinstance(task, Answer):
        raise ValueError(
            f"{model} answers no questions, its task is {type(task).__name__.lower()}: train one that does, with everysat finetune ask_berlin"
        )
    return encoder, task


def _lonlat(place: str) -> tuple[float, float]:
    try:
        lon, lat = map(float, place.split(","))
    except ValueError:
        raise ValueError(
            f"--place {place!r} must be LON,LAT in degrees, such as 13.4,52.5; its size is --size-m"
        ) from None
    if not (abs(lon) <= 180 and abs(lat) <= 90):
        raise ValueError(
            f"--place {place!r} is no position on Earth: longitude comes first, -180 to 180, then latitude"
        )
    return lon, lat


def _middle(
    files: list[str], encoder: Any, side_m: float, lonlat: tuple[float, float] | None, sensor: str | None, times: list[str] | None, reading: list[str] | None
) -> Any:  # fmt: skip
    """The square of files, on their own pixels."""
    from pyproj import Transformer

    from everysat.io import grid, read

    when: Any = times[0] if times and len(times) == 1 else times or None
    scene = read.open_scene(files, sensor=sensor, times=when, inputs=encoder.reads, **reading_of(reading))
    gsd_m = grid.gsd_m(scene.geobox)
    side = max(scene.step, round(side_m / gsd_m / scene.step) * scene.step)
    row, column = (size / 2 for size in scene.shape)
    if lonlat is not None:
        x, y = Transformer.from_crs("EPSG:4326", grid.crs_of(scene.geobox).proj, always_xy=True).transform(*lonlat)
        column, row = ~scene.geobox.affine * (x, y)
        if not (0 <= row < scene.shape[0] and 0 <= column < scene.shape[1]):
            lon, lat = grid.to_lonlat(scene.geobox, [0, scene.shape[1]], [scene.shape[0], 0])
            raise ValueError(
                f"--place {lonlat[0]:g},{lonlat[1]:g} lies outside of the files, which reach from {lon[0]:.4f},{lat[0]:.4f} to {lon[1]:.4f},{lat[1]:.4f}"
            )
    rows, columns = (
        _span(centre, side, size, scene.step) for centre, size in zip((row, column), scene.shape, strict=True)
    )
    return scene.read((rows, columns))


def _span(centre: float, side: int, size: int, step: int) -> slice:
    """``side`` of ``size`` pixels around a centre, moved inside, that begins at a whole pixel of all layers."""
    last = max(0, (size - side) // step)
    start = step * min(last, max(0, math.floor((centre - side / 2) / step + 0.5)))
    return slice(start, min(start + side, size))


def _described(place: Any) -> dict[str, float]:
    size = {"width_m": place.width_m, "height_m": place.height_m}
    return (
        size if place.lonlat is None else {"lon": round(place.lonlat[0], 5), "lat": round(place.lonlat[1], 5), **size}
    )
