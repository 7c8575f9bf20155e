"""Before, after, changed: pairs of one place, splits by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everysat.data.change_pairs import FOLDERS, SPLITS, build, fake
from everysat.io import archives, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("change")
    fake(root)
    return root


@pytest.mark.parametrize("variant", ["levir", "dsifn"])
def test_layers_are_the_pictures_and_the_mask(folder, variant):
    data = build(variant, root=folder, split="all")
    base = folder / FOLDERS[variant]
    for i, names in enumerate(data.files):
        place = data[i]
        for layer, name in zip(("before", "after"), names, strict=False):
            np.testing.assert_array_equal(place.raster(layer).values[0], pictures.picture(base / name))
            assert place.raster(layer).sensor.name == "rgb-image"
        label = place.raster("label").values
        np.testing.assert_array_equal(label[0, 0], pictures.picture(base / names[2], 1)[0] == 255)
        assert {"A", "B", "label"} == {name.split("/")[0] for name in names}
        assert len({name.split("/")[1] for name in names}) == 1


def test_grey_of_a_jpeg_label_is_cut_in_the_middle(folder):
    path = folder / FOLDERS["beijing"] / "beijing_B_gt.jpg"
    grey = pictures.picture(path, 1)[0]
    assert len(np.unique(grey)) > 2
    label = build("beijing", root=folder, split="test")[0].raster("label").values[0, 0]
    np.testing.assert_array_equal(label, grey > 127)


def test_splits_are_official_or_by_image(folder):
    official = {split: build(root=folder, split=split) for split in SPLITS}
    for split, data in official.items():
        assert all(f"/{split}_" in name for names in data.files for name in names)
    parts = {split: build("dsifn", root=folder, split=split, folds=3) for split in SPLITS}
    images = {split: {names[0].split("/")[1].split("_")[0] for names in part.files} for split, part in parts.items()}
    assert sorted(i for part in images.values() for i in part) == ["0", "1", "2"]
    beijing = {split: build("beijing", root=folder, split=split).files[0][0] for split in ("train", "test")}
    assert beijing == {"train": "beijing_A_1.jpg", "test": "beijing_B_1.jpg"}
    with pytest.raises(ValueError, match="no pair of split='val'"):
        build("beijing", root=folder, split="val")


def test_root_may_be_the_folder_of_one_set(folder):
    inside = build("levir", root=folder / FOLDERS["levir"], split="val")
    assert inside.files == build("levir", root=folder, split="val").files


def test_tiles_cover_the_images(folder):
    whole, tiles = (build(root=folder, split="test", tile_px=t) for t in (None, 16))
    assert len(tiles) == 4 * len(whole)
    assert tiles[0].places[0].height_m == 8
    for layer in ("before", "after", "label"):
        parts = [tiles[4 + i].raster(layer).values for i in range(4)]
        joined = torch.cat([torch.cat(parts[:2], 3), torch.cat(parts[2:], 3)], 2)
        assert joined.equal(whole[1].raster(layer).values)


def test_one_image_alone(folder):
    assert set(build(root=folder, modalities=["after"])[0].layers) == {"after", "label"}


def test_a_picture_without_a_label_is_no_pair_and_a_pair_must_fit(tmp_path):
    fake(tmp_path)
    base = tmp_path / FOLDERS["levir"]
    values = pictures.picture(base / "A" / "val_3_0256_0512.png")
    archives.write_png(base / "A" / "val_9_0000_0000.png", values)
    assert len(build(root=tmp_path, split="val")) == 2
    archives.write_png(base / "B" / "val_3_0256_0512.png", values[:, :-1])
    with pytest.raises(ValueError, match=r"A/val_3_0256_0512\.png and its pair and label differ in size"):
        build(root=tmp_path, split="val")[0]
    (base / "B" / "val_3_0256_0512.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"B/val_3_0256_0512\.png is missing"):
        build(root=tmp_path, split="val")[0]
    for part in ("A", "B", "label"):
        (base / part / "val_4_0256_0512.png").rename(base / part / "new_4.png")
    with pytest.raises(ValueError, match="the name 'new_4' does not tell its split"):
        build(root=tmp_path, split="val")


def test_the_real_pairs(data_dir):
    """Shares of changed pixels; a pair shows the same ground: what did not change is more alike than another image is."""
    root = data_dir / "change_detection"
    if not root.is_dir():
        pytest.skip("needs change_detection")
    sets = {v: build(v, root=root, split="all") for v in FOLDERS}
    assert {v: len(data) for v, data in sets.items()} == {"levir": 11, "dsifn": 10, "beijing": 2}
    assert {s: len(build(root=root, split=s)) for s in SPLITS} == {"train": 3, "val": 1, "test": 7}
    changed = [sets["beijing"][i].raster("label").values.mean().item() for i in range(2)]
    assert changed == pytest.approx([0.078, 0.0135], abs=0.002)
    for data in sets.values():
        items = [data[i] for i in range(min(5, len(data)))]
        shares = [item.raster("label").values.mean().item() for item in items]
        assert max(shares) < 0.7
        grey = {k: [item.raster(k).values[0].mean(0) for item in items] for k in ("before", "after")}
        still = [item.raster("label").values[0, 0] == 0 for item in items]

        def alike(i, j, grey=grey, still=still):
            return torch.corrcoef(torch.stack([grey["before"][i][still[i]], grey["after"][j][still[i]]]))[0, 1]

        pairs = [i for i in range(len(items)) if alike(i, i) > alike(i, (i + 1) % len(items))]
        assert len(pairs) >= len(items) - 1
