"""Commands that train and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import (
    At,
    Model,
    Period,
    Quiet,
    Reading,
    Sensor,
    Settings,
    Source,
    Times,
    Where,
    console,
    encoder_of,
    scene_of,
    settings_of,
    show,
)

app = typer.Typer()


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
    reading: Reading = None,
    at: At = None,
    quiet: Quiet = False,
) -> None:
    """How well a model does with few labels: on a dataset, or on a scene from labelled polygons, on ground that was held out."""
    from everysat import polygons
    from everysat.data.catalogue import is_dataset

    encoder = encoder_of(model, at)
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
        scene_of(files, encoder, sensor, times, place, period, source, reading).read(),
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
    show(table)
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
    show(tables(suite, results)[0])
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
    from everysat.bench import finished, run
    from everysat.suite import Suite
    from everysat.tables import COSTS, save, tables

    loaded = Suite.load(suite, settings or ())
    results = run(loaded, only=only, jobs=jobs, restart=restart, quiet=quiet)
    for table in tables(loaded, results):
        show(table.without(*COSTS) if console().width < 140 else table)
    failed = [result for result in results if "error" in result.facts]
    for path in save(loaded, [*finished(loaded), *failed]):
        print(path)
    _fail_on_errors(results)


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

    print(weights.convert(name, file, out, licence=licence, source=source, **settings_of(set_)))


@app.command()
def demo(
    topic: Annotated[
        str, typer.Argument(help="land-use: learn and map; words: a query, classes and questions in words")
    ] = "land-use",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder of the results; demo, or demo/words by default")
    ] = None,
    query: Annotated[str | None, typer.Option(help="of words: what to look for")] = None,
    short: Annotated[
        bool, typer.Option("--short", help="of land-use: a minute instead of several; scores mean little then")
    ] = False,
) -> None:
    """Learn from an unlabelled real Sentinel-2 scene, then map land use from a few polygons. Again to resume. Or find, map and ask in words: everysat demo words."""
    if topic == "words":
        from everysat import words_demo

        print(words_demo.run(out or Path("demo/words"), query=query or words_demo.QUERY))
    elif topic == "land-use":
        from everysat.demo import run

        run(out or Path("demo"), short=short)
    else:
        raise LookupError(f"there is no demo of {topic!r}; there are land-use and words")


def _train(recipe: str, settings: list[str] | None, quiet: bool, kind: str) -> None:
    from everysat.recipe import Recipe
    from everysat.train import train

    loaded = Recipe.load(recipe, settings or ())
    if getattr(loaded, kind) is None:
        other = "finetune" if kind == "objective" else "pretrain"
        raise ValueError(f"recipe {recipe} has no {kind}; run it with: everysat {other} {recipe}")
    print(train(loaded, quiet=quiet).weights)
