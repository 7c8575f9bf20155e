"""The command line: a few verbs, each thin over the Python function of the same name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Earth observation for any sensor: pre-train, fine-tune, embed, map. Start with: everysat demo",
)

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
    list[str] | None, typer.Option("--time", help="date of each file, where they do not tell (2024-05-31)")
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
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]

data_app = typer.Typer(no_args_is_help=True, help="Published datasets: which there are, fetch one, check one.")
app.add_typer(data_app, name="data")


@app.command()
def sensors(name: Annotated[str | None, typer.Argument(help="one sensor in detail")] = None) -> None:
    """The sensors that are described, or the bands of one."""
    from everysat import sensors as tables
    from everysat.table import Table

    if name is None:
        found = [tables.get(each) for each in tables.names()]
        rows: list[tuple[object, ...]] = [
            (s.name, s.kind, len(s.bands), f"{min(b.gsd_m for b in s.bands):g}", s.title) for s in found
        ]
        _print(Table("Sensors", ("name", "kind", "bands", "finest m", "what"), tuple(rows)))
        return
    sensor = tables.get(name)
    rows = [
        (
            b.name,
            f"{b.gsd_m:g}",
            b.unit,
            _or_dash(b.wavelength_um),
            _or_dash(b.width_um),
            b.polarisation or "",
            ", ".join(b.aliases),
            b.description,
        )
        for b in sensor.bands
    ]
    names = ("band", "gsd_m", "unit", "wavelength_um", "width_um", "polarisation", "aliases", "what")
    _print(Table(sensor.title, names, tuple(rows), (f"Source: {sensor.source}",)))


@app.command()
def inspect(
    files: Files,
    model: Annotated[str | None, typer.Option(help="compare with this model's band contract")] = None,
    sensor: Sensor = None,
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """What is in files: bands, grid, CRS, dates, no-data, values - and what does not fit a model."""
    from everysat.io.inspect import inspect as look

    contract = None if model is None else _encoder(model).reads
    report = look(files, contract, sensor=sensor)
    if json:
        import json as format

        print(format.dumps(report.to_dict(), indent=1))
    else:
        _console().print(report)
    raise typer.Exit(1 if report.problems and model else 0)


@app.command()
def stats(
    files: Annotated[
        list[str] | None, typer.Argument(help="GeoTIFF, COG, JP2, NetCDF or Zarr; or none, with --data")
    ] = None,
    data: Annotated[str | None, typer.Option(help="a dataset by name, such as pastis or worldcereal/cube")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="option of the dataset, such as root=DIR or tile_m=300")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file for load(..., statistics=FILE)")] = None,
    places: Annotated[
        int | None, typer.Option(help="so many places (or windows), evenly spread, instead of all")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="layers, bands and their order as this model's band contract has them")
    ] = None,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    quiet: Quiet = False,
) -> None:
    """Mean and standard deviation of every band over all valid pixels, of files or of a dataset: what normalises a model's input."""
    from everysat.data.statistics import Windows, summarise
    from everysat.io import statistics
    from everysat.io.read import open_scene
    from everysat.recipe import Named

    if bool(files) == bool(data):
        raise ValueError("give either files or --data NAME, not both and not neither")
    if files and set_:
        raise ValueError("--set is for options of a dataset given by --data")
    inputs = None if model is None else _encoder(model).reads
    options = _settings(set_)
    if data:
        dataset = Named(name=data, options=options).build("data")
    else:
        where = _where(place, min((i.gsd_m for i in inputs.values()), default=None) if inputs else None)
        dataset = Windows(open_scene(files, sensor=sensor, place=where, times=times or None, inputs=inputs))
    layers = {
        name: summary.plain(name)
        for name, summary in summarise(dataset, places=places, inputs=inputs, quiet=quiet).items()
    }
    _print(_statistics_table(layers))
    if out is not None:
        source = {"data": data, "options": options} if data else {"files": files}
        print(statistics.save(out, layers, {**source, "places": places or len(dataset)}))


def _statistics_table(layers: dict[str, dict[str, Any]]) -> Any:
    from everysat.table import Table

    keys = ("bands", "unit", "mean", "std", "count")
    rows = [
        (name, band, unit, f"{mean:.5g}", f"{std:.5g}", count)
        for name, entry in layers.items()
        for band, unit, mean, std, count in zip(*(entry[key] for key in keys), strict=True)
    ]
    notes = [f"{name}: {entry['sensor']}, {entry['gsd_m']:g} m" for name, entry in layers.items()]
    return Table("Statistics", ("layer", "band", "unit", "mean", "std", "valid pixels"), tuple(rows), tuple(notes))


