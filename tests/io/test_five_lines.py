"""What the README promises: from files and a polygon to features on disk in five lines."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
import xarray as xr
from simple_encoder import SquareEncoder

import everysat as es


@pytest.mark.parametrize("suffix", [".zarr", ".tif", ".parquet"])
def test_embed_a_farm(make, tmp_path, suffix):
    draw = np.random.default_rng(0)
    files = [str(make(f"scene_{band}.tif", draw.random((200, 200)).astype(np.float32))) for band in "ab"]
    farm = geopandas.GeoDataFrame(geometry=[shapely.box(600_300, 5_398_900, 600_900, 5_399_500)], crs="EPSG:32632")
    farm.to_crs("EPSG:4326").to_file(tmp_path / "farm.geojson")
    encoder = SquareEncoder()

    place = es.place(tmp_path / "farm.geojson", gsd_m=10)
    features = encoder.embed(es.read(files, place=place, inputs=encoder.inputs))
    path = es.write(features, tmp_path / f"farm{suffix}")

    count = place.height_m * place.width_m / 20**2
    assert len(features.coords) == count
    if suffix == ".parquet":
        assert len(geopandas.read_parquet(path)) == count
    elif suffix == ".zarr":
        dataset = xr.open_zarr(path)
        assert dataset["embedding"].shape == (6, place.height_m / 20, place.width_m / 20)
        assert float(dataset["x"][0]) - 10 <= 600_300
    else:
        assert es.place(path).lonlat == pytest.approx(place.lonlat)
