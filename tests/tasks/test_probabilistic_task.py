"""Tasks on Gaussian features: averages over what features may be, confidence that falls with what is known, and maps of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from layered_encoder import NAMES, LayeredEncoder, layered_batch, of_places
from odc.geo.geobox import GeoBox

from everysat.models import prommrs, weights
from everysat.nn.confidence import confidence, informed
from everysat.nn.gaussian import information
from everysat.nn.mappers import Dense, Stacked, Tasked
from everysat.nn.risk import auroc, risk_coverage
from everysat.predict import predict
from everysat.recipe import Recipe
from everysat.sensors import Band, Sensor
from everysat.tasks.probabilistic import build
from everysat.train import train
from everysat.types import Batch, Raster

PIXEL = {
    "name": "classify/pixel",
    "options": {"classes": ["low", "high"], "gsd_m": 20.0, "token_size_m": 20.0, "head": "linear"},
}
PLACE = {"name": "classify/place", "options": {"classes": ["low", "high"], "head": "linear"}}


@pytest.fixture
def encoder() -> prommrs.ProMM:
    torch.manual_seed(0)
    model = prommrs.wrap(LayeredEncoder(), dim=8).eval()
    for head in [*model.cell_heads.values(), *model.place_heads.values()]:
        torch.nn.init.normal_(head.spread.weight, std=0.3)
    return model


def test_probabilities_are_marginal(encoder, generator) -> None:
    """Of two classes and a linear head, the difference of logits is a Gaussian: its sigmoid, averaged by quadrature."""
    batch, _ = layered_batch(4, generator)
    task = build(encoder=encoder, task=PIXEL, samples=2000).eval()
    features = encoder.embed(batch)
    features = replace(features, mean=5 * features.mean, var=200 * features.var)
    found = task.predict(features).values.permute(0, 2, 3, 1).reshape(-1, 2)[:, 1]
    linear = task.head.head
    step = linear.weight[1] - linear.weight[0]
    middle = features.mean @ step + linear.bias[1] - linear.bias[0]
    deviation = (features.var @ step.square()).sqrt()
    grid = torch.linspace(-6, 6, 2001)
    density = torch.exp(-grid.square() / 2)
    expected = ((middle[:, None] + deviation[:, None] * grid).sigmoid() * density).sum(1) / density.sum()
    torch.testing.assert_close(found, expected.detach(), atol=0.02, rtol=0)
    plain = task.task.predict(features).values.permute(0, 2, 3, 1).reshape(-1, 2)[:, 1]
    assert ((found - 0.5).abs() < (plain - 0.5).abs() + 0.01).all()
    assert (found - plain).abs().max() > 0.05


def test_the_less_is_known_the_less_sure_is_the_answer(encoder, generator) -> None:
    batch, _ = layered_batch(6, generator)
    task = build(encoder=encoder, task=PLACE, samples=64).eval()
    features = encoder.embed(batch)
    sure = [
        task.predict(replace(features, summary_var=features.summary_var * factor)).values.amax(1).mean().item()
        for factor in (0.01, 10.0, 1000.0)
    ]
    assert sure[0] > sure[1] > sure[2]


def test_a_prediction_does_not_depend_on_its_neighbours(encoder, generator) -> None:
    batch, _ = layered_batch(3, generator)
    task = build(encoder=encoder, task=PIXEL).eval()
    together = task.predict(encoder.embed(batch)).values
    alone = torch.cat([task.predict(encoder.embed(batch[i])).values for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_values_have_the_variance_of_a_linear_map(encoder, generator) -> None:
    sensor = Sensor("height", "terrain", (Band("height", 20, "m"),), "made for tests")
    batch, _ = layered_batch(4, generator)
    options = {
        "bands": ["height"],
        "sensor": {
            "name": "height",
            "kind": "terrain",
            "source": "made",
            "bands": [{"name": "height", "gsd_m": 20, "unit": "m"}],
        },
    }
    task = build(
        encoder=encoder,
        samples=4000,
        task={"name": "regress/place", "options": {**options, "mean": [100.0], "std": [5.0], "head": "linear"}},
    )
    assert task.sensor.names == sensor.names
    features = encoder.embed(batch)
    found = task.predict(features)
    weight = task.head.head.weight[0]
    torch.testing.assert_close(
        found.var[:, 0, 0, 0], (25 * features.summary_var @ weight.square()).detach(), rtol=0.1, atol=0
    )
    plain = task.task.predict(features).values
    torch.testing.assert_close(found.values, plain, rtol=1e-4, atol=1e-4)  # each draw has its mirror image


def test_features_without_variance_are_predicted_as_they_are(encoder, generator) -> None:
    batch, _ = layered_batch(2, generator)
    task = build(encoder=encoder, task=PLACE).eval()
    features = replace(encoder.embed(batch), var=None, summary_var=None)
    torch.testing.assert_close(task.predict(features).values, task.task.predict(features).values)


def test_training_sees_samples_and_pulls_to_the_prior(encoder, generator) -> None:
    batch, _ = layered_batch(4, generator)
    label = replace(
        of_places("a", torch.zeros(4, 4, 1, 1)),
        sensor=Sensor("labels", "classes", (Band("label", 40, "class"),), "made"),
        values=torch.tensor([0.0, 1, 0, 1]).view(4, 1, 1, 1),
        valid=torch.ones(4, 1, 1, 1, dtype=torch.bool),
        gsd_m=40.0,
    )
    batch = batch.adding(label=label)
    task = build(encoder=encoder, task=PLACE, prior=0.5)
    terms = [task(encoder, batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert terms[0]["loss"].item() == terms[1]["loss"].item() != terms[2]["loss"].item()
    without = build(encoder=encoder, task=PLACE, prior=0.0)
    without.load_state_dict(task.state_dict())
    bare = without(encoder, batch, torch.Generator().manual_seed(1))
    torch.testing.assert_close(terms[0]["loss"], bare["loss"] + 0.5 * terms[0]["prior"])
    terms[0]["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.place_heads.parameters())


def test_what_does_not_fit_is_refused(encoder) -> None:
    with pytest.raises(ValueError, match=r"set model\.probabilistic"):
        build(encoder=LayeredEncoder(), task=PLACE)
    with pytest.raises(ValueError, match="samples=3 must be even"):
        build(encoder=encoder, task=PLACE, samples=3)
    with pytest.raises(ValueError, match="must say what to predict"):
        build(encoder=encoder, task={"classify": "place"})
    with pytest.raises(LookupError, match="Did you mean classify"):
        build(encoder=encoder, task={"name": "clasify"})
    with pytest.raises(ValueError, match="is not that of the task"):
        build(encoder=encoder, task=PIXEL, gsd_m=10.0)
    with pytest.raises(LookupError, match="no variant"):
        build("place", encoder=encoder, task=PLACE)


def test_a_recipe_trains_it_and_weights_hold_it(tmp_path, generator) -> None:
    options = {"classes": ["0", "1", "2", "3"], "gsd_m": 20.0, "token_size_m": 20.0}
    run = train(
        Recipe.parse(
            {
                "name": "small",
                "model": {
                    "name": "simplesat/nano",
                    "options": {"modalities": "data", "token_m": 20.0},
                    "probabilistic": True,
                },
                "data": [{"name": "synthetic/images", "options": {"places": 4, "size_m": 40.0, "label_gsd_m": 20.0}}],
                "task": {"name": "probabilistic", "options": {"task": {"name": "classify/pixel", "options": options}}},
                "steps": 2,
                "batch_size": 4,
                "out": str(tmp_path / "run"),
            }
        ),
        quiet=True,
    )
    assert "prior" in run.log[0]
    encoder, task = weights.load_task(run.weights)
    assert task.config["gsd_m"] == 20.0
    batch = Recipe.load(tmp_path / "run" / "recipe.yaml").data[0].build("data")[0]
    features = encoder.embed(batch)
    torch.testing.assert_close(task.predict(features).values, run.objective.predict(features).values)


# --- maps ----------------------------------------------------------------------------------------------------------------


def scene(generator) -> Batch:
    """A place of 160 m with a grid on the ground; everything is missing in one corner."""
    geobox = GeoBox.from_bbox((500000, 5000000, 500160, 5000160), crs="EPSG:32631", resolution=10)
    layers = {}
    for name in NAMES:
        layer = of_places(name, torch.randn(1, 4, 16, 16, generator=generator))
        valid = layer.valid.clone()
        valid[..., :4, :4] = False
        layers[name] = replace(layer, valid=valid)
    place = replace(layered_batch(1, generator)[0].places[0], height_m=160.0, width_m=160.0, geobox=geobox)
    return Batch((place,), layers)


def test_a_map_of_confidence_is_the_information_of_each_pixel(encoder, generator, tmp_path) -> None:
    import rasterio

    batch = scene(generator)
    mapper = confidence(Dense(encoder, 20.0, 20.0))
    image = mapper(batch)
    assert image.shape == (1, 1, 8, 8)
    features = encoder.embed(batch)
    there = torch.isfinite(image).flatten()
    assert there.sum() == len(features.mean) == 60
    torch.testing.assert_close(image.flatten()[there], information(features.var), rtol=1e-4, atol=1e-5)
    made = predict(mapper, batch, tmp_path / "confidence.tif", quiet=True)
    with rasterio.open(made["features"]) as file:
        assert file.descriptions == ("confidence",)
        torch.testing.assert_close(torch.from_numpy(file.read()), image[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    both = Stacked((Dense(encoder, 20.0, 20.0), mapper), 20.0)(batch)
    assert both.shape == (1, 9, 8, 8)
    assert (mapper(batch.without("a")) < image)[:, :, 2:].all()


def test_a_map_of_classes_has_marginal_confidence(encoder, generator, tmp_path) -> None:
    import rasterio

    batch = scene(generator)
    task = build(encoder=encoder, task=PIXEL).eval()
    mapper = Tasked(encoder, task, 20.0, align_m=20.0, halo_m=0.0)
    made = predict(mapper, batch, tmp_path / "classes.tif", quiet=True)
    with rasterio.open(made["confidence"]) as file:
        shown = torch.from_numpy(file.read(1)).float()
    expected = task.predict(encoder.embed(batch)).values[0].amax(0) * 100
    there = encoder.embed(batch).grid().isfinite().all(1)[0]
    assert int(there.sum()) == 60
    torch.testing.assert_close(shown[there], expected[there], atol=0.51, rtol=0)
    assert (shown[~there] > 100).all()


def test_agreement_teaches_variances_alone_and_needs_two_modalities(encoder, generator) -> None:
    batch, _ = layered_batch(4, generator)
    label = of_places(NAMES[0], torch.tensor([0.0, 1.0, 1.0, 0.0]).view(4, 1, 1, 1).expand(4, 4, 1, 1))
    sensor = Sensor("labels", "classes", (Band("label", 40, "class"),), "made")
    batch = batch.adding(
        label=replace(label, sensor=sensor, values=label.values[:, :1], valid=label.valid[:, :1], gsd_m=40.0)
    )
    task = build(encoder=encoder, task=PLACE, agreement=1.0)
    head = encoder.place_heads[next(iter(encoder.inputs))]

    def found(batch: Batch, weight: float) -> tuple[Any, Any]:
        task.config["agreement"] = weight
        terms = task(encoder, batch, torch.Generator().manual_seed(1))
        return terms, torch.autograd.grad(terms["loss"], [head.mean.weight, head.spread.weight])

    (without, (mean, spread)), (terms, (mean_too, spread_too)) = found(batch, 0.0), found(batch, 1.0)
    assert set(terms) - set(without) == {"agreement"}
    assert float(terms["agreement"]) != 0
    assert torch.equal(mean, mean_too)
    assert not torch.allclose(spread, spread_too)
    alone = batch.only(next(iter(encoder.inputs)), task.target)
    assert float(found(alone, 1.0)[0]["agreement"]) == 0
    with pytest.raises(ValueError, match="agreement=-1 and alone"):
        build(encoder=encoder, task=PLACE, agreement=-1)


def test_alone_is_the_mean_loss_of_each_modality_by_itself(encoder, generator) -> None:
    batch, _ = layered_batch(4, generator)
    label = of_places(NAMES[0], torch.tensor([0.0, 1.0, 1.0, 0.0]).view(4, 1, 1, 1).expand(4, 4, 1, 1))
    sensor = Sensor("labels", "classes", (Band("label", 40, "class"),), "made")
    label = replace(label, sensor=sensor, values=label.values[:, :1], valid=label.valid[:, :1], gsd_m=40.0)
    batch = batch.adding(label=label)
    for head in [
        *encoder.cell_heads.values(),
        *encoder.place_heads.values(),
    ]:  # sure of what it says, so that samples are means
        torch.nn.init.zeros_(head.spread.weight)
        torch.nn.init.constant_(head.spread.bias, -20.0)
    encoder.own = encoder.own.model_copy(update={"fusion": "precision_average"})
    task = build(encoder=encoder, task=PLACE, prior=0.0, alone=0.5)

    def loss(batch: Batch, weight: float) -> float:
        task.config["alone"] = weight
        return float(task(encoder, batch, torch.Generator().manual_seed(1))["loss"].detach())

    apart = [loss(batch.only(name, task.target), 0.0) for name in encoder.inputs]
    assert loss(batch, 0.5) == pytest.approx(loss(batch, 0.0) + 0.5 * sum(apart) / len(apart), abs=0.03)
    assert max(apart) - min(apart) > 0.1


def test_confidence_needs_variances(generator) -> None:
    batch, _ = layered_batch(1, generator)
    with pytest.raises(ValueError, match=r"model\.probabilistic: true"):
        informed(LayeredEncoder().embed(batch))


# --- risk by confidence ----------------------------------------------------------------------------------------------------


def test_risk_grows_with_coverage_where_confidence_is_right(generator) -> None:
    """Features with known errors: marginal probabilities are calibrated, so keeping fewer places leaves fewer errors; those of the mean are less sure
    of nothing."""
    z = torch.randn(20_000, 1, generator=generator)
    deviation = torch.rand(20_000, 1, generator=generator) * 2 + 0.05
    seen = z + deviation * torch.randn(z.shape, generator=generator)
    precision = 1 + deviation**-2
    mean, var = seen / deviation.square() / precision, 1 / precision
    p = torch.special.ndtr(mean / var.sqrt())[:, 0]
    wrong = ((p > 0.5) != (z[:, 0] > 0)).float()
    curve = risk_coverage((p - 0.5).abs(), wrong)
    risks = [curve.at(c) for c in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(risks))
    assert curve.at(0.1) < 0.01
    told = risk_coverage(information(var), wrong)
    assert curve.best < curve.aurc < told.aurc < curve.chance
    assert auroc(-(p - 0.5).abs(), wrong.bool()) > 0.75


def test_weights_of_fused_places_follow_the_layers_that_are_there(encoder, generator) -> None:
    batch, _ = layered_batch(5, generator)
    assert isinstance(batch.raster("a"), Raster)
    said = [information(encoder.embed(batch.only(*NAMES[:n])).summary_var) for n in (1, 2, 3)]
    assert (said[0] < said[1]).all()
    assert (said[1] < said[2]).all()