@app.command()
def pretrain(recipe: str, settings: Settings = None, quiet: Quiet = False) -> None:
    """Pre-train without labels, as a recipe (a YAML file, or the name of a shipped one) says. Again to resume."""
    _train(recipe, settings, quiet, "objective")


@app.command()
def finetune(recipe: str, settings: Settings = None, quiet: Quiet = False) -> None:
    """Train for a task with labels, as a recipe says. Again to resume."""
    _train(recipe, settings, quiet, "task")


@app.command()
def evaluate(
    model: Model,
    files: Annotated[list[str] | None, typer.Argument(help="files of a scene, or the name of a dataset")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="polygons of a scene (GPKG, GeoJSON, GeoParquet); of a dataset, how many: 0.1, 10% or 5/class"
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="which attribute of polygons holds the class")] = None,
    how: Annotated[str, typer.Option(help="probe (linear), knn; of a dataset also forest or finetune")] = "probe",
    fractions: Annotated[str, typer.Option(help="shares of the training polygons that are labelled")] = "0.02,0.1,1",
    seeds: Annotated[int, typer.Option(help="draws of training labels")] = 5,
    root: Annotated[Path | None, typer.Option(help="folder of the dataset")] = None,
    modalities: Annotated[str | None, typer.Option(help="layers of the dataset that are shown, such as s2,s1")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="of the dataset in a suite: level=pixel, options.fold=1")
    ] = None,
    block_m: Annotated[
        float, typer.Option(help="side of the blocks of ground that are tested together, metres")
    ] = 1500.0,
    only: Annotated[str | None, typer.Option(help="layers that are given to the model, all by default")] = None,
    baselines: Annotated[bool, typer.Option(help="also without learned weights")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="table as .csv, .md or .json")] = None,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    period: Period = None,
    source: Source = None,
    at: At = None,
    quiet: Quiet = False,
) -> None:
    """How well a model does with few labels: on a dataset, or on a scene from labelled polygons, on ground that was held out."""
    from everysat import polygons
    from everysat.data.catalogue import is_dataset

    encoder = _encoder(model, at)
    if files and len(files) == 1 and is_dataset(files[0]):
        if column or at:
            raise ValueError(f"--column and --at are for scenes; {files[0]} is a dataset")
        _evaluate(
            model, encoder.family, files[0], how, labels or "100%", seeds, root, modalities, set_, baselines, out, quiet
        )
        return
    if labels is None or column is None:
        raise ValueError("give --labels (a file of polygons) and --column, or the name of a dataset in place of files")
    table = polygons.compare(
        {Path(model).stem: encoder},
        _scene(files, encoder, sensor, times, place, period, source).read(),
        labels,
        column,
        fractions=[float(part) for part in fractions.split(",")],
        draws=seeds,
        block_m=block_m,
        layers={"all": ()} if only is None else {only: tuple(only.split(","))},
        baselines=baselines,
        how=how,
        quiet=quiet,
    )
    _print(table)
    if out is not None:
        table.save(out)
        print(out)


def _evaluate(
    model: str,
    family: str,
    name: str,
    how: str,
    labels: str,
    seeds: int,
    root: Path | None,
    modalities: str | None,
    set_: list[str] | None,
    baselines: bool,
    out: Path | None,
    quiet: bool,
) -> None:
    """A suite of one model on one dataset."""
    from everysat.bench import run
    from everysat.suite import Suite
    from everysat.tables import save, tables

    amounts = [part if part.endswith(("%", "class")) else f"{100 * float(part):g}%" for part in labels.split(",")]
    data = {"name": name, "options": {} if root is None else {"root": str(root)}, "labels": amounts}
    data |= {"modalities": {modalities or "all": modalities.split(",") if modalities else []}}
    rows: dict[str, Any] = {Path(model).stem: {"model": {"name": family, "weights": model}, "how": [how]}}
    rows |= {"image statistics": {"baseline": "statistics"}} if baselines else {}
    tree = {
        "name": f"{Path(model).stem}-{name.replace('/', '-')}",
        "datasets": {name: data},
        "models": rows,
        "seeds": seeds,
    }
    suite = Suite.parse(tree, [f"datasets.{name}.{entry}" for entry in set_ or ()])
    results = run(suite, quiet=quiet)
    _print(tables(suite, results)[0])
    for path in save(suite, results) if out is None else [tables(suite, results)[0].save(out)]:
        print(path)
    _fail_on_errors(results)


