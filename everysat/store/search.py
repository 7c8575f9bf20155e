"""Search by example: which places of one or several stores look like these?

A query is the mean of the examples' vectors, each of unit length, minus the mean of those that are to be unlike (Rocchio 1971),
again of unit length: one linear query, which every engine answers. A score is the cosine of a place's vector and the query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyproj
import shapely

from everysat.data.batches import prefetch
from everysat.io import dates, grid, vector
from everysat.io.cog import CogWriter
from everysat.io.output import replacing
from everysat.progress import track
from everysat.store.engines import READERS, Away, Found, Keep, Scan, unit
from everysat.store.index import open_index
from everysat.table import Table

DEGREES = "EPSG:4326"
POOL = 4096
"""Candidates that are ranked at once when hits have to lie apart."""
ENGINES = ("auto", "index", "scan")
Pick = tuple[float, int, int, float, float]
"""Score, store, number and centre (x, y) of a place."""


@dataclass(frozen=True)
class Query:
    """What to look for: a vector [dim] of unit length, and where its examples lie (in degrees; None for vectors from elsewhere)."""

    vector: np.ndarray
    places: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Hits:
    """The nearest places, the best first.

    Attributes:
        score: cosine to the query, [n].
        store: which of ``stores`` a hit lies in, [n]; ``periods`` are those of the stores.
        index: number of the place in its store (row-major pixel or row of the table), [n].
        lon, lat: of the centre, degrees, [n]. footprint: of the pixels or chips, polygons in degrees.
        how: one line a store: which engine answered.
    """

    score: np.ndarray
    store: np.ndarray
    index: np.ndarray
    lon: np.ndarray
    lat: np.ndarray
    footprint: tuple[Any, ...]
    stores: tuple[str, ...]
    periods: tuple[str, ...]
    how: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.score)

    def table(self) -> Table:
        """Rank, score and place, the store and its period."""
        rows = [
            (rank, float(score), f"{lon:.6f}", f"{lat:.6f}", int(index), Path(self.stores[at]).name, self.periods[at])
            for rank, (score, lon, lat, index, at) in enumerate(
                zip(self.score, self.lon, self.lat, self.index, self.store, strict=True), 1
            )
        ]
        return Table(
            "Nearest places", ("rank", "score", "lon", "lat", "index", "store", "period"), tuple(rows), self.how
        )

    def frame(self) -> geopandas.GeoDataFrame:
        """One row a hit, with its footprint in degrees."""
        where = self.store.astype(int)
        columns = {
            "rank": np.arange(1, len(self) + 1),
            "score": self.score.astype(float),
            "lon": self.lon,
            "lat": self.lat,
            "index": self.index,
            "store": [Path(self.stores[i]).name for i in where],
            "period": [self.periods[i] for i in where],
        }
        return geopandas.GeoDataFrame(columns, geometry=list(self.footprint), crs=DEGREES)

    def save(self, path: str | Path) -> Path:
        """As ``.csv`` (centres), ``.geojson`` or ``.parquet`` (footprints)."""
        path, frame = Path(path), self.frame()
        writers: dict[str, Callable[[Path], Any]] = {
            ".csv": lambda part: frame.drop(columns="geometry").to_csv(part, index=False, lineterminator="\n"),
            ".geojson": lambda part: part.write_text(frame.to_json(drop_id=True) + "\n", encoding="utf-8"),
            ".parquet": lambda part: frame.to_parquet(part, index=False, write_covering_bbox=True),
        }
        if path.suffix not in writers:
            raise ValueError(f"path={str(path)!r} must end with {', '.join(writers)}; .tif is for heat_map()")
        with replacing(path) as part:
            writers[path.suffix](part)
        return path


def query(stores: Any, like: Sequence[Any] = (), unlike: Sequence[Any] = (), vectors: Any = None) -> Query:
    """The query that examples stand for.

    Args:
        stores: one, or several of one model; a place is read from the first that has data there.
        like: examples: (lon, lat) in degrees, or geometries (a file, a geopandas frame or a shapely geometry in degrees), each feature of
            which is one example, the mean of the unit vectors inside it.
        unlike: what the hits are not to be like, in the same way.
        vectors: float [dim] or [n, dim], further examples.

    Raises:
        ValueError: there is no example, one has no data, or the examples cancel out.
    """
    stores = several(stores)
    good, places = _examples(stores, like)
    if vectors is not None:
        given = np.atleast_2d(np.asarray(vectors, np.float32))
        if given.ndim != 2 or given.shape[1] != stores[0].dim or not np.isfinite(given).all():
            raise ValueError(
                f"vectors has shape {np.shape(vectors)}{'' if np.isfinite(given).all() else ' and numbers that are not finite'}; "
                f"{stores[0].path} holds vectors of {stores[0].dim} finite numbers"
            )
        good = [*good, *unit(given)]
    if not good:
        raise ValueError(
            'there is nothing to search for: give "words", --like LON,LAT, --like polygon.geojson or --vector FILE.npy'
        )
    wanted = np.mean(good, 0)
    bad, _ = _examples(stores, unlike)
    if bad:
        wanted = wanted - np.mean(bad, 0)
    if np.linalg.norm(wanted) < 1e-6:
        raise ValueError("the examples cancel out: no direction is left to search in; give fewer, or others")
    return Query(unit(wanted), tuple(places))


def search(
    stores: Any,
    wanted: Query | np.ndarray,
    *,
    top: int = 20,
    within: Any = None,
    period: Any = None,
    not_near_m: float = 0.0,
    engine: str = "auto",
) -> Hits:
    """The ``top`` places with the highest cosine to the query. Filters come first: what they leave is searched, whatever its rank.

    Args:
        stores: what ``open_store`` returns, or several of one model, such as UTM zones or years.
        wanted: of :func:`query`, or a vector [dim] (or [n, dim], whose mean is taken).
        within: geometries (a file, a frame, a shapely geometry in degrees): centres must lie in one of them.
        period: stores of another period, or of none, are left out; as in :func:`everysat.io.dates.span`.
        not_near_m: hits lie at least so many metres from each other and from the examples; the best of a neighbourhood stays.
        engine: ``auto`` takes the index of a store if there is one, ``index`` demands it, ``scan`` reads the store itself.

    Raises:
        ValueError: stores of different models, a stale index, or filters that leave no store.
    """
    stores = in_period(several(stores), period)
    wanted = _fitting(stores, wanted)
    if top < 1 or not_near_m < 0:
        raise ValueError(f"top={top} must be at least 1 and not_near_m={not_near_m:g} at least 0")
    engines = [_engine(store, engine) for store in stores]
    area = None if within is None else shapely.union_all(_geometries(within))
    keeps = [Keep(None if area is None else moved(area, DEGREES, store.crs)) for store in stores]
    if not_near_m:
        keeps = [_apart(keep, store, wanted.places, not_near_m) for keep, store in zip(keeps, stores, strict=True)]
    picks: list[Pick] = []
    while len(picks) < top:
        count = max(POOL, 4 * top) if not_near_m else top
        asked = zip(engines, keeps, strict=True)
        found = [e.best(wanted.vector, count, keep) for e, keep in asked]
        # Below the last candidate of a store it may have others that were not looked at yet.
        floor = max((one.score[-1] for one in found if len(one) == count), default=-math.inf)
        fresh = _ranked(found, stores, top - len(picks), not_near_m, float(floor))
        picks += fresh
        if not not_near_m or all(len(one) < count for one in found):
            break
        new = [moved(shapely.Point(x, y), stores[s].crs, DEGREES) for _, s, _, x, y in fresh]
        keeps = [_apart(keep, store, new, not_near_m) for keep, store in zip(keeps, stores, strict=True)]
    return _hits(picks, stores, tuple(f"{Path(s.path).name}: {_said(e)}" for s, e in zip(stores, engines, strict=True)))


def heat_map(
    store: Any, wanted: Query | np.ndarray, path: str | Path, *, within: Any = None, quiet: bool = False
) -> Path:
    """The score of every pixel as a Cloud-Optimized GeoTIFF (float32, NaN without data or outside of ``within``), window by window."""
    pixels(store, "a heat map")
    ready, total = scored(store, wanted, within), len(list(store.windows()))
    with CogWriter(path, store.geobox, ["cosine"], units="1", tags={"source": Path(store.path).name}) as file:
        for rows, cols, score in track(ready, "Scoring", total, quiet=quiet):
            file.write(score[None], rows, cols)
    return Path(path)


def scored(store: Any, wanted: Query | np.ndarray, within: Any = None) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows, columns and scores float32 [rows, cols] of one window after another of a store of pixels; NaN without data or outside of ``within``."""
    wanted = _fitting([store], wanted)
    area = None if within is None else moved(shapely.union_all(_geometries(within)), DEGREES, store.crs)
    keep = Keep(area)

    def one(window: tuple[slice, slice]) -> tuple[slice, slice, np.ndarray]:
        rows, cols = window
        score = unit(store.read(rows, cols)) @ wanted.vector
        if area is not None:
            x, y = centres(store, rows, cols)
            score[~keep(x.ravel(), y.ravel()).reshape(score.shape)] = math.nan
        return rows, cols, score

    return prefetch(one, list(store.windows()), workers=READERS)


