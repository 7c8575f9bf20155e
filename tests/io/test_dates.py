"""Dates from file names, tags and text."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everysat.io import dates
from everysat.types import ALWAYS

DAY = 86400.0


def at(*parts: int) -> float:
    return datetime(*parts, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2020", (at(2020, 1, 1), at(2021, 1, 1))),
        ("2020-12", (at(2020, 12, 1), at(2021, 1, 1))),
        ("2020-05-03", (at(2020, 5, 3), at(2020, 5, 4))),
        ("20200503", (at(2020, 5, 3), at(2020, 5, 4))),
        ("2020-05-03T10:20:30", (at(2020, 5, 3, 10, 20, 30), at(2020, 5, 3, 10, 20, 31))),
        ("2020-05-03T10:20:30+02:00", (at(2020, 5, 3, 8, 20, 30), at(2020, 5, 3, 8, 20, 31))),
        (date(2020, 5, 3), (at(2020, 5, 3), at(2020, 5, 4))),
        (np.datetime64("2020-05-03T01:00:00"), (at(2020, 5, 3, 1), at(2020, 5, 3, 1, 0, 1))),
        (("2020-01", "2020-03"), (at(2020, 1, 1), at(2020, 4, 1))),
        ((1.5, 2.5), (1.5, 2.5)),
        (None, ALWAYS),
    ],
)
def test_a_stamp_covers_its_own_precision(value, expected):
    assert dates.span(value) == expected


@pytest.mark.parametrize("value", ["yesterday", "2020-13", 2020, ("2021", "2020"), "20200231"])
def test_no_date_is_an_error(value):
    with pytest.raises(ValueError, match="times"):
        dates.span(value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("T33UUU_20170216T102101_B04.jp2", at(2017, 2, 16, 10, 21, 1)),
        ("S2A_MSIL1C_20200503T102031_N0209_R065_T33UUU_20200503T120000.SAFE", at(2020, 5, 3, 10, 20, 31)),
        ("LE70350322012177EDC00_b3.tif", at(2012, 6, 25)),
        ("LC08_L2SP_193024_20200801_20200908_02_T1_SR_B4.TIF", at(2020, 8, 1)),
        ("ndvi_2020-08-01.tif", at(2020, 8, 1)),
        ("patch_752389.tif", None),
        ("20230231.tif", None),
        ("1201912011.tif", None),
    ],
)
def test_dates_in_file_names(name, expected):
    found = dates.in_name(name)
    assert (found[0] if found else None) == expected


def test_tags_of_processing_are_not_acquisitions():
    assert dates.in_tags({"TIFFTAG_DATETIME": "2021-01-01"}) is None
    assert dates.in_tags({"ACQUISITION_DATE": "2021-01-01"}) == (at(2021, 1, 1), at(2021, 1, 2))


@given(st.floats(-2e9, 4e9).map(lambda v: round(v, 3)), st.floats(0, 1e8).map(lambda v: round(v, 3)))
def test_iso_round_trip(start, length):
    found = dates.in_tags({"time_coverage_start": dates.iso(start), "time_coverage_end": dates.iso(start + length)})
    assert found is not None
    assert found[0] == pytest.approx(start, abs=1e-5)


@pytest.mark.parametrize(
    ("span", "text"), [(ALWAYS, "undated"), ((0.0, DAY), "1970-01-01"), ((0.0, 31 * DAY), "1970-01-01..1970-02-01")]
)
def test_label(span, text):
    assert dates.label(span) == text
