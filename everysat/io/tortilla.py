"""``.tortilla`` files (GEO-Bench-2): other files one after another, and a Parquet table of them. A member may be such a file itself.

``#y``, then as little-endian int64 where the table begins and how long it is; the rest of the first 200 bytes is unused. The table has a
row a member: ``tortilla:id``, ``tortilla:offset`` (from the beginning of its own file), ``tortilla:length``, ``tortilla:file_format`` and facts.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from everysat.io import grid
from everysat.io.arrays import present
from everysat.io.plane import unreadable

MAGIC, HEAD = b"#y", 200


@dataclass(frozen=True)
class Member:
    """A file within a file: ``length`` bytes from ``start`` of ``path``. ``name`` leads to it through the tables; ``facts`` are its row."""

    path: Path
    name: str
    start: int
    length: int
    facts: Mapping[str, Any] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def content(self) -> bytes:
        """Its bytes; nothing else of the file is read."""
        with present(self.path).open("rb") as file:
            file.seek(self.start)
            found = file.read(self.length)
        if len(found) < self.length:
            raise unreadable(str(self.path), EOFError(f"{self.name} ends {self.length - len(found)} bytes too early"))
        return found

    def members(self) -> list[Member]:
        """What it holds, when it is such a file itself."""
        return _members(self.path, self.name, self.start, self.length)

    def tiff(self) -> tuple[np.ndarray, GeoBox | None]:
        """All bands [band, y, x] of a GeoTIFF as stored, and its grid when it is georeferenced."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with MemoryFile(self.content()) as memory, memory.open() as file:
                    placed = file.crs is not None and not file.transform.is_identity
                    box = GeoBox(file.shape, file.transform, grid.plain_crs(file.crs)) if placed else None
                    return file.read(), box
        except RasterioError as error:
            raise unreadable(str(self), error) from error

    def hdf5(self, name: str = "data") -> np.ndarray:
        """The dataset ``name`` of an HDF5 file."""
        try:
            import h5py
        except ImportError as error:
            raise ImportError(f"reading {self} needs h5py: pip install 'everysat[data]'") from error
        try:
            with h5py.File(io.BytesIO(self.content()), "r") as file:
                return np.asarray(file[name])
        except (OSError, RuntimeError, KeyError) as error:
            raise unreadable(str(self), error) from error

    def frame(self) -> pd.DataFrame:
        """The rows of a Parquet file."""
        return _frame(self.content(), str(self))


def members(path: str | Path) -> list[Member]:
    """What a file holds, in the order of its table.

    Raises:
        FileNotFoundError: there is no such file. OSError: it is truncated or no such file.
    """
    path = present(path)
    return _members(path, "", 0, path.stat().st_size)


def unpacked(content: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The row and the bytes of each member of a file that is in memory."""
    for row in _table(lambda start, length: content[start : start + length], len(content), "the file"):
        first = int(row["tortilla:offset"])
        yield row, content[first : first + int(row["tortilla:length"])]


def packed(files: Sequence[tuple[Mapping[str, Any], bytes]]) -> bytes:
    """A file of these members, each with its facts, among them ``tortilla:id`` and ``tortilla:file_format``."""
    rows, at = [], HEAD
    for facts, content in files:
        rows.append({**facts, "tortilla:offset": at, "tortilla:length": len(content)})
        at += len(content)
    table = io.BytesIO()
    pd.DataFrame(rows).to_parquet(table, index=False)
    head = (MAGIC + struct.pack("<qq", at, table.tell())).ljust(HEAD, b"\0")
    return b"".join([head, *(content for _, content in files), table.getvalue()])


def tiff_of(values: np.ndarray, crs: str, corner: tuple[float, float], gsd_m: float) -> bytes:
    """The bytes of a GeoTIFF of [band, y, x] whose north-west ``corner`` lies at these metres."""
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": values.dtype.name}
    place = {"crs": crs, "transform": Affine(gsd_m, 0.0, corner[0], 0.0, -gsd_m, corner[1])}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", compress="deflate", **size, **place) as file:
            file.write(values)
        return bytes(memory.read())


def _members(path: Path, name: str, start: int, length: int) -> list[Member]:
    def read(first: int, count: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start + first)
            return file.read(max(count, 0))

    found = []
    for row in _table(read, length, f"{path}:{name}" if name else str(path)):
        first, size = int(row["tortilla:offset"]), int(row["tortilla:length"])
        label = f"{name}/{row['tortilla:id']}" if name else str(row["tortilla:id"])
        if first < HEAD or size < 0 or first + size > length:
            raise unreadable(str(path), ValueError(f"{label} lies from {first} to {first + size} of {length} bytes"))
        found.append(Member(path, label, start + first, size, row))
    return found


def _table(read: Callable[[int, int], bytes], length: int, where: str) -> list[dict[str, Any]]:
    head = read(0, 18)
    if len(head) < 18 or head[:2] != MAGIC:
        raise unreadable(where, ValueError(f"it begins with {head[:4]!r}, not with {MAGIC!r}"))
    first, size = struct.unpack("<qq", head[2:])
    if not 18 <= first <= first + size <= length:
        raise unreadable(where, EOFError(f"its table lies from {first} to {first + size} of {length} bytes"))
    frame = _frame(read(first, size), where)
    if missing := {"tortilla:id", "tortilla:offset", "tortilla:length"} - set(frame.columns):
        raise unreadable(where, ValueError(f"its table has no column {sorted(missing)[0]!r}"))
    return frame.to_dict("records")


def _frame(content: bytes, where: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(io.BytesIO(content))
    except (pa.ArrowInvalid, pa.ArrowIOError, ValueError) as error:
        raise unreadable(where, error) from error
