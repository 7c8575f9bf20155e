"""OpenStreetMap features of an area: from extracts, from Overpass, from tables as Geofabrik, GDAL and Overture publish them.

All ways give the same frame, EPSG:4326: ``id`` (``way/123``), ``tags`` (a dict of strings) and ``geometry``. :func:`layer` makes a layer of a place from it.
(c) OpenStreetMap contributors, ODbL 1.0: what is derived from it is to be shared alike, and they are to be named.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import shapely

from everysat.collect import records
from everysat.collect.polite import Busy, Server, TooMuch
from everysat.find import suggest
from everysat.io import vector
from everysat.io.output import replacing
from everysat.progress import Progress
from everysat.types import Place, Vector

LICENCE = "ODbL-1.0"
ATTRIBUTION = "(c) OpenStreetMap contributors, https://www.openstreetmap.org/copyright"
KEYS = (
    "building", "landuse", "natural", "water", "waterway", "wetland", "highway", "railway", "aeroway", "leisure", "amenity", "man_made", "power",
    "tourism", "historic", "harbour", "bridge", "sport", "generator:source", "shop",
)  # fmt: skip
"""What has none of these keys is left out: addresses, borders, routes, trees of a register are not what a place looks like."""
OVERPASS = "https://overpass-api.de/api/interpreter"
TILE_DEGREES = 0.05
"""Overpass is asked by squares of a fixed grid, so that areas which overlap share answers."""
LEAST_TILE_DEGREES = 0.003
Bounds = tuple[float, float, float, float]
"""West, south, east, north in degrees."""
EXTRACTS = (".osm", ".pbf", ".osm.gz", ".osm.bz2", ".osh", ".o5m")

_LINES: dict[str, frozenset[str] | None] = {
    "highway": None, "railway": None, "barrier": None, "power": frozenset({"line", "minor_line", "cable"}), "waterway": None,
    "natural": frozenset({"coastline", "cliff", "ridge", "arete", "valley", "tree_row"}), "aeroway": frozenset({"runway", "taxiway"}),
    "man_made": frozenset({"embankment", "pipeline", "cutline"}), "leisure": frozenset({"track", "slipway"}),
}  # fmt: skip
"""Keys whose closed ways are rings, not areas (all values, or these), https://wiki.openstreetmap.org/wiki/Area."""
_AREAS = frozenset({"riverbank", "dock", "boatyard", "dam", "platform", "rest_area", "services", "station"})
"""Values of such keys that are areas after all."""


def is_area(tags: Mapping[str, str]) -> bool:
    """Whether a closed way with these tags is what lies within it, rather than a ring."""
    if "area" in tags:
        return tags["area"] != "no"
    told = [(key, value) for key, value in tags.items() if key in KEYS or key in _LINES]
    rings = [_LINES.get(key, frozenset()) is None or value in (_LINES.get(key) or ()) for key, value in told]
    return not told or any(not ring or value in _AREAS for ring, (_, value) in zip(rings, told, strict=True))


