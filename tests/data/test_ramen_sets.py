"""MMEarth and WorldStrat beyond the laws of tests/data/test_published.py: values against the bytes of the files, and the defects of
the published loaders and splits that they do not share."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from everysat.data import mmearth, worldstrat
from everysat.io import arrays, dates


def made(module, folder: Path, **options) -> Path:
    module.fake(folder, **options)
    return folder


class TestMMEarth:
    NAME = "data_1M_v001_64"

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return made(mmearth, tmp_path, side_px=8)

    def held(self, root: Path, name: str, row: int) -> np.ndarray:
        with h5py.File(root / self.NAME / f"{self.NAME}.h5") as file:
            return file[name][row]

    def test_levels_are_layers_of_their_own_with_bands_in_the_order_of_the_file(self, root: Path) -> None:
        data = mmearth.build(root=root)
        for i, row in enumerate(data.rows):
            batch, stored = data[i], self.held(root, "sentinel2", row)
            level = self.held(root, "metadata", row)["S2_type"].decode()
            name, table = ("s2", "sentinel-2-l2a") if level == "l2a" else ("s2-l1c", "sentinel-2-l1c")
            assert ("s2" in batch.layers, "s2-l1c" in batch.layers) == (level == "l2a", level == "l1c")
            raster = batch.raster(name)
            assert raster.sensor.name == table
            assert raster.sensor.names[7:9] == ("B8A", "B08"), "8A stands before 8 in these files"
            own = [mmearth.S2_ORDER.index(band) for band in raster.sensor.names]
            np.testing.assert_allclose(raster.values[0], stored[own] * 1e-4, rtol=1e-6)
            info = json.loads((root / self.NAME / f"{self.NAME}_tile_info.json").read_text())
            entry = info[self.held(root, "metadata", row)["tile_id"].decode()]
            assert raster.time_s[0].tolist() == list(dates.span(entry["S2_DATE"]))
            assert batch.places[0].lonlat == (entry["lon"], entry["lat"])
            assert batch.width_m == 80.0

    def test_one_level_alone_leaves_out_the_places_of_the_other(self, root: Path) -> None:
        counts = [len(mmearth.build(root=root, modalities=[name])) for name in ("s2", "s2-l1c")]
        assert counts == [3, 3]
        assert len(mmearth.build(root=root, modalities=["s2", "s2-l1c"])) == 6

    def test_both_levels_under_one_name(self, root: Path) -> None:
        apart = mmearth.build(root=root)
        for table, count in (("sentinel-2-l2a", 12), ("sentinel-2-l1c", 13)):
            data = mmearth.build(root=root, modalities=["s2"], present_as={"s2": table})
            assert len(data) == 6
            for i in range(6):
                raster, own = data[i].raster("s2"), apart[i].raster("s2-l1c" if apart.l1c[i] else "s2")
                assert (raster.sensor.name, raster.values.shape[1]) == (table, count)
                common = [band for band in raster.sensor.names if band in own.sensor.names]
                assert raster.select(common).values.equal(own.select(common).values)
                assert raster.valid.all(0).all(-1).all(-1).tolist() == [
                    band in own.sensor.names for band in raster.sensor.names
                ]

    def test_radar_by_orbit_without_what_is_not_there(self, root: Path) -> None:
        data = mmearth.build(root=root)
        missing = 0
        for i, row in enumerate(data.rows):
            stored, batch = self.held(root, "sentinel1", row), data[i]
            for name, first, orbit in (("s1-asc", 0, "ascending"), ("s1-des", 4, "descending")):
                if not np.isfinite(stored[first : first + 4]).any():
                    assert name not in batch.layers
                    missing += 1
                    continue
                raster = batch.raster(name)
                assert {(b.orbit, b.unit) for b in raster.sensor.bands} == {(orbit, "dB")}
                assert raster.sensor.names == ("VV", "VH", "HH", "HV")
                assert raster.valid[0, :, 0, 0].tolist() == [True, True, False, False]
                assert raster.values[0, 0].numpy() == pytest.approx(stored[first])
                assert not torch.isfinite(raster.time_s).any()
        assert missing == 2

    def test_no_data_of_maps(self, root: Path) -> None:
        data = mmearth.build(root=root, modalities=["dynamic-world", "canopy-height", "worldcover", "dem", "scl"])
        for i, row in enumerate(data.rows):
            batch = data[i]
            land, stored = batch.raster("dynamic-world"), self.held(root, "dynamic_world", row)
            assert land.valid[0].numpy().tolist() == (stored != 0).tolist()
            assert (land.values[0].numpy() == stored.astype(int) - 1)[stored != 0].all()
            assert land.time_s[0, 1] - land.time_s[0, 0] >= 365 * 86400
            canopy = batch.raster("canopy-height")
            assert canopy.sensor.names == ("canopy_height", "canopy_height_std")
            assert not canopy.valid[..., :2, :].any()
            assert canopy.valid[..., 2:, :].all()
            assert batch.raster("dem").sensor.names == ("elevation", "slope")
            assert ("scl" in batch.layers) == (not data.l1c[i])

    def test_weather_is_three_periods(self, root: Path) -> None:
        data = mmearth.build(root=root, modalities=["era5"])
        i = data.rows.tolist().index(1)
        raster = data[i].raster("era5")
        stored = self.held(root, "era5", 1).reshape(3, 4)
        np.testing.assert_allclose(raster.values[:, :3, 0, 0], stored[[2, 0, 1], :3], rtol=1e-6)
        np.testing.assert_allclose(raster.values[:, 3, 0, 0], 1000 * stored[[2, 0, 1], 3], rtol=1e-5)
        month = dates.span("2018-02")
        assert raster.time_s[1].tolist() == list(dates.span("2018-01"))
        assert raster.time_s[2].tolist() == list(month)
        assert raster.time_s[0].tolist() == [dates.span("2017-02")[0], month[1]]
        holed = data[data.rows.tolist().index(0)].raster("era5")
        assert holed.valid[:, 3, 0, 0].tolist() == [True, False, True], "rain of the month before is NaN"

    def test_codes_of_the_place(self, root: Path) -> None:
        data = mmearth.build(root=root, modalities=["biome", "ecoregion"])
        for i, row in enumerate(data.rows):
            for name, held in (("biome", "biome"), ("ecoregion", "eco_region")):
                raster = data[i].raster(name)
                assert raster.values.shape == (1, 1, 1, 1)
                assert self.held(root, held, row)[int(raster.values.item())] == 1

    def test_clouds_can_be_left_out(self, root: Path) -> None:
        data, every = mmearth.build(root=root, clouds=False), mmearth.build(root=root)
        for i, row in enumerate(data.rows):
            name = "s2-l1c" if data.l1c[i] else "s2"
            hidden = self.held(root, "sentinel2_cloudmask", row)[0] > 0
            if not data.l1c[i]:
                hidden |= np.isin(self.held(root, "sentinel2_scl", row)[0], [3, 8, 9, 10])
            assert hidden.any()
            assert every[i].raster(name).valid.all()
            assert (data[i].raster(name).valid[0].numpy() == ~hidden).all()

    def test_a_split_that_the_list_leaves_empty_is_an_error(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"splits.json lists no places for split='val', only for train\. part="):
            mmearth.build(root=root, split="val")
        parts = [mmearth.build(root=root, part=name, block_m=1e5).rows for name in ("train", "val", "test")]
        assert sorted(np.concatenate(parts).tolist()) == list(range(6))

    def test_what_does_not_fit_is_named(self, root: Path) -> None:
        listing = root / self.NAME / f"{self.NAME}_splits.json"
        listing.write_text(json.dumps({"train": [0, 6]}))
        with pytest.raises(ValueError, match="row 6, but the HDF5 file has 6 places"):
            mmearth.build(root=root)
        listing.write_text(json.dumps({"train": [0]}))
        info = root / self.NAME / f"{self.NAME}_tile_info.json"
        content = json.loads(info.read_text())
        info.write_text(json.dumps(content | {"place_0": content["place_0"] | {"S2_type": "l3"}}))
        with pytest.raises(ValueError, match=r"tile_info.json: place 'place_0' lacks"):
            mmearth.build(root=root)
        info.write_text(json.dumps(content))
        with h5py.File(root / self.NAME / f"{self.NAME}.h5", "r+") as file:
            file["esa_worldcover"][0, 0, 0, 0] = 33
        with pytest.raises(ValueError, match="esa_worldcover holds the code 33"):
            mmearth.build(root=root, modalities=["worldcover"])[0]

    def test_the_folder_itself_is_a_root_and_the_rows_are_in_the_fingerprint(self, root: Path) -> None:
        data = mmearth.build(root=root / self.NAME)
        assert data.fingerprint() == mmearth.build(root=root).fingerprint()
        assert data.fingerprint() != mmearth.build(root=root, clouds=False).fingerprint()
        assert data.fingerprint() != mmearth.build(root=root, modalities=["s2"]).fingerprint()
        assert math.isclose(data.rows.sum(), 15)


class TestWorldStrat:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return made(worldstrat, tmp_path, revisits=4)

    def test_pixels_and_days_are_those_of_the_files(self, root: Path) -> None:
        data = worldstrat.build(root=root, modalities=[n for n in worldstrat.LAYERS if n != "label"], split="test")
        table = pd.read_csv(root / "metadata.csv", index_col=0)
        for i, site in enumerate(data.sites):
            batch, lines = data[i], table.loc[site.name].set_index("n")
            order = sorted(lines.index, key=lambda n: lines["lowres_date"][n])
            assert order != sorted(order), "revisits are numbered by cloud or nearness, not by day"
            for name, level, count in (("s2", "L2A", 12), ("s2-l1c", "L1C", 13)):
                raster = batch.raster(name)
                assert raster.time_s.tolist() == [list(dates.span(lines["lowres_date"][n])) for n in order]
                for k, n in enumerate(order):
                    path = root / "lr_dataset" / site.name / level / f"{site.name}-{n}-{level}_data.tiff"
                    stored = arrays.tiff(path)[0]
                    assert stored.shape[0] == count
                    assert raster.values[k].numpy() == pytest.approx(stored)
                    assert (raster.valid[k].numpy() == (stored != 0).any(0)).all()
            for name, ending, gsd in (("spot", "ps", 1.5), ("spot-ms", "rgbn", 6.0), ("spot-pan", "pan", 1.5)):
                raster = batch.raster(name)
                stored = arrays.tiff(root / "hr_dataset" / site.name / f"{site.name}_{ending}.tiff")[0]
                assert (raster.values[0].numpy() == stored).all()
                assert raster.time_s[0].tolist() == list(dates.span(lines["highres_date"].iloc[0]))
                assert raster.gsd_m == gsd
            assert batch.raster("spot").sensor.names == ("red", "green", "blue", "nir")
            assert batch.places[0].lonlat == pytest.approx(tuple(lines.iloc[0][["lon", "lat"]]))

    def test_the_training_part_neither_holds_nor_touches_what_is_tested(self, root: Path) -> None:
        def names(split: str, **options) -> list[str]:
            return [site.name for site in worldstrat.build(root=root, split=split, **options).sites]

        assert names("train") == ["Landcover-773616", "ASMSpotter-2-1-1"]
        assert names("train", published_split=True) == ["Landcover-773616", "ASMSpotter-1-1-1", "ASMSpotter-2-1-1"]
        assert names("test") == names("test", published_split=True) == ["Landcover-771433", "ASMSpotter-1-1-2"]
        listed = pd.read_csv(root / worldstrat.SPLIT_FILE, index_col=0)
        listed.loc[len(listed)] = {**listed.iloc[0], "split": "test"}
        listed.to_csv(root / worldstrat.SPLIT_FILE)
        assert names("train") == ["ASMSpotter-2-1-1"]
        assert "Landcover-773616" in names("test")

    @pytest.mark.parametrize(
        ("name", "ground"),
        [
            ("Amnesty POI-20-2-2", "Amnesty POI-20"),
            ("ASMSpotter-7-2-1", "ASMSpotter-7"),
            ("Landcover-743-0", "Landcover-743-0"),
            ("UNHCR-GHAs003590", "UNHCR-GHAs003590"),
        ],
    )
    def test_neighbours_have_a_name_in_common(self, name: str, ground: str) -> None:
        assert worldstrat._ground(name) == ground

    def test_parts_make_up_the_site(self, tmp_path: Path) -> None:
        root = made(worldstrat, tmp_path, side_m=90.0)
        whole, parts = worldstrat.build(root=root), worldstrat.build(root=root, parts=2)
        assert len(parts) == 4 * len(whole)
        quarters = [parts[4 + i] for i in range(4)]
        for name in ("spot", "s2"):
            full = whole[1].raster(name).values
            size = full.shape[-1] // 2
            for i, quarter in enumerate(quarters):
                values = quarter.raster(name).values
                assert values.shape[-2:] == (size, size)
                row, column = (round(full.shape[-1] * k / 2) for k in divmod(i, 2))
                assert values.equal(full[..., row : row + size, column : column + size])
        lons, lats = zip(*(quarter.places[0].lonlat for quarter in quarters), strict=True)
        lon, lat = whole[1].places[0].lonlat
        assert (np.mean(lons), np.mean(lats)) == pytest.approx((lon, lat))
        assert lats[0] > lat > lats[2]
        assert lons[0] < lon < lons[1]
        assert (lats[0] - lats[2]) * 111195 == pytest.approx(45.0)

    def test_clouds_by_scene_and_by_pixel(self, root: Path) -> None:
        every = worldstrat.build(root=root, modalities=["s2"])
        some = worldstrat.build(root=root, modalities=["s2"], max_cloud=20.0)
        assert [n for n, _ in every.sites[0].revisits] == [1, 2, 3, 4]
        assert [n for n, _ in some.sites[0].revisits] == [1, 3, 4]
        assert [n for n, _ in worldstrat.build(root=root, revisits=2).sites[0].revisits] == [1, 2]
        site = every.sites[0]
        clear = worldstrat.build(root=root, modalities=["s2"], clouds=False)[0].raster("s2")
        masks = {
            day[0]: arrays.tiff(root / "lr_dataset" / site.name / "L2A" / f"{site.name}-{n}-CLM.tiff")[0][0]
            for n, day in site.revisits
        }
        seen = every[0].raster("s2").valid.numpy()
        for k, start in enumerate(clear.time_s[:, 0].tolist()):
            assert (clear.valid[k].numpy() == (seen[k] & (masks[start] != 1))).all()

    def test_what_is_missing_is_named_or_left_out_when_allowed(self, root: Path) -> None:
        name = worldstrat.build(root=root).sites[0].name
        (root / "lr_dataset" / name / "L2A" / f"{name}-2-L2A_data.tiff").unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}-2-L2A_data"):
            worldstrat.build(root=root)[0]
        assert len(worldstrat.build(root=root, allow_missing=True)[0].raster("s2").row) == 3
        shutil.rmtree(root / "lr_dataset" / name)
        shutil.rmtree(root / "hr_dataset" / name)
        assert len(worldstrat.build(root=root, allow_missing=True)) == len(worldstrat.build(root=root)) - 1
        (root / "hr_dataset").rename(root / "12bit")
        (root / "hr_dataset").mkdir()
        (root / "12bit").rename(root / "hr_dataset" / "12bit")
        left = worldstrat.build(root=root, allow_missing=True)
        assert {"spot", "s2"} < set(left[0].layers), "the folder within, as in the archive at Kaggle"

    def test_a_site_without_a_class_is_not_labelled_and_an_unknown_one_is_an_error(self, root: Path) -> None:
        path = root / worldstrat.SPLIT_FILE
        text = path.read_text()
        path.write_text(text.replace("773616,Agriculture", "773616,"))
        assert not worldstrat.build(root=root)[0].raster("label").valid.any()
        assert worldstrat.build(root=root)[1].raster("label").valid.all()
        path.write_text(text.replace("773616,Agriculture", "773616,Tundra"))
        with pytest.raises(ValueError, match="'Landcover-773616' is of the class 'Tundra'"):
            worldstrat.build(root=root)

    def test_digital_numbers_are_told_from_reflectance(self, root: Path) -> None:
        for path in (root / "lr_dataset").rglob("*-L2A_data.tiff"):
            values = arrays.tiff(path)[0]
            path.unlink()
            arrays.write_tiff(path, (values * 1e4).astype(np.uint16))
        with pytest.raises(ValueError, match=r"L2A_data.tiff.*stored='numbers'"):
            worldstrat.build(root=root)[0]
        raster = worldstrat.build(root=root, stored="numbers")[0].raster("s2")
        assert 0.2 < raster.values[raster.valid].mean() < 0.4
