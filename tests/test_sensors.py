"""Laws that hold for every sensor table, and the errors of tables that are wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everysat import sensors
from everysat.sensors import KINDS, UNITS, Band, Sensor

ALL = [sensors.get(name) for name in sensors.names()]
BANDS = [pytest.param(sensor, band, id=f"{sensor.name}/{band.name}") for sensor in ALL for band in sensor.bands]
WANTED = {
    "sentinel-1-grd", "sentinel-1-asc", "sentinel-1-desc", "sentinel-2-l1c", "sentinel-2-l2a", "landsat-5-tm",
    "landsat-7-etm", "landsat-8-oli", "landsat-9-oli", "modis", "alos-2-palsar-2", "planetscope-8b", "planetscope-4b",
    "spot-6-7", "naip", "french-aerial-irc", "flair-aerial", "hls-s30", "hls-l30", "enmap", "srtm", "copernicus-dem",
    "era5", "agera5", "esa-worldcover", "dynamic-world", "corine", "modis-mcd12", "worldcereal", "osm-landuse",
}  # fmt: skip
TABLE = """
title = "Drone"
kind = "optical"
source = "its makers"
defaults = { unit = "reflectance", gsd_m = 0.1 }
bands = [
  { name = "red", aliases = ["R"], wavelength_um = 0.66, width_um = 0.03 },
  { name = "nir", wavelength_um = 0.84, width_um = 0.04, scale = 1e-4, range = [0, 1] },
]
"""


def write(folder: Path, text: str, name: str = "drone.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_promised_sensors_are_described() -> None:
    assert set(sensors.names()) >= WANTED


@pytest.mark.parametrize("sensor", ALL, ids=lambda s: s.name)
def test_a_table_says_what_it_is_and_who_says_so(sensor: Sensor) -> None:
    assert sensor.kind in KINDS
    assert sensor.title
    assert len(sensor.source) > 20
    assert sensors.get(sensor.name) is sensor, "read once"
    assert sensors.load(Path(sensors.__file__).parent / f"{sensor.name}.toml") == sensor
    hash(sensor)


@pytest.mark.parametrize(("sensor", "band"), BANDS)
def test_a_band_is_plausible(sensor: Sensor, band: Band) -> None:
    assert band.unit in UNITS
    assert 0.05 <= band.gsd_m <= 50_000
    if sensor.kind in ("optical", "thermal") and band.wavelength_um is not None:
        assert 0.3 <= band.wavelength_um <= 15
        assert band.width_um is not None
    if band.width_um is not None:
        assert band.wavelength_um is not None
        assert band.width_um < band.wavelength_um
    if sensor.kind == "sar":
        assert band.unit in ("dB", "ratio")
        assert band.polarisation or band.unit == "ratio"
        assert band.wavelength_um is None or 1e4 < band.wavelength_um < 1e6, "centimetres to decimetres"
    assert bool(band.classes) == (sensor.kind == "classes") == (band.unit in ("class", "bits"))
    assert (band.range is None) == (band.unit in ("class", "bits"))


@pytest.mark.parametrize(("sensor", "band"), BANDS)
def test_digital_numbers_land_in_the_range(sensor: Sensor, band: Band) -> None:
    """The scale turns at least the middle of the range into a number that fits the file's 16 or 32 bits."""
    if band.range is not None:
        low, high = ((edge - band.offset) / band.scale for edge in band.range)
        assert low < high
        assert max(abs(low), abs(high)) < 2**31
    if band.unit == "class" and band.nodata is not None:
        assert band.classes is not None
        assert band.nodata not in band.classes


@pytest.mark.parametrize("sensor", ALL, ids=lambda s: s.name)
def test_every_label_finds_its_band_and_no_other(sensor: Sensor) -> None:
    for band in sensor.bands:
        for label in (band.name, *band.aliases):
            assert sensor[label] is band
            assert sensor[label.upper()] is band
            assert label.lower() in sensor
            assert sensor.select([label]).bands == (band,)


@given(st.data())
def test_select_keeps_facts_and_order(data: st.DataObject) -> None:
    sensor = data.draw(st.sampled_from(ALL))
    chosen = data.draw(st.lists(st.sampled_from(sensor.names), unique=True))
    part = sensor.select(chosen)
    assert part.names == tuple(chosen)
    assert replace(part, bands=sensor.bands) == sensor
    assert all(part[name] is sensor[name] for name in chosen)


