"""Commands that take words in place of labels."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.maps import Blend, Cluster, Device, MinValid, WindowM, Workers, _on, _run
from everysat.cli.options import (
    At,
    Files,
    Model,
    Period,
    Quiet,
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

PER_POLYGON = 20
"""Pixels of a polygon that are looked at, at most."""
WHOLE_BYTES = 1e9
"""Scenes up to this size are read at once, for examples."""


@app.command()
def classify(
    model: Model,
    files: Files,
    prompts: Annotated[
        str,
        typer.Option(help='classes in words: "forest,water,houses"; "water|a lake|a river" says one in several ways'),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="map, a Cloud-Optimized GeoTIFF; of --places .csv, .json or .md, or a map of tiles"
        ),
    ] = None,
    ways: Annotated[
        list[str] | None,
        typer.Option(help='how every class is said, such as "there is a {} in the image"; may be repeated'),
    ] = None,
    reject: Annotated[float, typer.Option(help="classes less probable than this are unsure")] = 0.0,
    least_nats: Annotated[
        float, typer.Option(help="so is what the model knows less of, nats per dimension (embed --confidence maps it)")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="of probabilities; above 1 for less sure ones")] = 1.0,
    examples: Annotated[Path | None, typer.Option(help="polygons of some classes, to move the prompts to")] = None,
    column: Annotated[str | None, typer.Option(help="which attribute of them holds the class")] = None,
    worth: Annotated[float, typer.Option(help="how many polygons a prompt is worth beside them")] = 4.0,
    places: Annotated[bool, typer.Option("--places", help="one class for each file, or for each tile")] = False,
    tile_m: Annotated[
        float | None,
        typer.Option(help="side of tiles that --places are cut to, metres; best that of the chips a model learned on"),
    ] = None,
    gsd_m: Annotated[float | None, typer.Option(help="pixel of the map, metres; the model's token by default")] = None,
    shifts: Annotated[int, typer.Option(help="token grids per axis for maps finer than tokens")] = 1,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="write those of all classes too")] = False,
    save: Annotated[
        Path | None, typer.Option(help="write model and prompts as .safetensors, which everysat predict takes")
    ] = None,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    period: Period = None,
    source: Source = None,
    reading: Reading = None,
    at: At = None,
    window_m: WindowM = None,
    blend: Blend = False,
    min_valid: MinValid = 0.0,
    workers: Workers = None,
    cluster: Cluster = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """A map, or a class of each place, from words: what of them the model finds most like it. With --reject, or it is unsure."""
    from everysat.tasks import prompts as words

    classes = classes_of(prompts, ways)
    if (examples is None) != (column is None):
        raise ValueError("--examples and --column go together: polygons, and which attribute of them holds the class")
    if tile_m is not None and not places:
        raise ValueError("--tile-m is the side of --places: give both")
    if out is None and not places:
        raise ValueError("--out is missing: a map is written as .tif; --places shows a table without it")
    (encoder,) = _on(device, encoder_of(model, at))
    learned_m = getattr(getattr(encoder, "settings", None), "chip_m", None)
    if tile_m is not None and learned_m and tile_m > 2 * learned_m and not quiet:
        print(
            f"--tile-m {tile_m:g} is much more than the {learned_m:g} m that the model takes at once: slow, and not what it learned on",
            file=sys.stderr,
        )

    def scene(these: list[str]) -> Any:
        return scene_of(these, encoder, sensor, times, place, period, source, reading)

    known = (
        None if examples is None else examples_of(encoder, scene(files), examples, str(column), list(classes), quiet)
    )
    task = words.build(
        "place" if places else "pixel", encoder=encoder, classes=classes, reject=reject, least_nats=least_nats,
        temperature=temperature, examples=known, worth=worth,
    )  # fmt: skip
    if save is not None:
        _save(save, model, encoder, task)
    options = {"window_m": window_m, "blend": blend, "min_valid": min_valid, "workers": workers, "cluster": cluster}
    if not places:
        mapper = _mapper(encoder, task, gsd_m, shifts)
        _run(mapper, scene(files), out, probabilities=probabilities, quiet=quiet, **options)  # type: ignore[arg-type]
    elif tile_m is not None and out is not None and out.suffix.lower() in (".tif", ".tiff"):
        _run(_tiles(encoder, task, tile_m), scene(files), out, probabilities=probabilities, quiet=quiet, **options)
    else:
        rows = (
            _rows_of_tiles(encoder, task, tile_m, scene(files))
            if tile_m
            else _rows_of_files(encoder, task, files, scene)
        )
        _tell(list(rows), task, out)


def classes_of(prompts: str, ways: list[str] | None = None) -> dict[str, list[str]]:
    """Ways of saying each class by its name, the first way of each: ``"forest,water|a lake"``."""
    found: dict[str, list[str]] = {}
    for part in prompts.split(","):
        said = [way.strip() for way in part.split("|") if way.strip()]
        if not said:
            raise ValueError(f'--prompts {prompts!r} has a class without words; expected "forest,water,houses"')
        if said[0] in found:
            raise ValueError(f"--prompts names {said[0]!r} twice; separate several ways of saying it with |")
        found[said[0]] = said
    for way in ways or ():
        if way.count("{}") != 1:
            raise ValueError(
                f'--ways {way!r} must hold {{}} once, where the class stands: "there is a {{}} in the image"'
            )
    return {name: [w.replace("{}", one) for w in ways or ["{}"] for one in said] for name, said in found.items()}


def examples_of(
    encoder: Any, scene: Any, source: Path, column: str, classes: list[str], quiet: bool = True
) -> dict[str, Any]:
    """What the model says of the cells below polygons, one Gaussian a polygon: [n, dim] by the names of ``classes`` that the
    attribute ``column`` has. Polygons of other classes are not looked at."""
    import torch

    from everysat import polygons
    from everysat.io import vector
    from everysat.mapping.source import open_source
    from everysat.nn.mappers import Dense
    from everysat.tasks.prompts import Said, exemplars

    there = {str(value) for value in vector.load_frame(source).get(column, ())}
    named = [name for name in classes if name in there]
    if not named:
        seen = f"which has {', '.join(sorted(there)[:12])}" if there else "which is none of its attributes"
        raise ValueError(f"--examples {source}: no class of {', '.join(classes)} is in --column {column}, {seen}")
    side = polygons.token_m(encoder)
    gsd_m = min(layer.gsd_m for layer in scene.layers.values())
    ground = open_source(scene, gsd_m)
    if ground.bytes_per_m2 * math.prod(ground.shape) * gsd_m**2 > WHOLE_BYTES:
        raise ValueError(
            "--examples: the files are too large to be read at once; classify with --save on a part of them (--place), then everysat predict"
        )
    batch = scene.read()
    labels = polygons.burn(source, batch.places[0], column, gsd_m=gsd_m, classes=named)
    y, x = _some_pixels(labels).unbind(1)
    chip_m = encoder.settings.chip_m
    extract = Dense(encoder, gsd_m, side, chip_m=chip_m, stride_m=chip_m, embed=Said(encoder), dim=2 * encoder.dim)
    found = extract.at(batch, y, x)
    keep = torch.isfinite(found).all(1)
    found, label, polygon = found[keep], labels.label[y, x][keep], labels.polygon[y, x][keep]
    if not len(found):
        raise ValueError(f"no polygon of {source} labels a pixel of the files: do they cover the same ground?")
    examples = {}
    for code, name in enumerate(labels.classes):
        mine = label == code
        if mine.any():
            mean, log_var = found[mine].chunk(2, 1)
            examples[name] = exemplars(mean, log_var, polygon[mine])
    if not quiet:
        print("examples: " + ", ".join(f"{len(g.mean)} of {n}" for n, g in examples.items()), file=sys.stderr)
    return examples


def _some_pixels(labels: Any) -> Any:
    """Rows and columns [n, 2] of up to :data:`PER_POLYGON` labelled pixels of each polygon, drawn at random."""
    import torch

    from everysat.nn.ragged import ordinal

    at = torch.nonzero(labels.label >= 0)
    at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(0))]
    polygon = labels.polygon[at[:, 0], at[:, 1]]
    return at[ordinal(polygon, int(polygon.max()) + 1 if len(at) else 0) < PER_POLYGON]


def _mapper(encoder: Any, task: Any, gsd_m: float | None, shifts: int) -> Any:
    from everysat import polygons
    from everysat.tasks.prompts import Finer, Judged

    if shifts == 1 and gsd_m is None:
        return polygons.task_mapper(encoder, task)
    side, chip_m = polygons.token_m(encoder), encoder.settings.chip_m
    return Finer(
        encoder, gsd_m or side / shifts, side, shifts, chip_m=chip_m, stride_m=chip_m,
        embed=Judged(encoder, task.head), dim=len(task.names) + 1, task=task,
    )  # fmt: skip


def _tiles(encoder: Any, task: Any, tile_m: float) -> Any:
    from everysat.nn.mappers import Tasked

    return Tasked(encoder, task, tile_m, align_m=tile_m, halo_m=0.0, chip_m=tile_m)


def _rows_of_tiles(encoder: Any, task: Any, tile_m: float, scene: Any) -> Iterator[tuple[str, Any]]:
    """Centre and probabilities of tiles in which something was observed."""
    import torch
    from pyproj import Transformer

    from everysat.io import grid
    from everysat.mapping.source import open_source
    from everysat.predict import plan_of

    mapper, ground = _tiles(encoder, task, tile_m), open_source(scene, tile_m)
    to_degrees = Transformer.from_crs(ground.geobox.crs.to_wkt(), "EPSG:4326", always_xy=True)
    for window in plan_of(mapper, ground, None, None, None, False).windows():
        image = mapper(ground.read(*window.read))[0]
        top, _, left, _ = window.read
        for y, x in torch.isfinite(image).all(0).nonzero().tolist():
            east, north = grid.positions(ground.geobox.affine, left + x + 0.5, top + y + 0.5)
            lon, lat = to_degrees.transform(float(east), float(north))
            yield f"{lon:.5f},{lat:.5f}", image[:, y, x]


def _rows_of_files(encoder: Any, task: Any, files: list[str], scene: Any) -> Iterator[tuple[str, Any]]:
    """Name and probabilities of each file; None where nothing was observed in it."""
    import torch

    from everysat.types import ContractError

    for file in files:
        try:
            batch = scene([file]).read()
        except (ContractError, ValueError) as error:
            raise type(error)(
                f"{error} (--places takes each file as a place of its own; --tile-m cuts all files together to tiles)"
            ) from error
        with torch.no_grad():
            found = task.predict(task.features(encoder.eval(), batch.to(next(encoder.parameters()).device)), batch)
        yield Path(file).name, found.values[0, :, 0, 0] if found.valid[0].all() else None


def _tell(rows: list[tuple[str, Any]], task: Any, out: Path | None) -> None:
    """The table of places, shown or saved."""
    from everysat.table import Table
    from everysat.tasks.prompts import UNSURE

    lines = []
    for name, p in rows:
        line: dict[str, Any] = {"place": name, "class": "nothing observed", "probability": "", "sure": ""}
        if p is not None:
            classes, best = p[: len(task.names)], int(p[: len(task.names)].argmax())
            sure, total = int(p.argmax()) < len(task.names), float(classes.sum())
            line |= {"class": task.names[best], "probability": float(classes[best]) / total} if total else {"class": ""}
            line["sure"] = "yes" if sure else UNSURE
        lines.append(line)
    table = Table.of(
        "Classes of places", lines, ("Probability among these prompts, one of which is taken to be right.",)
    )
    if out is None:
        show(table)
    else:
        print(table.save(out))


def _save(path: Path, model: str, encoder: Any, task: Any) -> None:
    from everysat.models import weights

    contract = weights.contract_path(weights.located(model))
    told = weights.read_contract(Path(str(contract)[: -len(".json")]), weights.FORMAT, "") if contract.is_file() else {}
    facts: dict[str, Any] = {key: told[key] for key in ("source", "licence", "recipe") if key in told}
    print(f"weights: {weights.save(path, encoder, task, {**facts, 'of_weights': told.get('sha256')})}")
