"""Crop mask of Africa: columns where they belong, seasons as dates, whole regions held out."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

import numpy as np
import pytest

from everysat.data.dea_cropmask import COLUMNS, FILE, INDICES, MADS, S2, build, fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cropmask")
    fake(root)
    return root


def rows(folder, region):
    path = folder / region / FILE
    names = path.read_text().split("\n")[0].split()[1:]
    return [dict(zip(names, row, strict=True)) for row in np.loadtxt(path)]


def test_each_column_is_the_band_and_season_it_is_called(folder):
    data = build(root=folder, split="test", held_out="sahel")
    truth = rows(folder, "sahel")[2]
    place = data[2]
    for layer, columns in (("s2", S2), ("mads", MADS), ("indices", INDICES)):
        raster = place.raster(layer)
        for column, band in zip(columns, raster.sensor.names, strict=True):
            assert band == S2.get(column, column)
            held = raster.select([band]).values.flatten().tolist()
            assert held == pytest.approx([truth[f"{column}_S1"], truth[f"{column}_S2"]], abs=1e-6)
    assert place.raster("s2").sensor.name == "sentinel-2-l2a"
    assert place.raster("rain").values.flatten().tolist() == pytest.approx([truth["rain_S1"], truth["rain_S2"]])
    assert place.raster("slope").values.item() == pytest.approx(math.degrees(math.atan(truth["slope"] / 100)))
    assert place.raster("label").values.item() == truth["Class"]


def test_seasons_are_the_halves_of_2019_and_the_climate_has_no_date(folder):
    place = build(root=folder)[0]
    first, second, end = (datetime(*day, tzinfo=UTC).timestamp() for day in ((2019, 1, 1), (2019, 7, 1), (2020, 1, 1)))
    for layer in ("s2", "mads", "indices"):
        assert place.raster(layer).time_s.tolist() == [[first, second], [second, end]]
    for layer in ("rain", "slope"):
        assert place.raster(layer).time_s.isinf().all()


def test_a_region_is_held_out_whole(folder):
    for held_out, after in (("central", "eastern"), ("sahel", "central")):
        parts = {split: build(root=folder, split=split, held_out=held_out) for split in ("train", "val", "test", "all")}
        regions = {split: set(part.groups) for split, part in parts.items()}
        assert regions["test"] == {held_out}
        assert regions["val"] == {after}
        assert regions["train"] == regions["all"] - {held_out, after}
        assert parts["all"].codes.tolist() == [
            int(b.raster("label").values) for b in map(parts["all"].__getitem__, range(16))
        ]
    chosen = build(root=folder, split="val", held_out="central", validate_on="sahel")
    assert set(chosen.groups) == {"sahel"}
    with pytest.raises(ValueError, match="validate_on='sahel' is the region that is held out"):
        build(root=folder, held_out="sahel", validate_on="sahel")
    with pytest.raises(
        LookupError, match=r"held_out='estern': .* has no estern/training_data\.txt\. Did you mean eastern"
    ):
        build(root=folder, held_out="estern")


def test_a_row_that_is_there_twice_is_one_place(tmp_path):
    fake(tmp_path)
    path = tmp_path / "sahel" / FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], *lines[1:], ""]))
    data = build(root=tmp_path, split="test", held_out="sahel")
    assert len(data) == 4
    first = data[0].raster("s2").values.flatten()[0].item()
    assert first == pytest.approx(float(lines[2].split()[1]), abs=1e-6)


def test_columns_are_found_by_name_in_any_order(folder, tmp_path):
    fake(tmp_path)
    path = tmp_path / "sahel" / FILE
    names, *values = (line.lstrip("# ").split() for line in path.read_text().splitlines())
    order = np.random.default_rng(0).permutation(len(names))
    path.write_text(
        "\n".join(["# " + " ".join(names[i] for i in order), *(" ".join(row[i] for i in order) for row in values), ""])
    )
    moved, plain = (build(root=root, split="test", held_out="sahel")[1] for root in (tmp_path, folder))
    assert all(moved.raster(name).values.equal(plain.raster(name).values) for name in plain.layers)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda text: text.replace("bcdev_S1", "bcdef_S1"), ValueError, r"has no column 'bcdev_S1'"),
        (lambda text: text.rstrip("\n")[:-3], OSError, r"its last row is not complete"),
        (lambda text: text + "1.0 2.0\n", OSError, r"cannot be read"),
        (lambda text: re.sub(r" 0\.5\d+", " nan", text, count=1), ValueError, r"all of them finite"),
        (lambda text: text.replace("\n1.000000 ", "\n7.000000 ").replace("\n0.000000 ", "\n7.000000 "), ValueError, "code 7"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(tmp_path, spoil, error, message):
    fake(tmp_path)
    path = tmp_path / "southern" / FILE
    path.write_text(spoil(path.read_text()))
    with pytest.raises(error, match=rf"southern/training_data\.txt.*{message}"):
        build(root=tmp_path, split="test")[0]


def test_nothing_to_train_on_is_said(tmp_path):
    fake(tmp_path)
    for region in ("eastern", "sahel"):
        (tmp_path / region / FILE).unlink()
    with pytest.raises(ValueError, match="the regions central, southern: none is left to train on"):
        build(root=tmp_path)


def test_the_real_regions_are_physical(data_dir):
    """Reflectance below that of sand, indices that follow from the bands, rain of the season it falls in, five regions."""
    root = data_dir / "dea_cropmask"
    if not root.is_dir():
        pytest.skip("needs dea_cropmask")
    data = build(root=root, split="all")
    assert len(data) == 3509 + 4444 + 6101 + 4177 + 4445
    assert len(set(data.groups)) == 5
    assert data.codes.mean() == pytest.approx(0.419, abs=0.001)
    items = [data[i] for i in range(0, len(data), 60)]
    s2 = np.stack([item.raster("s2").values.numpy()[:, :, 0, 0] for item in items])
    assert 0 < s2.min() < s2.max() < 1.2
    indices = np.stack([item.raster("indices").values.numpy()[:, :, 0, 0] for item in items])
    names = items[0].raster("s2").sensor.names
    red, nir, green, swir = (s2[..., names.index(name)] for name in ("B04", "B08", "B03", "B11"))
    assert np.abs((nir - red) / (nir + red) - indices[..., 0]).max() < 0.1
    assert np.abs((green - swir) / (green + swir) - indices[..., 2]).max() < 0.1
    region = data.groups[::60]
    rain = np.stack([item.raster("rain").values.numpy().ravel() for item in items])
    assert (rain[region == "sahel"][:, 1] > rain[region == "sahel"][:, 0]).mean() > 0.8, (
        "most of the Sahel is wet in August"
    )
    assert (rain[region == "south_eastern"][:, 0] > rain[region == "south_eastern"][:, 1]).mean() > 0.8
    slope = np.array([item.raster("slope").values.item() for item in items])
    assert 0 <= slope.min() < slope.max() < 60
    assert set(COLUMNS) < set(rows(root, "central")[0])