def _fail_on_errors(results: list[Any]) -> None:
    failed = [f"{result.cell}: {result.facts['error']}" for result in results if "error" in result.facts]
    if failed:
        raise ValueError("\n  ".join([f"{len(failed)} of {len(results)} cells failed:", *failed]))


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped suite")],
    settings: Settings = None,
    only: Annotated[str, typer.Option(help="only cells whose name contains this, such as 'OmniSat' or '/ s2 /'")] = "",
    jobs: Annotated[int, typer.Option(help="processes that share the cells")] = 1,
    restart: Annotated[bool, typer.Option(help="evaluate all cells anew; features and finished runs are kept")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare models on datasets, label fractions and sensors: tables, CSV and a report. Interrupted, the same command goes on."""
    from everysat.bench import run
    from everysat.suite import Suite
    from everysat.tables import save, tables

    loaded = Suite.load(suite, settings or ())
    results = run(loaded, only=only, jobs=jobs, restart=restart, quiet=quiet)
    for table in tables(loaded, results):
        _print(table)
    for path in save(loaded, results):
        print(path)
    _fail_on_errors(results)


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
        scene = _scene(files, encoder, sensor, times, place, period, source)
    else:
        if column is None:
            raise ValueError("--labels needs --column, the attribute that holds the class")
        encoder = _encoder(model, at)
        scene = _scene(files, encoder, sensor, times, place, period, source)
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

    encoder = _encoder(model, at)
    scene = _scene(files, encoder, sensor, times, place, period, source)
    mapper = polygons.dense(encoder, polygons.token_m(encoder))
    if out.suffix in (".tif", ".tiff"):
        print(run(mapper, scene, out, quiet=quiet)["features"])
        return
    batch = scene.read()
    print(write(Features.of_grid(mapper(batch), batch.places, mapper.gsd_m), out))


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help="model and variant that the file holds, such as omnisat/treesat")],
    file: Annotated[Path, typer.Argument(help="published checkpoint: .pth, .ckpt or .safetensors")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the .safetensors; by default where the model's name finds it")
    ] = None,
    licence: Annotated[str, typer.Option(help="of the weights, for the contract")] = "",
    source: Annotated[str, typer.Option(help="where the weights come from, for the contract")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="change an entry of the model's config, such as dim=384")
    ] = None,
) -> None:
    """Published weights under the names used here, with a contract beside them. The only command that unpickles."""
    from everysat.models import weights

    print(weights.convert(name, file, out, licence=licence, source=source, **_settings(set_)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the results")] = Path("demo"),
    short: Annotated[
        bool, typer.Option("--short", help="a minute instead of several; scores mean little then")
    ] = False,
) -> None:
    """Learn from an unlabelled real Sentinel-2 scene, then map land use from a few polygons. Again to resume."""
    from everysat.demo import run

    run(out, short=short)


@data_app.command("list")
def data_list(
    folder: Annotated[
        Path | None, typer.Option("--in", help="look there for what is at hand", envvar="EVERYSAT_DATA")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """The datasets that can be read, where they come from, and which are at hand."""
    from everysat.data.catalogue import entries

    found = list(entries(folder))
    if json:
        import json as format

        print(format.dumps([vars(entry) for entry in found], indent=1))
        return
    for entry in found:  # not a table: addresses are to be copied
        print(f"{entry.name}: {entry.title}\n  at hand: {entry.at_hand}")
        facts = ("layers", ", ".join(entry.layers)), ("splits", ", ".join(entry.splits))
        for what, fact in (*facts, ("licence", entry.licence), ("source", entry.source)):
            print(f"  {what}: {fact}" if fact else "", end="\n" if fact else "")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="a dataset, such as pastis-hd")],
    to: Annotated[Path, typer.Option("--to", help="folder that will hold it")],
    files: Annotated[list[str] | None, typer.Option(help="only these, such as *.json or DATA_S2/*")] = None,
    host: Annotated[str | None, typer.Option("--from", help="where a dataset is at several hosts")] = None,
    unpack: Annotated[bool, typer.Option("--unpack", help="also unpack its archives, where they lie")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files, fetch nothing")] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a dataset from its host, checked. Interrupted, the same command goes on."""
    from everysat.data import catalogue
    from everysat.io import download
    from everysat.io.unpack import is_archive
    from everysat.io.unpack import unpack as run_unpack

    listing = catalogue.origin(name, host).files()
    chosen = download.choose(listing.files, files or ())
    print(f"{name}: {len(chosen)} files, {sum(f.size for f in chosen) / 1e9:.2f} GB, from {listing.page}")
    print(f"Licence: {catalogue.licence(name)}" + (f" (its host says {listing.licence})" if listing.licence else ""))
    unchecked = sum(not f.checksum for f in chosen)
    if unchecked:
        print(f"The host tells no checksum of {unchecked} files: of these only the size is checked")
    if dry_run:
        for file in chosen:
            print(f"{file.size:>14} {file.path}")
        return
    done = download.download(listing, to, files=files or (), quiet=quiet)
    print(f"{len(done.fetched)} files fetched, {len(done.there)} were there: all of it is in {to}")
    archives = [path for path in (*done.there, *done.fetched) if is_archive(path)]
    if unpack:
        print(f"{sum(run_unpack(path, quiet=quiet) for path in archives)} archives unpacked")
    elif archives:
        print(f"{len(archives)} of them are archives; --unpack unpacks them")


@data_app.command("check")
def data_check(
    folder: Annotated[Path | None, typer.Argument(help="the folder of the dataset, for --name")] = None,
    name: Annotated[str | None, typer.Option(help="which dataset it is, such as pastis-hd")] = None,
    recipe: Annotated[str | None, typer.Option(help="instead: all data of a recipe")] = None,
    split: Annotated[list[str] | None, typer.Option(help="only these parts; all by default")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="option of the dataset, such as fold=1")] = None,
    near_m: Annotated[float, typer.Option(help="report places of two parts that are closer than so many metres")] = 0.0,
    outside: Annotated[float, typer.Option(help="share of values that may be out of range")] = 0.001,
    allow: Annotated[list[str] | None, typer.Option(help="kinds of problems that are no failure, such as near")] = None,
    workers: Annotated[int, typer.Option(help="threads that read")] = 2,
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    quiet: Quiet = False,
) -> None:
    """Open every place: what is missing, broken, out of range or repeated, and what leaks between the parts."""
    from everysat.data import catalogue
    from everysat.data.check import check

    if (name is None) == (recipe is None):
        raise ValueError("give either a folder and --name DATASET, or --recipe RECIPE, not both and not neither")
    if recipe is not None:
        from everysat.recipe import Recipe

        loaded = Recipe.load(recipe, set_ or ())
        sources = {"data": loaded.data, "validation": loaded.validation}
        each = {
            kind: {f"{kind} {s.called} {i}": s.build("data") for i, s in enumerate(sources[kind])} for kind in sources
        }
        together, parts = list(each.values()), {name: part for some in each.values() for name, part in some.items()}
    else:
        together = []
        parts = catalogue.splits(str(name), folder, split or (), **_settings(set_))
    limits: dict[str, Any] = {"near_m": near_m, "outside": outside, "allow": allow or ()}
    report = check(parts, **limits, together=together, workers=workers, quiet=quiet)
    print(report.json() if json else report)
    raise typer.Exit(0 if report.good else 1)


