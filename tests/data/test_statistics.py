"""Streamed statistics equal those of everything at once, and what is not valid has no part in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from everysat import sensors
from everysat.data.statistics import Windows, band_statistics, contract, spread, summarise
from everysat.data.synthetic import build
from everysat.io.read import open_scene
from everysat.sensors import Band, Sensor
from everysat.types import Batch, Place, Raster


class Spoiled:
    """The same places with nonsense where pixels are not valid."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        batch = self.dataset[i]
        return replace(
            batch, layers={n: replace(r, values=torch.where(r.valid, r.values, 1e30)) for n, r in batch.layers.items()}
        )


def test_equal_to_all_pixels_at_once():
    data = build(places=12, clouds=0.6, missing=0.3)
    found = band_statistics(data)
    assert set(found) == {"vhr", "optical", "radar"}
    for name, (mean, std) in found.items():
        rasters = [data[i].raster(name) for i in range(12) if name in data[i].layers]
        for band in range(len(mean)):
            x = torch.cat([r.values[:, band][r.valid[:, band]] for r in rasters]).double()
            assert mean[band] == pytest.approx(x.mean().item(), rel=1e-9)
            assert std[band] == pytest.approx(x.std(unbiased=False).item(), rel=1e-9)


def test_invalid_values_have_no_effect():
    data = build(places=6, clouds=0.9)
    assert band_statistics(data) == band_statistics(Spoiled(data))


def test_contract_follows_from_the_data():
    data = build(places=6, missing=0.4)
    inputs = contract(data)
    assert {n: (i.gsd_m, i.dated) for n, i in inputs.items()} == {
        "vhr": (2.5, False),
        "optical": (10.0, True),
        "radar": (10.0, True),
    }
    normalised = torch.cat(
        [inputs["optical"].normalise(data[i].raster("optical")) for i in range(6) if "optical" in data[i].layers]
    )
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-4
    assert inputs["vhr"].fit(next(data[i].raster("vhr") for i in range(6) if "vhr" in data[i].layers), "vhr")


def test_a_constant_band_has_a_usable_deviation_and_a_missing_layer_an_error():
    data = build(places=2, noise=0.0, modalities={"flat": {"gsd_m": 10, "bands": 1}}, classes=1)
    assert band_statistics(data)["flat"][1] == (1.0,)
    with pytest.raises(LookupError, match="no place has a raster layer 's2'"):
        band_statistics(data, ["s2"])


def test_spread_takes_what_is_asked_evenly():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 4) == [0, 25, 50, 75]


def test_a_summary_names_bands_units_and_valid_pixels():
    data = build(places=5, clouds=0.6)
    found = summarise(data)["optical"]
    plain = found.plain("optical")
    assert (plain["sensor"], plain["gsd_m"], plain["bands"][3]) == ("synthetic-optical", 10.0, "optical-4")
    assert plain["unit"] == ["reflectance"] * 4
    assert plain["count"] == sum(data[i].raster("optical").valid.sum((0, 2, 3)) for i in range(5)).tolist()
    assert (tuple(plain["mean"]), tuple(plain["std"])) == band_statistics(data)["optical"]


def test_a_layer_that_changes_sensor_or_pixel_is_refused():
    class Mixed:
        def __init__(self, *parts):
            self.parts = parts

        def __len__(self):
            return len(self.parts)

        def __getitem__(self, i):
            return self.parts[i]

    one = build("images", places=1, size_m=40)[0]
    coarse = one.raster("coarse")
    other = one.adding(coarse=replace(coarse, gsd_m=20.0))
    with pytest.raises(ValueError, match="layer 'coarse' has gsd_m=20 in place 1, 10 before"):
        summarise(Mixed(one, other))
    other = one.adding(coarse=replace(coarse, sensor=replace(coarse.sensor, name="another")))
    with pytest.raises(ValueError, match="of another in place 1"):
        summarise(Mixed(one, other))


def test_windows_leave_out_no_pixel(tmp_path):
    """Sides that are no multiple of the window, two pixel sizes, and a corner without data."""
    sensor = Sensor("made", "optical", (Band("fine", 10, "DN", nodata=0), Band("coarse", 20, "DN")), "synthetic")
    stored = {}
    for name, gsd_m, shape in (("fine", 10, (22, 34)), ("coarse", 20, (11, 17))):
        values = np.random.default_rng(gsd_m).integers(1, 1000, shape).astype("uint16")
        values[:3, :3] = 0 if name == "fine" else values[:3, :3]
        profile = {"driver": "GTiff", "count": 1, "height": shape[0], "width": shape[1], "dtype": "uint16"}
        place = {"crs": "EPSG:32632", "transform": from_origin(500000, 5e6, gsd_m, gsd_m)}
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile, **place) as file:
            file.write(values, 1)
            file.set_band_description(1, name)
        stored[name] = values[values > 0].astype(float)
    files = [tmp_path / f"{name}.tif" for name in stored]
    scene = open_scene(files, sensor=sensor, names={"made-10m": "fine", "made-20m": "coarse"})
    windows = Windows(scene, 9)
    assert len(windows) == 3 * 5
    for name, summary in summarise(windows).items():
        (mean,), (std,) = summary.pool.moments(name)
        assert int(summary.pool.count) == stored[name].size
        assert mean == pytest.approx(stored[name].mean(), rel=1e-9)
        assert std == pytest.approx(stored[name].std(), rel=1e-9)


def test_summaries_of_two_sets_join_to_that_of_both() -> None:
    def place(bands: list[str], seed: int) -> Batch:
        values = torch.rand(1, len(bands), 6, 6, generator=torch.Generator().manual_seed(seed))
        layer = Raster.of(sensors.get("sentinel-2-l2a").select(bands), values, 10.0)
        return Batch((Place(60.0, 60.0),), {"s2": layer})

    first, second = [place(["B02", "B03"], 0)], [place(["B03", "B08"], 1)]
    joined = summarise(first)["s2"].joined(summarise(second)["s2"])
    assert joined.sensor.names == ("B02", "B03", "B08")
    both = torch.cat([first[0].raster("s2").select(["B03"]).values, second[0].raster("s2").select(["B03"]).values])
    mean, std = joined.pool.moments("s2")
    assert mean[1] == pytest.approx(float(both.mean()), abs=1e-6)
    assert std[1] == pytest.approx(float(both.std(correction=0)), abs=1e-6)
    assert mean[2] == pytest.approx(float(second[0].raster("s2").select(["B08"]).values.mean()), abs=1e-6)