def several(stores: Any) -> list[Any]:
    """One store or several as a list; several must have one model and vectors of one length."""
    found = list(stores) if isinstance(stores, (list, tuple)) else [stores]
    if not found:
        raise ValueError("there is no store to search")
    for other in found[1:]:
        if (other.dim, model_of(other)) != (found[0].dim, model_of(found[0])):
            raise ValueError(
                f"{found[0].path} holds {found[0].dim} numbers of {model_of(found[0])}, {other.path} {other.dim} of {model_of(other)}: "
                "vectors of different models cannot be compared; embed both with one"
            )
    return found


def model_of(store: Any) -> str:
    """Name and weights of the model that made a store."""
    told = [str(store.model[key]) for key in ("name", "weights", "url") if store.model.get(key)]
    return " ".join(told) or "an unnamed model"


def in_period(stores: list[Any], period: Any) -> list[Any]:
    """The stores whose period overlaps ``period``."""
    if period is None:
        return stores
    start, end = dates.span(tuple(period.split("/")) if isinstance(period, str) and "/" in period else period)
    kept = []
    for store in stores:
        first, last = (dates.span(stamp)[0] for stamp in store.period or (None, None))
        if store.period and first < end and last > start:
            kept.append(store)
    if not kept:
        known = ", ".join(f"{Path(s.path).name}: {_period(s) or 'none'}" for s in stores)
        raise ValueError(f"period={period!r}: no store is of that time ({known})")
    return kept


