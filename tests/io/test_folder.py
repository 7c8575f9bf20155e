"""A place from a folder of rasters that one table describes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

import everysat as es
from everysat import sensors
from everysat.io import catalogue, folder, grid
from everysat.io.fields import read_each
from everysat.types import ALWAYS, ContractError, Input, Place, Raster

UTM = "EPSG:32632"
CORNER = (600_000.0, 5_400_000.0)
SIZE = 40


def place(row: int = 4, col: int = 8, size: int = 16) -> Place:
    corner = Affine(10, 0, CORNER[0] + 10 * col, 0, -10, CORNER[1] - 10 * row)
    return grid.place_of(GeoBox((size, size), corner, UTM))


def numbers(seed: int = 0, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1100, 4000, shape or (SIZE, SIZE)).astype(np.uint16)


def contract(sensor: str, *bands: str, gsd: float = 10, dated: bool = True) -> Input:
    chosen = sensors.get(sensor).select(bands)
    return Input(chosen, gsd, (0.0,) * len(bands), (1.0,) * len(bands), dated)


def table(path: Path, text: str) -> Path:
    path.write_text(f'folder = "."\n{text}')
    return path


S2 = """
[collections.s2]
sensor = "sentinel-2-l2a"
files = "s2/S2_{date}_{band}.tif"
processing_baseline = "05.09"
mask = { files = "s2/S2_{date}_SCL.tif", sensor = "sentinel-2-scl" }
"""


@pytest.fixture
def source(tmp_path: Path, make) -> Path:
    """Two dates of Sentinel-2 by band, with masks; radar in one file a date; elevation."""
    (tmp_path / "s2").mkdir()
    for seed, day in enumerate(("20240603", "20240608")):
        for offset, band in enumerate(("B04", "B08")):
            make(f"s2/S2_{day}_{band}.tif", numbers(10 * seed + offset))
        codes = np.full((SIZE // 2, SIZE // 2), 4, np.uint8)
        codes[seed : 8 + seed] = 9
        make(f"s2/S2_{day}_SCL.tif", codes, gsd=20)
        radar = np.random.default_rng(seed).uniform(0.01, 1, (2, SIZE, SIZE)).astype(np.float32)
        make(f"radar-2024_{155 + seed}.tif", radar)
    make("height.tif", np.full((14, 14), 71.5, np.float32), gsd=30)
    return table(
        tmp_path / "source.toml",
        S2
        + """
