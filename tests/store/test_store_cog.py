"""GeoTIFFs of embeddings: valid COGs whose bands, no data and overviews other tools understand, and south-up files of others."""

from __future__ import annotations

import os

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from everysat.store import cog, create, open_store, warp, write_cog
from everysat.store.quantise import get

DIM, HEIGHT, WIDTH = 5, 130, 201


def spot(height=HEIGHT, width=WIDTH) -> GeoBox:
    return GeoBox((height, width), Affine(10, 0, 600_000, 0, -10, 5_400_000), "EPSG:32631")


def image(height=HEIGHT, width=WIDTH, dim=DIM) -> np.ndarray:
    """Unit vectors [dim, y, x] that change slowly, with a hole and an edge without data."""
    y, x = np.mgrid[:height, :width] / 15
    values = np.stack([np.sin(y * (1 + k / 3) + k) + np.cos(x * (1 + k / 5) - k) for k in range(dim)]).astype(
        np.float32
    )
    values /= np.linalg.norm(values, axis=0)
    values[:, 20:33, 50:71] = np.nan
    values[:, :, -3:] = np.nan
    return values


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """``stored("int8-linear/1")`` -> a pixel store; overviews are made down to 64 pixels."""
    monkeypatch.setattr(cog, "_SMALLEST", 64)

    def make(quantiser: str, values=None, **options):
        values = image() if values is None else values
        writer = create(
            tmp_path / "a.zarr",
            spot(*values.shape[1:]),
            len(values),
            quantiser=quantiser,
            chunk=64,
            shard=64,
            **options,
        )
        for rows, cols in writer.windows():
            writer.write(rows, cols, values[:, rows, cols])
        return open_store(writer.finish())

    return make


def whole(store) -> np.ndarray:
    return store.read(slice(0, store.shape[0]), slice(0, store.shape[1]))


@pytest.mark.parametrize("name", ["float32/1", "int8-square/1"])
def test_the_very_codes_go_into_a_valid_cog(stored, tmp_path, name):
    store = stored(
        name, model={"name": "m", "url": "https://a.org/m"}, period=("2024", "2025"), source=["https://a.org"]
    )
    path = write_cog(store, tmp_path / "a.tif")
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as file:
        assert file.count == DIM
        assert file.crs.to_epsg() == 32631
        assert file.transform == spot().affine
        assert file.dtypes[0] == store.quantiser.dtype
        assert file.descriptions[:2] == ("A00", "A01")
        assert file.overviews(1) == [2, 4]
        assert file.profile["compress"].lower() == "zstd"
        codes, mask = file.read(), file.read_masks(1)
        assert np.isnan(file.nodata) if name == "float32/1" else file.nodata == -128
    np.testing.assert_array_equal(codes, store.codes(slice(0, HEIGHT), slice(0, WIDTH))[0].transpose(2, 0, 1))
    assert ((mask > 0) == np.isfinite(image()[0])).all()
    again = open_store(path)
    np.testing.assert_array_equal(whole(again), whole(store))
    for fact in ("kind", "dim", "crs", "geobox", "shape", "period", "quantiser", "quality"):
        assert getattr(again, fact) == getattr(store, fact)
    assert again.model["name"] == "m"
    assert again.attrs["geoemb:model"] == "https://a.org/m"
    assert again.attrs["geoemb:source_data"] == ["https://a.org"]
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "a.zarr"]


@pytest.mark.parametrize("name", ["float32/1", "int8-square/1"])
def test_overviews_are_means_brought_to_length(stored, tmp_path, name):
    store = stored(name)
    path = write_cog(store, tmp_path / "a.tif")
    vectors = whole(store)
    for level in (1, 2):
        with rasterio.open(path, overview_level=level - 1) as file:
            codes = file.read()
        found = store.quantiser.decode(codes.reshape(DIM, -1).T).reshape(*codes.shape[1:], DIM)
        factor = 2**level
        for y, x in [(0, 0), (7, 13), (5, 13), (20, 5), (codes.shape[1] - 1, 4), (3, codes.shape[2] - 1)]:
            cell = vectors[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].reshape(-1, DIM)
            cell = cell[np.isfinite(cell[:, 0])]
            if not len(cell):
                assert np.isnan(found[y, x]).all()
                continue
            mean = cell.mean(0)
            wanted = mean / np.linalg.norm(mean)
            np.testing.assert_allclose(found[y, x], wanted, atol=0.012)
        length = np.linalg.norm(found, axis=-1)
        assert np.nanmax(np.abs(length - 1)) < 0.02, "a plain mean would be shorter"


