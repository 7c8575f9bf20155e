"""Each kind of problem is found where it was put, and nothing is said of data that are right."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox
from typer.testing import CliRunner, Result

from everysat import sensors
from everysat.cli import app
from everysat.data import pastis, treesatai
from everysat.data.check import KINDS, SHOWN, check
from everysat.data.leakage import Pair, close_pairs, corners, digest, equal_pairs
from everysat.io.grid import place_of
from everysat.types import Batch, Place, Raster

S2 = sensors.get("sentinel-2-l2a").select(["B04", "B08"])
LABEL = sensors.from_table(
    "cover", {"kind": "classes", "source": "made", "bands": [{"name": "c", "gsd_m": 10.0, "unit": "class", "classes": {"0": "a", "1": "b"}}]}
)  # fmt: skip
DAYS = torch.tensor([[86400.0 * d, 86400.0 * (d + 1)] for d in (100, 105, 110)], dtype=torch.float64)


def place(column: float, row: float = 0.0, crs: str = "EPSG:32633") -> Place:
    """A square of 80 m, ``column`` and ``row`` of them east and south of a corner."""
    return place_of(GeoBox((8, 8), Affine(10.0, 0.0, 400_000 + 80 * column, 0.0, -10.0, 5_800_000 - 80 * row), crs))


def item(number: int, at: Place | None = None, **changes: Raster) -> Batch:
    made = torch.Generator().manual_seed(number)
    s2 = Raster.of(S2, torch.rand(3, 2, 8, 8, generator=made), 10.0, time_s=DAYS)
    label = Raster.of(LABEL, torch.randint(0, 2, (1, 1, 8, 8), generator=made).float(), 10.0)
    return Batch((at or place(2 * number),), {"s2": s2, "label": label, **changes})


def parts(*first: Batch, other: tuple[Batch, ...] = ()) -> dict[str, tuple[Batch, ...]]:
    return {"train": (item(0), item(1), *first), "test": (item(50), *other)}


def found(report) -> Counter:
    return Counter((p.kind, p.part, p.index, p.layer) for p in report.problems)


def test_right_data_have_no_problems() -> None:
    report = check(parts())
    assert report.good
    assert (report.counts, report.problems, report.notes, report.broken) == ({}, [], [], {})
    assert report.places == {"train": 2, "test": 1}
    assert check({}).good


def s2(change) -> Raster:
    return change(item(7).raster("s2"))


def moved(raster: Raster, band: int, value: float, pixels: int = 5) -> Raster:
    values = raster.values.clone()
    values[:, band].flatten()[:pixels] = value
    values[0, band].view(-1)[:pixels] = value
    return replace(raster, values=values)


@pytest.mark.parametrize(
    ("kind", "layer", "raster", "message"),
    [
        ("range", "s2", s2(lambda r: moved(r, 1, 45.0)), r"band B08: 5 of 192 values, 45 to 45 reflectance, are outside of"),
        ("not finite", "s2", s2(lambda r: moved(r, 0, float("nan"))), r"5 of 384 valid values are NaN"),
        ("empty", "s2", s2(lambda r: replace(r, valid=torch.zeros_like(r.valid))), "none of 384 values is valid"),
        ("order", "s2", s2(lambda r: replace(r, time_s=DAYS[[0, 2, 1]])), r"observation 2, 1970-04-16, follows 1970-04-21"),
        ("repeated", "s2", s2(lambda r: replace(r, time_s=DAYS[[0, 1, 1]])), r"1 of 3 observations, on 1970-04-16"),
        ("shape", "s2", s2(lambda r: replace(r, gsd_m=10.0, values=r.values[..., :4], valid=r.valid[..., :4])), r"4 pixels of 10 m do not cover a place of 80 m"),
        ("shape", "s2", s2(lambda r: r.select(["B08", "B04"])), r"bands B08, B04 of sentinel-2-l2a at 10 m, in other places B04, B08"),
        ("label", "label", Raster.of(LABEL, torch.full((1, 1, 8, 8), 2.0), 10.0), "band c holds 2, which is no class"),
    ],
)  # fmt: skip
def test_a_layer_that_is_wrong_is_found(kind: str, layer: str, raster: Raster, message: str) -> None:
    report = check(parts(item(7, **{layer: raster})))
    assert found(report) == {(kind, "train", 2, layer): 1}
    assert not report.good
    assert re.search(message, report.problems[0].message), report.problems[0].message
    assert check(parts(item(7, **{layer: raster})), allow=[kind]).good


def test_invalid_values_are_not_looked_at() -> None:
    raster = item(7).raster("s2")
    hidden = moved(moved(raster, 0, float("inf")), 1, 1e9)
    valid = raster.valid.clone()
    valid[0, :].flatten(1)[:, :5] = False
    valid[0].view(2, -1)[:, :5] = False
    assert check(parts(item(7, s2=replace(hidden, valid=valid)))).good


def test_a_few_values_out_of_range_are_let_pass() -> None:
    wrong = parts(item(7, s2=s2(lambda r: moved(r, 1, 45.0))))
    assert check(wrong, outside=5 / 192).good
    assert not check(wrong, outside=4 / 192).good


class Broken:
    """A dataset of which some places raise."""

    def __init__(self, *items: Batch | Exception) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


@pytest.mark.parametrize("workers", [0, 3])
def test_places_that_cannot_be_read_are_listed_and_the_rest_is_looked_at(workers: int) -> None:
    errors = (
        FileNotFoundError("a.npy is missing"),
        OSError("b.npy ends"),
        ValueError("c.npy holds (3,)"),
        KeyError("no x in d.h5"),
        TypeError("odd"),
    )
    data = Broken(item(0), *errors, item(1, s2=s2(lambda r: moved(r, 0, 99.0))), Batch.cat([item(3), item(4)]))
    report = check({"train": data}, workers=workers)
    kinds = ["missing", "unreadable", "refused", "refused", "refused", "range", "refused"]
    assert [(p.kind, p.index) for p in report.problems] == list(zip(kinds, range(1, 8), strict=True))
    messages = [p.message for p in report.problems]
    assert messages[:5] == ["a.npy is missing", "b.npy ends", "c.npy holds (3,)", "no x in d.h5", "TypeError: odd"]
    assert messages[-1] == "the item is a batch of 2 places, expected one"
    assert report.broken == {"train": [1, 2, 3, 4, 5, 7]}
    with pytest.raises(MemoryError):
        check({"train": Broken(MemoryError())}, workers=workers)


def test_all_problems_are_counted_also_those_not_listed() -> None:
    report = check({"train": Broken(*[OSError("ends")] * (SHOWN + 9))})
    assert report.counts == {"unreadable": SHOWN + 9}
    assert len(report.problems) == SHOWN
    assert report.broken == {"train": list(range(SHOWN + 9))}


def test_the_same_pixels_in_two_parts_are_found_whatever_their_place_and_label() -> None:
    copy = replace(item(1), places=(place(300),)).adding(label=item(9).raster("label"))
    report = check(parts(other=(item(51), copy)))
    assert found(report) == {("duplicate", "test", 2, "s2"): 1}
    assert "train 1 has the same pixels" in report.problems[0].message
    inside = check(parts(copy))
    assert inside.good
    assert inside.notes == ["layer s2: 1 places repeat the pixels of another one of their part"]


def test_layers_that_are_alike_by_nature_are_no_duplicates() -> None:
    flat = Raster.of(S2, torch.full((3, 2, 8, 8), 0.5), 10.0, time_s=DAYS)
    assert check({"train": [item(0, s2=flat)], "test": [item(1, s2=flat)]}).good


def test_places_that_share_ground_are_found_and_neighbours_are_not() -> None:
    other = item(51, place(0.5, 0.5)), item(52, place(1, 0)), item(53, place(2, 3))
    report = check(parts(other=other))
    assert found(report) == {("overlap", "test", 1, ""): 1}
    assert report.problems[0].message == "train 0 covers 25 % of the same ground"
    near = check(parts(other=other), near_m=1.0)
    assert near.counts == {"overlap": 1, "near": 2}  # a neighbour of both places of the other part
    assert check(parts(other=other), near_m=161.0).counts["near"] > 3
    assert "away" in near.problems[-1].message


def test_training_sets_may_share_places_and_differ_in_bands() -> None:
    sets = {"a": [item(0)], "b": [item(0, s2=item(0).raster("s2").select(["B08"]))], "c": [item(0)], "test": [item(50)]}
    assert check(sets).counts == {"duplicate": 1, "overlap": 3}
    assert check(sets, together=[["a", "b", "c"], ["test"]]).good
    assert check({**sets, "test": [item(0)]}, together=[["a", "b", "c"]]).counts == {"duplicate": 1, "overlap": 3}


def test_the_data_of_a_recipe_are_checked(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    source = "{name: synthetic, options: {places: 3, seed: %d}}"
    text = f"name: r\nmodel: {{name: omnisat/tiny}}\nobjective: {{name: omnisat}}\nsteps: 1\ndata: [{source % 0}, {source % 0}]\n"
    recipe.write_text(text + f"validation: [{source % 1}]\n")
    run = ["data", "check", "--recipe", str(recipe), "--json", "--quiet"]
    shown = CliRunner().invoke(app, run, catch_exceptions=False)
    assert json.loads(shown.stdout)["places"] == {
        "data synthetic 0": 3,
        "data synthetic 1": 3,
        "validation synthetic 0": 3,
    }
    assert "duplicate" not in json.loads(shown.stdout)["counts"]
    same = CliRunner().invoke(app, [*run, "--set", "validation.0.options.seed=0"], catch_exceptions=False)
    assert json.loads(same.stdout)["counts"]["duplicate"] == 3
    assert same.exit_code == 1


def test_the_rest_is_noted() -> None:
    late = s2(lambda r: replace(r, valid=r.valid & (torch.arange(3) > 0)[:, None, None, None]))
    small = Batch((Place(40.0, 40.0),), {"s2": Raster.of(S2, torch.rand(1, 2, 4, 4), 10.0, time_s=DAYS[:1])})
    notes = check(parts(item(7, s2=late), small)).notes
    assert notes == [
        "layer s2 has places of 2 sizes: mostly 8 x 8, 4 x 4 pixels in train 3",
        "layer label is absent in 1 of 5 places",
        "layer s2: 1 observations without any valid value",
        "1 of 5 places do not say where they are: overlaps of these are not seen",
    ]


def test_it_can_be_written_as_json() -> None:
    report = check(parts(item(7, s2=s2(lambda r: moved(r, 1, 45.0)))))
    plain = json.loads(report.json())
    assert plain["counts"] == {"range": 1}
    assert plain["problems"][0]["layer"] == "s2"
    assert not plain["good"]


@pytest.mark.parametrize("options", [{"allow": ["ranges"]}, {"near_m": -1}, {"outside": 2}])
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises((LookupError, ValueError), match=r"allow='ranges' is unknown. Did you mean range|near_m="):
        check({}, **options)
    assert "range" in KINDS


# --- outlines and hashes ---------------------------------------------------------------------------------------------


def grid(rng: np.random.Generator, count: int, lon: float, lat: float) -> np.ndarray:
    """Squares of 1 km at random within about 20 km around a point."""
    centres = np.array([lon, lat]) + rng.uniform(-0.1, 0.1, (count, 2))
    found = []
    for x, y in centres:
        outline = corners(Place(1000.0, 1000.0, lonlat=((x + 180) % 360 - 180, y)))
        assert outline is not None
        found.append(outline)
    return np.stack(found)


def pairs(outlines: np.ndarray, part: np.ndarray, near_m: float = 0.0) -> dict[tuple[int, int], Pair]:
    found = list(close_pairs(outlines, part, near_m))
    assert len({(p.a, p.b) for p in found}) == len(found)
    return {(p.a, p.b): p for p in found}


@pytest.mark.parametrize("near_m", [0.0, 700.0])
@pytest.mark.parametrize("lat", [0.0, 52.0, -70.0])
def test_pairs_are_those_of_a_plane_computation_and_do_not_depend_on_the_antimeridian(
    lat: float, near_m: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everysat.data.leakage.BLOCK", 7)
    part = np.arange(60) % 3
    here, there = (grid(np.random.default_rng(1), 60, lon, lat) for lon in (10.0, 180.0))
    mine, moved = pairs(here, part, near_m), pairs(there, part, near_m)
    assert mine.keys() == moved.keys()
    assert len(mine) > 5
    centre = here.mean(1)
    from pyproj import Geod

    for a in range(60):
        for b in range(60):
            x, y = np.abs(centre[a] - centre[b])
            east = Geod(ellps="WGS84").inv(centre[a, 0], centre[a, 1], centre[a, 0] + x, centre[a, 1])[2]
            north = Geod(ellps="WGS84").inv(centre[a, 0], centre[a, 1] - y / 2, centre[a, 0], centre[a, 1] + y / 2)[2]
            gap = np.hypot(max(0.0, east - 1000), max(0.0, north - 1000))
            share = max(0.0, 1 - east / 1000) * max(0.0, 1 - north / 1000)
            expected = part[a] < part[b] and (share > 0.005 or gap < near_m)
            doubtful = abs(share - 0.005) < 0.005 or (near_m and abs(gap - near_m) < 15)
            assert doubtful or expected == ((a, b) in mine), (a, b, share, gap)


def test_outlines_are_corners_in_degrees() -> None:
    outline = corners(place(0))
    assert outline is not None
    lon, lat = outline.T
    assert (lon.min() > 13.5, lon.max() < 13.6, lat.min() > 52.3, lat.max() < 52.4) == (True,) * 4
    assert lat[0] > lat[2]
    assert lon[0] < lon[2]
    around = corners(Place(80.0, 80.0, lonlat=place(0).lonlat or (float(lon.mean()), float(lat.mean()))))
    assert np.abs(around - outline).max() < 3e-5  # a rectangle to the north instead of to the grid's north
    assert corners(Place(80.0, 80.0)) is None


def test_neighbours_of_two_zones_are_not_taken_for_overlapping() -> None:
    a, b = corners(place(0)), corners(place(1))
    assert not list(close_pairs(np.stack([a, b]), np.array([0, 1])))
    assert list(close_pairs(np.stack([a, b]), np.array([0, 1]), 0.5))
    assert not list(close_pairs(np.zeros((0, 4, 2)), np.zeros(0, int)))


def test_equal_hashes_pair_with_the_first_of_the_lowest_part() -> None:
    codes = np.array([5, 0, 7, 5, 7, 0, 5, 9], dtype=np.uint64)
    part = np.array([1, 0, 0, 0, 2, 1, 1, 0])
    found, repeated = equal_pairs(codes, part)
    assert sorted(found) == [(2, 4), (3, 0), (3, 6)]
    assert repeated == 1
    assert equal_pairs(codes[:0], part[:0]) == ([], 0)


def test_the_hash_is_of_valid_pixels_alone() -> None:
    raster = item(3).raster("s2")
    hidden = replace(raster, valid=raster.valid & (torch.arange(8) > 0))
    changed = replace(hidden, values=torch.where(hidden.valid, raster.values, float("nan")))
    assert digest(hidden) == digest(changed) != digest(raster)
    assert digest(replace(raster, time_s=DAYS + 5)) == digest(raster)
    assert digest(Raster.of(S2, raster.values.reshape(3, 2, 4, 16), 10.0)) != digest(raster)


# --- on files --------------------------------------------------------------------------------------------------------


def test_the_command_line_finds_what_was_spoiled(tmp_path: Path) -> None:
    treesatai.fake(tmp_path, places=6)

    def run(*more: str) -> Result:
        return CliRunner().invoke(app, ["data", "check", str(tmp_path), "--name", "treesatai-ts", "--quiet", *more])

    right = run("--json")
    assert (right.exit_code, json.loads(right.stdout)["good"]) == (0, True), right.stderr
    photo = next((tmp_path / "aerial").glob("*.tif"))
    photo.write_bytes(photo.read_bytes()[:5000])
    wrong = run("--json", "--allow", "near")
    assert wrong.exit_code == 1
    report = json.loads(wrong.stdout)
    assert report["counts"] == {"unreadable": 1}
    assert photo.name in report["problems"][0]["message"]
    shown = run("--split", "train", "--split", "val", "--split", "test").stdout
    assert str(photo) in shown
    assert "1 unreadable: a file is truncated" in shown
    neither = CliRunner().invoke(app, ["data", "check"])
    assert "give either a folder and --name DATASET" in str(neither.exception)


def test_neighbouring_places_of_pastis_are_near_but_do_not_overlap(tmp_path: Path) -> None:
    pastis.fake(tmp_path)
    data = {split: pastis.build(root=tmp_path, split=split, modalities=["s1-asc"]) for split in pastis.SPLITS}
    assert check(data).good
    assert check(data, near_m=10.0).counts == {"near": 3}
