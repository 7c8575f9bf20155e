"""Fuel moisture: bands where they belong, periods from months alone, whole sites held out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch

from everysat.data.fuel_moisture import CHANNELS, FILES, S2_BANDS, build, fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuel")
    fake(root)
    return root


def stored(folder, name):
    return np.load(folder / f"{name}.npy", allow_pickle=False)


def seconds(*day):
    return datetime(*day, tzinfo=UTC).timestamp()


def test_each_channel_is_the_band_it_is_called_in_its_unit(folder):
    data = build(root=folder, split="all")
    inputs, row = stored(folder, "s1_s2_era5_srtm"), 7
    place = data[row]
    s2 = place.raster("s2")
    assert s2.sensor.name == "sentinel-2-l1c"
    assert s2.sensor.names == S2_BANDS
    np.testing.assert_allclose(s2.values[:, :, 0, 0], inputs[row, :, 2:13] * 1e-4, rtol=1e-6)
    assert place.raster("s1").sensor.names == ("VV", "VH")
    np.testing.assert_allclose(place.raster("s1").values[:, :, 0, 0], inputs[row, :, :2], rtol=1e-6)
    srtm = place.raster("srtm")
    assert [(b.name, b.unit) for b in srtm.sensor.bands] == [("elevation", "m"), ("slope", "degree")]
    np.testing.assert_allclose(srtm.values[0, :, 0, 0], inputs[row, 0, 15:17], rtol=1e-6)
    label = place.raster("label")
    assert (label.values.item(), label.sensor.bands[0].unit) == (pytest.approx(stored(folder, "target")[row]), "%")


def test_what_the_products_could_not_measure_is_not_valid(folder):
    data = build(root=folder, split="all")
    assert torch.nonzero(~data[0].raster("s2").valid)[:, :2].tolist() == [[0, 0]]
    assert torch.nonzero(~data[1].raster("s1").valid)[:, :2].tolist() == [[1, 0], [1, 1]]
    assert data[2].raster("s2").valid.all()


def written(tmp_path, months, rain=0.002):
    fake(tmp_path)
    inputs = stored(tmp_path, "s1_s2_era5_srtm")
    inputs[:, :, 14] = rain
    np.save(tmp_path / "s1_s2_era5_srtm.npy", inputs)
    month = stored(tmp_path, "month")
    month[0] = months
    np.save(tmp_path / "month.npy", month)
    return build(root=tmp_path, split="all", year=2018)[0]


def test_periods_end_with_the_month_of_the_label(tmp_path):
    place = written(tmp_path, (3, 4, 4))
    days = [[seconds(2018, 4, 1), seconds(2018, 5, 1)], [seconds(2018, 5, 1), seconds(2018, 5, 31)]]
    assert place.raster("s2").time_s.tolist() == [*days, [seconds(2018, 5, 31), seconds(2018, 6, 30)]]
    assert place.raster("s1").time_s.equal(place.raster("s2").time_s)
    weather = place.raster("era5")
    assert weather.time_s.tolist() == [
        [seconds(2018, 4, 1), seconds(2018, 5, 1)],
        [seconds(2018, 5, 1), seconds(2018, 6, 1)],
    ]
    assert weather.values[:, 1, 0, 0].tolist() == pytest.approx([60, 62]), "millimetres of a month"


@pytest.mark.parametrize(("months", "end"), [((10, 11, 0), (2018, 1, 31)), ((11, 0, 2), (2018, 3, 31)), ((0, 0, 2), (2016, 3, 31)), ((9, 10, 11), (2018, 12, 31))])  # fmt: skip
def test_every_pattern_of_months_has_its_day(tmp_path, months, end):
    times = written(tmp_path, months).raster("s2").time_s
    assert float(times[-1, 1]) == seconds(*end)
    starts = [datetime.fromtimestamp(float(start), UTC) for start in times[:, 0]]
    assert tuple(start.month - 1 for start in starts) == months
    assert starts[2] - starts[1] == timedelta(days=30)


def test_sites_are_held_out_whole(folder):
    parts = {split: build(root=folder, split=split, fold=2) for split in ("train", "val", "test")}
    sites = {split: set(part.groups) for split, part in parts.items()}
    assert sites["train"] | sites["val"] | sites["test"] == set(stored(folder, "site"))
    assert sum(map(len, sites.values())) == 10
    assert len(parts["test"].targets) == len(parts["test"])
    assert parts["test"].fingerprint() != parts["val"].fingerprint()


def test_the_official_split_when_its_file_is_there(tmp_path):
    fake(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is_test\.npy is missing"):
        build(root=tmp_path, fold=None)
    test = np.isin(stored(tmp_path, "site"), ["Site 3", "Site 8"])
    np.save(tmp_path / "is_test.npy", test)
    parts = {split: build(root=tmp_path, fold=None, split=split) for split in ("train", "val", "test")}
    assert set(parts["test"].groups) == {"Site 3", "Site 8"}
    assert not set(parts["train"].groups) & set(parts["val"].groups)
    assert sorted(row for part in parts.values() for row in part.rows) == list(range(20))
    np.save(tmp_path / "is_test.npy", test[:5])
    with pytest.raises(ValueError, match=r"is_test\.npy holds \(5,\)"):
        build(root=tmp_path, fold=None)


def test_shown_as_surface_reflectance(folder):
    shown = build(root=folder, split="all", present_as={"s2": "sentinel-2-l2a"})[3].raster("s2")
    plain = build(root=folder, split="all")[3].raster("s2")
    assert shown.sensor.name == "sentinel-2-l2a"
    assert "B09" not in shown.sensor
    assert shown.values.equal(plain.select(shown.sensor.names).values)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("s1_s2_era5_srtm", lambda v: v[..., :17], rf"s1_s2_era5_srtm\.npy holds .* expected \(20, 3, {CHANNELS}\)"),
        ("month", lambda v: v + 1, r"month\.npy has the months"),
        ("month", lambda v: v[:5], r"month\.npy holds \(5, 3\)"),
        ("latlon", lambda v: v * 10, r"latlon\.npy holds a position"),
        ("target", lambda v: v[:, None], r"target\.npy holds \(20, 1\)"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, spoil, message):
    fake(tmp_path)
    np.save(tmp_path / f"{name}.npy", spoil(stored(tmp_path, name)))
    with pytest.raises(ValueError, match=message):
        build(root=tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    fake(tmp_path)
    np.save(tmp_path / "site.npy", stored(tmp_path, "site").astype(object), allow_pickle=True)
    with pytest.raises(OSError, match=r"site\.npy cannot be read"):
        build(root=tmp_path)


@pytest.fixture(scope="module")
def real(data_dir):
    if not all((data_dir / "fuel_moisture" / f"{name}.npy").is_file() for name in FILES):
        pytest.skip("needs fuel_moisture")
    return data_dir / "fuel_moisture"


def test_the_real_values_are_physical(real):
    """Top-of-atmosphere spectra: bright blue, a dip of water vapour at B09; cold and wet Januaries, plants drying over the summer."""
    data = build(root=real, split="all")
    assert (len(data), len(set(data.groups))) == (1578, 100)
    rows = range(0, 1578, 7)
    items = [data[i] for i in rows]
    s2 = torch.cat([item.raster("s2").values for item in items])[:, :, 0, 0]
    seen = torch.cat([item.raster("s2").valid for item in items])[:, :, 0, 0]
    assert ((s2 > 0.005) & (s2 < 1.1))[seen].all()
    median = dict(zip(S2_BANDS, s2.median(0).values.tolist(), strict=True))
    assert median["B09"] < 0.5 * median["B8A"]
    assert median["B02"] > median["B03"], "the sky is blue"
    radar = torch.cat([item.raster("s1").values for item in items])[:, :, 0, 0].median(0).values
    assert -16 < radar[0] < -8
    assert radar[1] < radar[0] - 4
    weather = {int(i): item.raster("era5").values[-1, :, 0, 0] for i, item in zip(rows, items, strict=True)}
    months = stored(real, "month")
    winter, summer = (torch.stack([v for i, v in weather.items() if months[i, -1] in m]) for m in ((0, 11), (6, 7)))
    assert winter[:, 0].mean() < 285 < summer[:, 0].mean() < 305
    assert 5 < summer[:, 1].mean() < winter[:, 1].mean() < 200
    june, september = (data.targets[(months == pattern).all(1)].mean() for pattern in ([3, 4, 4], [6, 7, 7]))
    assert june > september + 20
    assert all(-125 < item.places[0].lonlat[0] < -93 for item in items)
