"""How much a place changed between two stores of one model on one grid, and where that is more than usual."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everysat.data.batches import prefetch
from everysat.find import suggest
from everysat.io import grid
from everysat.io.cog import CogWriter
from everysat.progress import track
from everysat.store.engines import READERS, unit
from everysat.store.search import model_of, pixels

SCORES = {
    "cosine": "1 - cosine of the two vectors: 0 the same, 1 unrelated, 2 opposite",
    "robust": "root mean square, over numbers, of (difference - its median over the area) / (1.4826 times its median absolute deviation): 1 is usual",
}
"""``robust`` takes out what all pixels share, such as another season or atmosphere, and counts steady numbers more."""
RULES = ("none", "mad", "otsu")
WINDOWS, PER_WINDOW = 64, 4096
"""Windows, evenly spaced, and pixels of each, evenly spaced too, on which scales and thresholds are found."""
UNUSUAL = 3.5
"""Robust standard deviations beyond which a score is called a change (Iglewicz and Hoaglin 1993)."""
CHANGED = {0: "same", 1: "changed"}


@dataclass(frozen=True)
class Change:
    """``paths`` (``score``, and ``changed`` if a threshold was asked for), the threshold and the rule, and the share of pixels above it."""

    paths: dict[str, Path]
    threshold: float | None
    rule: str
    share: float | None


def change(
    before: Any,
    after: Any,
    out: str | Path,
    *,
    score: str = "cosine",
    threshold: str | float = "none",
    quiet: bool = False,
) -> Change:
    """The change score of every pixel as a Cloud-Optimized GeoTIFF, window by window; no data where either store has none.

    Args:
        before, after: stores of pixels on the same grid, made by the same model.
        out: the GeoTIFF of float32 scores.
        score: ``cosine`` or ``robust``, see :data:`SCORES`.
        threshold: a number; ``mad``: median + 3.5 robust standard deviations of the scores; ``otsu``: the split that explains most
            of their variance (Otsu 1979). Then ``<out>-changed.tif`` holds 1 above it, 0 below, 255 without data.

    Raises:
        ValueError: grids or models differ, or no pixel has data in both; the message names both stores.
    """
    out = Path(out)
    same(before, after)
    if score not in SCORES:
        raise LookupError(f"score={score!r} is unknown. {suggest(score, SCORES)}")
    rule, number = _rule(threshold)
    scored = _scorer(before, after, score)
    if rule in ("mad", "otsu"):
        number = {"mad": _mad, "otsu": _otsu}[rule](np.concatenate([scored(a, b) for a, b in _sampled(before, after)]))
    told = {"change": SCORES[score], "before": Path(before.path).name, "after": Path(after.path).name}
    paths = {"score": out}
    writers = [CogWriter(out, before.geobox, ["change"], units="1", tags=told)]
    if number is not None:
        paths["changed"] = out.with_name(f"{out.stem}-changed{out.suffix}")
        told |= {"threshold": f"{number:.6g}", "rule": rule}
        writers.append(
            CogWriter(
                paths["changed"], before.geobox, ["changed"], dtype="uint8", nodata=255, classes=CHANGED, tags=told
            )
        )
    share = _write(before, after, scored, writers, number, quiet)
    return Change(paths, number, rule, share if number is not None else None)


def same(before: Any, after: Any) -> None:
    """Raises ValueError unless two stores have one grid and one model."""
    for store in (before, after):
        pixels(store, "change")
    names = f"{before.path} and {after.path}"
    if (before.dim, model_of(before)) != (after.dim, model_of(after)):
        raise ValueError(
            f"{names} were made by different models ({before.dim} numbers of {model_of(before)}; {after.dim} of {model_of(after)}), "
            "whose vectors cannot be compared; embed both with one"
        )
    a, b = before.geobox, after.geobox
    near = np.allclose([*a.affine][:6], [*b.affine][:6], rtol=0, atol=1e-6 * abs(a.affine.a))
    if tuple(a.shape) != tuple(b.shape) or grid.crs_of(a) != grid.crs_of(b) or not near:
        raise ValueError(
            f"{names} lie on different grids ({grid.describe(a)}; {grid.describe(b)}); embed both for one place: everysat embed --place"
        )


def _rule(threshold: str | float) -> tuple[str, float | None]:
    if isinstance(threshold, str) and threshold in RULES:
        return threshold, None
    try:
        number = float(threshold)
    except ValueError:
        raise ValueError(f"threshold={threshold!r} is neither a number nor one of {', '.join(RULES)}") from None
    if not math.isfinite(number):
        raise ValueError(f"threshold={threshold!r} is not finite")
    return "as given", number


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _scorer(before: Any, after: Any, score: str) -> Scorer:
    """From vectors [..., dim] before and after to scores [...]."""
    if score == "cosine":
        # Half the squared chord is 1 - cosine, but exactly 0 for equal vectors.
        return lambda a, b: 0.5 * np.square(unit(b) - unit(a)).sum(-1)
    difference = np.concatenate([unit(b) - unit(a) for a, b in _sampled(before, after)])
    usual = np.median(difference, 0)
    spread = 1.4826 * np.median(np.abs(difference - usual), 0)
    if not (spread > 0).any():
        # Nothing changes in most places, so that there is no usual change to measure by.
        return lambda a, b: np.sqrt(np.square(unit(b) - unit(a) - usual).mean(-1))
    spread = np.maximum(spread, 0.01 * spread.max())
    return lambda a, b: np.sqrt(np.square((unit(b) - unit(a) - usual) / spread).mean(-1))


def _sampled(before: Any, after: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Vectors [n, dim] of pixels with data in both, from windows spread over the area."""
    windows, found = list(before.windows()), []
    for rows, cols in windows[:: math.ceil(len(windows) / WINDOWS)]:
        a, b = (store.read(rows, cols).reshape(-1, store.dim) for store in (before, after))
        both = np.flatnonzero(np.isfinite(a).all(1) & np.isfinite(b).all(1))
        both = both[:: max(1, math.ceil(len(both) / PER_WINDOW))]
        if len(both):
            found.append((a[both], b[both]))
    if not found:
        raise ValueError(f"no pixel has data in both {before.path} and {after.path}")
    return found


