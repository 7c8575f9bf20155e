"""BioMassters beyond the laws of tests/data/test_published.py: values against the bytes of the files, also of the real samples of
GEO-Bench-2, put back into the published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio.io import MemoryFile
from tortilla import members

from everysat.data import biomassters
from everysat.io import arrays, dates


def image(content: bytes) -> np.ndarray:
    with MemoryFile(content) as memory, memory.open() as file:
        return file.read()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    biomassters.fake(tmp_path)
    return tmp_path


def test_pixels_and_months_are_those_of_the_files(root: Path) -> None:
    for split in biomassters.SPLITS:
        data = biomassters.build(root=root, split=split)
        part = "test" if split == "test" else "train"
        for i, (chip, radar, optical) in enumerate(data.chips):
            batch = data[i]
            assert radar == tuple(range(12))
            assert optical == tuple(m for m in range(12) if m != 3), "no December"
            s2 = batch.raster("s2")
            assert [dates.label(tuple(t))[:7] for t in s2.time_s.tolist()][:4] == [
                "2019-09",
                "2019-10",
                "2019-11",
                "2020-01",
            ]
            for k, month in enumerate(optical):
                stored = arrays.tiff(root / f"{part}_features" / f"{chip}_S2_{month:02d}.tif")[0]
                np.testing.assert_allclose(s2.values[k], stored[:10] * 1e-4, rtol=1e-6)
            for name, first in (("s1-asc", 0), ("s1-des", 2)):
                pair = [
                    arrays.tiff(root / f"{part}_features" / f"{chip}_S1_{m:02d}.tif")[0][first : first + 2]
                    for m in radar
                ]
                assert (name in batch.layers) == bool((pair[0] != -9999).all())
                if name in batch.layers:
                    raster = batch.raster(name)
                    assert raster.sensor.names == ("VV", "VH")
                    assert raster.values.numpy() == pytest.approx(np.stack(pair))
                    assert raster.time_s[0].tolist() == list(dates.span("2019-09"))
                    assert raster.time_s[-1].tolist() == list(dates.span("2020-08"))
            target = arrays.tiff(root / f"{part}_agbm" / f"{chip}_agbm.tif")[0]
            label = batch.raster("label")
            assert (label.values[0].numpy() == target).all()
            assert label.sensor.bands[0].unit == "t ha-1"


def test_validation_is_drawn_by_chip_or_listed(root: Path) -> None:
    def chips(split: str) -> list[str]:
        return [chip for chip, _, _ in biomassters.build(root=root, split=split).chips]

    train, val = chips("train"), chips("val")
    assert (len(train), len(val)) == (2, 2)
    for name, listed in (("train", [val[0]]), ("val", train), ("test", chips("test")[:1])):
        arrays.write_text(root / f"{name}_Data_list.csv", "chip_id\n" + "\n".join(listed) + "\n")
    assert (chips("train"), chips("val"), len(chips("test"))) == ([val[0]], train, 1)
    (root / biomassters.TABLES[0]).unlink()
    assert chips("val") == train, "the months that are there, where no table lists them"
    arrays.write_text(root / "val_Data_list.csv", "chip_id\n00000007\n")
    with pytest.raises(FileNotFoundError, match="train_features has no image of 00000007"):
        chips("val")
    (root / "val_Data_list.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv or val_Data_list\.csv is missing"):
        chips("val")


def test_identifiers_of_digits_stay_text(root: Path) -> None:
    table = root / biomassters.TABLES[0]
    chip = biomassters.build(root=root).chips[0][0]
    table.write_text(table.read_text().replace(chip, "00051241"))
    for path in [*root.rglob(f"{chip}_*")]:
        path.rename(path.with_name(path.name.replace(chip, "00051241")))
    arrays.write_text(root / "train_Data_list.csv", "chip_id\n00051241\n")
    data = biomassters.build(root=root)
    assert [entry[0] for entry in data.chips] == ["00051241"]
    assert {"s2", "label"} < set(data[0].layers)


def test_a_test_without_target_is_not_labelled(root: Path) -> None:
    for path in (root / "test_agbm").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"_agbm\.tif"):
        biomassters.build(root=root, split="test")[0]
    (root / "test_agbm").rmdir()
    assert "label" not in biomassters.build(root=root, split="test")[0].layers


def test_clouds_and_nan_are_invalid(root: Path) -> None:
    data = biomassters.build(root=root, max_cloud=30)
    chip, _, optical = data.chips[0]
    raster = data[0].raster("s2")
    for k, month in enumerate(optical):
        cloud = arrays.tiff(root / "train_features" / f"{chip}_S2_{month:02d}.tif")[0][10]
        assert (raster.valid[k, 0].numpy() == (cloud <= 30)).all()
    path = root / "train_agbm" / f"{chip}_agbm.tif"
    target = arrays.tiff(path)[0].copy()
    target[0, :3] = np.nan
    path.unlink()
    arrays.write_tiff(path, target)
    assert (~biomassters.build(root=root)[0].raster("label").valid[0, 0]).sum() == 3 * target.shape[-1]


def test_under_the_name_that_anysat_reads(root: Path) -> None:
    table = {"s1-asc": "sentinel-1-grd", "s1-des": "sentinel-1-grd"}
    own, shown = (biomassters.build(root=root, present_as=p)[0].raster("s1-asc") for p in (None, table))
    assert own.sensor.bands[0].orbit == "ascending"
    assert (shown.sensor.name, shown.sensor.names) == ("sentinel-1-grd", ("VV", "VH", "ratio"))
    torch.testing.assert_close(shown.values[:, 2], own.values[:, 0] / own.values[:, 1])
    assert shown.valid.all()


def test_what_does_not_fit_is_named(root: Path) -> None:
    data = biomassters.build(root=root)
    chip = data.chips[0][0]
    path = root / "train_features" / f"{chip}_S2_05.tif"
    path.unlink()
    arrays.write_tiff(path, np.ones((11, 8, 8), np.uint16))
    with pytest.raises(ValueError, match=r"_S2_05\.tif holds"):
        data[0]
    path = root / "train_agbm" / f"{chip}_agbm.tif"
    path.unlink()
    arrays.write_tiff(path, np.ones((1, 8, 8), np.float32))
    with pytest.raises(ValueError, match="differ in size"):
        biomassters.build(root=root, modalities=["s1-asc"])[0]
    table = root / biomassters.TABLES[0]
    table.write_text(table.read_text().replace(f"{chip}_S1_11.tif", f"{chip}_S1_12.tif"))
    with pytest.raises(ValueError, match=r"has the file '\d+_S1_12.tif', expected"):
        biomassters.build(root=root)


def test_real_places(data_dir: Path, tmp_path: Path) -> None:
    chips = {}
    for _, content in members((data_dir / "geobench2_mini" / "biomassters.tortilla").read_bytes()):
        inner = {facts["tortilla:id"]: image(part) for facts, part in members(content)}
        chip = next(iter(inner)).split("_")[0]
        chips[chip] = inner
        for name, pixels in inner.items():
            if name.endswith("AGBM"):
                arrays.write_tiff(tmp_path / "train_agbm" / f"{chip}_agbm.tif", pixels)
            else:
                satellite, month = name.split("_")[1:]
                number = biomassters.MONTHS.index(month)
                arrays.write_tiff(tmp_path / "train_features" / f"{chip}_{satellite}_{number:02d}.tif", pixels)
    arrays.write_text(tmp_path / "train_Data_list.csv", "chip_id\n" + "\n".join(chips) + "\n")
    data = biomassters.build(root=tmp_path)
    assert len(data) == len(chips) >= 4
    one_orbit = 0
    for i, (chip, inner) in enumerate(chips.items()):
        batch = data[i]
        one_orbit += len({"s1-asc", "s1-des"} & set(batch.layers)) == 1
        for name in ("s1-asc", "s1-des"):
            if name in batch.layers:
                raster = batch.raster(name)
                vv, vh = (raster.values[:, k][raster.valid[:, k]] for k in (0, 1))
                assert 4 < vv.median() - vh.median() < 12, f"{chip}: co-polarised is the stronger"
        clear = biomassters.build(root=tmp_path, max_cloud=5)[i].raster("s2")
        summer = clear.obs(clear.time_s[:, 0] >= dates.span("2020-06")[0])
        red, nir = (part.values[part.valid].median() for part in map(summer.select, (["B04"], ["B08"])))
        assert nir > 3 * red, "forest in summer: the order of the bands is right"
        label = batch.raster("label")
        assert (label.values[0].numpy() == inner[f"{chip}_AGBM"]).all()
        assert 5 < label.values.mean() < 300, "tonnes per hectare"
    assert one_orbit >= 1
