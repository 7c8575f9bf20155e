"""Commands on sensors, files and datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import (
    Files,
    Quiet,
    Reading,
    Sensor,
    Times,
    Where,
    console,
    encoder_of,
    or_dash,
    place_of,
    reading_of,
    settings_of,
    show,
)

app = typer.Typer()
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
        show(Table("Sensors", ("name", "kind", "bands", "finest m", "what"), tuple(rows)))
        return
    sensor = tables.get(name)
    rows = [
        (
            b.name,
            f"{b.gsd_m:g}",
            b.unit,
            or_dash(b.wavelength_um),
            or_dash(b.width_um),
            b.polarisation or "",
            ", ".join(b.aliases),
            b.description,
        )
        for b in sensor.bands
    ]
    names = ("band", "gsd_m", "unit", "wavelength_um", "width_um", "polarisation", "aliases", "what")
    show(Table(sensor.title, names, tuple(rows), (f"Source: {sensor.source}",)))


@app.command()
def inspect(
    files: Files,
    model: Annotated[str | None, typer.Option(help="compare with this model's band contract")] = None,
    sensor: Sensor = None,
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """What is in files: bands, grid, CRS, dates, no-data, values - and what does not fit a model."""
    from everysat.io.inspect import inspect as look

    contract = None if model is None else encoder_of(model).reads
    report = look(files, contract, sensor=sensor)
    if json:
        import json as format

        print(format.dumps(report.to_dict(), indent=1))
    else:
        console().print(report)
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
    reading: Reading = None,
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
    inputs = None if model is None else encoder_of(model).reads
    options = settings_of(set_)
    if data:
        dataset = Named(name=data, options=options).build("data")
    else:
        where = place_of(place, min((i.gsd_m for i in inputs.values()), default=None) if inputs else None)
        told = reading_of(reading)
        dataset = Windows(open_scene(files, sensor=sensor, place=where, times=times or None, inputs=inputs, **told))
    layers = {
        name: summary.plain(name)
        for name, summary in summarise(dataset, places=places, inputs=inputs, quiet=quiet).items()
    }
    show(_statistics_table(layers))
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
        parts = catalogue.splits(str(name), folder, split or (), **settings_of(set_))
    limits: dict[str, Any] = {"near_m": near_m, "outside": outside, "allow": allow or ()}
    report = check(parts, **limits, together=together, workers=workers, quiet=quiet)
    print(report.json() if json else report)
    raise typer.Exit(0 if report.good else 1)