def _mad(scores: np.ndarray) -> float:
    middle = float(np.median(scores))
    return middle + UNUSUAL * 1.4826 * float(np.median(np.abs(scores - middle)))


def _otsu(scores: np.ndarray) -> float:
    """The score at which splitting in two leaves the least variance within the parts."""
    ordered = np.sort(scores.astype(float))
    n = np.arange(1, len(ordered))
    low = np.cumsum(ordered)[:-1] / n
    high = (ordered.sum() - low * n) / np.maximum(len(ordered) - n, 1)
    between = n * (len(ordered) - n) * (low - high) ** 2
    if len(between) == 0 or between.max() <= 0:
        return float(ordered[-1])
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


def _write(
    before: Any, after: Any, scored: Scorer, writers: list[CogWriter], number: float | None, quiet: bool
) -> float:
    """The share of pixels with data whose score is above the threshold."""
    windows, above, count = list(before.windows()), 0, 0

    def one(window: tuple[slice, slice]) -> tuple[slice, slice, np.ndarray]:
        return (*window, scored(before.read(*window), after.read(*window)))

    with ExitStack() as stack:
        files = [stack.enter_context(writer) for writer in writers]
        ready = prefetch(one, windows, workers=READERS)
        for rows, cols, score in track(ready, "Comparing", len(windows), quiet=quiet):
            files[0].write(score[None], rows, cols)
            seen = np.isfinite(score)
            count += int(seen.sum())
            if number is not None:
                more = score > number
                above += int((more & seen).sum())
                files[1].write(more[None].astype(np.uint8), rows, cols, seen[None])
        if count == 0:
            raise ValueError(f"no pixel has data in both {before.path} and {after.path}")
    return above / count
