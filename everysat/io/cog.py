"""Cloud-Optimized GeoTIFF, written whole or window by window in bounded memory."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from odc.geo.geobox import GeoBox
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.windows import Window

from everysat.io import dates, grid, labels
from everysat.io.calibration import CODED
from everysat.io.dates import Span
from everysat.io.output import remove, replacing
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS

_BLOCK_BYTES = 16e6


class CogWriter:
    """A COG at ``path``, to be filled by windows in any order; used in a ``with`` statement.

    Windows go into a plain tiled GeoTIFF beside ``path``. When the block ends, it becomes a COG with overviews, and only
    then appears at ``path``; when the block fails, nothing is left. What is never written is no data.

    Args:
        path: of the file, in a folder that exists.
        geobox: the grid.
        names: description of each band.
        units: of each band, or one for all.
        dtype: of the pixels, such as ``float32`` or ``uint8``.
        nodata: the number that stands for no data.
        classes: names of codes: the pixels are codes, whose overviews take the most frequent one, with colours of their own.
        tags: of the file.
        band_tags: of each band.
    """

    def __init__(
        self,
        path: str | Path,
        geobox: GeoBox,
        names: Sequence[str],
        *,
        units: str | Sequence[str] = "",
        dtype: str = "float32",
        nodata: float = math.nan,
        classes: Mapping[int, str] | None = None,
        tags: Mapping[str, str] | None = None,
        band_tags: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        self.path = Path(path)
        self.geobox = geobox
        self.names = tuple(names)
        self.units = (units,) * len(self.names) if isinstance(units, str) else tuple(units)
        self.dtype = np.dtype(dtype)
        self.nodata = nodata
        self.classes = classes
        self.tags = dict(tags or {})
        self.band_tags = list(band_tags or [{}] * len(self.names))
        self._coded = classes is not None or (self.dtype.kind in "iu" and set(self.units) <= set(CODED))
        self._file: Any = None
        if geobox.crs is None or not self.names or len(self.units) != len(self.names) != len(self.band_tags):
            raise ValueError(
                "a COG needs a geobox with a CRS, at least one band name, and as many units and band_tags as names"
            )

    @classmethod
    def for_sensor(
        cls, path: str | Path, geobox: GeoBox, sensor: Sensor, times: Sequence[Span] = (ALWAYS,)
    ) -> CogWriter:
        """A writer for bands of ``sensor`` at ``times`` (all bands of the first time, then of the next), which describes itself:
        :func:`everysat.read` needs no further argument for it."""
        dtype, nodata = storage(sensor.bands)
        stamps = [_time_tags(time) for time in times]
        coded = sensor.bands[0].classes if len(sensor.bands) == 1 and sensor.bands[0].unit == "class" else None
        return cls(
            path,
            geobox,
            [band.name for _ in times for band in sensor.bands],
            units=[band.unit for _ in times for band in sensor.bands],
            dtype=dtype,
            nodata=nodata,
            classes=coded,
            tags={labels.SENSOR_TAG: labels.to_json(sensor)},
            band_tags=[stamp for stamp in stamps for _ in sensor.bands],
        )

    @property
    def _tiles(self) -> Path:
        return self.path.with_name(self.path.name + ".tiles.partial")

    def __enter__(self) -> CogWriter:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write {self.path}: the folder {self.path.parent} does not exist; make it first"
            )
        height, width = self.geobox.shape
        self._file = rasterio.open(
            self._tiles, "w", driver="GTiff", height=height, width=width, count=len(self.names), dtype=self.dtype.name,
            crs=grid.crs_of(self.geobox).to_wkt(), transform=self.geobox.affine, nodata=self.nodata, tiled=True, blockxsize=256,
            blockysize=256, interleave="band", BIGTIFF="IF_SAFER", SPARSE_OK=True,
        )  # fmt: skip
        self._describe()
        return self

    def _describe(self) -> None:
        file = self._file
        file.descriptions, file.units = self.names, self.units
        file.update_tags(**self.tags)
        for index, tags in enumerate(self.band_tags, 1):
            file.update_tags(index, **tags)
        if self.classes is not None:
            file.update_tags(1, **{f"class_{code}": label for code, label in self.classes.items()})
            if self.dtype == np.uint8 and len(self.names) == 1:
                file.write_colormap(1, colours(self.classes))

    def write(self, values: Any, rows: slice | None = None, cols: slice | None = None, valid: Any = None) -> None:
        """Pixels [band, y, x] of a window (all without one); where ``valid`` (bool, same shape) is false, no data.

        Raises:
            ValueError: shape or numbers that do not fit the window or the type.
        """
        if self._file is None:
            raise ValueError("the writer is not open; use it in a with statement")
        spans = [slice(0, n) if s is None else s for s, n in zip((rows, cols), self.geobox.shape, strict=True)]
        values = np.asarray(values)
        shape = (len(self.names), *(s.stop - s.start for s in spans))
        inside = all(0 <= s.start < s.stop <= n for s, n in zip(spans, self.geobox.shape, strict=True))
        if values.shape != shape or not inside:
            raise ValueError(
                f"values has shape {values.shape}; the window is {shape} on a grid of {tuple(self.geobox.shape)}"
            )
        seen = np.isfinite(values) if valid is None else np.asarray(valid, bool) & np.isfinite(values)
        self._file.write(self._numbers(values, seen), window=Window.from_slices(*spans))

    def _numbers(self, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
        if self.dtype.kind in "iu" and seen.any():
            limits, found = np.iinfo(self.dtype), values[seen]
            if found.min() < limits.min or found.max() > limits.max:
                raise ValueError(
                    f"values run from {found.min()} to {found.max()}, {self.dtype} from {limits.min} to {limits.max}"
                )
            if (found == self.nodata).any():
                raise ValueError(
                    f"a valid pixel has the value {self.nodata:g}, which stands for no data; use another nodata"
                )
        return np.where(seen, values, self.nodata).astype(self.dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            self._file = None
            if kind is None:
                self._finish()
        except (RasterioError, CPLE_BaseError) as failure:
            raise OSError(f"cannot write {self.path}: {failure}. Is the disk full?") from failure
        finally:
            remove(self._tiles)

    def _finish(self) -> None:
        block = 512
        while block > 128 and len(self.names) * block * block * self.dtype.itemsize > _BLOCK_BYTES:
            block //= 2
        with replacing(self.path) as partial:
            rasterio.shutil.copy(
                self._tiles, partial, driver="COG", BLOCKSIZE=block, COMPRESS="DEFLATE", PREDICTOR="YES", NUM_THREADS="2",
                BIGTIFF="IF_SAFER", OVERVIEW_RESAMPLING="MODE" if self._coded else "AVERAGE",
            )  # fmt: skip
            with rasterio.open(partial) as file:  # GDAL may close a file that lacks its end without a word
                height, width = (slice(max(0, n - 1), n) for n in file.shape)
                file.read(window=Window.from_slices(height, width))


def storage(bands: Sequence[Band]) -> tuple[str, float]:
    """Type and no-data number: float32 with NaN for quantities, the smallest integers with a free number for codes."""
    if any(band.unit not in CODED for band in bands):
        return "float32", math.nan
    codes = (
        [code for band in bands for code in band.classes or ()]
        if all(b.classes and b.unit == "class" for b in bands)
        else None
    )
    given = {band.nodata for band in bands}
    wanted = given.pop() if len(given) == 1 else None
    if codes is None:
        return "int32", float(np.iinfo(np.int32).min)
    for dtype in ("uint8", "uint16", "int32"):
        limits = np.iinfo(dtype)
        free = wanted if wanted is not None and wanted not in codes else limits.max
        if (
            min(codes) >= limits.min
            and max(codes) <= limits.max
            and limits.min <= free <= limits.max
            and free not in codes
        ):
            return dtype, float(free)
    return "int32", float(np.iinfo(np.int32).min)


def colours(classes: Mapping[int, str]) -> dict[int, tuple[int, int, int, int]]:
    """A colour of its own for each code; hues a golden ratio apart stay distinct whatever their number."""
    table = {}
    for index, code in enumerate(sorted(classes)):
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.25 * (index % 2), 0.9 - 0.2 * (index // 2 % 3))
        table[code] = (*(round(255 * channel) for channel in rgb), 255)
    return table  # type: ignore[return-value]


def _time_tags(time: Span) -> dict[str, str]:
    if time == ALWAYS:
        return {}
    return {"time_coverage_start": dates.iso(time[0]), "time_coverage_end": dates.iso(time[1])}
