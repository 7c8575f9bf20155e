"""Pixel embeddings as Cloud-Optimized GeoTIFF, one band a number: float32, or int8 by the rule of AlphaEarth.

Overviews are means of vectors brought back to the mean length of the vectors they stand for, as in the layers of AlphaEarth:
means of codes would be shorter vectors under another rule. GDAL is given them ready.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.env import GDALVersion
from rasterio.windows import Window as RasterWindow

from everysat.io import grid
from everysat.io.output import replacing
from everysat.io.plane import HANDLES, open_raster, unreadable
from everysat.store.attributes import attributes, clearly, period_of, quantiser_of
from everysat.store.quantise import Float32, Int8Square, Quantiser, get, measure
from everysat.store.read import PixelStore, Window

TAG = "EVERYSAT_STORE"
_BLOCK_BYTES, _PART_BYTES, _SAMPLE = 16e6, 128e6, 4096
_SMALLEST = 512
"""The coarsest overview fits into a square of this side, pixels."""


def write_cog(store: PixelStore, path: str | Path, *, quantiser: str | None = None) -> Path:
    """A pixel store as a COG with overviews; nothing appears before it is complete.

    Args:
        store: of any quantiser.
        path: of the file; a COG of embeddings that is there is replaced.
        quantiser: ``float32/1`` or ``int8-square/1``, which keeps directions only: vectors are brought to length 1. The
            store's own where it is one of them, else float32.

    Raises:
        FileExistsError: what is at ``path`` is no COG of embeddings.
        ValueError: another quantiser, whose factors a band of a GeoTIFF cannot hold, or a chip store.
    """
    path = Path(path)
    if not isinstance(store, PixelStore):
        raise ValueError(f"{store.path} is a chip store; its vectors lie on no grid, so GeoParquet is what holds them")
    if quantiser is None:
        quantiser = Int8Square.name if isinstance(store.quantiser, Int8Square) else Float32.name
    if quantiser not in (Float32.name, Int8Square.name):
        raise ValueError(f"quantiser={quantiser!r}: a GeoTIFF holds {Float32.name} or {Int8Square.name}")
    if path.exists() and not _is_cog_store(path):
        raise FileExistsError(f"{path} exists and is no COG of embeddings; choose another path, or remove it yourself")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    with clearly(path), TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as folder:
        files = _Levels(Path(folder), store, get(quantiser, store.dim))
        files.fill()
        with replacing(path) as partial:
            rasterio.shutil.copy(files.virtual(), partial, driver="COG", **files.options())
    return path


class _Levels:
    """The grid of a store and its overviews as plain GeoTIFFs in a folder, to be copied into one file."""

    def __init__(self, folder: Path, store: PixelStore, rule: Quantiser) -> None:
        self.folder, self.store, self.rule = folder, store, rule
        self.dtype = np.dtype(rule.dtype)
        self.block = 512
        while self.block > 128 and rule.width * self.block**2 * self.dtype.itemsize > _BLOCK_BYTES:
            self.block //= 2
        height, width = store.shape
        self.levels = max(0, math.ceil(math.log2(max(height, width) / _SMALLEST)))
        self.sample: list[np.ndarray] = []

    def path(self, level: int) -> Path:
        return self.folder / f"{level}.tif"

    def size(self, level: int) -> tuple[int, int]:
        return -(-self.store.shape[0] // 2**level), -(-self.store.shape[1] // 2**level)

    def parts(self) -> Iterator[Window]:
        """Windows whose sides the coarsest overview divides, small enough to hold as float32."""
        side = 2**self.levels
        while (2 * side) ** 2 * self.store.dim * 4 <= _PART_BYTES and side < 1024:
            side *= 2
        for top in range(0, self.store.shape[0], side):
            for left in range(0, self.store.shape[1], side):
                yield (
                    slice(top, min(top + side, self.store.shape[0])),
                    slice(left, min(left + side, self.store.shape[1])),
                )

    def fill(self) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(self._open(level)) for level in range(self.levels + 1)]
            for rows, cols in self.parts():
                vectors = self.store.read(rows, cols)
                if isinstance(self.rule, Int8Square) and not isinstance(self.store.quantiser, Int8Square):
                    vectors = _to_length(vectors, np.float32(1))
                self._note(vectors, rows, cols)
                for level, file in enumerate(files):
                    coarse = pooled(vectors, 2**level, unit=isinstance(self.rule, Int8Square)) if level else vectors
                    codes = self._codes(coarse, rows, cols, level)
                    where = RasterWindow(cols.start >> level, rows.start >> level, codes.shape[2], codes.shape[1])
                    file.write(codes, window=where)

    def _codes(self, vectors: np.ndarray, rows: slice, cols: slice, level: int) -> np.ndarray:
        if level == 0 and self.rule == self.store.quantiser:  # the very codes, not codes of decoded ones
            return self.store.codes(rows, cols)[0].transpose(2, 0, 1)
        flat = self.rule.encode(vectors.reshape(-1, vectors.shape[-1]))[0]
        return flat.reshape(*vectors.shape[:2], -1).transpose(2, 0, 1)

    def _note(self, vectors: np.ndarray, rows: slice, cols: slice) -> None:
        """Vectors of evenly spread pixels, to tell what new codes cost."""
        step = max(1, math.ceil(math.sqrt(self.store.shape[0] * self.store.shape[1] / _SAMPLE)))
        self.sample.append(vectors[-rows.start % step :: step, -cols.start % step :: step].reshape(-1, self.store.dim))

    def _open(self, level: int) -> Any:
        height, width = self.size(level)
        place = self.store.grid.affine * Affine.scale(2**level)
        return rasterio.open(
            self.path(level), "w", driver="GTiff", height=height, width=width, count=self.rule.width, dtype=self.dtype.name,
            transform=place, nodata=self.rule.nodata, tiled=True, blockxsize=256, blockysize=256, interleave="pixel", BIGTIFF="IF_SAFER",
        )  # fmt: skip

    def attributes(self) -> dict[str, Any]:
        own = dict(self.store.attrs.get("everysat", {}))
        same = self.rule == self.store.quantiser
        own["quality"] = self.store.quality if same else measure(self.rule, np.concatenate(self.sample))
        kept = {k: v for k, v in own.items() if k not in ("quantiser", "model", "period", "arrays")}
        model = {"url": self.store.attrs.get("geoemb:model"), **self.store.model}
        source = self.store.attrs.get("geoemb:source_data", ())
        return attributes(
            "pixel", self.rule, gsd_m=grid.gsd_m(self.store.grid), period=self.store.period, model=model, source=source,
            extra=kept,
        )  # fmt: skip

    def virtual(self) -> Path:
        """A VRT that ties the files together."""
        geobox, (height, width) = self.store.grid, self.store.shape
        kind = {"int8": "Int8", "float32": "Float32"}[self.dtype.name]
        bands = []
        for band in range(1, self.rule.width + 1):
            source = "<SourceFilename relativeToVRT='1'>{}.tif</SourceFilename><SourceBand>{}</SourceBand>"
            coarser = "".join(
                f"<Overview>{source.format(level, band)}</Overview>" for level in range(1, self.levels + 1)
            )
            bands.append(
                f"<VRTRasterBand dataType='{kind}' band='{band}'><Description>A{band - 1:02d}</Description>"
                f"<NoDataValue>{self.rule.nodata}</NoDataValue><SimpleSource>{source.format(0, band)}</SimpleSource>"
                f"{coarser}</VRTRasterBand>"
            )
        a, told = geobox.affine, escape(json.dumps(self.attributes()))
        text = (
            f"<VRTDataset rasterXSize='{width}' rasterYSize='{height}'><SRS>{escape(grid.crs_of(geobox).to_wkt())}</SRS>"
            f"<GeoTransform>{a.c!r},{a.a!r},{a.b!r},{a.f!r},{a.d!r},{a.e!r}</GeoTransform>"
            f"<Metadata><MDI key='{TAG}'>{told}</MDI></Metadata>{''.join(bands)}</VRTDataset>"
        )
        out = self.folder / "all.vrt"
        out.write_text(text, encoding="utf-8")
        return out

    def options(self) -> dict[str, Any]:
        """Of GDAL's COG driver. Tiles of one band each (INTERLEAVE=TILE) let a reader take some bands; GDAL 3.11 has them."""
        return {
            "BLOCKSIZE": self.block,
            "COMPRESS": "ZSTD",
            "PREDICTOR": "YES",  # differences for integers, bytes apart for floats
            "OVERVIEWS": "FORCE_USE_EXISTING" if self.levels else "NONE",
            "BIGTIFF": "IF_SAFER",
            "NUM_THREADS": "2",
            **({"INTERLEAVE": "TILE"} if GDALVersion.runtime().at_least("3.11") else {}),
        }


