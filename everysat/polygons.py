"""A map from labelled polygons: which pixels they label, which polygons train and which test, how features compare.

Polygons are the unit everywhere: draws of labels take whole polygons, held-out ground is whole blocks, intervals resample
polygons. Pixels of one polygon are nearly copies of each other and must not lie on both sides of a split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everysat.baselines import Bands, RandomConvolutions, Statistics
from everysat.data.split import label_fraction, spatial_blocks
from everysat.evaluate import Draw, Evaluation, Samples, Score, evaluate
from everysat.io import vector
from everysat.mapping.source import Source, open_source
from everysat.mapping.windows import inside
from everysat.nn.draws import stream
from everysat.nn.mappers import Classified, Dense, Tasked
from everysat.nn.probe import Scale, fit_linear
from everysat.predict import plan_of
from everysat.progress import Progress
from everysat.table import Table
from everysat.types import Batch, ContractError, Encoder, Place, Task

Extractor = Callable[[Batch], Tensor]
"""From a batch to features of every pixel, [row, dim, y, x]."""


WHOLE_BYTES = 1e9
"""Scenes up to this size are read at once to learn from polygons."""
SCALING = 50_000
"""Pixels on which features are standardised."""
PROBE: dict[str, Any] = {"strengths": (1e-3, 1e-2, 1e-1), "weighting": "class", "per_group": 20, "folds": 2}
"""The classifier of all features alike: logistic regression whose penalty is chosen on left-out labelled polygons, classes
balanced, at most 20 pixels of a polygon."""


@dataclass(frozen=True)
class Labels:
    """Polygons on a pixel grid: ``label`` (index into ``classes``) and ``polygon`` int64 [y, x], -1 where there is none; of
    each polygon its class ``of`` [n] (-1: it labels no pixel here) and its centre ``xy_m`` [n, 2] in the place's CRS."""

    label: Tensor
    polygon: Tensor
    classes: tuple[str, ...]
    of: Tensor
    xy_m: Tensor
    gsd_m: float


def burn(source: Any, place: Place, column: str, *, gsd_m: float, classes: Sequence[str] | None = None) -> Labels:
    """Labels of a file of polygons on the grid of ``place``; where polygons overlap, the smallest counts."""
    frame = vector.load_frame(source, place)
    burnt = vector.rasterize(frame, place, column, classes, gsd_m=gsd_m)
    names = burnt.raster.sensor.bands[0].classes or {}
    code = torch.where(burnt.raster.valid, burnt.raster.values, -1)[0, 0].long()
    of = torch.full((len(frame),), -1)
    seen = burnt.ids >= 0
    of[burnt.ids[seen]] = code[seen]
    centre = frame.geometry.centroid
    xy_m = torch.tensor([[p.x, p.y] for p in centre], dtype=torch.float64).reshape(-1, 2)
    return Labels(code, burnt.ids, tuple(names[i] for i in range(len(names))), of, xy_m, gsd_m)


def draws(
    labels: Labels, fraction: float, count: int, *, block_m: float, held_out: float = 0.4, seed: int = 0
) -> list[Draw]:
    """``count`` draws: blocks of ``block_m`` metres are held out for testing anew each time, and of the polygons of the other
    blocks a ``fraction`` of each class trains, at least one of each class that is there. A polygon lies in the block of its
    centre. Draws of several fractions with the same seed hold out the same blocks."""
    there = torch.nonzero(labels.of >= 0).flatten().numpy()
    found: list[Draw] = []
    for index in range(seed, seed + count):
        shares = {"train": 1 - held_out, "test": held_out}
        split = spatial_blocks(labels.xy_m[there].numpy(), block_m, shares, stream(index, "blocks"))
        train, test = there[split["train"]], there[split["test"]]
        kept = label_fraction(labels.of[train].numpy(), fraction, stream(index, "labels"))
        found.append((train[kept].tolist(), test.tolist()))
    return found


def extractors(gsd_m: float, *, seed: int = 0) -> dict[str, Extractor]:
    """The baselines without learned weights, fitted to what they are given where they need to look at it (never at labels)."""

    def convolutions(batch: Batch) -> Tensor:
        return RandomConvolutions(gsd_m, filters=64).fit(batch, torch.Generator().manual_seed(seed))(batch)

    return {"bands": Bands(gsd_m), "image statistics (90 m)": Statistics(gsd_m), "random convolutions": convolutions}


def token_m(encoder: Encoder) -> float:
    """Side of an encoder's tokens, metres."""
    settings: Any = getattr(encoder, "settings", None)
    if settings is None or not hasattr(settings, "token_m"):
        raise ValueError(
            f"a model of family {encoder.family!r} does not say how large its tokens are (settings.token_m)"
        )
    return float(settings.token_m)


