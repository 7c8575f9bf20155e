"""Reports on files: facts, values, and what does not fit a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from everysat.io.inspect import inspect
from everysat.io.plane import FilePixels
from everysat.types import Input


def contract(optical, mean=0.2, std=0.1, gsd=10.0, dated=False):
    return {"colour": Input(optical.select(["red", "nir"]), gsd, (mean, mean), (std, std), dated)}


def shown(report) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report)
        return console.export_text()


@pytest.fixture
def path(make, numbers):
    digital = numbers(2, 40, 50)
    digital[0, :10] = 0
    return make("a_20200503.tif", digital, labels=["red", "nir"])


def test_facts_of_a_band(path, optical):
    report = inspect(path, sensor=optical)
    assert report.fits
    red = report.bands[0]
    assert (red.sensor, red.band, red.unit, red.crs, red.shape) == (
        "synthetic-optical",
        "red",
        "reflectance",
        "EPSG:32632",
        (40, 50),
    )
    assert (red.gsd_m, red.date, red.dtype, red.nodata) == (10, "2020-05-03", "uint16", None)
    assert red.missing_share == pytest.approx(0.25)
    assert red.digital.percentiles[0] >= 200
    assert red.physical.percentiles[2] == pytest.approx(red.digital.percentiles[2] * 1e-4)
    assert sum(red.digital.histogram) == 30 * 50
    assert 10.3 < red.extent_lonlat[0] < 10.4


def test_what_fits(path, optical):
    report = inspect(path, contract(optical))
    assert report.problems == ()
    assert "Fits" in shown(report)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": 0.9, "std": 0.1}, "standard deviations below"),
        ({"mean": 0.01, "std": 0.01}, "standard deviations above"),
        ({"gsd": 250.0}, "250 m"),
    ],
)
def test_what_does_not_fit(path, optical, options, words):
    report = inspect(path, contract(optical, **options))
    assert not report.fits
    assert any(words in problem and "a_20200503.tif" in problem for problem in report.problems)
    assert words.split()[0] in shown(report)


def test_missing_bands_and_dates(make, numbers, optical):
    report = inspect(make("red.tif", numbers(4, 4)), contract(optical, dated=True))
    assert any("nir of synthetic-optical missing" in p for p in report.problems)
    assert any("times=" in p for p in report.problems)


def test_other_sensor(make, numbers, optical):
    report = inspect(make("T33UUU_20170216T102101_B04.tif", numbers(4, 4)), contract(optical), sensor="sentinel-2-l1c")
    assert report.problems[-1] == "the files hold sentinel-2-l1c; the model takes synthetic-optical"


def test_problems_of_single_files_do_not_stop_the_rest(make, numbers, path, optical, tmp_path):
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    files = [
        tmp_path / "broken.tif",
        tmp_path / "none.tif",
        make("nocrs_red.tif", numbers(4, 4), crs=None),
        path,
        make("blank_red.tif", np.zeros((4, 4), np.uint16)),
    ]
    report = inspect(files, sensor=optical)
    assert len(report.bands) == 3
    for words in ("broken.tif cannot be read", "none.tif does not exist", "no CRS", "no valid pixel"):
        assert any(words in p for p in report.problems), words


def test_unknown_sensor_is_still_described(make, numbers):
    report = inspect(make("x.tif", numbers(2, 4, 4)))
    assert report.bands[0].sensor is None
    assert report.bands[0].digital is not None
    assert any("cannot be told" in p for p in report.problems)
    assert "?" in shown(report)


def test_wrong_unit_is_a_problem(make, numbers, optical):
    report = inspect(make("red.tif", (numbers(4, 4) * 1e-4).astype(np.float32)), sensor=optical)
    assert any("stored='physical'" in p for p in report.problems)


def test_large_files_are_read_decimated(make, numbers, optical, monkeypatch):
    path = make("red.tif", numbers(1500, 1200))
    read, sizes = FilePixels.read, []

    def counted(self, rows, cols, shape=None):
        values, mask = read(self, rows, cols, shape)
        sizes.append(values.size)
        return values, mask

    monkeypatch.setattr(FilePixels, "read", counted)
    report = inspect(path, sensor=optical)
    assert max(sizes) <= 512 * 512
    assert report.bands[0].shape == (1500, 1200)


def test_report_is_json(path, optical):
    report = inspect(path, contract(optical))
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = json.loads(text)
    assert again["fits"] is True
    assert again["bands"][1]["band"] == "nir"
    assert len(again["bands"][0]["digital"]["histogram"]) == 12


def test_real_scene(real_scene):
    report = inspect(sorted((real_scene / "s2l1c" / "IMG_DATA").glob("*.jp2")))
    assert report.fits
    assert {band.gsd_m for band in report.bands} == {10, 20, 60}
    assert "sentinel-2-l1c" in shown(report)
