"""A map from a handful of labelled places, on stored embeddings: a classifier in seconds, its confidence, and where to label next.

What can be said about the map is measured on places that were left out, a cluster at a time, because neighbouring places are near
copies of each other. The same left-out answers choose the penalty of the classifier and fit one temperature (Guo et al. 2017), so that
a confidence of 80 % means right in 80 % of such places. Where no class has two clusters nothing can be left out: the strongest
penalty is taken, which ranks by distance to the classes' means, and the report says that the confidence is not calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from everysat.data.batches import prefetch
from everysat.find import suggest
from everysat.io import vector
from everysat.io.cog import CogWriter
from everysat.io.output import replacing
from everysat.nn.probe import Scale, fit_linear, fit_neighbours, sample_weights
from everysat.nn.scores import accuracy, calibration_error, confusion_matrix, fit_temperature, macro_f1
from everysat.progress import track
from everysat.store.active import Pool, to_label
from everysat.store.engines import READERS
from everysat.store.search import centres, per_unit, pixels
from everysat.table import Table

HOW = ("linear", "knn")
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3)
"""Penalties to choose among; without left-out places the first."""
FOLDS, PER_PLACE, CLUSTERS = 10, 50, 4
"""Fits for left-out places at most; pixels of a place that are used at most; clusters at least, or their gap is halved."""
GAP_PX = 20
"""Labelled places nearer than so many pixels belong to one cluster."""
WINDOWS, SCALING, POOL = 64, 20_000, 2048
"""Windows and pixels that features are standardised with; candidates from which the next to label are chosen, or 50 for each if that is more."""
NO_CLASS = 255


@dataclass(frozen=True)
class Labelled:
    """Pixels of labelled places: vectors ``x`` [n, dim], ``label`` [n] into ``classes``, ``place`` [n] (position in the file), pixel
    number ``index`` [n]; ``shapes`` of the places in the store's CRS and the class ``of`` each."""

    x: Tensor
    label: Tensor
    place: Tensor
    index: np.ndarray
    classes: tuple[str, ...]
    shapes: tuple[Any, ...]
    of: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """A classifier and what is known of it.

    Attributes:
        logits: from vectors [n, dim] to [n, class]; over ``temperature``, their softmax is the probability.
        scores: on left-out places: ``accuracy``, ``macro_f1``, ``calibration_error``; empty where nothing could be left out.
        notes: how it was fitted and measured, for people.
    """

    logits: Callable[[Tensor], Tensor]
    temperature: float
    scores: dict[str, float]
    notes: tuple[str, ...]

    def probabilities(self, x: Tensor) -> Tensor:
        """[n, dim] -> [n, class]."""
        return (self.logits(x) / self.temperature).softmax(-1)