@pytest.mark.parametrize(
    ("name", "band", "number", "physical"),
    [
        ("sentinel-2-l2a", "red", 1500, 0.15),
        ("landsat-8-oli", "red", 12727, 0.1499925),
        ("landsat-8-oli", "lwir11", 44178, 300.0),
        ("landsat-8-oli-l1", "pan", 10000, 0.1),
        ("hls-l30", "lwir11", 2685, 300.0),
        ("modis", "sur_refl_b01", 1500, 0.15),
        ("era5", "total_precipitation", 0.004, 4.0),
        ("flair-aerial", "elevation", 50, 10.0),
    ],
)  # fmt: skip
def test_known_digital_numbers(name: str, band: str, number: float, physical: float) -> None:
    facts = sensors.get(name)[band]
    assert math.isclose(number * facts.scale + facts.offset, physical, abs_tol=2e-3)


def test_facts_that_have_been_got_wrong_elsewhere() -> None:
    assert sensors.get("sentinel-2-l2a").baseline_offsets == {"04.00": -0.1}
    assert sensors.get("hls-s30").baseline_offsets == {}, "HLS takes the offset out"
    assert "B10" not in sensors.get("sentinel-2-l2a")
    assert "B8" not in sensors.get("landsat-8-oli"), "Level-2 has no panchromatic band"
    assert sensors.get("french-aerial-irc").names == ("nir", "red", "green", "blue")
    assert {b.orbit for b in sensors.get("sentinel-1-asc").bands} == {"ascending"}
    assert {b.orbit for b in sensors.get("sentinel-1-desc").bands} == {"descending"}
    assert {b.orbit for b in sensors.get("sentinel-1-grd").bands} == {None}
    enmap = sensors.get("enmap")
    assert (len(enmap.bands), enmap.names[0], enmap.names[-1]) == (224, "B001", "B224")
    assert (enmap.bands[0].wavelength_um, enmap.bands[-1].wavelength_um) == (0.418416, 2.4453)
    landuse = sensors.get("osm-landuse")["fclass"].classes
    assert landuse is not None
    assert landuse[7217] == "scrub"
    assert len(landuse) == 8


def test_a_table_of_ones_own_by_path(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE)
    drone = sensors.get(path)
    assert drone.name == "drone"
    assert drone["r"] == Band("red", 0.1, "reflectance", wavelength_um=0.66, width_um=0.03, aliases=("R",))
    assert drone["nir"].range == (0, 1)
    write(tmp_path, TABLE.replace("0.66", "0.65"))
    assert sensors.get(path)["red"].wavelength_um == 0.65, "an edited table is read anew"


def test_a_table_may_build_on_another(tmp_path: Path) -> None:
    old = sensors.get(
        write(tmp_path, 'like = "landsat-7-etm"\nwithout = ["B6"]\ndefaults = { scale = 1e-4, offset = 0 }\n'
              'bands = [{ name = "B1", description = "hazy" }, { name = "fmask", gsd_m = 30, unit = "class", scale = 1 }]', "old.toml")
    )  # fmt: skip
    base = sensors.get("landsat-7-etm")
    assert old.names == ("B1", "B2", "B3", "B4", "B5", "B7", "fmask")
    assert old["red"] == replace(base["red"], scale=1e-4, offset=0)
    assert old["B1"].description == "hazy"
    assert old["fmask"] == Band("fmask", 30, "class")
    assert (old.kind, old.source) == (base.kind, base.source)
    newer = sensors.get(write(tmp_path, 'like = "old.toml"\ntitle = "N"\nwithout = ["fmask"]', "newer.toml"))
    assert newer.names == old.names[:-1]
    assert newer.title == "N"


