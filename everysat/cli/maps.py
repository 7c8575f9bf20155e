"""Commands that map an area."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import (
    AnyFiles,
    At,
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
    settings_of,
)

app = typer.Typer()

Workers = Annotated[int | None, typer.Option(help="processes that compute windows, through Ray; one per device")]
Cluster = Annotated[str | None, typer.Option(help="Ray cluster: ray://HOST:PORT, HOST:PORT or auto")]
WindowM = Annotated[float | None, typer.Option(help="side of a window, metres; by default 3840 or what fits 64 MB")]
Blend = Annotated[bool, typer.Option("--blend", help="windows fade into each other")]
MinValid = Annotated[float, typer.Option(help="windows of which a smaller share was observed are no data")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; an accelerator if there is one, by default")]


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
    probabilities: Annotated[bool, typer.Option("--probabilities", help="write those of all classes too")] = False,
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
    """A map and its confidence, of an area of any size. Interrupted, the same command goes on."""
    from everysat import exported, polygons
    from everysat.models import weights

    if exported.is_exported(model):
        mapper: Any = _exported(model, labels=labels, gsd_m=gsd_m, at=at)
        if not mapper.probabilistic and mapper.names[0] == "feature 0":
            raise ValueError(f"{model} gives features, not a map: use everysat embed, or export a model with a task")
        scene = scene_of(files, mapper, sensor, times, place, period, source, reading)
    elif labels is None:
        encoder, task = weights.load_task(model)
        mapper = polygons.task_mapper(*_on(device, encoder, task))
        scene = scene_of(files, encoder, sensor, times, place, period, source, reading)
    else:
        if column is None:
            raise ValueError("--labels needs --column, the attribute that holds the class")
        (encoder,) = _on(device, encoder_of(model, at))
        scene = scene_of(files, encoder, sensor, times, place, period, source, reading)
        mapper = polygons.probe_mapper(encoder, scene, labels, column, gsd_m=gsd_m, shifts=shifts)
    options = {"window_m": window_m, "blend": blend, "min_valid": min_valid, "workers": workers, "cluster": cluster}
    _run(mapper, scene, out, probabilities=probabilities, quiet=quiet, **options)


@app.command()
def embed(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help=".zarr or .tif: one vector a token; .parquet: one a chip")],
    files: AnyFiles = None,
    sensor: Sensor = None,
    times: Times = None,
    place: Where = None,
    period: Period = None,
    source: Source = None,
    reading: Reading = None,
    at: At = None,
    chip_m: Annotated[
        float | None, typer.Option(help="side of a chip, metres; by default what the model learned on")
    ] = None,
    quantiser: Annotated[
        str | None,
        typer.Option(help="of .zarr and .parquet: int8-linear/1 (default), float32/1, binary/1, pca-int8/1 ..."),
    ] = None,
    confidence: Annotated[
        bool,
        typer.Option(
            "--confidence", help="also OUT-confidence.tif: how sure a probabilistic encoder is, in nats per dimension"
        ),
    ] = False,
    window_m: WindowM = None,
    blend: Blend = False,
    min_valid: MinValid = 0.0,
    workers: Workers = None,
    cluster: Cluster = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Embeddings of an area of any size: a store that search and label take, or a GeoTIFF. Interrupted, the same command goes on."""
    from everysat import exported, polygons
    from everysat.nn.mappers import Summaries

    if exported.is_exported(model):
        if out.suffix.lower() == ".parquet":
            raise ValueError(
                f"{model} gives features of tokens, not of chips: choose an output that ends in .zarr or .tif"
            )
        encoder: Any = _exported(model, chip_m=chip_m, at=at)
    else:
        (encoder,) = _on(device, encoder_of(model, at))
    scene = scene_of(files, encoder, sensor, times, place, period, source, reading)
    if exported.is_exported(model):
        mapper: Any = encoder
    elif out.suffix.lower() == ".parquet":
        mapper = Summaries(encoder, chip_m or encoder.settings.chip_m)
    else:
        mapper = polygons.dense(encoder, polygons.token_m(encoder), chip_m=chip_m)
    facts = _facts(model, scene)
    options = {"window_m": window_m, "blend": blend, "min_valid": min_valid, "workers": workers, "cluster": cluster}
    sure = _confidence(mapper) if confidence else None
    _run(mapper, scene, out, quantiser=quantiser, facts=facts, quiet=quiet, **options)
    if sure is not None:
        _run(sure, scene, out.with_name(f"{out.stem}-confidence.tif"), facts=facts, quiet=quiet, **options)


