"""Names of places in texts, and where they are: an exact index of names, candidates ranked by what else the text names.

:func:`everysat.collect.geonames.load` fills it. What a gazetteer of settlements does not hold (rivers, regions, buildings) is not found.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

EARTH_M = 6_371_008.8
LONGEST = 5
"""Words of a name."""
WITHIN_WEIGHT = 4.0
"""Logit of a candidate in a country or state that the text names. These weights were set by hand, not fitted."""
BEHIND_WEIGHT = 6.0
"""Of one whose country or state is named right behind it: "Paris, Texas"."""
NEAR_WEIGHT = 5.0
"""Of one that lies by other places of the text."""
POPULATION_WEIGHT = 0.6
"""Of each e-fold of population."""
WIDE = 3.0
"""Of countries and states, before towns that are called alike."""
SPELT = 0.7
"""Of a name that is spelt as in the text, accents included."""
OTHER_NAME = -1.5
"""Of a place that is also known by a name, but has another one."""
FAR_LETTERS = 400.0
"""Distance in the text over which what it says of countries and states loses its weight."""
NEAR_M = 300_000.0
"""Distance over which places of one text support each other."""
ROUNDS = 3
PART_POPULATION, BEGIN_POPULATION = 100_000, 20_000
"""People that a town needs so that its name counts as part of a longer run of capitalised words, or at the beginning of a sentence."""

Similarity = Callable[[str, np.ndarray], np.ndarray]
"""From the text and lonlat [n, 2] in degrees to n logits, such as those of a text and a location encoder."""

_WORD = re.compile(r"[^\W_]+(?:[.\-][^\W_]+|['’](?!s\b)[^\W_]+)*\.?", re.UNICODE)
_GAP = re.compile(r"\W+")
_SMALL_WORDS = "of de la le les el los las du des do da dos das di del della den der van von am an auf und upon on the sur in im al el and y es by bei"
_SMALL = frozenset(_SMALL_WORDS.split())
_COMMON_WORDS = """
a abbey about act adriatic aegean africa african after air airport all alliance alps also although amazon america
american among an and andes another antarctic any april arab arctic area army as asia asian at atlantic august autumn
baltic bank base basin bay be because been before best between big black blue both bridge british but by can canal
cape caspian castle cathedral catholic caucasus central century christ christian church circle city climate coast
college commonwealth company confederation congress constitution could council county court danube december democratic
desert did district do does during dutch each early earth east eastern economy empire english europe european even
every february federal federation few first five for force forest four french freshwater friday from front ganges
geography german get god grand great green gulf had half has have he her here high hill hills himalaya his history
hospital hotel house how however i if ile iles in independence indian international internet into is island islands
isles it its january july june just justice king kingdom lake land language languages large last late later law leader
liberation library like little lower mall many march market may me minister mission monday mont monument more most
mount mountain mountains much museum muslim must my national naval navy near new next nile no none north northern not
note november now ocean october of off old on one only or orange other our out over pacific palace park parliament
part party passage peace peninsula people per plain plains plateau point port portuguese president province public
queen red region republic rhine ridge river road royal sahara saint same saturday school sea second see senate
september several she shore should siberia since six small so some south southern spanish spring square stadium states
station strait street such summer sunday supreme temple territory than that the their them then there these they third
this those three through thursday to today tower town treaty tuesday two under union united university until up upon
upper us valley very vice village villages virgin volcano war was we wednesday well were west western what when where
which while white who why will winter with world would yes you your zone
"""
_NO_PLACE = frozenset(
    [*_COMMON_WORDS.split(), "middle east", "near east", "far east", "north sea", "north america", "south america"]
)
"""Capitalised for other reasons, most of all at the beginning of a sentence; alone they name no place."""
_TITLE_WORDS = "mr mrs ms dr sir lord lady president king queen prince princess general captain professor st pope minister senator judge"
_TITLES = frozenset(_TITLE_WORDS.split())
_FEATURE_WORDS = "lake lac lago mount mt monte river rio gulf sea ocean mountain mountains valley basin desert strait bay channel peninsula plateau"
_FEATURES = frozenset(_FEATURE_WORDS.split())
"""Right before or behind a name they make it that of something else: Lake Ontario, Niger River."""


@dataclass(frozen=True)
class Entry:
    """A place of the gazetteer. ``kind``: ``city``, ``region`` (a state) or ``country``; ``radius_m``: of its extent, by area or population; ``country`` and
    ``region``: codes of what it lies in."""

    name: str
    lonlat: tuple[float, float]
    country: str
    population: int
    kind: str
    radius_m: float
    identity: int
    region: str = ""


@dataclass(frozen=True)
class Candidate:
    """What a name may mean, and how probable that is."""

    entry: Entry
    probability: float


@dataclass(frozen=True)
class Toponym:
    """A name in a text at ``start`` to ``end``, with its candidates, the most probable first."""

    name: str
    start: int
    end: int
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Entry:
        return self.candidates[0].entry

    @property
    def lonlat(self) -> tuple[float, float]:
        """Of the most probable candidate, degrees."""
        return self.best.lonlat

    @property
    def radius_m(self) -> float:
        """How far from :attr:`lonlat` what is meant may lie: its own extent, and the root mean square distance of the candidates by their probability."""
        at = np.array([c.entry.lonlat for c in self.candidates])
        p = np.array([c.probability for c in self.candidates])
        spread = float((p * distance_m(at, np.array([self.lonlat]))[:, 0] ** 2).sum())
        return math.sqrt(self.best.radius_m**2 + spread)


def folded(name: str) -> str:
    """A name without accents, case and punctuation, by which it is found."""
    if not name.isascii():
        name = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return " ".join(_GAP.sub(" ", name.casefold().replace("'", "").replace("’", "")).split())


def unit(lonlat: np.ndarray) -> np.ndarray:
    """Degrees [n, 2] to points on the unit sphere [n, 3]."""
    lon, lat = np.radians(np.asarray(lonlat, float)).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


def distance_m(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Great-circle distances [n, m] between lonlat [n, 2] and [m, 2] in degrees."""
    chord = np.linalg.norm(unit(a)[:, None] - unit(b)[None], axis=-1)
    return 2 * EARTH_M * np.arcsin(np.clip(chord / 2, 0, 1))


