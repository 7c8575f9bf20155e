from __future__ import annotations

import pytest
import torch

from everysat.data import synthetic
from everysat.data.crops import Crops


def test_squares_lie_where_they_should_and_leave_out_the_rest() -> None:
    places = [synthetic.build("images", places=1, size_m=m)[0] for m in (100.0, 60.0, 20.0)]
    crops = Crops(places, tile_m=40.0, stride_m=30.0)
    assert len(crops) == 9 + 1
    assert torch.equal(crops[5].raster("fine").values, places[0].raster("fine").values[..., 6:14, 12:20])
    assert crops[9].places[0].width_m == 40
    assert len({crops[i].raster("fine").values.sum().item() for i in range(10)}) == 10
    with pytest.raises(IndexError):
        crops[10]
    with pytest.raises(ValueError, match="no place has room"):
        Crops(places, tile_m=200.0, stride_m=30.0)
