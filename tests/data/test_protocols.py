"""What PANGAEA evaluates on, where its splits or crops are its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from everysat.data import burnscars, pastis, spacenet7
from everysat.io import arrays


def test_burn_scars_are_drawn_as_scikit_learn_draws(tmp_path: Path) -> None:
    burnscars.fake(tmp_path, places=2)
    for i in range(59):  # with the two of the synthetic set 61, of which a tenth is no whole number
        name = f"subsetted_512x512_HLS.S30.T{10 + i % 8}SAB.2018{100 + i}.v1.4_merged.tif"
        arrays.write_tiff(tmp_path / "training" / name, np.zeros((1, 2, 2), np.int16))
    every = sorted(path.name for path in (tmp_path / "training").glob("*_merged.tif"))
    train, val = train_test_split(np.arange(len(every)), test_size=0.1, random_state=23)
    parts = {s: burnscars.build(root=tmp_path, split=s, protocol="pangaea") for s in burnscars.SPLITS}
    assert set(parts["train"].scenes) == {every[i] for i in train}
    assert set(parts["val"].scenes) == {every[i] for i in val}
    assert parts["test"].scenes == burnscars.build(root=tmp_path, split="test").scenes
    assert parts["val"].scenes != burnscars.build(root=tmp_path, split="val").scenes
    with pytest.raises(LookupError, match=r"protocol='pangea' is unknown\. Did you mean pangaea"):
        burnscars.build(root=tmp_path, protocol="pangea")


def test_buildings_are_of_tiles_without_clouds(tmp_path: Path) -> None:
    spacenet7.fake(tmp_path)
    data = spacenet7.build(root=tmp_path, protocol="pangaea", tile_px=16)
    assert (len(data), data.kept) == (4 * 30, (0, 1, 2, 3))
    plain = spacenet7.build(root=tmp_path, cloudy=False, tile_px=16)
    assert data[5].raster("planet").values.equal(plain[5].raster("planet").values)
    with pytest.raises(ValueError, match="tile_px=256 must divide 32"):
        spacenet7.build(root=tmp_path, protocol="pangaea")
    with pytest.raises(LookupError, match="split='public' is unknown"):
        spacenet7.build(root=tmp_path, protocol="pangaea", split="public")


def test_buildings_within_images_are_apart_and_complete(tmp_path: Path) -> None:
    spacenet7.fake(tmp_path)
    seen = torch.zeros(32, 32)
    tops = []
    for split, rows, columns in (
        ("train", slice(0, 24), slice(0, 32)),
        ("val", slice(24, 32), slice(0, 16)),
        ("test", slice(24, 32), slice(16, 32)),
    ):
        data = spacenet7.build(root=tmp_path, split=split, protocol="pangaea-within", tile_px=8)
        assert len({item[0].split("/")[1] for item in data.items}) == 59
        whole = torch.from_numpy(arrays.tiff(tmp_path / data.items[0][0])[0][:3]).float()
        tiles = [data[i].raster("planet").values[0] for i in range(len(data.kept))]
        assert torch.equal(tiles[0], whole[:, rows, columns][:, :8, :8])
        assert torch.equal(tiles[-1], whole[:, rows, columns][:, -8:, -8:])
        seen[rows, columns] += len(tiles) * 64 / seen[rows, columns].numel()
        tops.append(data.items[0])
    assert (seen == 1).all()
    assert len(set(tops)) == 1
    with pytest.raises(ValueError, match="2 x 2 tiles cannot be divided into quarters"):
        spacenet7.build(root=tmp_path, protocol="pangaea-within", tile_px=16)


def test_crops_are_of_evenly_spaced_dates(tmp_path: Path) -> None:
    pastis.fake(tmp_path, places=3)
    whole, few = (pastis.build(root=tmp_path, modalities=["s2", "s1-asc"], dates=n) for n in (None, 3))
    for name, kept in (("s2", [0, 2, 4]), ("s1-asc", [0, 1, 3])):  # of five and of four dates
        assert few[0].raster(name).time_s.equal(whole[0].raster(name).time_s[kept])
        assert few[0].raster(name).values.equal(whole[0].raster(name).values[kept])
    assert few.observations() == [6]
    assert whole.observations() == [9]
    pangaea = pastis.build(root=tmp_path, protocol="pangaea")
    assert pangaea.dates == 6
    assert set(pangaea[0].layers) == {"s2", "s1-asc", "label"}
    assert pangaea.fingerprint() != whole.fingerprint()
    with pytest.raises(ValueError, match="dates=1 must be 2 or more"):
        pastis.build(root=tmp_path, dates=1)
