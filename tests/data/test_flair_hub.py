"""FLAIR-HUB: lists of places, dates of series, units, classes, on a synthetic set; and the law that all sizes cover the same ground."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest

from everysat.data import flair_hub
from everysat.data.flair_hub import build
from everysat.io import arrays

DAY_S = 86400


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flair_hub")
    flair_hub.fake(folder)
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def stored(root: Path, patch: str, modality: str, domain: str = "") -> np.ndarray:
    own, roi, at = patch.split("_")
    stem = f"{domain or own}_{modality}"
    return arrays.tiff(root / stem / roi / f"{stem}_{roi}_{at}.tif")[0]


def test_a_split_is_a_column_or_three_tables(root: Path, copy: Path) -> None:
    parts = {split: build(root=root, split=split).patches for split in flair_hub.SPLITS}
    assert parts["val"] == ("D006-2020_FF-S1-14_6-5",)
    assert parts == {split: build(root=root, split=split, listing="FLAIR-HUB").patches for split in flair_hub.SPLITS}
    assert build(root=root, split="test", listing="split_2").patches == ("D006-2020_FF-S1-14_5-5",)
    with pytest.raises(LookupError, match=r"SPLIT\.gpkg has no column 'split_9'; it has patch_id, split_1, split_2"):
        build(root=root, listing="split_9")
    with pytest.raises(FileNotFoundError, match=r"FLAIR-HUB_TOY-DATASET_TRAIN\.csv is missing"):
        build("toy", root=root)
    (copy / "csv").mkdir()
    for part in ("TRAIN", "VALID", "TEST"):  # the sample's tables are between commas
        (copy / "csv" / f"FLAIR-HUB_TOY-DATASET_{part}.csv").write_text(
            "patch_id,SPOT_RGBI\nD006-2020_FF-S1-14_5-6,../x\n"
        )
    assert build("toy", root=copy, split="val").patches == ("D006-2020_FF-S1-14_5-6",)


def test_every_sensor_covers_the_place(root: Path) -> None:
    batch = build(root=root)[0]
    sizes = {name: (batch.raster(name).values.shape[-1], batch.raster(name).gsd_m) for name in flair_hub.LAYERS}
    assert sizes == {
        "aerial-flair": (512, 0.2), "spot": (64, 1.6), "dem": (512, 0.2), "s2": (10, 10.24), "s1-asc": (10, 10.24),
        "s1-des": (10, 10.24), "aerial-rlt": (256, 0.4), "label": (512, 0.2),
    }  # fmt: skip
    assert batch.width_m == 102.4
    box = build(root=root, modalities=["s2"])[1].places[0].geobox.boundingbox
    assert (box.left, box.top) == pytest.approx((873782.4 + 102.4, 6891028.8))
    assert batch.raster("dem").sensor.names == ("dsm", "dtm")
    assert (batch.raster("dem").values[0, 0] > batch.raster("dem").values[0, 1]).all()


def test_series_are_split_by_date_and_in_order(copy: Path) -> None:
    patch = "D006-2020_FF-S1-14_5-5"
    table = copy / "GLOBAL_ALL_MTD" / "GLOBAL_SENTINEL2_MTD_DATES.gpkg"
    frame = geopandas.read_file(table)
    days = {"1": "20200812", "2": "20200512", "10": "20200212"}  # the tenth comes after the second, as a number
    frame.assign(acquisition_dates=json.dumps(days)).to_file(table)
    s2 = build(root=copy, modalities=["s2"])[0].raster("s2")
    numbers = stored(copy, patch, "SENTINEL2_TS").reshape(3, 10, 10, 10)
    np.testing.assert_allclose(
        s2.values.numpy(), numbers[[2, 0]] * np.float32(1e-4), rtol=1e-6
    )  # the second date is empty
    assert [int(t / DAY_S) for t in s2.time_s[:, 0]] == [18304, 18486]  # 2020-02-12, 2020-08-12
    assert s2.sensor.names[0] == "B02"


def test_tables_of_whole_regions_serve(copy: Path) -> None:
    before = build(root=copy, modalities=["s1-asc"])[1].raster("s1-asc").time_s
    table = copy / "GLOBAL_ALL_MTD" / "GLOBAL_SENTINEL1-ASC_MTD_DATES.gpkg"
    frame = geopandas.read_file(table)
    regions = frame.assign(zone_id=frame["patch_id"].str.rsplit("_", n=1).str[0]).drop(columns="patch_id")
    table.unlink()
    regions.drop_duplicates("zone_id").to_file(table)
    assert build(root=copy, modalities=["s1-asc"])[1].raster("s1-asc").time_s.equal(before)
    table.unlink()
    regions[regions["zone_id"].str.startswith("D012")].to_file(table)
    with pytest.raises(ValueError, match=r"SENTINEL1-ASC_MTD_DATES\.gpkg has no dates of D006-2020_FF-S1-14_5-5"):
        build(root=copy, modalities=["s1-asc"])


def test_radar_is_power_in_the_files(root: Path, copy: Path) -> None:
    power = stored(root, "D006-2020_FF-S1-14_5-5", "SENTINEL1-DESC_TS").reshape(3, 2, 10, 10)
    decibel, linear = (build(root=root, modalities=["s1-des"], s1_unit=u)[0].raster("s1-des") for u in ("dB", "linear"))
    np.testing.assert_allclose(decibel.values.numpy(), 10 * np.log10(power), rtol=1e-4)
    np.testing.assert_allclose(linear.values.numpy(), power, rtol=1e-6)
    path = next((copy / "D006-2020_SENTINEL1-DESC_TS").rglob("*_5-5.tif"))
    arrays.write_tiff(path, np.full((6, 10, 10), -12, np.float32))
    with pytest.raises(ValueError, match=r"_5-5\.tif holds negative Sentinel-1 values down to -12"):
        build(root=copy, modalities=["s1-des"])[0]
    arrays.write_tiff(path, np.ones((5, 10, 10), np.float32))
    with pytest.raises(ValueError, match=r"_5-5\.tif has 5 bands, expected a multiple of 2"):
        build(root=copy, modalities=["s1-des"])[0]
    arrays.write_tiff(path, np.ones((4, 10, 10), np.float32))
    with pytest.raises(ValueError, match=r"holds 2 dates, but 3 are listed for it in .*SENTINEL1-DESC_MTD_DATES\.gpkg"):
        build(root=copy, modalities=["s1-des"])[0]


def test_photographs_have_their_day(root: Path, copy: Path) -> None:
    batch = build(root=root)[0]
    days = {name: int(batch.raster(name).time_s[0, 0] / DAY_S) for name in flair_hub.DATED}
    assert days == {"aerial-flair": 18457, "aerial-rlt": -5308, "spot": 18476}  # 2020-07-14, 1955-06-21, 2020-08-02
    (copy / "GLOBAL_ALL_MTD" / "GLOBAL_AERIAL_MTD_DATES.gpkg").unlink()
    assert build(root=copy, modalities=["aerial-flair"])[0].raster("aerial-flair").time_s.isinf().all()


def test_snow_and_clouds_can_be_left_out(root: Path) -> None:
    mask = stored(root, "D006-2020_FF-S1-14_5-5", "SENTINEL2_MSK-SC").reshape(3, 2, 10, 10)[[0, 2]]
    s2 = build(root=root, modalities=["s2"], clouds=0.5)[0].raster("s2")
    assert s2.valid[:, 0].numpy().tolist() == (mask <= 50).all(1).tolist()


def test_labels_are_land_cover_or_crops(root: Path, copy: Path) -> None:
    patch = "D006-2020_FF-S1-14_5-5"
    codes = stored(root, patch, "AERIAL_LABEL-COSIA")[0]
    for weak in (False, True):
        label = build(root=root, modalities=["spot"], weak=weak)[0].raster("label")
        assert label.values[0, 0].numpy().tolist() == codes.tolist()
        assert label.valid[0, 0].numpy().tolist() == ((codes < 15) | weak).tolist()
        assert len(label.sensor.bands[0].classes) == 15 + 4 * weak
    crops = build(root=root, modalities=["spot"], label="lpis")[0].raster("label")
    assert crops.values[0, 0].numpy().tolist() == stored(root, patch, "ALL_LABEL-LPIS")[0].tolist()
    assert crops.sensor.bands[0].classes[22] == "background"
    assert set(build(root=root, modalities=["spot"], label="")[0].layers) == {"spot"}
    arrays.write_tiff(
        next((copy / "D006-2020_AERIAL_LABEL-COSIA").rglob("*_5-5.tif")), np.full((1, 512, 512), 19, np.uint8)
    )
    with pytest.raises(ValueError, match=r"_5-5\.tif holds the code 19, which is no class"):
        build(root=copy, modalities=["spot"])[0]


def test_only_the_archives_asked_for_are_needed(copy: Path) -> None:
    for folder in copy.glob("*_SENTINEL*"):
        shutil.rmtree(folder)
    for table in (copy / "GLOBAL_ALL_MTD").glob("GLOBAL_SENTINEL*"):
        table.unlink()
    assert set(build(root=copy, modalities=["spot", "dem"])[0].layers) == {"spot", "dem", "label"}
    with pytest.raises(FileNotFoundError, match=r"GLOBAL_SENTINEL2_MTD_DATES\.gpkg is missing"):
        build(root=copy, modalities=["s2"])
    (copy / "GLOBAL_ALL_MTD" / "GLOBAL_SPOT_MTD_DATES.gpkg").write_bytes(b"no database")
    with pytest.raises(OSError, match=r"GLOBAL_SPOT_MTD_DATES\.gpkg"):
        build(root=copy, modalities=["spot"])


def test_old_photographs_lie_in_folders_of_their_decade(root: Path) -> None:
    pan = build(root=root, modalities=["aerial-rlt"])[0].raster("aerial-rlt")
    numbers = stored(root, "D006-2020_FF-S1-14_5-5", "AERIAL-RLT_PAN", domain="D006-195X")
    assert pan.values[0].numpy().tolist() == numbers.tolist()
