"""Chip stores: what is written is read, here and by geopandas and pyarrow; rows lie along a curve; only chips at hand are read."""

from __future__ import annotations

import itertools
import json
import os

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest
import shapely

from everysat.store import ChipWriter, Points, chips, open_store, write_chips
from everysat.store.quantise import METHODS, fit

SIDE, DIM = 320, 8


def scattered(n=500, seed=0):
    """Footprints on a 40 x 40 grid, in no order, and vectors, two of which are no data."""
    rng = np.random.default_rng(seed)
    cell = rng.choice(1600, n, replace=False)
    west, south = 600_000 + SIDE * (cell % 40), 5_300_000 + SIDE * (cell // 40)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[3, 17]] = np.nan
    return shapely.box(west, south, west + SIDE, south + SIDE), x


def cat(store) -> Points:
    return Points.cat(list(store.points()), store.dim)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_is_read(tmp_path, name):
    footprints, x = scattered()
    rule = fit(name, x, **({"k": 5} if name in ("pca-int8/1", "prefix/1") else {}))
    settings = {"model": {"name": "m"}, "period": ("2024", "2025"), "row_group_mb": 0.01}
    path = write_chips(
        tmp_path / "c.parquet", footprints, x, 32631, quantiser=rule, columns={"id": np.arange(500)}, **settings
    )
    store = open_store(path)
    assert (store.kind, store.dim, store.shape, store.crs) == ("chip", rule.out_dim, (498,), "EPSG:32631")
    assert (store.period, store.model, store.geobox) == (("2024", "2025"), {"name": "m"}, None)
    found, ids = cat(store), pq.read_table(path)["id"].to_numpy()
    assert sorted(ids) == sorted({*range(500)} - {3, 17})
    np.testing.assert_array_equal(found.index, np.arange(498))
    np.testing.assert_array_equal(found.vectors, rule.decode(*rule.encode(x[ids])))
    centres = shapely.centroid(footprints[ids])
    np.testing.assert_array_equal(found.x, shapely.get_x(centres))
    np.testing.assert_array_equal(found.y, shapely.get_y(centres))
    assert store.quality["sample"] == 498
    assert os.listdir(tmp_path) == ["c.parquet"]


def test_geopandas_reads_it(tmp_path):
    footprints, x = scattered()
    path = write_chips(
        tmp_path / "c.parquet", footprints, x, "EPSG:32631", quantiser="float32/1", columns={"id": np.arange(500)}
    )
    frame = geopandas.read_parquet(path)
    assert frame.crs.to_epsg() == 32631
    assert frame.columns.tolist() == ["embedding", "id", "geometry"]
    np.testing.assert_array_equal(np.stack(frame["embedding"]), x[frame["id"]])
    assert shapely.equals(frame.geometry.to_numpy(), footprints[frame["id"]]).all()
    box = (602_000, 5_301_000, 604_000, 5_303_000)
    near = geopandas.read_parquet(path, bbox=box)
    assert set(near["id"]) == set(frame["id"][frame.intersects(shapely.box(*box))])
    assert 0 < len(near) < 498


def test_metadata_is_geoparquet_with_the_convention(tmp_path):
    footprints, x = scattered()
    path = write_chips(
        tmp_path / "c.parquet", footprints, x, 32631, chip_px=(32, 32), stride_px=(32, 32), gsd_m=10, source="s2"
    )
    meta = pq.read_metadata(path)
    geo = json.loads(meta.metadata[b"geo"])
    column = geo["columns"]["geometry"]
    assert (geo["version"], geo["primary_column"], column["encoding"]) == ("1.1.0", "geometry", "WKB")
    assert column["geometry_types"] == ["Polygon"]
    assert column["covering"]["bbox"]["ymax"] == ["bbox", "ymax"]
    assert column["bbox"] == [*shapely.total_bounds(np.delete(footprints, [3, 17]))]
    assert pyproj.CRS.from_json_dict(column["crs"]).to_epsg() == 32631
    attrs = json.loads(meta.metadata[b"geoemb"])
    assert attrs["geoemb:type"] == "chip"
    assert attrs["geoemb:chip_layout"] == {"layout_type": "regular_grid", "chip_size": [32, 32], "stride": [32, 32]}
    assert attrs["geoemb:quantization"]["method"] == "per_pixel_scale"
    assert (attrs["geoemb:gsd"], attrs["geoemb:source_data"]) == (10, ["urn:everysat:source:s2"])
    assert meta.row_group(0).column(0).compression == "ZSTD"
    assert pq.read_schema(path).field("embedding").type == pa.list_(pa.int8(), DIM)


def test_neighbours_in_the_table_are_neighbours_on_the_ground(tmp_path):
    footprints, x = scattered(1500)
    path = write_chips(tmp_path / "c.parquet", footprints, x, 32631)
    found = cat(open_store(path))
    steps = np.hypot(np.diff(found.x), np.diff(found.y)) / SIDE
    shuffled = np.random.default_rng(0).permutation(len(found.x))
    assert np.mean(steps) < 1.5, "of a full grid along the curve every step is 1"
    assert np.mean(np.hypot(np.diff(found.x[shuffled]), np.diff(found.y[shuffled]))) / SIDE > 15


def test_order_of_parts_makes_no_difference(tmp_path):
    footprints, x = scattered()
    for name, order in (("a", np.arange(500)), ("b", np.random.default_rng(1).permutation(500))):
        with ChipWriter(tmp_path / f"{name}.parquet", DIM, 32631, row_group_mb=0.005) as out:
            for part in np.array_split(order, 7):
                out.add(footprints[part], x[part], id=part)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert one.equals(two)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups > 5


def test_within_reads_what_may_lie_there(tmp_path, monkeypatch):
    footprints, x = scattered()
    path = write_chips(tmp_path / "c.parquet", footprints, x, 32631, columns={"id": np.arange(500)}, row_group_mb=0.003)
    store, ids = open_store(path), pq.read_table(path)["id"].to_numpy()
    triangle = shapely.Polygon([(601_000, 5_301_000), (604_000, 5_302_000), (602_000, 5_304_000)])
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **more: read.append(i) or original(self, i, **more)
    )
    found = store.within(triangle)
    hit = shapely.intersects(footprints, triangle) & np.isfinite(x[:, 0])
    assert sorted(ids[found.index]) == np.flatnonzero(hit).tolist()
    assert 0 < len(read) < pq.read_metadata(path).num_row_groups / 2
    assert shapely.equals(store.footprints(found.index).to_numpy(), footprints[ids[found.index]]).all()
    assert len(store.within(shapely.box(0, 0, 1, 1))) == 0


