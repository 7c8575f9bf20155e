"""Targets found by example or by words: peaks of the heat map of a query, each with a box around what belongs to it.

A peak is a pixel that no neighbour outscores; of several within ``radius_m`` the best stays (greedy non-maximum suppression). What belongs to it is
the connected region in which the score stands above the usual one, the median of the map, by at least a ``share`` of what the peak does: at a half
that is the full width at half maximum, as the size of sources is measured in astronomy. A better peak keeps its region, and a lesser one in it is none of its own.

Objects that a task was trained to find by labels are of :mod:`everysat.tasks.detect`; here nothing is trained.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyproj
import shapely
from scipy import ndimage

from everysat.io import grid
from everysat.io.output import replacing
from everysat.progress import track
from everysat.store.change import UNUSUAL
from everysat.store.search import DEGREES, Query, per_unit, pixels, scored
from everysat.table import Table

POOL = 20_000
"""Candidates that are kept, the best."""
SAMPLED = 1_000_000
"""About as many scores tell what is usual."""
REACH = 2048
"""Pixels from a peak at which a region is cut off."""
THRESHOLD = "mad"
"""The default: what scores unusually much, by the median and the median absolute deviation of the map."""


@dataclass(frozen=True)
class Detections:
    """What was found, the best first.

    Attributes:
        score: cosine of the peak and the query, [n].
        deviations: how far that is above the median of the map, in deviations (1.4826 x median absolute deviation), [n].
        lon, lat: of the peak, degrees, [n]. box: around the region, polygons in degrees along the axes of the store's CRS.
        width_m, height_m: of the box, [n]. area_m2: of the region, [n].
        store: where they lie. threshold, rule: what peaks had to reach, and how it was found. highest: score of all of the map, NaN without data.
    """

    score: np.ndarray
    deviations: np.ndarray
    lon: np.ndarray
    lat: np.ndarray
    box: tuple[Any, ...]
    width_m: np.ndarray
    height_m: np.ndarray
    area_m2: np.ndarray
    store: str
    threshold: float
    rule: str
    highest: float

    def __len__(self) -> int:
        return len(self.score)

    def __str__(self) -> str:
        """How many, and what they had to reach."""
        found = f"{Path(self.store).name}: {len(self)} found, scores of at least {self.threshold:.3f} ({self.rule})"
        return found if len(self) else f"{found}; the highest is {self.highest:.3f}"

    def frame(self) -> geopandas.GeoDataFrame:
        """One row a detection, with its box in degrees."""
        names = ("score", "deviations", "lon", "lat", "width_m", "height_m", "area_m2")
        columns = {"rank": np.arange(1, len(self) + 1), **{name: getattr(self, name) for name in names}}
        return geopandas.GeoDataFrame(columns, geometry=list(self.box), crs=DEGREES)

    def table(self) -> Table:
        """Without the boxes."""
        rows = tuple(
            (
                i + 1, float(self.score[i]), f"{self.lon[i]:.5f}", f"{self.lat[i]:.5f}",
                f"{self.width_m[i]:.0f} x {self.height_m[i]:.0f} m", f"{self.area_m2[i] / 1e4:.3g} ha",
            )
            for i in range(len(self))
        )  # fmt: skip
        return Table("Detections", ("rank", "score", "lon", "lat", "width x height", "area"), rows, (str(self),))

    def save(self, path: str | Path) -> Path:
        """As ``.geojson`` or ``.parquet`` (boxes), or ``.csv`` (peaks)."""
        path, frame = Path(path), self.frame()
        writers: dict[str, Callable[[Path], Any]] = {
            ".geojson": lambda part: part.write_text(frame.to_json(drop_id=True) + "\n", encoding="utf-8"),
            ".parquet": lambda part: frame.to_parquet(part, index=False),
            ".csv": lambda part: frame.drop(columns="geometry").to_csv(part, index=False, lineterminator="\n"),
        }
        if path.suffix not in writers:
            raise ValueError(f"path={str(path)!r} must end with {', '.join(writers)}")
        with replacing(path) as part:
            writers[path.suffix](part)
        return path


def detect(
    store: Any,
    wanted: Query | np.ndarray,
    *,
    threshold: float | str = THRESHOLD,
    most: int = 20,
    least_m: float = 0.0,
    radius_m: float | None = None,
    share: float = 0.5,
    within: Any = None,
    quiet: bool = True,
) -> Detections:
    """The ``most`` best peaks of the heat map of a query, with boxes.

    Args:
        store: of pixels, what ``open_store`` returns.
        wanted: of :func:`everysat.store.search.query`, or a vector [dim].
        threshold: a cosine that peaks must reach, or ``mad``: what is unusual in this map.
        least_m: boxes whose longer side is shorter than this are left out.
        radius_m: of peaks nearer to each other the best stays; by default ``least_m``, and at least three pixels.
        share: of the height of a peak above the median, at which its region ends; 0 to 1.
        within: geometries as for :func:`everysat.store.search.search`.

    Raises:
        ValueError: a store of chips, a vector that does not fit, options out of range.
    """
    pixels(store, "detection")
    if most < 1 or not least_m >= 0 or not 0 < share < 1 or (radius_m is not None and not radius_m >= 0):
        raise ValueError(
            f"most={most} must be at least 1, least_m={least_m} and radius_m={radius_m} at least 0 (metres), share={share} between 0 and 1"
        )
    if threshold != THRESHOLD and (isinstance(threshold, str) or not math.isfinite(threshold)):
        raise ValueError(f"threshold={threshold!r} is neither a number nor {THRESHOLD}")
    with tempfile.TemporaryDirectory(prefix="everysat-heat-") as folder:
        heat = np.memmap(Path(folder) / "heat", np.float32, "w+", shape=store.shape)
        try:
            windows = list(store.windows())
            for rows, cols, score in track(scored(store, wanted, within), "Scoring", len(windows), quiet=quiet):
                heat[rows, cols] = score
            usual, deviation = _usual(heat)
            unusual = usual + UNUSUAL * deviation
            level = unusual if isinstance(threshold, str) else float(threshold)
            rule = f"{UNUSUAL:g} deviations above the median" if isinstance(threshold, str) else "as given"
            at = _candidates(heat, windows, max(level, float(np.nextafter(np.float32(usual), np.float32(2)))))
            highest = float(np.nanmax(heat)) if np.isfinite(heat).any() else math.nan
            found = _regions(heat, at, usual, share, store, most, least_m, radius_m)
        finally:
            del heat  # its file cannot be removed everywhere while it is open
    return _told(store, found, usual, deviation, level, rule, highest)


Region = tuple[float, int, int, slice, slice, int]
"""Score, row and column of a peak; rows and columns of its box; pixels of its region."""


def _usual(heat: np.ndarray) -> tuple[float, float]:
    """Median and deviation of scores."""
    step = max(1, math.ceil(math.sqrt(heat.size / SAMPLED)))
    some = np.asarray(heat[::step, ::step])
    some = some[np.isfinite(some)]
    if not len(some):
        return 0.0, 0.0
    middle = float(np.median(some))
    return middle, 1.4826 * float(np.median(np.abs(some - middle)))


def _candidates(heat: np.ndarray, windows: list[tuple[slice, slice]], level: float) -> np.ndarray:
    """Rows and columns int64 [n, 2] of pixels of at least ``level`` that no neighbour outscores, the best first, of equal ones the first."""
    score, at = np.zeros(0, np.float32), np.zeros((0, 2), np.int64)
    for rows, cols in windows:
        top, left = max(rows.start - 1, 0), max(cols.start - 1, 0)
        around = np.nan_to_num(heat[top : rows.stop + 1, left : cols.stop + 1], nan=-np.inf)
        best = (around == ndimage.maximum_filter(around, 3, mode="constant", cval=-np.inf)) & (around >= level)
        y, x = np.nonzero(
            best[rows.start - top :, cols.start - left :][: rows.stop - rows.start, : cols.stop - cols.start]
        )
        y, x = y + rows.start, x + cols.start
        score, at = np.concatenate([score, heat[y, x]]), np.concatenate([at, np.stack([y, x], 1)])
        order = np.lexsort((at[:, 1], at[:, 0], -score))[:POOL]
        score, at = score[order], at[order]
    return at


def _regions(
    heat: np.ndarray,
    at: np.ndarray,
    usual: float,
    share: float,
    store: Any,
    most: int,
    least_m: float,
    radius_m: float | None,
) -> list[Region]:
    """Greedy: the best candidate, its region, and on with what lies neither in it nor near."""
    taken = np.zeros(heat.shape, bool)
    kx, ky = _pixel_m(store)
    radius_m = max(least_m, 3 * max(kx, ky)) if radius_m is None else radius_m
    kept: list[tuple[int, int]] = []
    found: list[Region] = []
    for y, x in at.tolist():
        if len(found) == most:
            break
        near = np.array(kept, float).reshape(-1, 2) - (y, x)
        if taken[y, x] or (np.hypot(near[:, 0] * ky, near[:, 1] * kx) < radius_m).any():
            continue
        score = float(heat[y, x])
        rows, cols, mask = _around(heat, taken, y, x, usual + share * (score - usual))
        taken[rows, cols] |= mask
        kept.append((y, x))
        if max((rows.stop - rows.start) * ky, (cols.stop - cols.start) * kx) >= least_m:
            found.append((score, y, x, rows, cols, int(mask.sum())))
    return found


def _around(heat: np.ndarray, taken: np.ndarray, y: int, x: int, level: float) -> tuple[slice, slice, np.ndarray]:
    """Box of the connected region (by edges) of at least ``level`` around a pixel, and which of the box belong to it."""
    reach = 32
    while True:
        top, left = max(y - reach, 0), max(x - reach, 0)
        part = (slice(top, min(y + reach + 1, heat.shape[0])), slice(left, min(x + reach + 1, heat.shape[1])))
        number, _ = ndimage.label((heat[part] >= level) & ~taken[part])
        mine = number == number[y - top, x - left]
        rows, cols = (np.flatnonzero(mine.any(axis)) for axis in (1, 0))
        box = slice(int(rows[0]) + top, int(rows[-1]) + 1 + top), slice(int(cols[0]) + left, int(cols[-1]) + 1 + left)
        cut = any(
            (own.start == seen.start and seen.start > 0) or (own.stop == seen.stop and seen.stop < size)
            for own, seen, size in zip(box, part, heat.shape, strict=True)
        )
        if not cut or reach >= REACH:
            return *box, mine[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        reach *= 4


def _pixel_m(store: Any) -> tuple[float, float]:
    """Width and height of a pixel in the middle of a store, metres."""
    height, width = store.shape
    x, y = grid.positions(store.geobox.affine, width / 2, height / 2)
    kx, ky = per_unit(store.crs, float(x), float(y))
    return kx * abs(store.geobox.affine.a), ky * abs(store.geobox.affine.e)


def _told(
    store: Any, found: list[Region], usual: float, deviation: float, level: float, rule: str, highest: float
) -> Detections:
    a, (kx, ky) = store.geobox.affine, _pixel_m(store)
    to_degrees = pyproj.Transformer.from_crs(store.crs, DEGREES, always_xy=True)
    score = np.array([each[0] for each in found])
    peak = np.array([each[1:3] for each in found], float).reshape(-1, 2) + 0.5
    lon, lat = to_degrees.transform(*grid.positions(a, peak[:, 1], peak[:, 0])) if found else (score, score)
    boxes = []
    for _, _, _, rows, cols, _ in found:
        corners = [(cols.start, rows.stop), (cols.stop, rows.stop), (cols.stop, rows.start), (cols.start, rows.start)]
        x, y = grid.positions(a, *np.array(corners, float).T)
        boxes.append(shapely.Polygon(np.column_stack(to_degrees.transform(x, y))))
    sides = np.array([(cols.stop - cols.start, rows.stop - rows.start) for *_, rows, cols, _ in found], float).reshape(
        -1, 2
    )
    area = np.array([each[5] for each in found], float) * kx * ky
    above = (score - usual) / deviation if deviation > 0 else np.full(len(score), math.inf)
    return Detections(
        score, above, np.asarray(lon), np.asarray(lat), tuple(boxes), sides[:, 0] * kx, sides[:, 1] * ky, area,
        str(store.path), level, rule, highest,
    )  # fmt: skip