def _confidence(mapper: Any) -> Any:
    """The mapper of how sure the encoder of ``mapper`` is."""
    from everysat.nn.confidence import confidence
    from everysat.nn.mappers import Dense

    if not isinstance(mapper, Dense) or not hasattr(mapper.encoder, "witnesses"):
        raise ValueError(
            "--confidence is for .zarr and .tif from an encoder with Gaussian features: train it with model.probabilistic set to true"
        )
    return confidence(mapper)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="what to write: .onnx or .pt2, and its contract beside it")],
    to: Annotated[str, typer.Option(help="onnx or pt2 (PyTorch's ExportedProgram); by default by the name")] = "",
    obs: Annotated[
        list[str] | None, typer.Option(help="dates of a series that a chip has, such as s2=12; once for each layer")
    ] = None,
    chip_m: Annotated[float | None, typer.Option(help="side of a chip, metres; by default the model's")] = None,
    features: Annotated[bool, typer.Option("--features", help="the features, also of a model with a task")] = False,
    at: At = None,
) -> None:
    """A model as one file for other runtimes, checked against the model; predict and embed take it too."""
    from everysat import exported
    from everysat.models import weights

    contract = weights.contract_path(model)
    told = json.loads(contract.read_text(encoding="utf-8")) if contract.is_file() else {}
    chosen: Any = weights.load_task(model) if told.get("task") and not features else encoder_of(model)
    if at:
        encoder, *task = chosen if isinstance(chosen, tuple) else (chosen,)
        chosen = (encoder.at(**settings_of(at)), *task) if task else encoder.at(**settings_of(at))
    path = exported.export(chosen, out, to=to, obs=settings_of(obs), chip_m=chip_m)
    written = json.loads(exported.contract_path(path).read_text(encoding="utf-8"))
    print(path)
    print(
        f"differs from the model by {written['difference']:.2g} of its largest number, on random chips", file=sys.stderr
    )


def _exported(model: str, **given: Any) -> Any:
    """The mapper of an exported file, which leaves nothing to choose."""
    from everysat import exported

    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with an exported model: {model} is for certain chips; choose it when exporting"
            )
    return exported.load(model)


def _on(device: str | None, *networks: Any) -> tuple[Any, ...]:
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return tuple(network.to(chosen) for network in networks)


def _run(mapper: Any, scene: Any, out: Path, **options: Any) -> None:
    """Map, then say what was written, how fast, and whether the edges of windows show."""
    from everysat.predict import predict as run

    try:
        made = run(mapper, scene, out, **options)
    except KeyboardInterrupt:
        print(f"everysat: finished windows are kept in {out}.parts", file=sys.stderr)
        raise
    for what, path in made.items():
        print(f"{what}: {path}")
    if made.seam is not None and not options["quiet"]:
        print(f"seam: {made.seam:.3f} (differences across edges of windows over those inside; 1 where none shows)")
    if made.pixels and not options["quiet"]:
        print(f"speed: {made.pixels / made.seconds:.4g} pixels/s")


def _facts(model: str, scene: Any) -> dict[str, Any]:
    """What a store says it was made from."""
    from everysat.io import dates
    from everysat.mapping.source import SceneSource
    from everysat.models import weights

    source = SceneSource(scene, min(layer.gsd_m for layer in scene.layers.values()))
    spans = [t for layer in scene.layers.values() for t in layer.times if math.isfinite(t[0]) and math.isfinite(t[1])]
    when = (dates.iso(min(a for a, _ in spans)), dates.iso(max(b for _, b in spans))) if spans else None
    path = weights.located(model)
    contract = weights.contract_path(path)
    told = json.loads(contract.read_text(encoding="utf-8")) if contract.is_file() else {}
    known = {"name": told.get("name") or Path(model).stem, "weights": told.get("sha256"), "family": told.get("family")}
    return {
        "period": when,
        "model": {k: v for k, v in known.items() if v},
        "source": [Path(n).name for n in source.names],
    }
