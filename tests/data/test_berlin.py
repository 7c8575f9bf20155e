"""The embedded default scene, where it is installed."""

from __future__ import annotations

import pytest
import torch

from everysat.data import berlin


@pytest.fixture(scope="module")
def tiles():
    try:
        return berlin.build(labels=True)
    except FileNotFoundError as error:
        pytest.skip(f"needs the scene: {error}")


def test_three_modalities_of_one_place_in_reflectance(tiles) -> None:
    batch = tiles[len(tiles) // 2]
    assert {n: tuple(r.values.shape[1:]) for n, r in batch.layers.items() if n != "label"} == {
        "s2-10m": (4, 42, 42), "s2-20m": (6, 21, 21), "s2-60m": (3, 7, 7)
    }  # fmt: skip
    for name in ("s2-10m", "s2-20m", "s2-60m"):
        values = batch.raster(name).values
        assert 0.0 < values.mean() < 0.5
        assert torch.isfinite(batch.raster(name).time_s).all()
    # The three grids see the same ground: bands that are neighbours in wavelength go together.
    red, edge = batch.raster("s2-10m").select(["B04"]).values, batch.raster("s2-20m").select(["B05"]).values
    coarse = torch.nn.functional.avg_pool2d(red, 2)
    assert torch.corrcoef(torch.stack([coarse.flatten(), edge.flatten()]))[0, 1] > 0.8


def test_labels_are_the_eight_classes(tiles) -> None:
    assert tiles.labels.valid.float().mean().item() == pytest.approx(0.309, abs=0.01)
    assert len(tiles.labels.sensor.bands[0].classes) == 8


def test_parts_lie_in_blocks_of_their_own_and_all_bands_on_one_grid(tiles) -> None:
    options = {"tile_m": 360, "stride_m": 360, "labels": True, "block_m": 1440, "label_gsd_m": 10}
    parts = {part: berlin.build(**options, part=part) for part in ("train", "val", "test")}
    blocks = {part: {tuple(c // 144) for c in one.corners} for part, one in parts.items()}
    assert all(len(of) > 5 for of in blocks.values())
    assert not blocks["train"] & blocks["test"]
    assert not blocks["train"] & blocks["val"]
    grid = berlin.build("grid", tile_m=420, stride_m=420)[0].raster("s2")
    assert tuple(grid.values.shape) == (1, 13, 42, 42)
    assert torch.equal(
        grid.select(["B04"]).values, berlin.build(tile_m=420, stride_m=420)[0].raster("s2-10m").select(["B04"]).values
    )
    with pytest.raises(LookupError, match="no variant 'gird'"):
        berlin.build("gird")
