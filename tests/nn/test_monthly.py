"""Steps of a month: what is averaged with what, and when a step begins."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import torch

from everysat.nn.monthly import GROUPS, SERIES, Monthly, contract, months
from everysat.types import Batch, ContractError, Place, Raster

ROLES = ("optical", "radar", "weather", "terrain")
PLAIN = contract(
    {role: (0.0,) * (10 if role == "optical" else 2) for role in ROLES},  # type: ignore[misc]
    {role: (1.0,) * (10 if role == "optical" else 2) for role in ROLES},  # type: ignore[misc]
    10.0,
)
MODALITIES = {name: Monthly.model_validate(entry) for name, entry in PLAIN.items()}
INPUTS = {name: m.input(dated=m.role != "terrain") for name, m in MODALITIES.items()}
DAY_S = 86400.0


def seconds(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


def layer(name: str, values: list[list[float]], spans: list[tuple[str, float]]) -> Raster:
    """One pixel: ``values`` [obs][band] at spans that begin on a day and last some days."""
    wanted = INPUTS[name]
    time_s = [(seconds(day), seconds(day) + length * DAY_S) for day, length in spans]
    return Raster.of(wanted.sensor, torch.tensor(values)[:, :, None, None], wanted.gsd_m, time_s=time_s)


def radar(*spans: tuple[str, float], name: str = "s1") -> Raster:
    return layer(name, [[float(i), -float(i)] for i in range(len(spans))], list(spans))


def seen(rain: str = "day", **layers: Raster):
    batch = Batch((Place(10.0, 10.0),), {n.replace("_", "-"): raster for n, raster in layers.items()})
    return months(batch, MODALITIES, INPUTS, (1, 1), 24, rain)  # type: ignore[arg-type]


def test_calendar_months_are_steps() -> None:
    days = [(f"{2020 + i // 12}-{i % 12 + 1:02d}-01", 30.0) for i in range(24)]
    found = seen(s1=radar(*days))
    assert found.step.tolist() == list(range(24))
    assert found.month.tolist() == [i % 12 for i in range(24)]
    assert found.series[:, 0, 0, 0].tolist() == [float(i) for i in range(24)]


def test_composites_of_thirty_days_are_steps_too() -> None:
    """Two of them begin in January."""
    found = seen(s1=radar(("2021-01-01", 30), ("2021-01-31", 30), ("2021-03-02", 30)))
    assert found.step.tolist() == [0, 1, 2]
    assert found.month.tolist() == [0, 0, 2]


def test_a_month_without_an_observation_leaves_a_gap() -> None:
    found = seen(s1=radar(("2021-03-01", 31), ("2021-06-01", 30)))
    assert found.step.tolist() == [0, 3]


def test_single_days_are_averaged_by_calendar_month() -> None:
    found = seen(s1=radar(("2021-03-30", 1), ("2021-03-02", 1), ("2021-04-01", 1)))
    assert found.month.tolist() == [2, 3]
    assert found.series[:, 0, 0, 0].tolist() == [0.5, 2.0]


def test_both_orbits_are_one_radar() -> None:
    found = seen(
        s1_asc=radar(("2021-03-30", 1), name="s1-asc"), s1_des=layer("s1-des", [[4.0, 6.0]], [("2021-03-02", 1)])
    )
    assert found.series[0, :2, 0, 0].tolist() == [2.0, 3.0]


def test_bands_count_their_own_observations() -> None:
    raster = radar(("2021-03-02", 1), ("2021-03-12", 1))
    raster.valid[0, 1] = False
    found = seen(s1=raster)
    assert found.series[0, :2, 0, 0].tolist() == [0.5, -1.0]
    assert found.valid[0, :, 0, 0].tolist() == [True, True] + [False] * 11


def test_the_index_is_of_each_date_and_needs_both_bands() -> None:
    bright, dark = [0.1] * 10, [0.0] * 10
    bright[2], bright[6] = 0.1, 0.3
    found = seen(s2=layer("s2", [bright, dark], [("2021-03-02", 1), ("2021-04-02", 1)]))
    index = SERIES.index("NDVI")
    torch.testing.assert_close(found.series[0, index, 0, 0], torch.tensor(0.5))
    assert found.valid[:, index, 0, 0].tolist() == [True, False]
    assert found.valid[1, 2:12].all()


def test_weather_is_that_of_the_month_in_which_a_step_begins() -> None:
    era5 = layer("era5", [[280.0, 31.0], [270.0, 56.0]], [("2021-01-01", 31), ("2021-02-01", 28)])
    steps = radar(("2021-01-01", 30), ("2021-01-31", 30), ("2021-03-02", 30))
    found = seen(s1=steps, era5=era5)
    assert found.weather[:2].tolist() == [[280.0, 1.0], [280.0, 1.0]]  # millimetres a day
    assert found.has_weather.tolist() == [True, True, False]
    assert seen("month", s1=steps, era5=era5).weather[0].tolist() == [280.0, 31.0]


def test_dekads_of_rain_make_a_month() -> None:
    dekads = [("2021-04-01", 10.0), ("2021-04-11", 10.0), ("2021-04-21", 10.0)]
    agera5 = layer("agera5", [[280.0, 5.0], [283.0, 0.0], [286.0, 25.0]], dekads)
    found = seen("month", agera5=agera5)
    assert found.month.tolist() == [3]
    torch.testing.assert_close(found.weather, torch.tensor([[283.0, 30.0]]))


def test_weather_without_rain_is_none() -> None:
    era5 = layer("era5", [[280.0, 31.0]], [("2021-01-01", 31)])
    era5.valid[:, 1] = False
    assert not seen(era5=era5).has_weather.any()


def test_weather_of_other_months_is_left_out() -> None:
    era5 = layer(
        "era5",
        [[250.0, 1.0], [280.0, 31.0], [300.0, 9.0]],
        [("2020-12-01", 31), ("2021-01-01", 31), ("2022-01-01", 31)],
    )
    found = seen(s1=radar(("2021-01-05", 1)), era5=era5)
    assert found.weather.tolist() == [[280.0, 1.0]]


def test_nothing_has_no_steps() -> None:
    found = seen()
    assert len(found.row) == 0
    assert not found.has_terrain.any()


def test_series_need_dates() -> None:
    raster = radar(("2021-01-05", 1))
    undated = Raster.of(raster.sensor, raster.values, 10.0)
    with pytest.raises(ContractError, match="needs a date"):
        seen(s1=undated)


def test_groups_are_made_of_known_bands() -> None:
    assert GROUPS[-1] == "NDVI"
    with pytest.raises(ValueError, match="VV, VH"):
        Monthly(role="radar", sensor="sentinel-1-grd", bands=("VH", "VV"), gsd_m=10.0)
    with pytest.raises(ValueError, match="must be two"):
        Monthly(role="terrain", sensor="srtm", bands=("elevation",), gsd_m=10.0)