[collections.radar]
sensor = "sentinel-1-grd"
files = "radar-{date:%Y_%j}.tif"
bands = ["VV", "VH"]
stored = "linear"
[collections.height]
sensor = "copernicus-dem"
files = "height.tif"
bands = ["elevation"]
dated = false
""",
    )


INPUTS = {
    "s2": contract("sentinel-2-l2a", "B08", "B04"),
    "s1": contract("sentinel-1-grd", "VV", "VH"),
    "dem": contract("copernicus-dem", "elevation", gsd=30, dated=False),
}


def test_a_folder_gives_the_pixels_of_its_files(source):
    batch = es.read(place(), "2024-06", INPUTS, source=source)
    rows, cols = slice(4, 20), slice(8, 24)
    optical = batch.raster("s2")
    for obs, seed in enumerate((0, 1)):
        clear = np.repeat(np.repeat(np.arange(20)[:, None] * np.ones((1, 20)), 2, 0), 2, 1)
        clear = ~((clear >= seed) & (clear < 8 + seed))[rows, cols]
        for band, offset in enumerate((1, 0)):
            wanted = numbers(10 * seed + offset)[rows, cols] * 1e-4 - 0.1
            np.testing.assert_array_equal(optical.valid[obs, band].numpy(), clear)
            np.testing.assert_allclose(optical.values[obs, band].numpy()[clear], wanted[clear], atol=1e-6)
    with rasterio.open(source.parent / "radar-2024_155.tif") as file:
        power = file.read()[:, rows, cols]
    np.testing.assert_allclose(batch.raster("s1").values[0], 10 * np.log10(power), atol=1e-4)
    assert (batch.raster("dem").values == 71.5).all()
    assert tuple(batch.raster("dem").time_s[0].tolist()) == ALWAYS
    days = (batch.raster("s1").time_s[:, 0] / 86400).tolist()
    assert [days[1] - days[0], days[0]] == [1, 19877], "day 155 of 2024 is 3 June"


def test_the_period_chooses(source):
    for period, count in (("2024-06-03", 1), ("2024", 2), (("2024-06-04", "2024-06-30"), 1)):
        assert len(es.read(place(), period, {"s2": INPUTS["s2"]}, source=source).raster("s2").values) == count
    with pytest.raises(LookupError, match=r"nothing of sentinel-2-l2a was found in .*source\.toml"):
        es.read(place(), "2023", {"s2": INPUTS["s2"]}, source=source)
    with pytest.raises(LookupError, match="check the place"):
        es.read(place(row=4000), "2024", {"s2": INPUTS["s2"]}, source=source)


def test_it_equals_reading_the_files_by_hand(source):
    by_hand = es.read(
        sorted((source.parent / "s2").glob("*_B0?.tif")) + sorted((source.parent / "s2").glob("*_SCL.tif")),
        place=place(), sensor="sentinel-2-l2a", processing_baseline="05.09", valid={"SCL": (2, 4, 5, 6, 7, 11)},
    ).raster("sentinel-2-l2a-10m")  # fmt: skip
    read = es.read(place(), "2024", source=source, sensor="sentinel-2-l2a").raster("sentinel-2-l2a-10m")
    assert torch.equal(read.values, by_hand.values)
    assert torch.equal(read.valid, by_hand.valid)
    assert torch.equal(read.time_s, by_hand.time_s)


def test_what_is_written_is_read_again(tmp_path, source):
    """Files of this package hold their sensor, bands and dates; a table that names the sensor alone is enough."""
    first = es.read(place(), "2024-06-03", source=source, sensor="copernicus-dem").raster("copernicus-dem-30m")
    band = sensors.get("sentinel-2-l2a").select(["B04"])
    values = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    times = [(1.7e9, 1.7e9 + 1), (1.71e9, 1.71e9 + 1)]
    raster = Raster.of(band, values, 10.0, time_s=times)
    es.write(es.Batch((place(),), {"s2": raster}), tmp_path / "series.tif")
    again = table(tmp_path / "again.toml", '[collections.s2]\nsensor = "sentinel-2-l2a"\nfiles = "series.tif"\n')
    read = es.read(place(), ("2023", "2025"), source=again, sensor="sentinel-2-l2a").raster("sentinel-2-l2a-10m")
    assert torch.equal(read.values, raster.values)
    assert torch.equal(read.time_s, raster.time_s)
    some = es.read(place(), "2023", source=again, sensor="sentinel-2-l2a").raster("sentinel-2-l2a-10m")
    assert torch.equal(some.values, raster.values[:1])
    assert first.valid.all()


def test_tiles_of_a_date_are_one_observation(tmp_path, make):
    left, right = numbers(1), numbers(2)
    make("west_20240603_B04.tif", left)
    make("east_20240603_B04.tif", right, corner=(CORNER[0] + 10 * SIZE, CORNER[1]))
    made = table(
        tmp_path / "s.toml",
        '[collections.s2]\nsensor = "sentinel-2-l2a"\nfiles = "*_{date}_{band}.tif"\nprocessing_baseline = "03.01"\n',
    )
    layer = es.read(place(4, SIZE - 8), "2024", source=made, sensor="sentinel-2-l2a").raster("sentinel-2-l2a-10m")
    both = np.concatenate([left[4:20, SIZE - 8 :], right[4:20, :8]], 1)
    np.testing.assert_allclose(layer.values[0, 0], both * 1e-4, atol=1e-6)
    assert len(layer.values) == 1


def test_fields_of_a_folder(source):
    some = [place(row, col, 4) for row in (20, 24, 28) for col in (0, 4, 8)]
    for each, batch in zip(some, read_each(some, "2024-06-03", INPUTS, source=source), strict=True):
        one = es.read(each, "2024-06-03", INPUTS, source=source)
        assert {n: batch.raster(n).values.tolist() for n in batch.layers} == {
            n: one.raster(n).values.tolist() for n in one.layers
        }


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("S2_{date}_{band}.tif", "S2_20240603_B8A.tif", ("2024-06-03", "B8A")),
        ("S2_{date}_{band}.tif", "S2_20240603T102030_B8A.tif", ("2024-06-03", "B8A")),
        ("{band}/{date}.tif", "B04/2024-06.tif", ("2024-06-01", "B04")),
        ("**/{date}_{band}_*.tif", "a/b/2024_B04_x.tif", ("2024-01-01", "B04")),
        ("{date}/x_{date}_{band}.tif", "20240603/x_20240603_B04.tif", ("2024-06-03", "B04")),
        ("{date}/x_{date}_{band}.tif", "20240603/x_20240604_B04.tif", None),
        ("{date:%d.%m.%Y}_{band}.tif", "03.06.2024_red.tif", ("2024-06-03", "red")),
        ("{date:%Y-%j}_{band}.tif", "2024-155_red.tif", ("2024-06-03", "red")),
        ("S2_{date}_{band}.tif", "S2_20240231_B04.tif", None),
        ("S2_{date}_{band}.tif", "S2_120240603_B04.tif", None),
    ],
)
def test_patterns(tmp_path, pattern, name, found):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    made = table(tmp_path / "s.toml", f'[collections.s2]\nsensor = "sentinel-2-l2a"\nfiles = "{pattern}"\n')
    source = catalogue.load(made)
    if found is None:
        with pytest.raises(FileNotFoundError, match="no file of collection s2"):
            folder.items(source, source.collections[0], None)
        return
    (item,) = folder.items(source, source.collections[0], None)
    assert (np.datetime64(int(item.time[0]), "s").astype("datetime64[D]").astype(str), *item.assets[""][1]) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[collections.x]\nsensor = "sentinel-2-l2a"', "lacks files"),
        ('[collections.x]\nsensor = "sentinel-2-l2b"\nfiles = "*"', "sentinel-2-l2a"),
        ('[collections.x]\nsensor = "naip"\nfile = "*"', "unknown key 'file'. Did you mean files"),
        ('[collections.x]\nsensor = "naip"\nfiles = "*"\nstored = "db"', "stored = 'db' is not one of"),
        ('[collections.x]\nsensor = "naip"\nfiles = "*"\nmask = { files = "*" }', "mask needs sensor"),
        ('[collections.x]\nsensor = "naip"\nfiles = "*"\nmask = { files = "*", sensor = "naip" }', "needs clear"),
        ('stac = "https://x"\n[collections.x]\nsensor = "naip"\nfiles = "*"', "either stac or folder"),
        ("", "at least one"),
        ("[collections", "is no TOML table"),
    ],
)
def test_wrong_tables_are_named(tmp_path, text, message):
    with pytest.raises((ValueError, LookupError), match=message):
        catalogue.load(table(tmp_path / "s.toml", text))


def test_wrong_patterns_and_files_are_named(source, tmp_path):
    def read(text: str, **more):
        return es.read(place(), "2024", source=table(tmp_path / "wrong.toml", text), sensor="sentinel-2-l2a", **more)

    head = '[collections.x]\nsensor = "sentinel-2-l2a"\n'
    with pytest.raises(ValueError, match=r"\{tile\} in files = .* is neither"):
        read(head + 'files = "{tile}.tif"')
    with pytest.raises(ValueError, match=r"\{date:%Q\} may use"):
        read(head + 'files = "{date:%Q}.tif"')
    with pytest.raises(FileNotFoundError, match=r"no file of collection x .* is called nothing\*"):
        read(head + 'files = "nothing*"')
    with pytest.raises(ValueError, match=r"has no date: put \{date\} into files"):
        read(head + 'files = "height.tif"\nbands = ["B04"]')
    with pytest.raises(ValueError, match=r"height.tif has 1 bands, 2 were expected \(B04, B08\)"):
        read(head + 'files = "height.tif"\nbands = ["B04", "B08"]\ndated = false')
    (tmp_path / "s2" / "S2_20240603_B04.tif").write_bytes(b"II*\0 cut off")
    with pytest.raises(OSError, match=r"S2_20240603_B04.tif cannot be read"):
        es.read(place(), "2024", {"s2": INPUTS["s2"]}, source=source)
    with pytest.raises(FileNotFoundError, match="counts from"):
        catalogue.load(_elsewhere(tmp_path))


def _elsewhere(path: Path) -> Path:
    made = path / "elsewhere.toml"
    made.write_text('folder = "absent"\n[collections.x]\nsensor = "naip"\nfiles = "*"\n')
    return made


def test_a_band_twice_at_a_time_is_an_error(source):
    one = source.parent / "s2" / "S2_20240603_B04.tif"
    (source.parent / "s2" / "S2_2024-06-03_B04.tif").write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match="band B04 at 2024-06-03 comes twice"):
        es.read(place(), "2024", {"s2": INPUTS["s2"]}, source=source)


def test_a_lacking_band_or_mask_is_an_error(source):
    for path in (source.parent / "s2").glob("*_B08.tif"):
        path.unlink()
    with pytest.raises(ContractError, match="lack B08"):
        es.read(place(), "2024", {"s2": INPUTS["s2"]}, source=source)
    (source.parent / "s2" / "S2_20240608_SCL.tif").unlink()
    with pytest.raises(ValueError, match="has nothing for 2024-06-08"):
        es.read(place(), "2024", {"s2": contract("sentinel-2-l2a", "B04")}, source=source)


def test_the_command_line_embeds_a_place(tmp_path, make):
    """From a folder, a place and a period to features on disk; and what is missing is said."""
    from typer.testing import CliRunner

    from everysat import cli
    from everysat.models import anysat

    encoder = anysat.build(
        "nano", modalities={"s2": {**anysat.MODALITIES["s2"], "mean": (0.0,) * 10, "std": (1.0,) * 10}}
    )
    model = es.save(tmp_path / "model.safetensors", encoder)
    for seed, band in enumerate(encoder.inputs["s2"].sensor.names):
        for day in ("20240603", "20240704"):
            make(f"S2_{day}_{band}.tif", numbers(seed))
    made = table(
        tmp_path / "s.toml",
        '[collections.s2]\nsensor = "sentinel-2-l2a"\nfiles = "S2_{date}_{band}.tif"\nprocessing_baseline = "05.09"\n',
    )
    lon, lat = place().lonlat
    where = ["--place", f"{lon},{lat},160", "--source", str(made)]

    def run(*more):
        return CliRunner().invoke(cli.app, ["embed", str(model), "-o", str(tmp_path / "x.tif"), "--quiet", *more])

    done = run(*where, "--period", "2024-06-01/2024-06-30")
    assert done.exit_code == 0, done.output
    with rasterio.open(tmp_path / "x.tif") as file:
        assert np.isfinite(file.read(1)).any()
    files = [str(path) for path in sorted(tmp_path.rglob("S2_20240603_B*.tif"))]
    alone = [*files, "--sensor", "sentinel-2-l2a", "--time", "2024-06-03"]
    assert "--reading processing_baseline" in str(run(*alone).exception)
    done = run(*alone, "--reading", "processing_baseline=05.09")
    assert done.exit_code == 0, done.exception
    for arguments, message in (
        ([*alone, "--reading", "baseline=4"], "--reading baseline"),
        (where, "period: collection s2 has dates"),
        ([], "give files, or a --place and a --period"),
        (["a.tif", *where], "either files, or --period and --source"),
        ([*where, "--period", "2024", "--time", "2024"], "are for files"),
        ([*where, "--period", "2023"], "nothing of sentinel-2-l2a was found"),
    ):
        failed = run(*arguments)
        assert failed.exit_code
        assert message in str(failed.exception)