_BEHIND = re.compile(r",\s*(?:in\s+)?|\s*\(|\s+in\s+")
"""What stands between a place and what it lies in."""


class Gazetteer:
    """Entries by any of their names.

    Args:
        entries: with the names that each is known by; the first is its own.
        known_words: words that name no place when they stand alone.
    """

    def __init__(self, entries: Iterable[tuple[Entry, Sequence[str]]], known_words: Iterable[str] = _NO_PLACE) -> None:
        self.entries: list[Entry] = []
        self._index: dict[str, list[int]] = defaultdict(list)
        self._no_place = frozenset(known_words)
        for entry, names in entries:
            self._add(entry, names)

    def _add(self, entry: Entry, names: Sequence[str]) -> None:
        number = len(self.entries)
        self.entries.append(entry)
        keys = {key for name in names if len(key := folded(name)) > 2 and key.count(" ") < LONGEST} | {
            folded(entry.name)
        }
        for key in keys:
            self._index[key].append(number)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: str) -> tuple[Entry, ...]:
        """All places that are called so in full, the most populous first; a name within another (Arles in Charlestown) does not count."""
        found = [self.entries[i] for i in self._index.get(folded(name), ())]
        return tuple(sorted(found, key=lambda entry: -entry.population))

    def geoparse(
        self,
        text: str,
        *,
        similarity: Sequence[Similarity] = (),
        entities: Callable[[str], Iterable[tuple[int, int]]] | None = None,
        most: int = 10,
        least_population: int = 0,
    ) -> tuple[Toponym, ...]:
        """The places that a text names.

        Names are the longest runs of capitalised words that the gazetteer holds. Their candidates are ranked by the country that the text names, by how near they are to
        the candidates of the other names, by population, and by ``similarity``.

        Args:
            text: in any language whose names are capitalised.
            similarity: see :data:`Similarity`; their logits are added.
            entities: a recogniser of named entities, spans of places in the text (:func:`spacy_places`): only names that touch one of them count.
            most: candidates of each name.
            least_population: of settlements that count, at a name that is not that of a country.
        """
        if most < 1:
            raise ValueError(f"most={most} must be at least 1")
        spans = None if entities is None else [tuple(span) for span in entities(text)]
        names = [
            name
            for name in self._names(text, least_population)
            if spans is None or any(a < name.end and name.start < b for a, b in spans)
        ]
        return tuple(
            Toponym(text[name.start : name.end], name.start, name.end, self._best(name, logits, most))
            for name, logits in zip(names, self._ranked(text, names, similarity), strict=True)
        )

    def _best(self, name: _Name, logits: np.ndarray, most: int) -> tuple[Candidate, ...]:
        p = _softmax(logits)
        order = np.argsort(-p, kind="stable")[:most]
        return tuple(Candidate(name.entries[i], float(p[i] / p[order].sum())) for i in order)

    def _names(self, text: str, least_population: int) -> list[_Name]:
        """Longest names from left to right, none within another."""
        words = [(m.start(), m.end(), m.group()) for m in _WORD.finditer(text)]
        lower = {folded(word) for _, _, word in words if word[:1].islower()}
        spans, i = [], 0
        while i < len(words):
            for n in range(min(LONGEST, len(words) - i), 0, -1):
                key = folded(" ".join(word for _, _, word in words[i : i + n]))
                alone = n > 1 or (len(key) > 2 and key not in lower)
                if key in self._index and key not in self._no_place and alone and _is_name(text, words, i, n):
                    spans.append((i, n, key))
                    i += n - 1
                    break
            i += 1
        taken = {k for i, n, _ in spans for k in range(i, i + n)}
        found = []
        for i, n, key in spans:
            least = max(least_population, _least_population(text, words, i, n, taken))
            entries = [
                e
                for e in (self.entries[number] for number in self._index[key])
                if e.kind != "city" or e.population >= least
            ]
            last = words[i + n - 1]
            end = last[1] - (last[2].endswith(".") and "." not in last[2][:-1])
            if n == 1 and _is_short_form(words[i][2]):
                entries = [e for e in entries if e.kind != "city"]
            elif n == 1 and len(key) <= 4:
                entries = [e for e in entries if e.kind != "city" or folded(e.name) == key]
            if entries:
                found.append(_Name(words[i][0], end, key, tuple(entries)))
        return found

    def _ranked(self, text: str, names: Sequence[_Name], similarity: Sequence[Similarity]) -> list[np.ndarray]:
        """Logits of the candidates of each name. Context is what is most probable without it, refined a few times."""
        base = [_prior(text, names, k) for k in range(len(names))]
        at = [np.array([entry.lonlat for entry in name.entries]) for name in names]
        for compare in similarity:
            base = [logits + np.asarray(compare(text, lonlat), float) for logits, lonlat in zip(base, at, strict=True)]
        logits = base
        for _ in range(ROUNDS):
            best = [int(np.argmax(each)) for each in logits]
            sure = [float(_softmax(each)[i]) for each, i in zip(logits, best, strict=True)]
            logits = [
                base[k] + NEAR_WEIGHT * _support(at[k], [
                    (at[j][best[j]], sure[j])
                    for j, other in enumerate(names)
                    if other.key != names[k].key and other.entries[best[j]].kind == "city"
                ])
                for k in range(len(names))
            ]  # fmt: skip
        return logits