def pooled(vectors: np.ndarray, factor: int, unit: bool = False) -> np.ndarray:
    """Means of squares of ``factor`` x ``factor`` vectors [y, x, dim], at their mean length (or 1); NaN is left out.

    Squares at the south and east edges may be smaller. Vectors that cancel have no direction and become NaN.
    """
    height, width, dim = vectors.shape
    grown = np.pad(vectors, ((0, -height % factor), (0, -width % factor), (0, 0)), constant_values=np.nan)
    cells = grown.reshape(grown.shape[0] // factor, factor, grown.shape[1] // factor, factor, dim)
    seen = ~np.isnan(cells[..., 0])
    count = seen.sum((1, 3))
    total = np.where(seen[..., None], cells, 0).sum((1, 3), dtype=np.float64)
    length = np.where(seen, np.linalg.norm(cells, axis=-1), 0).sum((1, 3)) / np.maximum(count, 1)
    out = _to_length(total, np.ones_like(length)[..., None] if unit else length[..., None])
    out[count == 0] = np.nan
    return out.astype(np.float32)


def _to_length(vectors: np.ndarray, length: Any) -> np.ndarray:
    """Vectors [..., dim] at another length; those without direction become NaN, unless length 0 is wanted."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    out = vectors * (length / np.where(norm > 0, norm, 1))
    return np.where((norm > 1e-12 * np.abs(length)) | (length == 0), out, np.nan).astype(np.float32)


def _is_cog_store(path: Path) -> bool:
    try:
        with rasterio.open(path) as file:
            return TAG in file.tags()
    except rasterio.errors.RasterioIOError:
        return False


@dataclass(frozen=True, eq=False)
class CogStore(PixelStore):
    """Reads a GeoTIFF with one band a number, also one whose rows run from the south."""

    flip: tuple[bool, bool] = (False, False)

    def _codes(self, rows: slice, cols: slice) -> tuple[np.ndarray, None]:
        spans = [
            slice(size - span.stop, size - span.start) if turned else span
            for span, size, turned in zip((rows, cols), self.shape, self.flip, strict=True)
        ]
        dataset, lock = HANDLES.get(str(self.path), open_raster)
        try:
            with lock:
                codes = dataset.read(window=RasterWindow.from_slices(*spans)).transpose(1, 2, 0)
        except rasterio.errors.RasterioError as error:
            raise unreadable(str(self.path), error) from error
        turn = tuple(slice(None, None, -1 if turned else 1) for turned in self.flip)
        return np.ascontiguousarray(codes[turn]), None


def open_cog(path: Path, quantiser: str | Quantiser | None = None) -> CogStore:
    """The store in a GeoTIFF; see :func:`everysat.store.open_store`.

    One without a word about its codes is read as AlphaEarth's where it looks so: 64 bands of int8, no data -128.
    """
    dataset, lock = HANDLES.get(str(path), open_raster)
    with lock:
        told = json.loads(dataset.tags().get(TAG, "{}"))
        dtypes, nodata, width = set(dataset.dtypes), dataset.nodata, dataset.count
        block, crs, transform = dataset.block_shapes[0], dataset.crs, dataset.transform
        shape, names = (dataset.height, dataset.width), dataset.descriptions
    if len(dtypes) != 1 or crs is None:
        raise ValueError(f"{path} has bands of {', '.join(sorted(dtypes))} and CRS {crs}; expected one type and a CRS")
    dtype = dtypes.pop()
    if quantiser is not None:
        rule = get(quantiser, width) if isinstance(quantiser, str) else quantiser
    elif not told and dtype == "int8" and nodata == -128 and (width == 64 or names[0] == "A00"):
        rule = Int8Square(width)
    elif not told and (dtype != "float32" or width == 1 or not str(names[0]).startswith(("feature_", "A0"))):
        raise LookupError(
            f"{path} has {width} bands of {dtype} and does not say that they are embeddings; if you know it, give "
            "quantiser='float32/1' or 'int8-square/1'"
        )
    else:
        rule = quantiser_of(told, {}, path, width, dtype)
    if rule.scaled or rule.width != width or rule.dtype != dtype:
        raise ValueError(f"{path}: {rule.name} has {rule.width} numbers of {rule.dtype}, the file {width} of {dtype}")
    geobox, flip_y, flip_x = grid.north_up(GeoBox(shape, transform, grid.plain_crs(crs.to_wkt())))
    own = told.get("everysat", {})
    chunk = (min(max(block[0], 128), 512), min(max(block[1], 128), 512))
    return CogStore(
        path, "pixel", str(geobox.crs), geobox, shape, period_of(own), rule, dict(own.get("model") or {}), told, chunk,
        flip=(flip_y, flip_x),
    )  # fmt: skip