def _train(recipe: str, settings: list[str] | None, quiet: bool, kind: str) -> None:
    from everysat.recipe import Recipe
    from everysat.train import train

    loaded = Recipe.load(recipe, settings or ())
    if getattr(loaded, kind) is None:
        other = "finetune" if kind == "objective" else "pretrain"
        raise ValueError(f"recipe {recipe} has no {kind}; run it with: everysat {other} {recipe}")
    print(train(loaded, quiet=quiet).weights)


def _encoder(model: str, at: list[str] | None = None) -> Any:
    from everysat.models import weights

    return weights.load(model).at(**_settings(at))


def _settings(given: list[str] | None) -> dict[str, Any]:
    """Settings as ``key=value``, the values as YAML has them."""
    from everysat.recipe import settings

    return settings(given or ())


def _scene(
    files: list[str] | None,
    encoder: Any,
    sensor: str | None,
    times: list[str] | None,
    place: str | None,
    period: str | None,
    source: str | None,
) -> Any:
    """Files over a place, or without files what a source has of a place in a period."""
    from everysat.io import read

    inputs = encoder.reads
    where = _where(place, min((i.gsd_m for i in (inputs or encoder.inputs).values()), default=None))
    if files:
        if period or source:
            raise ValueError("give either files, or --period and --source of a --place, not both")
        return read.open_scene(files, sensor=sensor, place=where, times=times or None, inputs=inputs)
    if where is None:
        raise ValueError("give files, or a --place and a --period")
    if sensor or times:
        raise ValueError("--sensor and --time are for files: the source of a --place knows them")
    when = tuple(period.split("/")) if period and "/" in period else period
    return read.open_scene(where, when, inputs, source=source)


def _where(place: str | None, gsd_m: float | None) -> Any:
    """The place that ``--place`` stands for, if it was given."""
    from everysat.io import read

    if place is None:
        return None
    numbers = place.split(",")
    if len(numbers) == 3:
        lon, lat, size_m = map(float, numbers)
        return read.place((lon, lat), gsd_m=gsd_m, size_m=size_m)
    return read.place([float(n) for n in numbers] if len(numbers) == 4 else place, gsd_m=gsd_m)


def _or_dash(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print(table: Any) -> None:
    _console().print(table)


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    try:
        app()
    except (ValueError, LookupError, OSError, ImportError, MemoryError) as error:
        message = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        print(f"everysat: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("everysat: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