def test_band_ranges_count_up(tmp_path: Path) -> None:
    text = 'kind = "optical"\nsource = "lab"\ndefaults = { unit = "reflectance", gsd_m = 1 }\n[[band_ranges]]\n'
    good = 'name = "x{:02d}"\nfirst = 9\nwidth_um = 0.01\nwavelength_um = [0.5, 0.6]'
    made = sensors.get(write(tmp_path, text + good))
    assert made.bands == tuple(Band(n, 1, "reflectance", w, 0.01) for n, w in (("x09", 0.5), ("x10", 0.6)))
    with pytest.raises(ValueError, match="counter"):
        sensors.get(write(tmp_path, text + 'name = "x"\nwavelength_um = [0.5]'))
    with pytest.raises(ValueError, match="a list"):
        sensors.get(write(tmp_path, text + 'name = "x{}"\nwavelength_um = 0.5'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"its makers"', '""'), "lacks 'source'"),
        (('kind = "optical"\n', ""), "lacks 'kind'.*optical, sar"),
        (('kind = "optical"', 'kind = "optic"'), "Did you mean optical"),
        (("title", "tilte"), "unknown key 'tilte'. Did you mean title"),
        (("width_um = 0.03", "widht_um = 0.03"), "band red: unknown key 'widht_um'. Did you mean width_um"),
        (('"reflectance"', '"reflectence"'), "Did you mean reflectance"),
        ((", gsd_m = 0.1", ""), "band red lacks 'gsd_m'"),
        (('unit = "reflectance", ', ""), "band red lacks 'unit'"),
        (("gsd_m = 0.1", "gsd_m = 0"), "gsd_m=0 must be positive"),
        (("0.66", "0.066"), "not in micrometres"),
        (("0.03", "-0.03"), "width_um=-0.03 must be positive"),
        (("1e-4", "0"), "scale=0"),
        (("[0, 1]", "[1, 0]"), "lowest, highest"),
        (("[0, 1]", '[0, 1], classes = { 1 = "x" }'), "classes need unit"),
        (('name = "nir"', 'name = "red"'), "every band needs a name"),
        (('name = "nir", ', ""), "every band needs a name"),
        (('name = "nir"', 'name = "r"'), "'r' names both red and r"),
        (('aliases = ["R"]', 'aliases = ["NIR"]'), "'nir' names both red and nir"),
        (("title", 'like = "landsat"\ntitle'), "like='landsat' is no sensor. Did you mean landsat"),
        (("title", 'like = "drone.toml"\ntitle'), "like itself"),
        (("title", 'like = "modis"\nwithout = ["B9"]\ntitle'), "'B9' is no band of 'modis'"),
        (("title", "= title"), "drone.toml"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_an_error_that_names_file_and_fact(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = write(tmp_path, TABLE.replace(*change, 1))
    with pytest.raises(ValueError, match=message) as caught:
        sensors.get(path)
    assert "drone.toml" in str(caught.value)


def test_a_table_without_bands_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no bands"):
        sensors.get(write(tmp_path, 'kind = "sar"\nsource = "x"'))


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"'sentinel-2-l2b'.*sentinel-2-l2a.*\.toml"):
        sensors.get("sentinel-2-l2b")
    with pytest.raises(LookupError, match=r"sentinel-2-l2a has no band 'B10'.*Did you mean"):
        sensors.get("sentinel-2-l2a")["B10"]
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        sensors.get(str(tmp_path / "absent.toml"))


def test_two_bands_of_one_name_are_refused_in_python_too() -> None:
    with pytest.raises(ValueError, match="names both"):
        Sensor("x", "sar", (Band("VV", 10, "dB"), Band("vv", 10, "dB")), "me")


@pytest.mark.parametrize("sensor", ALL, ids=lambda s: s.name)
def test_a_sensor_survives_as_a_table_in_memory(sensor: Sensor) -> None:
    """As models keep it in their settings: through JSON, where keys are strings and there are no tuples."""
    table = sensors.to_table(sensor)
    assert json.loads(json.dumps(table)) == table
    assert sensors.from_table(sensor.name, table) == sensor


def test_a_table_in_memory_may_build_on_a_sensor() -> None:
    table = {"like": "naip", "without": ["nir"], "defaults": {"gsd_m": 1}}
    made = sensors.from_table("naip-1m", table)
    assert made.names == ("red", "green", "blue")
    assert {band.gsd_m for band in made.bands} == {1}
    assert table == {"like": "naip", "without": ["nir"], "defaults": {"gsd_m": 1}}, "left as it was"
    with pytest.raises(ValueError, match=r"sensor x: unknown key 'bnads'. Did you mean bands"):
        sensors.from_table("x", {"bnads": []})