@dataclass(frozen=True)
class Result:
    """``paths`` by what they hold (``classes``, ``confidence``, ``next``), the labels and the classifier."""

    paths: dict[str, Path]
    labelled: Labelled
    fitted: Fitted

    def table(self) -> Table:
        """Labelled places and pixels of each class."""
        of = np.array(self.labelled.of)
        pixels = torch.bincount(self.labelled.label, minlength=len(self.labelled.classes)).tolist()
        rows = [
            {"class": name, "places": int((of == c).sum()), "pixels": pixels[c]}
            for c, name in enumerate(self.labelled.classes)
        ]
        return Table.of("Labels", rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, how it was fitted and what it is worth, for people."""
        return (*self.labelled.notes, *self.fitted.notes)


def label(
    store: Any,
    source: Any,
    column: str,
    out: str | Path,
    *,
    how: str = "linear",
    classes: Sequence[str] | None = None,
    skip_outside: bool = False,
    next_places: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> Result:
    """A class map of a store from labelled points or polygons, window by window.

    Args:
        store: a store of pixels.
        source: a file of points or polygons, or a geopandas frame.
        column: the attribute that holds the class.
        out: the map, a GeoTIFF of codes (255 without data); the confidence in per cent is written to ``<out>-confidence.tif``.
        how: ``linear`` (logistic regression) or ``knn``.
        classes: those that there must be; all that occur by default.
        skip_outside: leave out places without data in the store, instead of an error.
        next_places: so many places to label next are written to ``<out>-next.geojson``: of uncertain class, unlike the labelled
            ones, and unlike each other.

    Raises:
        ValueError: a class is missing, fewer than two are there, or places lie outside of the store; the message says how many.
    """
    pixels(store, "a class map")
    out = Path(out)
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"out={str(out)!r} must end with .tif")
    labelled = read_labels(store, source, column, classes=classes, skip_outside=skip_outside, seed=seed)
    fitted = fit(store, labelled, how=how, seed=seed)
    paths = {"classes": out, "confidence": out.with_name(f"{out.stem}-confidence{out.suffix}")}
    pool = Pool(max(POOL, 50 * next_places), seed) if next_places else None
    _map(store, labelled, fitted, paths, pool, quiet)
    if pool is not None:
        paths["next"] = out.with_name(f"{out.stem}-next.geojson")
        frame = to_label(store, labelled, pool, next_places)
        with replacing(paths["next"]) as part:
            part.write_text(frame.to_json(drop_id=True) + "\n", encoding="utf-8")
    return Result(paths, labelled, fitted)


def read_labels(
    store: Any,
    source: Any,
    column: str,
    *,
    classes: Sequence[str] | None = None,
    skip_outside: bool = False,
    seed: int = 0,
) -> Labelled:
    """The vectors under labelled places: of a point its pixel, of a polygon at most 50 random pixels with their centre inside it."""
    frame = vector.load_frame(source)
    if column not in frame.columns:
        known = [str(c) for c in frame.columns if c != frame.geometry.name]
        raise ValueError(f"column={column!r} is none of the places' attributes. {suggest(column, known)}")
    unnamed = int(frame[column].isna().sum())
    if unnamed:
        raise ValueError(
            f"{unnamed} of {len(frame)} places have no class in column {column!r}; fill it in, or leave them out"
        )
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)].to_crs(store.crs).explode(ignore_index=True)
    values = frame[column].astype(str).to_numpy()
    names = tuple(classes) if classes else tuple(sorted(set(values)))
    frame, values = frame[np.isin(values, names)], values[np.isin(values, names)]
    rng, found, missing = np.random.default_rng(seed), [], []
    for number, shape in enumerate(frame.geometry):
        points = store.within(shape)
        if len(points.index) == 0:
            missing.append(number)
            continue
        kept = np.sort(rng.permutation(len(points.index))[:PER_PLACE])
        found.append((number, points.vectors[kept], points.index[kept]))
    _complain(store, column, names, values, [number for number, _, _ in found], missing, skip_outside)
    code = {name: c for c, name in enumerate(names)}
    place = np.concatenate([np.full(len(index), i) for i, (_, _, index) in enumerate(found)])
    of = tuple(code[values[number]] for number, _, _ in found)
    shapes = tuple(frame.geometry.iloc[number] for number, _, _ in found)
    index, x = np.concatenate([f[2] for f in found]), np.concatenate([f[1] for f in found])
    clear = _unambiguous(index, np.array(of)[place])
    notes = [f"{len(missing)} places without data in the store are left out"] if missing else []
    if not clear.all():
        notes.append(f"{int((~clear).sum())} pixels that places of several classes claim are left out")
    label = torch.from_numpy(np.array(of)[place][clear])
    absent = [name for c, name in enumerate(names) if not (label == c).any()]
    if absent:
        raise ValueError(
            f"{len(absent)} classes are left without a pixel of their own ({', '.join(absent)}): their places overlap others"
        )
    where = torch.from_numpy(place[clear])
    return Labelled(torch.from_numpy(x[clear]), label, where, index[clear], names, shapes, of, tuple(notes))


def _complain(
    store: Any, column: str, names: Sequence[str], values: np.ndarray, there: list[int], missing: list[int], skip: bool
) -> None:
    if missing and not skip:
        some = ", ".join(f"{number} ({values[number]})" for number in missing[:5])
        raise ValueError(
            f"{len(missing)} of {len(values)} labelled places lie outside of {store.path} or where it has no data: number {some}"
            f"{', ...' if len(missing) > 5 else ''}; leave them out yourself, or with --skip-outside"
        )
    absent = [name for name in names if name not in set(values[there])]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(names)} classes have no labelled place with data: {', '.join(absent)}; label at least one of each"
        )
    if len(names) < 2:
        raise ValueError(f"column {column!r} holds {len(names)} class ({', '.join(names)}); a map needs at least two")
    if len(names) > NO_CLASS:
        raise ValueError(
            f"column {column!r} holds {len(names)} classes, a map at most {NO_CLASS}; is it the right column?"
        )


def _unambiguous(index: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Which rows belong to pixels that one class alone claims."""
    _, where = np.unique(index, return_inverse=True)
    low, high = np.full(where.max() + 1, NO_CLASS), np.zeros(where.max() + 1, int)
    np.minimum.at(low, where, code)
    np.maximum.at(high, where, code)
    return (low == high)[where]


def fit(store: Any, labelled: Labelled, *, how: str = "linear", seed: int = 0) -> Fitted:
    """The classifier, with the penalty of the least log-loss and the temperature on left-out clusters of places."""
    if how not in HOW:
        raise LookupError(f"how={how!r} is unknown. {suggest(how, HOW)}")
    scale = _scale(store, labelled, seed)
    cluster, gap_m = clusters(labelled, store)
    fold = _folds(cluster, seed)[labelled.place]
    told = _tellable(labelled.label, fold)
    choices = STRENGTHS if how == "linear" else (1.0,)
    if not told.any():
        note = f"too few places to leave any out: the confidence is not calibrated, and how good the map is cannot be told (penalty {choices[0]:g})"
        return Fitted(_classifier(how, labelled, slice(None), scale, choices[0]), 1.0, {}, (note,))
    truth, weight = labelled.label[told], sample_weights(labelled.label[told], labelled.place[told], "group")
    tried = []
    for strength in choices:
        logits = torch.zeros(len(labelled.label), len(labelled.classes))
        for f in fold.unique():
            out = fold == f
            logits[out] = _classifier(how, labelled, ~out, scale, strength)(labelled.x[out])
        temperature = fit_temperature(logits[told], truth, weight)
        loss = F.cross_entropy(logits[told] / temperature, truth, reduction="none") @ weight
        tried.append((float(loss), strength, temperature, logits[told]))
    _, strength, temperature, logits = min(tried, key=lambda one: one[0])
    scores = _scores(logits / temperature, truth, len(labelled.classes))
    kind = f"logistic regression, penalty {strength:g}" if how == "linear" else "20 nearest neighbours"
    groups, places = len(np.unique(cluster)), len(labelled.place[told].unique())
    notes = [
        f"{kind}, temperature {temperature:.2f}; figures of {places} places in {groups} clusters at least {gap_m:.0f} m apart, each predicted "
        f"without its cluster: accuracy {scores['accuracy']:.3f}, macro F1 {scores['macro_f1']:.3f}, calibration error {scores['calibration_error']:.3f}"
    ]
    alone = [name for c, name in enumerate(labelled.classes) if not (truth == c).any()]
    if alone:
        notes.append(f"not in these figures, because all their places lie in one cluster: {', '.join(alone)}")
    return Fitted(_classifier(how, labelled, slice(None), scale, strength), temperature, scores, tuple(notes))


def clusters(labelled: Labelled, store: Any) -> tuple[np.ndarray, float]:
    """The cluster of each place, int [place], and the least distance between clusters in metres: 20 pixels, halved while there are
    fewer than four clusters."""
    shapes = np.array(labelled.shapes, object)
    middle = shapely.union_all(shapely.centroid(shapes)).centroid
    kx, ky = per_unit(store.crs, middle.x, middle.y)
    scaled = shapely.transform(shapes, lambda xy: xy * (kx, ky))
    pixel = math.sqrt(abs(store.geobox.affine.determinant) * kx * ky)
    tree, gap = shapely.STRtree(scaled), GAP_PX * pixel
    while True:
        a, b = tree.query(scaled, predicate="dwithin", distance=gap)
        links = coo_array((np.ones(len(a)), (a, b)), shape=(len(shapes), len(shapes)))
        count, cluster = connected_components(links, directed=False)
        if count >= min(CLUSTERS, len(shapes)) or gap < pixel:
            return cluster, gap
        gap /= 2


def _folds(cluster: np.ndarray, seed: int) -> Tensor:
    """Fold of each place: one a cluster, or ten of whole clusters."""
    order = np.random.default_rng(seed).permutation(cluster.max() + 1)
    return torch.from_numpy(order[cluster] % FOLDS)


def _tellable(label: Tensor, fold: Tensor) -> Tensor:
    """Which rows have their class in training too when their fold is left out."""
    told = torch.zeros(len(label), dtype=torch.bool)
    for f in fold.unique():
        out = fold == f
        if len(label[~out].unique()) > 1:
            told |= out & torch.isin(label, label[~out])
    return told


def _classifier(how: str, labelled: Labelled, rows: Any, scale: Scale, strength: float) -> Callable[[Tensor], Tensor]:
    """Vectors -> log-odds, fitted on ``rows``."""
    x, label, place = labelled.x[rows], labelled.label[rows], labelled.place[rows]
    if how == "linear":
        fitted = fit_linear(
            x, label, place, classes=labelled.classes, strengths=[strength], weighting="class+group", per_group=PER_PLACE,
            scale=scale, calibrate=False,
        )  # fmt: skip
        return fitted.logits
    near = fit_neighbours(x, label, place, classes=labelled.classes, per_group=PER_PLACE, scale=scale)
    return lambda x: near.probabilities(x).clamp(min=1e-4).log()


def _scale(store: Any, labelled: Labelled, seed: int) -> Scale:
    """Mean and deviation of each number over the store, which takes no labels; the deviation is shared where it is tiny."""
    windows, rng, found = list(store.windows()), np.random.default_rng(seed), [labelled.x.numpy()]
    for rows, cols in windows[:: math.ceil(len(windows) / WINDOWS)]:
        block = store.read(rows, cols).reshape(-1, store.dim)
        block = block[np.isfinite(block).all(1)]
        found.append(block[rng.permutation(len(block))[: max(1, SCALING // min(len(windows), WINDOWS))]])
    scale = Scale.of(torch.from_numpy(np.concatenate(found)))
    return Scale(scale.mean, scale.std.clamp(min=0.01 * float(scale.std.mean())))


def _scores(logits: Tensor, truth: Tensor, classes: int) -> dict[str, float]:
    said, best = logits.softmax(-1).max(-1)
    confusion = confusion_matrix(truth, best, classes, torch.zeros_like(truth), 1)[0]
    return {
        "accuracy": float(accuracy(confusion)),
        "macro_f1": float(macro_f1(confusion)),
        "calibration_error": calibration_error(said, best == truth),
    }


def _map(
    store: Any, labelled: Labelled, fitted: Fitted, paths: dict[str, Path], pool: Pool | None, quiet: bool
) -> None:
    """Write both maps; ``pool`` is shown every pixel."""
    windows, names = list(store.windows()), dict(enumerate(labelled.classes))
    ready = prefetch(lambda window: store.read(*window), windows, workers=READERS)
    classes = CogWriter(paths["classes"], store.geobox, ["class"], dtype="uint8", nodata=NO_CLASS, classes=names)
    confidence = CogWriter(paths["confidence"], store.geobox, ["confidence"], units="%", dtype="uint8", nodata=NO_CLASS)
    with classes, confidence:
        for (rows, cols), vectors in zip(windows, track(ready, "Mapping", len(windows), quiet=quiet), strict=True):
            flat = vectors.reshape(-1, store.dim)
            seen = np.flatnonzero(np.isfinite(flat).all(1))
            two = fitted.probabilities(torch.from_numpy(flat[seen])).topk(2, -1)
            odds, guesses = two.values.numpy(), two.indices.numpy()
            for file, values in ((classes, guesses[:, 0]), (confidence, np.rint(100 * odds[:, 0]))):
                image = np.full(len(flat), math.nan, np.float32)
                image[seen] = values
                file.write(image.reshape(1, *vectors.shape[:2]), rows, cols)
            if pool is not None:
                x, y = (axis.ravel()[seen] for axis in centres(store, rows, cols))
                number = np.arange(rows.start, rows.stop)[:, None] * store.shape[1] + np.arange(cols.start, cols.stop)
                pool.offer(
                    number.ravel()[seen], 1 - (odds[:, 0] - odds[:, 1]), guesses, flat[seen], np.column_stack([x, y])
                )
