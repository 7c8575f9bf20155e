"""SHeDD's six losses one by one, what each variant learns from, where gradients go, and what the released script does otherwise."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from everysat import sensors
from everysat.models import domains
from everysat.sensors import Band, Sensor
from everysat.tasks import adapt
from everysat.tasks.adapt import TERMS, VARIANTS, build, turned
from everysat.types import Batch, Place, Raster

SIDE_M = 80.0
LAYERS = {
    "source": {"sensor": "sentinel-2-l2a", "bands": ["B04", "B08"], "gsd_m": 10.0, "mean": [0.2] * 2, "std": [0.1] * 2},
    "target": {"sensor": "sentinel-1-grd", "bands": ["VV"], "gsd_m": 5.0, "mean": [-10.0], "std": [5.0]},
}
STILL = {"drop_dates": 0, "drop_bands": 0, "cut": 0, "shift": 0, "noise": 0}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    options = {"width": 2, "blocks": [1, 1, 1, 1]}
    return domains.build(
        modalities={f"{n}/image": layer for n, layer in LAYERS.items()}, encoder={"name": "resnet/", "options": options}
    ).eval()


def task_of(encoder, variant="shedd", **options):
    torch.manual_seed(1)
    return build(variant, **{"encoder": encoder, "classes": {5: "a", 3: "b", 8: "c"}, "threshold": 0.01, **options})


def place(generator, domain, label=None):
    layer = LAYERS[domain]
    sensor, px = sensors.get(layer["sensor"]).select(layer["bands"]), round(SIDE_M / layer["gsd_m"])
    mean, std = layer["mean"][0], layer["std"][0]
    values = mean + std * torch.randn(1, len(sensor.bands), px, px, generator=generator)
    layers = {f"{domain}/image": Raster.of(sensor, values, layer["gsd_m"])}
    if label is not None:
        classes = Sensor("made", "classes", (Band("class", SIDE_M, "class"),), "made for tests")
        layers["label"] = Raster.of(classes, torch.full((1, 1, 1, 1), float(label)), SIDE_M)
    return Batch((Place(SIDE_M, SIDE_M),), layers)


@pytest.fixture
def batch(generator):
    """Source, two target places with labels and three without, in no order; one label is of a class that is not listed."""
    kinds = [
        ("target", None),
        ("source", 5),
        ("target", 8),
        ("source", 3),
        ("target", None),
        ("target", 3),
        ("target", 77),
    ]
    return Batch.cat([place(generator, *kind) for kind in kinds])


LABELLED, FREE, SOURCE = [2, 5], [0, 4, 6], [1, 3]


def run(task, encoder, batch, seed=0):
    return task(encoder, batch, torch.Generator().manual_seed(seed))


def test_the_losses_are_those_of_the_paper(encoder, batch) -> None:
    """The strong view is the weak one here, so that every term can be written down."""
    task = task_of(encoder, strong=STILL)
    task.strong_view = lambda part, generator: part
    found = run(task, encoder, batch)
    h = encoder.halves(batch)
    invariant, specific = (torch.zeros(7, encoder.dim) for _ in range(2))
    for one in h.values():
        invariant[one.row], specific[one.row] = one.invariant, one.specific
    logits, told = task.task.head.head(invariant), task.domain(specific)
    known = torch.tensor(SOURCE + LABELLED)
    domain = torch.tensor([0, 0, 1, 1])
    pseudo = logits[FREE].argmax(1)
    cosine = F.cosine_similarity(invariant, specific).square()
    wanted = {
        "task": F.cross_entropy(logits[known], torch.tensor([0, 1, 2, 1])),
        "domain": F.cross_entropy(told[known], domain) + F.cross_entropy(told[FREE], torch.ones(3, dtype=torch.long)),
        "orthogonality": cosine[known].mean() + cosine[FREE].mean(),
        "pseudo": F.cross_entropy(logits[FREE], pseudo),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    torch.testing.assert_close(found["loss"].detach(), sum(wanted.values()).detach())
    assert found["labelled"] == 4
    only = task_of(encoder, strong=STILL, weights={"domain": 3.0, "task": 0, "orthogonality": 0, "pseudo": 0})
    only.strong_view = lambda part, generator: part
    torch.testing.assert_close(run(only, encoder, batch)["loss"].detach(), 3 * wanted["domain"].detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns_from_what_it_says_and_from_nothing_else(encoder, batch, variant) -> None:
    task = task_of(encoder, variant)
    base = run(task, encoder, batch)["loss"]
    groups = {"source": SOURCE, "labelled": LABELLED, "unlabelled": FREE}
    for kind, rows in groups.items():
        name = "source/image" if kind == "source" else "target/image"
        raster = batch.raster(name)
        mine = torch.isin(raster.row, torch.tensor(rows))[:, None, None, None]
        disturbed = replace(raster, values=torch.where(mine, raster.values.flip(3).roll(2, 2) * 1.5, raster.values))
        changed = run(task, encoder, batch.adding(**{name: disturbed}))["loss"]
        assert torch.equal(base, changed) != (kind in VARIANTS[variant]), kind
    task.zero_grad()
    encoder.zero_grad()
    base.backward()
    moved = {
        name: any(p.grad is not None and p.grad.any() for p in encoder.one(name).parameters()) for name in encoder.names
    }
    assert moved == {"source": "source" in VARIANTS[variant], "target": True}


def test_pseudo_labels_teach_the_strong_view_alone(encoder, batch) -> None:
    task = task_of(encoder, weights={name: 0.0 for name in TERMS if name != "pseudo"})
    kept = []
    task._pseudo_of, plain = task._pseudo, task._pseudo
    task._pseudo = lambda weak, strong: (
        weak.retain_grad(),
        strong.retain_grad(),
        kept.append((weak, strong)),
        plain(weak, strong),
    )[-1]
    found = run(task, encoder, batch)
    found["loss"].backward()
    weak, strong = kept[0]
    assert weak.grad is None or not weak.grad.any()
    assert (strong.grad.abs().sum(1) > 0).all()
    none = run(task_of(encoder, threshold=1.0), encoder, batch)
    assert none["pseudo"] == 0


def test_less_is_asked_of_classes_that_are_learned_slowly(encoder) -> None:
    """FlexMatch, equations 5 to 8: shares 0.6 and 0.2, the rest is unsure."""
    task = task_of(encoder, threshold=0.9, adaptive=True)
    task.learned.copy_(torch.tensor([0.6, 0.2, 0.0]))
    share = torch.tensor([1.0, 1 / 3, 0.0])
    torch.testing.assert_close(task.thresholds(), 0.9 * share / (2 - share))
    task.learned.copy_(torch.tensor([0.1, 0.05, 0.0]))  # most are unsure: of all classes less is asked
    assert task.thresholds().max() < 0.1
    weak = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    fixed = task_of(encoder, threshold=0.9)
    task.learned.copy_(torch.tensor([0.6, 0.2, 0.0]))
    each = F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(task.eval()._pseudo(weak, torch.zeros(2, 3)), each.mean())
    torch.testing.assert_close(fixed.eval()._pseudo(weak, torch.zeros(2, 3)), each[0] / 2)
    fixed.train()._pseudo(weak, torch.zeros(2, 3))
    torch.testing.assert_close(fixed.learned, torch.tensor([0.05, 0.0, 0.0]))
    assert torch.equal(fixed.thresholds(), torch.full((3,), 0.9))


def test_the_released_views_differ_by_flips_and_turns_alone_and_its_cosine_has_a_sign(
    encoder, batch, generator
) -> None:
    ours, theirs = task_of(encoder), task_of(encoder, released=True)
    part = encoder.part(batch, "target")[1]
    before = part.raster("image").values.flatten(1).sort(1).values
    views = {t: t.strong_view(part, torch.Generator().manual_seed(2)).raster("image") for t in (ours, theirs)}
    assert torch.equal(views[theirs].values.flatten(1).sort(1).values, before)
    assert views[theirs].valid.all()
    assert not torch.isclose(views[ours].values.flatten(1).sort(1).values, before).all(1).any()
    assert not views[ours].valid.all()
    a = torch.randn(4, encoder.dim, generator=generator)
    for task, wanted in ((ours, 1.0), (theirs, -1.0)):
        costs = {name: [] for name in TERMS}
        task._disentangle([(a, -a, 1)], costs)
        torch.testing.assert_close(costs["orthogonality"][0], torch.tensor(wanted))


def test_places_are_flipped_and_turned_with_all_their_layers(generator) -> None:
    one, px = place(generator, "target"), round(SIDE_M / 5)
    batch = Batch.cat([place(generator, "target") for _ in range(64)])
    batch = Batch(batch.places, {"a": batch.raster("target/image"), "b": batch.raster("target/image")})
    found = turned(batch, torch.Generator().manual_seed(0))
    assert torch.equal(found.raster("a").values, found.raster("b").values)
    ways = set()
    for before, after in zip(batch.raster("a").values[:, 0], found.raster("a").values[:, 0], strict=True):
        same = [
            (f, k) for f in (0, 1) for k in range(4) if torch.equal((before.flip(1) if f else before).rot90(k), after)
        ]
        ways.update(same)
    assert len(ways) == 8
    layers = {
        "a": replace(one.raster("target/image"), values=torch.randn(1, 1, px, 3), valid=torch.ones(1, 1, px, 3) > 0)
    }
    wide = Batch.cat([Batch((Place(SIDE_M, 15.0),), layers)] * 16)
    flipped = turned(wide, torch.Generator().manual_seed(0)).raster("a").values
    assert flipped.shape == wide.raster("a").values.shape
    assert {torch.equal(a, b) for a, b in zip(flipped, wide.raster("a").values, strict=True)} == {True, False}
    uneven = Batch.cat([batch[0], Batch((Place(20.0, 20.0),))])
    assert turned(uneven, generator) is uneven


def test_invalid_values_have_no_effect(encoder, batch, generator) -> None:
    raster, losses = batch.raster("target/image"), []
    valid = torch.rand(raster.values.shape, generator=generator) > 0.3
    for wrong in (0.0, 1e6):
        wild = replace(raster, values=torch.where(valid, raster.values, wrong), valid=valid)
        losses.append(run(task_of(encoder), encoder, batch.adding(**{"target/image": wild}))["loss"])
    torch.testing.assert_close(*losses)


def test_kinds_that_a_batch_lacks_cost_nothing(encoder, batch) -> None:
    for rows, zero in (([*SOURCE], {"pseudo"}), (FREE, {"task"}), (LABELLED, {"pseudo"})):
        some = Batch.cat([batch[i] for i in rows])
        found = run(task_of(encoder), encoder, some)
        assert torch.isfinite(found["loss"])
        assert {n for n in TERMS if not found[n]} == zero
        found["loss"].backward()
    assert run(task_of(encoder, "target_only"), encoder, Batch.cat([batch[i] for i in SOURCE]))["loss"] == 0


def test_it_predicts_from_the_target_alone_and_is_rebuilt(encoder, batch) -> None:
    task, one = task_of(encoder, adaptive=True), encoder.one("target")
    again = build(encoder=one, **json.loads(json.dumps(task.config)))
    again.load_state_dict(task.state_dict())
    assert again.config == task.config
    assert task.config["gsd_m"] == one.settings.chip_m
    row, part = encoder.part(batch, "target")
    alone = again.predict(again.features(one, part))
    both = task.predict(task.features(encoder, batch))
    torch.testing.assert_close(alone.values, both.values[row])
    torch.testing.assert_close(alone.values.sum(1), torch.ones(5, 1, 1))
    p, truth = task.pairs(both, batch)
    assert truth.tolist() == [0, 2, 1, 1]
    assert p.shape == (4, 3)
    assert len(task.pairs(both, batch.without("label"))[1]) == 0


def test_it_learns_both_domains_and_pseudo_labels(generator) -> None:
    """Two classes differ in brightness; places of all three kinds."""
    torch.manual_seed(0)
    options = {"width": 2, "blocks": [1, 1, 1, 1]}
    encoder = domains.build(
        modalities={f"{n}/image": layer for n, layer in LAYERS.items()}, encoder={"name": "resnet/", "options": options}
    )
    places = []
    for domain, label in (
        [("source", 5), ("source", 3)] * 8 + [("target", 5), ("target", 3)] * 4 + [("target", None)] * 8
    ):
        kind = len(places) % 2
        p = place(generator, domain, label)
        raster = p.raster(f"{domain}/image")
        shift = LAYERS[domain]["std"][0] * (2 * kind - 1)
        places.append(p.adding(**{f"{domain}/image": replace(raster, values=raster.values + shift)}))
    batch, task = Batch.cat(places), task_of(encoder, threshold=0.8)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *task.parameters()], lr=5e-3)
    encoder.train()
    first = None
    for step in range(40):
        found = run(task.train(), encoder, batch, step)
        first = first or {name: float(found[name]) for name in TERMS}
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
    assert found["task"] < 0.2 * first["task"]
    assert found["domain"] < 0.3 * first["domain"]
    assert found["confident"] > 0.2
    part = encoder.eval().part(batch, "target")[1]
    said = task.eval().predict(task.features(encoder.one("target"), part)).values[:, :, 0, 0].argmax(1)
    assert (said == torch.tensor([0, 1] * 8)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sheddd"}, "Did you mean shedd"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"memory": 1.0}, "memory=1.0"),
        ({"multilabel": True}, "one class each"),
        ({"strong": {"cutt": 0.2}}, "Did you mean cut"),
        ({"weights": {"tsk": 1}}, "Did you mean task"),
        ({"clases": 3}, "Did you mean classes"),
    ],
)
def test_options_that_do_not_fit_are_refused(encoder, options, message) -> None:
    with pytest.raises((ValueError, LookupError, TypeError), match=message):
        task_of(encoder, options.pop("variant", "shedd"), **options)


def test_encoders_that_do_not_fit_are_refused(encoder, batch, monkeypatch) -> None:
    one = encoder.one("target")
    with pytest.raises(ValueError, match="needs an encoder for source and target"):
        run(task_of(one), one, batch)
    monkeypatch.setattr(adapt, "world", lambda: (0, 2))
    with pytest.raises(ValueError, match="devices: 1"):
        run(task_of(encoder), encoder, batch)


def test_running_statistics_are_of_weak_views_alone(encoder, batch) -> None:
    def after(task):
        twin = copy.deepcopy(encoder).train()
        run(task, twin, batch)
        return twin.one("target").backbone.norm.running_mean

    alone = copy.deepcopy(encoder).train()
    alone.one("target").halves(alone.part(batch, "target")[1])
    wanted = alone.one("target").backbone.norm.running_mean
    assert torch.equal(after(task_of(encoder)), wanted)
    assert not torch.equal(after(task_of(encoder, released=True)), wanted)
