"""Parts of a dataset that may be compared honestly: spatial blocks, label fractions, official folds, and a check for leaks.

Neighbouring places look alike. Split at random, test places lie beside training places and scores are too good (Ploton et
al., Nature Communications 2020); whole blocks of ground are assigned to one part instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from everysat.nn.location import cartesian

Split = dict[str, np.ndarray]
"""Indices by part, such as ``{"train": ..., "val": ..., "test": ...}``, each sorted."""


def spatial_blocks(
    xy_m: np.ndarray, block_m: float, shares: Mapping[str, float], rng: np.random.Generator, *, buffer_m: float = 0.0
) -> Split:
    """Places assigned to parts by the square block of side ``block_m`` that their centre ``xy_m`` [place, 2] lies in.

    Args:
        xy_m: centres in a projected CRS, metres.
        shares: part of the blocks by name, such as ``{"train": 0.6, "test": 0.4}``; scaled to a sum of 1.
        rng: decides which block goes where.
        buffer_m: places of the first part within this distance of a place of another part are left out.

    Raises:
        ValueError: too few blocks to give every part one.
    """
    xy_m = np.asarray(xy_m, dtype=float).reshape(-1, 2)
    if not np.isfinite(xy_m).all():
        raise ValueError(f"xy_m has {int((~np.isfinite(xy_m)).any(1).sum())} places without a finite position")
    if not block_m > 0:
        raise ValueError(f"block_m={block_m} must be positive (metres)")
    _, block = np.unique(np.floor(xy_m / block_m).astype(np.int64), axis=0, return_inverse=True)
    block = block.ravel()
    count = int(block.max(initial=-1)) + 1
    names, fractions = list(shares), np.array(list(shares.values()), dtype=float)
    if count < len(names):
        raise ValueError(
            f"the places lie in {count} blocks of {block_m:g} m, too few for {len(names)} parts; lower block_m"
        )
    part_of_block = np.empty(count, dtype=np.int64)
    part_of_block[rng.permutation(count)] = np.repeat(np.arange(len(names)), _counts(fractions, count))
    split = {name: np.flatnonzero(part_of_block[block] == i) for i, name in enumerate(names)}
    if buffer_m > 0:
        split[names[0]] = _away(xy_m, split, names, buffer_m)
    return split


def label_fraction(
    labels: Sequence[Any] | np.ndarray, fraction: float, rng: np.random.Generator, *, least: int = 1
) -> np.ndarray:
    """Indices of a random ``fraction`` of each class, at least ``least`` of each (or all, where there are fewer); sorted.

    ``labels`` is one per sample: of a polygon to draw polygons, of a place to draw places.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1")
    _, code = np.unique(np.asarray(labels), return_inverse=True)
    chosen = []
    for members in (np.flatnonzero(code == c) for c in range(int(code.max(initial=-1)) + 1)):
        count = min(len(members), max(least, round(fraction * len(members))))
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def folds(fold: Sequence[Any] | np.ndarray, parts: Mapping[str, Sequence[Any]]) -> Split:
    """Places by official fold: ``folds(fold, {"train": [1, 2, 3], "val": [4], "test": [5]})``.

    Raises:
        ValueError: a fold is asked for twice or does not occur.
    """
    fold = np.asarray(fold)
    wanted = [f for chosen in parts.values() for f in chosen]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"a fold is in several parts: {dict(parts)}")
    missing = sorted(set(wanted) - set(fold.tolist()), key=str)
    if missing:
        raise ValueError(f"no place is in fold {missing[0]!r}; there are {', '.join(map(str, np.unique(fold)))}")
    return {name: np.flatnonzero(np.isin(fold, list(chosen))) for name, chosen in parts.items()}


