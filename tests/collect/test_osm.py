"""OpenStreetMap from extracts, tables and Overpass: what is an area, what is left out, and servers that are busy or overwhelmed."""

from __future__ import annotations

import bz2
import json
import re

import geopandas
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from recorded_server import recorded

from everysat.collect import osm, polite
from everysat.data import berlin
from everysat.io.place import place

pytest.importorskip("osmium")
LON, LAT, STEP = 24.94, 60.17, 0.001


def extract(nodes, ways=(), relations=()) -> str:
    """An .osm file: ``nodes`` {id: (x, y, tags)} in steps from a corner, ``ways`` (id, nodes, tags), ``relations`` (id, [(way, role)], tags)."""

    def tags(some):
        return "".join(f'<tag k="{k}" v="{v}"/>' for k, v in some.items())

    body = [
        f'<node id="{i}" version="1" lat="{LAT + y * STEP:.7f}" lon="{LON + x * STEP:.7f}">{tags(t)}</node>'
        for i, (x, y, t) in nodes.items()
    ]
    body += [
        f'<way id="{i}" version="1">{"".join(f"""<nd ref="{n}"/>""" for n in refs)}{tags(t)}</way>'
        for i, refs, t in ways
    ]
    body += [
        f'<relation id="{i}" version="1">{"".join(f"""<member type="way" ref="{w}" role="{r}"/>""" for w, r in members)}{tags(t)}</relation>'
        for i, members, t in relations
    ]
    return f"<?xml version='1.0' encoding='UTF-8'?>\n<osm version=\"0.6\">\n{''.join(body)}\n</osm>\n"


def corner(start, x, y, side=1.0):
    """Four nodes of a square, clockwise from its north-west."""
    return {
        start + i: (x + dx * side, y + dy * side, {}) for i, (dx, dy) in enumerate([(0, 0), (1, 0), (1, -1), (0, -1)])
    }


NODES = {
    **corner(1, 0, 0), **corner(11, 4, 0, 4), **corner(21, 5, -1), **corner(31, 0, -5), 40: (2, 2, {"generator:source": "wind", "power": "generator"}),
    41: (2, 3, {"addr:housenumber": "7"}), 50: (-1, -2, {}), 51: (9, -2, {}),
}  # fmt: skip
WAYS = (
    (100, (1, 2, 3, 4, 1), {"building": "yes", "addr:street": "Kaivokatu"}), (101, (11, 12, 13, 14, 11), {}), (102, (21, 22, 23, 24, 21), {}),
    (103, (31, 32, 33, 34, 31), {"highway": "residential", "junction": "roundabout"}), (104, (50, 51), {"waterway": "river", "name": "Vantaa"}),
    (105, (50, 999), {"highway": "path"}),
)  # fmt: skip
LAKE = (200, ((101, "outer"), (102, "inner")), {"type": "multipolygon", "natural": "water", "water": "lake"})
TOWN = extract(NODES, WAYS, (LAKE,))


@pytest.fixture
def town(tmp_path):
    path = tmp_path / "town.osm"
    path.write_text(TOWN)
    return path


def test_areas_rings_lines_and_holes(town):
    frame = osm.read(town).set_index("id")
    assert sorted(frame.index) == ["node/40", "relation/200", "way/100", "way/103", "way/104"]
    kinds = frame.geometry.geom_type.to_dict()
    assert kinds == {
        "node/40": "Point",
        "relation/200": "Polygon",
        "way/100": "Polygon",
        "way/103": "LineString",
        "way/104": "LineString",
    }
    assert frame.geometry["relation/200"].area == pytest.approx(15 * STEP**2, rel=1e-6)
    assert frame.tags["way/100"] == {"building": "yes", "addr:street": "Kaivokatu"}


@pytest.mark.parametrize(
    ("tags", "area"),
    [
        ({"building": "yes"}, True),
        ({"highway": "pedestrian"}, False),
        ({"highway": "pedestrian", "area": "yes"}, True),
        ({"landuse": "forest", "area": "no"}, False),
        ({"natural": "wood"}, True),
        ({"natural": "coastline"}, False),
        ({"leisure": "track"}, False),
        ({"leisure": "park", "barrier": "fence"}, True),
        ({"waterway": "riverbank"}, True),
        ({"railway": "platform"}, True),
        ({"name": "somewhere"}, True),
    ],
)
def test_closed_ways_are_areas_or_rings(tags, area):
    assert osm.is_area(tags) == area


def test_bounds_and_keys_choose(town):
    west = (LON - 0.01, LAT - 0.01, LON + 0.5 * STEP, LAT + 0.01)
    assert set(osm.read(town, west).id) == {"way/100", "way/103", "way/104"}
    assert set(osm.read(town, keys=("waterway",)).id) == {"way/104"}


