"""Polygons on grids: which pixels, which class, which polygon."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from everysat.io import grid
from everysat.io.read import open_scene
from everysat.io.vector import load_frame, polygons, rasterize
from everysat.types import ALWAYS, Place

X, Y = 600_000, 5_400_000


def spot(size=10) -> Place:
    return grid.place_of(GeoBox((size, size), Affine(10, 0, X, 0, -10, Y), "EPSG:32632"))


def box(west, north, east, south):
    """A rectangle in metres east and south of the corner."""
    return shapely.box(X + west, Y - south, X + east, Y - north)


def frame(*rows, crs="EPSG:32632"):
    return geopandas.GeoDataFrame(
        {"kind": [kind for kind, _ in rows]}, geometry=[shape for _, shape in rows], crs="EPSG:32632"
    ).to_crs(crs)


POND_IN_MEADOW = frame(("pond", box(20, 20, 40, 40)), ("meadow", box(0, 0, 60, 60)), ("town", box(70, 70, 100, 100)))


def test_pixels_of_a_polygon_carry_its_class_and_position():
    raster, ids = rasterize(POND_IN_MEADOW, spot(), "kind")
    expected = np.full((10, 10), -1)
    expected[0:6, 0:6], expected[2:4, 2:4], expected[7:, 7:] = 1, 0, 2
    assert ids.tolist() == expected.tolist()
    assert raster.sensor.kind == "classes"
    assert dict(raster.sensor.bands[0].classes) == {0: "meadow", 1: "pond", 2: "town"}
    code = {0: 1.0, 1: 0.0, 2: 2.0}
    assert torch.equal(raster.valid[0, 0], ids >= 0)
    assert [code[i] for i in ids[ids >= 0].tolist()] == raster.values[0, 0][ids >= 0].tolist()
    assert raster.time_s.tolist() == [list(ALWAYS)]


@pytest.mark.parametrize(("overlap", "winner"), [("smallest", 0), ("first", 0), ("last", 1), ("drop", -1)])
def test_overlap_policies(overlap, winner):
    ids = rasterize(POND_IN_MEADOW, spot(), "kind", overlap=overlap).ids
    assert ids[3, 3] == winner
    assert ids[0, 0] == 1
    assert ids[9, 9] == 2


def test_overlap_as_an_error():
    with pytest.raises(ValueError, match=r"polygons \d and \d .* overlap, 4 pixels"):
        rasterize(POND_IN_MEADOW, spot(), "kind", overlap="error")
    rasterize(POND_IN_MEADOW.iloc[1:], spot(), "kind", overlap="error")


def test_overlap_within_a_class_is_no_conflict():
    raster, _ = rasterize(frame(("a", box(0, 0, 50, 50)), ("a", box(30, 30, 80, 80))), spot(), "kind", overlap="drop")
    assert raster.valid.sum() == 25 + 25 - 4


def test_three_polygons_two_classes_in_one_pixel_are_dropped():
    shapes = frame(("a", box(0, 0, 30, 30)), ("b", box(0, 0, 30, 30)), ("a", box(0, 0, 30, 30)))
    assert not rasterize(shapes, spot(), "kind", overlap="drop").raster.valid.any()


def test_all_touched():
    sliver = frame(("a", box(12, 12, 48, 14)))
    assert not rasterize(sliver, spot(), "kind").raster.valid.any()
    assert rasterize(sliver, spot(), "kind", all_touched=True).raster.valid[0, 0].nonzero().tolist() == [
        [1, x] for x in (1, 2, 3, 4)
    ]


def test_codes_by_argument():
    given = rasterize(POND_IN_MEADOW, spot(), "kind", {"town": 5, "pond": 2}, gsd_m=20)
    assert given.raster.gsd_m == 20
    assert given.raster.values.shape == (1, 1, 5, 5)
    assert set(given.raster.values[given.raster.valid].tolist()) == {2.0, 5.0}
    listed = rasterize(POND_IN_MEADOW, spot(), "kind", ["pond", "meadow", "lake"])
    assert dict(listed.raster.sensor.bands[0].classes) == {0: "pond", 1: "meadow", 2: "lake"}
    assert not listed.raster.valid[0, 0, 9, 9]


def test_files_other_crs_and_outside(tmp_path):
    shapes = frame(
        ("x", box(900, 900, 950, 950)),
        *zip(POND_IN_MEADOW["kind"], POND_IN_MEADOW.geometry, strict=True),
        crs="EPSG:4326",
    )
    expected = rasterize(shapes, spot(), "kind", ["pond", "meadow", "town"])
    assert expected.ids.unique().tolist() == [-1, 1, 2, 3]
    for name in ("p.gpkg", "p.geojson", "p.parquet"):
        shapes.to_parquet(tmp_path / name) if name.endswith("parquet") else shapes.to_file(tmp_path / name)
        found = rasterize(tmp_path / name, spot(), "kind", ["pond", "meadow", "town"])
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.raster.values, expected.raster.values)


def test_place_without_polygons_has_no_labels():
    far = grid.place_of(GeoBox((4, 4), Affine(10, 0, X + 5000, 0, -10, Y), "EPSG:32632"))
    raster, ids = rasterize(POND_IN_MEADOW, far, "kind")
    assert not raster.valid.any()
    assert (ids == -1).all()
    assert len(polygons(POND_IN_MEADOW, far).geometry) == 0


def test_polygons_in_metres_from_the_corner():
    layer = polygons(POND_IN_MEADOW.to_crs("EPSG:4326"), spot(), time="2020")
    assert layer.geometry[0].bounds == pytest.approx((20, 20, 40, 40), abs=1e-3)
    assert layer.attributes[2] == {"kind": "town"}
    assert layer.time_s.shape == (3, 2)
    assert layer.row.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("column", "options", "words"),
    [
        ("knd", {}, "kind"),
        ("kind", {"classes": ["forest"]}, "none of forest"),
        ("kind", {"classes": {"pond": -1}}, "negative"),
        ("kind", {"overlap": "biggest"}, "smallest"),
    ],
)
def test_errors(column, options, words):
    with pytest.raises(ValueError, match=words):
        rasterize(POND_IN_MEADOW, spot(), column, **options)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"p\.gpkg"):
        load_frame(tmp_path / "p.gpkg")
    for name in ("p.gpkg", "p.geojson", "p.parquet"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(OSError, match=name):
            load_frame(tmp_path / name)


def test_what_has_no_georeference():
    with pytest.raises(ValueError, match="no CRS"):
        rasterize(POND_IN_MEADOW.set_crs(None, allow_override=True), spot(), "kind")
    with pytest.raises(ValueError, match="no geobox"):
        polygons(POND_IN_MEADOW, Place(100, 100))


def test_real_land_use(real_scene):
    folder = real_scene / "s2l1c"
    place = open_scene(folder / "IMG_DATA" / "T33UUU_20170216T102101_B02.jp2").place
    raster, ids = rasterize(next(folder.glob("gis_osm*.gpkg")), place, "fclass")
    assert len(raster.sensor.bands[0].classes) == 8
    assert 0.30 < raster.valid.float().mean() < 0.32
    assert 500 < len(ids.unique()) <= 605
