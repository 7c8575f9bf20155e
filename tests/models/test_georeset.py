"""GEO-ReSeT: what sentences, shapes and positions say beside images; the laws of layers of all models are in test_laws."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from layered_encoder import NAMES, LayeredEncoder, layered_batch
from shapely.geometry import LineString, Point, box

from everysat.data import rsicd
from everysat.models import geoclip, georeset, weights
from everysat.nn.gaussian import Gaussian, divergence, expected_match
from everysat.recipe import Recipe
from everysat.train import train
from everysat.types import Batch, ContractError, Place, Text, Vector

WORDS = {"encoder": "letters", "vector": 26, "hidden": 24}
SHAPES = {"longest_m": 200.0, "shortest_m": 10.0, "count": 3, "width": 16, "words": WORDS}
LOCATION = {"degrees": 4, "width": 16}
OPTIONS = {"dim": 8, "text": WORDS, "shapes": SHAPES, "location": LOCATION}
SENTENCES = (("many trees by a lake", "a road"), ("houses",), ("a lake",))
OTHERS = ("text", "shapes", "location")


def lively(model: georeset.GeoReset) -> georeset.GeoReset:
    """With confidences that differ from the beginning."""
    for module in model.modules():
        if isinstance(module, georeset.GaussianHead):
            torch.nn.init.normal_(module.spread.weight, std=0.5)
    return model.eval()


@pytest.fixture
def model() -> georeset.GeoReset:
    torch.manual_seed(0)
    own = georeset.Config.model_validate({**OPTIONS, "backbone": {}, "heads": "each"})
    return lively(georeset.GeoReset(own, LayeredEncoder()))


def texts(sentences=SENTENCES, role="caption") -> Text:
    row = torch.tensor([i for i, bag in enumerate(sentences) for _ in bag], dtype=torch.long)
    strings = tuple(s for bag in sentences for s in bag)
    return Text(strings, (role,) * len(strings), row)


def vectors() -> Vector:
    shapes = (box(5, 5, 20, 15), Point(30, 30), LineString([(0, 0), (40, 20)]))
    tags = ({"building": "yes"}, {"natural": "tree"}, {"highway": "path"})
    return Vector(shapes, tags, torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 0, 2]))


def batch_of(generator) -> Batch:
    """Three places: all witnesses; no shapes; no images."""
    images, _ = layered_batch(3, generator)
    layers = {name: images.raster(name).obs(torch.arange(2)) for name in NAMES}
    places = tuple(Place(40.0, 40.0, lonlat=at) for at in ((5.0, 45.0), (-120.0, 10.0), (179.0, -60.0)))
    return Batch(places, {**layers, "captions": texts(), "osm": vectors()})


def without(batch: Batch, *names: str) -> Batch:
    """Less witnesses, by their names."""
    layers = {"text": "captions", "shapes": "osm"}
    if "location" in names:
        batch = replace(batch, places=tuple(replace(place, lonlat=None) for place in batch.places))
    return batch.without(*(layers.get(name, name) for name in names))


def close(a, b) -> None:
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.log_var, b.log_var, rtol=1e-4, atol=1e-5)
    assert torch.equal(a.observed, b.observed)


def test_who_is_there(model, generator) -> None:
    said = model.said_by(model.tokenize(batch_of(generator)))
    assert said.places.names == (*NAMES, "shapes", "location", "text")
    assert said.places.there.tolist() == [[True] * 6, [True] * 3 + [False, True, True], [False] * 3 + [True] * 3]
    assert {name: x.shape[1] for name, x in said.known.items()} == {
        **dict.fromkeys(NAMES, 32), "shapes": 26, "location": 3, "text": 26,
    }  # fmt: skip
    torch.testing.assert_close(said.known["location"].norm(dim=1), torch.ones(3))


def test_two_in_a_batch_equal_one_by_one(model, generator) -> None:
    batch = batch_of(generator)
    together = model.place(batch)
    for row in range(3):
        close(together[row : row + 1], model.place(batch[row]))


def test_order_of_sentences_layers_and_shapes_is_irrelevant(model, generator) -> None:
    batch = batch_of(generator)
    layers = {
        **batch.layers,
        "captions": texts().obs(torch.tensor([3, 1, 0, 2])),
        "osm": vectors().obs(torch.tensor([2, 1, 0])),
    }
    close(model.place(Batch(batch.places, dict(reversed(layers.items())))), model.place(batch))
    halves = [texts().obs(torch.tensor(part)) for part in ([0, 2], [1, 3])]
    close(model.place(batch.without("captions").adding(said=halves[1], also=halves[0])), model.place(batch))


def test_saying_it_twice_adds_nothing(model) -> None:
    once, twice = model.text(["a lake by a road"]), model.text([["a lake by a road"] * 3])
    close(once, twice)
    both = model.text([["a lake by a road", "houses"]])
    assert not torch.allclose(both.mean, once.mean, atol=1e-2)


def test_sure_sentences_count_more(model, generator, monkeypatch) -> None:
    mean, log_var = torch.randn(2, 8, generator=generator), torch.tensor([[-6.0] * 8, [2.0] * 8])
    monkeypatch.setattr(georeset.GaussianHead, "forward", lambda head, x: (mean, log_var))
    found = model.bag(torch.zeros(2, 26), torch.zeros(2, dtype=torch.long), 1)
    torch.testing.assert_close(found.mean[0], mean[0], rtol=0, atol=1e-2)


def test_sentences_that_fit_the_others_count_more(model, generator, monkeypatch) -> None:
    mean, log_var = torch.randn(2, 8, generator=generator), torch.zeros(2, 8)
    monkeypatch.setattr(georeset.GaussianHead, "forward", lambda head, x: (mean, log_var))
    row, seen = torch.zeros(2, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    alone = model.bag(torch.zeros(2, 26), row, 1)
    torch.testing.assert_close(alone.mean[0], mean.mean(0))
    found = model.bag(torch.zeros(2, 26), row, 1, Gaussian(mean[1:], log_var[1:], seen))
    assert (found.mean[0] - mean[1]).norm() < 0.2 * (found.mean[0] - mean[0]).norm()
    close(model.bag(torch.zeros(2, 26), row, 1, Gaussian(mean[1:], log_var[1:], ~seen)), alone)


def test_attention_to_the_others_is_chosen_by_place(model, generator) -> None:
    tokens = model.tokenize(batch_of(generator))
    every, nobody = (model.said_by(tokens, torch.tensor([on] * 3)).places.mean[:, -1] for on in (True, False))
    some = model.said_by(tokens, torch.tensor([False, True, True])).places.mean[:, -1]
    torch.testing.assert_close(model.said_by(tokens).places.mean[:, -1], every)
    torch.testing.assert_close(some[0], nobody[0])
    assert not torch.allclose(every[0], nobody[0], atol=1e-4)
    torch.testing.assert_close(every[1:], nobody[1:])  # one sentence needs no choice


def test_witnesses_only_add_information(model, generator) -> None:
    """Words last: which of a bag count depends on the others."""
    batch, order = batch_of(generator), ("shapes", "location", "text")
    known = [model.place(without(batch, *order[n:])) for n in range(4)]
    for fewer, more in itertools.pairwise(known):
        assert (more.log_var <= fewer.log_var + 1e-6).all()
    assert (known[3].log_var[0] < known[0].log_var[0]).all()


@pytest.mark.parametrize("gone", [n for k in range(4) for n in itertools.combinations(OTHERS, k)])
def test_any_set_of_witnesses_works(model, generator, gone) -> None:
    features = model.embed(without(batch_of(generator), *gone))
    assert torch.isfinite(features.summary).all()
    assert features.grid().shape[:2] == (3, 8)
    assert set(features.coords.row.tolist()) == {0, 1}


def test_nothing_known_is_the_prior_and_says_so(model, generator) -> None:
    batch = Batch.cat([Batch((Place(40.0, 40.0),)), batch_of(generator)])
    found = model.place(batch)
    assert found.observed.tolist() == [False, True, True, True]
    assert divergence(found).tolist()[0] == 0 < divergence(found)[1]
    features = model.embed(batch)
    assert (features.summary_var[0] == 1).all()
    torch.testing.assert_close(features.summary, found.mean)


def test_questions_and_labels_say_nothing(model, generator) -> None:
    batch = batch_of(generator)
    more = batch.adding(
        asked=texts((("is there a zoo?",), ("how many huts?",), ("why?",)), role="question"), label=vectors()
    )
    close(model.place(more), model.place(batch))
    assert "label" not in model.known(more).layers


def test_strings_and_positions_are_what_places_with_nothing_else_are(model) -> None:
    bags = [list(bag) for bag in SENTENCES]
    places = tuple(Place(300.0, 400.0) for _ in bags)
    close(model.text(bags), model.place(Batch(places, {"captions": texts()})))
    lonlat = [(5.0, 45.0), (-120.0, 10.0)]
    there = model.place(Batch(tuple(Place(300.0, 400.0, lonlat=at) for at in lonlat)))
    close(model.locations(torch.tensor(lonlat), 250.0), there)
    assert not torch.allclose(model.locations(torch.tensor(lonlat), 250_000.0).mean, there.mean, atol=1e-3)
    around = model.locations(torch.tensor([[-180.0, 3.0], [180.0, 3.0]]), 1e4)
    torch.testing.assert_close(around.mean[0], around.mean[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"kind": "fourier"}, {"kind": "harmonics", "degrees": 6}])
def test_other_ways_to_read_positions(options) -> None:
    model = georeset.build("", location={"width": 16, **options}, dim=8)
    near, far = (model.locations(torch.tensor([[4.0, 50.0], at]), 100.0).mean for at in ([4.001, 50.0], [-60.0, -30.0]))
    assert (near[0] - near[1]).norm() < 0.5 * (far[0] - far[1]).norm()


def test_a_trained_location_encoder_stays_as_it_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVERYSAT_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="everysat convert geoclip/nano FILE"):
        georeset.build("", location={"encoder": "geoclip/nano"})
    torch.manual_seed(3)
    trained = geoclip.build("nano")
    weights.save(weights.installed("geoclip/nano"), trained)
    model = georeset.build("", location={"encoder": "geoclip/nano", "width": 16}, dim=8)
    found = model.locations(torch.tensor([[4.0, 50.0]]), 100.0)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.where.frozen.state_dict()[name])
    assert not [name for name, p in model.named_parameters() if ".frozen." in name and p.requires_grad]
    twin = georeset.from_config(json.loads(json.dumps(model.config)))
    twin.load_state_dict(model.state_dict())
    close(twin.locations(torch.tensor([[4.0, 50.0]]), 100.0), found)


def test_words_match_cells_by_the_head_of_places(model, generator) -> None:
    assert model.cell_heads is model.place_heads
    batch = batch_of(generator)
    features = model.embed(batch)
    mean, log_var = model.place_heads["a"](model.backbone.embed(batch.only("a")).mean)
    precision = (-log_var).exp()
    torch.testing.assert_close(
        model.embed(batch.only("a")).mean, mean * precision / (1 + precision), rtol=1e-4, atol=1e-5
    )
    cells = Gaussian(features.mean, features.var.log(), torch.ones(len(features.mean), dtype=torch.bool))
    assert model.match(cells, model.text(["water", "road"])).shape == (len(cells.mean), 2)


def test_match_is_scaled_and_shifted(model) -> None:
    a, b = model.text(["lake", "road", "tree"]), model.text(["river", "path"])
    model.scale.fill_(7.0)
    model.bias.fill_(-2.0)
    torch.testing.assert_close(model.match(a, b), 7.0 * expected_match(a, b) - 2.0)


def test_every_parameter_learns(model, generator) -> None:
    features = model(model.tokenize(batch_of(generator)))
    (
        (features.mean - features.var).square().sum() + (features.summary - features.summary_var).square().sum()
    ).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_temper_of_any_witness(model, generator) -> None:
    batch = batch_of(generator)
    deaf = model.at(temper={"text": 1e-12, "a": 1e-12}).place(batch)
    fewer = model.place(without(batch.without("a"), "text"))
    torch.testing.assert_close(deaf.mean, fewer.mean, rtol=1e-3, atol=1e-4)
    assert model.own.temper == 1.0
    with pytest.raises(ValueError, match="temper names the modality 'texts'"):
        model.at(temper={"texts": 0.5})


def test_fusion_at_the_call(model, generator) -> None:
    batch = batch_of(generator)
    twin = model.at(fusion="max_conf")
    assert twin.config["fusion"] == "max_conf"
    assert not torch.allclose(twin.place(batch).mean, model.place(batch).mean)


def test_weights_come_back(tmp_path, generator) -> None:
    torch.manual_seed(1)
    model = lively(georeset.build("nano", **OPTIONS))
    model.scale.fill_(12.0)
    path = weights.save(tmp_path / "w.safetensors", model)
    again = weights.load(path)
    assert again.config == model.config == json.loads(json.dumps(model.config))
    assert set(model.config["modalities"]) == set(model.inputs)
    assert again.scale == 12.0
    assert again.cell_heads is again.place_heads
    close(again.text(["a lake"]), model.text(["a lake"]))


def test_no_images_at_all(generator) -> None:
    model = lively(georeset.build("", **OPTIONS))
    assert model.inputs == {}
    batch = without(batch_of(generator), *NAMES)
    found = model.place(batch)
    assert found.observed.all()
    assert len(model.embed(batch).coords) == 0
    twin = georeset.from_config(json.loads(json.dumps(model.config)))
    twin.load_state_dict(model.state_dict())
    close(twin.place(batch), found)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if name.startswith(("cell_heads", "place_heads"))]


def test_what_does_not_fit_is_refused(model) -> None:
    with pytest.raises(ValueError, match="there are no witnesses"):
        georeset.build("")
    with pytest.raises(LookupError, match="Did you mean nano"):
        georeset.build("nan")
    with pytest.raises(ValueError, match="must say what to wrap"):
        georeset.build("words", encoder="resnet")
    with pytest.raises(ValueError, match="belongs to kind='frozen'"):
        georeset.build("", location={"kind": "frozen"})
    with pytest.raises(ValueError, match="has the name 'text' of another witness"):
        georeset.GeoReset(georeset.Config.model_validate({**OPTIONS, "heads": "each"}), LayeredEncoder(("a", "text")))
    with pytest.raises(TypeError, match="expected a list of strings"):
        model.text("a lake")
    with pytest.raises(ValueError, match="radius_m=0 must be above 0"):
        model.locations(torch.zeros(1, 2), 0.0)
    with pytest.raises(ContractError, match="no longitude"):
        model.locations(torch.tensor([[0.0, 95.0]]), 10.0)
    words = georeset.build("", text=WORDS, dim=4)
    with pytest.raises(ContractError, match="reads no positions"):
        words.locations(torch.zeros(1, 2), 1.0)
    with pytest.raises(ContractError, match="reads no text"):
        georeset.build("", location=LOCATION, dim=4).text(["a lake"])
    with pytest.raises(ContractError, match="gives vectors of 26 numbers, the model was made for 384"):
        georeset.build("", text={"encoder": "letters"}, dim=4).text(["a lake"])


def test_nothing_outside_is_needed_until_text_is_read() -> None:
    """A model that reads text is built, saved and used for images without the text encoder."""
    model = georeset.build("nano", text={"encoder": "not.installed"})
    assert math.isfinite(float(model.embed(Batch((Place(40.0, 40.0, lonlat=(1.0, 2.0)),))).summary.sum()))


def test_the_recipe_of_scenes_and_sentences_runs(tmp_path) -> None:
    """On a made-up set in the published format, with a smaller image encoder and letters for words."""
    rsicd.fake(tmp_path / "rsicd", places=6)
    smaller = [
        "model.options.encoder.options.width=4",
        "model.options.dim=8",
        f"model.options.text={json.dumps(WORDS)}",
    ]
    shorter = ["steps=2", "batch_size=4", "warmup_steps=0", "augment.crop_m=40", "ema=null", "precision=fp32"]
    where = [f"data.0.options.root={tmp_path / 'rsicd'}", f"out={tmp_path / 'run'}"]
    run = train(Recipe.load("georeset_rsicd", [*smaller, *shorter, *where]), quiet=True)
    assert run.log[-1]["cells"] > 0
    encoder = weights.load(run.weights)
    assert encoder.config["modalities"]["rgb"]["mean"] != [0.0, 0.0, 0.0]
    assert encoder.bias == pytest.approx(-6.0, abs=0.1)
    batch = rsicd.build("captions", root=tmp_path / "rsicd", split="val")[0]
    assert encoder.place(batch.without("label")).observed.all()


def test_nothing_asked_gets_an_empty_answer_and_nothing_said_the_prior(model) -> None:
    assert model.text([]).mean.shape == (0, 8)
    assert model.locations(torch.zeros(0, 2), 10.0).mean.shape == (0, 8)
    assert model.text([[], "a lake"]).observed.tolist() == [False, True]
    assert (model.text([[]]).log_var == 0).all()