def pixels(store: Any, what: str) -> None:
    if store.kind != "pixel":
        raise ValueError(
            f"{store.path} holds {store.kind}s, {what} needs a store of pixels, as everysat embed -o area.zarr writes it"
        )


def centres(store: Any, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
    """x and y [rows, cols] of the centres of pixels, in the store's CRS."""
    row, col = np.mgrid[rows, cols] + 0.5
    return grid.positions(store.geobox.affine, col, row)


def moved(geometry: Any, source: Any, target: Any) -> Any:
    """A shapely geometry from one CRS to another."""
    convert = pyproj.Transformer.from_crs(source, target, always_xy=True)
    return shapely.transform(geometry, lambda xy: np.column_stack(convert.transform(xy[:, 0], xy[:, 1])))


def _fitting(stores: list[Any], wanted: Query | np.ndarray) -> Query:
    """A query of as many numbers as the stores' vectors have."""
    found = wanted if isinstance(wanted, Query) else query(stores, vectors=wanted)
    if found.vector.shape != (stores[0].dim,):
        raise ValueError(f"the query has shape {found.vector.shape}, {stores[0].path} holds vectors of {stores[0].dim}")
    return found


def _examples(stores: list[Any], given: Sequence[Any]) -> tuple[list[np.ndarray], list[Any]]:
    """Vectors of unit length and places in degrees."""
    vectors, places = [], []
    for one in given:
        shapes = [shapely.Point(*map(float, one))] if isinstance(one, (tuple, list)) else _geometries(one)
        for shape in shapes:
            vectors.append(_first(stores, shape))
            places.append(shape)
    return vectors, places


def _first(stores: list[Any], shape: Any) -> np.ndarray:
    """The vector of a place in the first store that has data there."""
    for store in stores:
        if shape.geom_type == "Point":
            try:
                return unit(np.asarray(store.at((shape.x, shape.y)), np.float32))
            except (ValueError, LookupError) as error:
                problem = str(error)
                continue
        inside = store.within(moved(shape, DEGREES, store.crs))
        if len(inside.index):
            return unit(unit(inside.vectors).mean(0))
        problem = f"no vector of {Path(store.path).name} lies inside the {shape.geom_type} around {shape.centroid.x:.5f}, {shape.centroid.y:.5f}"
    raise ValueError(problem if len(stores) == 1 else f"none of the {len(stores)} stores has the example: {problem}")


def _geometries(source: Any) -> list[Any]:
    """Shapely geometries in degrees of a file, a frame or a geometry."""
    if isinstance(source, shapely.Geometry):
        return [source]
    frame = vector.load_frame(source).to_crs(DEGREES)
    shapes = [shape for shape in frame.geometry if shape is not None and not shape.is_empty]
    if not shapes:
        raise ValueError(f"{source} holds no geometry")
    return shapes


def _engine(store: Any, engine: str) -> Any:
    if engine not in ENGINES:
        raise LookupError(
            f"engine={engine!r} is not one of {', '.join(ENGINES)}; everysat index chooses how a store is indexed"
        )
    found = None if engine == "scan" else open_index(store)
    if found is None and engine == "index":
        raise ValueError(f"{store.path} has no index; run: everysat index {store.path}")
    return found or Scan(store)


def _said(engine: Any) -> str:
    return (
        str(engine.facts) if hasattr(engine, "facts") else "exact, read from the store; everysat index makes it faster"
    )


def _apart(keep: Keep, store: Any, places: Sequence[Any], metres: float) -> Keep:
    """The filter, and not near these places (in degrees) either."""
    here = [moved(place, DEGREES, store.crs) for place in places]
    away = tuple(Away(shape, per_unit(store.crs, shape.centroid.x, shape.centroid.y), metres) for shape in here)
    return Keep(keep.within, (*keep.away, *away))


def per_unit(crs: Any, x: float, y: float) -> tuple[float, float]:
    """Metres on the ground per unit of x and of y, at a point of a CRS."""
    convert = pyproj.Transformer.from_crs(crs, DEGREES, always_xy=True)
    step = 1e-4 if pyproj.CRS(crs).is_geographic else 10.0
    lon, lat = convert.transform([x - step, x + step, x, x], [y, y, y - step, y + step])
    _, _, metres = pyproj.Geod(ellps="WGS84").inv(
        [lon[0], lon[2]], [lat[0], lat[2]], [lon[1], lon[3]], [lat[1], lat[3]]
    )
    return metres[0] / (2 * step), metres[1] / (2 * step)


def _ranked(found: list[Found], stores: list[Any], n: int, metres: float, floor: float) -> list[Pick]:
    """The ``n`` best of all stores that reach ``floor``; of those within ``metres`` of a better one none."""
    which = np.concatenate([np.full(len(one), i) for i, one in enumerate(found)])
    score, index, x, y = (np.concatenate([getattr(one, key) for one in found]) for key in ("score", "index", "x", "y"))
    alive = score >= floor
    picks: list[Pick] = []
    for i in np.lexsort((index, which, -score)):
        if len(picks) == n:
            break
        if not alive[i]:
            continue
        picks.append((float(score[i]), int(which[i]), int(index[i]), float(x[i]), float(y[i])))
        if metres:
            place = moved(shapely.Point(x[i], y[i]), stores[which[i]].crs, DEGREES)
            for s, store in enumerate(stores):
                mine = np.flatnonzero(alive & (which == s))
                alive[mine] = _apart(Keep(), store, [place], metres)(x[mine], y[mine])
    return picks


def _hits(picks: list[Pick], stores: list[Any], how: tuple[str, ...]) -> Hits:
    columns = list(zip(*picks, strict=True)) if picks else [()] * 5
    score, which, index, x, y = (
        np.array(c, t) for c, t in zip(columns, (np.float32, int, np.int64, float, float), strict=True)
    )
    lon, lat, shapes = np.empty(len(x)), np.empty(len(x)), np.empty(len(x), object)
    for s, store in enumerate(stores):
        mine = np.flatnonzero(which == s)
        if not len(mine):
            continue
        convert = pyproj.Transformer.from_crs(store.crs, DEGREES, always_xy=True)
        lon[mine], lat[mine] = convert.transform(x[mine], y[mine])
        if store.kind == "pixel":
            a = store.geobox.affine
            corners = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
            ring = [convert.transform(x[mine] + a.a * c + a.b * r, y[mine] + a.d * c + a.e * r) for c, r in corners]
            shapes[mine] = shapely.polygons(np.moveaxis(np.array(ring), 0, 1).T)
        else:
            shapes[mine] = store.footprints(index[mine]).to_crs(DEGREES).to_numpy()
    names, periods = tuple(str(s.path) for s in stores), tuple(_period(s) for s in stores)
    return Hits(score, which, index, lon, lat, tuple(shapes), names, periods, how)


def _period(store: Any) -> str:
    return "/".join(store.period) if store.period else ""
