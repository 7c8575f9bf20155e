"""Tiles of SatCLIP's patches: bands in order, the offset told, whole patches in one part."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from everysat.data.satclip import baseline_of, build
from everysat.data.statistics import band_statistics

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
SIZE = 24


def numbers(seed: int, lowest: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (lowest + 300 * np.arange(12)[:, None, None] + rng.integers(0, 200, (12, SIZE, SIZE))).astype("uint16")


def write(path, values, zone=32):
    """A patch as published: twelve bands without names, no date, no nodata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    with rasterio.open(
        path, "w", dtype="uint16", crs=f"EPSG:326{zone}", transform=from_origin(500010, 5e6, 10, 10), **profile
    ) as file:
        file.write(values)
        for band in file.indexes:
            file.set_band_description(band, "stackstac-1ae8885b2761060dcd2b9cb7af1b7ecd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("satclip")
    for number in range(6):
        name = root / ("a" if number < 2 else "b/images") / f"patch_{number}.tif"
        values = numbers(number, 300 if number % 2 else 1200)
        values[3, :2, :2] = 0
        write(name, values, 31 + number)
    return root


def test_tiles_are_windows_in_reflectance_with_bands_in_order(folder):
    tiles = build(root=folder, tile_m=120, stride_m=60)
    assert len(tiles) == 6 * 9
    tile = tiles[9 + 5]  # second row, third column of patch_1
    s2 = tile.raster("s2")
    assert s2.sensor.names == BANDS
    assert s2.gsd_m == 10
    torch.testing.assert_close(
        s2.values[0], torch.from_numpy(numbers(1, 300)[:, 6:18, 12:24].astype(np.float32)) * 1e-4
    )
    assert s2.valid.all()
    assert torch.isinf(s2.time_s).all()
    place = tile.places[0]
    assert (place.height_m, place.width_m, str(place.geobox.crs)) == (120, 120, "EPSG:32632")
    assert place.geobox.affine.c == 500010 + 120
    assert place.geobox.affine.f == 5e6 - 60
    assert place.lonlat == pytest.approx((9.0, 45.15), abs=0.01)


def test_the_offset_is_told_for_each_patch_or_given(folder):
    assert [baseline_of(folder / p) for p in build(root=folder).patches] == ["04.00", "00.00"] * 3
    bright = build(root=folder, patches=["patch_0"])[0].raster("s2")
    assert not bright.valid[0, 3, :2, :2].any()  # 0 is no data, and does not hide the offset
    shift = build(root=folder, patches=["patch_0"], baseline="00.00")[0].raster("s2").values - bright.values
    torch.testing.assert_close(shift[bright.valid], torch.full_like(shift[bright.valid], 0.1))
    odd = build(root=folder, patches=["patch_1"])[0].raster("s2").values
    assert torch.equal(odd, build(root=folder, patches=["patch_1"], baseline="00.00")[0].raster("s2").values)
    with pytest.raises(ValueError, match="baseline='new' must be"):
        build(root=folder, baseline="new")


def test_chosen_bands_and_time(folder):
    data = build(root=folder, bands=["B8A", "B02"], time="2022-06-15")
    s2 = data[1].raster("s2")
    assert s2.sensor.names == ("B8A", "B02")
    assert torch.equal(s2.values, build(root=folder)[1].raster("s2").values[:, [8, 1]])
    assert s2.time_s.tolist() == [[1655251200.0, 1655337600.0]]
    span = build(root=folder, time=["2021-01-01", "2023-05-23"])[0].raster("s2").time_s
    assert span.tolist() == [[1609459200.0, 1684886400.0]]


def test_parts_hold_whole_patches_and_some_can_be_kept_away(folder):
    parts = [build(root=folder, part=p, tile_m=120) for p in ("train", "val", "test")]
    names = [name for part in parts for name in part.patches]
    assert sorted(names) == sorted(build(root=folder).patches)
    assert all(len(part) == 4 * len(part.patches) for part in parts)
    left = build(root=folder, patches=["patch_1", "patch_2"], hold_out=["patch_1"]).patches
    assert [p.rsplit("/", 1)[-1] for p in left] == ["patch_2.tif"]
    with pytest.raises(LookupError, match=r"hold_out='patch_9' is unknown"):
        build(root=folder, hold_out=["patch_9"])


def test_small_to_send_and_named_by_what_it_holds(folder):
    data = build(root=folder, tile_m=120)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[7].raster("s2").values, data[7].raster("s2").values)
    assert len(pickle.dumps(data)) < 3000
    assert again.fingerprint() == data.fingerprint() != build(root=folder).fingerprint()


def test_what_is_not_there_or_not_right_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"patch_\*\.tif is missing.*microsoft/satclip"):
        build(root=tmp_path)
    with pytest.raises(LookupError, match="no band 'B10'"):
        build(root=folder, bands=["B10"])
    for wrong, spoil in (("low", np.s_[:, :12]), ("few", np.s_[:11])):
        write(tmp_path / wrong / "patch_1.tif", numbers(1, 300))
        write(tmp_path / wrong / "patch_2.tif", numbers(2, 300)[spoil])
        with pytest.raises(
            (ValueError, LookupError), match=rf"{wrong}/patch_2\.tif.*{'has .12, 24. pixels' if wrong == 'low' else ''}"
        ):
            build(root=tmp_path / wrong)[1]
    whole = (tmp_path / "low/patch_1.tif").read_bytes()
    (tmp_path / "few/patch_2.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"patch_2\.tif cannot be read"):
        build(root=tmp_path / "few", bands=["B02"])[1]
    with pytest.raises(IndexError, match="outside a dataset of 6"):
        build(root=folder)[6]


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "satclip_s2").is_dir():
        pytest.skip("needs satclip_s2")
    return data_dir / "satclip_s2"


def test_the_real_patches_have_spectra_of_their_ground(real):
    """Forest: green above red, a steep red edge, B8A as bright as B08, water vapour near both. Snow: dark beyond 1.5 um."""
    data = build(root=real)
    assert len(data) == 23
    forest, snow, sea = (
        dict(zip(BANDS, build(root=real, patches=[p])[0].raster("s2").values.mean((0, 2, 3)).tolist(), strict=True))
        for p in ("patch_502692", "patch_25630", "patch_74721")
    )
    assert forest["B03"] > forest["B04"]
    assert forest["B05"] < 0.5 * forest["B06"] < forest["B07"]
    assert abs(forest["B8A"] - forest["B08"]) < 0.03
    assert forest["B12"] < forest["B11"] < forest["B8A"]
    assert snow["B08"] > 0.7 > 0.05 > snow["B11"]
    assert sea["B02"] > sea["B04"] > sea["B08"] > sea["B12"]
    assert 0 <= sea["B12"] < 0.02  # with its offset removed


def test_no_real_patch_is_below_zero_once_offsets_are_gone(real):
    data = build(root=real)
    lowest = [float(data[i].raster("s2").values.flatten().quantile(0.001)) for i in range(0, 23, 2)]
    assert min(lowest) > -0.02
    mean, _ = band_statistics(build(root=real, tile_m=640), places=60)["s2"]
    assert all(0.05 < m < 0.5 for m in mean)