def test_lengths_other_than_one_stay_in_overviews():
    vectors = np.zeros((4, 4, 2), np.float32)
    vectors[..., 0] = 3
    vectors[0, 0] = (0, 5)
    vectors[:2, 2:] = np.nan
    vectors[2, 2:], vectors[3, 2:] = (1, 0), (-1, 0)  # they cancel
    out = cog.pooled(vectors, 2)
    assert np.linalg.norm(out[0, 0]) == pytest.approx((3 * 3 + 5) / 4)
    np.testing.assert_allclose(out[0, 0] / np.linalg.norm(out[0, 0]), np.array([9, 5]) / np.hypot(9, 5), rtol=1e-6)
    assert np.isnan(out[0, 1]).all()
    assert np.isnan(out[1, 1]).all()
    assert cog.pooled(vectors, 2, unit=True)[1, 0].tolist() == [1, 0]
    assert (cog.pooled(np.zeros((2, 2, 3), np.float32), 2) == 0).all(), "zero vectors are data"


@pytest.mark.parametrize("parts", [4 * DIM * 32**2, 1e9])
def test_other_codes_become_floats_or_unit_vectors(stored, tmp_path, monkeypatch, parts):
    monkeypatch.setattr(cog, "_PART_BYTES", parts)
    store = stored("int8-linear/1", image() * 3)
    plain = open_store(write_cog(store, tmp_path / "f.tif"))
    assert plain.quantiser.name == "float32/1"
    np.testing.assert_array_equal(whole(plain), whole(store))
    square = open_store(write_cog(store, tmp_path / "s.tif", quantiser="int8-square/1"))
    np.testing.assert_allclose(whole(square), image().transpose(1, 2, 0), atol=0.02)
    step = 3  # the root of 130 x 201 / 4096, rounded up
    assert square.quality["sample"] == np.isfinite(image()[0, ::step, ::step]).sum()
    assert square.quality["bytes_per_vector"] == DIM
    assert cog_validate(tmp_path / "s.tif", strict=True)[0]


def test_layout_follows_the_gdal_at_hand(stored, tmp_path, monkeypatch):
    levels = cog._Levels(tmp_path, stored("float32/1"), get("float32/1", DIM))
    for version, tiled in (("3.10", False), ("3.11", True), ("3.12", True)):
        monkeypatch.setattr(cog.GDALVersion, "runtime", lambda version=version: cog.GDALVersion.parse(version))
        assert ("INTERLEAVE" in levels.options()) == tiled
    wide = cog._Levels(tmp_path, stored("float32/1", np.ones((300, 4, 4), np.float32)), get("float32/1", 300))
    assert wide.block == 128, "blocks of all bands stay small"


def test_small_files_need_no_overviews(stored, tmp_path):
    store = stored("float32/1", image(40, 50))
    path = write_cog(store, tmp_path / "a.tif")
    with rasterio.open(path) as file:
        assert file.overviews(1) == []
    assert cog_validate(path, strict=True)[0]
    np.testing.assert_array_equal(whole(open_store(path)), whole(store))


def test_what_cannot_be_exported(stored, tmp_path):
    store = stored("int8-linear/1")
    with pytest.raises(ValueError, match="holds float32/1 or int8-square/1"):
        write_cog(store, tmp_path / "a.tif", quantiser="int8-linear/1")
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_cog(store, tmp_path / "no" / "a.tif")
    (tmp_path / "a.tif").write_text("notes")
    with pytest.raises(FileExistsError, match="no COG of embeddings"):
        write_cog(store, tmp_path / "a.tif")
    plain(tmp_path / "a.tif", np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(FileExistsError, match="no COG of embeddings"):
        write_cog(store, tmp_path / "a.tif")


def test_nothing_is_left_of_a_failure(stored, tmp_path, monkeypatch):
    store = stored("float32/1")
    write_cog(store, tmp_path / "a.tif")
    before = (tmp_path / "a.tif").read_bytes()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rasterio.shutil, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cog(store, tmp_path / "a.tif")
    assert (tmp_path / "a.tif").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "a.zarr"]


# --- files of others ------------------------------------------------------------------------------------------------


def plain(path, values, transform=None, nodata=None, labels=(), **more):
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype.name,
        crs=more.pop("crs", "EPSG:32631"), transform=transform or spot().affine, nodata=nodata, **more,
    ) as file:  # fmt: skip
        file.write(values)
        if labels:
            file.descriptions = tuple(labels)
    return path