def test_at_takes_the_chip_with_the_nearest_centre(tmp_path):
    boxes = shapely.box(np.array([0.0, 50, 300]), 0, np.array([100.0, 150, 400]), 100)
    path = write_chips(tmp_path / "c.parquet", boxes, np.eye(3), "EPSG:32631", quantiser="float32/1")
    store = open_store(path)
    lonlat = pyproj.Transformer.from_crs("EPSG:32631", "EPSG:4326", always_xy=True).transform
    assert store.at(lonlat(60, 50)).tolist() == [1, 0, 0]
    assert store.at(lonlat(90, 50)).tolist() == [0, 1, 0]
    with pytest.raises(LookupError, match="no chip"):
        store.at(lonlat(200, 50))


def test_footprints_of_other_kinds(tmp_path):
    shapes = [shapely.Point(1, 2), shapely.box(0, 0, 1, 1), shapely.MultiPoint([(0, 5), (3, 4)])]
    path = write_chips(tmp_path / "c.parquet", shapes, np.eye(3), "EPSG:4326", columns={"what": ["a", "b", None]})
    frame = geopandas.read_parquet(path)
    assert set(frame.geom_type) == {"Point", "Polygon", "MultiPoint"}
    assert set(frame["what"]) - {"a", "b"}
    line = [shapely.Point(i, 0) for i in (4, 1, 3)]
    path = write_chips(tmp_path / "l.parquet", line, np.eye(3), "EPSG:4326")
    assert cat(open_store(path)).x.tolist() == [1, 3, 4], "along a line there is no curve"


def test_sample_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, "_SAMPLE", 50)
    footprints, x = scattered(1600)
    with ChipWriter(tmp_path / "c.parquet", DIM, 32631) as out:
        for part in np.array_split(np.arange(1600), 20):
            out.add(footprints[part], x[part])
            assert sum(map(len, out._sample)) <= 280
    assert 20 <= open_store(tmp_path / "c.parquet").quality["sample"] <= 50


