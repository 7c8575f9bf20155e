"""Whether the edges of windows show in a map."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from everysat.mapping.parts import Parts
from everysat.mapping.windows import Box, Plan

EDGES, CHANNELS = 2000, 16
"""Edges and channels that are looked at, evenly chosen from more."""


def seam(parts: Parts) -> float | None:
    """Mean absolute difference of neighbouring pixels across the edges of windows, over that of neighbours inside windows: 1
    where no seam shows. None for a single window.

    The pairs inside lie one alignment step to both sides of the same edge, so that the ground is nearly the same, and a map whose tokens
    show as squares is compared at the edges of tokens.
    """
    plan, total, count = parts.plan, np.zeros(2), np.zeros(2)
    edges = list(_edges(plan))
    every = slice(None, None, -(-parts.channels // CHANNELS))
    for box, axis, step in edges[:: -(-len(edges) // EDGES) or 1]:
        image = parts.read(box, every).astype(np.float64)
        differences = np.abs(np.diff(image, axis=axis))
        middle = differences.shape[axis] // 2
        for kind, at in ((0, (middle,)), (1, (middle - step, middle + step))):
            for index in at:
                some = np.take(differences, index, axis=axis)
                total[kind] += np.nansum(some)
                count[kind] += np.isfinite(some).sum()
    across, within = np.divide(total, count, out=np.full(2, math.nan), where=count > 0)
    if not within > 0:
        return None if not across > 0 else math.inf
    return float(across / within)


def _edges(plan: Plan) -> Iterator[tuple[Box, int, int]]:
    """Strips around the eastern and the southern edges of windows that have another window behind, the axis [channel, y, x] that
    crosses them, and the distance of the pairs inside."""
    step = plan.step if plan.step < plan.window else max(1, plan.window // 2)
    for window in plan.windows():
        top, bottom, left, right = window.core
        if right + step < plan.shape[1]:
            yield (top, bottom, right - 1 - step, right + 1 + step), 2, step
        if bottom + step < plan.shape[0]:
            yield (bottom - 1 - step, bottom + 1 + step, left, right), 1, step