def test_packed_extracts_are_the_same(town, tmp_path):
    packed = tmp_path / "town.osm.bz2"
    packed.write_bytes(bz2.compress(TOWN.encode()))
    assert osm.read(packed).equals(osm.read(town))


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        osm.read(tmp_path / "a.osm.pbf")
    (tmp_path / "a.osm").write_text(TOWN[: len(TOWN) // 2])
    with pytest.raises(OSError, match=r"a\.osm cannot be read as OpenStreetMap data"):
        osm.read(tmp_path / "a.osm")


def test_a_layer_of_a_place_is_in_metres(town):
    where = place((LON + STEP, LAT - STEP), size_m=400, gsd_m=10)
    layer = osm.layer(osm.read(town), where)
    index = [i for i, tags in enumerate(layer.attributes) if tags.get("building")]
    assert len(index) == 1
    low_x, low_y, high_x, high_y = layer.geometry[index[0]].bounds
    # A thousandth of a degree at 60 degrees north is 55.7 m wide and 111.4 m high.
    assert (high_x - low_x, high_y - low_y) == (pytest.approx(55.7, abs=6), pytest.approx(111.4, abs=6))
    assert 100 < low_x < 200
    assert 50 < low_y < 150, "y counts from the north"
    assert layer.time_s.shape == (len(layer.geometry), 2)


def test_what_is_saved_comes_back_with_its_licence(town, tmp_path):
    frame = osm.read(town)
    path = osm.save(frame, tmp_path / "town.parquet", source="town.osm")
    again = osm.read(path)
    assert again.tags.tolist() == frame.tags.tolist()
    assert again.id.tolist() == frame.id.tolist()
    assert again.geometry.geom_equals(frame.geometry).all()
    told = json.loads((tmp_path / "town.parquet.source.json").read_text())
    assert told["licence"] == "ODbL-1.0"
    assert "OpenStreetMap contributors" in told["attribution"]
    with pytest.raises(ValueError, match=r"must end in \.parquet"):
        osm.save(frame, tmp_path / "town.gpkg", source="x")


def table(path, rows, **more):
    frame = geopandas.GeoDataFrame(
        rows, geometry=[shapely.box(LON, LAT, LON + STEP, LAT + STEP)] * len(rows), crs="EPSG:4326"
    )
    frame.to_parquet(path, **more) if path.suffix == ".parquet" else frame.to_file(path)
    return path


@pytest.mark.parametrize(
    ("name", "row", "tags"),
    [
        ("a_building", {"id": "x", "subtype": "residential", "class": "house", "height": 3.0}, {"building": "house"}),
        ("building", {"id": "x", "subtype": None, "class": None}, {"building": "yes"}),
        ("b", {"id": "x", "type": "land_use", "subtype": "agriculture", "class": "farmland"}, {"landuse": "farmland"}),
        ("b", {"id": "x", "type": "segment", "subtype": "rail", "class": "tram"}, {"railway": "tram"}),
        ("b", {"id": "x", "type": "segment", "subtype": "road", "class": "primary"}, {"highway": "primary"}),
        ("b", {"id": "x", "type": "water", "subtype": "lake", "class": "lake"}, {"water": "lake", "natural": "water"}),
        ("b", {"id": "x", "type": "land", "subtype": "forest", "class": "forest"}, {"natural": "wood"}),
        ("b", {"id": "x", "type": "place", "categories": {"primary": "school", "alternate": None}, "names": {"primary": "Lycée"}}, {"amenity": "school", "name": "Lycée"}),
    ],
)  # fmt: skip
def test_overture_says_the_same_in_other_words(tmp_path, name, row, tags):
    frame = osm.read(table(tmp_path / f"{name}.parquet", [row]))
    assert frame.tags.tolist() == [tags]
    assert frame.id.tolist() == ["x"]


def test_overture_keeps_the_tags_of_its_source(tmp_path):
    path = table(tmp_path / "x.parquet", [{"id": "x", "class": "house"}])
    whole = pq.read_table(path)
    pairs = pa.array([[("building", "house"), ("roof:shape", "gabled")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(whole.append_column("source_tags", pairs).replace_schema_metadata(whole.schema.metadata), path)
    assert osm.read(path).tags.tolist() == [{"building": "house", "roof:shape": "gabled"}]


def test_tables_of_gdal_and_geofabrik(tmp_path):
    path = table(
        tmp_path / "a.gpkg",
        [{"osm_id": "7", "building": "barn", "other_tags": '"roof:material"=>"straw","note"=>"a ""b"""'}],
    )
    assert osm.read(path).tags.tolist()[0].items() >= {"building": "barn", "roof:material": "straw"}.items()
    rows = pd.DataFrame({"osm_id": ["1", "2"], "fclass": ["park", "forest"]}).to_dict("records")
    found = osm.read(table(tmp_path / "gis_osm_landuse_a.gpkg", rows))
    assert found.tags.tolist() == [{"leisure": "park"}, {"landuse": "forest"}]
    road = osm.read(table(tmp_path / "gis_osm_roads.gpkg", [{"osm_id": "1", "fclass": "residential"}]))
    assert road.tags.tolist() == [{"highway": "residential"}]


def test_tables_without_tags_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of the keys building.*columns are name_of_it, geometry"):
        osm.read(table(tmp_path / "x.gpkg", [{"name_of_it": "a"}]))
    with pytest.raises(ValueError, match="kind: neither the rows nor the name 'x' of the table say what it holds"):
        osm.read(table(tmp_path / "x.parquet", [{"id": "1", "class": "house"}]))
    assert osm.read(tmp_path / "x.parquet", kind="building").tags.tolist() == [{"building": "house"}]


def test_real_land_use():
    try:
        path = berlin.polygons()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    frame = osm.read(path)
    assert len(frame) > 500
    assert "forest" in {tags.get("landuse") for tags in frame.tags}
    assert {"natural": "water"}.items() <= next(tags for tags in frame.tags if "water" in tags.values()).items()


# Overpass

NOTHING = extract({})
SQUARE = (LON, LAT - 0.01, LON + 0.01, LAT)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(polite, "BACKOFF_S", 0.01)


def box_of(fields):
    return tuple(map(float, re.search(r"bbox:([-\d.,]+)", fields["data"])[1].split(",")))


def answering(fields):
    south, west, north, east = box_of(fields)
    here = south <= LAT <= north and west <= LON + 0.02 and east >= LON - 0.01  # what reaches into a tile comes with it
    return 200, {}, (TOWN if here else NOTHING).encode()


def test_overpass_is_asked_by_tiles_once(tmp_path, impatient):
    bounds = (LON - 0.06, LAT - 0.01, LON + 0.02, LAT + 0.01)
    with recorded(answering) as site:
        found = osm.overpass(bounds, tmp_path, contact="me@example.org", url=site.url, pause_s=0, quiet=True)
        asked = len(site.asked)
        again = osm.overpass(bounds, tmp_path, contact="me@example.org", url=site.url, pause_s=0, quiet=True)
        assert len(site.asked) == asked == len(osm.tiles(bounds))
        assert set(site.methods) == {"POST"}
    assert again.equals(found)
    assert found.id.is_unique
    assert {"way/100", "relation/200"} <= set(found.id)
    assert 'nwr["building"];' in site.asked[0]["data"]


def test_overpass_interrupted_goes_on(tmp_path, impatient):
    bounds = (LON - 0.06, LAT - 0.01, LON + 0.02, LAT + 0.01)
    options = {"contact": "me@example.org", "pause_s": 0, "quiet": True, "tries": 2}
    with recorded(answering) as site:
        site.first = [answering({"data": f"bbox:{0},{0},{1},{1}"}), *[(504, {}, b"busy")] * 2]
        with pytest.raises(ConnectionError, match=r"answers 504 \(busy\).*goes on from there"):
            osm.overpass(bounds, tmp_path, url=site.url, **options)
        before = len(site.asked)
        osm.overpass(bounds, tmp_path, url=site.url, **options)
        assert len(site.asked) - before == len(osm.tiles(bounds)) - 1


@pytest.mark.parametrize(
    "remark", ["runtime error: Query timed out in &quot;query&quot;", "runtime error: Query run out of memory"]
)
def test_what_is_too_much_is_asked_in_quarters(tmp_path, impatient, remark):
    wide = []

    def overwhelmed(fields):
        box = box_of(fields)
        wide.append(box[3] - box[1])
        if wide[-1] > 0.02:
            return 200, {}, NOTHING.replace("</osm>", f"<remark>{remark}</remark></osm>").encode()
        return answering(fields)

    options = {"contact": "me@example.org", "pause_s": 0, "quiet": True}
    with recorded(overwhelmed) as site:
        found = osm.overpass(SQUARE, tmp_path, url=site.url, **options)
        assert min(wide) == pytest.approx(osm.TILE_DEGREES / 4)
        asked = len(site.asked)
        assert osm.overpass(SQUARE, tmp_path, url=site.url, **options).equals(found)
        assert len(site.asked) == asked
    assert {"way/100", "relation/200"} <= set(found.id)


def test_a_remark_that_passes_is_asked_again(tmp_path, impatient):
    with recorded(answering) as site:
        site.first = [
            (200, {}, NOTHING.replace("</osm>", "<remark>Dispatcher_Client busy</remark></osm>").encode()),
            (200, {}, b"<html>"),
        ]
        osm.overpass(SQUARE, tmp_path, contact="me@example.org", url=site.url, pause_s=0, quiet=True)
        assert len(site.asked) == 2 + len(osm.tiles(SQUARE))


def test_tiles_cover_and_do_not_depend_on_the_area():
    some = osm.tiles((0.01, 0.01, 0.12, 0.06))
    assert len(some) == 6
    assert shapely.union_all([shapely.box(*t) for t in some]).contains(shapely.box(0.01, 0.01, 0.12, 0.06))
    assert set(osm.tiles((0.06, 0.01, 0.09, 0.04))) <= set(some)
    across = osm.tiles((179.96, 0.0, -179.96, 0.05))
    assert across == [(179.95, 0.0, 180.0, 0.05), (-180.0, 0.0, -179.95, 0.05)]
    with pytest.raises(ValueError, match="south below north"):
        osm.tiles((0, 2, 1, 1))
