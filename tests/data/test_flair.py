"""FLAIR: official parts, classes, height, and the window of Sentinel-2 around a place, on real and on synthetic places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tortilla import members

from everysat.data import flair
from everysat.data.flair import build
from everysat.io import arrays


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flair")
    flair.fake(folder, places=9)
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def mask(root: Path, data: flair.Flair, index: int = 0) -> np.ndarray:
    path = root / "flair_labels_train" / data.images[index].replace("/img/IMG", "/msk/MSK")
    return arrays.tiff(path)[0][0]


def test_validation_is_the_official_domains(root: Path) -> None:
    domains = {
        (v, s): {image[:4] for image in build(v, root=root, split=s).images} for v in ("", "1") for s in flair.SPLITS
    }
    assert domains["", "val"] == domains["1", "val"] == {"D004"}
    assert domains["", "train"] == domains["1", "train"] == {"D006"}
    assert (domains["", "test"], domains["1", "test"]) == ({"D015"}, {"D012"})
    assert len(flair.VAL_DOMAINS) == 8


def test_the_first_edition_tests_without_sentinel2(root: Path) -> None:
    assert set(build("1", root=root, split="test")[0].layers) == {"aerial-flair", "label"}
    assert set(build("1", root=root)[0].layers) == {"aerial-flair", "s2", "label"}
    with pytest.raises(LookupError, match="modalities='s2'"):
        build("1", root=root, split="test", modalities=["s2"])


def test_the_fifth_band_is_height_in_metres(root: Path) -> None:
    data = build(root=root, modalities=["aerial-flair"])
    stored = arrays.tiff(root / "flair_aerial_train" / data.images[0])[0].astype(np.float32)
    raster = data[0].raster("aerial-flair")
    np.testing.assert_allclose(raster.values[0].numpy(), stored * np.array([1, 1, 1, 1, 0.2])[:, None, None], rtol=1e-6)
    assert raster.sensor.names == ("red", "green", "blue", "nir", "elevation")


def test_real_places(data_dir: Path, tmp_path: Path) -> None:
    for i, (facts, sample) in enumerate(members((data_dir / "geobench2_mini" / "flair2.tortilla").read_bytes())):
        for row, member in members(sample):
            kind, folder, prefix = {"aerial": ("aerial", "img", "IMG"), "mask": ("labels", "msk", "MSK")}[
                row["tortilla:id"]
            ]
            path = tmp_path / f"flair_{kind}_train" / "D055_2018" / "Z2_UF" / folder / f"{prefix}_{i:06d}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(member)
        batch = build(root=tmp_path, modalities=["aerial-flair"])[i]
        assert batch.raster("label").valid.float().mean() > 0.5
        assert batch.places[0].lonlat == pytest.approx((facts["lon"], facts["lat"]), abs=0.001)
        assert str(batch.places[0].geobox.crs) == "EPSG:2154"
    data = build(root=tmp_path, modalities=["aerial-flair"])
    height, tall = (torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    for i in range(len(data)):
        label = data[i].raster("label").values[0, 0]
        height = torch.cat([height, data[i].raster("aerial-flair").values[0, 4].flatten()])
        tall = torch.cat([tall, torch.isin(label, torch.tensor([1.0, 6.0, 7.0])).flatten()])
    assert height[tall].mean() > 4 > 2 > height[~tall].median()  # houses and trees rise above the rest


@pytest.mark.parametrize(("classes", "last"), [(13, 13), (19, 19)])
def test_classes(root: Path, classes: int, last: int) -> None:
    for other in (False, True):
        data = build(root=root, modalities=["s2"], classes=classes, other=other)
        label, codes = data[0].raster("label"), np.minimum(mask(root, data), last)
        assert label.values[0, 0].numpy().tolist() == codes.tolist()
        assert label.valid[0, 0].numpy().tolist() == ((codes < last) | other).tolist()
        assert set(label.sensor.bands[0].classes) == set(range(1, last + other))
        presence = build(root=root, modalities=["s2"], classes=classes, other=other, label="presence")[0].raster(
            "label"
        )
        assert presence.sensor.names == tuple(label.sensor.bands[0].classes.values())
        there = set(codes[codes < last + other].tolist())
        assert presence.values.flatten().tolist() == [float(c in there) for c in range(1, last + other)]


def test_the_centre_is_the_ground_of_sentinel2(root: Path) -> None:
    whole, centre = (build(root=root, crop=crop)[0] for crop in ("whole", "centre"))
    for name in ("aerial-flair", "label"):
        assert whole.raster(name).values[..., 6:506, 6:506].equal(centre.raster(name).values)
    assert (whole.height_m, centre.height_m) == pytest.approx((102.4, 100.0))
    assert centre.raster("s2").values.shape[2] * 10.0 == pytest.approx(centre.height_m)
    boxes = [batch.places[0].geobox.boundingbox for batch in (whole, centre)]
    assert boxes[0].top - boxes[1].top == pytest.approx(1.2)


def test_the_window_is_around_the_centroid(root: Path) -> None:
    data = build(root=root, modalities=["s2"])
    area = np.load(next((root / "flair_sen_train").glob("D006*/*/sen/*_data.npy")))
    assert len(data) == 3
    for i, (row, column) in enumerate(data.centroids):
        raster = data[i].raster("s2")
        assert len(raster.row) == 3  # the second of the four dates is empty
        assert [t // 86400 for t in raster.time_s[:, 0].tolist()] == [18642, 18823, 18915]  # 2021-01-15, 07-15, 10-15
        padded = np.pad(area, ((0, 0), (0, 0), (5, 5), (5, 5)))[[0, 2, 3], :, row : row + 10, column : column + 10]
        np.testing.assert_allclose(raster.values.numpy(), padded * np.float32(1e-4), rtol=1e-6)
        assert raster.valid.numpy().tolist() == (padded > 0).tolist()
    assert not data[0].raster("s2").valid[:, :, 0].any()  # its window begins a row north of the array
    assert data[1].raster("s2").valid.all()


def test_snow_and_clouds_can_be_left_out(root: Path) -> None:
    masks = np.load(next((root / "flair_sen_train").glob("D006*/*/sen/*_masks.npy")))
    data = build(root=root, modalities=["s2"], clouds=0.5)
    row, column = data.centroids[1]
    hidden = (masks[[0, 2, 3], :, row - 5 : row + 5, column - 5 : column + 5] > 50).any(1)
    assert data[1].raster("s2").valid[:, 0].numpy().tolist() == (~hidden).tolist()


def test_places_without_labels_can_be_read(copy: Path) -> None:
    shutil.rmtree(copy / "flair_2_labels_test")
    with pytest.raises(FileNotFoundError, match="flair_2_labels_test is missing"):
        build(root=copy, split="test")
    assert set(build(root=copy, split="test", label="")[0].layers) == {"aerial-flair", "s2"}


def test_what_is_wrong_is_named(copy: Path) -> None:
    data = build(root=copy)
    folder = copy / "flair_labels_train" / "D006_2020" / "Z1_NN" / "msk"
    arrays.write_tiff(folder / "MSK_000001.tif", np.zeros((1, 512, 512), np.uint8))
    with pytest.raises(ValueError, match=r"MSK_000001\.tif holds the code 0"):
        data[0]
    arrays.write_tiff(folder / "MSK_000001.tif", np.ones((1, 256, 512), np.uint8))
    with pytest.raises(ValueError, match=r"MSK_000001\.tif has \(256, 512\) pixels"):
        data[0]
    (folder / "MSK_000005.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"MSK_000005\.tif is missing, its counterpart is there"):
        build(root=copy)
    centroids = json.loads((copy / flair.CENTROIDS).read_text())
    (copy / flair.CENTROIDS).write_text(json.dumps({**centroids, "IMG_000003.tif": [900, 3]}))
    with pytest.raises(ValueError, match=r"_data\.npy of \(40, 36\) pixels does not hold the place at row and column"):
        build(root=copy, split="test")[0]
    (copy / flair.CENTROIDS).write_text("{}")
    with pytest.raises(ValueError, match="has no entry for IMG_000002"):
        build(root=copy, split="val")
    shutil.rmtree(copy / "flair_aerial_train" / "D004_2021")
    shutil.rmtree(copy / "flair_labels_train" / "D004_2021")
    with pytest.raises(FileNotFoundError, match="one of D004, D014"):
        build(root=copy, split="val")


def test_what_cannot_be_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="classes=12 must be 13 or 19"):
        build(root=root, classes=12)
    with pytest.raises(LookupError, match=r"label='maps' is unknown\. Did you mean map"):
        build(root=root, label="maps")
