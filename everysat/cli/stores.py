"""Commands on stores of embeddings: index, search, detect, label, change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import Quiet, show

app = typer.Typer()
AStore = Annotated[Path, typer.Argument(help="a store of embeddings, as everysat embed -o area.zarr writes it")]
Within = Annotated[Path | None, typer.Option(help="polygons; only places in them count")]
Like = Annotated[
    list[str] | None, typer.Option(help="an example: LON,LAT in degrees or a file of geometries; may be repeated")
]
Unlike = Annotated[list[str] | None, typer.Option(help="what hits are not to be like, in the same way")]
Vector = Annotated[Path | None, typer.Option(help="examples as .npy, [dim] or [n, dim]")]
Words = Annotated[list[str] | None, typer.Option("--text", help="what to look for in words; may be repeated")]
Maker = Annotated[
    str | None, typer.Option("--model", help="for words: the weights that made the store, if they are not installed")
]


@app.command()
def index(
    store: AStore,
    engine: Annotated[
        str, typer.Option(help="exact, faiss (in memory), lancedb (on disk), or auto: by size and memory")
    ] = "auto",
    quiet: Quiet = False,
) -> None:
    """Make a store fast to search; says which engine was chosen, why, and what share of the nearest places it finds."""
    from everysat.store import open_store
    from everysat.store.index import build, folder_of

    opened = open_store(store)
    print(f"{folder_of(opened)}: {build(opened, engine, quiet=quiet)}")


@app.command()
def search(
    stores: Annotated[
        list[str], typer.Argument(help='one store, or several of one model (zones, years), and "what to look for"')
    ],
    text: Words = None,
    like: Like = None,
    unlike: Unlike = None,
    vector: Vector = None,
    model: Maker = None,
    top: Annotated[int, typer.Option(help="how many places")] = 20,
    within: Within = None,
    period: Annotated[str | None, typer.Option(help="only stores of that time: 2024, or 2024-04-01/2024-09-30")] = None,
    not_near_m: Annotated[
        float, typer.Option(help="hits lie at least so many metres from each other and from the examples")
    ] = 0.0,
    engine: Annotated[
        str, typer.Option(help="auto (an index if there is one), index, or scan (read the store)")
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=".csv, .geojson, .parquet, or .tif: the score of every pixel")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Places that look like the examples or the words (the mean of their vectors), the nearest first."""
    from everysat.store import search as searching

    paths, words = _told(stores, text)
    opened = searching.in_period(_opened(paths), period)
    wanted = _query(opened, words, like, unlike, vector, model)
    if out is not None and out.suffix.lower() in (".tif", ".tiff"):
        if len(opened) > 1:
            raise ValueError(
                f"a heat map is of one store, {len(opened)} are given: {', '.join(map(str, paths))}; give one, or a --period"
            )
        print(searching.heat_map(opened[0], wanted, out, within=within, quiet=quiet))
        return
    found = searching.search(opened, wanted, top=top, within=within, not_near_m=not_near_m, engine=engine)
    if out is None:
        show(found.table())
        return
    print(f"{found.save(out)}: {len(found)} places ({'; '.join(found.how)})")


@app.command()
def detect(
    store: Annotated[list[str], typer.Argument(help='a store of embeddings, and "what to look for" in words')],
    text: Words = None,
    like: Like = None,
    unlike: Unlike = None,
    vector: Vector = None,
    model: Maker = None,
    threshold: Annotated[
        str, typer.Option(help="score that a peak must reach, or mad: what is unusual among the scores of the store")
    ] = "mad",
    most: Annotated[int, typer.Option(help="how many, the best")] = 20,
    least_m: Annotated[float, typer.Option(help="leave out boxes whose longer side is shorter, metres")] = 0.0,
    radius_m: Annotated[
        float | None, typer.Option(help="of peaks nearer than this the best stays; by default least-m or three pixels")
    ] = None,
    share: Annotated[float, typer.Option(help="of the height of a peak, where its box ends")] = 0.5,
    within: Within = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="boxes as .geojson or .parquet, or a .csv")] = None,
    quiet: Quiet = False,
) -> None:
    """Targets by words or by example: peaks of the heat map with boxes, the best first."""
    from everysat.store.detect import THRESHOLD
    from everysat.store.detect import detect as run

    paths, words = _told(store, text)
    opened = _opened(paths)
    if len(opened) != 1:
        raise ValueError(f"detection is in one store, {len(opened)} are given: {', '.join(paths)}")
    wanted = _query(opened, words, like, unlike, vector, model)
    level: float | str = threshold
    if threshold != THRESHOLD:
        try:
            level = float(threshold)
        except ValueError:
            raise ValueError(f"--threshold {threshold!r} is neither a number nor {THRESHOLD}") from None
    found = run(
        opened[0],
        wanted,
        threshold=level,
        most=most,
        least_m=least_m,
        radius_m=radius_m,
        share=share,
        within=within,
        quiet=quiet,
    )
    if out is None:
        show(found.table())
        return
    print(f"{found.save(out)}: {found}")


