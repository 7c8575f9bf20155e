"""Days of the year, as the calendar has them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import torch

from everysat.nn.position import day_number


def test_days_of_the_year_are_those_of_the_calendar() -> None:
    """A date from each of 2000 years, its first and its last ones among them, before 1970 too."""
    g = torch.Generator().manual_seed(0)
    dates = [datetime(y, 1, 1, tzinfo=UTC) for y in range(1000, 3000)] + [
        datetime(y, 12, 31, 23, 59, tzinfo=UTC) for y in range(1000, 3000)
    ]
    dates += [datetime(y, m, d, tzinfo=UTC) for y in (1900, 1999, 2000, 2023, 2024) for m, d in ((2, 28), (3, 1))]
    dates += [datetime(y, 2, 29, tzinfo=UTC) for y in (1600, 2000, 2024)]
    random = 86400.0 * 365 * 1000 * torch.rand(2000, generator=g, dtype=torch.float64) - 86400.0 * 365 * 500
    dates += [datetime.fromtimestamp(second, tz=UTC) for second in random.tolist()]
    time_s = torch.tensor([[date.timestamp()] * 2 for date in dates], dtype=torch.float64)
    found = day_number(time_s, None)
    assert found.dtype == torch.float64
    assert found.tolist() == [date.timetuple().tm_yday for date in dates]


def test_the_middle_of_a_period_counts_and_what_has_no_date_has_no_day() -> None:
    start = datetime(2024, 2, 28, tzinfo=UTC).timestamp()
    assert day_number(torch.tensor([[start, start + 2.5 * 86400]], dtype=torch.float64), None).tolist() == [60]
    assert day_number(torch.tensor([[-torch.inf, torch.inf]], dtype=torch.float64), None).isnan().all()


@pytest.mark.parametrize("day", [0.0, 0.5, 400.25])
def test_days_since_an_origin_keep_their_fraction(day: float) -> None:
    origin = datetime(2018, 9, 1, tzinfo=UTC).timestamp()
    time_s = torch.tensor([[origin + 86400.0 * day] * 2], dtype=torch.float64)
    assert day_number(time_s, origin).tolist() == [day]
