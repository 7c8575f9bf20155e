"""Plants and the places where they were seen."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from everysat.data.geolifeclef import BANDS, SERIES, SPLITS, TABLE, build, fake
from everysat.io import arrays, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("geolife")
    fake(root)
    return root


def test_layers_of_a_place_are_its_pictures_and_its_series(folder):
    data = build(root=folder, split="all")
    place, seen = data[3], data.places[3]
    base = folder / "glc23/SatelliteImages"
    rgb = pictures.picture(base / "rgb/03/40/5494003.jpeg")
    nir = pictures.picture(base / "nir/03/40/5494003.jpeg", 1)
    np.testing.assert_array_equal(place.raster("rgbn").values[0], np.concatenate([rgb, nir]))
    for band, name in BANDS.items():
        frame = pd.read_csv(folder / SERIES.format(band), sep=";", index_col=0)
        held = place.raster("landsat").select([name]).values[:, 0, 21, 21].tolist()
        assert held == frame.loc[int(seen.series)].astype(float).tolist()
    valid = place.raster("landsat").valid
    assert valid.sum() == valid[:, :, 21, 21].sum() == valid.shape[0] * len(BANDS)
    assert data.species == (100, 101, 102, 103)
    assert place.raster("label").values.item() == data.codes[3] == 3
    assert place.places[0].lonlat == (11.0, pytest.approx(45.5, abs=0.5))


def test_quarters_follow_each_other_and_end_with_the_series(folder):
    data = build(root=folder, split="all")
    times = data[1].raster("landsat").time_s
    assert len(times) == 8
    assert (times[1:, 0] == times[:-1, 1]).all()
    first = [datetime.fromtimestamp(t, UTC).date().isoformat() for t in times[:2].flatten().tolist()]
    assert first == ["1999-12-02", "2000-03-21", "2000-03-21", "2000-06-25"]
    assert len(data[0].raster("landsat").row) == 7, "its last quarter is after the end"


def test_blocks_are_held_out(folder):
    parts = {split: build(root=folder, split=split) for split in SPLITS}
    assert sum(map(len, parts.values())) == 10
    places = [{p.lonlat for p in part.places} for part in parts.values()]
    assert not places[0] & places[1] | places[0] & places[2] | places[1] & places[2]


def test_images_of_a_metre_with_altitude_and_land_cover(folder):
    place = build("2022", root=folder, split="all")[2]
    stem = folder / "glc22/patches-fr/02/19/10561902"
    assert place.raster("rgbn").gsd_m == 1
    np.testing.assert_array_equal(place.raster("rgbn").values[0, 3], pictures.picture(f"{stem}_near_ir.jpg", 1)[0])
    np.testing.assert_array_equal(place.raster("altitude").values[0], arrays.tiff(f"{stem}_altitude.tif")[0])
    np.testing.assert_array_equal(place.raster("landcover").values[0], arrays.tiff(f"{stem}_landcover.tif")[0])
    assert place.places[0].lonlat == (7.4, 47.0)


def test_files_that_do_not_fit_are_named(tmp_path):
    fake(tmp_path)
    path = tmp_path / SERIES.format("red")
    text = path.read_text()
    path.write_text(text.replace("903;", "999;"))
    with pytest.raises(ValueError, match=r"time_series_red\.csv has no series 903"):
        build(root=tmp_path, split="all")[3]
    path.write_text(text.replace("eos", "later"))
    with pytest.raises(ValueError, match=r"time_series_red\.csv holds something else than numbers"):
        build(root=tmp_path, split="all")[3]
    path.write_text(text.replace("2001_4", "2002_1"))
    with pytest.raises(ValueError, match=r"time_series_red\.csv has other quarters"):
        build(root=tmp_path, split="all")[3]
    pictures.write_jpeg(tmp_path / "glc23/SatelliteImages/nir/03/40/5494003.jpeg", np.zeros((1, 64, 64), np.uint8))
    with pytest.raises(ValueError, match=r"5494003\.jpeg and its near infrared differ in size"):
        build(root=tmp_path, split="all", modalities=["rgbn"])[3]
    (tmp_path / TABLE).write_text((tmp_path / TABLE).read_text().replace("patchID", "patch"))
    with pytest.raises(ValueError, match=r"train_sample\.csv lacks the columns patchID"):
        build(root=tmp_path)


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "geolifeclef").is_dir():
        pytest.skip("needs geolifeclef")
    return data_dir / "geolifeclef"


def test_the_real_places_of_2023(real):
    """A hundred places in Europe; vegetation is brighter in near infrared than in red, in the series too, and most in summer."""
    data = build(root=real, split="all")
    assert (len(data), len(data.species)) == (100, 96)
    items = [data[i] for i in range(0, 100, 4)]
    series = np.stack(
        [item.raster("landsat").select(["B4", "B5"]).values[:, :, 21, 21].mean(0).numpy() for item in items]
    )
    assert (series[:, 1] > series[:, 0]).mean() > 0.9
    lengths = {len(item.raster("landsat").row) for item in items}
    assert max(lengths) <= 84
    assert min(lengths) >= 70
    assert all(-30 < p.lonlat[0] < 50 and 33 < p.lonlat[1] < 72 for p in data.places)
    nir = np.stack(
        [item.raster("landsat").select(["B5"]).values[:68, 0, 21, 21].view(17, 4).mean(0).numpy() for item in items]
    )
    assert np.median(nir[:, 1:3].mean(1) - nir[:, [0, 3]].mean(1)) > 0
    for split in SPLITS:
        assert len(build(root=real, split=split)) > 5


def test_the_real_places_of_2022(real):
    data = build("2022", root=real, split="all", folds=3)
    assert 5 <= len(data) <= 10
    for i in range(len(data)):
        place = data[i]
        assert place.raster("rgbn").values.shape == (1, 4, 256, 256)
        height = place.raster("altitude").values
        assert -10 < height.min() <= height.max() < 4000
    assert (data.codes >= 0).any()