@dataclass(frozen=True)
class _Name:
    """A name in a text: what it is found by, and all places that are called so."""

    start: int
    end: int
    key: str
    entries: tuple[Entry, ...]


_Word = tuple[int, int, str]
"""Start, end, and the word."""


def _is_name(text: str, words: Sequence[_Word], i: int, n: int) -> bool:
    """Whether ``n`` words from the ``i``-th can be one name: capitalised but for small ones within, with nothing but blanks and hyphens between,
    and neither that of a person nor of a lake or the like."""
    names = [word for _, _, word in words[i : i + n]]
    if not all(name[0].isupper() or (0 < k < n - 1 and name in _SMALL) for k, name in enumerate(names)):
        return False
    if not all(_are_joined(text, a, b) for a, b in itertools.pairwise(words[i : i + n])):
        return False
    before, after = words[i - 1] if i else None, words[i + n] if i + n < len(words) else None
    if before and folded(before[2]) in _TITLES and text[before[1] : words[i][0]].isspace():
        return False
    beside = [(before, words[i])] if before else []
    beside += [(words[i + n - 1], after)] if after else []
    others = [(a if b is words[i] else b)[2] for a, b in beside if _are_joined(text, a, b)]
    return not any(other[0].isupper() and folded(other) in _FEATURES for other in others)


