"""Members of a ``.tortilla`` file (GEO-Bench-2): files one after another, and a table of them whose position stands at the start."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import pandas as pd


def members(content: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The row of the table and the bytes of each member."""
    start, length = struct.unpack("<qq", content[2:18])
    for row in pd.read_parquet(io.BytesIO(content[start : start + length])).to_dict("records"):
        first = row["tortilla:offset"]
        yield row, content[first : first + row["tortilla:length"]]
