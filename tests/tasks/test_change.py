"""Change between two times: what is compared with what, when the order matters, and that the change is learnt."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from simple_encoder import SENSOR, SquareEncoder, image_batch, label_raster

from everysat.data import change_pairs
from everysat.find import find
from everysat.nn.mappers import Tasked
from everysat.tasks.change import DEFINITIONS, FUSIONS, build
from everysat.types import Batch, Input, Place, Raster

DAY_S = 86400.0
YEARS = ("2019", "2020")


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return SquareEncoder()


def task_of(encoder, variant="pixel", **options):
    torch.manual_seed(1)
    return build(variant, encoder=encoder, gsd_m=10.0, token_size_m=20.0, **options)


def pair_batch(generator, rows=2, side=6, shared=0.5):
    """Layers before and after; the label is where the second differs."""
    before = torch.rand(rows, 2, side, side, generator=generator)
    changed = torch.rand(rows, 1, side, side, generator=generator) > shared
    after = torch.where(changed, 1 - before.round() + 0.1 * before, before)
    first, second = (image_batch(v).raster("image") for v in (before, after))
    return Batch(image_batch(before).places, {"before": first, "after": second, "label": label_raster(changed, 10.0)})


def dated(values, times, valid=None):
    """A batch of ``values`` [obs, band, y, x] of one place, begun at ``times`` (days since 2019)."""
    start = 1546300800.0 + DAY_S * torch.tensor(times, dtype=torch.float64)
    raster = Raster.of(SENSOR, values, 10.0, valid=valid, time_s=torch.stack([start, start + DAY_S], 1))
    return Batch((Place(10.0 * values.shape[2], 10.0 * values.shape[3]),), {"image": raster})


def fit(task, encoder, batch, generator, steps=100):
    optimiser = torch.optim.AdamW([*task.parameters(), *encoder.parameters()], lr=0.03)
    for _ in range(steps):
        loss = task(encoder, batch, generator)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach())


def predicted(task, encoder, batch):
    return task.predict(task.features(encoder, batch), batch)


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_changes_are_learnt(encoder, generator, fuse, symmetric):
    batch = pair_batch(generator, rows=3)
    task = task_of(encoder, fuse=fuse, symmetric=symmetric, head="mlp", loss="ce+dice")
    fit(task, encoder, batch, generator)
    metrics = task.metrics()
    assert set(metrics) == set(DEFINITIONS)
    for name, metric in metrics.items():
        metric.update(*task.pairs(predicted(task, encoder, batch), batch))
        assert metric.compute() > 0.9, name


def test_it_sees_each_time_as_the_encoder_does_alone(encoder, generator):
    batch = pair_batch(generator)
    features = task_of(encoder, fuse="concat").features(encoder, batch)
    alone = [encoder.embed(Batch(batch.places, {"image": batch.raster(name)})) for name in ("before", "after")]
    torch.testing.assert_close(features.mean, torch.cat([f.mean for f in alone], 1))
    torch.testing.assert_close(features.summary, torch.cat([f.summary for f in alone], 1))
    difference = task_of(encoder, fuse="difference").features(encoder, batch)
    torch.testing.assert_close(difference.mean, alone[1].mean - alone[0].mean)
    assert torch.equal(difference.coords.row, alone[0].coords.row)


@pytest.mark.parametrize("variant", ["pixel", "place"])
@pytest.mark.parametrize("fuse", FUSIONS)
def test_the_order_of_the_times_matters_unless_it_is_not_to(encoder, generator, fuse, variant):
    batch = pair_batch(generator)
    swapped = batch.adding(before=batch.raster("after"), after=batch.raster("before"))
    for symmetric in (True, False):
        task = task_of(encoder, variant, fuse=fuse, symmetric=symmetric)
        same = torch.equal(*(predicted(task, encoder, b).values for b in (batch, swapped)))
        assert same == symmetric


def test_two_in_a_batch_are_one_by_one(encoder, generator):
    places = [pair_batch(generator, rows=1, side=side) for side in (6, 10)]
    for head in ("norm", "upernet"):
        task = task_of(encoder, head=head).eval()
        together = predicted(task, encoder, Batch.cat(places))
        for row, place in enumerate(places):
            alone = predicted(task, encoder, place)
            height, width = alone.values.shape[2:]
            torch.testing.assert_close(together.values[row, :, :height, :width], alone.values[0], rtol=1e-4, atol=1e-5)


def test_what_one_time_lacks_is_not_predicted_and_not_scored(encoder, generator):
    batch = pair_batch(generator, rows=2)
    valid = {name: torch.ones(2, 2, 6, 6, dtype=torch.bool) for name in ("before", "after")}
    valid["before"][0, :, :2] = False
    valid["after"][0, :, :, :2] = False
    masked = batch.adding(**{name: replace(batch.raster(name), valid=valid[name]) for name in valid})
    task = task_of(encoder)
    found = predicted(task, encoder, masked)
    seen = torch.ones(6, 6, dtype=torch.bool)
    seen[:2] = False
    seen[:, :2] = False
    assert torch.equal(found.valid[0, 0], seen)
    assert found.valid[1].all()
    assert len(task.pairs(found, masked)[1]) == 16 + 36
    wild = {
        n: replace(r, values=torch.where(r.valid, r.values, math.inf)) for n, r in masked.layers.items() if n != "label"
    }
    losses = [task(encoder, b, generator)["loss"] for b in (masked, masked.adding(**wild))]
    assert torch.equal(*losses)
    half = batch.adding(after=batch.raster("after").obs(torch.tensor([1])))
    found = predicted(task, encoder, half)
    assert not found.valid[0].any()
    place = task_of(encoder, "place")
    assert predicted(place, encoder, half).valid.flatten(1).any(1).tolist() == [False, True]


def test_a_batch_in_which_no_place_has_both_times_costs_nothing(encoder, generator):
    batch = pair_batch(generator)
    half = batch.adding(after=batch.raster("after").obs(torch.tensor([], dtype=torch.long)))
    task = task_of(encoder)
    terms = task(encoder, half, generator)
    terms["loss"].backward()
    assert terms["loss"] == terms["labelled"] == 0
    assert all(not p.grad.any() for p in encoder.parameters())
    mapper = Tasked(encoder, task, 10.0, 20.0, 0.0)
    assert torch.isnan(mapper(half.without("label"))).all()
    assert torch.equal(mapper(batch.without("label")), predicted(task, encoder, batch).values)


def test_periods_take_what_begins_in_them(encoder, generator):
    """Observations on both sides of the new year; another period and what the place has before it have no effect."""
    values = torch.rand(2, 2, 6, 6, generator=generator)
    batch = dated(values, [364, 365])
    task = task_of(encoder, periods=YEARS, fuse="concat")
    both = task.apart(encoder, batch)
    assert both.raster("image").row.tolist() == [0, 1]
    assert torch.equal(both.raster("image").values, values)
    more = dated(torch.cat([torch.rand(1, 2, 6, 6, generator=generator), values]), [-1, 364, 365])
    assert torch.equal(task.apart(encoder, more).raster("image").values, values)
    undated = image_batch(values[:1])
    assert task.apart(encoder, undated).raster("image").row.tolist() == [0, 1]


def test_a_series_of_changes_is_the_task_asked_period_by_period(encoder, generator):
    values = torch.rand(3, 2, 6, 6, generator=generator)
    batch = dated(values, [0, 365, 731])
    task = task_of(encoder, periods=YEARS)
    steps = [task.between(a, b) for a, b in itertools.pairwise(["2019", "2020", "2021"])]
    found = [predicted(step, encoder, batch).values for step in steps]
    assert torch.equal(found[0], predicted(task, encoder, batch).values)
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[1], predicted(task, encoder, dated(values[1:], [0, 365])).values)
    with torch.no_grad():
        task.classify.head.head[1].bias[0] += 5.0
    assert not torch.allclose(found[1], predicted(steps[1], encoder, batch).values)
    assert set(steps[1].state_dict()) == set(task.state_dict())


def test_ends_are_the_first_and_last_date_of_each_place(encoder, generator):
    values = torch.rand(6, 2, 6, 6, generator=generator)
    batch = Batch.cat([dated(values[:3], [40, 3, 800]), dated(values[3:5], [10, 5]), dated(values[5:], [7])])
    both = task_of(encoder, periods="ends").apart(encoder, batch).raster("image")
    firsts, lasts = (both.obs(both.row < 3), both.obs(both.row >= 3))
    assert torch.equal(firsts.values[firsts.row.argsort()], values[[1, 4, 5]])
    assert torch.equal(lasts.values[lasts.row.argsort()], values[[2, 3]])
    assert sorted(lasts.row.tolist()) == [3, 4]  # the third place has one date: nothing to compare it with


def test_states_make_the_label(encoder, generator):
    """Class codes at both times: what differs has changed, where both are known."""
    codes = torch.randint(5, (2, 1, 6, 6), generator=generator).float()
    valid = torch.rand(2, 1, 6, 6, generator=generator) > 0.2
    batch = dated(torch.rand(2, 2, 6, 6, generator=generator), [10, 700])
    label = replace(
        label_raster(codes, 10.0, valid), row=torch.zeros(2, dtype=torch.long), time_s=batch.raster("image").time_s
    )
    batch = batch.adding(label=label.obs(torch.tensor([1, 0])))
    for periods in (YEARS, "ends"):
        task = task_of(encoder, periods=periods, states=True)
        _, truth = task.pairs(predicted(task, encoder, batch), batch)
        both = valid.all(0)[0]
        assert torch.equal(truth, (codes[0, 0] != codes[1, 0])[both].long())
        assert torch.isfinite(task(encoder, batch, generator)["loss"])
    pair = Batch(
        batch.places, {n: batch.raster("image").obs(torch.tensor([i])) for i, n in enumerate(("before", "after"))}
    )
    pair = pair.adding(old=label.obs(torch.tensor([0])), new=label.obs(torch.tensor([1])))
    named = task_of(encoder, pairs={"image": ["before", "after"], "label": ["old", "new"]}, states=True)
    assert torch.equal(named.pairs(predicted(named, encoder, pair), pair)[1], truth)
    twice = Raster._cat([batch.raster("label"), label.obs(torch.tensor([0]))], [0, 0])
    with pytest.raises(ValueError, match="several maps of one place before"):
        task_of(encoder, periods=YEARS, states=True)(encoder, batch.adding(label=twice), generator)


def test_classes_of_change(encoder, generator):
    batch = pair_batch(generator, rows=3)
    grew = batch.raster("after").values[:, :1] > batch.raster("before").values[:, :1]
    codes = torch.where(batch.raster("label").values > 0, torch.where(grew, 7, 3), 5)
    batch = batch.adding(label=label_raster(codes, 10.0))
    task = task_of(encoder, classes={3: "lost", 5: "same", 7: "gained"}, unchanged=5, head="mlp")
    fit(task, encoder, batch, generator, 250)
    p, truth = task.pairs(predicted(task, encoder, batch), batch)
    metrics = task.metrics()
    for metric in metrics.values():
        metric.update(p, truth)
    hit = (p.argmax(1) != 1) & (truth != 1)
    assert metrics["recall_changed"].compute() == pytest.approx(float(hit.sum() / (truth != 1).sum()))
    assert metrics["f1_changed"].compute() > 0.9


def test_the_task_is_rebuilt_from_its_config(encoder, generator):
    batch = pair_batch(generator)
    for options in ({"symmetric": True, "loss": "focal", "loss_options": {"gamma": 1.0}}, {"periods": YEARS}):
        task = task_of(encoder, **options)
        again = build(encoder=encoder, **json.loads(json.dumps(task.config)))
        again.load_state_dict(task.state_dict())
        assert again.config == task.config
        batch = batch if "periods" not in options else dated(torch.rand(2, 2, 6, 6), [1, 400])
        assert torch.equal(*(predicted(t, encoder, batch).values for t in (task, again)))
    assert find("tasks", "change/place")[0].build is build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse": "diference"}, "Did you mean difference"),
        ({"classes": ["one"]}, "at least two"),
        ({"classes": {0: "a", 2: "b"}, "periods": YEARS, "states": True}, "0 \\(unchanged\\) and 1"),
        ({"unchanged": 4}, "unchanged=4"),
        ({"pairs": {"image": ["before"]}}, "expected two names"),
        ({"pairs": {"imge": ["before", "after"]}}, "Did you mean image"),
        ({"pairs": {"image": ["a", "b"]}, "periods": YEARS}, "not both"),
        ({"pairs": {"image": ["a", "b"]}, "states": True}, "which layers hold 'label'"),
        ({"states": True}, "say in pairs which layers"),
        ({"periods": ["2019", "2019"]}, "one and the same"),
        ({"periods": ["2019"]}, "expected two of them"),
        ({"periods": ["2019", "lately"]}, "no ISO 8601 date"),
        ({"gsd_m": 15.0}, "not a multiple"),
    ],
)
def test_options_that_do_not_fit_are_refused(encoder, options, message):
    given = {"encoder": encoder, "gsd_m": 10.0, "token_size_m": 20.0}
    with pytest.raises((ValueError, LookupError), match=message):
        build(**{**given, **options})


def test_a_batch_without_the_layers_is_refused(encoder, generator):
    with pytest.raises(LookupError, match="no raster layer 'before'; it has label"):
        task_of(encoder).features(encoder, pair_batch(generator).only("label"))
    with pytest.raises(ValueError, match="not periods"):
        task_of(encoder).between("2019", "2020")


class Rgb(SquareEncoder):
    """The square encoder on the three colours of the change sets."""

    def __init__(self, gsd_m):
        super().__init__(4 * gsd_m, gsd_m, 16)
        sensor = change_pairs.sensors.get("rgb-image")
        self.inputs = {"image": Input(sensor, gsd_m, (110.0,) * 3, (60.0,) * 3)}
        self.proj = torch.nn.Linear(3 * 16, 16)


def test_on_real_pairs_it_beats_saying_changed_everywhere(data_dir, generator):
    data = change_pairs.build("levir", root=data_dir / "change_detection", split="train")
    batch = Batch.cat([data[i] for i in range(min(len(data), 2))])
    torch.manual_seed(0)
    encoder = Rgb(0.5)
    task = build("pixel", encoder=encoder, gsd_m=0.5, token_size_m=2.0, head="mlp", loss="ce+dice")
    fit(task, encoder, batch, generator, 30)
    p, truth = task.pairs(predicted(task, encoder, batch), batch)
    metric = task.metrics()["f1_changed"]
    metric.update(p, truth)
    share = float((truth == 1).float().mean())
    assert 0 < share < 0.5
    assert metric.compute() > 1.3 * 2 * share / (1 + share)
