"""Words and vectors beside the pixels of a dataset, and texts as places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_polite import article

from everysat.collect import articles, osm, records, witnesses
from everysat.data import berlin
from everysat.data.batches import Dataset
from everysat.data.catalogue import dataset
from everysat.types import Batch, Place, Text, Vector


@pytest.fixture(scope="module")
def options():
    """One band of the real scene: all of them take seconds to unpack."""
    try:
        red = next(path for path in berlin.files() if "B04" in path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return {"files": [red], "sensor": "sentinel-2-l1c", "tile_m": 1200.0, "names": {"sentinel-2-l1c-10m": "s2"}}


def tiles(options, **more):
    return witnesses.build("berlin", base="scene", options=options, **more)


@pytest.fixture(scope="module")
def berlin_tiles(options):
    return tiles(options)


def test_a_scene_with_words_and_vectors(berlin_tiles):
    assert isinstance(berlin_tiles, Dataset)
    items = [berlin_tiles[i] for i in range(6)]
    batch = Batch.cat(items)
    assert {"s2", "osm", "captions", "questions", "answers", "types"} <= set(batch.layers)
    things, said = batch.layers["osm"], batch.layers["captions"]
    assert isinstance(things, Vector)
    assert isinstance(said, Text)
    assert all({"landuse", "natural", "water", "leisure"} & tags.keys() for tags in things.attributes)
    assert len(batch.layers["questions"].strings) == len(batch.layers["answers"].strings)
    assert berlin_tiles[2].layers["captions"].strings == items[2].layers["captions"].strings
    for item in items:  # what is said to be there is there
        if "captions" in item.layers:
            names = {kind.name for kind in witnesses.Inventory(item.places[0], item.layers["osm"]).kinds}
            words = " ".join(item.layers["captions"].strings).lower()
            assert all(name in names for name in ("forest", "wetland", "scrub") if name in words)


def test_other_words_by_another_seed_the_same_pixels(berlin_tiles, options):
    other = tiles(options, seed=5)
    some = [i for i in range(8) if "captions" in other[i].layers]
    assert any(other[i].layers["captions"].strings != berlin_tiles[i].layers["captions"].strings for i in some)
    assert other[some[0]].raster("s2").values.equal(berlin_tiles[some[0]].raster("s2").values)


def test_the_name_in_a_recipe(options):
    data = dataset("everysat.collect.witnesses/berlin", base="scene", options=options, modalities=["osm"])
    assert set(data[2].layers) == {"s2", "osm"}


def test_layers_are_chosen_and_articles_lie_in_their_place(berlin_tiles, options, tmp_path):
    lon, lat = berlin_tiles[3].places[0].lonlat
    near = records.Article(
        "Mill", (lon, lat), (("", "A mill."), ("Use", "Flour.")), "en", "CC-BY-SA-4.0", "https://example.org"
    )
    far = records.Article("Far", (lon + 1, lat), (("", "Elsewhere."),), "en", "CC-BY-SA-4.0", "https://example.org")
    records.save([near, far], tmp_path / "a.jsonl")
    chosen = tiles(options, articles=tmp_path / "a.jsonl", modalities=["articles"])
    assert set(chosen[3].layers) == {"s2", "articles"}
    assert chosen[3].layers["articles"].strings == ("Mill. A mill.", "Mill. Use: Flour.")
    assert set(chosen[0].layers) == {"s2"}


def test_mistakes():
    with pytest.raises(LookupError, match="has no variant 'berln'"):
        witnesses.build("berln")
    with pytest.raises(ValueError, match=r"base .* and features .* are needed"):
        witnesses.build()
    with pytest.raises(LookupError, match=r"options of the base scene do not fit: .*files"):
        witnesses.build(base="scene", articles="a.jsonl", options={"tile_m": 10.0})
    with pytest.raises(LookupError, match="modalities='caption' is unknown"):
        witnesses.build(base="synthetic", features="x.parquet", modalities=["caption"])


def test_a_place_without_georeference_is_refused(tmp_path):
    pytest.importorskip("osmium")
    from test_osm import TOWN

    (tmp_path / "town.osm").write_text(TOWN)
    plain = witnesses.Witnesses(
        [Batch((Place(10.0, 10.0),))], osm.read(tmp_path / "town.osm"), (), witnesses.LAYERS, 5, 4, None, "x", 0
    )
    with pytest.raises(ValueError, match="place 0 of the base has no georeference"):
        plain[0]


@pytest.fixture
def texts(tmp_path):
    draw = np.random.default_rng(0)
    some = [
        records.Article(
            f"T{i}",
            (float(lon), float(lat)),
            (("", f"Text {i}."), ("Climate", "wet")),
            "en",
            "x",
            "y",
            radius_m=None if i % 2 else 7000.0,
        )
        for i, (lon, lat) in enumerate(draw.uniform((-170, -60), (170, 70), (90, 2)))
    ]
    records.save([*some, article()], tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


def test_texts_as_places(texts):
    data = articles.build(root=texts)
    assert isinstance(data, Dataset)
    assert len(data) == 91
    assert (data[0].places[0].width_m, data[1].places[0].width_m) == (14_000.0, 2000.0)
    assert data[0].layers["articles"].strings == ("T0. Text 0.", "T0. Climate: wet")
    assert data[0].places[0].lonlat == records.load(texts)[0].lonlat
    both = Batch.cat([data[0], data[1]])
    assert both.layers["articles"].row.equal(torch.tensor([0, 0, 1, 1]))


def test_parts_share_no_block(texts):
    parts = {split: articles.build(root=texts, split=split) for split in articles.SPLITS}
    blocks = {split: {tuple(int(v // 10) for v in a.lonlat) for a in data.articles} for split, data in parts.items()}
    assert sum(len(data) for data in parts.values()) == 91
    assert all(blocks.values())
    assert sum(map(len, blocks.values())) == len(set.union(*blocks.values()))


def test_headings_and_mistakes_of_texts(texts):
    data = articles.build(root=texts, headings=["Climate"])
    assert len(data) == 90
    assert data[0].layers["articles"].strings == ("T0. Climate: wet",)
    with pytest.raises(ValueError, match="has no text"):
        articles.build(root=texts, headings=["Nothing"])
    with pytest.raises(LookupError, match=r"split='tets' is unknown. Did you mean test"):
        articles.build(root=texts, split="tets")