def read(
    path: str | Path, bounds: Bounds | None = None, *, keys: Sequence[str] = KEYS, kind: str = ""
) -> geopandas.GeoDataFrame:
    """Features of a file that touch ``bounds``.

    Args:
        path: an extract (``.osm``, ``.osm.pbf``, also packed), or a table: what :func:`save` wrote, GeoPackage or shapefile of Geofabrik or GDAL, GeoParquet of
            Overture Maps.
        bounds: west, south, east, north in degrees; everything by default.
        keys: features need one of these.
        kind: of an Overture table whose rows and name do not tell: :data:`OVERTURE`.

    Raises:
        FileNotFoundError, OSError: it is missing or cannot be read. ValueError: it has no tags that are known here.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.name.lower().endswith(EXTRACTS):
        return _extract(path, bounds, keys)
    table = vector.load_frame(path).to_crs("EPSG:4326")
    found = table.geometry.notna() & ~table.geometry.is_empty
    table = table[found if bounds is None else found & table.intersects(shapely.box(*bounds))]
    columns = frozenset(map(str, table.columns))
    rows = [
        _tags(row, columns, kind or path.stem) for row in table.drop(columns=table.geometry.name).to_dict("records")
    ]
    frame = _frame([i for i, _ in rows], [t for _, t in rows], table.geometry.array)
    kept = frame[[any(key in tags for key in keys) for tags in frame.tags]].reset_index(drop=True)
    if len(table) and not len(kept):
        raise ValueError(
            f"{path} has none of the keys {', '.join(keys[:6])}, ...; its columns are {', '.join(map(str, table.columns))}. Give keys=..., or kind=... "
            f"for Overture ({', '.join(OVERTURE)})"
        )
    return kept


def _frame(ids: Sequence[str], tags: Sequence[Mapping[str, str]], geometry: Any) -> geopandas.GeoDataFrame:
    columns = {"id": pd.Series(ids, dtype=object), "tags": pd.Series(list(tags), dtype=object)}
    return geopandas.GeoDataFrame(
        columns, geometry=geopandas.GeoSeries(list(geometry), crs="EPSG:4326"), crs="EPSG:4326"
    )


def _osmium() -> Any:
    try:
        import osmium
    except ImportError as error:
        raise ImportError("OpenStreetMap files need more packages: pip install 'everysat[collect]'") from error
    return osmium


def _extract(path: Path, bounds: Bounds | None, keys: Sequence[str]) -> geopandas.GeoDataFrame:
    osmium = _osmium()
    rows: list[tuple[str, dict[str, str], str]] = []
    try:
        objects = osmium.FileProcessor(str(path)).with_areas().with_filter(osmium.filter.KeyFilter(*keys))
        rows.extend(_objects(objects, osmium))
    except RuntimeError as error:
        raise OSError(f"{path} cannot be read as OpenStreetMap data ({error}). Fetch it again") from error
    shapes = np.array(shapely.from_wkb([r[2] for r in rows]), dtype=object)
    lone = (shapely.get_type_id(shapes) == shapely.GeometryType.MULTIPOLYGON) & (
        shapely.get_num_geometries(shapes) == 1
    )
    shapes[lone] = shapely.get_geometry(shapes[lone], 0)
    frame = _frame([r[0] for r in rows], [r[1] for r in rows], shapes)
    return frame if bounds is None else frame[frame.intersects(shapely.box(*bounds))].reset_index(drop=True)


def _objects(objects: Iterable[Any], osmium: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    """Identity, tags and shape (hexadecimal WKB) of nodes, ways and areas. What lacks points, as at the edge of an extract, is left out."""
    shapes = osmium.geom.WKBFactory()
    for each in objects:
        tags = dict(each.tags)
        try:
            if each.is_node():
                yield f"node/{each.id}", tags, shapes.create_point(each)
            elif each.is_way() and not (each.is_closed() and is_area(tags)):
                yield f"way/{each.id}", tags, shapes.create_linestring(each)
            elif each.is_area() and (not each.from_way() or is_area(tags)):
                name = "way" if each.from_way() else "relation"
                yield f"{name}/{each.orig_id()}", tags, shapes.create_multipolygon(each)
        except (osmium.InvalidLocationError, RuntimeError):
            continue


OVERTURE = {
    "building": ("building", "yes"), "land_use": ("landuse", ""), "land": ("natural", ""), "water": ("water", "yes"), "land_cover": ("natural", ""),
    "infrastructure": ("man_made", ""), "place": ("amenity", ""), "segment": ("highway", ""),
}  # fmt: skip
"""Types of Overture Maps (https://docs.overturemaps.org/schema/), the key of OpenStreetMap that says the same, and the value where none is told."""
_SEGMENTS = {"road": "highway", "rail": "railway", "water": "waterway"}
_SAME_CLASS = {
    "tree_cover": "wood",
    "forest": "wood",
    "grass": "grassland",
    "shrub": "scrub",
    "barren": "bare_rock",
    "crop": "farmland",
}
_HSTORE = re.compile(r'"((?:[^"\\]|\\.)*)"=>"((?:[^"\\]|\\.)*)"')


def _tags(row: Mapping[str, Any], columns: frozenset[str], name: str) -> tuple[str, dict[str, str]]:
    """Identity and tags of a row of a table; its ``columns`` tell whose it is, its ``name`` what its rows do not."""
    row = {key: value for key, value in row.items() if _told(value)}
    identity = str(row.get("id") or row.get("osm_id") or row.get("osm_way_id") or "")
    own = row.get("tags", row.get("source_tags"))
    if own is not None:
        return identity, _mapping(own)
    if "fclass" in row:
        return identity, _geofabrik(row, name)
    if columns & {"class", "subtype", "categories"}:
        return identity, _overture(row, name)
    plain = {key: str(value) for key, value in row.items() if key in KEYS or key == "name"}
    hstore = {key: value.replace('\\"', '"') for key, value in _HSTORE.findall(str(row.get("other_tags", "")))}
    return identity, {**hstore, **plain}


def _told(value: Any) -> bool:
    return (
        value is not None
        and not (isinstance(value, float) and math.isnan(value))
        and not (isinstance(value, str) and not value)
    )


def _mapping(tags: Any) -> dict[str, str]:
    """Tags as JSON, a dict, or pairs as Parquet has maps."""
    if isinstance(tags, str):
        tags = json.loads(tags)
    return {str(key): str(value) for key, value in dict(tags).items() if value is not None}


def _geofabrik(row: Mapping[str, Any], name: str) -> dict[str, str]:
    """One column ``fclass``; which key it belongs to is found by the value, or else by the name of the table."""
    from everysat.collect.inventory import KEY_OF_VALUE

    value = str(row["fclass"])
    layer = next((key for part, key in _GEOFABRIK.items() if part in name), "landuse")
    key = KEY_OF_VALUE.get(value, layer) if layer in ("landuse", "natural", "amenity") else layer
    return {key: value, **({"name": str(row["name"])} if "name" in row else {})}


_GEOFABRIK = {
    "landuse": "landuse", "natural": "natural", "waterways": "waterway", "water": "natural", "roads": "highway", "railways": "railway",
    "buildings": "building", "pois": "amenity", "pofw": "amenity", "transport": "amenity", "traffic": "highway",
}  # fmt: skip


def _overture(row: Mapping[str, Any], name: str) -> dict[str, str]:
    kind = str(row.get("type") or next((each for each in (*OVERTURE,) if each in name), ""))
    if kind not in OVERTURE:
        raise ValueError(
            f"kind: neither the rows nor the name {name!r} of the table say what it holds. {suggest(kind or name, OVERTURE)}"
        )
    key, default = OVERTURE[kind]
    subtype, value = str(row.get("subtype", "")), str(row.get("class") or row.get("subtype") or default)
    if kind == "segment":
        key = _SEGMENTS.get(subtype, key)
    categories = row.get("categories")
    if isinstance(categories, Mapping) and categories.get("primary"):
        value = str(categories["primary"])
    names = row.get("names")
    title = names.get("primary") if isinstance(names, Mapping) else None
    value = _SAME_CLASS.get(value, value) if key == "natural" else value
    if kind == "building" and subtype and "class" not in row:
        value = subtype
    return {
        key: value or "yes",
        **({"natural": "water"} if kind == "water" else {}),
        **({"name": str(title)} if title else {}),
    }


def layer(frame: geopandas.GeoDataFrame, place: Place, *, time: Any = None) -> Vector:
    """What touches a place, as a layer: metres east and south of its north-west corner, the tags as attributes; not cut at its edge."""
    found = vector.polygons(frame[["tags", "geometry"]], place, time=time)
    return replace(found, attributes=tuple(dict(each["tags"]) for each in found.attributes))


def save(frame: geopandas.GeoDataFrame, path: str | Path, *, source: str, licence: str = LICENCE, **facts: Any) -> Path:
    """Write a frame as GeoParquet, tags as JSON, with a note of licence and source beside it."""
    path = Path(path)
    if path.suffix not in (".parquet", ".geoparquet"):
        raise ValueError(f"path={str(path)!r} must end in .parquet: GeoParquet is what is written")
    table = frame.assign(tags=[json.dumps(tags, ensure_ascii=False) for tags in frame.tags])
    with replacing(path) as partial:
        table.to_parquet(partial, index=False)
    records.note(path, licence=licence, source=source, attribution=ATTRIBUTION, features=len(frame), **facts)
    return path


def query(bounds: Bounds, keys: Sequence[str], timeout_s: int = 180) -> str:
    """What Overpass is asked for: everything with one of the keys in a box, and the points that it is made of."""
    west, south, east, north = bounds
    wanted = "".join(f'nwr["{key}"];' for key in keys)
    box = f"{south:.6f},{west:.6f},{north:.6f},{east:.6f}"
    return f"[out:xml][timeout:{timeout_s}][bbox:{box}];({wanted});(._;>;);out body;"


def judge(body: bytes) -> None:
    """Overpass tells failures by a remark in an answer of status 200."""
    remark = re.search(rb"<remark>(.*?)</remark>", body[:4096] + body[-4096:], re.DOTALL)
    said = remark[1].decode("utf-8", "replace").strip() if remark else ""
    if re.search(r"timed out|out of memory|too large", said):
        raise TooMuch(said)
    if said:
        raise Busy(f"Overpass says: {said}")
    if not body.rstrip().endswith(b"</osm>"):
        raise Busy("the answer of Overpass breaks off, or is none")


def tiles(bounds: Bounds, side: float = TILE_DEGREES) -> list[Bounds]:
    """Squares of a fixed grid that cover ``bounds``; east below west means across the antimeridian."""
    west, south, east, north = bounds
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90):
        raise ValueError(f"bounds={bounds} must be west, south, east, north in degrees, south below north")
    spans = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
    rows = range(math.floor(south / side + 1e-9), math.ceil(north / side - 1e-9))
    columns = [x for a, b in spans for x in range(math.floor(a / side + 1e-9), math.ceil(b / side - 1e-9))]
    return [tuple(round(v * side, 6) for v in (x, y, x + 1, y + 1)) for y in rows for x in columns]  # type: ignore[misc]


