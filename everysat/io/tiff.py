"""Where the pixels of a TIFF file lie in it: what has to be fetched before a window can be decoded.

Tags as in TIFF 6.0 (Adobe, 1992) and BigTIFF; the pixels themselves are left to GDAL.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_TYPES = {
    1: "B", 2: "B", 3: "H", 4: "I", 5: "Q", 6: "b", 7: "B", 8: "h", 9: "i", 10: "q", 11: "f", 12: "d", 13: "I",
    16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
_WIDTH, _HEIGHT, _SAMPLES, _PLANAR = 256, 257, 277, 284
_STRIPS, _ROWS, _STRIP_COUNTS = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_COUNTS = 322, 323, 324, 325
_MARGIN = 16
"""Bytes around a tile that writers put there for readers that stream, GDAL among them."""
_MOST_IMAGES = 64

Read = Callable[[int, int], bytes]
"""Bytes from a start to a stop."""


@dataclass(frozen=True)
class Image:
    """One image of a file: tiles of ``block`` rows and columns, or strips. ``planes`` is 1 where bands lie side by side."""

    shape: tuple[int, int]
    block: tuple[int, int]
    planes: int
    offsets: np.ndarray
    counts: np.ndarray

    def ranges(self, rows: slice, cols: slice, band: int) -> list[tuple[int, int]]:
        """Start and stop of each stretch of bytes that holds a window of band ``band`` (from 1)."""
        across = -(-self.shape[1] // self.block[1])
        down = -(-self.shape[0] // self.block[0])
        first = across * down * (band - 1 if self.planes > 1 else 0)
        at = [
            first + y * across + x
            for y in range(rows.start // self.block[0], -(-rows.stop // self.block[0]))
            for x in range(cols.start // self.block[1], -(-cols.stop // self.block[1]))
        ]
        spans = sorted((int(self.offsets[i]), int(self.counts[i])) for i in at if self.counts[i])
        return [(max(0, start - _MARGIN), start + count + _MARGIN) for start, count in spans]


def images(read: Read) -> list[Image]:
    """The full-size images of a file: the pixels, and masks of the same size. Reads all that GDAL needs to open the file.

    Empty when it is no TIFF.

    Raises:
        OSError: it begins like a TIFF and is none.
    """
    head = read(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16 or struct.unpack(order + "H", head[2:4])[0] not in (42, 43):
        return []
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    at = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]
    found: list[dict[int, np.ndarray]] = []
    try:
        while at and len(found) < _MOST_IMAGES:
            tags, at = _directory(read, at, order, big)
            found.append(tags)
        whole = [_image(tags) for tags in found]
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise OSError(f"its list of tiles cannot be read ({error!r})") from error
    return [image for image in whole if image.shape == whole[0].shape]


def _directory(read: Read, at: int, order: str, big: bool) -> tuple[dict[int, np.ndarray], int]:
    """Tags of the directory at a position, and where the next one is."""
    counter, entry, tail, inline = ("Q", 20, 8, 8) if big else ("H", 12, 4, 4)
    size = struct.calcsize(order + counter)
    count = struct.unpack(order + counter, read(at, at + size))[0]
    table = read(at + size, at + size + count * entry + tail)
    tags = {}
    for i in range(count):
        piece = table[i * entry : (i + 1) * entry]
        tag, kind, number = struct.unpack(order + ("HHQ" if big else "HHI"), piece[: entry - inline])
        if kind not in _TYPES:
            continue
        dtype = np.dtype(order + _TYPES[kind])
        length = dtype.itemsize * number
        start = struct.unpack(order + ("Q" if big else "I"), piece[-inline:])[0]
        content = piece[-inline:][:length] if length <= inline else read(start, start + length)
        tags[tag] = np.frombuffer(content, dtype, number)
    return tags, struct.unpack(order + ("Q" if big else "I"), table[-tail:])[0]


def _image(tags: dict[int, np.ndarray]) -> Image:
    shape = int(tags[_HEIGHT][0]), int(tags[_WIDTH][0])
    separate = _PLANAR in tags and int(tags[_PLANAR][0]) == 2
    planes = int(tags[_SAMPLES][0]) if separate and _SAMPLES in tags else 1
    if _TILES in tags:
        block = int(tags[_TILE_HEIGHT][0]), int(tags[_TILE_WIDTH][0])
        return Image(shape, block, planes, tags[_TILES], tags[_TILE_COUNTS])
    rows = min(int(tags[_ROWS][0]), shape[0]) if _ROWS in tags else shape[0]
    return Image(shape, (rows, shape[1]), planes, tags[_STRIPS], tags[_STRIP_COUNTS])
