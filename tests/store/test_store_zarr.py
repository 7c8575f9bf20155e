"""Stores in Zarr: what is written is read, in whatever order, by this and by other tools; and what fails leaves nothing broken."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pyproj
import pytest
import shapely
import xarray as xr
import zarr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from everysat.store import create, open_store
from everysat.store import zarr_store as module
from everysat.store.quantise import METHODS, fit

DIM = 6


def spot(height=70, width=90, crs="EPSG:32631", corner=(600_000, 5_400_000)) -> GeoBox:
    return GeoBox((height, width), Affine(10, 0, corner[0], 0, -10, corner[1]), crs)


def image(geobox: GeoBox, dim=DIM, seed=0) -> np.ndarray:
    """Unit vectors [dim, y, x], none in a rectangle and in a pixel, and a chunk of no data."""
    x = np.random.default_rng(seed).normal(size=(dim, *geobox.shape)).astype(np.float32)
    x /= np.linalg.norm(x, axis=0)
    x[:, 5:20, 30:50] = np.nan
    x[:, 40, 3] = np.nan
    x[:, 32:64, 64:] = np.nan
    return x


def filled(path, geobox=None, windows=None, values=None, **options):
    geobox = geobox or spot()
    values = image(geobox) if values is None else values
    writer = create(path, geobox, len(values), **{"chunk": 32, "shard": 64, **options})
    for rows, cols in windows or writer.windows():
        writer.write(rows, cols, values[:, rows, cols])
    return open_store(writer.finish())


def files(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def whole(store) -> np.ndarray:
    return store.read(slice(0, store.shape[0]), slice(0, store.shape[1]))


def quantiser(name: str):
    x = np.random.default_rng(5).normal(size=(200, DIM))
    return fit(name, x, **({"k": 4} if name in ("pca-int8/1", "prefix/1") else {}))


# --- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_is_read(tmp_path, name):
    rule, values = quantiser(name), image(spot())
    store = filled(tmp_path / "a.zarr", quantiser=rule, model={"name": "m", "weights": "abc"}, period=("2024", "2025"))
    flat = values.reshape(DIM, -1).T
    expected = rule.decode(*rule.encode(flat)).reshape(70, 90, -1)
    np.testing.assert_array_equal(whole(store), expected)
    assert type(store.quantiser) is type(rule)
    assert (store.kind, store.dim, store.shape, store.crs) == ("pixel", rule.out_dim, (70, 90), "EPSG:32631")
    assert store.model == {"name": "m", "weights": "abc"}
    assert store.period == ("2024", "2025")
    assert store.geobox == spot()
    codes, scale, valid = store.codes(slice(3, 45), slice(20, 77))
    assert codes.shape == (42, 57, rule.width)
    assert (scale is None) == (not rule.scaled)
    assert (valid == np.isfinite(values[0, 3:45, 20:77])).all()
    np.testing.assert_array_equal(store.read(slice(3, 45), slice(20, 77)), expected[3:45, 20:77])
    assert store.quality["sample"] == np.isfinite(values[0, 1::2, 1::2]).sum(), "every other pixel"
    assert 0 <= store.quality["recall_at_10"] <= 1
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_all_points_come_once(tmp_path):
    store, values = filled(tmp_path / "a.zarr", quantiser="float32/1"), image(spot())
    parts = list(store.points())
    assert all(len(part) <= 32 * 32 for part in parts)
    index = np.concatenate([part.index for part in parts])
    assert sorted(index) == np.flatnonzero(np.isfinite(values[0])).tolist()
    part = parts[3]
    row, col = np.divmod(part.index, 90)
    np.testing.assert_array_equal(part.vectors, values[:, row, col].T)
    np.testing.assert_allclose(part.x, 600_005 + 10 * col)
    np.testing.assert_allclose(part.y, 5_399_995 - 10 * row)


def test_places(tmp_path):
    store, values = filled(tmp_path / "a.zarr", quantiser="float32/1"), image(spot())
    to_degrees = pyproj.Transformer.from_crs("EPSG:32631", "EPSG:4326", always_xy=True).transform
    np.testing.assert_array_equal(
        store.at(to_degrees(600_000 + 10 * 12 + 1, 5_400_000 - 10 * 33 - 9)), values[:, 33, 12]
    )
    with pytest.raises(LookupError, match="outside"):
        store.at(to_degrees(599_999, 5_399_000))
    with pytest.raises(LookupError, match=r"no data at .* row 40, column 3"):
        store.at(to_degrees(600_035, 5_399_595))
    with pytest.raises(ValueError, match="degrees"):
        store.at((600_035, 5_399_595))


def test_within_takes_pixels_by_their_centres(tmp_path):
    store, values = filled(tmp_path / "a.zarr", quantiser="float32/1"), image(spot())
    triangle = shapely.Polygon([(600_100, 5_399_900), (600_620, 5_399_700), (600_111, 5_399_333)])
    found = store.within(triangle)
    y, x = np.meshgrid(5_399_995 - 10 * np.arange(70), 600_005 + 10 * np.arange(90), indexing="ij")
    inside = shapely.contains_xy(triangle, x, y) & np.isfinite(values[0])
    assert sorted(found.index) == np.flatnonzero(inside).tolist()
    assert store.within(shapely.box(600_101, 5_399_301, 600_104, 5_399_304)).index.tolist() == [69 * 90 + 10]
    assert store.within(shapely.Point(600_101, 5_399_301)).index.tolist() == [69 * 90 + 10]
    assert len(store.within(shapely.LineString([(600_101, 5_399_301), (600_131, 5_399_301)]))) == 4
    none = store.within(shapely.box(0, 0, 1, 1))
    assert none.vectors.shape == (0, DIM)
    with pytest.raises(ValueError, match="empty"):
        store.within(shapely.Polygon())


# --- order, windows, processes --------------------------------------------------------------------------------------


@given(order=st.permutations(range(9)), twice=st.sets(st.integers(0, 8), max_size=3))
@settings(max_examples=4, deadline=None)
def test_any_order_of_windows_makes_the_same_files(tmp_path_factory, order, twice):
    folder = tmp_path_factory.mktemp("order")
    writer = create(folder / "x.zarr", spot(), DIM, chunk=32, shard=64)
    windows = list(writer.windows())
    assert len(windows) == 9
    filled(folder / "a.zarr", windows=windows)
    filled(folder / "b.zarr", windows=[windows[i] for i in [*order, *twice]])
    assert files(folder / "a.zarr") == files(folder / "b.zarr")


@given(st.lists(st.integers(1, 69), max_size=3), st.lists(st.integers(1, 89), max_size=3))
@settings(max_examples=4, deadline=None)
def test_windows_may_cross_chunks(tmp_path_factory, y, x):
    folder = tmp_path_factory.mktemp("cross")
    y, x = [0, *sorted(set(y)), 70], [0, *sorted(set(x)), 90]
    cuts = [(slice(*r), slice(*c)) for r in itertools.pairwise(y) for c in itertools.pairwise(x)]
    filled(folder / "a.zarr")
    filled(folder / "b.zarr", windows=cuts[::-1])
    assert files(folder / "a.zarr") == files(folder / "b.zarr")


def _write(writer, windows):
    values = image(spot())
    for rows, cols in windows:
        writer.write(rows, cols, values[:, rows, cols])


def test_processes_write_chunks_of_their_own(tmp_path):
    filled(tmp_path / "a.zarr")
    writer = create(tmp_path / "b.zarr", spot(), DIM, chunk=32, shard=64)
    windows = list(writer.windows())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(pickle.loads(pickle.dumps(writer)), windows[i::2])) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    writer.finish()
    assert files(tmp_path / "a.zarr") == files(tmp_path / "b.zarr")


def test_what_is_never_written_is_no_data(tmp_path):
    for name in METHODS:
        store = filled(tmp_path / "a.zarr", windows=[(slice(16, 32), slice(0, 16))], quantiser=quantiser(name))
        seen = np.isfinite(whole(store)[..., 0])
        assert seen.sum() == 256
        assert seen[16:32, :16].all()
    empty = create(tmp_path / "e.zarr", spot(), DIM).finish()
    assert list(open_store(empty).points()) == []
    assert open_store(empty).quality["recall_at_10"] is None


# --- unfinished runs ------------------------------------------------------------------------------------------------


def test_nothing_appears_before_the_end_and_an_older_store_stays(tmp_path):
    old = files(filled(tmp_path / "a.zarr").path)
    values = image(spot(), seed=1)
    writer = create(tmp_path / "a.zarr", spot(), DIM, chunk=32, shard=64)
    writer.write(slice(0, 70), slice(0, 90), values)
    assert files(tmp_path / "a.zarr") == old
    writer.finish()
    assert files(tmp_path / "a.zarr") != old
    assert os.listdir(tmp_path) == ["a.zarr"]
    create(tmp_path / "a.zarr", spot(), DIM).abandon()
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_a_run_goes_on(tmp_path):
    filled(tmp_path / "whole.zarr")
    values, options = image(spot()), {"chunk": 32, "shard": 64}
    writer = create(tmp_path / "a.zarr", spot(), DIM, resume=True, **options)
    assert not writer.resumed
    windows = list(writer.windows())
    for rows, cols in windows[:4]:
        writer.write(rows, cols, values[:, rows, cols])
    with pytest.raises(ValueError, match="other settings"):
        create(tmp_path / "a.zarr", spot(), DIM, resume=True, quantiser="float32/1", **options)
    again = create(tmp_path / "a.zarr", spot(), DIM, resume=True, **options)
    assert again.resumed
    for rows, cols in windows[4:]:
        again.write(rows, cols, values[:, rows, cols])
    again.finish()
    assert files(tmp_path / "a.zarr") == files(tmp_path / "whole.zarr")
    writer = create(tmp_path / "a.zarr", spot(), DIM, resume=True, **options)
    assert not writer.resumed, "a finished store is no unfinished one"
    again = create(tmp_path / "a.zarr", spot(), DIM, **options)
    assert not again.resumed


@pytest.mark.parametrize("at", [1, 2, 7])
def test_finishing_may_be_interrupted(tmp_path, monkeypatch, at):
    filled(tmp_path / "whole.zarr")
    writer = create(tmp_path / "a.zarr", spot(), DIM, chunk=32, shard=64)
    for rows, cols in writer.windows():
        writer.write(rows, cols, image(spot())[:, rows, cols])
    real, count = module._write_shard, 0

    def full(*args):
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(module, "_write_shard", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.zarr: No space left on device; free space") as caught:
        writer.finish()
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "a.zarr").exists()
    create(tmp_path / "a.zarr", spot(), DIM, chunk=32, shard=64, resume=True).finish()
    assert files(tmp_path / "a.zarr") == files(tmp_path / "whole.zarr")


def test_a_shard_that_is_there_is_not_joined_again_from_what_is_left_of_its_chunks(tmp_path, monkeypatch):
    filled(tmp_path / "whole.zarr")
    writer = create(tmp_path / "a.zarr", spot(), DIM, chunk=32, shard=64)
    for rows, cols in writer.windows():
        writer.write(rows, cols, image(spot())[:, rows, cols])
    removed = []
    real = Path.unlink

    def killed(self, *args, **options):
        if "staged" in self.parts:
            removed.append(self)
            if len(removed) == 3:
                raise KeyboardInterrupt
        real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    writer.finish()
    assert files(tmp_path / "a.zarr") == files(tmp_path / "whole.zarr")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="choose a folder that you may write to"):
            create(tmp_path / "a.zarr", spot(), DIM)
    finally:
        tmp_path.chmod(0o700)


def test_errors_of_the_disk_name_path_and_next_step(tmp_path, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module.zarr, "open_group", refused)
    with pytest.raises(PermissionError, match=r"cannot write .*a\.zarr: Permission denied; choose a folder"):
        create(tmp_path / "a.zarr", spot(), DIM)


def test_only_stores_are_replaced(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no store of embeddings"):
        create(tmp_path / "a.zarr", spot(), DIM)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="no store of embeddings"):
        create(tmp_path / "file", spot(), DIM)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(FileExistsError, match="no store of embeddings"):
        create(tmp_path / "other.zarr", spot(), DIM)
    assert sorted(os.listdir(tmp_path)) == ["a.zarr", "file", "other.zarr"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 100, "shard": 250}, "whole number of chunks"),
        ({"chunk": 0}, "whole number of chunks"),
        ({"quantiser": fit("prefix/1", np.zeros((1, 9)), k=3)}, "vectors of 9 numbers, dim=6"),
        ({"geobox": GeoBox((4, 4), Affine(10, 0, 0, 0, 10, 0), "EPSG:32631")}, "north up"),
        ({"geobox": GeoBox((4, 4), Affine(10, 3, 0, 3, -10, 0), "EPSG:32631")}, "rotated"),
        ({"geobox": GeoBox((4, 4), Affine(10, 0, 0, 0, -10, 0), None)}, "no CRS"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, options, words):
    geobox = options.pop("geobox", spot())
    with pytest.raises(ValueError, match=words):
        create(tmp_path / "a.zarr", geobox, DIM, **options)
    assert os.listdir(tmp_path) == []


def test_windows_that_do_not_fit(tmp_path):
    writer = create(tmp_path / "a.zarr", spot(), DIM)
    for shape, rows in [((DIM, 5, 90), slice(0, 6)), ((DIM + 1, 6, 90), slice(0, 6)), ((DIM, 6, 90), slice(66, 72))]:
        with pytest.raises(ValueError, match="the window is"):
            writer.write(rows, slice(0, 90), np.zeros(shape))
    with pytest.raises(ValueError, match="infinite"):
        writer.write(slice(0, 1), slice(0, 1), np.full((DIM, 1, 1), np.inf))
    store = filled(tmp_path / "b.zarr")
    for rows in (slice(0, 71), slice(5, 5), slice(-3, 4), slice(0, 9, 2)):
        with pytest.raises(ValueError, match="no window of 70 rows"):
            store.read(rows, slice(0, 90))
    with pytest.raises(FileNotFoundError, match="make it first"):
        create(tmp_path / "no" / "a.zarr", spot(), DIM)


# --- conventions and other tools ------------------------------------------------------------------------------------


def test_xarray_reads_it_without_this_package(tmp_path):
    values = image(spot())
    store = filled(tmp_path / "a.zarr", period=("2024-01-01", "2025-01-01"))
    with xr.open_zarr(store.path, group="utm31") as dataset:
        assert dataset["embeddings"].dims == ("embedding", "y", "x")
        decoded = (dataset["embeddings"] * dataset["scale"]).to_numpy()
        np.testing.assert_allclose(dataset["x"], 600_005 + 10 * np.arange(90))
        np.testing.assert_allclose(dataset["y"], 5_399_995 - 10 * np.arange(70))
        assert pyproj.CRS.from_cf(dataset["spatial_ref"].attrs).to_epsg() == 32631
        assert dataset["embeddings"].attrs["grid_mapping"] == "spatial_ref"
        assert dataset["embeddings"].encoding["shards"] == (DIM, 64, 64)
    assert (np.isnan(decoded) == np.isnan(values)).all()
    assert np.nanmax(np.abs(decoded - values)) < 1 / 254


def test_shards_hold_what_a_plain_array_would(tmp_path):
    """The zarr library reads the shards that are joined here, chunk by chunk and checksum included."""
    filled(tmp_path / "a.zarr", quantiser="float32/1", chunk=16, shard=32)
    array = zarr.open_group(tmp_path / "a.zarr")["utm31"]["embeddings"]
    np.testing.assert_array_equal(array[:], image(spot()))
    assert [codec.__class__.__name__ for codec in array.metadata.codecs] == ["ShardingCodec"]
    assert array.chunks == (DIM, 16, 16)
    shard = tmp_path / "a.zarr" / "utm31" / "embeddings" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="checksum"):
        array[:]
    # The chunk of no data takes no space, nor does its shard of the next two.
    assert not (shard.parent.parent / "1" / "2").exists()


def test_attributes_follow_the_conventions(tmp_path):
    filled(tmp_path / "a.zarr", model={"name": "any sat", "weights": "ab12"}, source=["https://a.org/s2", "scene 1"])
    root = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    attrs = root["attributes"]
    assert root["zarr_format"] == 3
    assert attrs["zarr_conventions"][0]["uuid"] == "61c12cc5-0e28-4056-999a-480cf3fb7e4c"
    assert attrs["geoemb:type"] == "pixel"
    assert attrs["geoemb:dimensions"] == DIM
    assert attrs["geoemb:model"] == "urn:everysat:model:any%20sat@ab12"
    assert attrs["geoemb:source_data"] == ["https://a.org/s2", "urn:everysat:source:scene%201"]
    assert attrs["geoemb:data_type"] == "int8"
    assert attrs["geoemb:gsd"] == 10
    assert attrs["geoemb:spatial_layout"] == "utm_zones"
    assert attrs["geoemb:quantization"] == {
        "method": "per_pixel_scale",
        "original_dtype": "float32",
        "quantized_dtype": "int8",
        "scale": {"type": "array", "array_name": "scale", "nodata": "NaN"},
    }
    group = json.loads((tmp_path / "a.zarr" / "utm31" / "zarr.json").read_text())["attributes"]
    assert {c["name"] for c in group["zarr_conventions"]} == {"geoemb:", "proj:", "spatial:"}
    assert group["proj:code"] == "EPSG:32631"
    assert group["spatial:dimensions"] == ["y", "x"]
    assert group["spatial:transform"] == [10, 0, 600_000, 0, -10, 5_400_000]
    assert group["spatial:shape"] == [70, 90]
    assert group["spatial:bbox"] == [600_000, 5_399_300, 600_900, 5_400_000]
    assert not any(key.startswith(("proj:", "spatial:")) for key in attrs), "they belong to the zone"
    assert set(root["consolidated_metadata"]["metadata"]) >= {"utm31/embeddings", "utm31/scale", "utm31/x"}


def test_a_store_of_several_zones(tmp_path):
    path = tmp_path / "a.zarr"
    first = filled(path)
    south = spot(20, 30, "EPSG:32731", (400_000, 9_000_000))
    for geobox in (spot(20, 30, "EPSG:32632"), south):
        filled_writer = create(path, geobox, DIM, chunk=32, shard=64, add=True)
        filled_writer.write(slice(0, 20), slice(0, 30), np.ones((DIM, 20, 30)))
        filled_writer.finish()
    with pytest.raises(ValueError, match=r"3 grids: utm31, utm31n?s?, utm32; open one, as .*utm31"):
        open_store(path)
    assert open_store(path / "utm32").crs == "EPSG:32632"
    assert open_store(path / "utm31s").geobox == south
    np.testing.assert_array_equal(whole(open_store(path / "utm31")), whole(first))
    assert os.listdir(tmp_path) == ["a.zarr"]
    other = create(path, spot(20, 30, "EPSG:32633"), DIM, quantiser="float32/1", add=True)
    with pytest.raises(ValueError, match="geoemb:data_type int8, the new zone float32"):
        other.finish()
    with pytest.raises(FileNotFoundError, match="no store"):
        create(tmp_path / "b.zarr", spot(), DIM, add=True)


def test_other_crs_and_degrees(tmp_path):
    for code, name, layout in (("EPSG:3035", "epsg3035", None), ("EPSG:4326", "epsg4326", "global")):
        step = 10 if code == "EPSG:3035" else 0.001
        geobox = GeoBox((20, 30), Affine(step, 0, 10, 0, -step, 50), code)
        store = filled(tmp_path / "a.zarr", geobox, values=np.ones((3, 20, 30), np.float32))
        assert store.geobox == geobox
        assert store.attrs.get("geoemb:spatial_layout") == layout
        assert (tmp_path / "a.zarr" / name).is_dir()


def test_unknown_quantisers_are_refused(tmp_path):
    store = filled(tmp_path / "a.zarr")
    for file in (store.path / "zarr.json", store.path / "utm31" / "zarr.json"):
        file.write_text(file.read_text().replace("int8-linear/1", "int8-linear/2"))
    with pytest.raises(LookupError, match=r"a\.zarr cannot be read: .*'int8-linear/2'.*Known: binary/1"):
        open_store(store.path)
    np.testing.assert_array_equal(whole(open_store(store.path, quantiser="int8-linear/1")), whole(store))


def foreign(path, order=("time", "y", "x", "band"), quantization=None, **attrs):
    """A store as another writer might make it: axes in another order, factors under another name, +inf for no data."""
    codes = np.arange(4 * 5 * 3, dtype=np.int8).reshape(4, 5, 3)
    axes = [{"y": 0, "x": 1, "band": 2}[axis] for axis in order if axis != "time"]
    shaped = codes.transpose(axes)[None] if "time" in order else codes.transpose(axes)
    group = zarr.create_group(path, zarr_format=3)
    group.create_array("embeddings", data=shaped, dimension_names=order, chunks=shaped.shape)
    scale = np.full((4, 5), 0.5, np.float32)
    scale[1, 2] = np.inf
    names = [axis for axis in order if axis != "band"]
    group.create_array("scales", data=scale[None] if "time" in names else scale, dimension_names=names)
    group.attrs.put(
        {
            "geoemb:type": "pixel",
            "geoemb:dimensions": 3,
            "proj:code": "EPSG:32631",
            "spatial:transform": [10, 0, 0, 0, -10, 40],
            "geoemb:quantization": {
                "method": "per_pixel_scale",
                "original_dtype": "float32",
                "scale": {"type": "array", "array_name": "scales", "nodata": "+inf"},
            },
            **attrs,
        }
    )
    return codes


@pytest.mark.parametrize("order", [("time", "y", "x", "band"), ("band", "y", "x"), ("y", "x", "band")])
def test_stores_of_other_writers(tmp_path, order):
    codes = foreign(tmp_path / "t.zarr", order)
    store = open_store(tmp_path / "t.zarr")
    expected = codes * 0.5
    expected[1, 2] = np.nan
    np.testing.assert_array_equal(whole(store), expected)
    assert store.quality == {}
    assert store.at(pyproj.Transformer.from_crs(32631, 4326, always_xy=True).transform(5, 5))[0] == expected[3, 0, 0]


@pytest.mark.parametrize(
    ("attrs", "error", "words"),
    [
        (
            {"geoemb:quantization": {"method": "linear", "original_dtype": "float32"}},
            LookupError,
            "method 'linear', for which",
        ),
        ({"proj:code": None}, ValueError, "no proj:code"),
        ({"spatial:transform": [10, 0, 0, 0, 10, 0]}, ValueError, "south up"),
    ],
)
def test_stores_of_other_writers_that_are_not_understood(tmp_path, attrs, error, words):
    foreign(tmp_path / "t.zarr", **attrs)
    with pytest.raises(error, match=words):
        open_store(tmp_path / "t.zarr")


def test_what_is_no_store(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.npy").write_text("")
    zarr.create_group(tmp_path / "g.zarr")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_store(tmp_path / "none.zarr")
    for name, words in (("empty", "no Zarr group"), ("x.npy", r"got \.npy"), ("g.zarr", "no array 'embeddings'")):
        with pytest.raises(ValueError, match=words):
            open_store(tmp_path / name)


def test_sample_is_spread_over_a_large_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", 100)
    store = filled(tmp_path / "a.zarr", quantiser="int8-square/1")
    step = math.ceil(math.sqrt(6300 / 100))
    expected = np.isfinite(image(spot())[0, step // 2 :: step, step // 2 :: step]).sum()
    assert store.quality["sample"] == expected
