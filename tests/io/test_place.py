"""Places: extent, grid, size on the ground."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from pyproj import Transformer

import everysat as es
from everysat.io import grid
from everysat.io.place import place
from everysat.types import Place


@pytest.mark.parametrize(
    ("lon", "lat", "epsg"),
    [(13.1, 52.3, 32633), (-122.4, 37.7, 32610), (28.0, -26.2, 32735), (5.5, 60.4, 32632), (15.6, 78.2, 32633)],
)
def test_point_makes_a_square_of_its_size_in_the_local_zone(lon, lat, epsg):
    made = place((lon, lat), size_m=1280)
    assert (made.height_m, made.width_m) == (1280, 1280)
    assert made.geobox.crs.to_epsg() == epsg
    assert made.geobox.shape == (128, 128)
    assert abs(made.lonlat[0] - lon) * 111_000 * np.cos(np.radians(lat)) < 45
    assert abs(made.lonlat[1] - lat) * 111_000 < 45


def test_point_beyond_the_utm_zones_lies_on_a_polar_grid():
    assert place((20.0, 86.0), size_m=600).geobox.crs.to_epsg() == 32661
    assert place((20.0, -88.0), size_m=600).geobox.crs.to_epsg() == 32761


@pytest.mark.parametrize("gsd", [10, 20, 60])
def test_edges_lie_on_multiples_of_60_m_so_that_native_pixels_fit(gsd):
    box = place((13.0, 52.3, 13.11, 52.37), gsd_m=gsd).geobox
    assert box.affine.c % 60 == 0
    assert box.affine.f % 60 == 0
    assert (box.shape[0] * gsd) % 60 == 0


def test_extent_grows_outward():
    bounds = (13.001, 52.301, 13.107, 52.366)
    made = place(bounds, gsd_m=7)
    lon, lat = np.meshgrid(np.linspace(*bounds[0::2], 9), np.linspace(*bounds[1::2], 9))
    x, y = Transformer.from_crs(4326, made.geobox.crs.to_epsg(), always_xy=True).transform(lon, lat)
    cols, rows = grid.positions(~made.geobox.affine, x, y)
    assert min(cols.min(), rows.min()) >= 0
    assert max(cols.min(), rows.min()) < 1
    assert cols.max() <= made.geobox.shape[1]
    assert rows.max() <= made.geobox.shape[0]


def test_box_over_the_antimeridian_is_small():
    made = place((179.9, -17.0, -179.9, -16.9), gsd_m=100)
    assert made.width_m < 30_000


def test_files_and_frames_agree(tmp_path):
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(13.0, 52.3, 13.1, 52.35)], crs="EPSG:4326")
    frame.to_file(tmp_path / "farm.geojson")
    frame.to_crs("EPSG:32633").to_file(tmp_path / "farm.gpkg")
    frame.to_parquet(tmp_path / "farm.parquet")
    wanted = place(frame, gsd_m=20)
    assert place(tmp_path / "farm.geojson", gsd_m=20) == wanted
    assert place(str(tmp_path / "farm.parquet"), gsd_m=20) == wanted
    assert place(tmp_path / "farm.gpkg", gsd_m=20) == wanted
    assert place((13.0, 52.3, 13.1, 52.35), gsd_m=20).geobox.crs == wanted.geobox.crs


def test_raster_and_geobox_keep_their_grid(make, numbers):
    made = place(make("a.tif", numbers(12, 18), gsd=20))
    assert made.geobox.shape == (12, 18)
    assert (made.height_m, made.width_m) == (240, 360)
    assert place(made.geobox) == made
    assert place(made) == made
    finer = place(made, gsd_m=10)
    assert finer.geobox.shape == (24, 36)
    assert finer.geobox.extent == made.geobox.extent


def test_bounding_box_with_crs():
    made = place(BoundingBox(600_000, 5_390_000, 606_000, 5_400_000, "EPSG:32632"), gsd_m=10)
    assert made.geobox.crs.to_epsg() == 32632
    assert (made.height_m, made.width_m) == (10_020, 6000)  # 5 390 000 is no multiple of 60


def test_is_a_public_name():
    assert es.place is place


def test_web_mercator_pixels_are_measured_on_the_ground():
    box = GeoBox((10, 10), Affine(10, 0, 1_460_000, 0, -10, 6_890_000), "EPSG:3857")
    assert 5.9 < grid.gsd_m(box) < 6.2  # cos(52.5 degrees) * 10 m


def test_grid_in_degrees_becomes_square_pixels():
    box = GeoBox((100, 100), Affine(1e-4, 0, 13.0, 0, -1e-4, 52.5), "EPSG:4326")
    made = place(box, gsd_m=10)
    assert made.geobox.crs.to_epsg() == 32633
    assert grid.is_square(made.geobox)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ((13.1, 52.3), {}, "size_m"),
        ((330_000, 5_800_000, 340_000, 5_810_000), {}, "degrees"),
        ((13.0, 52.4, 13.1, 52.3), {}, "south must be below"),
        ((1, 2, 3), {}, "no place"),
        (object(), {}, "no place"),
        ((13.0, 52.3, 13.1, 52.4), {"gsd_m": -1}, "gsd_m"),
        ((13.0, 52.3, 13.1, 52.4), {"crs": "EPSG:4326"}, "degrees"),
        (Place(100, 100), {}, "without geobox"),
        (GeoBox((4, 4), Affine(10, 0, 0, 0, -10, 0), None), {}, "no CRS"),
        (geopandas.GeoDataFrame(geometry=[], crs="EPSG:4326"), {}, "no geometries"),
        (geopandas.GeoDataFrame(geometry=[shapely.Point(1, 2)]), {}, "no CRS"),
    ],
)
def test_errors_say_what_is_wrong(source, options, words):
    with pytest.raises(ValueError, match=words):
        place(source, **options)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.geojson"):
        place(tmp_path / "nowhere.geojson")


FARM = {"type": "Polygon", "coordinates": [[[13.0, 52.3], [13.02, 52.3], [13.02, 52.31], [13.0, 52.31], [13.0, 52.3]]]}


@pytest.mark.parametrize(
    "source",
    [
        FARM,
        {"type": "Feature", "geometry": FARM, "properties": {}},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": FARM, "properties": None}]},
    ],
)
def test_geojson_objects_are_places(source, tmp_path):
    frame = geopandas.GeoDataFrame(geometry=[shapely.geometry.shape(FARM)], crs="EPSG:4326")
    assert place(source).geobox == place(frame).geobox
    for name in ("farm.geojson", "farm.gpkg", "farm.fgb"):
        frame.to_file(tmp_path / name)
        assert place(tmp_path / name).geobox == place(frame).geobox


def test_a_mapping_that_is_no_geojson_is_an_error():
    for source in ({"type": "Circle"}, {"features": 3}, {}):
        with pytest.raises(ValueError, match="no GeoJSON"):
            place(source)


def test_geojson_across_the_antimeridian_takes_the_short_way():
    """RFC 7946 cuts at 180 degrees: an island of two parts is one small place."""
    east, west = ([[[x, -17], [x + 0.01, -17], [x + 0.01, -16.99], [x, -16.99], [x, -17]]] for x in (179.99, -180.0))
    island = place({"type": "MultiPolygon", "coordinates": [east, west]})
    assert island.width_m < 2500
    assert abs(abs(island.lonlat[0]) - 180) < 0.01
