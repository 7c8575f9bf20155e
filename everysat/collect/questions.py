"""Questions about places and their answers, made from vector layers: presence, count, comparison, area, rural or urban, land use.

The types are those of RSVQA (Lobry et al. 2020, doi:10.1109/TGRS.2020.2988782). Its answers can be guessed from the question in many cases; here each subject is
asked about as often where it is as where it is not, and :func:`balanced` evens out the answers over many places. :func:`guessed` tells what is left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from everysat.collect.captions import filled, one_of
from everysat.collect.inventory import BY_NAME, COVERS, KINDS, NEAR_M, Inventory, Kind
from everysat.collect.osm import LICENCE
from everysat.find import suggest
from everysat.nn.draws import stream
from everysat.types import Text

YES_NO = ("yes", "no")
COUNTS = (
    (0, "0"),
    (1, "1"),
    (2, "2"),
    (5, "3-5"),
    (10, "6-10"),
    (20, "11-20"),
    (50, "21-50"),
    (100, "51-100"),
    (10**9, "more than 100"),
)
"""Largest number of each answer class, and its name."""
SHARES = (
    (0.0, "0 %"),
    (0.1, "up to 10 %"),
    (0.25, "10-25 %"),
    (0.5, "25-50 %"),
    (0.75, "50-75 %"),
    (1.01, "more than 75 %"),
)
ANSWERS: Mapping[str, tuple[str, ...]] = {
    "presence": YES_NO,
    "count": tuple(name for _, name in COUNTS),
    "comparison": YES_NO,
    "area": tuple(name for _, name in SHARES),
    "rural_urban": ("rural", "urban"),
    "land_use": tuple(kind.name for kind in COVERS),
}
"""All answers to each type of question."""
TEMPLATES = {
    "presence": ("Is there {thing}?", "Is {thing} visible?", "Can you see {thing} in the image?", "Does the image show {thing}?"),
    "beside": ("Is there {thing} next to {other}?", "Does {thing} lie beside {other}?", "Is {thing} near {other}?"),
    "count": ("How many {things} are there?", "What is the number of {things}?", "How many {things} can you count?"),
    "comparison": ("Are there more {things} than {others}?", "Does the image show more {things} than {others}?"),
    "fewer": ("Are there fewer {things} than {others}?", "Does the image show fewer {things} than {others}?"),
    "larger": ("Does {thing} cover more ground than {other}?", "Is the area of {thing} larger than that of {other}?"),
    "area": ("How much of the area is {thing}?", "What share of the ground does {thing} cover?"),
    "rural_urban": ("Is it a rural or an urban area?", "Is this place rural or urban?", "Rural or urban?"),
    "land_use": ("What is the main land cover?", "What covers most of the ground?", "Which land use dominates?"),
}  # fmt: skip
RURAL, URBAN = 0.05, 0.25
"""Share of ground that is built on: at most, at least; between them nobody is asked."""
DOMINANT = 0.4
"""Least share of what is called the main land cover."""


@dataclass(frozen=True)
class Question:
    """``kind``: of :data:`ANSWERS`; ``subject``: what it is about, the same whatever the wording; ``answer``: one of the classes; ``number`` and ``unit``: the
    exact answer of counts (``1``) and areas (``m2``)."""

    text: str
    answer: str
    kind: str
    subject: str
    number: float | None = None
    unit: str = ""
    licence: str = LICENCE


def layers(questions: Sequence[Question]) -> dict[str, Text]:
    """Questions about one place as the text layers ``questions``, ``answers`` and ``types``, as :mod:`everysat.data.rsvqa` has them."""
    rows = torch.zeros(len(questions), dtype=torch.int64)
    columns = {"questions": ("question", "text"), "answers": ("answer", "answer"), "types": ("type", "kind")}
    return {
        name: Text(tuple(getattr(q, field) for q in questions), (role,) * len(questions), rows)
        for name, (role, field) in columns.items()
    }


def ask(
    things: Inventory,
    *,
    seed: int | str,
    kinds: Sequence[str] = tuple(ANSWERS),
    each: int = 4,
    vocabulary: Sequence[Kind] = KINDS,
    licence: str = LICENCE,
) -> tuple[Question, ...]:
    """Questions about a place with answers from what is mapped in it; at most ``each`` of a kind, the same for the same ``seed``.

    ``vocabulary``: what may be asked about where it is not there; that of the region is best, so that "a glacier" is not always "no". What maps lack is
    taken to be absent.

    Raises:
        LookupError: a kind is unknown. ValueError: ``each`` is less than 1.
    """
    if each < 1:
        raise ValueError(f"each={each} must be at least 1")
    found: list[Question] = []
    for kind in kinds:
        if kind not in _MAKERS:
            raise LookupError(f"kinds: {kind!r} is unknown. {suggest(kind, _MAKERS)}")
        draw = stream("questions", str(seed), kind)
        found += _MAKERS[kind](things, draw, each, tuple(vocabulary))
    return tuple(Question(q.text, q.answer, q.kind, q.subject, q.number, q.unit, licence) for q in found)


def _shuffled(kinds: Sequence[Kind], draw: np.random.Generator) -> list[Kind]:
    return [kinds[i] for i in draw.permutation(len(kinds))]


def _worded(template: str, draw: np.random.Generator, **words: str) -> str:
    return filled(one_of(TEMPLATES[template], draw), **words)


def _presence(things: Inventory, draw: np.random.Generator, each: int, vocabulary: tuple[Kind, ...]) -> list[Question]:
    """As many that are there as are not, and two questions about neighbours."""
    there = _shuffled([kind for kind in things.kinds if kind in vocabulary], draw)
    absent = _shuffled([kind for kind in vocabulary if kind not in things.kinds], draw)
    made = _beside(things, there, draw) if each > 2 else []
    for yes, no in zip(there, absent, strict=False):
        made.append(Question(_worded("presence", draw, thing=yes.one), "yes", "presence", yes.name))
        made.append(Question(_worded("presence", draw, thing=no.one), "no", "presence", no.name))
    return made[:each]


def _beside(things: Inventory, there: Sequence[Kind], draw: np.random.Generator) -> list[Question]:
    """Two things that are next to each other, and two that are not; both are there, so that their presence does not give the answer away."""
    pairs = [(a, b) for a in there for b in there if a != b and not set(a.tags) & set(b.tags)]
    made = []
    for answer in YES_NO:
        fitting = [(a, b) for a, b in pairs if (things.distance_m(a, b) <= NEAR_M) == (answer == "yes")]
        if not fitting:
            return []
        a, b = fitting[int(draw.integers(len(fitting)))]
        subject = " beside ".join(sorted((a.name, b.name)))
        made.append(Question(_worded("beside", draw, thing=a.one, other=b.one), answer, "presence", subject))
    return made


def _class(number: float, classes: Sequence[tuple[float, str]]) -> str:
    return next(name for limit, name in classes if number <= limit)


def _countable(kinds: Sequence[Kind]) -> list[Kind]:
    return [kind for kind in kinds if not kind.mass and kind.shape != "line"]


def _count(things: Inventory, draw: np.random.Generator, each: int, vocabulary: tuple[Kind, ...]) -> list[Question]:
    """One of four is about what is not there."""
    there = _shuffled(_countable([kind for kind in things.kinds if kind in vocabulary]), draw)
    absent = _shuffled(_countable([kind for kind in vocabulary if kind not in things.kinds]), draw)
    chosen = [*there[: each - each // 4], *absent[: each // 4]]
    return [
        Question(_worded("count", draw, things=kind.many), _class(n, COUNTS), "count", kind.name, float(n), "1")
        for kind, n in ((kind, things.count(kind) if kind in things.kinds else 0) for kind in chosen)
    ]


def _comparison(
    things: Inventory, draw: np.random.Generator, each: int, vocabulary: tuple[Kind, ...]
) -> list[Question]:
    """Numbers of things, and ground of covers; the answer is drawn first, then the two, so that each is as frequent.

    The subject keeps the order of the two: nearly everywhere there are more buildings than lakes, so which of them comes first would tell the answer.
    """
    counts = {kind: float(things.count(kind)) for kind in _countable(things.kinds) if kind in vocabulary}
    areas = {kind: things.covered_m2(kind) for kind in things.kinds if kind.cover and kind.mass and kind in vocabulary}
    pairs = [("count", a, b) for a in counts for b in counts if counts[a] > counts[b]]
    pairs += [("area", a, b) for a in areas for b in areas if areas[a] > 1.2 * areas[b]]
    start = int(draw.integers(2))
    made: list[Question] = []
    for i in draw.permutation(len(pairs))[:each]:
        how, more, less = pairs[i]
        yes, turned = bool((start + len(made)) % 2), bool(draw.integers(2)) and how == "count"
        one, other = (more, less) if yes else (less, more)  # is there more of one than of the other?
        if how == "area":
            text = _worded("larger", draw, thing=one.name, other=other.name)
        elif turned:
            text = _worded("fewer", draw, things=other.many, others=one.many)
        else:
            text = _worded("comparison", draw, things=one.many, others=other.many)
        made.append(Question(text, YES_NO[not yes], "comparison", f"{how}: more {one.name} than {other.name}"))
    return made


def _area(things: Inventory, draw: np.random.Generator, each: int, vocabulary: tuple[Kind, ...]) -> list[Question]:
    covers = [kind for kind in COVERS if kind in vocabulary and kind.mass]
    there = _shuffled([kind for kind in covers if kind in things.kinds], draw)
    absent = _shuffled([kind for kind in covers if kind not in things.kinds], draw)
    chosen = [*there[: each - each // 4], *absent[: each // 4]]
    return [
        Question(
            _worded("area", draw, thing=kind.name),
            _class(m2 / things.area_m2, SHARES),
            "area",
            kind.name,
            round(m2, 1),
            "m2",
        )
        for kind, m2 in ((kind, things.covered_m2(kind)) for kind in chosen)
    ]


def _rural_urban(
    things: Inventory, draw: np.random.Generator, each: int, vocabulary: tuple[Kind, ...]
) -> list[Question]:
    if not things.kinds or RURAL < things.built < URBAN:
        return []
    answer = "urban" if things.built >= URBAN else "rural"
    return [Question(_worded("rural_urban", draw), answer, "rural_urban", "rural or urban")]


def _land_use(things: Inventory, draw: np.random.Generator, each: int, vocabulary: tuple[Kind, ...]) -> list[Question]:
    main = things.main_cover
    if main is None or main[1] < DOMINANT:
        return []
    return [Question(_worded("land_use", draw), main[0].name, "land_use", "main land cover", main[1], "1")]


_MAKERS = {
    "presence": _presence, "count": _count, "comparison": _comparison, "area": _area, "rural_urban": _rural_urban, "land_use": _land_use,
}  # fmt: skip


def balanced(
    places: Sequence[Sequence[Question]], *, seed: int | str, most: float = 2.0
) -> tuple[tuple[Question, ...], ...]:
    """The questions of many places, less those whose answer could be guessed from the question.

    For every subject of yes and no (is there a pond?) both answers stay equally often, so one that is always answered alike goes; for those of more answers none
    stays more than ``most`` times as often as the mean of the others. Which go is drawn by ``seed``.
    """
    rows = [(p, i) for p, some in enumerate(places) for i in range(len(some))]
    draw = stream("balanced", str(seed))
    groups: dict[tuple[str, str], dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for index in draw.permutation(len(rows)):
        p, i = rows[index]
        question = places[p][i]
        groups[question.kind, question.subject][question.answer].append((p, i))
    kept: set[tuple[int, int]] = set()
    for (kind, _), by_answer in groups.items():
        limit = _limit(kind, [len(by_answer[answer]) for answer in by_answer], most)
        kept |= {row for some in by_answer.values() for row in some[:limit]}
    return tuple(tuple(q for i, q in enumerate(some) if (p, i) in kept) for p, some in enumerate(places))


def _limit(kind: str, counts: Sequence[int], most: float) -> int:
    """How many of one answer may stay."""
    if len(counts) < 2:
        return 0
    if len(ANSWERS[kind]) == 2:
        return min(counts)
    largest = max(counts)
    others = sorted(counts)[:-1]
    return min(largest, max(1, int(most * sum(others) / len(others))))


def guessed(places: Sequence[Sequence[Question]]) -> dict[str, float]:
    """Share of the answers to each type that one gets right who knows the most frequent answer for every subject, and sees nothing: the floor that a model has to
    leave behind. It is fitted and tested on the same questions, so it flatters itself where a subject is asked about only a few times."""
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in (q for some in places for q in some):
        answers[question.kind, question.subject][question.answer] += 1
    right: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for (kind, _), counts in answers.items():
        right[kind] += max(counts.values())
        whole[kind] += sum(counts.values())
    return {kind: right[kind] / whole[kind] for kind in whole}


def vocabulary(inventories: Sequence[Inventory], least: int = 2) -> tuple[Kind, ...]:
    """Kinds that at least ``least`` places have: what is worth asking about in a region."""
    seen = Counter(kind.name for things in inventories for kind in things.kinds)
    return tuple(BY_NAME[name] for name in BY_NAME if seen[name] >= least)
