"""Chip embeddings in GeoParquet 1.1: rows along a Hilbert curve, a covering box column, row groups that bound memory.

Source: opengeospatial/geoparquet, version 1.1.0; the recommendations of the geo-embeddings group for Parquet (Hilbert order,
covering, ZSTD). Vectors are a column ``embedding`` of lists of one length, factors a column ``scale``; the key ``geoemb`` of the
file's metadata holds the same attributes as a Zarr store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyproj
import shapely
from shapely.geometry.base import BaseGeometry

from everysat.io.output import remove, replacing
from everysat.store.attributes import attributes, clearly, period_of, quantiser_of
from everysat.store.quantise import Quantiser, get, measure
from everysat.store.read import Period, Points, Store

KEY = b"geoemb"
_BOX = ("xmin", "ymin", "xmax", "ymax")
_SAMPLE = 4096


class ChipWriter:
    """A GeoParquet file at ``path``, to be filled part by part; used in a ``with`` statement.

    Parts are spooled beside the file. When the block ends they are sorted along a Hilbert curve, and only then the file appears;
    when the block fails nothing is left. Memory holds about 80 bytes a chip while sorting, and one row group: 10 million chips
    take 1 GB.

    Args:
        path: of the file; a chip store that is there is replaced at the end.
        dim: length of the vectors.
        crs: of the footprints, anything that pyproj takes.
        quantiser, period, model, source, facts: as for :func:`everysat.store.create`.
        chip_px: height and width of a chip, pixels; ``stride_px``: steps between chips. Told where they lie on a regular grid.
        gsd_m: of the pixels that the vectors were made from.
        row_group_mb: size of a row group before compression.

    Raises:
        FileExistsError: what is at ``path`` is no chip store.
    """

    def __init__(
        self,
        path: str | Path,
        dim: int,
        crs: Any,
        *,
        quantiser: str | Quantiser = "int8-linear/1",
        period: Period | None = None,
        model: Mapping[str, Any] | None = None,
        source: str | Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        chip_px: tuple[int, int] | None = None,
        stride_px: tuple[int, int] | None = None,
        gsd_m: float | None = None,
        row_group_mb: float = 128,
    ) -> None:
        self.path = Path(path)
        self.quantiser = get(quantiser, dim) if isinstance(quantiser, str) else quantiser
        self.crs = pyproj.CRS(crs)
        self.attrs = attributes(
            "chip", self.quantiser, gsd_m=gsd_m, period=period, model=model, source=source, extra=facts
        )
        if self.quantiser.arrays():
            self.attrs["everysat"]["arrays"] = {k: v.tolist() for k, v in self.quantiser.arrays().items()}
        self.attrs["geoemb:chip_layout"] = {
            "layout_type": "regular_grid" if chip_px and stride_px else "irregular",
            "chip_size": list(chip_px or (1, 1)),
            **({"stride": list(stride_px)} if stride_px else {}),
        }
        self._row_bytes = int(row_group_mb * 1e6)
        self._spool: Any = None
        self._schema: pa.Schema | None = None
        self._count = 0
        self._sample: list[np.ndarray] = []
        if self.quantiser.dim != dim:
            raise ValueError(f"the quantiser is for vectors of {self.quantiser.dim} numbers, dim={dim}")
        if self.path.exists() and not is_chip_store(self.path):
            raise FileExistsError(
                f"{self.path} exists and is no store of embeddings; choose another path, or remove it yourself"
            )

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".spool.partial")

    def __enter__(self) -> ChipWriter:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write {self.path}: the folder {self.path.parent} does not exist; make it first"
            )
        return self

    def add(
        self, footprints: Sequence[BaseGeometry] | np.ndarray, vectors: np.ndarray, **columns: Sequence[Any]
    ) -> None:
        """Chips with vectors float [n, dim]; those with NaN are left out. ``columns``: more about each, the same in every part.

        Raises:
            ValueError: lengths that differ, columns that differ from those of the first part, an empty footprint.
        """
        vectors, footprints = np.asarray(vectors, np.float32), np.asarray(footprints, dtype=object)
        lengths = {"vectors": len(vectors), **{name: len(values) for name, values in columns.items()}}
        if any(n != len(footprints) for n in lengths.values()):
            raise ValueError(f"{len(footprints)} footprints, but {lengths}")
        if shapely.is_missing(footprints).any() or shapely.is_empty(footprints).any():
            raise ValueError("a footprint is empty; leave that chip out")
        codes, scale = self.quantiser.encode(vectors)
        seen = self.quantiser.valid(codes, scale)
        flat = pa.array(codes[seen].ravel())
        table = {
            "embedding": pa.FixedSizeListArray.from_arrays(flat, self.quantiser.width),
            **({} if scale is None else {"scale": pa.array(scale[seen])}),
            **{name: pa.array(values).filter(pa.array(seen)) for name, values in columns.items()},
            "bbox": _boxes(shapely.bounds(footprints[seen])),
            "geometry": pa.array(shapely.to_wkb(footprints[seen]), pa.binary()),
        }
        batch = pa.RecordBatch.from_pydict(table)
        with clearly(self.path):
            if self._spool is None:
                self._schema, self._spool = batch.schema, pa.ipc.new_file(str(self._part), batch.schema)
            if batch.schema != self._schema:
                raise ValueError(f"columns {_named(batch.schema)}; the first part had {_named(self._schema)}")
            self._spool.write_batch(batch)
        self._keep(vectors[seen])

    def _keep(self, vectors: np.ndarray) -> None:
        """Every so many chips, thinned out as they become more."""
        self._sample.append(vectors.copy())
        self._count += len(vectors)
        if sum(map(len, self._sample)) > 4 * _SAMPLE:
            self._sample = [np.concatenate(self._sample)[::2]]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._spool is not None:
                self._spool.close()
                self._spool = None
            if kind is None:
                self._finish()
        finally:
            remove(self._part)

    def _finish(self) -> None:
        if not self._count:
            raise ValueError(f"no chip was written to {self.path}: nothing was added, or no vector is data")
        sample = np.concatenate(self._sample)
        self.attrs["everysat"]["quality"] = measure(self.quantiser, sample[:: -(-len(sample) // _SAMPLE)])
        with pa.memory_map(str(self._part)) as file, clearly(self.path), replacing(self.path) as partial:
            spool = pa.ipc.open_file(file)
            parts = [spool.get_batch(i) for i in range(spool.num_record_batches)]
            bounds = np.concatenate([np.stack([p["bbox"].field(n).to_numpy() for n in _BOX], 1) for p in parts])
            order = hilbert_order(bounds)
            kinds = sorted(set().union(*(_kinds(p["geometry"]) for p in parts)))
            about = {b"geo": json.dumps(self._geo(bounds, kinds)), KEY: json.dumps(self.attrs)}
            schema = parts[0].schema.with_metadata(about)
            rows = max(1, self._row_bytes * len(order) // max(1, sum(p.nbytes for p in parts)))
            page = max(2**16, self.quantiser.bytes_per_vector)
            options = {"compression": "zstd", "data_page_size": page, "use_dictionary": False}
            with pq.ParquetWriter(partial, schema, **options) as out:
                for start in range(0, len(order), rows):
                    table = _gather(parts, order[start : start + rows])
                    out.write_table(table.replace_schema_metadata(about), row_group_size=rows)

    def _geo(self, bounds: np.ndarray, kinds: list[str]) -> dict[str, Any]:
        return {
            "version": "1.1.0",
            "primary_column": "geometry",
            "columns": {
                "geometry": {
                    "encoding": "WKB",
                    "geometry_types": kinds,
                    "crs": self.crs.to_json_dict(),
                    "bbox": [*bounds[:, :2].min(0).tolist(), *bounds[:, 2:].max(0).tolist()],
                    "covering": {"bbox": {name: ["bbox", name] for name in _BOX}},
                }
            },
        }


def write_chips(
    path: str | Path,
    footprints: Sequence[BaseGeometry] | np.ndarray,
    vectors: np.ndarray,
    crs: Any,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    **settings: Any,
) -> Path:
    """All chips at once: footprints [n] in ``crs`` with vectors float [n, dim]; ``settings`` as for :class:`ChipWriter`."""
    with ChipWriter(path, np.shape(vectors)[1], crs, **settings) as out:
        out.add(footprints, vectors, **dict(columns or {}))
    return Path(path)


def hilbert_order(bounds: np.ndarray) -> np.ndarray:
    """Order int64 [n] of boxes float64 [n, 4] (west, south, east, north) along a Hilbert curve; the same for any input order."""
    x, y = (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2
    total = (x.min(), y.min(), x.max(), y.max())
    if total[0] == total[2] or total[1] == total[3]:  # all in one line: there is no area to divide
        return np.lexsort((x, y))
    steps = range(0, len(x), 1_000_000)
    along = [
        geopandas.GeoSeries(geopandas.points_from_xy(x[i : i + steps.step], y[i : i + steps.step]))
        .hilbert_distance(total_bounds=total, level=16)
        .to_numpy()
        for i in steps
    ]
    return np.lexsort((x, y, np.concatenate(along)))


def is_chip_store(path: Path) -> bool:
    """Whether a file is a Parquet table with a column of embeddings."""
    try:
        return "embedding" in pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid):
        return False


def _gather(parts: list[Any], rows: np.ndarray) -> Any:
    """Rows, in this order, of record batches one after another; the batches are in a file, of which only these are read."""
    starts = np.cumsum([0, *(len(part) for part in parts)])
    which = np.searchsorted(starts, rows, side="right") - 1
    by_part = np.argsort(which, kind="stable")
    sizes = np.bincount(which, minlength=len(parts))
    cut = np.split(rows[by_part], np.cumsum(sizes)[:-1])
    taken = [
        part.take(pa.array(mine - starts[i]))
        for i, (part, mine) in enumerate(zip(parts, cut, strict=True))
        if len(mine)
    ]
    return pa.Table.from_batches(taken).combine_chunks().take(pa.array(np.argsort(by_part)))


def _boxes(bounds: np.ndarray) -> Any:
    return pa.StructArray.from_arrays([pa.array(bounds[:, i]) for i in range(4)], names=list(_BOX))


def _kinds(wkb: Any) -> set[str]:
    numbers = np.unique(shapely.get_type_id(shapely.from_wkb(wkb.to_numpy(zero_copy_only=False))))
    names = ("Point", "LineString", "LinearRing", "Polygon", "MultiPoint", "MultiLineString", "MultiPolygon")
    return {names[n] if n < len(names) else "GeometryCollection" for n in numbers}


def _named(schema: Any) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in zip(schema.names, schema.types, strict=True))


@dataclass(frozen=True, eq=False)
class ChipStore(Store):
    """A vector for each footprint of a GeoParquet table, read a row group at a time."""

    boxed: bool = True
    told_bounds: tuple[float, ...] = ()

    @property
    def bounds(self) -> tuple[float, ...]:
        """West, south, east and north of all footprints, in the CRS of the store."""
        if self.told_bounds:
            return self.told_bounds
        boxes = [shapely.total_bounds(shapely.from_wkb(table["geometry"].to_numpy())) for _, table in self._groups()]
        edges = np.array(boxes)
        return (*edges[:, :2].min(0).tolist(), *edges[:, 2:].max(0).tolist())

    def points(self) -> Iterator[Points]:
        for start, table in self._groups():
            yield self._points(table, start + np.arange(len(table)))

    def within(self, geometry: BaseGeometry) -> Points:
        """Vectors of the chips whose footprints intersect ``geometry``."""
        if geometry.is_empty:
            raise ValueError("the geometry is empty")
        shapely.prepare(geometry)
        parts = []
        for start, table in self._groups(geometry.bounds):
            shapes = shapely.from_wkb(table["geometry"].to_numpy())
            hit = np.flatnonzero(shapely.intersects(geometry, shapes))
            if len(hit):
                parts.append(self._points(table.take(hit), start + hit))
        return Points.cat(parts, self.dim)

    def at(self, lonlat: tuple[float, float]) -> np.ndarray:
        """The vector of the chip that holds the place; of several, of the one with the nearest centre."""
        x, y = self._to_crs(lonlat)
        found = self.within(shapely.Point(x, y))
        if not len(found):
            raise LookupError(f"no chip of {self.path} holds {tuple(lonlat)}")
        return found.vectors[np.argmin(np.hypot(found.x - x, found.y - y))]

    def _groups(self, bounds: tuple[float, ...] | None = None) -> Iterator[tuple[int, Any]]:
        """Number of the first row and the table of each row group that may touch ``bounds``."""
        file, start = pq.ParquetFile(self.path), 0
        columns = ["embedding", "geometry", *(["scale"] if self.quantiser.scaled else [])]
        for group in range(file.num_row_groups):
            meta = file.metadata.row_group(group)
            if bounds is None or not self.boxed or _touches(meta, bounds):
                yield start, file.read_row_group(group, columns=columns)
            start += meta.num_rows

    def _points(self, table: Any, rows: np.ndarray) -> Points:
        codes = _matrix(table["embedding"], self.quantiser.width)
        scale = table["scale"].to_numpy() if self.quantiser.scaled else None
        box = shapely.bounds(shapely.from_wkb(table["geometry"].to_numpy()))
        vectors = self.quantiser.decode(codes, scale)
        seen = self.quantiser.valid(codes, scale)
        x, y = (box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2
        return Points(vectors[seen], x[seen], y[seen], rows[seen].astype(np.int64))

    def footprints(self, rows: np.ndarray) -> geopandas.GeoSeries:
        """Footprints of rows (``Points.index``), in the CRS of the store."""
        rows = np.asarray(rows)
        out = np.empty(len(rows), dtype=object)
        for start, table in self._groups():
            mine = (rows >= start) & (rows < start + len(table))
            if mine.any():
                out[mine] = shapely.from_wkb(table["geometry"].to_numpy()[rows[mine] - start])
        return geopandas.GeoSeries(out, crs=self.crs)


def _matrix(column: Any, width: int) -> np.ndarray:
    """A column of lists of ``width`` numbers as an array [n, width]."""
    flat = pc.list_flatten(column).to_numpy()
    if len(flat) != len(column) * width:
        raise ValueError(f"lists of {len(flat)} numbers in {len(column)} rows; expected {width} in each, none missing")
    return flat.reshape(-1, width)


def _touches(meta: Any, bounds: tuple[float, ...]) -> bool:
    """Whether the statistics of a row group allow a box that touches ``bounds``."""
    least, most = {}, {}
    for i in range(meta.num_columns):
        column = meta.column(i)
        name = column.path_in_schema.removeprefix("bbox.")
        if (
            column.path_in_schema.startswith("bbox.")
            and column.statistics is not None
            and column.statistics.has_min_max
        ):
            least[name], most[name] = column.statistics.min, column.statistics.max
    if len(least) < 4:
        return True
    west, south, east, north = bounds
    return not (least["xmin"] > east or most["xmax"] < west or least["ymin"] > north or most["ymax"] < south)


def open_chips(path: Path, quantiser: str | Quantiser | None = None) -> ChipStore:
    """The store in a GeoParquet file; see :func:`everysat.store.open_store`."""
    file = pq.ParquetFile(path)
    schema, told = file.schema_arrow, file.schema_arrow.metadata or {}
    if "embedding" not in schema.names or b"geo" not in told:
        raise ValueError(f"{path} has no column 'embedding' or is no GeoParquet; it has {', '.join(schema.names)}")
    geo, attrs = json.loads(told[b"geo"]), json.loads(told.get(KEY, b"{}"))
    column = geo["columns"][geo["primary_column"]]
    if geo["primary_column"] != "geometry" or column.get("encoding") != "WKB":
        raise ValueError(
            f"{path}: the geometry is {geo['primary_column']!r} as {column.get('encoding')}; expected 'geometry' as WKB"
        )
    kind = schema.field("embedding").type
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(file)
    dtype = kind.value_type.to_pandas_dtype()
    if quantiser is None:
        fitted = {name: np.asarray(value) for name, value in attrs.get("everysat", {}).get("arrays", {}).items()}
        rule = quantiser_of(attrs, fitted, path, width, np.dtype(dtype).name)
    else:
        rule = get(quantiser, width) if isinstance(quantiser, str) else quantiser
    if rule.width != width or (rule.scaled and "scale" not in schema.names):
        raise ValueError(
            f"{path}: {rule.name} has {rule.width} numbers a chip{' and a scale' if rule.scaled else ''}, the table {width}"
        )
    crs = pyproj.CRS.from_json_dict(column["crs"]) if column.get("crs") else pyproj.CRS("OGC:CRS84")
    code = crs.to_epsg()
    own = attrs.get("everysat", {})
    return ChipStore(
        path, "chip", f"EPSG:{code}" if code else crs.to_wkt(), None, (file.metadata.num_rows,), period_of(own), rule,
        dict(own.get("model") or {"url": attrs.get("geoemb:model")}), attrs,
        boxed=column.get("covering", {}).get("bbox", {}).get("xmin") == ["bbox", "xmin"],
        told_bounds=tuple(column.get("bbox", ())),
    )  # fmt: skip


def _first_length(file: Any) -> int:
    first = next(file.iter_batches(batch_size=1, columns=["embedding"]), None)
    if first is None or not first["embedding"][0].is_valid:
        raise ValueError("the table has no rows with an embedding")
    return len(first["embedding"][0])
