"""TreeSatAI: dates stay with their data, units, crop and labels, on real chips and on the synthetic set."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from everysat.data import published, treesatai
from everysat.data.treesatai import build


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("treesatai")
    treesatai.fake(folder, places=6)
    return folder


def hdf5_of(root: Path, name: str) -> Path:
    return next((root / "sentinel-ts").glob(f"{name.removesuffix('.tif')}_*.h5"))


def days(raster) -> list[str]:
    return [datetime.fromtimestamp(t, UTC).strftime("%Y%m%d") for t in raster.time_s[:, 0].tolist()]


def test_a_real_chip(data_dir: Path) -> None:
    folder = data_dir / "chips" / "treesatai_betula"
    batch = build(root=folder, modalities=["aerial", "s2", "s1-asc", "s1-des", "s1"])[0]
    shapes = {name: tuple(batch.raster(name).values.shape) for name in batch.layers}
    assert shapes == {
        "aerial": (1, 4, 300, 300), "s2": (146, 10, 6, 6), "s1-asc": (115, 2, 6, 6), "s1-des": (235, 2, 6, 6),
        "s1": (350, 3, 6, 6), "label": (1, 15, 1, 1),
    }  # fmt: skip
    label = batch.raster("label")
    assert [g for g, v in zip(label.sensor.names, label.values.flatten(), strict=True) if v] == ["Betula", "Picea"]
    # Trees are brightest in the near infrared: that band is the first, not the last.
    assert batch.raster("aerial").values.mean((0, 2, 3)).argmax() == batch.raster("aerial").sensor.names.index("nir")
    with h5py.File(next((folder / "sentinel-ts").glob("*.h5"))) as file:
        products = [p.decode() for p in file["sen-2-products"][()]]
        numbers = torch.from_numpy(file["sen-2-data"][()])
    assert days(batch.raster("s2")) == [p.split("_")[2][:8] for p in products]
    torch.testing.assert_close(batch.raster("s2").values, numbers * 1e-4)
    for name in ("s1-asc", "s1-des"):
        raster = batch.raster(name)
        vv, vh = (raster.values[:, i][raster.valid[:, i]].mean().item() for i in (0, 1))
        assert -13 < vv < -8  # forest in C band, dB
        assert -19 < vh < -13
    assert batch.places[0].height_m == pytest.approx(60.0)
    assert str(batch.places[0].geobox.crs) == "EPSG:25832"
    assert batch.places[0].lonlat == pytest.approx((7.9353, 52.9113), abs=1e-3)


def test_masks_of_a_real_chip_leave_out_what_is_bright(data_dir: Path) -> None:
    folder = data_dir / "chips" / "treesatai_betula"
    every, clear = (build(root=folder, modalities=["s2"], clouds=c)[0].raster("s2") for c in (None, 0.5))
    assert 60 < len(clear.row) < 80
    blue = [r.values[:, 0][r.valid[:, 0]].mean() for r in (every, clear)]
    assert blue[1] < 0.4 * blue[0]
    assert set(days(clear)) < set(days(every))


def test_a_real_chip_without_a_year_in_its_name_and_with_powers_below_the_noise(data_dir: Path, tmp_path: Path) -> None:
    name = "Abies_alba_1_1005_WEFL_NLF"
    source = data_dir / "chips" / "treesatai_abies"
    for suffix, folder in ((".tif", "aerial"), (".h5", "sentinel-ts")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(source / f"{name}{suffix}", tmp_path / folder / f"{name}{suffix}")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "test_filenames.lst").write_text(f"{name}.tif\n")
    (tmp_path / treesatai.LABELS).write_text(json.dumps({f"{name}.tif": [["Abies", 0.93], ["Fagus", 0.07]]}))
    batch = build(root=tmp_path, split="test", clouds=0.3, modalities=["s2", "s1-des", "s1"])[0]
    assert batch.raster("label").values.flatten().nonzero().flatten().tolist() == [treesatai.GENERA.index("Abies")]
    assert 20 < len(batch.raster("s2").row) < 146  # its masks have ten bands, of which two hold something
    raster = batch.raster("s1-des")
    assert not raster.valid.all()  # the file holds 1.6e-12
    assert raster.values[raster.valid].min() > -50
    ratio = batch.raster("s1").select(["ratio"])
    assert 2 < ratio.values[ratio.valid].median() < 6
    assert ratio.values[ratio.valid].max() < 1e4


def test_dates_without_data_go_with_their_data(root: Path) -> None:
    data = build(root=root)
    for i, name in enumerate(data.names):
        with h5py.File(hdf5_of(root, name)) as file:
            power, products = file["sen-1-asc-data"][()], [p.decode() for p in file["sen-1-asc-products"][()]]
        raster = data[i].raster("s1-asc")
        assert len(raster.row) == len(power) - 1
        assert days(raster) == [p.split("_")[4][:8] for p in products[1:]]
        np.testing.assert_allclose(10 ** (raster.values.numpy() / 10), power[1:], rtol=1e-4)
        assert (raster.time_s[:, 1] - raster.time_s[:, 0] == 86400).all()
        assert data[i].raster("s1-des").valid[0, 0, 0, 0].item() is False


def test_linear_power_is_what_the_file_holds(root: Path) -> None:
    linear, decibel = (build(root=root, modalities=["s1"], s1_unit=unit)[0].raster("s1") for unit in ("linear", "dB"))
    assert [b.unit for b in linear.sensor.bands] == ["linear", "linear", "ratio"]
    seen = decibel.valid[:, :2]
    torch.testing.assert_close(10 * linear.values[:, :2][seen].log10(), decibel.values[:, :2][seen])
    both = linear.valid[:, :2].all(1)
    quotient = linear.values[:, 0] / linear.values[:, 1]
    torch.testing.assert_close(linear.values[:, 2][both], quotient[both])
    assert not linear.valid[:, 2][~both].any()
    parts = build(root=root, modalities=["s1-asc", "s1-des"])[0]
    assert len(decibel.row) == len(parts.raster("s1-asc").row) + len(parts.raster("s1-des").row)


def test_the_centre_is_in_the_middle_of_the_whole(root: Path) -> None:
    whole, centre = (build(root=root, modalities=["aerial"], crop=crop)[0] for crop in ("whole", "centre"))
    assert whole.raster("aerial").values[..., 2:302, 2:302].equal(centre.raster("aerial").values)
    assert (whole.height_m, centre.height_m) == pytest.approx((60.8, 60.0))
    boxes = [batch.places[0].geobox.boundingbox for batch in (whole, centre)]
    assert boxes[1].left - boxes[0].left == pytest.approx(0.4)
    assert boxes[0].top - boxes[1].top == pytest.approx(0.4)


def test_labels_are_the_genera_above_a_share(root: Path) -> None:
    for least, count in ((0.07, 1), (0.04, 2), (0.99, 0)):
        assert build(root=root, min_share=least)[1].raster("label").values.sum() == count


def test_single_images(root: Path) -> None:
    batch = build("mono", root=root)[0]
    assert set(batch.layers) == {"aerial", "s2-mono", "s1-mono", "label"}
    assert batch.raster("s2-mono").sensor.names == treesatai.MONO_BANDS
    vv, vh, ratio = batch.raster("s1-mono").values[0]
    torch.testing.assert_close(ratio, vv / vh)


def changed(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_what_is_wrong_is_named(root: Path, tmp_path: Path) -> None:
    copy = changed(root, tmp_path)
    data = build(root=copy)
    path = hdf5_of(copy, data.names[0])
    with h5py.File(path, "r+") as file:
        file["sen-1-asc-data"][1, 0, 0, 0] = -12.0
    with pytest.raises(ValueError, match=r"_2017\.h5 holds negative Sentinel-1 values"):
        data[0]
    with h5py.File(path, "r+") as file:
        del file["sen-1-asc-products"]
    with pytest.raises(KeyError, match="has no dataset 'sen-1-asc-products'"):
        data[0]
    shutil.copyfile(path, path.with_name(f"{path.stem[:-5]}_2020.h5"))
    with pytest.raises(FileNotFoundError, match="is ambiguous"):
        data[0]
    labels = copy / "labels" / treesatai.LABELS
    labels.write_text(labels.read_text().replace("Tilia", "Tylia"))
    with pytest.raises(ValueError, match=r"multi_labels\.json names the genus 'Tylia'"):
        build(root=copy)
    labels.write_text("{}")
    with pytest.raises(ValueError, match="has no entry for Abies_spec"):
        build(root=copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "center"}, "Did you mean centre"),
        ({"s1_unit": "db"}, "s1_unit='db'"),
        ({"modalities": "s2"}, r"such as \['s2'\]"),
        ({"variant": "mono", "modalities": ["s2"]}, "Known: aerial, s1-mono, s2-mono"),
        ({"variant": "stereo"}, "variant='stereo'"),
    ],
)
def test_what_cannot_be_is_refused(root: Path, options, message) -> None:
    with pytest.raises((LookupError, TypeError), match=message):
        build(root=root, **options)


def test_a_probability_is_a_share(root: Path) -> None:
    with pytest.raises(ValueError, match="clouds=50 must be between 0 and 1"):
        build(root=root, clouds=50)[0]


def test_the_day_of_a_pass_over_midnight_is_that_of_its_start(tmp_path: Path) -> None:
    name = b"S1A_IW_GRDH_1SDV_20190101T235950_20190102T000015_025287_02CC09_1570"
    assert published.stamps_in([name], 4, tmp_path) == ["20190101"]
    with pytest.raises(ValueError, match="'S1A_IW' is no name of a Sentinel product"):
        published.stamps_in(["S1A_IW"], 4, tmp_path)
