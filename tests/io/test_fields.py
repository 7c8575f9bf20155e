"""Many places, one after another."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from stac_made import (
    CORNER,
    S2,
    UTM,
    api,
    expected,
    s2,
    square,
)

from everysat.io.fields import places, read_each


def test_fields_of_a_layer_are_read_one_after_another(site, tmp_path):
    made = s2(site, "a", "2024-06-03T10:20:30Z")
    corners = [(330_060 + 60 * (i % 30), 5_821_980 - 60 * (i // 30)) for i in range(300)]
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(x + 1, y - 59, x + 59, y - 1) for x, y in corners], crs=UTM)
    frame.to_file(tmp_path / "fields.gpkg", layer="fields")
    fields = places(tmp_path / "fields.gpkg", gsd_m=10)
    assert len(fields) == 300
    some = fields[:40]
    requests = []
    for at, (each, batch) in enumerate(zip(some, read_each(some, "2024-06", S2, source=api(site)), strict=True)):
        x, y = corners[at]
        row, col = round((CORNER[1] - y) / 10), round((x - CORNER[0]) / 10)
        got = batch.raster("s2").values[0, 0]
        assert batch.places == (each,)
        np.testing.assert_allclose(
            got, expected(made["B04"], -0.1, slice(row, row + 6), slice(col, col + 6)), atol=1e-6
        )
        requests.append(len(site.log))
    assert site.asked("/search") <= 2, "neighbours share a search"
    assert requests[-1] < 30, "and their files"


def test_fields_are_read_as_they_are_asked_for(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    far = [square(x=330_000 + 100 * i, size=10) for i in range(20)]
    read = read_each(far, "2024-06", S2, source=api(site), ahead=2)
    assert not site.log
    next(read)
    read.close()


def test_fields_without_observation_are_counted(site):
    s2(site, "a", "2024-06-03T10:20:30Z")
    some = [square(size=10), square(x=700_000, size=10), square(x=331_000, size=10)]
    with pytest.warns(UserWarning, match="1 of 3 places have no observation: nothing of sentinel-2-l2a was found"):
        batches = list(read_each(some, "2024-06", S2, source=api(site)))
    assert [sorted(b.layers) for b in batches] == [["s2"], [], ["s2"]]
    with pytest.raises(LookupError, match="nothing of sentinel-2-l2a"):
        list(read_each(some[1:2], "2024-06", S2, source=api(site)))


def test_points_of_a_layer_become_squares_in_their_own_zones(tmp_path):
    points = geopandas.GeoDataFrame(geometry=[shapely.Point(11.9, 50), shapely.Point(12.1, 50)], crs="EPSG:4326")
    points.to_file(tmp_path / "p.geojson")
    made = places(tmp_path / "p.geojson", size_m=500)
    assert [str(p.geobox.crs) for p in made] == ["EPSG:32632", "EPSG:32633"]
    assert [p.width_m for p in made] == [500, 500]
    with pytest.raises(ValueError, match="give size_m"):
        places(points)
    with pytest.raises(ValueError, match="feature 1 of the layer has no geometry"):
        places(geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1), None], crs=UTM))
