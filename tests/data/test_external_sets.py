"""What each reader does beyond the laws of tests/data/test_published.py: values against the bytes of the files, and the defects of the
published loaders that they do not share."""

from __future__ import annotations

import datetime
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from everysat.data import braddts, burnscars, planted, s2naip, sen1floods11, sickle, so2sat, timesen2crop
from everysat.data.bands import finer, nearest, presented, series, with_ratio
from everysat.data.published import S2_BANDS, days
from everysat.io import archives, arrays
from everysat.sensors import get
from everysat.types import Raster

DAY_S = 86400.0


def made(module, tmp_path: Path, **options) -> Path:
    module.fake(tmp_path, **options)
    return tmp_path


def utc(year: int, month: int, day: int) -> float:
    return datetime.datetime(year, month, day, tzinfo=datetime.UTC).timestamp()


class TestBands:
    def test_a_quotient_is_of_the_values_and_of_what_is_there(self) -> None:
        numbers = np.array([[6.0, 3.0], [-9.0, -18.0], [5.0, 0.0], [np.nan, 2.0], [1e6, 1.0]]).reshape(5, 2, 1, 1)
        ratio = with_ratio(numbers)[:, 2, 0, 0]
        np.testing.assert_allclose(ratio, [2.0, 0.5, np.nan, np.nan, 1e4])

    def test_series_come_in_the_order_of_time(self) -> None:
        time_s = days(["20200301", "20200101", "20200201"], "file")
        numbers = np.full((3, 2, 1, 1), -10.0) - np.arange(3).reshape(3, 1, 1, 1)
        raster = series(get("sentinel-1-grd").select(["VV", "VH"]), numbers, time_s, "file", 10.0)
        assert raster.values[:, 0, 0, 0].tolist() == [-11.0, -12.0, -10.0]
        assert raster.time_s[:, 0].tolist() == [utc(2020, 1, 1), utc(2020, 2, 1), utc(2020, 3, 1)]

    @pytest.mark.parametrize(
        ("level", "stored", "message"),
        [
            (0.3, "numbers", "holds reflectance"),
            (3000.0, "physical", "digital numbers"),
            (4e4, "numbers", "median is 4"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, level: float, stored: str, message: str) -> None:
        numbers = np.full((1, 10, 2, 2), level, np.float32)
        with pytest.raises(ValueError, match=f"some.npz.*{message}"):
            series(
                get("sentinel-2-l2a").select(S2_BANDS), numbers, days(["20200101"], ""), "some.npz", 10.0, stored=stored
            )

    def test_no_date_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"some\.npz holds no date"):
            series(get("modis"), np.zeros((0, 7, 1, 1)), days([], ""), "some.npz", 250.0)

    def test_finer_pixels_keep_the_mean_and_do_not_mix_with_what_is_not_there(self) -> None:
        values = torch.arange(16.0).view(1, 1, 4, 4)
        valid = torch.ones_like(values, dtype=torch.bool)
        valid[..., 0, 0] = False
        spoiled = torch.where(valid, values, 1e6)
        sensor = get("sentinel-2-l2a").select(["B05"])
        fine = finer(Raster.of(sensor, spoiled, 20.0, valid=valid), 8)
        assert fine.gsd_m == 10.0
        assert fine.values[fine.valid].max() <= 15.0
        assert not fine.valid[..., :2, :2].any()
        assert fine.valid[..., 3:, 3:].all()
        whole = finer(Raster.of(sensor, values, 20.0), 8)
        assert whole.values.mean().item() == pytest.approx(7.5)

    def test_nearest_takes_the_pixel_of_the_centre(self) -> None:
        image = np.arange(6).reshape(2, 3)
        assert nearest(image, 6)[:, ::2].tolist() == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
        assert nearest(image, 6).shape == (6, 6)

    def test_another_name_keeps_values_by_band_and_invents_none(self) -> None:
        own = Raster.of(get("landsat-8-oli").select(["B1", "B10"]), torch.tensor([0.2, 300.0]).view(1, 2, 1, 1), 10.0)
        shown = presented("l8", own, {"l8": "landsat-8-oli-l1"}, ("B8", "B10", "B1"))
        assert shown.sensor.name == "landsat-8-oli-l1"
        assert shown.values.flatten()[1:].tolist() == pytest.approx([300.0, 0.2])
        assert shown.valid.flatten().tolist() == [False, True, True]
        assert presented("l8", own, {"s2": "sentinel-2-l2a"}, ()) is own


class TestArchives:
    def test_pickles_are_not_loaded(self, tmp_path: Path) -> None:
        class Runs:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        np.savez(tmp_path / "a.npz", arr_0=np.array([Runs()], dtype=object))
        torch.save({"image": Runs()}, tmp_path / "a.pt")
        for read in (lambda: archives.npz(tmp_path / "a.npz"), lambda: archives.tensors(tmp_path / "a.pt", ["image"])):
            with pytest.raises(OSError, match=r"a\.(npz|pt) cannot be read"):
                read()
        assert not (tmp_path / "ran").exists()

    def test_dates_in_torch_files_are_read(self, tmp_path: Path) -> None:
        when = [datetime.date(2021, 3, 4), datetime.datetime(2021, 3, 5, 6, 7)]
        torch.save({"when": when, "x": torch.ones(2)}, tmp_path / "a.pt")
        held = archives.tensors(tmp_path / "a.pt", ["when", "x"])
        assert held["when"] == when
        with pytest.raises(KeyError, match=r"a\.pt has no entry 'label'; it has when, x"):
            archives.tensors(tmp_path / "a.pt", ["label"])

    def test_a_table_without_a_column_says_which(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("x,y\n1,2\n")
        with pytest.raises(ValueError, match=r"a\.csv lacks the columns z; it has x, y"):
            archives.table(tmp_path / "a.csv", ["x", "z"])


class TestPlanted:
    def test_values_masks_and_days_are_those_of_the_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = made(planted, tmp_path, places=1)
        stem = tmp_path / "train" / "0"
        stamp = int(utc(2019, 7, 1) * 1000)
        late = np.array([stamp + 86_399_000, stamp - 86_400_000 * 3 + 1000] * 4)
        archives.write_npz(stem / "0_s2_timestamp.npz", arr_0=late)
        monkeypatch.setenv("TZ", "America/Los_Angeles")
        batch = planted.build(root=root)[0]
        for name, scale, offset in (("s2", 1e-4, 0.0), ("l7", 2.75e-5, -0.2), ("modis", 1e-4, 0.0)):
            held, mask = (np.moveaxis(archives.npz(stem / f"0_{name}{e}.npz")["arr_0"], -1, 1) for e in ("", "_mask"))
            stamps = archives.npz(stem / f"0_{name}_timestamp.npz")["arr_0"]
            order = np.argsort(stamps // 86_400_000, kind="stable")
            raster = batch.raster(name)
            assert (raster.valid.numpy() == (mask > 0)[order]).all()
            expected = (held * scale + offset)[order]
            np.testing.assert_allclose(
                raster.values[raster.valid], expected[raster.valid.numpy()], rtol=1e-5, atol=1e-6
            )
        assert set(batch.raster("s2").time_s[:, 0].tolist()) == {utc(2019, 7, 1), utc(2019, 6, 28)}
        assert ((batch.raster("s2").time_s[:, 1] - batch.raster("s2").time_s[:, 0]) == DAY_S).all()

    def test_a_quotient_is_valid_where_both_bands_are(self, tmp_path: Path) -> None:
        batch = planted.build(root=made(planted, tmp_path, places=1))[0]
        for name in ("s1", "alos"):
            valid = batch.raster(name).valid
            assert (valid[:, 2] == valid[:, :2].all(1)).all()
            assert not valid[:, :2].all()

    def test_alos_amplitudes_become_db_and_their_quotient_stays(self, tmp_path: Path) -> None:
        root = made(planted, tmp_path, places=1)
        path = tmp_path / "train" / "0" / "0_alos.npz"
        count = len(archives.npz(path)["arr_0"])
        archives.write_npz(path, arr_0=np.broadcast_to([6000.0, 3000.0], (count, 4, 4, 2)))
        alos = planted.build(root=root, modalities=["alos"])[0].raster("alos")
        seen = alos.values[:, :, :][alos.valid.all(1)[:, None].expand_as(alos.valid)].view(-1)
        assert {round(v, 2) for v in seen.tolist()} == {-7.44, -13.46, 2.0}
        archives.write_npz(path, arr_0=np.broadcast_to([-8.0, -14.0], (count, 4, 4, 2)))
        with pytest.raises(ValueError, match=r"0_alos\.npz holds negative numbers.*'alos': 'physical'"):
            planted.build(root=root, modalities=["alos"])[0]
        stored = planted.build(root=root, modalities=["alos"], stored={"alos": "physical"})[0].raster("alos")
        assert stored.values[:, 0][stored.valid[:, 0]].unique().tolist() == [-8.0]

    def test_labels_that_are_none_are_refused(self, tmp_path: Path) -> None:
        root = made(planted, tmp_path, places=1)
        (root / "train" / "labels2.json").write_text(json.dumps({"0": 40}))
        with pytest.raises(ValueError, match=r"labels2\.json must map places to species, 0 to 39; it has 40"):
            planted.build(root=root)

    def test_every_place_is_read_once_an_epoch(self, tmp_path: Path) -> None:
        data = planted.build(root=made(planted, tmp_path, places=5), modalities=["modis"])
        codes = list(json.loads((tmp_path / "train" / "labels2.json").read_text()).values())
        assert [int(data[i].raster("label").values) for i in range(5)] == codes == list(data.codes)


class TestS2Naip:
    def test_bands_of_two_files_come_in_the_order_of_the_sensor(self, tmp_path: Path) -> None:
        root = made(s2naip, tmp_path, places=1)
        name = json.loads((root / "train_dict.json").read_text())["name"][0]
        for folder, count, fine, coarse in (("sentinel2", 6, 4, 6), ("landsat", 4, 1, 10)):
            for suffix, width, side, start in (("_8", fine, 64, 10_000), ("_16", coarse, 32, 11_000)):
                numbers = (start + 100 * np.arange(width))[None] + np.arange(count)[:, None]
                stacked = np.broadcast_to(numbers.reshape(-1, 1, 1), (count * width, side, side)).astype(np.uint16)
                arrays.write_tiff(root / folder / f"{name}{suffix}.tif", stacked)
        batch = s2naip.build(root=root, modalities=["s2", "l8"])[0]
        s2, l8 = batch.raster("s2"), batch.raster("l8")
        assert s2.sensor.names == S2_BANDS
        numbers = (s2.values[:, :, 5, 7] * 1e4).round().int()
        assert numbers[0].tolist() == [10000, 10100, 10200, 11000, 11100, 11200, 10300, 11300, 11400, 11500]
        assert (numbers - numbers[0])[:, 0].tolist() == list(range(6))
        assert l8.sensor.names == ("B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")
        assert (l8.values[0, :2, 3, 3] / 2e-5 + 5000).round().tolist() == [10000, 11000]

    def test_large_landsat_numbers_stay_positive(self, tmp_path: Path) -> None:
        root = made(s2naip, tmp_path, places=1)
        name = json.loads((root / "train_dict.json").read_text())["name"][0]
        arrays.write_tiff(root / "landsat" / f"{name}_8.tif", np.full((4, 64, 64), 50_000, np.uint16))
        l8 = s2naip.build(root=root, modalities=["l8"])[0].raster("l8")
        assert l8.select(["B8"]).values.unique().tolist() == pytest.approx([0.9])

    def test_the_name_of_a_tile_is_its_place(self) -> None:
        place = s2naip.place_of("32612_960_-6049")
        assert place.geobox is not None
        box = place.geobox.boundingbox
        assert (box.left, box.bottom, box.right, box.top) == (614400, 3870720, 615040, 3871360)
        assert s2naip.place_of("elsewhere").geobox is None

    def test_level_1_is_level_1_unless_a_model_wants_another_name(self, tmp_path: Path) -> None:
        root = made(s2naip, tmp_path, places=1)
        own = s2naip.build(root=root, modalities=["s2"])[0].raster("s2")
        shown = s2naip.build(root=root, modalities=["s2"], present_as={"s2": "sentinel-2-l2a"})[0].raster("s2")
        assert (own.sensor.name, shown.sensor.name) == ("sentinel-2-l1c", "sentinel-2-l2a")
        assert own.values.equal(shown.values)
        with pytest.raises(LookupError, match="present_as='s3'"):
            s2naip.build(root=root, present_as={"s3": "sentinel-2-l2a"})

    def test_dates_that_do_not_fit_the_file_are_refused(self, tmp_path: Path) -> None:
        root = made(s2naip, tmp_path, places=1)
        held = json.loads((root / "train_dict.json").read_text())
        held["s1_dates"][0].pop()
        (root / "train_dict.json").write_text(json.dumps(held))
        with pytest.raises(ValueError, match=r"sentinel1.*has 6 bands, expected 4: 2 at each of the 2 dates"):
            s2naip.build(root=root)[0]


class TestBraDD:
    def test_the_second_map_is_the_target_and_minus_one_is_not_labelled(self, tmp_path: Path) -> None:
        root = made(braddts, tmp_path, places=1)
        data = braddts.build(root=root)
        path = root / "Samples" / data.files[0]
        held = torch.load(path, weights_only=True)
        held["label"][1, :5] = -1
        torch.save(held, path)
        batch = data[0]
        label = batch.raster("label")
        assert not label.valid[..., :5, :].any()
        assert label.valid[..., 5:, :].all()
        assert label.values[0, 0, 5:].long().equal(held["label"][1, 5:])
        first = held["image_dates"][0]
        assert batch.raster("s1").time_s[0].tolist() == [
            utc(*first.timetuple()[:3]),
            utc(*first.timetuple()[:3]) + DAY_S,
        ]
        assert batch.raster("s1").values[:, :2].equal(held["image"])
        held["label"][1, 0] = 7
        torch.save(held, path)
        with pytest.raises(ValueError, match=r"holds the code 7"):
            data[0]

    def test_a_split_without_rows_is_named(self, tmp_path: Path) -> None:
        root = made(braddts, tmp_path, places=1)
        text = (root / "meta.csv").read_text().replace("validation", "train")
        (root / "meta.csv").write_text(text)
        with pytest.raises(ValueError, match="no row with close_set='validation'"):
            braddts.build(root=root, split="val")


class TestSickle:
    def test_bands_are_where_they_belong(self, tmp_path: Path) -> None:
        root = made(sickle, tmp_path, places=1)
        for path in (root / "images" / "S2" / "npy" / "0").glob("*.npz"):
            held = archives.npz(path) | {"B8": np.full((32, 32), 800), "B8A": np.full((16, 16), 810)}
            archives.write_npz(path, **held)
        s2 = sickle.build(root=root, modalities=["s2"])[0].raster("s2")
        assert s2.select(["B08"]).values.unique().tolist() == pytest.approx([0.08])
        assert s2.select(["B8A"]).values.unique().tolist() == pytest.approx([0.081])
        assert (s2.time_s[1:, 0] > s2.time_s[:-1, 0]).all()

    def test_labels_are_of_the_plots_of_the_split(self, tmp_path: Path) -> None:
        root = made(sickle, tmp_path, places=2)
        mask = np.zeros((2, 32, 32), np.float32)
        mask[0, :, :16], mask[0, :, 16:] = 1, 999  # no background: the published loader would leave 999 in, or drop 1
        mask[1, :8], mask[1, 8:16], mask[1, 16:24], mask[1, 24:] = 1, 5, 0, -3
        arrays.write_tiff(root / "masks" / "10m" / "0.tif", mask)
        label = sickle.build(root=root)[0].raster("label")
        assert label.valid[0, 0, :16, :16].all()
        assert int(label.valid.sum()) == 16 * 16
        assert label.values[0, 0, :8, :16].unique().tolist() == [0.0]
        assert label.values[0, 0, 8:16, :16].unique().tolist() == [1.0]

    def test_missing_bands_of_landsat_are_invalid_not_zero(self, tmp_path: Path) -> None:
        root = made(sickle, tmp_path, places=1)
        own = sickle.build(root=root, modalities=["l8"])[0].raster("l8")
        lacking = ["ST_B10" not in archives.npz(p) for p in sorted((root / "images/L8/npy/0").glob("*.npz"))]
        assert [not v for v in own.select(["B10"]).valid.flatten(1).any(1).tolist()] == lacking
        assert own.select(["B1"]).valid.all()
        shown = sickle.build(root=root, modalities=["l8"], present_as={"l8": "landsat-8-oli-l1"})[0].raster("l8")
        assert shown.sensor.names == sickle.ANYSAT_L8
        assert not shown.select(["B8", "B9", "B11"]).valid.any()
        assert shown.select(["B3"]).values.equal(own.select(["B3"]).values)

    def test_a_split_that_is_not_there_says_what_is(self, tmp_path: Path) -> None:
        root = made(sickle, tmp_path, places=1)
        table = root / "sickle_dataset_tabular.csv"
        table.write_text("\n".join(line for line in table.read_text().splitlines() if ",test," not in line) + "\n")
        with pytest.raises(ValueError, match=r"no row with SPLIT='test'; it has train, val"):
            sickle.build(root=root, split="test")

    def test_a_scene_without_a_date_in_its_name_is_named(self, tmp_path: Path) -> None:
        root = made(sickle, tmp_path, places=1)
        path = next((root / "images/S1/npy/0").glob("*.npz"))
        path.rename(path.with_name("scene.npz"))
        with pytest.raises(ValueError, match=r"scene\.npz: the name has no date"):
            sickle.build(root=root, modalities=["s1"])[0]


class TestTimeSen2Crop:
    def test_bands_flags_and_classes(self, tmp_path: Path) -> None:
        root = made(timesen2crop, tmp_path, places=2)
        data = timesen2crop.build(root=root)
        assert {name.split("/")[0] for name in data.files} == {"32TPT", "33UWP"}
        assert [int(data[i].raster("label").values) for i in range(len(data))] == list(data.codes) == [0, 5, 0, 5]
        frame = pd.read_csv(root / data.files[1])
        s2, every = data[1].raster("s2"), timesen2crop.build(root=root, clear=(0, 1, 2, 3))[1].raster("s2")
        assert s2.sensor.names == S2_BANDS
        assert not every.select(["B08"]).valid.any()
        assert every.select([b for b in S2_BANDS if b != "B08"]).valid.all()
        assert s2.select(["B8A"]).valid.flatten().tolist() == (frame["Flag"] == 0).tolist()
        np.testing.assert_allclose(every.select(["B8A"]).values.flatten(), frame["B8A"] / 1e4, rtol=1e-6)
        listed = pd.read_csv(root / "32TPT" / "dates.csv")["acquisition_date"]
        first = datetime.datetime.strptime(str(listed[0]), "%Y%m%d")
        assert s2.time_s[0, 0].item() == utc(first.year, first.month, first.day)

    def test_the_other_year_of_the_test_tile_is_in_no_split(self, tmp_path: Path) -> None:
        root = made(timesen2crop, tmp_path)
        files = [f for split in timesen2crop.SPLITS for f in timesen2crop.build(root=root, split=split).files]
        assert not [f for f in files if f.startswith(timesen2crop.OTHER_YEAR)]

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [("Flag", 9, "Flag is 9"), ("B2", "cloud", "something else than numbers"), (None, None, "11 dates, but 12")],
    )
    def test_a_sample_that_cannot_be_is_named(self, tmp_path: Path, column, value, message: str) -> None:
        data = timesen2crop.build(root=made(timesen2crop, tmp_path, places=1))
        path = tmp_path / data.files[0]
        frame = pd.read_csv(path)
        if column is None:
            frame = frame.iloc[:-1]
        else:
            frame[column] = frame[column].astype(object)
            frame.loc[3, column] = value
        frame.to_csv(path, index=False)
        with pytest.raises(ValueError, match=rf"0\.csv.*{message}"):
            data[0]


class TestSen1Floods11:
    def test_the_real_chip_is_what_its_files_say(self, data_dir: Path) -> None:
        root = data_dir / "chips" / "sen1floods11_spain"
        data = sen1floods11.build("chip", root=root)
        assert data.chips == ("Spain_7370579",)
        batch = data[0]
        s2, s1, label = (batch.raster(name) for name in ("s2", "s1", "label"))
        assert s2.sensor == get("sentinel-2-l1c")
        # Extremes of the file as gdalinfo gives them: blue 862 to 4701, VV -39.24 to 25.65 dB.
        blue, vv = s2.select(["B02"]).values, s1.select(["VV"]).values
        assert (blue.min().item(), blue.max().item()) == pytest.approx((0.0862, 0.4701))
        assert (vv.min().item(), vv.max().item()) == pytest.approx((-39.241085, 25.647573))
        assert int(label.valid.sum()) == 512 * 512 - 99
        water = (label.values == 1) & label.valid
        assert 0.2 < water.float().mean() < 0.4
        # Water is dark in the near infrared and smooth for radar: the three files show the same ground.
        dry = (label.values == 0) & label.valid
        assert s2.select(["B08"]).values[water].mean() < 0.7 * s2.select(["B08"]).values[dry].mean()
        assert vv[water].mean() < vv[dry].mean() - 3
        place = batch.places[0]
        assert place.lonlat == pytest.approx((-0.7589, 38.1058), abs=1e-3)
        assert place.geobox is not None
        assert not torch.isfinite(s1.time_s).any()

    def test_no_data_is_invalid(self, tmp_path: Path, data_dir: Path) -> None:
        root = tmp_path / "chip"
        shutil.copytree(data_dir / "chips" / "sen1floods11_spain", root)
        s2, geobox = arrays.tiff(root / "S2" / "Spain_7370579_S2Hand.tif")
        assert geobox is not None
        s2[:, 10:20] = 0
        archives.write_grid(root / "S2" / "Spain_7370579_S2Hand.tif", s2, "EPSG:4326", geobox.affine)
        batch = sen1floods11.build("chip", root=root)[0]
        assert not batch.raster("s2").valid[..., 10:20, :].any()
        assert batch.raster("s2").valid[..., 20:, :].all()
        label = root / "Labels" / "Spain_7370579_LabelHand.tif"
        archives.write_grid(label, arrays.tiff(label)[0][:, :500], "EPSG:4326", geobox.affine)
        with pytest.raises(ValueError, match=r"S2Hand\.tif holds \(13, 512, 512\), expected \(13, 500, 512\)"):
            sen1floods11.build("chip", root=root)[0]

    def test_dates_come_from_the_metadata(self, tmp_path: Path) -> None:
        root = made(sen1floods11, tmp_path)
        data = sen1floods11.build(root=root)
        assert [chip.split("_")[0] for chip in data.chips] == ["Spain", "Mekong", "Ghana", "Paraguay"]
        spain, mekong, paraguay = data[0], data[1], data[3]
        assert spain.raster("s2").time_s[0].tolist() == [utc(2019, 9, 18), utc(2019, 9, 19)]
        assert spain.raster("s1").time_s[0, 0] == utc(2019, 9, 17)
        assert mekong.raster("s2").time_s[0, 0] == utc(2018, 8, 4)
        assert paraguay.raster("s2").time_s[0].tolist() == [-math.inf, math.inf]
        inside = sen1floods11.build(root=root / "v1.1")
        assert inside.chips == data.chips

    def test_a_chip_folder_without_chips_says_what_was_looked_for(self, tmp_path: Path) -> None:
        for name in ("S1", "S2", "Labels"):
            (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError, match=r"Labels/<chip>_LabelHand\.tif"):
            sen1floods11.build("chip", root=tmp_path)


class TestBurnScars:
    def test_no_ground_is_in_training_and_validation(self, tmp_path: Path) -> None:
        root = made(burnscars, tmp_path, places=2)
        empty = np.zeros((1, 2, 2), np.int16)
        for i in range(300):
            tile = f"T{10 + i % 8}S{'ABCDEFGHJK'[i % 10]}{'ABC'[i % 3]}"
            arrays.write_tiff(
                root / "training" / f"subsetted_512x512_HLS.S30.{tile}.2018{100 + i % 200}.v1.4_merged.tif", empty
            )
        parts = {split: burnscars.build(root=root, split=split).scenes for split in ("train", "val")}
        tiles = {split: {name.split(".")[2] for name in names} for split, names in parts.items()}
        assert not tiles["train"] & tiles["val"]
        assert 0.02 < len(parts["val"]) / sum(map(len, parts.values())) < 0.25
        assert parts["val"] != burnscars.build(root=root, split="val", seed=1).scenes

    def test_the_day_no_data_and_missing_labels(self, tmp_path: Path) -> None:
        root = made(burnscars, tmp_path, places=2)
        data = burnscars.build(root=root, split="test")
        batch = data[0]
        year, day = int(data.scenes[0].split(".")[3][:4]), int(data.scenes[0].split(".")[3][4:])
        start = utc(year, 1, 1) + (day - 1) * DAY_S
        assert batch.raster("hls").time_s[0].tolist() == [start, start + DAY_S]
        assert not batch.raster("hls").valid[..., :5, :].any()
        assert batch.raster("hls").valid[..., 5:, :].all()
        codes, _ = arrays.tiff(burnscars.mask_of(root / "validation" / data.scenes[0]))
        assert (batch.raster("label").valid[0].numpy() == (codes != -1)).all()

    def test_a_mask_without_its_scene_is_named(self, tmp_path: Path) -> None:
        root = made(burnscars, tmp_path, places=2)
        scene = next((root / "training").glob("*_merged.tif"))
        scene.unlink()
        with pytest.raises(FileNotFoundError, match=scene.stem):
            burnscars.build(root=root)


class TestSo2Sat:
    def test_places_are_upright_and_radar_is_the_filtered_intensity(self, tmp_path: Path) -> None:
        pytest.importorskip("h5py")
        root = made(so2sat, tmp_path)
        held = arrays.hdf5(root / "training.h5", ["sen1", "sen2", "label"])
        data = so2sat.build(root=root)
        batch = data[2]
        np.testing.assert_allclose(batch.raster("s2").values[0], held["sen2"][2].transpose(2, 0, 1), rtol=1e-6)
        s1 = batch.raster("s1")
        np.testing.assert_allclose(s1.values[0, 0], 10 * np.log10(held["sen1"][2, :, :, 5]), rtol=1e-4)
        np.testing.assert_allclose(s1.values[0, 1], 10 * np.log10(held["sen1"][2, :, :, 4]), rtol=1e-4)
        np.testing.assert_allclose(s1.values[0, 2], held["sen1"][2, :, :, 5] / held["sen1"][2, :, :, 4], rtol=1e-4)
        assert int(batch.raster("label").values) == held["label"][2].argmax() == data.codes[2]

    def test_labels_must_be_one_hot(self, tmp_path: Path) -> None:
        pytest.importorskip("h5py")
        root = made(so2sat, tmp_path, places=2)
        arrays.write_hdf5(root / "training.h5", {"label": np.zeros((2, 17))})
        with pytest.raises(ValueError, match=r"training\.h5: label is \(2, 17\), expected"):
            so2sat.build(root=root)


def test_fingerprints_tell_splits_apart_and_survive_copies(tmp_path: Path) -> None:
    root = made(planted, tmp_path, places=2)
    data = [planted.build(root=root, split=split) for split in planted.SPLITS]
    assert len({d.fingerprint() for d in data}) == 3
    assert pickle.loads(pickle.dumps(data[0])).fingerprint() == data[0].fingerprint()