def dense(encoder: Encoder, gsd_m: float, *, shifts: int = 1, chip_m: float | None = None) -> Dense:
    """Features of an encoder at ``gsd_m``; by default, chips are of the size that its position tables were learned on."""
    side = token_m(encoder)
    settings: Any = encoder.settings
    chip_m = chip_m or settings.chip_m
    return Dense(encoder, gsd_m, side, shifts, chip_m=chip_m, stride_m=chip_m)


def sampled(
    extract: Extractor, batch: Batch, labels: Labels, *, share: float = 1.0, seed: int = 0
) -> tuple[Samples, Scale]:
    """Features of the labelled pixels, or of a random ``share`` of them, and the mean and deviation of the features over
    random pixels of the whole place. An extractor with a method ``at`` is asked for these pixels alone."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.nonzero(labels.label >= 0).T
    picked = torch.rand(len(y), generator=generator) < share
    y, x = y[picked], x[picked]
    height, width = labels.label.shape
    anywhere = torch.randint(height * width, (SCALING,), generator=generator)
    rows, cols = torch.cat([y, anywhere // width]), torch.cat([x, anywhere % width])
    found = extract.at(batch, rows, cols) if hasattr(extract, "at") else extract(batch)[0][:, rows, cols].T
    ours, scale = found[: len(y)], Scale.of(found[len(y) :])
    keep = torch.isfinite(ours).all(1)
    label, polygon = labels.label[y, x][keep], labels.polygon[y, x][keep]
    return Samples(ours[keep].contiguous(), label, polygon, labels.classes), scale


def compare(
    encoders: Mapping[str, Encoder],
    batch: Batch,
    source: Any,
    column: str,
    *,
    fractions: Sequence[float] = (0.02, 0.1, 1.0),
    draws: int = 5,
    block_m: float = 1500.0,
    layers: Mapping[str, Sequence[str]] | None = None,
    baselines: bool = True,
    gsd_m: float | None = None,
    shifts: int = 1,
    how: str = "probe",
    share: float = 1.0,
    seed: int = 0,
    quiet: bool = False,
) -> Table:
    """Encoders beside baselines: pixel macro F1 on held-out blocks, by share of labelled polygons and by layers given.

    ``layers``: names of layers by title of the subset, an empty sequence for all.
    """
    gsd_m = gsd_m or min(layer.gsd_m for layer in batch.layers.values())  # type: ignore[union-attr]
    labels = burn(source, batch.places[0], column, gsd_m=gsd_m)
    results: dict[tuple[str, str], dict[float, Score]] = {}
    for subset, names in (layers or {"all": ()}).items():
        part = batch.only(*names) if names else batch
        found: dict[str, Extractor] = extractors(gsd_m, seed=seed) if baselines else {}
        found |= {name: dense(encoder, gsd_m, shifts=shifts) for name, encoder in encoders.items()}
        with Progress(f"Evaluating with {subset}", len(found), quiet=quiet) as bar:
            for name, extract in found.items():
                found_scores = scores(
                    extract, part, labels, fractions, draws, block_m=block_m, how=how, share=share, seed=seed
                )
                results[name, subset] = {f: e.score() for f, e in found_scores.items()}
                bar.advance(note=name)
    return table(results)


def scores(
    extract: Extractor,
    batch: Batch,
    labels: Labels,
    fractions: Sequence[float],
    count: int,
    *,
    block_m: float,
    how: str = "probe",
    share: float = 1.0,
    seed: int = 0,
) -> dict[float, Evaluation]:
    """One evaluation per fraction of labelled polygons; the features are computed once, of a random ``share`` of pixels."""
    samples, scale = sampled(extract, batch, labels, share=share)
    options = {"scale": scale, **(PROBE if how == "probe" else {})}

    every = {fraction: draws(labels, fraction, count, block_m=block_m, seed=seed) for fraction in fractions}

    def one(job: tuple[float, int]) -> Evaluation:
        fraction, index = job
        return evaluate(samples, [every[fraction][index]], how, seed=seed + index, **options)

    # Each fit uses one thread; the longest first.
    jobs = sorted(((fraction, index) for fraction in fractions for index in range(count)), reverse=True)
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(one, jobs), strict=True))
    return {f: joined([found[f, index] for index in range(count)]) for f in fractions}


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of single draws as one."""
    whole = Evaluation(parts[0].classes, parts[0].kind)
    for part in parts:
        for field in ("counts", "groups", "confidence", "correct", "fitted"):
            getattr(whole, field).extend(getattr(part, field))
    return whole


