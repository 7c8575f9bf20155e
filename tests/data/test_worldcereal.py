"""WorldCereal's cube and points: units, periods and classes as the files have them, parts that share no ground."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from everysat.data.split import leaks
from everysat.data.worldcereal import build
from everysat.types import Batch

S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")
NAMES = [*(f"S2-L2A-{b}" for b in S2), "S1-SIGMA0-VV", "S1-SIGMA0-VH", "elevation", "AGERA5-TMEAN", "AGERA5-PRECIP"]
ALL = ["s2", "s1", "dem", "agera5"]
SIZE, WEST, NORTH = 12, 664000, 5612120


def numbers():
    """Digital numbers [variable, month, y, x]; the second month of Sentinel-2 is empty, one pixel of VV is 0."""
    values = np.random.default_rng(0).integers(100, 5000, (len(NAMES), 3, SIZE, SIZE)).astype("uint16")
    values[:9, 1] = 65535
    values[0, 2, 0, 0] = 65535
    values[9, 0, 1, 1] = 0
    values[12:] = values[12:, :, :1, :1]
    values[11] = values[11, :1]
    return values


def write_cube(root, values, codes, percent, shift=0):
    """As published: unsigned numbers in a signed type, cell centres, a grid mapping; and a classification without CRS."""
    axes = {"y": NORTH - 5.0 - 10 * np.arange(SIZE), "x": WEST + 5.0 + 10 * np.arange(SIZE)}
    months = pd.to_datetime(["2020-11-01", "2020-12-01", "2021-01-01"])[: values.shape[1]]
    dims, attrs = ("t", "y", "x"), {"_Unsigned": "true", "grid_mapping": "crs"}
    layers = {n: (dims, v.view("int16"), attrs) for n, v in zip(NAMES, values, strict=True)}
    from pyproj import CRS

    layers["crs"] = ((), np.int32(0), {"crs_wkt": CRS("EPSG:32631").to_wkt()})
    xr.Dataset(layers, {"t": months, **axes}).to_netcdf(root / "worldcereal_preprocessed_inputs.nc")
    names = ["classification", "probability", "probability_cropland", "probability_other"]
    stack = np.stack([codes, percent.max(0), *percent]).astype("uint16")
    axes["x"] = axes["x"] + shift
    xr.Dataset({"a": (("bands", "y", "x"), stack)}, {"bands": names, **axes}).to_netcdf(
        root / "worldcereal_cropland_classification.nc"
    )


def classified():
    share = np.random.default_rng(1).integers(0, 101, (SIZE, SIZE))
    percent = np.stack([share, 100 - share])
    return percent.argmax(0), percent


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    root = tmp_path_factory.mktemp("cube")
    write_cube(root, numbers(), *classified())
    return root


def test_a_tile_has_every_layer_in_its_unit_and_its_months(cube):
    tiles = build("cube", root=cube, tile_m=60, modalities=ALL)
    assert len(tiles) == 4
    tile, raw = tiles[1], numbers()[:, :, :6, 6:].astype(np.float64)  # the second tile of the first row
    s2, s1, dem, rain = (tile.raster(n) for n in ALL)
    assert s2.sensor.names == S2
    np.testing.assert_allclose(s2.values, raw[:9, [0, 2]].swapaxes(0, 1) * 1e-4, rtol=1e-6)
    np.testing.assert_allclose(s1.values, 20 * np.log10(raw[9:11]).swapaxes(0, 1) - 83, atol=1e-4)
    np.testing.assert_array_equal(dem.values[0, 0], raw[11, 0])
    assert torch.isinf(dem.time_s).all()
    assert rain.values.shape == (3, 2, 1, 1)
    assert rain.gsd_m == tile.places[0].width_m == 60
    np.testing.assert_allclose(rain.values[:, :, 0, 0], raw[12:, :, 0, 0].T / 100, rtol=1e-6)
    month = {n: [float(pd.Timestamp(d).timestamp()) for d in dates] for n, dates in {
        "s2": ("2020-11-01", "2020-12-01", "2021-01-01", "2021-02-01"),
        "s1": ("2020-11-01", "2020-12-01", "2020-12-01", "2021-01-01", "2021-01-01", "2021-02-01"),
    }.items()}  # fmt: skip
    assert s2.time_s.flatten().tolist() == month["s2"]  # December has no data and is not there
    assert s1.time_s.flatten().tolist() == month["s1"]
    assert torch.equal(rain.time_s, s1.time_s)
    corner = tile.places[0].geobox.affine
    assert (corner.c, corner.f) == (WEST + 60, NORTH)


def test_what_is_no_data_is_not_valid(cube):
    tile = build("cube", root=cube, tile_m=60)[0]
    s2, s1 = tile.raster("s2").valid, tile.raster("s1").valid
    assert not s2[1, 0, 0, 0]
    assert (~s2).sum() == 1
    assert not s1[0, 0, 1, 1]
    assert (~s1).sum() == 1


def test_labels_are_named_by_the_probability_bands(cube):
    label = build("cube", root=cube, tile_m=120)[0].raster("label")
    assert label.sensor.bands[0].classes == {0: "cropland", 1: "other"}
    assert "not ground truth" in label.sensor.source
    np.testing.assert_array_equal(label.values[0, 0], classified()[0])
    assert set(build("cube", root=cube, labels=None)[0].layers) == {"s2", "s1"}


def test_parts_of_the_cube_share_no_ground(cube):
    parts = {p: build("cube", root=cube, tile_m=20, block_m=40, part=p) for p in ("train", "val", "test")}
    assert sum(len(p) for p in parts.values()) == 36
    outlines = [part[i].places[0].geobox.extent.geom for part in parts.values() for i in range(len(part))]
    counts = np.cumsum([0, *map(len, parts.values())])
    split = {n: np.arange(a, b) for n, a, b in zip(parts, counts, counts[1:], strict=False)}
    assert leaks(outlines, split) == []
    with pytest.raises(ValueError, match="tiles of different parts would overlap"):
        build("cube", root=cube, tile_m=40, stride_m=20, part="train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, c, p: {"codes": 1 - c}, "codes do not count the probability bands"),
        (lambda v, c, p: {"codes": c + 2}, "codes do not count the probability bands"),
        (lambda v, c, p: {"shift": 10}, "another grid than"),
    ],
)
def test_labels_that_cannot_be_trusted_are_refused(tmp_path, spoil, message):
    codes, percent = classified()
    write_cube(tmp_path, **{"values": numbers(), "codes": codes, "percent": percent} | spoil(numbers(), codes, percent))
    with pytest.raises(ValueError, match=rf"worldcereal_cropland_classification\.nc.*{message}"):
        build("cube", root=tmp_path, tile_m=60)[0]


def rows(point, dates, code, lon=0.1, lat=48.0):
    rng = np.random.default_rng(point)
    frame = pd.DataFrame(rng.integers(100, 5000, (len(dates), len(NAMES))).astype("uint16"), columns=NAMES)
    return frame.assign(
        sample_id=f"p{point:02d}", timestamp=pd.to_datetime(dates), lon=lon, lat=lat, ewoc_code=code,
        **{"S2-L2A-B8A": 65535, "slope": 1},
    )  # fmt: skip


DEKADS = ["2022-09-01", "2022-09-11", "2022-09-21", "2023-02-21"]
CODES = {"11": "maize", "12": "wheat", "13": "ignore", "14": "rye"}


@pytest.fixture
def points(tmp_path):
    """Twenty points of four codes and one that no table knows, the rows of which are not in order."""
    frames = [rows(i, DEKADS[: 2 + i % 3], [11, 12, 13, 11, 99][i % 5], 0.5 * i, 44 + 0.1 * i) for i in range(19)]
    frame = pd.concat([*frames, rows(19, DEKADS, 14, 5.0, 50.0)])
    frame.loc[(frame.sample_id == "p00") & (frame.timestamp == DEKADS[0]), [f"S2-L2A-{b}" for b in S2]] = 65535
    return written(tmp_path, frame.sample(frac=1, random_state=0))


def written(root, frame, name="2023_FRA_LPIS_POLY_110.geoparquet"):
    frame.to_parquet(root / name)
    (root / "class_mappings.json").write_text(json.dumps({"CROPTYPE28": CODES, "LANDCOVER10": {"99": "water"}}))
    return root


def test_points_are_places_of_one_pixel_with_dekads(points):
    data = build("points", root=points, modalities=ALL)
    place = data[2]  # p03: p02 is ignored
    expected = rows(3, DEKADS[:2], 11)[NAMES].to_numpy(np.float64)
    np.testing.assert_allclose(place.raster("s2").values[:, :, 0, 0], expected[:, :9] * 1e-4, rtol=1e-6)
    np.testing.assert_allclose(place.raster("s1").values[:, :, 0, 0], 20 * np.log10(expected[:, 9:11]) - 83, atol=1e-4)
    np.testing.assert_allclose(place.raster("agera5").values[:, :, 0, 0], expected[:, 12:] / 100, rtol=1e-6)
    assert place.raster("dem").values.item() == expected[0, 11]
    assert place.places[0].lonlat == pytest.approx((1.5, 44.3), abs=1e-4)  # within half a pixel
    assert place.places[0].width_m == place.places[0].height_m == place.raster("s2").gsd_m == 10
    assert place.raster("label").values.item() == data.classes.index("maize")
    dekads = data[3].raster("s1").time_s  # p05
    days = [float(pd.Timestamp(d).timestamp()) for d in (*DEKADS, "2022-10-01", "2023-03-01")]
    assert dekads.tolist() == [[days[0], days[1]], [days[1], days[2]], [days[2], days[4]], [days[3], days[5]]]


def test_dates_without_data_are_left_out_of_their_layer_alone(points):
    first = build("points", root=points)[0]
    assert len(first.raster("s2").row) == 1
    assert len(first.raster("s1").row) == 2


def test_months_are_told_from_dekads(tmp_path):
    written(tmp_path, rows(0, ["2020-12-01", "2021-02-01"], 11), "belgium.parquet")
    days = [float(pd.Timestamp(d).timestamp()) for d in ("2020-12-01", "2021-01-01", "2021-02-01", "2021-03-01")]
    place = build("points", root=tmp_path, file="belgium.parquet")[0]
    assert place.raster("s2").time_s.tolist() == [days[:2], days[2:]]
    written(tmp_path, rows(0, ["2020-12-05"], 11), "odd.parquet")
    with pytest.raises(ValueError, match=r"odd\.parquet: a timestamp is neither"):
        build("points", root=tmp_path, file="odd.parquet")


def test_classes_come_from_the_grouping_and_are_those_of_all_parts(points):
    data = build("points", root=points)
    assert data.classes == ("maize", "rye", "wheat")
    assert len(data) == 13
    few = build("points", root=points, least=2)
    assert few.classes == ("maize", "wheat")
    assert len(few) == 12
    every = build("points", root=points, unlabelled=True)
    assert len(every) == 20
    assert "label" not in every[2].layers
    parts = [build("points", root=points, part=p, seed=1) for p in ("train", "val", "test")]
    assert {p.classes for p in parts} == {data.classes}
    assert sorted(s for p in parts for s in p.samples) == sorted(data.samples)
    assert build("points", root=points, grouping="LANDCOVER10").classes == ("water",)
    with pytest.raises(LookupError, match=r"grouping='CROPTYPE2' is unknown. Did you mean CROPTYPE28"):
        build("points", root=points, grouping="CROPTYPE2")


def test_points_of_different_lengths_make_a_batch_and_travel(points):
    data = build("points", root=points)
    again = pickle.loads(pickle.dumps(data))
    batch = Batch.cat([again[i] for i in range(len(again))])
    assert torch.equal(batch[4].raster("s1").values, data[4].raster("s1").values)
    assert data.fingerprint() == again.fingerprint() != build("points", root=points, least=2).fingerprint()


def test_what_is_not_there_or_not_right_is_named(cube, points, tmp_path):
    with pytest.raises(LookupError, match=r"variant='cubes' is unknown. Did you mean cube"):
        build("cubes", root=cube)
    with pytest.raises(LookupError, match="modalities='s3' is unknown"):
        build("cube", root=cube, modalities=["s3"])
    with pytest.raises(FileNotFoundError, match=r"worldcereal_croptype_classification\.nc is missing"):
        build("cube", root=cube, labels="croptype")
    with pytest.raises(FileNotFoundError, match=r"class_mappings\.json is missing"):
        build("points", root=cube, file="worldcereal_preprocessed_inputs.nc")
    with pytest.raises(ValueError, match=r"tile_m=55 must be a multiple of 10 m"):
        build("cube", root=cube, tile_m=55)
    frame = rows(0, DEKADS[:2], 11)
    written(points, frame.drop(columns="S2-L2A-B11"), "lacks.parquet")
    with pytest.raises(ValueError, match=r"lacks\.parquet has no column 'S2-L2A-B11'"):
        build("points", root=points, file="lacks.parquet")
    written(points, pd.concat([frame, frame]), "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet has point 'p00' twice"):
        build("points", root=points, file="twice.parquet")
    (points / "cut.parquet").write_bytes((points / "lacks.parquet").read_bytes()[:500])
    with pytest.raises(OSError, match=r"cut\.parquet cannot be read"):
        build("points", root=points, file="cut.parquet")
    with pytest.raises(IndexError, match="outside a dataset of 13"):
        build("points", root=points)[13]


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "worldcereal").is_dir():
        pytest.skip("needs worldcereal")
    return data_dir / "worldcereal"


def test_the_real_cube_shows_fields_where_its_label_says_cropland(real):
    tile = build("cube", root=real, tile_m=1000, modalities=ALL)[0]
    assert {n: tuple(r.values.shape) for n, r in tile.layers.items()} == {
        "s2": (10, 9, 100, 100), "s1": (12, 2, 100, 100), "dem": (1, 1, 100, 100), "agera5": (12, 2, 1, 1),
        "label": (1, 1, 100, 100),
    }  # fmt: skip
    s2, label = tile.raster("s2"), tile.raster("label")
    red, nir = s2.values[:, 2], s2.values[:, 6]
    swing = ((nir - red) / (nir + red)).std(0)
    field = label.values[0, 0] == 0
    assert 0.3 < field.float().mean() < 0.5
    assert swing[field].mean() > 2 * swing[~field].mean()  # sown and harvested
    vv, vh = tile.raster("s1").values.mean((0, 2, 3)).tolist()
    assert -13 < vv < -7
    assert -20 < vh < vv - 5
    warm, wet = tile.raster("agera5").values[:, :, 0, 0].T
    assert 273 < warm.min() < warm.max() < 300
    assert 500 < wet.sum() < 1500  # mm in a year


def test_the_real_points_are_500_with_crops_of_their_season(real):
    data = build("points", root=real, least=13)
    assert len(build("points", root=real, unlabelled=True)) == 500
    assert len(data.classes) == 8
    ndvi: dict[str, list[float]] = {"maize": [], "wheat": []}
    for i, code in enumerate(data.codes):
        if data.classes[code] in ndvi and "s2" in data[i].layers:
            s2 = data[i].raster("s2")
            july = (s2.time_s[:, 0] >= 1688169600) & (s2.time_s[:, 0] < 1693526400)  # July and August 2023
            v = s2.values[july][:, :, 0, 0]
            ndvi[data.classes[code]] += ((v[:, 6] - v[:, 2]) / (v[:, 6] + v[:, 2])).tolist()
    assert np.median(ndvi["maize"]) > 0.7 > 0.4 > np.median(ndvi["wheat"])
    monthly = build("points", root=real, file="2021_BEL_LPIS-Flanders_100pts.parquet", unlabelled=True)
    assert len(monthly) == 100
    assert len(monthly[0].raster("s1").row) == 16
