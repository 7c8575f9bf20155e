"""Every place of a dataset opened and looked at: what is missing, broken, implausible, repeated or leaks between its parts.

``check({"train": ..., "test": ...})`` gives a :class:`Report`. One place is in memory at a time (for each worker).
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from everysat.data import leakage
from everysat.data.batches import Dataset, prefetch
from everysat.find import suggest
from everysat.progress import track
from everysat.types import Batch, Raster

KINDS = {
    "missing": "a file is not there",
    "unreadable": "a file is truncated, or not of its format",
    "refused": "the reader cannot use the content: shapes, dates or codes are not what they should be",
    "shape": "a layer does not cover its place, or has other bands than in other places of its part",
    "range": "values outside of the plausible range of their band, by the sensor's table",
    "not finite": "NaN or infinity where values are said to be valid",
    "empty": "a layer in which nothing is valid",
    "label": "a code that is no class",
    "order": "observations that are not in the order of their dates",
    "repeated": "several observations of a layer on the same date",
    "duplicate": "the same pixels in two parts",
    "overlap": "places of two parts that share ground",
    "near": "places of two parts that are closer than asked for",
}
"""What is looked for."""
UNOPENED = ("missing", "unreadable", "refused")
"""Kinds of problems of places that cannot be read at all."""
SHOWN = 50
"""Problems of a kind that are listed; all are counted."""


@dataclass(frozen=True)
class Problem:
    """``kind`` of :data:`KINDS`, in place ``index`` of ``part``; ``layer`` where it is one of a layer."""

    kind: str
    part: str
    index: int
    message: str
    layer: str = ""


@dataclass
class Report:
    """What was found. ``counts`` has all problems by kind, ``problems`` at most :data:`SHOWN` of a kind; ``broken`` the numbers of
    all places that cannot be read, by part; ``notes`` what is unusual but no problem. ``allowed`` kinds do not spoil :attr:`good`."""

    places: dict[str, int]
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    broken: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    allowed: frozenset[str] = frozenset()

    @property
    def good(self) -> bool:
        """Whether there is no problem that is not allowed."""
        return not set(self.counts) - self.allowed

    def add(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= SHOWN:
            self.problems.append(problem)
        if problem.kind in UNOPENED:
            self.broken[problem.part].append(problem.index)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "good": self.good,
            "places": self.places,
            "counts": dict(self.counts),
            "allowed": sorted(self.allowed),
            "problems": [vars(problem) for problem in self.problems],
            "broken": dict(self.broken),
            "notes": self.notes,
        }

    def json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        """Lines of text: no table, since paths are to be copied."""
        lines = [f"{p.kind}: {p.part} {p.index}{f', {p.layer}' if p.layer else ''}: {p.message}" for p in self.problems]
        lines += ["", "Looked at " + ", ".join(f"{count} places of {part}" for part, count in self.places.items())]
        listed = Counter(p.kind for p in self.problems)
        for kind, count in self.counts.items():
            shown = f" ({listed[kind]} are listed)" if listed[kind] < count else ""
            lines.append(f"{count} {kind}{' (allowed)' if kind in self.allowed else ''}: {KINDS[kind]}{shown}")
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join([*lines, *([] if self.counts else ["No problems"])]).strip()


def check(
    parts: Mapping[str, Dataset],
    *,
    near_m: float = 0.0,
    outside: float = 0.001,
    together: Iterable[Iterable[str]] = (),
    allow: Iterable[str] = (),
    workers: int = 1,
    quiet: bool = True,
) -> Report:
    """Open every place of every part and report what is wrong with it, and between parts.

    Args:
        near_m: also report places of different parts with a gap of less than so many metres.
        outside: share of the values of a band of a place that may be out of the band's plausible range.
        together: names of parts that are used alike, such as several training sets, and are not compared with each other.
        allow: kinds of :data:`KINDS` that are reported but do not spoil ``good``.
        workers: threads that read.

    Raises:
        LookupError: a kind in ``allow`` is unknown. ValueError: ``near_m`` or ``outside`` cannot be.
    """
    for kind in allow:
        if kind not in KINDS:
            raise LookupError(f"allow={kind!r} is unknown. {suggest(kind, KINDS)}")
    if not (near_m >= 0 and 0 <= outside <= 1):
        raise ValueError(f"near_m={near_m} must not be negative (metres), outside={outside} is a share, 0-1")
    report = Report({name: len(part) for name, part in parts.items()}, allowed=frozenset(allow))
    every = ((name, index) for name, part in parts.items() for index in range(len(part)))
    looks = prefetch(lambda at: _look(parts[at[0]], *at, outside), every, workers=workers)
    memory = _Memory(list(parts), [list(names) for names in together])
    for look in track(looks, "Checking", sum(report.places.values()), quiet=quiet):
        memory.add(look)
        for problem in look.problems:
            report.add(problem)
    for problem in memory.between(near_m):
        report.add(problem)
    report.notes += memory.notes()
    return report


@dataclass
class _Look:
    """What is kept of a place after it was looked at."""

    part: str
    index: int
    problems: list[Problem] = field(default_factory=list)
    opened: bool = False
    outline: np.ndarray | None = None
    digests: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)

    def say(self, kind: str, layer: str, message: str) -> None:
        self.problems.append(Problem(kind, self.part, self.index, message, layer))


def _look(dataset: Dataset, part: str, index: int, outside: float) -> _Look:
    look = _Look(part, index)
    try:
        batch = dataset[index]
    except MemoryError:
        raise
    except FileNotFoundError as error:
        look.say("missing", "", str(error))
    except OSError as error:
        look.say("unreadable", "", str(error))
    except Exception as error:  # whatever a broken file makes a reader stumble over
        text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        look.say(
            "refused", "", text if isinstance(error, ValueError | LookupError) else f"{type(error).__name__}: {text}"
        )
    else:
        if len(batch) != 1:
            look.say("refused", "", f"the item is a batch of {len(batch)} places, expected one")
            return look
        look.opened, look.outline = True, leakage.corners(batch.places[0])
        for name in batch.layers:
            if isinstance(batch.layers[name], Raster):
                _look_at(look, name, batch.raster(name), batch, outside)
    return look


def _look_at(look: _Look, name: str, raster: Raster, batch: Batch, outside: float) -> None:
    """Problems of one layer of one place."""
    look.shapes[name] = (raster.sensor.name, raster.sensor.names, raster.gsd_m, tuple(raster.values.shape[2:]))
    for pixels, extent in zip(raster.values.shape[2:], (batch.height_m, batch.width_m), strict=True):
        if abs(pixels * raster.gsd_m - extent) > max(raster.gsd_m, 0.03 * extent):
            text = f"{pixels} pixels of {raster.gsd_m:g} m do not cover a place of {extent:g} m"
            look.say("shape", name, text)
    if not raster.valid.any():
        look.say("empty", name, f"none of {raster.valid.numel()} values is valid")
        return
    look.unseen[name] = int((~raster.valid.flatten(1).any(1)).sum())
    if not bool(torch.isfinite(raster.values).all()):
        bad = int((~torch.isfinite(raster.values) & raster.valid).sum())
        if bad:
            look.say("not finite", name, f"{bad} of {int(raster.valid.sum())} valid values are NaN or infinite")
    _values(look, name, raster, outside)
    _dates(look, name, raster)
    if name != "label":
        look.digests[name] = leakage.digest(raster)


def _values(look: _Look, name: str, raster: Raster, outside: float) -> None:
    for i, band in enumerate(raster.sensor.bands):
        if band.range is None and band.classes is None:
            continue
        values, seen = raster.values[:, i], raster.valid[:, i]
        if band.unit == "class" and band.classes is not None:
            codes = values[seen].unique()
            strange = [code for code in codes.tolist() if code not in band.classes]
            if strange:
                look.say("label", name, f"band {band.name} holds {strange[0]:g}, which is no class")
        elif band.range is not None:
            low, high = band.range
            slack = 1e-6 * (high - low)
            wrong = seen & ((values < low - slack) | (values > high + slack))
            count, total = int(wrong.sum()), int(seen.sum())
            if count > outside * total:
                worst = values[wrong]
                text = f"band {band.name}: {count} of {total} values, {worst.min():g} to {worst.max():g} {band.unit}"
                look.say("range", name, f"{text}, are outside of {low:g} to {high:g}")


def _dates(look: _Look, name: str, raster: Raster) -> None:
    time_s = raster.time_s[torch.isfinite(raster.time_s).all(1)]
    if len(time_s) < 2:
        return
    late = (time_s[1:, 0] < time_s[:-1, 0]).nonzero()
    if len(late):
        at = int(late[0])
        look.say("order", name, f"observation {at + 1}, {_day(time_s[at + 1, 0])}, follows {_day(time_s[at, 0])}")
    moments, times = time_s.unique(dim=0, return_counts=True)
    if (times > 1).any():
        twice = ", ".join(_day(start) for start in moments[times > 1][:3, 0])
        look.say("repeated", name, f"{int((times - 1).sum())} of {len(time_s)} observations, on {twice}")


def _day(seconds: torch.Tensor) -> str:
    return str(np.datetime64(int(seconds), "s"))[:10]


class _Hashes:
    """Of one layer: places by number, and the hash of each. Sixteen bytes a place, since datasets have millions."""

    def __init__(self) -> None:
        self._numbers, self._codes = array("q"), array("Q")

    def add(self, number: int, code: int) -> None:
        self._numbers.append(number)
        self._codes.append(code)

    def equal(self, part: np.ndarray) -> tuple[list[tuple[int, int]], int]:
        """See :func:`everysat.data.leakage.equal_pairs`; ``part`` is of all places."""
        numbers = np.array(self._numbers, dtype=np.int64)
        pairs, repeated = leakage.equal_pairs(np.array(self._codes, dtype=np.uint64), part[numbers])
        return [(int(numbers[a]), int(numbers[b])) for a, b in pairs], repeated


class _Memory:
    """Of all places: outlines, a hash of each layer, and what their layers look like."""

    def __init__(self, parts: list[str], together: list[list[str]]) -> None:
        self.parts = parts
        first = {name: names[0] for names in together for name in names}
        self.group = np.array([parts.index(first.get(name, name)) for name in parts], dtype=np.int64)
        self.part, self.index = array("q"), array("q")
        self.outlines, self.outlined = array("d"), array("q")
        self.hashes: dict[str, _Hashes] = defaultdict(_Hashes)
        self.shapes: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
        self.first: dict[tuple[str, str], tuple[Any, ...]] = {}
        self.example: dict[tuple[str, tuple[int, ...]], str] = {}
        self.unseen: Counter[str] = Counter()

    def add(self, look: _Look) -> None:
        """Remember a place; a layer with other bands than it had before is a problem of the place."""
        if not look.opened:
            return
        number = len(self.part)
        self.part.append(self.parts.index(look.part))
        self.index.append(look.index)
        if look.outline is not None:
            self.outlined.append(number)
            self.outlines.extend(look.outline.ravel().tolist())
        for name, code in look.digests.items():
            self.hashes[name].add(number, code)
        self.unseen.update(look.unseen)
        for name, shape in look.shapes.items():
            before = self.first.setdefault((look.part, name), shape)
            if shape[:2] != before[:2] or abs(shape[2] - before[2]) > 1e-3 * before[2]:
                text = f"bands {', '.join(shape[1])} of {shape[0]} at {shape[2]:g} m, in other places {', '.join(before[1])} "
                look.say("shape", name, f"{text}of {before[0]} at {before[2]:g} m")
            self.shapes[name][shape[3]] += 1
            self.example.setdefault((name, shape[3]), f"{look.part} {look.index}")

    def between(self, near_m: float) -> Iterator[Problem]:
        """Problems between parts."""
        part = self.group[np.array(self.part, dtype=np.int64)]
        same: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, hashes in self.hashes.items():
            for pair in hashes.equal(part)[0]:
                same[pair].append(name)
        for (a, b), names in same.items():
            yield self._pair("duplicate", b, a, "has the same pixels", ", ".join(names))
        numbers = np.array(self.outlined, dtype=np.int64)
        outlines = np.array(self.outlines).reshape(-1, 4, 2)
        for close in leakage.close_pairs(outlines, part[numbers], near_m):
            a, b = int(numbers[close.a]), int(numbers[close.b])
            if close.share > leakage.OVERLAP:
                yield self._pair("overlap", b, a, f"covers {100 * close.share:.0f} % of the same ground")
            else:
                yield self._pair("near", b, a, f"is {close.gap_m:.0f} m away")

    def _pair(self, kind: str, number: int, other: int, text: str, layer: str = "") -> Problem:
        """A problem of a place, with another one."""
        text = f"{self.parts[self.part[other]]} {self.index[other]} {text}"
        return Problem(kind, self.parts[self.part[number]], self.index[number], text, layer)

    def notes(self) -> list[str]:
        """What is unusual, but may be right."""
        notes, count = [], len(self.part)
        for name, shapes in self.shapes.items():
            if shapes.total() < count:
                notes.append(f"layer {name} is absent in {count - shapes.total()} of {count} places")
            if len(shapes) > 1:
                common = shapes.most_common(1)[0][0]
                odd = next(size for size in shapes if size != common)
                example = f"{odd[0]} x {odd[1]} pixels in {self.example[name, odd]}"
                notes.append(
                    f"layer {name} has places of {len(shapes)} sizes: mostly {common[0]} x {common[1]}, {example}"
                )
        notes += [f"layer {name}: {n} observations without any valid value" for name, n in self.unseen.items() if n]
        part = self.group[np.array(self.part, dtype=np.int64)]
        for name, hashes in self.hashes.items():
            repeated = hashes.equal(part)[1]
            if repeated:
                notes.append(f"layer {name}: {repeated} places repeat the pixels of another one of their part")
        unknown = count - len(self.outlined)
        if unknown and len(self.parts) > 1:
            notes.append(f"{unknown} of {count} places do not say where they are: overlaps of these are not seen")
        return notes
