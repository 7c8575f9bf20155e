"""BigEarthNet, SpaceNet7 and BioMassters beyond the laws of tests/data/test_published.py: values against the bytes of the files, also
of the real samples of GEO-Bench-2, put back into the published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rasterio.io import MemoryFile
from tortilla import members

from everysat.data import bigearthnet
from everysat.data.batches import Dataset
from everysat.io import arrays, dates


def made(module, folder: Path, **options) -> Path:
    module.fake(folder, **options)
    return folder


def image(content: bytes) -> np.ndarray:
    with MemoryFile(content) as memory, memory.open() as file:
        return file.read()


class TestBigEarthNet:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return made(bigearthnet, tmp_path)

    def test_bands_are_joined_in_order_and_keep_their_values(self, root: Path) -> None:
        data = bigearthnet.build(root=root)
        for i, patch in enumerate(data.patches):
            raster = data[i].raster("s2")
            assert raster.sensor.names == bigearthnet.S2_BANDS
            assert raster.values.shape == (1, 12, 120, 120)
            for k, band in enumerate(raster.sensor.names):
                path = next(root.rglob(f"{patch}_{band}.tif"))
                assert path.parent.parent.name == patch.rsplit("_", 2)[0]
                stored = arrays.tiff(path)[0][0]
                side = {20: 6, 60: 2, 120: 1}[len(stored)]
                values = raster.values[0, k].numpy()
                if side == 1:
                    np.testing.assert_allclose(values, stored * 1e-4, rtol=1e-6)
                coarse = values.reshape(len(stored), side, len(stored), side).mean((1, 3))
                assert np.corrcoef(coarse.ravel(), stored.ravel())[0, 1] > 0.9
            assert raster.valid.all()

    def test_native_bands_stay_as_they_are(self, root: Path) -> None:
        data = bigearthnet.build("native", root=root)
        batch = data[0]
        for name, gsd_m, side in (("s2", 10.0, 120), ("s2-20m", 20.0, 60), ("s2-60m", 60.0, 20)):
            raster = batch.raster(name)
            assert raster.sensor.names == bigearthnet.BANDS[gsd_m]
            assert (raster.gsd_m, raster.values.shape[-1]) == (gsd_m, side)
            for k, band in enumerate(raster.sensor.names):
                stored = arrays.tiff(next(root.rglob(f"{data.patches[0]}_{band}.tif")))[0][0]
                np.testing.assert_allclose(raster.values[0, k], stored * 1e-4, rtol=1e-6)

    def test_radar_and_days_are_those_of_the_twin(self, root: Path) -> None:
        data = bigearthnet.build(root=root, modalities=["s1"])
        for i, twin in enumerate(data.twins):
            batch = data[i]
            raster = batch.raster("s1")
            assert raster.sensor.names == ("VV", "VH")
            for k, band in enumerate(("VV", "VH")):
                assert (raster.values[0, k].numpy() == arrays.tiff(next(root.rglob(f"{twin}_{band}.tif")))[0][0]).all()
            assert raster.time_s[0].tolist() == list(dates.span(twin.split("_")[4][:8]))
            assert batch.places[0].geobox is not None

    def test_labels_of_scene_and_map(self, root: Path) -> None:
        table = pd.read_parquet(root / bigearthnet.TABLE).set_index("patch_id")
        scene, per_pixel = bigearthnet.build(root=root), bigearthnet.build(root=root, labels="map")
        for i, patch in enumerate(scene.patches):
            raster = scene[i].raster("label")
            there = [name for name, value in zip(raster.sensor.names, raster.values[0, :, 0, 0], strict=True) if value]
            assert sorted(there) == sorted(table.loc[patch, "labels"])
            label = per_pixel[i].raster("label")
            codes = arrays.tiff(next(root.rglob(f"{patch}_reference_map.tif")))[0]
            assert (label.valid[0].numpy() == ~np.isin(codes, bigearthnet.UNLABELLED_CODES)).all()
            for code, name in (
                (112, "Urban fabric"),
                (241, "Permanent crops"),
                (333, bigearthnet.CLASSES[11]),
                (523, "Marine waters"),
            ):
                assert (label.values[0].numpy()[codes == code] == bigearthnet.CLASSES.index(name)).all()
        path = next(root.rglob(f"{scene.patches[0]}_reference_map.tif"))
        arrays.write_tiff(path, np.full((1, 120, 120), 7, np.uint16))
        with pytest.raises(ValueError, match=r"reference_map.tif holds the code 7"):
            bigearthnet.build(root=root, labels="map")[0]

    def test_every_code_of_corine_is_one_class_or_none(self) -> None:
        codes = [code for group in bigearthnet.CORINE.values() for code in group] + list(bigearthnet.UNLABELLED_CODES)
        assert len(codes) == len(set(codes)) == 45, "44 classes, and 999"

    def test_patches_that_are_hard_to_see_are_left_out_unless_asked_for(self, root: Path) -> None:
        assert [len(bigearthnet.build(root=root, split=name, hard=hard)) for name in bigearthnet.SPLITS for hard in (False, True)] == [
            2, 3, 2, 2, 2, 2,
        ]  # fmt: skip
        (root / bigearthnet.HARD).unlink()
        with pytest.raises(FileNotFoundError, match="snow_cloud"):
            bigearthnet.build(root=root, hard=True)
        assert len(bigearthnet.build(root=root)) == 2

    def test_what_does_not_fit_is_named(self, root: Path) -> None:
        data = bigearthnet.build(root=root)
        path = next(root.rglob(f"{data.patches[0]}_B05.tif"))
        arrays.write_tiff(path, np.ones((1, 120, 120), np.uint16))
        with pytest.raises(ValueError, match=r"_B05.tif holds \(1, 120, 120\), expected \(1, 60, 60\)"):
            data[0]
        table = pd.read_parquet(root / bigearthnet.TABLE)
        table.drop(columns="s1_name").to_parquet(root / bigearthnet.TABLE)
        with pytest.raises(ValueError, match=r"metadata\.parquet lacks the columns s1_name"):
            bigearthnet.build(root=root)
        table.at[0, "labels"] = ["Glaciers"]
        table.to_parquet(root / bigearthnet.TABLE)
        with pytest.raises(ValueError, match="'Glaciers', which is none of the 19"):
            bigearthnet.build(root=root)

    def test_real_patches(self, data_dir: Path, tmp_path: Path) -> None:
        """Bands of 20 and 60 m are means of what GEO-Bench-2 interpolated, and the name of the twin is made up: it is not given there."""
        rows = []
        for row, content in members((data_dir / "geobench2_mini" / "benv2.tortilla").read_bytes()):
            inner = {facts["tortilla:id"]: image(part) for facts, part in members(content)}
            rows.append((row, inner["s1"], inner["s2"]))
            self.put_back(tmp_path, row, inner["s1"], inner["s2"])
        table = [
            {
                **{key: row[key] for key in ("patch_id", "labels", "country")},
                "split": "train",
                "s1_name": self.twin(row),
            }
            for row, _, _ in rows
        ]
        pd.DataFrame(table).to_parquet(tmp_path / bigearthnet.TABLE)
        data: Dataset = bigearthnet.build(root=tmp_path)
        assert len(data) == len(rows) == 9
        for i, (row, s1, s2) in enumerate(rows):
            batch = data[i]
            assert batch.places[0].lonlat == pytest.approx((row["lon"], row["lat"]), abs=1e-5)
            optical = batch.raster("s2")
            assert optical.time_s[0, 0] == row["stac:time_start"]
            for band in bigearthnet.BANDS[10.0]:
                stored = s2[bigearthnet.S2_BANDS.index(band)]
                np.testing.assert_allclose(optical.select([band]).values[0, 0], stored * 1e-4, rtol=1e-6)
            np.testing.assert_allclose(optical.values[0].mean((1, 2)), s2.mean((1, 2)) * 1e-4, rtol=0.01)
            assert optical.values.min() < 0.03, "no offset: some band is nearly black in every patch"
            vv, vh = batch.raster("s1").values[0]
            assert (vv.numpy() == s1[1]).all()
            assert vv.mean() - vh.mean() > 4, "co-polarised is the stronger"
            label = batch.raster("label")
            assert int(label.values.sum()) == len(row["labels"])
        water = [i for i, (row, _, _) in enumerate(rows) if list(row["labels"]) == ["Marine waters"]]
        assert len(water) == 4
        for i in water:
            nir = data[i].raster("s2").select(["B08"]).values
            assert nir.median() < 0.03

    def twin(self, row: dict[str, Any]) -> str:
        level, day, *_, tile, column, line = row["patch_id"].split("_")[1:]
        assert level == "MSIL2A"
        return f"S1A_IW_GRDH_1SDV_{day}_{tile[1:]}_{column}_{line}"

    def put_back(self, folder: Path, row: dict[str, Any], s1: np.ndarray, s2: np.ndarray) -> None:
        """The files of a patch; the sample holds VH before VV, as alphabetical order has it."""
        west, _, _, north, _, _ = row["stac:geotransform"]
        patch, twin = row["patch_id"], self.twin(row)
        facts: dict[str, Any] = {"crs": row["stac:crs"], "corner": (west, north)}
        for gsd_m, names in bigearthnet.BANDS.items():
            side = round(gsd_m / 10)
            for band in names:
                whole = s2[bigearthnet.S2_BANDS.index(band)].reshape(120 // side, side, 120 // side, side)
                path = folder / "BigEarthNet-S2" / patch.rsplit("_", 2)[0] / patch / f"{patch}_{band}.tif"
                arrays.write_tiff(path, whole.mean((1, 3)).round().astype(np.uint16)[None], gsd_m=gsd_m, **facts)
        for band, values in zip(("VH", "VV"), s1, strict=True):
            path = folder / "BigEarthNet-S1" / twin.rsplit("_", 3)[0] / twin / f"{twin}_{band}.tif"
            arrays.write_tiff(path, values[None], gsd_m=10.0, **facts)
