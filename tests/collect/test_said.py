"""What lies in a place, sentences about it, questions and answers: against things whose number, area and neighbours are known."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import shapely
import torch
from shapely.geometry import LineString, Point, box

from everysat.collect import captions, questions
from everysat.collect.inventory import BY_NAME, KINDS, Inventory, kinds_of, sector, shares
from everysat.sensors import Band, Sensor
from everysat.types import ALWAYS, Place, Raster, Vector

PLACE = Place(1000.0, 1000.0)


def vector(*things):
    n = len(things)
    times = torch.tensor([ALWAYS] * n, dtype=torch.float64).reshape(n, 2)
    return Vector(tuple(g for g, _ in things), tuple(t for _, t in things), times, torch.zeros(n, dtype=torch.int64))


def inventory(*things, **more):
    return Inventory(PLACE, vector(*things), **more)


HOUSES = tuple((box(100 + 30 * i, 800, 120 + 30 * i, 820), {"building": "yes"}) for i in range(7))
TOWN = (
    (box(-500, -200, 600, 500), {"natural": "wood"}),
    (box(400, 300, 700, 500), {"landuse": "forest"}),
    (box(600, 0, 1200, 100), {"landuse": "farmland"}),
    (box(620, 120, 720, 220), {"natural": "water", "water": "pond"}),
    (LineString([(-50, 700), (1100, 710)]), {"waterway": "river"}),
    (LineString([(200, 600), (300, 600)]), {"highway": "track"}),
    (Point(900, 900), {"generator:source": "wind"}),
    (Point(1900, 900), {"generator:source": "wind"}),
    (box(500, 600, 560, 690), {"amenity": "parking"}),
    (LineString([(0, 300), (1000, 300)]), {"railway": "rail", "tunnel": "yes"}),
    (Point(10, 10), {"amenity": "bench"}),
    *HOUSES,
)


@pytest.fixture
def town():
    return inventory(*TOWN)


def test_numbers_areas_and_lengths(town):
    of = {kind.name: kind for kind in town.kinds}
    assert set(of) == {"forest", "farmland", "water", "pond", "car park", "building", "river", "track", "wind turbine"}
    assert town.count(of["building"]) == 7
    assert town.count(of["forest"]) == 1, "parts that touch are one"
    assert town.count(of["wind turbine"]) == 1, "the other one lies outside"
    # 600 x 500 within the place, and 100 x 200 of the second that the first does not cover.
    assert town.covered_m2(of["forest"]) == pytest.approx(300_000 + 20_000)
    assert town.share(of["farmland"]) == pytest.approx(0.04)
    assert town.length_m(of["river"]) == pytest.approx(1000, rel=1e-3)
    assert town.crosses(of["river"])
    assert not town.crosses(of["track"])
    assert town.distance_m(of["pond"], of["farmland"]) == pytest.approx(20)
    assert town.distance_m(of["pond"], BY_NAME["glacier"]) == np.inf
    assert town.sector(of["wind turbine"]) == "south-east"
    assert town.sector(of["river"]) == ""
    assert town.inside(of["pond"], of["water"]) == pytest.approx(1)
    assert town.main_cover[0].name == "forest"


def test_order_of_things_is_irrelevant():
    draw = np.random.default_rng(1)
    other = inventory(*[TOWN[i] for i in draw.permutation(len(TOWN))])
    one = inventory(*TOWN)
    assert captions.captions(one, seed=3, most=99) == captions.captions(other, seed=3, most=99)
    assert questions.ask(one, seed=3) == questions.ask(other, seed=3)


def test_what_lies_outside_or_cannot_be_seen_changes_nothing(town):
    more = (
        (box(1500, 0, 1600, 100), {"leisure": "park"}),
        (Point(5, 5), {"shop": "clothes"}),
        (box(0, 0, 9, 9), {"building": "no"}),
    )
    assert captions.captions(inventory(*TOWN, *more), seed=1, most=99) == captions.captions(town, seed=1, most=99)


def test_what_pixels_do_not_show_is_left_out():
    coarse = inventory(*TOWN, smallest_m=50)
    assert {"building", "wind turbine"} & {kind.name for kind in coarse.kinds} == set()
    assert {"forest", "river", "pond"} <= {kind.name for kind in coarse.kinds}


def test_tags_that_name_kinds():
    assert [k.name for k in kinds_of({"building": "church", "amenity": "place_of_worship"})] == [
        "place of worship",
        "building",
    ]
    assert [k.name for k in kinds_of({"highway": "primary"})] == ["main road", "road"]
    assert [k.name for k in kinds_of({"water": "lake"})] == ["water", "lake"]
    assert kinds_of({"railway": "rail", "tunnel": "yes"}) == ()
    assert kinds_of({"name": "x"}) == ()
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_several_places_are_refused():
    some = vector(*TOWN)
    with pytest.raises(ValueError, match="several places"):
        Inventory(PLACE, Vector(some.geometry, some.attributes, some.time_s, torch.arange(len(some.row))))


def test_broken_polygons_are_mended():
    bow = shapely.Polygon([(0, 0), (100, 100), (100, 0), (0, 100)])
    found = inventory((bow, {"natural": "wood"}))
    assert found.covered_m2(BY_NAME["forest"]) == pytest.approx(5000)


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [(0, 0, "centre"), (0.4, 0, "east"), (0, 0.4, "south"), (-0.4, -0.4, "north-west"), (0, -0.4, "north")],
)
def test_directions_count_y_from_the_north(x, y, name):
    assert sector(x, y) == name


# Captions


def test_sentences_tell_what_is_there_and_nothing_else(town):
    said = [c.text for c in captions.captions(town, seed=0, most=99)]
    text = " ".join(said).lower()
    for there in ("forest", "seven buildings", "pond", "river", "wind turbine", "car park", "about a third"):
        assert there in text, there
    text = text.replace("car park", "")
    for kind in KINDS:
        if kind not in town.kinds:
            assert not re.search(rf"\b{kind.name}\b", text), kind.name
    assert all(line[0].isupper() and line.endswith(".") and "{" not in line for line in said)
    assert len(set(said)) == len(said)
    assert re.search(r"[Aa] river (crosses|runs)|crossed by a river", text)
    assert re.search(r"farmland [a-z ]*about 5 %|about 5 % [a-z ]*farmland", text)
    assert re.search(r"[Aa] pond .*farmland|farmland .*a pond", text)


def test_a_seed_is_a_text_and_seeds_differ(town):
    assert captions.captions(town, seed="a") == captions.captions(town, seed="a")
    some = {tuple(c.text for c in captions.captions(town, seed=i)) for i in range(20)}
    assert len(some) > 15
    assert all(len(each) == 5 for each in some)


def test_every_template_makes_a_sentence(town):
    every = {c.text for i in range(60) for c in captions.captions(town, seed=i, most=99)}
    assert len(every) > 60
    for line in every:
        assert not re.search(r"\ba [aeio]|are (a|an|one) |  |are this|is (two|three|about \d+ [a-z]+s)\b", line), line


def test_sentences_carry_role_and_licence(town):
    some = captions.captions(town, seed=0, licence="CC0-1.0")
    assert {(c.role, c.licence, c.language) for c in some} == {("caption", "CC0-1.0", "en")}
    layer = captions.layer(some)
    assert layer.strings == tuple(c.text for c in some)
    assert set(layer.role) == {"caption"}
    assert captions.captions(some[0] and town, seed=0)[0].licence == "ODbL-1.0"
    with pytest.raises(ValueError, match="licence is empty"):
        captions.captions(town, seed=0, licence="")
    with pytest.raises(ValueError, match="most=0"):
        captions.captions(town, seed=0, most=0)


def test_nothing_known_nothing_said():
    empty = inventory()
    assert captions.captions(empty, seed=0) == ()
    assert questions.ask(empty, seed=0, kinds=("comparison", "rural_urban", "land_use")) == ()


@pytest.mark.parametrize(
    ("n", "words"), [(1, "one"), (12, "twelve"), (13, "13"), (57, "about 60"), (432, "about 450"), (1234, "about 1200")]
)
def test_numbers_in_words(n, words):
    assert captions.number_words(n) == words


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1, "almost all"),
        (0.9, "about nine tenths"),
        (0.5, "about half"),
        (0.34, "about a third"),
        (0.12, "about 10 %"),
        (0.04, "about 5 %"),
    ],
)
def test_shares_in_words(share, words):
    assert captions.share_words(share) == words


def class_map(codes, valid=None, classes=None):
    band = Band("cover", 10.0, "class", classes=classes or {1: "Water", 2: "Forest", 3: "Crops"})
    values = torch.tensor(codes, dtype=torch.float32)[None, None]
    return Raster.of(
        Sensor("cover", "classes", (band,), "made"), values, 10.0, valid=None if valid is None else valid[None, None]
    )


def test_class_maps_are_told_by_their_shares():
    codes = np.full((10, 10), 2)
    codes[:3, 7:] = 1
    valid = torch.ones(10, 10, dtype=torch.bool)
    valid[9] = False
    found = shares(class_map(codes, valid))
    assert found.names == ("Forest", "Water")
    assert found.share == pytest.approx((81 / 90, 9 / 90))
    assert found.sector == ("", "north-east")
    assert found.borders == (("Water", "Forest"),)
    text = " ".join(c.text for c in captions.class_captions(found, seed=0, most=99, licence="CC-BY-4.0"))
    assert "nine tenths" in text
    assert "north-east" in text
    assert "crops" not in text.lower()
    codes[9] = 3  # what is not valid has no effect
    assert shares(class_map(codes, valid)) == found


def test_class_maps_without_names_are_refused():
    with pytest.raises(ValueError, match=r"holds the codes \[7\], which have no name"):
        shares(class_map(np.full((2, 2), 7)))
    with pytest.raises(ValueError, match="no map of classes with names"):
        shares(
            Raster.of(Sensor("x", "optical", (Band("a", 10, "reflectance"),), "made"), torch.zeros(1, 1, 2, 2), 10.0)
        )


# Questions


def answers(things, **more):
    return {(q.kind, q.subject): q for i in range(40) for q in questions.ask(things, seed=i, each=8, **more)}


def test_answers_are_true(town):
    for (kind, subject), q in answers(town).items():
        assert q.answer in questions.ANSWERS[kind]
        assert q.text.endswith("?") or kind == "rural_urban"
        if kind == "presence" and "beside" not in subject:
            assert (q.answer == "yes") == (BY_NAME[subject] in town.kinds), q
        if kind == "count":
            assert q.number == (town.count(BY_NAME[subject]) if BY_NAME[subject] in town.kinds else 0)
        if kind == "area":
            assert q.number == pytest.approx(town.covered_m2(BY_NAME[subject]), abs=0.1)
            assert q.unit == "m2"
    every = answers(town)
    assert every["count", "building"].answer == "6-10"
    assert every["area", "forest"].answer == "25-50 %"
    assert every["presence", "farmland beside pond"].answer == "yes"
    beside = [(q.subject.split(" beside "), q.answer) for q in every.values() if " beside " in q.subject]
    assert {answer for _, answer in beside} == {"yes", "no"}
    for (a, b), answer in beside:
        assert (answer == "yes") == (town.distance_m(BY_NAME[a], BY_NAME[b]) <= 30)
    assert every["rural_urban", "rural or urban"].answer == "rural"


def test_comparisons_say_what_the_numbers_say(town):
    for i in range(60):
        for q in questions.ask(town, seed=i, kinds=("comparison",), each=8):
            names = sorted(
                (q.text.lower().find(n), k)
                for k in town.kinds
                for n in (k.name,)
                if n in q.text.lower() and k.name in q.subject
            )
            (_, a), (_, b) = names[:2]
            if q.subject.startswith("count"):
                holds = town.count(a) < town.count(b) if "fewer" in q.text else town.count(a) > town.count(b)
            else:
                holds = town.covered_m2(a) > town.covered_m2(b)
            assert (q.answer == "yes") == holds, q


def test_dense_and_mixed_places():
    dense = inventory(
        *((box(50 * i, 50 * j, 50 * i + 40, 50 * j + 40), {"building": "yes"}) for i in range(20) for j in range(20))
    )
    assert questions.ask(dense, seed=0, kinds=("rural_urban",))[0].answer == "urban"
    assert (
        questions.ask(inventory((box(0, 0, 300, 400), {"landuse": "residential"})), seed=0, kinds=("rural_urban",))
        == ()
    )
    field = inventory((box(0, 0, 1000, 900), {"landuse": "farmland"}))
    assert questions.ask(field, seed=0, kinds=("land_use",))[0].answer == "farmland"


def test_questions_are_as_often_yes_as_no_and_worded_in_many_ways(town):
    asked = [q for i in range(200) for q in questions.ask(town, seed=i)]
    for kind in ("presence", "comparison"):
        said = Counter(q.answer for q in asked if q.kind == kind)
        assert said["yes"] == said["no"]
    assert len({q.text for q in asked if q.kind == "count" and q.subject == "building"}) == len(
        questions.TEMPLATES["count"]
    )


def test_order_and_seed(town):
    assert questions.ask(town, seed=1) == questions.ask(town, seed=1) != questions.ask(town, seed=2)
    counts = [q for q in questions.ask(town, seed=1) if q.kind == "count"]
    assert counts == list(questions.ask(town, seed=1, kinds=("count",))), "one kind does not change another"


def region(n=60):
    """Places of which each has some of five kinds."""
    draw = np.random.default_rng(0)
    tags = (
        {"landuse": "forest"},
        {"building": "yes"},
        {"leisure": "park"},
        {"natural": "water"},
        {"amenity": "parking"},
    )
    return [
        inventory(
            *(
                (box(x, y, x + 90, y + 90), tags[k])
                for k in np.flatnonzero(draw.random(5) < 0.7)
                for x, y in draw.uniform(0, 900, (int(draw.integers(1, 9)), 2))
            )
        )
        for _ in range(n)
    ]


def test_balance_leaves_nothing_to_guess():
    places = region()
    words = questions.vocabulary(places)
    asked = [questions.ask(things, seed=i, vocabulary=words) for i, things in enumerate(places)]
    kept = questions.balanced(asked, seed=0)
    before, after = questions.guessed(asked), questions.guessed(kept)
    assert before["presence"] > 0.55
    assert after["presence"] == after["comparison"] == 0.5
    assert after["count"] <= before["count"]
    assert len(kept) == len(asked)
    assert all(set(a) <= set(b) for a, b in zip(kept, asked, strict=True))
    assert sum(map(len, kept)) > 0.25 * sum(map(len, asked))
    assert kept == questions.balanced(asked, seed=0)
    for (kind, _), said in by_subject(kept).items():
        assert len(said) > 1, "no question has one answer alone"
        if kind == "presence":
            assert said["yes"] == said["no"]


def by_subject(places):
    found = {}
    for q in (q for some in places for q in some):
        found.setdefault((q.kind, q.subject), Counter())[q.answer] += 1
    return found


def test_layers_of_questions(town):
    asked = questions.ask(town, seed=0)
    layers = questions.layers(asked)
    assert set(layers) == {"questions", "answers", "types"}
    assert layers["answers"].strings == tuple(q.answer for q in asked)
    assert set(layers["types"].role) == {"type"}


def test_mistakes(town):
    with pytest.raises(LookupError, match=r"kinds: 'presense' is unknown\. Did you mean presence"):
        questions.ask(town, seed=0, kinds=("presense",))
    with pytest.raises(ValueError, match="each=0"):
        questions.ask(town, seed=0, each=0)