def leaks(footprints: Sequence[Any], split: Split) -> list[tuple[str, int, str, int]]:
    """Pairs of places of different parts whose footprints share area: ``(part, index, other part, other index)``.

    ``footprints`` are shapely geometries, all in one CRS. Touching edges are no leak; the same index in two parts is one.
    """
    from shapely import STRtree, intersection

    names = list(split)
    index = np.concatenate([np.asarray(split[n], dtype=np.int64) for n in names])
    part = np.repeat(np.arange(len(names)), [len(split[n]) for n in names])
    shapes = np.array([footprints[i] for i in index], dtype=object)
    if not len(shapes):
        return []
    a, b = STRtree(shapes).query(shapes, predicate="intersects")
    across = part[a] < part[b]
    a, b = a[across], b[across]
    if not len(a):
        return []
    areas = np.array([g.area for g in intersection(shapes[a], shapes[b])])
    smaller = np.minimum([g.area for g in shapes[a]], [g.area for g in shapes[b]])
    found = areas > 1e-9 * smaller
    return [
        (names[part[i]], int(index[i]), names[part[j]], int(index[j])) for i, j in zip(a[found], b[found], strict=True)
    ]


def refuse_leaks(footprints: Sequence[Any], split: Split) -> None:
    """Raises :class:`ValueError` that names a pair of overlapping places of different parts, if there is one."""
    found = leaks(footprints, split)
    if found:
        part, i, other, j = found[0]
        raise ValueError(
            f"{len(found)} pairs of places overlap across parts, such as {part} {i} and {other} {j}: scores would be too "
            "good. Split by blocks (spatial_blocks) with a buffer_m of at least the size of a place"
        )


def unit_sphere_m(lonlat: np.ndarray) -> np.ndarray:
    """Points [n, 3] in metres whose distances are about those on the ground up to some 1000 km: the Earth as a ball of 6371 km."""
    points: np.ndarray = cartesian(torch.as_tensor(lonlat, dtype=torch.float64)).numpy()
    return 6.371e6 * points


def autocorrelation_range_m(
    x_m: np.ndarray, values: np.ndarray, rng: np.random.Generator, *, most: int = 2000
) -> float:
    """The distance from which on two places are as different as any two: where the empirical variogram (half the mean squared
    difference, Matheron 1963) first reaches 95 % of that of all pairs. Blocks of a split should be no smaller (Roberts et al., Ecography 2017).

    Args:
        x_m: positions [place, 2 or 3], metres. values: [place] or [place, value]; classes as one-hot vectors. most: places that are drawn for it.

    Returns:
        Upper end of the first bin that reaches it; 0 if all do, the largest distance if none does.
    """
    x_m, values = np.asarray(x_m, dtype=float), np.asarray(values, dtype=float).reshape(len(x_m), -1)
    if len(x_m) < 3:
        raise ValueError(f"x_m has {len(x_m)} places; a range needs three or more")
    some = np.sort(rng.permutation(len(x_m))[:most])
    a, b = np.triu_indices(len(some), 1)
    distance = np.linalg.norm(x_m[some][a] - x_m[some][b], axis=1)
    difference = 0.5 * ((values[some][a] - values[some][b]) ** 2).sum(1)
    order = np.argsort(distance, kind="stable")
    # Bins grow by half, so that short distances are told apart; the first has enough pairs for a mean.
    ends = [len(order)]
    while ends[-1] > 300:
        ends.append(int(ends[-1] / 1.5))
    parts = np.split(order, sorted(ends)[:-1])
    reached = [difference[part].mean() >= 0.95 * difference.mean() for part in parts]
    first = int(np.argmax(reached)) if any(reached) else len(parts) - 1
    return 0.0 if first == 0 else float(distance[parts[first - 1]].max())


def _counts(shares: np.ndarray, total: int) -> np.ndarray:
    """``total`` shared out by largest remainder, at least one to each."""
    if min(shares, default=0) <= 0:
        raise ValueError(f"shares={shares.tolist()} must be positive")
    exact = shares / shares.sum() * total
    counts = np.maximum(1, np.floor(exact).astype(np.int64))
    while counts.sum() < total:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts


def _away(xy_m: np.ndarray, split: Split, names: Sequence[str], buffer_m: float) -> np.ndarray:
    from shapely import STRtree, points

    mine, others = split[names[0]], np.concatenate([split[name] for name in names[1:]])
    near, _ = STRtree(points(xy_m[others])).query(points(xy_m[mine]), predicate="dwithin", distance=buffer_m)
    return np.delete(mine, np.unique(near))
