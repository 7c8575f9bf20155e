"""What maps are written as: stores of pixels and of chips, window by window, the same after any interruption."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import torch
from test_predict import Interrupted, classified, dense, failing_after, scene

from everysat.nn.mappers import Summaries, Tasked
from everysat.predict import predict
from everysat.store import open_store
from everysat.tasks.classify import build

SIZES = {"window_m": 90.0, "quiet": True}
FACTS = {"period": ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"), "model": {"name": "squares"}, "source": ["a.tif"]}


def holes() -> torch.Tensor:
    valid = torch.ones(1, 2, 54, 66, dtype=torch.bool)
    valid[..., 9:30, 12:40] = False
    return valid


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("quantiser", ["float32/1", "int8-linear/1", "pca-int8/1"])
def test_a_store_holds_what_the_mapper_says(tmp_path, quantiser) -> None:
    batch, mapper = scene(holes()), dense()
    made = predict(mapper, batch, tmp_path / "area.zarr", quantiser=quantiser, facts=FACTS, **SIZES)
    store = open_store(made["features"])
    found = np.moveaxis(store.read(slice(0, 54), slice(0, 66)), -1, 0)
    expected = np.where(batch.raster("image").valid.any(1)[0], mapper(batch)[0].numpy(), np.nan)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    spread = np.nanstd(expected)
    assert np.nanmax(np.abs(found - expected)) < (1e-5 if quantiser == "float32/1" else 0.1 * spread)
    assert store.quantiser.name == quantiser
    assert store.period == FACTS["period"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["area.zarr"]


def test_an_interrupted_store_comes_out_the_same(tmp_path) -> None:
    once, again = tmp_path / "once.zarr", tmp_path / "again.zarr"
    predict(dense(), scene(), once, **SIZES)
    with pytest.raises(Interrupted):
        predict(failing_after(dense(), 20), scene(), again, **SIZES)
    assert not again.exists()
    predict(dense(), scene(), again, **SIZES)
    assert files(once) == files(again)


def test_a_table_of_chips_has_one_row_a_chip_on_its_ground(tmp_path) -> None:
    valid = holes()
    valid[..., 18:27, 18:27] = False
    batch, mapper = scene(valid), Summaries(dense().encoder, 90.0)
    made = predict(mapper, batch, tmp_path / "chips.parquet", quantiser="float32/1", facts=FACTS, **SIZES)
    image = mapper(batch)[0].numpy()
    assert image.shape == (6, 6, 8)
    frame = geopandas.read_parquet(made["features"])
    seen = np.isfinite(image).all(0)
    assert 0 < len(frame) == seen.sum() < 48
    for geometry, vector in zip(frame.geometry, frame.embedding, strict=True):
        left, _, _, top = geometry.bounds
        x, y = round((left - 600000) / 90), round((5000000 - top) / 90)
        np.testing.assert_allclose(vector, image[:, y, x], atol=1e-6)
        assert geometry.area == pytest.approx(90.0**2)


def test_chips_are_what_the_encoder_says_of_them_alone() -> None:
    from everysat.mapping.windows import crop

    batch, mapper = scene(), Summaries(dense().encoder, 90.0, batch_size=5)
    image = mapper(batch)[0]
    alone = mapper.encoder.embed(crop(batch, 90.0, 180.0, 90.0, 90.0)).summary[0]
    torch.testing.assert_close(image[:, 1, 2], alone)


def test_a_task_by_chips_is_the_task_on_each_chip(tmp_path) -> None:
    encoder = dense().encoder
    task = build(encoder=encoder, classes=("a", "b"), gsd_m=10.0, token_size_m=30.0)
    whole = Tasked(encoder, task, 10.0, align_m=30.0, halo_m=0.0)
    chipped = Tasked(encoder, task, 10.0, align_m=90.0, halo_m=0.0, chip_m=90.0, batch_size=7)
    # The encoder of these tests sees one token at a time, so that cutting changes nothing.
    torch.testing.assert_close(chipped(scene()), whole(scene()))
    made = predict(chipped, scene(), tmp_path / "map.tif", probabilities=True, **SIZES)
    assert set(made) == {"classes", "confidence", "probabilities"}


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a map of classes is written as \.tif"):
        predict(classified(), scene(), tmp_path / "map.zarr", **SIZES)
    with pytest.raises(ValueError, match=r"features are written as \.tif, \.zarr or \.parquet"):
        predict(dense(), scene(), tmp_path / "map.npy", **SIZES)
    with pytest.raises(ValueError, match="quantiser='float32/1' is for stores"):
        predict(dense(), scene(), tmp_path / "map.tif", quantiser="float32/1", **SIZES)
    with pytest.raises(LookupError, match="int8"):
        predict(failing_after(dense(), 0), scene(), tmp_path / "map.zarr", quantiser="int9", **SIZES)
    with pytest.raises(ValueError, match="min_valid=2 must be a share"):
        predict(dense(), scene(), tmp_path / "map.tif", min_valid=2, **SIZES)
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        predict(dense(), scene(), tmp_path / "map.tif", workers=0, **SIZES)
    assert not list(tmp_path.iterdir())