def annual_layer(path, south_up: bool, dim=64) -> np.ndarray:
    """A file as the published annual layers are: int8, -128 in all channels, rows from the south; its codes from the north."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (dim, 30, 40)).astype(np.int8)
    codes[:, 4:9, 10:12] = -128
    a = spot(30, 40).affine
    if south_up:
        a = Affine(10, 0, a.c, 0, 10, a.f - 300)
    plain(path, codes[:, ::-1] if south_up else codes, a, -128, tiled=True, blockxsize=16, blockysize=16)
    return codes


@pytest.mark.parametrize("south_up", [False, True])
def test_annual_layers_are_read_by_their_rule(tmp_path, south_up):
    codes = annual_layer(tmp_path / "a.tif", south_up)
    store = open_store(tmp_path / "a.tif")
    assert store.quantiser.name == "int8-square/1"
    assert store.geobox == spot(30, 40)
    expected = (np.sign(codes) * (np.abs(codes.astype(float)) / 127.5) ** 2).transpose(1, 2, 0)
    expected[4:9, 10:12] = np.nan
    np.testing.assert_allclose(whole(store), expected, rtol=1e-5)
    np.testing.assert_allclose(store.read(slice(3, 11), slice(7, 30)), expected[3:11, 7:30], rtol=1e-5)
    points = [point for part in store.points() for point in zip(part.x, part.y, part.vectors[:, 0], strict=True)]
    assert len(points) == 1200 - 10
    with rasterio.open(tmp_path / "a.tif") as file:  # GDAL says where a number stands
        for x, y, value in points[::97]:
            raw = next(file.sample([(x, y)], indexes=1))[0]
            assert value == pytest.approx(np.sign(raw) * (abs(float(raw)) / 127.5) ** 2, rel=1e-5)


def test_files_that_do_not_say_what_they_hold(tmp_path):
    path = plain(tmp_path / "a.tif", np.ones((4, 8, 8), np.float32))
    with pytest.raises(LookupError, match="4 bands of float32 and does not say"):
        open_store(path)
    assert open_store(path, quantiser="float32/1").dim == 4
    with pytest.raises(ValueError, match="int8-square/1 has 4 numbers of int8, the file 4 of float32"):
        open_store(path, quantiser="int8-square/1")
    eight = plain(tmp_path / "b.tif", np.ones((12, 8, 8), np.int8), nodata=-128)
    with pytest.raises(LookupError, match="12 bands of int8"):
        open_store(eight)
    assert (
        open_store(plain(tmp_path / "c.tif", np.ones((2, 8, 8), np.int8), nodata=-128, labels=["A00", "A01"])).dim == 2
    )
    with pytest.raises(ValueError, match="CRS None"):
        open_store(plain(tmp_path / "d.tif", np.ones((64, 8, 8), np.int8), crs=None))


def test_unknown_quantisers_are_refused(stored, tmp_path):
    path = write_cog(stored("int8-square/1"), tmp_path / "a.tif")
    with rasterio.open(path) as file:
        told, values = file.tags()[cog.TAG], file.read()
    plain(path, values, nodata=-128)
    with rasterio.open(path, "r+") as file:
        file.update_tags(**{cog.TAG: told.replace("int8-square/1", "int8-cube/1")})
    with pytest.raises(LookupError, match=r"a\.tif cannot be read: .*'int8-cube/1'.*Known: "):
        open_store(path)


def test_truncated_files_say_so(stored, tmp_path):
    path = write_cog(stored("float32/1", np.random.default_rng(0).normal(size=(4, 300, 300))), tmp_path / "a.tif")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(OSError, match=r"a\.tif cannot be read: it is truncated"):
        whole(open_store(path))


# --- other grids ----------------------------------------------------------------------------------------------------


def test_warp_to_a_coarser_grid_is_the_renormalised_mean(stored):
    store = stored("float32/1")
    coarse = GeoBox((32, 50), Affine(40, 0, 600_000, 0, -40, 5_400_000), "EPSG:32631")
    found = warp(store, coarse)
    wanted = cog.pooled(whole(store)[:128, :200], 4).transpose(2, 0, 1)
    assert found.shape == (DIM, 32, 50)
    inner = np.isfinite(wanted[0]) & np.isfinite(found[0])
    assert inner.sum() > 1500
    assert (np.isfinite(wanted[0]) == np.isfinite(found[0])).mean() > 0.99
    np.testing.assert_allclose(found[:, inner], wanted[:, inner], atol=1e-5)


def test_warp_to_another_crs_keeps_direction_and_length(stored, monkeypatch):
    store = stored("int8-linear/1", image() * 4)
    near = GeoBox((90, 130), Affine(0.0001, 0, 4.362, 0, -0.0001, 48.744), "EPSG:4326")
    found = warp(store, near)
    length = np.linalg.norm(found, axis=0)
    assert np.nanmax(np.abs(length - 4)) < 0.05
    assert 0.5 < np.isfinite(length).mean() <= 1
    for row, col in [(20, 30), (70, 90), (45, 110)]:
        lon, lat = near.affine * (col + 0.5, row + 0.5)
        same = store.at((lon, lat))
        cosine = found[:, row, col] @ same / np.linalg.norm(found[:, row, col]) / np.linalg.norm(same)
        assert cosine > 0.97, "vectors change by a fifteenth a pixel"
    from everysat.store import resample

    monkeypatch.setattr(resample, "_ROWS", 17)
    np.testing.assert_allclose(warp(store, near), found, atol=1e-4)
    far = GeoBox((3, 3), Affine(0.001, 0, 40, 0, -0.001, 48), "EPSG:4326")
    assert np.isnan(warp(store, far)).all()


def test_windows_of_a_file_are_its_blocks(stored, tmp_path):
    store = open_store(write_cog(stored("float32/1"), tmp_path / "a.tif"))
    windows = list(store.windows())
    assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in windows) == HEIGHT * WIDTH
    with rasterio.open(store.path) as file:
        first = file.read(window=Window.from_slices(*windows[0]))
    np.testing.assert_array_equal(store.read(*windows[0]), first.transpose(1, 2, 0))
