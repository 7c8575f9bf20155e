"""Distillation as a task: costs are those of the tasks below, places may lack modalities and labels, and students come out as ordinary models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everysat.data import synthetic
from everysat.data.batches import Subset
from everysat.models import students, weights
from everysat.nn.distill import feature_distillation, logit_distillation
from everysat.recipe import Recipe
from everysat.tasks import distill
from everysat.train import train
from everysat.types import Batch, Features

ENCODER = {
    "name": "omnisat/",
    "options": {"patch_m": 20.0, "grid": 3, "dim": 16, "depth": 1, "heads": 4, "dropout": 0.0, "drop_path": 0.0},
}
CLASSES = [f"class {i}" for i in range(4)]
PIXEL = {
    "name": "classify/pixel",
    "options": {"classes": CLASSES, "gsd_m": 10.0, "token_size_m": 20.0, "head": "linear"},
}
PLACE = {"name": "classify/place", "options": {"classes": CLASSES, "head": "linear"}}
HEIGHT = {
    "name": "height",
    "kind": "terrain",
    "source": "made",
    "bands": [{"name": "height", "gsd_m": 60, "unit": "m"}],
}
VALUE = {
    "name": "regress/place",
    "options": {"bands": ["height"], "sensor": HEIGHT, "mean": [1.5], "std": [1.0], "head": "linear"},
}


def data_of(task, **options):
    side = 10.0 if task is PIXEL else 60.0
    return synthetic.build(places=16, size_m=60.0, label_gsd_m=side, **{"missing": 0.3, **options})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return made(data_of(PIXEL))


def made(data, **options):
    recipe = Recipe.parse(
        {
            "name": "x",
            "model": {"name": "students", "statistics": "data", "options": {"encoder": ENCODER, "modalities": "data", "dim": 8, **options}},
            "data": [{"name": "synthetic"}],
            "objective": {"name": "none"},
            "steps": 1,
        }
    )  # fmt: skip
    from everysat.trainee import build_encoder

    return build_encoder(recipe, [data]).eval()


def batch_of(task, **options) -> Batch:
    data = data_of(task, **options)
    batch = Batch.cat([data[i] for i in range(len(data))])
    if task is VALUE:
        from everysat.sensors import from_table

        table = {k: v for k, v in HEIGHT.items() if k != "name"}
        label = batch.raster("label")
        batch = batch.adding(label=replace(label, sensor=from_table("height", table)))
    return batch


def test_costs_are_those_of_the_tasks_below(model, generator) -> None:
    batch = batch_of(PIXEL)
    task = distill.build("alone", encoder=model, task=PIXEL).eval()
    terms = task(model, batch, generator)
    each = []
    for name, (student, own) in task.students(model).items():
        found = own(student, batch, generator)
        torch.testing.assert_close(terms[f"task_{name}"], found["loss"].detach())
        each.append(found["loss"])
    torch.testing.assert_close(terms["loss"], torch.stack(each).mean())


@pytest.mark.parametrize("variant", ["discom", "contrast", "solved"])
@pytest.mark.parametrize("below", [PIXEL, PLACE, VALUE], ids=["pixel", "place", "value"])
def test_every_task_learns_and_every_parameter_has_a_gradient(model, below, variant, generator) -> None:
    batch = batch_of(below)
    chosen = {"variant": "discom", "adversary": "solved"} if variant == "solved" else {"variant": variant}
    task = distill.build(**chosen, encoder=model, task=below, cells=64)
    task.train()
    model.train()
    terms = task(model, batch, generator)
    assert {"task", "auxiliary", "modality", "invariance", "orthogonality", "task_vhr", "labelled"} <= set(terms)
    terms["loss"].backward()
    unused = "cells" if below is not PIXEL else "places"  # the other level's normalisation
    silent = [
        n
        for part in (model, task)
        for n, p in part.named_parameters()
        if (p.grad is None or not p.grad.any()) and f".{unused}." not in n
    ]
    assert not [n for n in silent if "encoders" not in n and "bias" not in n], silent
    model.eval()
    task.eval()
    prediction = task.predict(task.features(model, batch), batch)
    assert prediction.values.shape[0] == len(batch)
    metrics = task.metrics()
    for metric in metrics.values():
        metric.update(*task.pairs(prediction, batch))
    for name, (student, own) in task.students(model).items():
        alone = own.predict(own.features(student, batch), batch)
        torch.testing.assert_close(alone.values, prediction.each[name].values)
        for kind, metric in own.metrics().items():
            metric.update(*own.pairs(alone, batch))
            torch.testing.assert_close(metrics[f"{name}_{kind}"].compute(), metric.compute())


def test_the_released_losses_differ(generator) -> None:
    data = data_of(PLACE)
    two = synthetic.build("images", places=8, size_m=60.0, label_gsd_m=60.0)
    model = made(two)
    batch = Batch.cat([two[i] for i in range(8)])
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        task = distill.build("discom", encoder=model, task=PLACE, released=released)
        found.append(task(model, batch, generator))
    assert found[0]["task"] == found[1]["task"]
    for name in ("modality", "invariance", "orthogonality"):
        assert found[0][name] != found[1][name]
    with pytest.raises(ValueError, match="two modalities"):
        distill.build("discom", encoder=made(data), task=PLACE, released=True)


def test_places_of_one_modality_each_are_enough(model, generator) -> None:
    batch = batch_of(PLACE, missing=0.0)
    names = model.names
    parts = [batch[i].only(names[i % 3], "label") for i in range(len(batch))]
    task = distill.build("discom", encoder=model, task=PLACE)
    terms = task(model, Batch.cat(parts), generator)
    assert terms["labelled"] == len(batch)
    only = task(model, Batch.cat([p for i, p in enumerate(parts) if i % 3 == 0]), generator)
    assert torch.isfinite(only["loss"])
    assert "task_vhr" in only
    assert "task_radar" not in only
    contrast = distill.build("contrast", encoder=model, task=PLACE)
    assert contrast(model, Batch.cat(parts), generator)["invariance"] == 0  # no place has two


def test_cells_are_compared_where_both_modalities_saw_them(model, generator) -> None:
    """The contrast of all pairs of cells equals that of a batch without the places that one of the two lacks."""
    batch = batch_of(PIXEL).only("optical", "radar", "label")
    both = [i for i in range(len(batch)) if {"optical", "radar"} <= set(batch[i].layers)]
    assert 2 < len(both) < len(batch)
    task = distill.build("contrast", encoder=model, task=PIXEL, cells=10_000).eval()
    whole = task(model, batch, generator)["invariance"]
    some = task(model, Batch.cat([batch[i] for i in both]), generator)["invariance"]
    torch.testing.assert_close(whole, some)
    drawn = distill.build("contrast", encoder=model, task=PIXEL, cells=20).eval()
    assert drawn(model, batch, generator)["invariance"] < whole  # of fewer cells one's own is told more easily


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    found = {}
    for number, below in enumerate((PIXEL, PLACE)):
        encoder = {**ENCODER, "options": {**ENCODER["options"], "dim": 32, "modalities": "data"}}
        recipe = {
            "name": f"t{number}",
            "model": {**encoder, "statistics": "data"},
            "data": [{"name": "synthetic"}],
            "task": below,
            "steps": 2,
            "out": str(folder / str(number)),
        }
        found[below["name"]] = train(Recipe.parse(recipe), data=[data_of(below)], quiet=True).weights
    return found


@pytest.mark.parametrize("below", [PIXEL, PLACE], ids=["pixel", "place"])
def test_logits_are_those_of_the_teacher_and_need_no_labels(model, teacher, below, generator) -> None:
    batch = batch_of(below, missing=0.0)
    task = distill.build("logits", encoder=model, task=below, teacher=str(teacher[below["name"]]), temperature=2.0)
    task.train()
    terms = task(model, batch.without("label"), generator)
    assert terms["task"] == 0
    its, head = task.teacher
    with torch.no_grad():
        features = its(its.tokenize(batch.without("label")))
        told = head.head(features, batch)[0].movedim(1, -1).flatten(0, 2)
    expected = []
    for student, own in task.students(model).values():
        mine = own.head(student(student.tokenize(batch)), batch)[0].movedim(1, -1).flatten(0, 2)
        expected.append(logit_distillation(mine, told, temperature=2.0))
    torch.testing.assert_close(terms["distillation"], torch.stack(expected).mean().detach(), rtol=1e-3, atol=1e-5)
    terms["loss"].backward()
    assert all(p.grad is None for part in task.teacher for p in part.parameters())
    assert not any("teacher" in name for name in task.state_dict())


def test_features_of_any_encoder_go_to_any_other(teacher, generator) -> None:
    """To a plain encoder of one layer, which is no student of several."""
    data = data_of(PIXEL, missing=0.0)
    batch = batch_of(PIXEL, missing=0.0)
    recipe = {
        "name": "f",
        "model": {"name": "simplesat/nano", "statistics": "data", "options": {"modalities": "data", "token_m": 20.0}},
        "data": [{"name": "synthetic"}],
        "task": {"name": "distill/features", "options": {"task": PIXEL, "teacher": str(teacher["classify/pixel"])}},
        "steps": 1,
    }
    encoder = train(
        Recipe.parse({**recipe, "out": str(teacher["classify/pixel"].parent / "f")}), data=[data], quiet=True
    )
    task, model = encoder.objective, encoder.encoder
    assert list(task.students(model)) == [distill.WHOLE]
    its, _ = weights.load_task(teacher["classify/pixel"])
    with torch.no_grad():
        told, mine = (e(e.tokenize(batch.without("label"))) for e in (its, model))
        assert torch.equal(told.coords.cells(), mine.coords.cells())
        expected = feature_distillation(task.projections[distill.WHOLE](mine.mean), told.mean)
        again = distill.build("features", encoder=model, task=PIXEL, teacher=str(teacher["classify/pixel"])).eval()
        again.load_state_dict(task.state_dict())
        torch.testing.assert_close(again(model, batch, generator)["distillation"], expected)


def test_a_run_resumes_and_its_students_are_models_of_their_own(tmp_path, teacher) -> None:
    data = data_of(PLACE)
    tree = {
        "name": "run",
        "model": {"name": "students", "statistics": "data", "options": {"encoder": ENCODER, "modalities": "data", "dim": 8}},
        "data": [{"name": "synthetic"}],
        "validation": [{"name": "synthetic"}],
        "task": {"name": "distill/discom", "options": {"task": PLACE, "teacher": str(teacher["classify/place"]), "hidden": 8}},
        "lr_scale": {"objective.terms.discriminator": 10},
        "steps": 3,
        "batch_size": 8,
    }  # fmt: skip
    run = train(
        Recipe.parse({**tree, "out": str(tmp_path / "a")}), data=[data], validation=[Subset(data, range(6))], quiet=True
    )
    last = run.log[-1]
    assert {f"validation_{n}_macro_f1" for n in ("vhr", "optical", "radar")} <= set(last)
    assert "distillation" in last
    encoder, task = weights.load_task(run.weights)
    batch = batch_of(PLACE)
    torch.testing.assert_close(
        task.predict(encoder.embed(batch)).values, run.objective.predict(run.encoder.embed(batch)).values
    )
    for name, (student, own) in run.objective.students(run.encoder).items():
        file = weights.save(tmp_path / f"{name}.safetensors", student, own)
        encoder, task = weights.load_task(file)
        assert list(encoder.inputs) == [name]
        alone, before = (t.predict(e.embed(batch.only(name))) for e, t in ((encoder, task), (student, own)))
        torch.testing.assert_close(alone.values, before.values)
    said = encoder.embed(batch)
    with pytest.raises(ValueError, match="is about several students"):
        run.objective.predict(Features(said.mean, said.coords, said.summary, said.places))


def test_a_task_from_a_file_lacks_its_teacher(tmp_path, model, teacher, generator) -> None:
    options = {"encoder": model, "task": PLACE}
    task = distill.build("features", teacher=str(teacher["classify/place"]), **options)
    encoder, again = weights.load_task(weights.save(tmp_path / "a.safetensors", model, task))
    batch = batch_of(PLACE)
    torch.testing.assert_close(
        again.predict(encoder.embed(batch)).values, task.eval().predict(model.embed(batch)).values
    )
    with pytest.raises(ValueError, match="without its teacher"):
        again.train()(encoder, batch, generator)


def test_what_does_not_fit_is_refused(model, teacher) -> None:
    plain = made(data_of(PLACE)).one("radar").encoders["radar"][0]
    file = str(teacher["classify/place"])
    for variant, options, error, words in (
        ("discom", {"task": {"classify": 1}}, ValueError, "must say what to predict"),
        ("disco", {}, LookupError, "Did you mean discom"),
        ("logits", {}, ValueError, "needs teacher"),
        ("features", {}, ValueError, "needs teacher"),
        ("alone", {"teacher": file}, ValueError, "has no teacher"),
        ("contrast", {"released": True}, ValueError, "is for the variant discom"),
        ("discom", {"weights": {"modal": 1.0}}, LookupError, "Did you mean modality"),
        ("discom", {"temperature": 0.0}, ValueError, "temperature"),
        ("discom", {"encoder": plain}, ValueError, "take the model students"),
        ("discom", {"adversary": "solve"}, LookupError, "Did you mean solved"),
        ("discom", {"adversary": "solved", "released": True}, ValueError, "its learned adversary"),
        ("logits", {"teacher": file, "task": PIXEL}, ValueError, "predicts places, this task pixels of 10 m"),
        ("logits", {"teacher": file, "task": {"name": "classify/place", "options": {"classes": ["a", "b"]}}}, ValueError, "in the same order"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            distill.build(variant, **{"encoder": model, "task": PLACE, **options})


def test_students_are_for_encoders_that_list_layers() -> None:
    with pytest.raises(ValueError, match="lists no layers"):
        students.build("", encoder={"name": "ramen/", "options": {"dim": 64, "depth": 1, "heads": 4}})