def table(
    results: Mapping[tuple[str, str], Mapping[float, Score]], title: str = "Macro F1 on held-out ground"
) -> Table:
    """One row per (features, layers), one column per fraction of labelled polygons."""
    rows = []
    for (name, subset), by_fraction in results.items():
        row: dict[str, Any] = {"features": name, "layers": subset}
        row |= {f"{fraction:.0%} of polygons": score for fraction, score in by_fraction.items()}
        rows.append(row)
    score = next(iter(next(iter(results.values())).values()))
    notes = (
        f"Macro F1 over pixels: {score.definition}.",
        f"Mean ± standard deviation over {score.draws} draws of held-out blocks and labelled polygons.",
    )
    return Table.of(title, rows, notes)


def probe_mapper(
    encoder: Encoder,
    scene: Batch | Any,
    source: Any,
    column: str,
    *,
    gsd_m: float | None = None,
    shifts: int = 1,
    seed: int = 0,
    whole_bytes: float = WHOLE_BYTES,
) -> Classified:
    """What maps classes with a probe fitted on all labelled polygons in ``scene``, a batch of one place or an opened scene; its
    probabilities are calibrated on polygons that were left out in turn. Of a scene of more than ``whole_bytes``, only windows
    with polygons are read, one at a time.

    Raises:
        ValueError: no polygon lies on a pixel of the scene.
    """
    gsd_m = gsd_m or min(layer.gsd_m for layer in scene.layers.values())  # type: ignore[union-attr]
    features, ground = dense(encoder, gsd_m, shifts=shifts), open_source(scene, gsd_m)
    if ground.bytes_per_m2 * math.prod(ground.shape) * gsd_m**2 <= whole_bytes or isinstance(scene, Batch):
        batch = scene if isinstance(scene, Batch) else scene.read()
        samples, scale = sampled(features, batch, burn(source, batch.places[0], column, gsd_m=gsd_m))
    else:
        samples = _sampled_by_windows(features, ground, source, column)
        scale = Scale.of(samples.x)
    if len(samples) == 0:
        raise ValueError(f"no polygon of {source} labels a pixel of the files: do they cover the same ground?")
    probe = fit_linear(
        samples.x, samples.label, samples.group, classes=samples.classes, seed=seed, scale=scale, **PROBE
    )
    return Classified(features, probe, gsd_m, align_m=features.align_m, halo_m=features.halo_m)


def _sampled_by_windows(features: Dense, ground: Source, source: Any, column: str) -> Samples:
    """Features of the labelled pixels of a place that is larger than memory."""
    frame = vector.load_frame(source).to_crs(ground.geobox.crs.to_wkt())
    found: list[Samples] = []
    for window in plan_of(features, ground, None, None, None, False).windows():
        top, bottom, left, right = window.core
        if not len(frame.sindex.query(ground.geobox[top:bottom, left:right].extent.geom, predicate="intersects")):
            continue
        batch = ground.read(*window.read)
        place = replace(batch.places[0], geobox=ground.geobox[slice(*window.read[:2]), slice(*window.read[2:])])
        labels = burn(frame, place, column, gsd_m=features.gsd_m)
        own = torch.zeros_like(labels.label, dtype=torch.bool)
        own[inside(window.core, window.read)] = True  # the neighbours sample their own pixels
        labels = replace(labels, label=torch.where(own, labels.label, -1))
        if (labels.label >= 0).any():
            some = sampled(features, batch, labels)[0]
            position = torch.tensor(
                vector.load_frame(frame, place).index.to_numpy()
            )  # burn counts those near the window
            found.append(replace(some, group=position[some.group]))
    if not found:
        return Samples(torch.zeros(0, 1), torch.zeros(0).long(), torch.zeros(0).long(), ())
    x, label, group = (torch.cat([getattr(one, name) for one in found]) for name in ("x", "label", "group"))
    return Samples(x, label, group, found[0].classes)


def task_mapper(encoder: Encoder, task: Task) -> Tasked:
    """What maps with a fine-tuned task, by squares of the size that its encoder was trained on.

    Raises:
        ContractError: the task answers questions, and makes no map.
    """
    if hasattr(task, "ask"):
        raise ContractError('this model answers questions and makes no map: everysat ask MODEL FILES "Is there water?"')
    side = token_m(encoder)
    gsd_m = float(task.config.get("gsd_m") or side)
    settings: Any = encoder.settings
    chip_m = settings.chip_m
    return Tasked(encoder, task, gsd_m, align_m=chip_m, halo_m=0.0, chip_m=chip_m)