def _are_joined(text: str, a: _Word, b: _Word) -> bool:
    """Whether words can belong to one name: not if a sentence, a line or a part of it ends between them."""
    gap = text[a[1] : b[0]]
    ends = a[2].endswith(".") and len(a[2]) > 3 and "." not in a[2][:-1]
    return gap.strip() in ("", "-") and "\n\n" not in gap and not ends


def _is_short_form(word: str) -> bool:
    """Such as ROK and NATO. Towns are listed by the codes of their airports too, but hardly meant by them."""
    return word.isupper() and len(word.replace(".", "")) <= 4


def _least_population(text: str, words: Sequence[_Word], i: int, n: int, taken: set[int]) -> int:
    """What a town needs to be meant: much where its name seems to be part of another one ("Pacific Ocean"), or may be capitalised for another reason."""
    before, after = i - 1, i + n
    if (
        before >= 0
        and before not in taken
        and words[before][2][0].isupper()
        and _are_joined(text, words[before], words[i])
    ):
        harmless = _begins(text, words[before]) and folded(words[before][2]) in _NO_PLACE
        return 0 if harmless else PART_POPULATION
    if (
        after < len(words)
        and after not in taken
        and words[after][2][0].isupper()
        and _are_joined(text, words[after - 1], words[after])
    ):
        return PART_POPULATION
    return BEGIN_POPULATION if n == 1 and _begins(text, words[i]) else 0


def _begins(text: str, word: _Word) -> bool:
    """Whether a sentence or a line begins with a word."""
    before = text[max(0, word[0] - 9) : word[0]].rstrip(" \t\"'(“„«")[-1:]
    return before in ("", "\n", ".", "!", "?", ":")


def _prior(text: str, names: Sequence[_Name], k: int) -> np.ndarray:
    """Logits by population, by the countries and states that the text names, and by whether a place has this name or is also known by it."""
    mine, next_ = names[k], names[k + 1] if k + 1 < len(names) else None
    behind = next_ is not None and bool(_BEHIND.fullmatch(text[mine.end : next_.start]))
    wide = [
        (each, math.exp(-max(name.start - mine.end, mine.start - name.end) / FAR_LETTERS), behind and name is next_)
        for name in names
        if name is not mine
        for each in name.entries
        if each.kind != "city"
    ]
    return np.array(
        [
            POPULATION_WEIGHT * math.log(entry.population + 500)
            + WITHIN_WEIGHT * max((closeness for each, closeness, _ in wide if _within(entry, each)), default=0.0)
            + BEHIND_WEIGHT * any(right_behind and _within(entry, each) for each, _, right_behind in wide)
            + WIDE * (entry.kind != "city")
            + SPELT * (entry.name == text[mine.start : mine.end])
            + OTHER_NAME * (folded(entry.name) != mine.key)
            for entry in mine.entries
        ]
    )


def _within(entry: Entry, wide: Entry) -> bool:
    """Whether a place lies in a country or state."""
    if wide.kind == "country":
        return entry.kind != "country" and entry.country == wide.country
    return entry.kind == "city" and (entry.country, entry.region) == (wide.country, wide.region)


def _support(at: np.ndarray, others: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """How near each candidate is to the places that other names mean, 0 to 1: the nearest counts, by how sure it is."""
    if not others:
        return np.zeros(len(at))
    nearness = np.exp(-distance_m(at, np.array([lonlat for lonlat, _ in others])) / NEAR_M)
    return (nearness * np.array([sure for _, sure in others])).max(1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def spacy_places(model: str = "en_core_web_sm") -> Callable[[str], list[tuple[int, int]]]:
    """Spans of geopolitical entities, locations and facilities by a model of spaCy, for ``entities`` of :meth:`Gazetteer.geoparse`.

    Raises:
        ImportError: spaCy or its model is not installed.
    """
    try:
        loaded = importlib.import_module("spacy").load(model, disable=["parser", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise ImportError(
            f"entities by spaCy need it and its model {model!r}: pip install spacy, then python -m spacy download {model}"
        ) from error
    return lambda text: [
        (e.start_char, e.end_char) for e in loaded(text).ents if e.label_ in ("GPE", "LOC", "FAC", "NORP", "ORG")
    ]
