"""Tiles are windows of the files, parts do not share ground or polygons, and labels lie where the polygons do."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from shapely.geometry import box

from everysat.data.scene import build
from everysat.data.split import leaks
from everysat.io.read import read
from everysat.sensors import Band, Sensor

SIZE_M, WEST, NORTH = 960, 500000, 5000000
FINE = Sensor("fine", "optical", (Band("f1", 10, "DN"), Band("f2", 10, "DN")), "synthetic")
COARSE = Sensor("coarse", "optical", (Band("c1", 20, "DN"),), "synthetic")
SENSORS = {"*fine*": FINE, "*coarse*": COARSE}


def write(path, bands, gsd_m):
    size = SIZE_M // gsd_m
    values = np.random.default_rng(bands).integers(1, 1000, (bands, size, size)).astype("uint16")
    if bands == 2:
        values[:, :12, :12] = 0  # no data in the north-west corner
    profile = {"driver": "GTiff", "count": bands, "height": size, "width": size, "dtype": "uint16", "nodata": 0}
    with rasterio.open(
        path, "w", crs="EPSG:32632", transform=from_origin(WEST, NORTH, gsd_m, gsd_m), **profile
    ) as file:
        file.write(values)


def square(east, south, size, kind):
    return {"kind": kind, "geometry": box(WEST + east, NORTH - south - size, WEST + east + size, NORTH - south)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene")
    write(path / "fine.tif", 2, 10)
    write(path / "coarse.tif", 1, 20)
    rng = np.random.default_rng(0)
    squares = [square(*rng.integers(0, 86, 2) * 10, 60, "abc"[i % 3]) for i in range(40)]
    geopandas.GeoDataFrame(squares, crs="EPSG:32632").to_file(path / "labels.gpkg")
    return path


def tiles(folder, **options):
    reading = {"sensor": SENSORS, "order": None, "stored": "physical"} | options.pop("reading", {})
    return build(files=str(folder), tile_m=options.pop("tile_m", 120), **reading, **options)


def labelled(folder, **options):
    return tiles(folder, labels=folder / "labels.gpkg", column="kind", **options)


def same(a, b):
    return all(
        torch.equal(a.raster(n).values * a.raster(n).valid, b.raster(n).values * b.raster(n).valid)
        and torch.equal(a.raster(n).valid, b.raster(n).valid)
        for n in a.layers
    )


def test_tiles_from_memory_and_from_files_are_windows_of_the_scene(folder):
    held, lazy = tiles(folder), tiles(folder, memory=False)
    assert held.whole is not None
    assert lazy.whole is None
    assert len(held) == len(lazy) == 64
    whole = read([str(folder / "fine.tif"), str(folder / "coarse.tif")], sensor=SENSORS, stored="physical")
    for index in (0, 9, 63):
        assert same(held[index], lazy[index])
        assert held[index].places == lazy[index].places
        row, column = divmod(index, 8)
        name = next(n for n in whole.layers if n.startswith("fine"))
        part = whole.raster(name).values[..., 12 * row : 12 * row + 12, 12 * column : 12 * column + 12]
        assert torch.equal(held[index].raster(name).values, part)
        assert held[index].places[0].geobox.boundingbox.left == WEST + 120 * column
    with pytest.raises(IndexError):
        held[64]


def test_strides_and_valid_shares(folder):
    assert len(tiles(folder, stride_m=60)) == 15 * 15
    assert len(tiles(folder, min_valid=0.5)) == 63  # the corner has no data in two of three bands' pixels


def test_labels_lie_where_the_polygons_do(folder):
    data = labelled(folder, classes=["a", "b", "c"])
    frame = geopandas.read_file(folder / "labels.gpkg")
    checked = 0
    for batch in (data[i] for i in range(len(data))):
        label, bounds = batch.raster("label"), batch.places[0].geobox.boundingbox
        assert label.valid.any()
        for y, x in torch.nonzero(label.valid[0, 0])[::37].tolist():
            point = geopandas.points_from_xy([bounds.left + 10 * x + 5], [bounds.top - 10 * y - 5])[0]
            kinds = set(frame[frame.contains(point)].kind)
            assert "abc"[int(label.values[0, 0, y, x])] in kinds
            checked += 1
    assert checked > 20


def test_parts_share_neither_ground_nor_polygons(folder):
    parts = {n: labelled(folder, part=n, block_m=240, seed=1) for n in ("train", "val", "test")}
    shapes = [shape for data in parts.values() for shape in data.footprints()]
    ends = np.cumsum([len(data) for data in parts.values()])
    assert leaks(shapes, {n: np.arange(e - len(d), e) for (n, d), e in zip(parts.items(), ends, strict=True)}) == []
    valid = [data.labels.valid for data in parts.values()]
    assert not (valid[0] & valid[1]).any()
    assert not (valid[0] & valid[2]).any()
    everything = labelled(folder).labels.valid
    assert (valid[0] | valid[1] | valid[2]).sum() == everything.sum()
    again = labelled(folder, part="train", block_m=240, seed=1)
    assert np.array_equal(again.corners, parts["train"].corners)


def test_a_fraction_of_the_polygons_keeps_every_class(folder):
    few, all_of_them = labelled(folder, fraction=0.1), labelled(folder)
    assert 0 < few.labels.valid.sum() < 0.35 * all_of_them.labels.valid.sum()
    assert set(few.labels.values[few.labels.valid].tolist()) == {0.0, 1.0, 2.0}
    assert not torch.equal(labelled(folder, fraction=0.1, seed=5).labels.valid, few.labels.valid)
    assert all(few[i].raster("label").valid.any() for i in range(len(few)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_m": 50}, "tile_m=50 must be a multiple of 20 m"),
        ({"tile_m": 2000}, "no tile of 2000 m is left"),
        ({"part": "train", "block_m": 240, "stride_m": 60}, "would overlap"),
        ({"part": "train"}, "block_m is missing"),
        ({"part": "trian", "block_m": 240}, "Did you mean train"),
        ({"labels": "x.gpkg"}, "column is missing"),
    ],
)
def test_what_cannot_be_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        tiles(folder, **options)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no raster"):
        build(files=tmp_path, tile_m=100)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        build(files=[str(tmp_path / "*.tif")], tile_m=100)
