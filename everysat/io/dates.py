"""Dates as intervals ``[start, end)`` of seconds since 1970-01-01 UTC, from file names, tags and what people write."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np

from everysat.types import ALWAYS

Span = tuple[float, float]
DAY_S = 86400.0

# Digits may not touch the stamp, so that a tile or a serial number is not taken for a date.
_STAMP = re.compile(
    r"(?<!\d)((?:19|20)\d{2})-?(0[1-9]|1[0-2])-?(0[1-9]|[12]\d|3[01])(?:T(\d{2}):?(\d{2}):?(\d{2}))?(?!\d)"
)
# Landsat scene identifiers before Collection 1: sensor, path, row, then year and day of year.
_LANDSAT = re.compile(r"L[COTEM]\d\d{3}\d{3}((?:19|20)\d{2})(\d{3})[A-Z]{3}\d{2}")
# Acquisition times only: TIFFTAG_DATETIME and the like say when the file was made.
_START_TAGS = (
    "time_coverage_start", "acquisition_date", "date_acquired", "sensing_time", "product_start_time",
    "datatake_1_datatake_sensing_start", "acquisitiondatetime", "datetime",
)  # fmt: skip


def span(value: Any) -> Span:
    """The interval that ``value`` stands for; a stamp covers its own precision.

    ``"2020"`` is a year, ``"2020-05"`` a month, ``"2020-05-03"`` a day, a time a second; a pair runs from the start of its
    first to the end of its second; ``None`` is always. Strings follow ISO 8601, dates and times too; no zone means UTC.

    Raises:
        ValueError: none of these.
    """
    if value is None:
        return ALWAYS
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return _pair(value)
    if isinstance(value, np.datetime64):
        return _of_datetime(datetime.fromtimestamp(float(value.astype("datetime64[us]").astype(np.int64)) / 1e6, UTC))
    if isinstance(value, datetime):
        return _of_datetime(value)
    if isinstance(value, date):
        return _of_text(value.isoformat())
    if isinstance(value, str):
        return _of_text(value.strip())
    raise ValueError(f"times: {value!r} is no date; give an ISO 8601 string, a datetime, or a (start, end) pair")


def _pair(value: Any) -> Span:
    if all(isinstance(v, (int, float)) for v in value):
        return float(value[0]), float(value[1])
    start, end = span(value[0])[0], span(value[1])[1]
    if not start < end:
        raise ValueError(f"times: {value!r} ends before it starts")
    return start, end


def _of_text(text: str) -> Span:
    try:
        if re.fullmatch(r"\d{4}", text):
            return _epoch(int(text), 1, 1), _epoch(int(text) + 1, 1, 1)
        if match := re.fullmatch(r"(\d{4})-(\d{2})", text):
            year, month = int(match[1]), int(match[2])
            return _epoch(year, month, 1), _epoch(year + month // 12, month % 12 + 1, 1)
        if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", text):
            start = datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
            return start, start + DAY_S
        return _of_datetime(datetime.fromisoformat(text))
    except ValueError as error:
        raise ValueError(f"times: {text!r} is no ISO 8601 date such as 2020-05-03 or 2020-05-03T10:20:30") from error


def _of_datetime(value: datetime) -> Span:
    start = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return start, start + 1.0


def _epoch(year: int, month: int, day: int) -> float:
    return datetime(year, month, day, tzinfo=UTC).timestamp()


def in_name(name: str) -> Span | None:
    """The first date in a file name: ``YYYYMMDD``, ``YYYY-MM-DD``, with ``THHMMSS`` or without; or a Landsat scene identifier."""
    if match := _LANDSAT.search(name):
        start = datetime(int(match[1]), 1, 1, tzinfo=UTC) + timedelta(days=int(match[2]) - 1)
        return start.timestamp(), start.timestamp() + DAY_S
    if match := _STAMP.search(name):
        try:
            return _of_text("-".join(match.group(1, 2, 3)) + ("T" + ":".join(match.group(4, 5, 6)) if match[4] else ""))
        except ValueError:
            return None  # 20230231 looks like a date and is none
    return None


def in_tags(tags: Mapping[str, Any]) -> Span | None:
    """Acquisition time from metadata, in any letter case; ``time_coverage_end`` closes the interval when it is there."""
    lower = {key.lower(): str(value) for key, value in tags.items()}
    for key in _START_TAGS:
        if lower.get(key):
            try:
                first = span(lower[key])
                last = lower.get("time_coverage_end") if key == "time_coverage_start" else None
                return first if last is None else (first[0], span(last)[0])
            except ValueError:
                continue
    return None


def iso(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 text that :func:`span` reads back."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).isoformat()


def label(time: Span) -> str:
    """Short text for people: a day, a time, an interval, or ``undated``."""
    start, end = time
    if not (math.isfinite(start) and math.isfinite(end)):
        return "undated"
    first = iso(start).removesuffix("+00:00")
    if end - start == DAY_S and start % DAY_S == 0:
        return first[:10]
    return first if end - start <= 1.0 else f"{first[:10]}..{iso(end)[:10]}"
