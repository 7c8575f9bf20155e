"""Series of MODIS and Landsat: bands, dates, what was not seen, blocks of ground held out."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
import torch

from everysat.data import modis_ts
from everysat.data.modis_ts import CLASSES, FILES, build, fake
from everysat.io import archives, arrays, rda


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("modis")
    fake(root)
    return root


@pytest.mark.parametrize("variant", ["mato-grosso", "cerrado", "rondonia"])
def test_a_series_is_that_of_its_row(folder, variant):
    held = rda.tables(folder / FILES[variant])["samples"]
    data = build(variant, root=folder, split="all")
    for i in (1, 7):
        place = data[i]
        raster = place.raster("indices")
        names = ("NDVI",) if variant == "mato-grosso" else ("NDVI", "EVI")
        assert raster.sensor.names == names
        assert raster.sensor.name == ("landsat-8-indices" if variant == "rondonia" else "mod13q1")
        truth = np.stack([held["time_series"][i][name] for name in names], -1)
        np.testing.assert_allclose(raster.values[:, :, 0, 0], truth, rtol=1e-6)
        assert raster.time_s[:, 0].tolist() == (held["time_series"][i]["Index"] * 86400).tolist()
        assert (raster.time_s[:, 1] - raster.time_s[:, 0]).unique().tolist() == [16 * 86400]
        assert CLASSES[variant][int(place.raster("label").values)] == held["label"][i]
        assert place.places[0].lonlat == pytest.approx((held["longitude"][i], held["latitude"][i]), abs=0.002)
        assert (
            raster.gsd_m == place.places[0].width_m == pytest.approx(30 if variant == "rondonia" else 231.656, abs=1e-3)
        )


def test_what_the_satellite_did_not_see_is_not_valid(folder):
    only, both = (build(v, root=folder, split="all")[0].raster("indices") for v in ("mato-grosso", "cerrado"))
    assert len(only.row) == 5, "a date without any value is left out"
    assert only.valid.all()
    assert torch.nonzero(~both.valid)[:, :2].tolist() == [[2, 0]]


def test_a_pixel_of_the_cube_is_under_its_sample_and_dated_by_its_day(folder):
    data, place = build("soybean", root=folder, split="all"), build("soybean", root=folder, split="all")[5]
    base = folder / "dtwsat_mato_grosso"
    for name, layer, band in (("red", "modis", "B1"), ("mir", "modis", "B7"), ("evi", "indices", "EVI")):
        cube, _ = arrays.tiff(base / f"{name}.tif")
        held = place.raster(layer).select([band]).values.flatten()
        np.testing.assert_allclose(held, cube[:, 5, 10], rtol=1e-6)
    day = [datetime.fromtimestamp(float(start), UTC) for start in place.raster("modis").time_s[:, 0]]
    doy, _ = arrays.tiff(base / "doy.tif")
    assert [d.timetuple().tm_yday for d in day] == doy[:, 5, 10].astype(int).tolist()
    starts = np.array(arrays.lines(base / "timeline"), "datetime64[D]")
    assert all(0 <= (np.datetime64(d.date()) - start).astype(int) < 16 for d, start in zip(day, starts, strict=True))
    assert data[0].raster("modis").valid[0].sum() == 0 or len(data[0].raster("modis").row) == 22


def test_the_day_goes_over_the_new_year_and_a_composite_stands_in_for_it():
    start = np.array(["2007-12-19", "2008-02-18", "2008-03-05"], "datetime64[D]")
    times = modis_ts._days(start, np.array([2, -1.7e308, 300]))
    found = [datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d") for t in times[:, 0]]
    assert found == ["2008-01-02", "2008-02-18", "2008-03-05"]
    assert (times[:, 1] - times[:, 0]).tolist() == [86400, 16 * 86400, 16 * 86400]


def test_seasons_begin_and_end_with_their_days(tmp_path):
    fake(tmp_path)
    path = tmp_path / FILES["soybean"]
    frame = pd.read_csv(path)
    frame.loc[2, ["from", "to"]] = "2007-10-16", "2007-12-03"
    frame.to_csv(path, index=False)
    assert len(build("soybean", root=tmp_path, split="all")[2].raster("modis").row) == 3


@pytest.mark.parametrize("variant", FILES)
def test_blocks_of_ground_are_held_out_whole(folder, variant):
    parts = {s: build(variant, root=folder, split=s, fold=1) for s in ("train", "val", "test")}
    groups = {s: set(part.groups) for s, part in parts.items()}
    assert not groups["train"] & groups["test"] | groups["val"] & groups["test"] | groups["train"] & groups["val"]
    assert sorted(row for part in parts.values() for row in part.rows) == list(range(12))
    assert [int(parts["train"][i].raster("label").values) for i in range(len(parts["train"]))] == parts[
        "train"
    ].codes.tolist()


def test_a_class_can_be_left_out(folder):
    data = build(root=folder, split="all", leave_out=["Forest"])
    assert len(data) == 9
    assert data.classes == ("Cerrado", "Pasture", "Soy_Corn")
    assert set(data[0].raster("label").sensor.bands[0].classes.values()) == set(data.classes)
    assert set(data.codes.tolist()) == {0, 1, 2}
    with pytest.raises(LookupError, match="leave_out='Wood' is unknown"):
        build(root=folder, leave_out=["Wood"])


def test_a_layer_that_the_variant_lacks_is_refused(folder):
    with pytest.raises(LookupError, match="modalities='modis': the variant cerrado has indices alone"):
        build("cerrado", root=folder, modalities=["modis"])
    with pytest.raises(ValueError, match="block_deg=0 must be positive"):
        build(root=folder, block_deg=0)


def spoil_label(frame):
    frame["label"][3] = "Lake"


def spoil_place(frame):
    frame["latitude"][3] = 95.0


def spoil_series(frame):
    del frame["time_series"][3]["NDVI"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_label, "has the label 'Lake', expected Cerrado, Forest"),
        (spoil_place, "lacks a longitude and latitude in degrees"),
        (spoil_series, "every row of time_series must hold Index"),
        (lambda frame: frame.pop("time_series"), "has no column 'time_series'"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, spoil, message):
    fake(tmp_path)
    path = tmp_path / FILES["mato-grosso"]
    frame = rda.tables(path)["samples"]
    frame = {k: (v.astype("U12") if k == "label" else v) for k, v in frame.items()}
    spoil(frame)
    rda.write(path, samples=frame)
    with pytest.raises(ValueError, match=rf"samples_modis_ndvi\.rda.*{message}"):
        build(root=tmp_path)


def test_a_cube_that_does_not_fit_is_named(tmp_path):
    fake(tmp_path)
    base = tmp_path / "dtwsat_mato_grosso"
    whole = (base / "timeline").read_text()
    (base / "timeline").write_text(whole[:-11])
    with pytest.raises(ValueError, match=r"blue\.tif holds .* expected 22 dates"):
        build("soybean", root=tmp_path)
    (base / "timeline").write_text(whole)
    cube, box = arrays.tiff(base / "mir.tif")
    archives.write_grid(base / "mir.tif", cube[:, :-1], str(box.crs), box.affine)
    with pytest.raises(ValueError, match=r"mir\.tif holds"):
        build("soybean", root=tmp_path)
    archives.write_grid(base / "mir.tif", cube, str(box.crs), box.affine)
    frame = pd.read_csv(base / "samples.csv")
    frame.loc[0, "longitude"] += 1
    frame.to_csv(base / "samples.csv", index=False)
    with pytest.raises(ValueError, match=r"samples\.csv has 1 samples outside of the images"):
        build("soybean", root=tmp_path)


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "modis_ts").is_dir():
        pytest.skip("needs modis_ts")
    return data_dir / "modis_ts"


def test_the_real_series_follow_the_seasons(real):
    """Fields are bare in September, green in January; forest is green all year. The positions are in Brazil."""
    data = build(root=real, split="all")
    assert (len(data), len(set(data.groups))) == (1218, 47)
    ndvi = np.stack([data[i].raster("indices").values.flatten().numpy() for i in range(0, 1218, 5)])
    kind = np.array(CLASSES["mato-grosso"])[data.codes[::5]]
    fields, forest = ndvi[kind == "Soy_Corn"].mean(0), ndvi[kind == "Forest"].mean(0)
    assert fields[0] < 0.35 < 0.75 < fields[3:5].max()
    assert forest.min() > 0.6
    assert forest.max() - forest.min() < 0.3 < fields.max() - fields.min()
    assert -0.2 <= ndvi.min() < ndvi.max() <= 1
    assert all(-62 < data[i].places[0].lonlat[0] < -51 for i in range(0, 1218, 100))


def test_forest_of_the_real_series_is_in_one_block(real):
    data = build(root=real, split="all")
    forest = data.codes == CLASSES["mato-grosso"].index("Forest")
    assert len(set(data.groups[forest])) == 1
    for fold in range(5):
        left = {s: build(root=real, split=s, fold=fold, leave_out=["Forest"]) for s in ("train", "test")}
        assert len(set(left["train"].codes)) == 3


def test_the_other_real_series(real):
    savanna = build("cerrado", root=real, split="all")
    assert len(savanna) == 746
    lonlat = savanna._table.lonlat
    assert len(np.unique(lonlat, axis=0)) == 83
    fewest = min(len(savanna[i].raster("indices").row) for i in range(0, 746, 10))
    assert fewest >= 20
    burnt = build("rondonia", root=real, split="all")
    assert (len(burnt), len(burnt[0].raster("indices").row)) == (160, 25)


def test_the_real_cube_is_physical(real):
    """NDVI and EVI follow from the bands; every sample lies on the cube; days are within their composite, but few that are not known."""
    data = build("soybean", root=real, split="all")
    assert len(data) == 603
    items = [data[i] for i in range(0, 603, 20)]
    for item in items:
        assert len(item.raster("modis").row) in (22, 23)
    bands = torch.cat([i.raster("modis").values for i in items])[:, :, 0, 0].T
    blue, red, nir, mir = bands
    ndvi, evi = torch.cat([i.raster("indices").values for i in items])[:, :, 0, 0].T
    assert 0 < bands.min() < bands.max() < 0.9
    assert ((nir - red) / (nir + red) - ndvi).abs().median() < 0.002
    made = 2.5 * (nir - red) / (nir + 6 * red - 7.5 * blue + 1)
    assert (made - evi).abs().median() < 0.01
    assert mir.median() < nir.median()
    length = torch.cat([i.raster("modis").time_s for i in items]).diff(dim=1)
    assert (length == 86400).double().mean() > 0.95