def test_nothing_is_left_of_a_failure_and_an_older_file_stays(tmp_path):
    footprints, x = scattered()
    path = write_chips(tmp_path / "c.parquet", footprints, x, 32631)
    before = path.read_bytes()

    def interrupted():
        with ChipWriter(path, DIM, 32631) as out:
            out.add(footprints[:10], x[:10])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.parquet"]


def test_only_stores_are_replaced(tmp_path):
    other = tmp_path / "c.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(FileExistsError, match="no store of embeddings"):
        write_chips(other, *scattered(), 32631)
    other.write_text("notes")
    with pytest.raises(FileExistsError, match="no store of embeddings"):
        write_chips(other, *scattered(), 32631)


def test_bad_input(tmp_path):
    footprints, x = scattered(20)
    path = tmp_path / "c.parquet"

    def add(*parts):
        with ChipWriter(path, DIM, 32631) as out:
            for geometry, vectors, columns in parts:
                out.add(geometry, vectors, **columns)

    for parts, words in [
        ([(footprints[:5], x, {})], "5 footprints"),
        ([(footprints, x, {"id": [1, 2]})], "'id': 2"),
        ([(footprints, x, {"id": range(20)}), (footprints, x, {})], "the first part had embedding"),
        ([([shapely.Point(), *footprints[1:]], x, {})], "footprint is empty"),
        ([([None, *footprints[1:]], x, {})], "footprint is empty"),
        ([(footprints, x[:, :3], {})], r"expects \[n, 8\]"),
        ([(footprints, np.full_like(x, np.nan), {})], "no vector is data"),
        ([], "nothing was added"),
    ]:
        with pytest.raises(ValueError, match=words):
            add(*parts)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_chips(tmp_path / "no" / "c.parquet", footprints, x, 32631)
    with pytest.raises(pyproj.exceptions.CRSError):
        write_chips(path, footprints, x, "EPSG:1")


def test_tables_of_other_writers(tmp_path):
    footprints, x = scattered(20)
    x = np.nan_to_num(x)
    frame = geopandas.GeoDataFrame({"id": range(20), "embedding": list(x)}, geometry=footprints, crs="EPSG:32631")
    frame.to_parquet(tmp_path / "e.parquet")
    store = open_store(tmp_path / "e.parquet")
    np.testing.assert_array_equal(cat(store).vectors, x)
    assert len(store.within(footprints[4].buffer(-1))) == 1
    frame["embedding"] = list((x * 127).astype(np.int8))
    frame.to_parquet(tmp_path / "i.parquet")
    with pytest.raises(LookupError, match="int8 codes by the method None"):
        open_store(tmp_path / "i.parquet")
    with pytest.raises(ValueError, match="and a scale"):
        open_store(tmp_path / "i.parquet", quantiser="int8-linear/1")
    assert open_store(tmp_path / "i.parquet", quantiser="int8-square/1").dim == DIM
    frame["embedding"] = [row[: 3 + i % 2] for i, row in enumerate(x)]
    frame.to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="expected 3 in each"):
        list(open_store(tmp_path / "r.parquet").points())
    pq.write_table(pa.table({"a": [1]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match="no column 'embedding'"):
        open_store(tmp_path / "n.parquet")


def test_unknown_quantisers_are_refused(tmp_path):
    path = write_chips(tmp_path / "c.parquet", *scattered(), 32631)
    table = pq.read_table(path)
    told = {key: value.replace(b"int8-linear/1", b"int8-linear/9") for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(told), path)
    with pytest.raises(LookupError, match="'int8-linear/9'"):
        open_store(path)


def test_curve_visits_a_full_grid_step_by_step():
    cells = np.array(list(itertools.product(range(16), range(16))), float)
    bounds = np.concatenate([cells, cells + 1], 1)
    for order in (chips.hilbert_order(bounds), 255 - chips.hilbert_order(bounds[::-1])):
        assert sorted(order) == list(range(256))
        assert (np.abs(np.diff(cells[order], axis=0)).sum(1) == 1).mean() > 0.9