@app.command()
def label(
    store: AStore,
    places: Annotated[Path, typer.Argument(help="labelled points or polygons: GeoJSON, GPKG, GeoParquet, ...")],
    column: Annotated[str, typer.Option(help="which attribute holds the class")],
    out: Annotated[Path, typer.Option("--out", "-o", help="map of classes, a Cloud-Optimized GeoTIFF")],
    how: Annotated[str, typer.Option(help="linear (logistic regression) or knn")] = "linear",
    classes: Annotated[str | None, typer.Option(help="classes that there must be: a,b,c; all by default")] = None,
    next_places: Annotated[int, typer.Option("--next", help="write so many places to label next")] = 0,
    skip_outside: Annotated[bool, typer.Option(help="leave out places without data in the store")] = False,
    quiet: Quiet = False,
) -> None:
    """A map from a handful of labelled places, its confidence, and which places to label next."""
    from everysat.store import open_store
    from everysat.store.label import label as run

    names = [name.strip() for name in classes.split(",")] if classes else None
    result = run(
        open_store(store), places, column, out,
        how=how, classes=names, next_places=next_places, skip_outside=skip_outside, quiet=quiet,
    )  # fmt: skip
    show(result.table())
    for note in result.notes:
        print(note)
    for what, path in result.paths.items():
        print(f"{what}: {path}")


@app.command()
def change(
    before: AStore,
    after: Annotated[Path, typer.Argument(help="a store of the same model on the same grid")],
    out: Annotated[Path, typer.Option("--out", "-o", help="change scores, a Cloud-Optimized GeoTIFF")],
    score: Annotated[str, typer.Option(help="cosine, or robust: relative to the usual difference")] = "cosine",
    threshold: Annotated[
        str, typer.Option(help="also write what changed: mad (unusually much), otsu (a split in two), or a number")
    ] = "none",
    quiet: Quiet = False,
) -> None:
    """How much every pixel changed between two stores."""
    from everysat.store import open_store
    from everysat.store.change import change as run

    found = run(open_store(before), open_store(after), out, score=score, threshold=threshold, quiet=quiet)
    for what, path in found.paths.items():
        print(f"{what}: {path}")
    if found.threshold is not None:
        print(f"changed: {100 * (found.share or 0):.2f} % above {found.threshold:.4g} ({found.rule})")


@app.command()
def publish(
    store: AStore,
    out: Annotated[Path, typer.Option("--out", "-o", help=".json: a STAC item; .tif: a Cloud-Optimized GeoTIFF")],
    href: Annotated[str | None, typer.Option(help="address of the store in the item; its path by default")] = None,
    quantiser: Annotated[str | None, typer.Option(help="of the GeoTIFF, such as int8-square/1 or float32/1")] = None,
) -> None:
    """What others need to find a store (a STAC item with the emb: extension), or the store as a GeoTIFF."""
    from everysat.store import open_store, stac_item, write_cog, write_stac

    opened: Any = open_store(store)
    if out.suffix.lower() in (".tif", ".tiff"):
        print(write_cog(opened, out, quantiser=quantiser))
    elif out.suffix.lower() == ".json":
        if quantiser is not None:
            raise ValueError("--quantiser is for a GeoTIFF; an item tells the one that the store has")
        print(write_stac(stac_item(opened, href=href), out))
    else:
        raise ValueError(f"--out {out} must end with .json (a STAC item) or .tif")


STORES = (".zarr", ".parquet", ".geoparquet", ".tif", ".tiff")
"""What a store's name ends with."""


def _told(given: list[str], text: list[str] | None) -> tuple[list[str], list[str]]:
    """Stores and words of a command line: words are neither there as a file nor named like a store."""
    paths = [one for one in given if Path(one).exists() or any(p.lower().endswith(STORES) for p in Path(one).parts)]
    words = [one for one in given if one not in paths] + list(text or ())
    if not paths:
        raise ValueError(
            f"there is no store {given[0]!r}: give one as everysat embed -o area.zarr writes it, then what to look for"
        )
    return paths, words


def _opened(paths: list[str]) -> list[Any]:
    from everysat.store import open_store
    from everysat.store.search import several

    return several([open_store(path) for path in paths])


def _query(
    opened: list[Any],
    words: list[str],
    like: list[str] | None,
    unlike: list[str] | None,
    vector: Path | None,
    model: str | None,
) -> Any:
    """The query of words, examples and vectors, all alike."""
    import numpy as np

    from everysat.store import words as reading
    from everysat.store.search import query

    if model is not None and not words:
        raise ValueError(f'--model {model} reads words, and there are none: everysat search area.zarr "a lake"')
    given = _npy(vector)
    if words:
        told = reading.vectors(opened, words, model)
        given = told if given is None else np.concatenate([told, np.atleast_2d(given)])
    return query(opened, [_example(e) for e in like or ()], [_example(e) for e in unlike or ()], given)


def _example(text: str) -> Any:
    """``LON,LAT`` or a file."""
    numbers = text.split(",")
    try:
        if len(numbers) == 2:
            return float(numbers[0]), float(numbers[1])
    except ValueError:
        pass
    if not Path(text).exists():
        raise ValueError(f"--like or --unlike {text!r} is neither LON,LAT in degrees nor a file that exists")
    return text


def _npy(path: Path | None) -> Any:
    """Numbers only: a file of objects could run code."""
    if path is None:
        return None
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"--vector {path} is no .npy file of numbers: {error}") from error
