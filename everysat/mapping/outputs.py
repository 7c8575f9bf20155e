"""What a finished map is written as, block by block in bounded memory: GeoTIFF, embedding store, table of chips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import shapely
from rasterio.errors import RasterioError

from everysat.io.cog import CogWriter
from everysat.mapping.parts import Parts
from everysat.mapping.windows import Box
from everysat.nn.mappers import Mapper
from everysat.sensors import Band, Sensor

NO_CLASS = 255
"""No-data value of class maps and confidence maps."""
_SAMPLE = 20_000
_CHUNK_BYTES = 17e6


class Output(Protocol):
    """Files that appear when the ``with`` block ends well. ``paths`` by what they hold. ``late``: all of the map must be there
    before the first block is written."""

    paths: dict[str, Path]
    late: bool

    def __enter__(self) -> Output: ...

    def __exit__(self, *error: Any) -> None: ...

    def blocks(self) -> Iterator[Box]:
        """Boxes in which it wants to be written, in this order."""

    def write(self, box: Box, image: np.ndarray) -> None:
        """Pixels float32 [channel, y, x] of a box, NaN where there is no data."""


def output(
    out: Path,
    mapper: Mapper,
    geobox: Any,
    parts: Parts,
    probabilities: bool,
    quantiser: str | None,
    facts: Mapping[str, Any],
) -> Output:
    """What the suffix of ``out`` and the mapper ask for.

    Raises:
        ValueError: a suffix that cannot hold what the mapper makes.
    """
    suffix = out.suffix.lower()
    if suffix in (".tif", ".tiff"):
        if quantiser is not None:
            raise ValueError(
                f"quantiser={quantiser!r} is for stores (.zarr, .parquet); {out.name} holds what the model says"
            )
        return Geotiffs(out, mapper, geobox, parts, probabilities)
    if mapper.probabilistic or suffix not in (".zarr", ".parquet"):
        what = (
            "a map of classes is written as .tif"
            if mapper.probabilistic
            else "features are written as .tif, .zarr or .parquet"
        )
        raise ValueError(f"out={str(out)!r}: {what}")
    kind = Pixels if suffix == ".zarr" else Chips
    return kind(out, geobox, parts, quantiser or "int8-linear/1", facts)


class Geotiffs:
    """Cloud-Optimized GeoTIFFs: classes and confidence, or features."""

    late = False

    def __init__(self, out: Path, mapper: Mapper, geobox: Any, parts: Parts, probabilities: bool) -> None:
        self.mapper, self.geobox, self.parts = mapper, geobox, parts
        self.paths = {"features": out}
        if mapper.probabilistic:
            self.paths = {"classes": out, "confidence": _beside(out, "confidence")}
            if probabilities:
                self.paths["probabilities"] = _beside(out, "probabilities")
        self._stack = ExitStack()
        self._writers: dict[str, CogWriter] = {}

    def __enter__(self) -> Geotiffs:
        self._writers = {kind: self._stack.enter_context(self._writer(kind, path)) for kind, path in self.paths.items()}
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def blocks(self) -> Iterator[Box]:
        return (window.core for window in sorted(self.parts.plan.windows(), key=lambda window: window.index))

    def write(self, box: Box, image: np.ndarray) -> None:
        for kind, writer in self._writers.items():
            found = _FORMS[kind](image)
            valid = None if found.dtype.kind == "f" else found != NO_CLASS
            writer.write(found, slice(box[0], box[1]), slice(box[2], box[3]), valid=valid)

    def _writer(self, kind: str, path: Path) -> CogWriter:
        names = self.mapper.names
        if kind == "classes":
            band = Band("class", self.mapper.gsd_m, "class", classes=dict(enumerate(names)), nodata=NO_CLASS)
            sensor = Sensor("class-map", "classes", (band,), "predicted by EverySat")
            return CogWriter.for_sensor(path, self.geobox, sensor)
        if kind == "confidence":
            return CogWriter(path, self.geobox, ["confidence"], units="%", dtype="uint8", nodata=NO_CLASS)
        return CogWriter(path, self.geobox, names, units="probability" if kind == "probabilities" else "")


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}-{what}{out.suffix}")


def _classes(image: np.ndarray) -> np.ndarray:
    seen = np.isfinite(image).all(0)
    return np.where(seen, np.nan_to_num(image).argmax(0), NO_CLASS).astype(np.uint8)[None]


def _confidence(image: np.ndarray) -> np.ndarray:
    seen = np.isfinite(image).all(0)
    return np.where(seen, np.rint(100 * np.nan_to_num(image).max(0)), NO_CLASS).astype(np.uint8)[None]


def _as_it_is(image: np.ndarray) -> np.ndarray:
    return image


_FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "classes": _classes,
    "confidence": _confidence,
    "probabilities": _as_it_is,
    "features": _as_it_is,
}


class Pixels:
    """A Zarr store of embeddings, one vector a pixel."""

    def __init__(self, out: Path, geobox: Any, parts: Parts, quantiser: str, facts: Mapping[str, Any]) -> None:
        self.geobox, self.parts, self.facts, self.quantiser = geobox, parts, facts, quantiser
        self.paths = {"features": out}
        self.late = _fitted(quantiser)
        # Quantising holds several copies of a chunk.
        fits = (side for side in (256, 128, 64) if 4 * side**2 * parts.channels <= _CHUNK_BYTES)
        self.chunk = next(fits, 32)
        _rule(quantiser, parts)  # an unknown name is an error now, not after the work
        self._writer: Any = None

    def __enter__(self) -> Pixels:
        from everysat.store import create

        rule = _rule(self.quantiser, self.parts, fit=True)
        path = self.paths["features"]
        self._writer = create(path, self.geobox, self.parts.channels, quantiser=rule, chunk=self.chunk, **self.facts)
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._writer.finish()
        else:
            self._writer.abandon()

    def blocks(self) -> Iterator[Box]:
        (height, width), side = self.parts.plan.shape, self.chunk
        for top in range(0, height, side):
            for left in range(0, width, side):
                yield top, min(height, top + side), left, min(width, left + side)

    def write(self, box: Box, image: np.ndarray) -> None:
        self._writer.write(slice(box[0], box[1]), slice(box[2], box[3]), image)


class Chips(Pixels):
    """A GeoParquet table, one row a pixel of the map: a pixel is a chip."""

    def __enter__(self) -> Chips:
        from everysat.store import ChipWriter

        rule, side_m = _rule(self.quantiser, self.parts, fit=True), self.parts.plan.gsd_m
        path, crs = self.paths["features"], self.geobox.crs.to_wkt()
        writer = ChipWriter(path, self.parts.channels, crs, quantiser=rule, gsd_m=side_m, **self.facts)
        self._writer = writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def write(self, box: Box, image: np.ndarray) -> None:
        y, x = np.nonzero(np.isfinite(image).all(0))
        if len(y):
            a = self.geobox.affine
            left, top = a.c + (box[2] + x) * a.a, a.f + (box[0] + y) * a.e
            self._writer.add(shapely.box(left, top + a.e, left + a.a, top), image[:, y, x].T)


def _fitted(quantiser: str) -> bool:
    return quantiser.startswith("pca")


def _rule(quantiser: str, parts: Parts, fit: bool = False) -> Any:
    """The quantiser of that name; one that is fitted is fitted to vectors of all of the map."""
    from everysat.store import quantise

    if not _fitted(quantiser):
        return quantise.get(quantiser, parts.channels)
    if not fit:
        return None
    windows = list(parts.plan.windows())
    each = max(1, _SAMPLE // len(windows))
    found = []
    for window in windows[:: -(-len(windows) // _SAMPLE)]:
        flat = parts.read(window.core).reshape(parts.channels, -1).T
        seen = flat[np.isfinite(flat).all(1)]
        found.append(seen[:: -(-len(seen) // each) or 1])
    few = {"k": parts.channels} if parts.channels < 64 else {}
    return quantise.fit(quantiser, np.concatenate(found), **few)


FAILURES = (OSError, RasterioError)
"""What writing may raise when the disk is full or the folder cannot be written."""