def overpass(
    bounds: Bounds,
    cache: str | Path,
    *,
    contact: str,
    url: str = OVERPASS,
    keys: Sequence[str] = KEYS,
    pause_s: float = 2.0,
    quiet: bool = False,
    **server: Any,
) -> geopandas.GeoDataFrame:
    """Features in a box from an Overpass server, tile by tile. Answers are kept in ``cache``: a second call goes on where the first one stopped.

    Tiles that are too much for the server are asked for in quarters. ``server``: see :class:`everysat.collect.polite.Server`.

    Raises:
        ConnectionError, TimeoutError, PermissionError: see :meth:`everysat.collect.polite.Server.ask`. ValueError: ``bounds`` is no box.
    """
    _osmium()
    asked = Server(url, cache, contact=contact, pause_s=pause_s, suffix=".osm", **server)
    todo = tiles(bounds)
    parts = []
    with Progress("OpenStreetMap, tiles", len(todo), quiet=quiet) as bar:
        for tile in todo:
            parts += _tile(asked, tile, keys)
            bar.advance(note=f"{sum(map(len, parts))} features")
    whole = geopandas.GeoDataFrame(pd.concat(parts, ignore_index=True), crs="EPSG:4326").drop_duplicates("id")
    west, south, east, north = bounds
    boxes = (
        [shapely.box(west, south, east, north)]
        if west < east
        else [shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)]
    )
    return whole[whole.intersects(shapely.union_all(boxes))].reset_index(drop=True)


def _tile(asked: Server, tile: Bounds, keys: Sequence[str]) -> list[geopandas.GeoDataFrame]:
    question = {"data": query(tile, keys)}
    halved = asked.path({"data": f"quarters of {tile}", "keys": ",".join(keys)})
    try:
        if halved.is_file():
            raise TooMuch("known from before")
        asked.ask(question, judge, method="POST")
        return [_extract(asked.path(question), None, keys)]
    except TooMuch as error:
        west, south, east, north = tile
        if east - west < 2 * LEAST_TILE_DEGREES:
            raise OSError(
                f"{asked.url} cannot answer for {tile}: {error}. Ask for fewer keys, or another server"
            ) from error
        halved.parent.mkdir(parents=True, exist_ok=True)
        halved.write_bytes(b"")
        x, y = round((west + east) / 2, 6), round((south + north) / 2, 6)
        quarters: list[Bounds] = [(west, south, x, y), (x, south, east, y), (west, y, x, north), (x, y, east, north)]
        return [part for quarter in quarters for part in _tile(asked, quarter, keys)]
