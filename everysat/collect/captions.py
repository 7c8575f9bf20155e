"""Sentences by rule about what lies in a place: counts, shares of the ground, positions and neighbours, varied but always the same for the same seed.

Only what a picture can show is spoken of (see :mod:`everysat.collect.inventory`), after SkyScript (Wang et al. 2024, doi:10.1609/aaai.v38i6.28393). Sentences
that come from OpenStreetMap are under its licence, ODbL.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from everysat.collect.inventory import NEAR_M, Inventory, Kind, Shares
from everysat.collect.osm import LICENCE
from everysat.nn.draws import stream
from everysat.types import Text

ROLE = "caption"
LEAST_SHARE = 0.03
"""Ground that covers less is not spoken of."""
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SCENES = ("An aerial view of", "A satellite image of", "An image from above of", "A view from above of", "A picture of")
COUNTS = (
    "There are {things} in this area.",
    "{Things} can be seen.",
    "The image shows {things}.",
    "This place has {things}.",
)
COVERS = (
    "{Cover} covers {share} of the area.", "{Share} of the ground is {cover}.", "The area is {share} {cover}.",
    "{Cover} takes up {share} of the image.",
)  # fmt: skip
PLURAL_COVER = "{Cover} cover {share} of the area."
PLACES = (
    "There is {thing} in the {sector}.",
    "{Thing} lies in the {sector} of the area.",
    "In the {sector} there is {thing}.",
)
CENTRES = ("There is {thing} in the centre.", "{Thing} lies in the middle of the area.")
NEIGHBOURS = ("{Thing} lies next to {other}.", "{Thing} beside {other}.", "There is {thing} near {other}.")
INSIDE = ("{Thing} lies within {other}.", "There is {thing} in {other}.")
CROSSINGS = ("{Thing} crosses the area.", "{Thing} runs through the area.", "The area is crossed by {thing}.")
MIXES = ("{Scene} {first} with {second}.", "{Scene} {first} and {second}.")
BORDERS = ("{One} borders on {other}.", "{One} lies beside {other}.", "There is a border between {one} and {other}.")


@dataclass(frozen=True)
class Caption:
    """A sentence with its ``role``, licence and language."""

    text: str
    role: str = ROLE
    licence: str = LICENCE
    language: str = "en"


def layer(captions: Sequence[Caption]) -> Text:
    """Captions of one place as a text layer."""
    texts = tuple(caption.text for caption in captions)
    return Text(texts, tuple(caption.role for caption in captions), torch.zeros(len(texts), dtype=torch.int64))


def captions(things: Inventory, *, seed: int | str, most: int = 5, licence: str = LICENCE) -> tuple[Caption, ...]:
    """At most ``most`` different sentences about a place; none if nothing that can be seen is known of it.

    ``seed`` stands for the place and the draw: the same seed gives the same sentences. What is rare and what is large is told first.
    """
    draw = stream("captions", str(seed))
    facts = [
        *_scene(things, draw),
        *_covers(things, draw),
        *_lines(things, draw),
        *_counts(things, draw),
        *_places(things, draw),
        *_neighbours(things, draw),
    ]
    return _chosen(facts, draw, most, licence)


def class_captions(found: Shares, *, seed: int | str, most: int = 5, licence: str) -> tuple[Caption, ...]:
    """Sentences about a map of classes (:func:`everysat.collect.inventory.shares`); ``licence``: of that map."""
    draw = stream("class captions", str(seed))
    rows = [row for row in zip(found.names, found.share, found.sector, strict=True) if row[1] >= LEAST_SHARE]
    facts = [filled(one_of(COVERS, draw), cover=name.lower(), share=share_words(share)) for name, share, _ in rows]
    facts += [
        filled(one_of(CENTRES if where == "centre" else PLACES, draw), thing=name.lower(), sector=where)
        for name, _, where in rows
        if where
    ]
    large = {name for name, _, _ in rows}
    facts += [
        filled(one_of(BORDERS, draw), one=a.lower(), other=b.lower()) for a, b in found.borders[:3] if {a, b} <= large
    ]
    return _chosen(facts, draw, most, licence)


def _chosen(facts: Iterable[str], draw: np.random.Generator, most: int, licence: str) -> tuple[Caption, ...]:
    """The first sentence, and others by chance, each once."""
    if most < 1:
        raise ValueError(f"most={most} must be at least 1")
    if not licence:
        raise ValueError("licence is empty; say under which terms the sentences may be used")
    every = list(dict.fromkeys(facts))
    picked = [0, *sorted(1 + draw.permutation(len(every) - 1)[: most - 1])] if every else []
    return tuple(Caption(every[i], licence=licence) for i in picked)


def one_of(templates: Sequence[str], draw: np.random.Generator) -> str:
    """A template by chance."""
    return templates[int(draw.integers(len(templates)))]


def filled(template: str, **words: str) -> str:
    """``{thing}`` as it is, ``{Thing}`` at the beginning of a sentence."""
    return template.format(**words, **{name.capitalize(): word[:1].upper() + word[1:] for name, word in words.items()})


def number_words(count: int) -> str:
    """In words up to twelve, exact up to thirty, then rounded."""
    if count < len(_WORDS):
        return _WORDS[count]
    if count <= 30:
        return str(count)
    step = 10 if count < 200 else 50 if count < 1000 else 100
    return f"about {round(count / step) * step}"


SHARES = (
    (0.97, "almost all"), (0.83, "about nine tenths"), (0.72, "about three quarters"), (0.62, "about two thirds"), (0.45, "about half"),
    (0.38, "about two fifths"), (0.3, "about a third"), (0.22, "about a quarter"),
)  # fmt: skip


def share_words(share: float) -> str:
    """A share of the ground in words."""
    for limit, words in SHARES:
        if share >= limit:
            return words
    return f"about {max(5, round(share * 20) * 5)} %"


def things_words(kind: Kind, count: int) -> str:
    """Things with their number; lines are not counted, for maps cut them into pieces."""
    if kind.mass:
        return kind.name
    if kind.shape == "line":
        return kind.one if count == 1 else kind.many
    return kind.one if count == 1 else f"{number_words(count)} {kind.many}"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _scene(things: Inventory, draw: np.random.Generator) -> list[str]:
    """What it is on the whole: the largest cover, and the most telling thing."""
    cover = things.main_cover
    rare = [kind for kind in _telling(things) if cover is None or kind.name != cover[0].name]
    if cover is not None and cover[1] >= 0.3:
        words = [cover[0].name, *(things_words(kind, things.count(kind)) for kind in rare[:1])]
    else:
        words = [things_words(kind, things.count(kind)) for kind in rare[:2]]
    if not words:
        return []
    scene = one_of(SCENES, draw)
    return [
        filled(one_of(MIXES, draw), scene=scene, first=words[0], second=words[1])
        if len(words) > 1
        else f"{scene} {words[0]}."
    ]


def _notable(things: Inventory) -> list[Kind]:
    """What is there and not just a rest at the edge."""
    return [kind for kind in things.kinds if not kind.cover or things.share(kind) >= LEAST_SHARE]


def _telling(things: Inventory) -> list[Kind]:
    """What distinguishes the place, first: single landmarks before what there is everywhere."""
    common = {"building", "road", "main road", "track", "car park", "grassland", "water", "stream"}
    return sorted(_notable(things), key=lambda kind: (kind.name in common, kind.cover, things.count(kind)))


def _covers(things: Inventory, draw: np.random.Generator) -> list[str]:
    shares = [(kind, things.share(kind)) for kind in things.kinds if kind.cover]
    return [
        filled(
            one_of(COVERS, draw) if kind.mass else PLURAL_COVER,
            cover=kind.name if kind.mass else kind.many,
            share=share_words(share),
        )
        for kind, share in shares
        if share >= LEAST_SHARE
    ]


def _counts(things: Inventory, draw: np.random.Generator) -> list[str]:
    countable = [kind for kind in _telling(things) if not kind.mass and kind.shape != "line"]
    said = [things_words(kind, things.count(kind)) for kind in countable]
    facts = [
        filled(_singular(one_of(COUNTS, draw), kind, things), things=words)
        for kind, words in zip(countable, said, strict=True)
    ]
    return [*facts, filled("The image shows {things}.", things=_list(said[:3]))] if len(said) > 1 else facts


def _singular(template: str, kind: Kind, things: Inventory) -> str:
    return template.replace("There are", "There is") if things.count(kind) == 1 else template


def _places(things: Inventory, draw: np.random.Generator) -> list[str]:
    facts = []
    for kind in _notable(things):
        if (kind.mass or things.count(kind) == 1) and (where := things.sector(kind)):
            facts.append(filled(one_of(CENTRES if where == "centre" else PLACES, draw), thing=kind.one, sector=where))
    return facts


def _lines(things: Inventory, draw: np.random.Generator) -> list[str]:
    lines = [kind for kind in things.kinds if kind.shape == "line" and things.crosses(kind)]
    return [filled(one_of(CROSSINGS, draw), thing=kind.one) for kind in lines]


def _neighbours(things: Inventory, draw: np.random.Generator) -> list[str]:
    """Pairs that are next to or within each other; what is beside everything (roads, buildings) is not told."""
    dull = {"building", "road", "main road", "grassland", "scrub"}
    kinds = [kind for kind in _telling(things) if kind.name not in dull][:8]
    facts = []
    for a, b in itertools.combinations(kinds, 2):
        if set(a.tags) & set(b.tags) or things.distance_m(a, b) > NEAR_M:
            continue
        small, large = sorted((a, b), key=things.covered_m2)
        within = things.inside(small, large)
        if within < 0.5:
            facts.append(filled(one_of(NEIGHBOURS, draw), thing=_some(a, things), other=b.one))
        elif {small.name, large.name} & {"water"} == set():
            facts.append(filled(one_of(INSIDE, draw), thing=_some(small, things), other=large.one))
    return facts


def _some(kind: Kind, things: Inventory) -> str:
    return kind.one if kind.mass or things.count(kind) == 1 else f"one of the {kind.many}"
