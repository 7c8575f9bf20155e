"""BigEarthNet and SpaceNet7 beyond the laws of tests/data/test_published.py: values against the bytes of the files, also
of the real samples of GEO-Bench-2, put back into the published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from affine import Affine
from rasterio.features import rasterize, shapes
from rasterio.io import MemoryFile
from shapely.geometry import Polygon, box, shape
from tortilla import members

from everysat.data import bigearthnet, spacenet7
from everysat.data.batches import Dataset
from everysat.io import arrays, dates, grid


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


class TestSpaceNet7:
    FIRST = "L15-0331E-1257N_1327_3160_13"

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return made(spacenet7, tmp_path)

    def test_parts_are_the_published_places_and_disjoint(self, root: Path) -> None:
        assert [len(spacenet7.SITES[name]) for name in ("train", "val", "test")] == [30, 15, 14]
        assert len({site for sites in spacenet7.SITES.values() for site in sites}) == 59
        counts = [len(spacenet7.build(root=root, split=name)) for name in spacenet7.SPLITS]
        assert counts == [31, 16, 15, 2]

    def test_pixels_months_and_outlines_are_those_of_the_files(self, root: Path) -> None:
        data = spacenet7.build(root=root)
        for i in range(3):
            path = root / data.items[i][0]
            stored = arrays.tiff(path)[0]
            planet, label = data[i].raster("planet"), data[i].raster("label")
            assert (planet.values[0].numpy() == stored[:3]).all()
            assert (planet.valid[0].numpy() == (stored[3] > 0)).all()
            year, month = path.name.split("_")[2:4]
            assert planet.time_s[0].tolist() == label.time_s[0].tolist() == list(dates.span(f"{year}-{month}"))
            outline = arrays.parsed(path.parent.parent / "labels_match_pix" / f"{path.stem}_Buildings.geojson")[
                "features"
            ][0]
            west, north, east, south = (int(edge) for edge in shape(outline["geometry"]).bounds)
            expected = np.zeros(stored.shape[1:])
            expected[north:south, west:east] = 1
            assert (label.values[0, 0].numpy() == expected).all()
            assert label.valid.equal(planet.valid[:, :1])
        assert spacenet7.build(root=root)[1].raster("planet").valid[..., :2, :].any().item() is False, (
            "clouds of the second month"
        )

    def test_all_months_of_a_place(self, root: Path) -> None:
        data, months = spacenet7.build("series", root=root), spacenet7.build(root=root)
        assert len(data) == 30
        batch = data[0]
        for name in ("planet", "label"):
            whole = batch.raster(name)
            assert len(whole.row) == 2
            for k in range(2):
                one = months[k].raster(name)
                assert whole.values[k].equal(one.values[0])
                assert whole.valid[k].equal(one.valid[0])
                assert whole.time_s[k].equal(one.time_s[0])

    def test_outlines_are_filled_as_rasterio_fills_them(self) -> None:
        rng = np.random.default_rng(0)
        outlines = []
        for centre in rng.uniform(-3, 67, (80, 2)):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
            reach = rng.uniform(0.2, 9, 9)
            outlines.append(Polygon(centre + np.stack([reach * np.cos(angles), reach * np.sin(angles)], -1)).buffer(0))
        outlines += [box(10, 10, 40, 30).difference(box(15, 15, 20, 20)), box(-5, -5, -1, 70), box(3.1, 3.1, 3.2, 3.2)]
        expected = rasterize(
            outlines, out_shape=(64, 48), transform=Affine.translation(0, 0) * Affine.scale(1.0), dtype="uint8"
        )
        assert (spacenet7._covered(np.array(outlines, dtype=object), (64, 48)) == expected).all()
        assert 0.2 < expected.mean() < 0.9

    def test_months_with_clouds_can_be_left_out(self, root: Path) -> None:
        clear = spacenet7.build(root=root, cloudy=False)
        assert len(clear) == 30
        assert not any("_02_" in name for item in clear.items for name in item)

    def test_tiles_make_up_the_image_and_lie_where_it_does(self, root: Path) -> None:
        whole, tiles = spacenet7.build(root=root, gsd_m=None)[0], spacenet7.build(root=root, tile_px=16, gsd_m=None)
        assert len(tiles) == 4 * 31
        parts = [tiles[i] for i in range(4)]
        for name in ("planet", "label"):
            rows = [torch.cat([parts[2 * r + c].raster(name).values for c in (0, 1)], -1) for r in (0, 1)]
            assert torch.cat(rows, -2).equal(whole.raster(name).values)
        box = whole.places[0].geobox
        assert box is not None
        for i, part in enumerate(parts):
            row, column = divmod(i, 2)
            assert part.places[0].geobox == grid.crop(
                box, slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16)
            )
        with pytest.raises(ValueError, match="tile_px=12 must divide 32"):
            spacenet7.build(root=root, tile_px=12)

    def test_the_true_size_of_a_pixel_is_smaller_towards_the_poles(self, root: Path) -> None:
        for i in (0, 1, 5):
            batch = spacenet7.build(root=root, gsd_m=None)[i]
            lat = batch.places[0].lonlat[1]
            assert batch.raster("planet").gsd_m == pytest.approx(4.777 * np.cos(np.radians(lat)), rel=0.01)
            assert spacenet7.build(root=root)[i].raster("planet").gsd_m == 4.0

    def test_what_does_not_fit_is_named(self, root: Path) -> None:
        base = root / "train" / self.FIRST
        label = next((base / "labels_match_pix").glob("*_01_*"))
        whole = label.read_text()
        label.write_text(whole.replace("coordinates", "corners"))
        with pytest.raises(ValueError, match=r"_Buildings\.geojson is no collection of outlines"):
            spacenet7.build(root=root)[0]
        outline = {"type": "Polygon", "coordinates": [[[-112.0, 40.4], [-111.9, 40.4], [-111.9, 40.5], [-112.0, 40.4]]]}
        arrays.write_json(label, {"features": [{"geometry": outline}]})
        with pytest.raises(ValueError, match="labels_match_pix is the right one"):
            spacenet7.build(root=root)[0]
        outline["coordinates"] = [[[4.6, 2.6], [7.4, 2.6], [7.4, 4.4], [4.6, 4.4], [4.6, 2.6]]]
        arrays.write_json(label, {"features": [{"geometry": outline}]})
        found = spacenet7.build(root=root)[0].raster("label").values[0, 0].nonzero().tolist()
        assert found == [[3, 5], [3, 6]], "pixels whose centre is inside"
        arrays.write_json(label, {"features": [{"geometry": None}]})
        assert not spacenet7.build(root=root)[0].raster("label").values.any()
        image_path = next((base / "images_masked").glob("*_01_*"))
        image_path.rename(image_path.with_name("january.tif"))
        with pytest.raises(ValueError, match=r"january\.tif: its name is not global_monthly"):
            spacenet7.build(root=root)
        for path in (base / "images_masked").iterdir():
            path.unlink()
        with pytest.raises(FileNotFoundError, match=f"train/{self.FIRST}/images_masked"):
            spacenet7.build(root=root)

    def test_real_tiles(self, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Quarters of images, with outlines drawn around the buildings of their masks."""
        found = []
        for row, content in members((data_dir / "geobench2_mini" / "spacenet7.tortilla").read_bytes()):
            inner = {facts["tortilla:id"]: image(part) for facts, part in members(content)}
            found.append((row, inner["images"], inner["mask"][0]))
        assert len(found) >= 4
        for row, pixels, mask in found:
            base, name = tmp_path / "train" / row["aoi"], Path(row["source_img_file"]).stem
            west, gsd_m, _, north, _, _ = row["stac:geotransform"]
            arrays.write_tiff(
                base / "images_masked" / f"{name}.tif", pixels, crs="EPSG:3857", corner=(west, north), gsd_m=gsd_m
            )
            outlines = [{"geometry": outline} for outline, value in shapes(mask) if value]
            arrays.write_json(base / "labels_match_pix" / f"{name}_Buildings.geojson", {"features": outlines})
        sites = sorted({row["aoi"] for row, _, _ in found})
        published = {site for part in spacenet7.SITES.values() for site in part}
        monkeypatch.setitem(spacenet7.SITES, "train", tuple(site[4:-3] for site in sites))
        data = spacenet7.build(root=tmp_path)
        facts = {Path(row["source_img_file"]).name: (row, pixels, mask) for row, pixels, mask in found}
        assert len(data) == len(facts)
        for i in range(len(data)):
            row, pixels, mask = facts[Path(data.items[i][0]).name]
            batch = data[i]
            planet, label = batch.raster("planet"), batch.raster("label")
            assert (planet.values[0].numpy() == pixels[:3]).all()
            assert (label.values[0, 0].numpy() == mask).all()
            assert planet.time_s[0, 0] == row["stac:time_start"]
            assert batch.places[0].lonlat == pytest.approx((row["lon"], row["lat"]), abs=0.05)
            column, line = (int(n) for n in row["aoi"].split("_")[1:3])
            tile_m = 2 * 20037508.342789244 / 2**13
            assert row["stac:geotransform"][0] - (column - 4096) * tile_m < tile_m, "the name says where the place lies"
            assert (4096 - line) * tile_m - row["stac:geotransform"][3] < tile_m
            assert row["aoi"][4:-3] in published, "the places of GEO-Bench-2 are those of the lists here"
            red, green, blue = planet.values[0].mean((1, 2))
            assert planet.valid.float().mean() > 0.5
            assert max(red, green, blue) < 255
